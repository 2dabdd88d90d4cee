"""Batches through the compiled solver: the numbers of single solves, and the implicit gradient of the torch solver."""

import dataclasses

import numpy as np
import pytest
import solver_benchmark
import torch

from deqmpc.problem import Instances
from deqmpc.realtime import RealtimeSolver, Settings, WarmStart, build
from deqmpc.realtime import solver as realtime
from deqmpc.solvers import augmented_lagrangian as al

torch.set_num_threads(1)
T, K = 5, 6
FIELDS = tuple(f.name for f in dataclasses.fields(Instances))
TWO = al.Settings(iterations=2, gn_steps=3, optimality=0.0, exact_gradient=False)
SOFT = {'x_low': [-np.inf, -np.inf, -0.05, *[-np.inf] * 9], 'x_high': [*[np.inf] * 6, 1.15, 1.0, 1.0, *[np.inf] * 3]}

needs_compiler = pytest.mark.skipif(not build.available(), reason='no C compiler on this machine')


def problem(horizon=T, **bounds):
    return solver_benchmark.problem(horizon, **{'u_low': [0.3] * 4, 'u_high': [1.3] * 4, **bounds})


def instances(p, B=20, seed=0, requires_grad=False):
    """Flights along x with weights of their own, beside moving spheres of several radii, some active, one absent."""
    rng = np.random.default_rng(seed)
    horizon = p.horizon
    x = 0.05 * rng.normal(size=(B, 12))
    x[:, 6] += 1.0
    ref = np.zeros((B, horizon + 1, 12))
    ref[..., 0], ref[..., 6] = 0.05 * np.arange(horizon + 1) * 1.2, 1.2
    centers = np.concatenate([0.4 + 0.1 * abs(rng.normal(size=(B, K, 1))), 0.25 * rng.normal(size=(B, K, 2))], axis=2)
    centers[:, 0] = [0.28, 0.0, 0.05] + 0.03 * rng.normal(size=(B, 3))
    centers = centers[:, None] + 0.01 * np.arange(horizon + 1)[:, None, None]
    radii = rng.uniform(0.08, 0.12, size=(B, K))
    radii[:, -1] = 0.0
    weights = [w.numpy() * rng.uniform(0.7, 1.4, size=(B, len(w))) for w in (p.Q, p.R, p.Qf)]
    given = [torch.from_numpy(v) for v in (x, ref, np.ones((B, horizon, 4)), *weights, centers, radii)]
    return Instances(*(v.requires_grad_(requires_grad) for v in given))


def start_of(p, data, mu=1.0, seed=1):
    """A start with multipliers, so that nothing is zero by chance."""
    g = torch.Generator().manual_seed(seed)
    cold = al.cold_start(p, data, al.Settings())

    def noise(v, scale):
        return v + scale * torch.randn(v.shape, generator=g, dtype=v.dtype)
    return al.WarmStart(noise(cold.x, 0.02), noise(cold.u, 0.05), noise(cold.lam, 0.1).clamp_min(0.0),
                        noise(cold.eta, 0.1), torch.full_like(cold.mu, mu))


def detached(data):
    return Instances(*(v.detach() for v in data.tensors()))


def gradients(data, solution, gx, gu):
    return torch.autograd.grad((solution.x * gx).sum() + (solution.u * gu).sum(), data.tensors())


def loss_gradients(solution, seed=2):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(v.shape, generator=g, dtype=v.dtype) for v in (solution.x, solution.u))


def same(a, b):
    return torch.equal(torch.nan_to_num(a, nan=1e99), torch.nan_to_num(b, nan=1e99))


@needs_compiler
@pytest.mark.parametrize('settings', [TWO, al.Settings(), Settings()], ids=['fixed', 'to tolerance', 'interior point'])
def test_a_batch_has_the_numbers_of_single_solves(settings):
    p = problem()
    solver = RealtimeSolver(p, K, settings)
    data = instances(p)
    data = dataclasses.replace(data, Q=p.Q.expand(20, -1), R=p.R.expand(20, -1), Qf=p.Qf.expand(20, -1))
    start = start_of(p, data)
    whole = solver.solve_batch(data, start)
    for b in range(20):
        x, u, lam, eta, mu = (v[b].numpy() for v in start.tensors())
        one = solver.solve(*(getattr(data, n)[b].numpy() for n in ('x_init', 'x_ref', 'u_ref', 'centers', 'radii')),
                           WarmStart(x, u, lam, eta, float(mu)))
        assert whole.status_of(b) is one.status and int(whole.steps[b]) == one.steps
        w = whole.warm_start
        for got, expected in ((whole.x, one.x), (whole.u, one.u), (w.lam, one.warm_start.lam),
                              (w.eta, one.warm_start.eta), (w.mu, one.warm_start.mu), (whole.cost, one.cost),
                              (whole.defect, one.defect), (whole.violation, one.violation),
                              (whole.decrement, one.optimality)):
            assert np.array_equal(got[b].numpy(), expected)
    assert np.array_equal(start.x, start_of(p, data).x)  # the start is read, not written


@needs_compiler
def test_weights_of_each_sample_are_those_of_the_torch_solver():
    p = problem()
    data = instances(p)
    start = start_of(p, data)
    got, expected = RealtimeSolver(p, K, TWO).solve_batch(data, start), al.solve(p, data, start, TWO)
    assert torch.equal(got.status, expected.status) and torch.equal(got.steps, expected.steps)
    assert (got.x - expected.x).abs().max() < 1e-9 and (got.u - expected.u).abs().max() < 1e-9
    assert (got.cost - expected.cost).abs().max() < 1e-9 * expected.cost.abs().max()


@needs_compiler
def test_a_solver_keeps_the_weights_of_its_problem_after_a_batch_with_others():
    p = problem()
    solver, data = RealtimeSolver(p, K, TWO), instances(p)
    one = [getattr(data, n)[0].numpy() for n in ('x_init', 'x_ref', 'u_ref', 'centers', 'radii')]
    before = solver.solve(*one)
    solver.solve_batch(data)
    assert np.array_equal(solver.solve(*one).x, before.x)


@needs_compiler
@pytest.mark.parametrize('name', [*FIELDS, 'start'])
def test_a_sample_that_is_not_finite_leaves_the_others_bit_equal(name):
    p = problem()
    solver = RealtimeSolver(p, K, TWO)
    g = loss_gradients(solver.solve_batch(instances(p)))
    results = []
    for broken in (False, True):
        data = instances(p)
        start = start_of(p, data)
        if broken:
            (start.lam if name == 'start' else getattr(data, name))[7].view(-1)[-1] = float('nan')
        for v in data.tensors():
            v.requires_grad_()
        solution = solver.solve_batch(data, start)
        results.append((solution, gradients(data, solution, *g)))
    (good, good_gradients), (bad, bad_gradients) = results
    others = [b for b in range(20) if b != 7]
    assert bad.status_of(7) is al.Status.NOT_FINITE and not bad.differentiable[7] and bad.differentiable[others].all()
    for v in (bad.x, bad.u, bad.cost, bad.defect, *bad.warm_start.tensors()):
        assert v[7].isnan().all()
    for a, b in ((good.x, bad.x), (good.warm_start.eta, bad.warm_start.eta), *zip(good_gradients, bad_gradients,
                                                                               strict=True)):
        assert torch.equal(a[others], b[others])
    assert all((v[7] == 0).all() for v in bad_gradients)


@needs_compiler
@pytest.mark.parametrize('settings', [TWO, al.Settings(), Settings()], ids=['fixed', 'to tolerance', 'interior point'])
def test_a_sample_of_huge_numbers_leaves_the_others_bit_equal(settings):
    """Its overflow must not stay in the working memory that the next samples use."""
    p = problem()
    solver, data = RealtimeSolver(p, K, settings), instances(p, B=10)
    expected = RealtimeSolver(p, K, settings).solve_batch(data)
    for scale in (1e30, 1e200, 1e308):
        huge = dataclasses.replace(data, x_init=data.x_init.clone())
        huge.x_init[::2] *= scale
        found = solver.solve_batch(huge)
        assert torch.equal(found.x[1::2], expected.x[1::2]) and torch.equal(found.cost[1::2], expected.cost[1::2])


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    p = problem()
    solver = RealtimeSolver(p, K, TWO)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            data = instances(p, B=37, requires_grad=True)
            solution = solver.solve_batch(data)
            found.append((solution.x, solution.cost, *gradients(data, solution, *loss_gradients(solution))))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- gradient -------------------------------------------------------------------------------------

@needs_compiler
@pytest.mark.parametrize('exact', [False, True], ids=['Gauss-Newton', 'exact'])
@pytest.mark.parametrize('elastic', [float('inf'), 4.0], ids=['hard', 'soft'])
@pytest.mark.parametrize('horizon', [1, 5, 13])
def test_gradients_are_those_of_the_torch_solver(exact, elastic, horizon):
    """At the same solution, converged or not; largest difference relative to the largest entry of each sample."""
    p = problem(horizon, **SOFT)
    for iterations, mu in ((2, 1.0), (30, 1000.0)):
        settings = al.Settings(iterations=iterations, elastic=elastic, exact_gradient=exact)
        data = instances(p, requires_grad=True)
        solution = RealtimeSolver(p, K, settings).solve_batch(data, start_of(p, data, mu))
        g = loss_gradients(solution)
        with torch.no_grad():
            oracle = al.ImplicitGradient(p, detached(data), solution, settings)
            expected = oracle.pull_back(*g, [True] * 8)
        assert torch.equal(solution.differentiable, oracle.ok) and oracle.ok.any()
        converged, constrained = solution.converged, (solution.warm_start.lam > 1e-3).flatten(1).any(dim=1)
        counted = converged if iterations > 2 else ~converged
        assert counted.sum() >= 3 and (horizon == 1 or (counted & constrained).sum() >= 3)
        # active rows of converged samples weigh 1e8: that many times the rounding of one product
        tolerance = torch.where(converged, 1e-8, 1e-10)
        for name, a, b in zip(FIELDS, gradients(data, solution, *g), expected, strict=True):
            scale = b.flatten(1).abs().amax(dim=1).clamp_min(1e-12)
            assert ((a - b).flatten(1).abs().amax(dim=1) < tolerance * scale).all(), name


@needs_compiler
@pytest.mark.parametrize('settings', [al.Settings(feasibility=1e-8), Settings(tolerance=1e-9)],
                         ids=['augmented Lagrangian', 'interior point'])
def test_the_gradient_of_converged_samples_equals_finite_differences(settings):
    """Of the torch solver's solutions, which reach tolerances at which differences mean something."""
    p, B, h = problem(u_low=[0.9] * 4, u_high=[1.1] * 4), 8, 1e-5
    tight = al.Settings(feasibility=1e-9, optimality=1e-18, gn_steps=60, max_steps=400, newton_below=1e-2)
    data = instances(p, B, requires_grad=True)
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(v.shape, generator=g, dtype=v.dtype) for v in data.tensors()]
    directions[-1][:, -1] = 0.0  # an absent sphere stays absent
    plain = detached(data).tensors()
    moved = [[v + step * d * (i == name) for i, (v, d) in enumerate(zip(plain, directions, strict=True))]
             for name in range(8) for step in (0.0, h, -h)]  # all in one batch: for each field here, ahead, behind
    ends = al.solve(p, Instances(*(torch.cat(v) for v in zip(*moved, strict=True))), settings=tight)
    near = ends.warm_start[:B]
    solution = RealtimeSolver(p, K, settings).solve_batch(data, near)
    gx, gu = loss_gradients(solution)
    loss = ((ends.x.unflatten(0, (24, B)) * gx).sum((2, 3)) + (ends.u.unflatten(0, (24, B)) * gu).sum((2, 3)))
    known = solution.converged & ends.converged.view(24, B).all(dim=0)
    assert (known & (near.lam > 1e-3).flatten(1).any(dim=1)).sum() >= 3
    for i, (name, found) in enumerate(zip(FIELDS, gradients(data, solution, gx, gu), strict=True)):
        measured = ((loss[3 * i + 1] - loss[3 * i + 2]) / (2.0 * h))[known]
        predicted = (found * directions[i]).flatten(1).sum(1)[known]
        assert measured.abs().max() > 0, name
        assert torch.allclose(predicted, measured, rtol=1e-4, atol=1e-5 * float(measured.abs().max())), name


@needs_compiler
def test_only_gradients_that_are_asked_for_are_made():
    p = problem()
    data = instances(p)
    data.x_ref.requires_grad_()
    solution = RealtimeSolver(p, K, TWO).solve_batch(data)
    solution.x.sum().backward()
    assert data.x_ref.grad.abs().max() > 0 and all(v.grad is None for v in data.tensors() if v is not data.x_ref)
    with torch.no_grad():
        assert not RealtimeSolver(p, K, TWO).solve_batch(data).x.requires_grad


@needs_compiler
def test_the_gradient_does_not_change_when_the_solution_is_written_to_and_refuses_changed_inputs():
    p = problem()
    wanted = None
    for touch in (False, True):
        data = instances(p, requires_grad=True)
        solution = RealtimeSolver(p, K, TWO).solve_batch(data)
        g = loss_gradients(solution)
        if touch:
            for v in (solution.status, *solution.warm_start.tensors()):
                v.zero_()
        found = gradients(data, solution, *g)
        wanted = wanted or found
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    solution = RealtimeSolver(p, K, TWO).solve_batch(data)
    with torch.no_grad():
        data.x_ref.add_(1.0)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        gradients(data, solution, *g)


@needs_compiler
def test_a_loss_that_is_not_a_number_shows_in_the_gradient_of_its_sample_alone():
    p = problem()
    data = instances(p, requires_grad=True)
    solution = RealtimeSolver(p, K, TWO).solve_batch(data)
    gx, gu = loss_gradients(solution)
    clean = gradients(data, solution, gx, gu)
    gx[3] = float('nan')
    dirty = gradients(data, RealtimeSolver(p, K, TWO).solve_batch(data), gx, gu)
    assert dirty[1][3].isnan().any() and all(torch.equal(a[4:], b[4:]) for a, b in zip(clean, dirty, strict=True))


# --- errors and the fallback ----------------------------------------------------------------------

@needs_compiler
def test_what_does_not_fit_is_named():
    p = problem()
    data = instances(p)
    with pytest.raises(ValueError, match=f'{K} spheres, expected at most spheres_max = 2'):
        RealtimeSolver(p, 2, TWO).solve_batch(data)
    single = Instances(*(v.float() for v in data.tensors()))
    with pytest.raises(ValueError, match='x_init is torch.float32 on cpu'):
        RealtimeSolver(p, K, TWO).solve_batch(single)
    start = al.cold_start(p, data, TWO)
    with pytest.raises(ValueError, match=r'warm_start.x is torch.float64 of shape \(20, 5, 12\)'):
        RealtimeSolver(p, K, TWO).solve_batch(data, dataclasses.replace(start, x=start.x[:, 1:]))


def test_without_a_compiler_the_torch_solver_serves_batch_and_gradient(monkeypatch):
    p = problem()
    data = instances(p, B=3, requires_grad=True)
    monkeypatch.setenv('PATH', '/nonexistent')
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(realtime, '_said', {'said'})
    solver = RealtimeSolver(p, K, TWO)
    assert not solver.compiled
    solution, expected = solver.solve_batch(data), al.solve(p, data, settings=TWO)
    g = loss_gradients(solution)
    assert same(solution.x, expected.x)
    assert all(same(a, b) for a, b in zip(gradients(data, solution, *g), gradients(data, expected, *g), strict=True))
