"""Constrained diffusion: its stationary law, its multipliers, its score, its bounds, and what its starts are worth."""

import dataclasses
import math

import pytest
import torch

from deqmpc import nonconvex
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point as ip
from deqmpc.solvers import langevin
from deqmpc.solvers.langevin import Program, Settings

torch.set_num_threads(1)
A = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64) / math.sqrt(6.0)  # one constraint on three variables
b = torch.tensor([0.7], dtype=torch.float64)
C = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
INF = torch.full((3,), math.inf, dtype=torch.float64)


def quadratic(low=-INF, high=INF) -> Program:
    """1/2 z' C z + sum z   s.t.   A z = b."""
    return Program(lambda z: 0.5 * ((z @ C) * z).sum(-1) + z.sum(-1), lambda z: z @ A.T - b, low, high)


def kkt_point() -> tuple[torch.Tensor, torch.Tensor]:
    """Solution and multiplier of `quadratic` without bounds."""
    matrix = torch.cat([torch.cat([C, A.T], 1), torch.cat([A, A.new_zeros(1, 1)], 1)])
    solution = torch.linalg.solve(matrix, torch.cat([-C.new_ones(3), b]))
    return solution[:3], solution[3:]


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, 3, dtype=torch.float64)


def pendulum(count: int, horizon: int = 9):
    x = torch.tensor([[3.1, 0.0]], dtype=torch.float64)
    return nonconvex.swing_up(x.repeat(count, 1), horizon)


def test_one_step_is_the_formula():
    settings = Settings(steps=1, alpha=0.02, mu=5.0, rho=0.3, sigma=0.0)
    z, lam = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)
    end = langevin.flow(quadratic(-2.0 * C.new_ones(3), INF), z, settings, 0, lam)
    h = z @ A.T - b
    gradient = z @ C + 1.0 + (lam + 5.0 * h) @ A - 0.3 / (z + 2.0)
    assert torch.allclose(end.z, z - 0.02 * gradient, atol=1e-14)
    assert torch.allclose(end.lam, lam + 2.0 * 0.02 * 5.0 * h, atol=1e-14)


def test_the_noise_falls_to_its_end_and_then_there_is_none():
    sigma = Settings(steps=1000, sigma=2.0, decay=4.0, quiet=0.25).noise()
    assert len(sigma) == 1000 and sigma[0] == 2.0 and sigma[749] == pytest.approx(2.0 * math.exp(-4.0), rel=0.01)
    assert all(s > t for s, t in zip(sigma[:749], sigma[1:750], strict=True)) and set(sigma[750:]) == {0.0}
    still = Program(lambda z: 0.0 * z.sum(-1), lambda z: z[..., :0], -INF, INF)
    step = langevin.flow(still, zeros(20000), Settings(steps=1, alpha=0.03, sigma=1.7, quiet=0.0), 0).z
    assert float(step.std()) == pytest.approx(1.7 * math.sqrt(2.0 * 0.03), rel=0.01)


def test_the_stationary_law_on_a_gaussian_with_a_linear_constraint_is_the_closed_form():
    """The step is linear, (z, lambda) <- M (z, lambda) + noise: mean = KKT point, covariance P = M P M' + noise's.
    Along the constraint, for C = I, P is sigma^2 / (1 - alpha/2)."""
    s = Settings(steps=400, alpha=0.05, mu=4.0, sigma=0.6, decay=0.0, quiet=0.0)
    found = langevin.flow(quadratic(), zeros(40000), s, 0)
    M = torch.eye(4, dtype=torch.float64)
    M[:3, :3] -= s.alpha * (C + s.mu * A.T @ A)
    M[:3, 3:] = -s.alpha * A.T
    M[3:, :3] = 2.0 * s.alpha * s.mu * A
    noise = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)) * 2.0 * s.alpha * s.sigma ** 2
    P = torch.linalg.solve(torch.eye(16, dtype=torch.float64) - torch.kron(M, M), noise.flatten()).view(4, 4)
    both = torch.cat([found.z, found.lam], dim=1)
    assert (both.mean(0) - torch.cat(kkt_point())).abs().max() < 5.0 * float(P.diagonal().max() / 40000) ** 0.5
    assert (torch.cov(both.T) - P).abs().max() < 0.03 * P.diagonal().max()


def test_without_noise_the_multipliers_are_those_of_the_kkt_conditions():
    end = langevin.flow(quadratic(), zeros(2), Settings(steps=4000, alpha=0.05, sigma=0.0), 0)
    z, lam = kkt_point()
    assert (end.z - z).abs().max() < 1e-9 and (end.lam - lam).abs().max() < 1e-9


def test_a_sampled_score_has_the_mean_and_the_error_that_theory_says():
    """Relative error sqrt((d + 1) / S), within 20 %; the mean of many is the exact gradient."""
    problem, data = pendulum(200)
    z = langevin.pack(*(torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).expand(
        200, *shape) for shape in ((10, 2), (9, 1))))
    for samples in (64, 512):
        settings = Settings(rho=0.0, samples=samples, width=1e-4)
        lagrangian = langevin.Lagrangian(langevin.program_of(problem, data, settings), settings)
        lam = torch.ones(200, 18, dtype=torch.float64)
        exact, h = lagrangian.gradient(z, lam)
        found, h_too = lagrangian.sampled_gradient(z, lam, torch.Generator().manual_seed(0))
        error = ((found - exact).square().sum(1).mean() / exact[0].square().sum()).sqrt()
        assert float(error) == pytest.approx(math.sqrt(28.0 / samples), rel=0.2)
        assert (found.mean(0) - exact[0]).norm() < 2.0 * math.sqrt(28.0 / samples / 200) * exact[0].norm()
        assert torch.allclose(h, h_too, atol=1e-12)


def test_the_flow_with_a_sampled_score_ends_where_the_exact_one_does():
    end = langevin.flow(quadratic(), zeros(4), Settings(steps=600, alpha=0.05, sigma=0.0, score='sampling',
                                                        samples=256, width=1e-3), 0)
    assert (end.z - kkt_point()[0]).abs().max() < 1e-3


def test_the_gradient_of_a_trajectory_s_lagrangian_is_that_of_finite_differences():
    x = torch.tensor([[-1.0, 0.0, 0.3], [-0.9, 0.1, 0.0]], dtype=torch.float64)
    problem, data = nonconvex.maze(x, 4)
    lagrangian = langevin.Lagrangian(langevin.program_of(problem, data, Settings()), Settings())
    g = torch.Generator().manual_seed(0)
    z, lam = (torch.rand(2, size, generator=g, dtype=torch.float64) - 0.5 for size in (20, 12))
    exact, h = lagrangian.gradient(z, lam)
    own = dataclasses.replace(lagrangian.program, derivative=None)
    by_autograd, same = langevin.Lagrangian(own, Settings()).gradient(z, lam)
    assert torch.allclose(exact, by_autograd, rtol=1e-12, atol=1e-12) and torch.allclose(h, same, atol=1e-14)
    eye = 1e-6 * torch.eye(20, dtype=torch.float64)
    for i in range(20):
        slope = (lagrangian.value(z + eye[i], lam)[0] - lagrangian.value(z - eye[i], lam)[0]) / 2e-6
        assert (slope - exact[:, i]).abs().max() < 1e-5


def test_the_barrier_keeps_the_bounds_and_stands_off_from_them_by_its_weight():
    low, high = -C.new_ones(3), C.new_ones(3)
    loud = langevin.flow(quadratic(low, high), zeros(500), Settings(steps=50, sigma=5.0, decay=0.0, quiet=0.0), 0)
    assert (loud.z >= low).all() and (loud.z <= high).all()
    free = Program(lambda z: z.sum(-1), lambda z: z[..., :0], low, INF)  # 1 = rho / (z - low) at the minimum
    end = langevin.flow(free, zeros(1), Settings(steps=3000, rho=0.05, sigma=0.0), 0)
    assert (end.z - (low + 0.05)).abs().max() < 1e-6


@pytest.mark.parametrize('score', ['exact', 'sampling'])
def test_a_seed_gives_the_same_bits_again_and_another_seed_does_not(score):
    problem, data = pendulum(3)
    settings = Settings(steps=30, score=score, samples=8)
    program, z = langevin.program_of(problem, data, settings), torch.zeros(3, 27, dtype=torch.float64)
    first, second, other = (langevin.flow(program, z, settings, seed) for seed in (7, 7, 8))
    assert torch.equal(first.z, second.z) and torch.equal(first.lam, second.lam)
    assert not torch.equal(first.z, other.z)


@pytest.mark.parametrize('score', ['exact', 'sampling'])
def test_a_nan_sample_leaves_the_others_alone(score):
    problem, data = pendulum(3)
    settings = Settings(steps=30, score=score, samples=8)
    program, z = langevin.program_of(problem, data, settings), torch.zeros(3, 27, dtype=torch.float64)
    whole = langevin.flow(program, z, settings, 1)
    z[1, 4] = math.nan
    broken = langevin.flow(program, z, settings, 1)
    assert broken.finite.tolist() == [True, False, True] and whole.finite.all()
    assert torch.equal(broken.z[[0, 2]], whole.z[[0, 2]]) and torch.equal(broken.lam[[0, 2]], whole.lam[[0, 2]])


def test_float32_flows_end_near_those_of_float64():
    problem, data = pendulum(2)
    settings = Settings(steps=200, sigma=0.0)
    ends = []
    for dtype in (torch.float32, torch.float64):
        cast = problem.instances(*(v.to(dtype) for v in (data.x_init, data.x_ref, data.u_ref)))
        ends.append(langevin.flow(langevin.program_of(problem, cast, settings), torch.zeros(2, 27, dtype=dtype),
                                  settings, 0).z)
    assert ends[0].dtype == torch.float32 and (ends[0] - ends[1]).abs().max() < 1e-3


def test_a_trajectory_survives_packing_and_its_equality_is_the_defects_after_the_first():
    problem, data = pendulum(2)
    g = torch.Generator().manual_seed(0)
    x, u = (torch.randn(2, *shape, generator=g, dtype=torch.float64) for shape in ((10, 2), (9, 1)))
    x[:, 0] = data.x_init
    z = langevin.pack(x, u)
    assert all(torch.equal(a, c) for a, c in zip(langevin.unpack(problem, data, z), (x, u), strict=True))
    h = langevin.program_of(problem, data, Settings()).equality(z).view(2, 9, 2)
    assert torch.allclose(h, problem.defects(data, x, u)[:, 1:], atol=1e-14)


def test_an_absent_sphere_costs_nothing_and_a_present_one_the_papers_exponential():
    problem, data = nonconvex.maze(torch.zeros(1, 3, dtype=torch.float64), 3)
    settings = Settings(sharpness=5.0 * nonconvex.RADIUS ** 2)
    z = langevin.pack(torch.zeros(1, 4, 3, dtype=torch.float64), torch.zeros(1, 3, 2, dtype=torch.float64))
    absent = dataclasses.replace(data, radii=torch.zeros_like(data.radii))
    hills = (langevin.program_of(problem, data, settings).cost(z)
             - langevin.program_of(problem, absent, settings).cost(z))
    square = torch.tensor(nonconvex.WALL, dtype=torch.float64).square().sum(1)
    assert float(hills) == pytest.approx(3 * 0.1 * 1000.0 * float(torch.exp(-5.0 * square).sum()), rel=1e-12)


@pytest.mark.parametrize('method, polish', [(al, al.Settings(feasibility=1e-6)), (ip, ip.Settings())])
def test_solve_returns_the_cheapest_start_and_it_satisfies_the_constraints(method, polish):
    problem, data = pendulum(2, horizon=9)
    settings = Settings(steps=50)
    best = langevin.solve(problem, data, 3, settings, seed=5, polish=polish)
    assert best.converged.all() and best.defect.max() <= 1e-6 and best.violation.max() <= 1e-6
    many = data[torch.tensor([0, 0, 0, 1, 1, 1])]
    each = method.solve(problem, many, langevin.diffuse(problem, many, settings, 5, polish=polish), polish)
    assert torch.allclose(best.cost, each.cost.view(2, 3).amin(1), rtol=1e-12)


def test_where_a_flow_diverges_its_start_is_handed_on():
    problem, data = pendulum(2)
    start = al.cold_start(problem, data, al.Settings())
    end = langevin.diffuse(problem, data, Settings(steps=300, alpha=1e3), start=start)
    assert torch.equal(end.x, start.x) and torch.equal(end.u, start.u)


def test_a_path_around_the_wall_escapes_and_paths_through_it_or_that_stay_do_not():
    def path(*corners):
        pairs = zip(corners, corners[1:], strict=False)
        share = torch.linspace(0.0, 1.0, 25, dtype=torch.float64).unsqueeze(1)
        p = torch.cat([torch.tensor(a) + share * (torch.tensor(c) - torch.tensor(a)) for a, c in pairs])
        return nonconvex.escaped(torch.cat([p, p[:, :1]], dim=1).unsqueeze(0)).item()
    assert path((-1.0, 0.0), (-1.6, 0.0), (-1.6, 1.6), (1.0, 1.6), (1.0, 0.0))
    assert not path((-1.0, 0.25), (1.0, 0.25), (1.0, 0.0))  # between two discs
    assert not path((-1.0, 0.0), (-0.4, 0.0))


def test_wrong_numbers_and_shapes_are_one_clear_sentence():
    for changes, said in (({'steps': 0}, 'steps = 0'), ({'alpha': 0.0}, 'alpha = 0'), ({'sigma': -1.0}, 'sigma = -1'),
                          ({'mu': math.nan}, 'mu = nan'), ({'quiet': 1.5}, 'quiet = 1.5'),
                          ({'score': 'guessed'}, "score = 'guessed'")):
        with pytest.raises(ValueError, match=said):
            Settings(**changes)
    with pytest.raises(ValueError, match=r'z has shape \(2, 4\), expected \(B, 3\)'):
        langevin.flow(quadratic(), torch.zeros(2, 4), Settings(), 0)
    with pytest.raises(ValueError, match='low < high'):
        quadratic(INF, -INF)
