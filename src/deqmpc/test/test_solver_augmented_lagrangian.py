"""The augmented-Lagrangian solver: optimality, isolation of samples, statuses, gradient."""

import dataclasses

import pytest
import solver_benchmark
import torch

from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.problem import Instances, Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import riccati

torch.set_num_threads(1)
TIGHT = al.Settings(feasibility=1e-9, optimality=1e-18, gn_steps=60, newton_below=1e-2)


def crazyflie_problem(horizon=5, **bounds):
    Q = [20.0] * 3 + [1.0] * 3 + [1.0] * 3 + [0.05] * 3
    bounds = {'u_low': [0.16] * 4, 'u_high': [1.5] * 4, **bounds}
    return Problem(Crazyflie(), 0.05, horizon, Q, [0.05] * 4, Qf=[2.0 * q for q in Q], **bounds)


def random_instances(problem, B=6, K=5, seed=0, dtype=torch.float64):
    """Flights along x with spheres beside the way, some of them active."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    T = problem.horizon
    x = 0.05 * normal(B, 12)
    x[:, 6] += 1.0
    ref = torch.zeros(B, T + 1, 12, dtype=torch.float64)
    ref[:, :, 0] = problem.dt * torch.arange(T + 1) * 1.2
    ref[:, :, 6] = 1.2
    centers = torch.cat([0.4 + 0.1 * normal(B, K, 1).abs(), 0.25 * normal(B, K, 2)], dim=-1)
    centers[:, 0] = torch.tensor([0.28, 0.0, 0.05], dtype=torch.float64) + 0.03 * normal(B, 3)
    return problem.instances(*(v.to(dtype) for v in (
        x, ref, torch.ones(B, T, 4, dtype=torch.float64), centers,
        torch.full((B, K), 0.1, dtype=torch.float64))))


@pytest.fixture(scope='module')
def problem():
    return crazyflie_problem()


def lagrangian_gradient(problem, data, solution):
    """Gradient of cost + eta' k + lambda' h by autograd."""
    x, u = (v.detach().clone().requires_grad_() for v in (solution.x, solution.u))
    start = solution.warm_start
    value = (problem.cost(data, x, u).sum() + (start.eta * problem.defects(data, x, u)).sum()
             + (start.lam * problem.residuals(data, x, u)).sum())
    return torch.cat([v.flatten(1) for v in torch.autograd.grad(value, (x, u))], dim=1)


def test_a_converged_solution_satisfies_the_kkt_conditions(problem):
    data = random_instances(problem)
    solution = al.solve(problem, data, settings=TIGHT)
    assert solution.converged.all()
    lam, h = solution.warm_start.lam, problem.residuals(data, solution.x, solution.u)
    assert (lam > 1e-3).any(dim=2).any(dim=1).sum() >= 3  # constraints are active, so that the test says something
    assert lagrangian_gradient(problem, data, solution).abs().max() < 1e-7
    assert problem.defects(data, solution.x, solution.u).abs().max() < 1e-8
    assert h.max() < 1e-8 and (lam * h).abs().max() < 1e-7 and lam.min() >= 0


def test_the_step_equals_a_dense_solve_of_its_kkt_system(problem):
    """Residual of the dense system, assembled with autograd, below 1e-8 for small and large penalties."""
    data = random_instances(problem, B=2)
    T, n, m = problem.horizon, problem.n, problem.m
    for mu in (1e1, 1e4, 1e8):
        start = dataclasses.replace(al.cold_start(problem, data, al.Settings()),
                                    mu=torch.full((2,), mu, dtype=torch.float64))
        start.eta.normal_(generator=torch.Generator().manual_seed(1))
        solver = al._Solver(problem, data, start, al.Settings())
        dx, du, slope, ok = solver.direction()
        assert ok.all()
        for b in range(2):
            one = data[b:b + 1]
            size = (T + 1) * n

            def parts(tau, one=one, size=size):
                x, u = tau[:size].view(1, T + 1, n), tau[size:].view(1, T, m)
                return (problem.defects(one, x, u).flatten(), problem.residuals(one, x, u).flatten(),
                        problem.cost(one, x, u).sum())
            tau = torch.cat([start.x[b].flatten(), start.u[b].flatten()])
            A = torch.autograd.functional.jacobian(lambda t: parts(t)[0], tau)
            G = torch.autograd.functional.jacobian(lambda t: parts(t)[1], tau)
            g = torch.autograd.functional.jacobian(lambda t: parts(t)[2], tau)
            W = torch.autograd.functional.hessian(lambda t: parts(t)[2], tau)
            k, h, _ = parts(tau)
            v = (mu * h).clamp_min(0.0)
            P = W + mu * G.T @ ((v > 0).double().unsqueeze(1) * G)
            d = torch.cat([dx[b].flatten(), du[b].flatten()])
            y = start.eta[b].flatten() + mu * (k + A @ d)
            matrix = torch.cat([torch.cat([P, A.T], 1), torch.cat([A, -torch.eye(len(k)) / mu], 1)], 0)
            rhs = -torch.cat([g + G.T @ v, k + start.eta[b].flatten() / mu])
            exact = torch.linalg.solve(matrix, rhs)
            assert (exact[:len(d)] - d).abs().max() < 1e-8
            assert (matrix[:len(d)] @ torch.cat([d, exact[len(d):]]) - rhs[:len(d)]).abs().max() < 1e-8 * max(
                1.0, P.abs().max())
            if mu < 1e5:
                assert (y - exact[len(d):]).abs().max() < 1e-8 * mu
            gradient = g + G.T @ v + A.T @ (start.eta[b].flatten() + mu * k)
            assert abs(float(gradient @ d - slope[b])) < 1e-8 * max(1.0, abs(float(slope[b])))


def test_batched_equals_looped(problem):
    data = random_instances(problem)
    whole = al.solve(problem, data)
    for b in range(len(data.x_init)):
        one = al.solve(problem, data[b:b + 1])
        assert one.steps[0] == whole.steps[b] and one.status[0] == whole.status[b]
        assert torch.allclose(one.x[0], whole.x[b], atol=1e-9)


@pytest.mark.parametrize('what', ['x_init', 'centers', 'warm start', 'infeasible', 'infinite reference'])
def test_one_bad_sample_leaves_the_others_bit_equal(problem, what):
    data = random_instances(problem)
    start = al.cold_start(problem, data, al.Settings())
    good = al.solve(problem, data, start)
    data = Instances(*(v.clone() for v in data.tensors()))
    expected = al.Status.NOT_FINITE
    if what == 'x_init':
        data.x_init[2, 4] = float('nan')
    elif what == 'centers':
        data.centers[2, 3, 1, 0] = float('inf')
    elif what == 'warm start':
        start.x[2, 1, 0] = float('nan')
    elif what == 'infinite reference':
        data.x_ref[2, 1, 0] = float('inf')
    else:
        data.centers[2, :, 0], data.radii[2, 0] = data.x_init[2, :3], 2.0  # the first knots cannot leave it
        expected = al.Status.INFEASIBLE
    bad = al.solve(problem, data, start)
    others = [0, 1, 3, 4, 5]
    assert good.converged.all() and bad.status_of(2) is expected
    for name in ('x', 'u', 'status', 'steps', 'cost', 'decrement'):
        assert torch.equal(getattr(good, name)[others], getattr(bad, name)[others]), name
    for a, b in zip(good.warm_start.tensors(), bad.warm_start.tensors(), strict=True):
        assert torch.equal(a[others], b[others])


def test_a_batch_of_only_bad_samples_ends_with_a_status_for_each(problem):
    data = random_instances(problem, B=3)
    data = dataclasses.replace(data, x_init=data.x_init * float('nan'))
    solution = al.solve(problem, data)
    assert [solution.status_of(i) for i in range(3)] == [al.Status.NOT_FINITE] * 3


def test_the_solution_continues_from_its_own_warm_start(problem):
    data = random_instances(problem)
    first = al.solve(problem, data)
    again = al.solve(problem, data, first.warm_start)
    assert again.converged.all() and again.steps.max() <= 3 < first.steps.max()
    assert torch.allclose(again.x, first.x, atol=1e-2)


def test_a_shifted_warm_start_repeats_the_last_knot():
    start = al.WarmStart(*(torch.arange(6.0).view(1, 6, 1) for _ in range(4)), torch.ones(1))
    assert start.shifted(2).x.flatten().tolist() == [2.0, 3.0, 4.0, 5.0, 5.0, 5.0]


def test_float32_reaches_the_float64_solution(problem):
    double = al.solve(problem, random_instances(problem))
    single = al.solve(problem, random_instances(problem, dtype=torch.float32))
    assert single.x.dtype == torch.float32 and single.converged.all()
    assert (single.cost - double.cost).abs().max() < 1e-2 * double.cost.max()


def test_all_spheres_count_and_not_only_the_nearest(problem):
    data = random_instances(problem, B=1, K=1)
    many = problem.instances(data.x_init, data.x_ref, data.u_ref,
                             data.centers[:, 0].repeat(1, 40, 1) + torch.linspace(0, 0.01, 40).view(1, 40, 1).double(),
                             data.radii.repeat(1, 40))
    solution = al.solve(problem, many)
    assert solution.converged.all() and problem.residuals(many, solution.x, solution.u).max() < 1e-4


def test_soft_constraints_hold_where_they_can_and_give_way_where_they_must(problem):
    data = random_instances(problem)
    soft = al.Settings(elastic=300.0)
    hard, same = al.solve(problem, data), al.solve(problem, data, settings=soft)
    assert same.converged.all() and torch.allclose(same.x, hard.x, atol=2e-3)
    inside = problem.instances(data.x_init, data.x_ref, data.u_ref, data.x_init[:, None, :3] + 0.01,
                               torch.full((6, 1), 0.1, dtype=torch.float64))
    solution = al.solve(problem, inside, settings=soft)
    assert all(solution.status_of(b) is al.Status.INFEASIBLE for b in range(6))
    assert solution.defect.max() < 1e-4 and solution.decrement.max() < 1e-4  # converged, but for the soft rows
    gap = (solution.x[:, :, :3] - inside.centers[:, :, 0]).norm(dim=-1)
    assert (gap[:, -1] > gap[:, 1]).all()


def test_a_sample_at_its_step_limit_says_so(problem):
    solution = al.solve(problem, random_instances(problem), settings=al.Settings(max_steps=2))
    assert solution.steps.max() == 2 and solution.status_of(0) is al.Status.ITERATION_LIMIT
    assert 'limit' in al.Status.ITERATION_LIMIT.value


def test_padding_spheres_of_radius_zero_change_nothing(problem):
    data = random_instances(problem)
    padded = problem.instances(data.x_init, data.x_ref, data.u_ref,
                               torch.cat([data.centers[:, 0], torch.zeros(6, 3, 3).double()], dim=1),
                               torch.cat([data.radii, torch.zeros(6, 3).double()], dim=1))
    assert torch.allclose(al.solve(problem, data).x, al.solve(problem, padded).x, atol=1e-10)


def test_wrong_shapes_name_the_argument_what_came_and_what_was_expected(problem):
    data = random_instances(problem)
    with pytest.raises(ValueError, match=r'x_ref has shape \(6, 5, 12\), expected \(6, 6, 12\)'):
        problem.instances(data.x_init, data.x_ref[:, 1:], data.u_ref)
    with pytest.raises(ValueError, match=r'centers has shape \(6, 7, 5, 3\), expected \(6, 5, 3\) or \(6, 6, 5, 3\)'):
        problem.instances(data.x_init, data.x_ref, data.u_ref, data.centers[:, [0, *range(6)]], data.radii)
    with pytest.raises(ValueError, match='u_ref is torch.float32'):
        problem.instances(data.x_init, data.x_ref, data.u_ref.float())
    other = al.cold_start(crazyflie_problem(), random_instances(problem, K=4), al.Settings())
    with pytest.raises(ValueError, match=r'warm_start.lam is .* of shape \(6, 5, 12\), expected .*\(6, 5, 13\)'):
        al.solve(problem, data, other)
    with pytest.raises(ValueError, match='gn_steps = 0; expected an integer >= 1'):
        al.Settings(gn_steps=0)
    with pytest.raises(ValueError, match='R = .* expected numbers > 0'):
        Problem(Crazyflie(), 0.05, 5, [1.0] * 12, [0.0] * 4)


# --- gradient -------------------------------------------------------------------------------------

def loss_of(problem, settings):
    weights = torch.Generator().manual_seed(5)

    def loss(*tensors):
        solution = al.solve(problem, Instances(*tensors), settings=settings)
        wx = torch.randn(solution.x.shape[1:], generator=weights.manual_seed(5), dtype=torch.float64)
        wu = torch.randn(solution.u.shape[1:], generator=weights, dtype=torch.float64)
        return (wx * solution.x).sum((1, 2)) + (wu * solution.u).sum((1, 2))
    return loss


@pytest.mark.parametrize('argument', ['x_init', 'x_ref', 'u_ref', 'Q', 'R', 'Qf', 'centers', 'radii'])
def test_gradient_equals_finite_differences(problem, argument):
    data = random_instances(problem, B=3)
    names = [f.name for f in dataclasses.fields(Instances)]
    tensors = [v.clone().requires_grad_(name == argument) for name, v in zip(names, data.tensors(), strict=True)]
    loss = loss_of(problem, TIGHT)
    wanted = tensors[names.index(argument)]
    gradient, = torch.autograd.grad(loss(*tensors).sum(), wanted)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        h = 1e-5
        both = [torch.cat([v, v]) for v in tensors]
        both[names.index(argument)] = torch.cat([wanted + h * direction, wanted - h * direction])
        ends = loss(*both)
    numeric = (ends[:3] - ends[3:]) / (2 * h)
    analytic = (gradient * direction).flatten(1).sum(1)
    assert torch.allclose(analytic, numeric, rtol=1e-4, atol=1e-5 * float(numeric.abs().max()))


def test_gradcheck_passes_for_reference_and_start():
    problem = crazyflie_problem(horizon=2)
    data = random_instances(problem, B=1, K=1)

    def trajectory(x_init, x_ref):
        moved = dataclasses.replace(data, x_init=x_init, x_ref=x_ref)
        solution = al.solve(problem, moved, settings=TIGHT)
        return solution.x, solution.u
    assert torch.autograd.gradcheck(trajectory, (data.x_init.clone().requires_grad_(),
                                                 data.x_ref.clone().requires_grad_()),
                                    eps=1e-5, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_unconverged_samples_keep_a_gradient_and_are_flagged(problem):
    data = random_instances(problem)
    data.x_ref.requires_grad_()
    solution = al.solve(problem, data, settings=al.Settings(max_steps=3))
    assert not solution.converged.any() and solution.x.requires_grad and solution.differentiable.all()
    gradient, = torch.autograd.grad(solution.x.square().sum(), data.x_ref)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).abs().amax(1) > 1e-3).all()


def test_a_sample_that_is_not_finite_has_zero_gradient_and_is_flagged(problem):
    data = random_instances(problem)
    data.x_init[1, 0] = float('nan')
    data.x_ref.requires_grad_()
    solution = al.solve(problem, data)
    assert solution.differentiable.tolist() == [True, False, True, True, True, True]
    gradient, = torch.autograd.grad(solution.x[solution.converged].square().sum(), data.x_ref)
    assert gradient[1].abs().max() == 0 and torch.isfinite(gradient).all()


def test_factorisation_is_reused_by_the_backward_pass(problem, monkeypatch):
    data = random_instances(problem)
    data.x_ref.requires_grad_()
    x = al.solve(problem, data).x
    calls = []
    monkeypatch.setattr(riccati, 'factor', lambda *a: calls.append(a))
    torch.autograd.grad(x.sum(), data.x_ref)
    assert not calls


# --- against Ipopt --------------------------------------------------------------------------------

@pytest.mark.parametrize('T', [5, 20])
def test_benchmark_instances_are_solved_to_the_optimum_of_ipopt(T):
    d = {k: v[:30] for k, v in solver_benchmark.recorded(T).items()}
    problem, data = solver_benchmark.instances(d, T)
    xw, uw = torch.from_numpy(d['xw']), torch.from_numpy(d['uw'])
    solution = al.solve(problem, data, al.guess(problem, data, xw, uw, al.Settings()))
    assert solution.converged.all()
    violation = problem.residuals(data, solution.x, solution.u).flatten(1).amax(dim=1)
    assert violation.max() < 1.01e-4 and solution.defect.max() < 1.01e-4
    assert (solution.cost.numpy() <= 1.01 * d['cost']).all()
