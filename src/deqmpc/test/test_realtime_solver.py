"""The compiled solver: one mathematics with torch, optimality, statuses, and its building."""

import logging
import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from solver_benchmark import FRAME, RADII, problem, recorded

from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.quadrotor import Quadrotor
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver, Settings, WarmStart, build
from deqmpc.realtime import solver as realtime
from deqmpc.solvers import augmented_lagrangian as al

torch.set_num_threads(1)
FIXED = al.Settings(iterations=2, gn_steps=2, optimality=0.0)

pytestmark = pytest.mark.skipif(not build.available(), reason='no C compiler on this machine')


SOFT = {'x_low': [-np.inf, -np.inf, -0.02, *[-np.inf] * 9],
        'x_high': [*[np.inf] * 6, 0.9, 0.9, 0.9, *[np.inf] * 3]}


def instance(T=5, K=5, seed=0, moving=False):
    """A flight along x with spheres beside the way, some of them active."""
    rng = np.random.default_rng(seed)
    x = 0.05 * rng.normal(size=12)
    x[6] += 1.0
    ref = np.zeros((T + 1, 12))
    ref[:, 0], ref[:, 6] = 0.05 * np.arange(T + 1) * 1.2, 1.2
    centers = np.column_stack([0.4 + 0.1 * abs(rng.normal(size=K)), 0.25 * rng.normal(size=(K, 2))])
    centers[:1] = [0.28, 0.0, 0.05] + 0.03 * rng.normal(size=3)
    if moving:
        centers = centers + 0.01 * np.arange(T + 1)[:, None, None]
    return x, ref, np.ones((T, 4)), centers, np.full(K, 0.1)


def batch(p, *instances):
    return p.instances(*(torch.from_numpy(np.stack(v)) for v in zip(*instances, strict=True)))


def kkt(p, given, solution):
    """Largest entries of dL/dtau, defects, violation and complementarity, by torch."""
    data = batch(p, given)
    x, u = (torch.from_numpy(v)[None].requires_grad_() for v in (solution.x, solution.u))
    lam, eta = (torch.from_numpy(v)[None] for v in (solution.warm_start.lam, solution.warm_start.eta))
    k, h = p.defects(data, x, u), p.residuals(data, x, u)
    value = p.cost(data, x, u).sum() + (eta * k).sum() + (lam * h).sum()
    stationarity = max(float(g.abs().max()) for g in torch.autograd.grad(value, (x, u)))
    return stationarity, *(float(v.detach()) for v in (k.abs().max(), h.max(), (lam * h).abs().max(), lam.min()))


@pytest.mark.parametrize('equations', [Crazyflie(FRAME), Crazyflie(), Quadrotor()], ids=['no drag', 'drag', 'body'])
def test_compiled_dynamics_and_jacobian_equal_the_torch_definition(equations):
    p = problem(T=11, equations=equations)
    solver = RealtimeSolver(p, 0)
    rng = np.random.default_rng(0)
    x, u = 0.4 * rng.normal(size=(12, 12)), 1.0 + 0.3 * rng.normal(size=(11, 4))
    following, F = solver.linearize(x, u)
    exact, jacobian = p.phi.linearize(torch.from_numpy(x[:-1]), torch.from_numpy(u))
    assert np.abs(following - exact.numpy()).max() < 1e-10 * np.abs(exact.numpy()).max()
    assert np.abs(F - jacobian.numpy()).max() < 1e-10 * np.abs(jacobian.numpy()).max()


@pytest.mark.parametrize('elastic', [float('inf'), 4.0])
@pytest.mark.parametrize('m, k', [(1, 1), (1, 4), (2, 2), (4, 3)])
def test_fixed_iterations_are_those_of_the_torch_solver(elastic, m, k):
    p = problem(**SOFT)
    settings = al.Settings(iterations=m, gn_steps=k, optimality=0.0, elastic=elastic)
    solver = RealtimeSolver(p, 7, settings)
    for seed in range(4):
        given = instance(seed=seed, moving=seed % 2 == 1)
        data = batch(p, given)
        first = al.solve(p, data, settings=settings)
        second = al.solve(p, data, first.warm_start.shifted(), settings)  # with multipliers
        start = None
        for expected in (first, second):
            got = solver.solve(*given, start)
            start = got.warm_start.shifted()
            assert got.status is expected.status_of(0) and got.steps == int(expected.steps)
            w = expected.warm_start
            for a, b in ((got.x, expected.x), (got.u, expected.u), (got.warm_start.lam, w.lam),
                         (got.warm_start.eta, w.eta)):  # multipliers of an infeasible instance grow to 1e6
                assert np.abs(a - b[0].numpy()).max() < 1e-9 * max(1.0, float(b.abs().max()))
            assert abs(got.cost - float(expected.cost)) < 1e-9 * (1.0 + got.cost) and got.warm_start.mu == float(w.mu)
            assert abs(got.defect - float(expected.defect)) < 1e-9


def test_augmented_lagrangian_stops_where_the_torch_solver_stops():
    p = problem()
    solver = RealtimeSolver(p, 5, al.Settings())
    for seed in range(4):
        given = instance(seed=seed)
        expected, got = al.solve(p, batch(p, given), settings=al.Settings()), solver.solve(*given)
        assert got.status is al.Status.CONVERGED and got.steps == int(expected.steps)
        assert np.abs(got.x - expected.x[0].numpy()).max() < 1e-7


@pytest.mark.parametrize('T', [1, 5, 13])
def test_solutions_to_tolerance_satisfy_the_kkt_conditions(T):
    p = problem(T)
    solver = RealtimeSolver(p, 5, Settings(tolerance=1e-8))
    active = 0
    for seed in range(6):
        given = instance(T, seed=seed, moving=seed % 2 == 1)
        solution = solver.solve(*given)
        assert solution.status is al.Status.CONVERGED
        stationarity, defect, violation, complementarity, least = kkt(p, given, solution)
        assert stationarity < 1e-5 and defect < 1e-8 and violation < 1e-8 and complementarity < 2e-8 and least >= 0
        assert abs(defect - solution.defect) < 1e-12
        active += solution.warm_start.lam.max() > 1e-3
    assert active >= 3 or T == 1


def test_soft_constraints_have_the_minimiser_of_the_exact_penalty():
    """Against the torch solver with the same penalty; spheres around the start leave no feasible plan."""
    p = problem(**SOFT)
    solver = RealtimeSolver(p, 5, Settings(elastic=3.0))
    gave_way = 0
    for seed in range(4):
        x, ref, u_ref, centers, radii = instance(seed=seed)
        given = x, ref, u_ref, centers, 2.0 * radii
        exact = al.solve(p, batch(p, given), settings=al.Settings(
            elastic=3.0, feasibility=1e-8, optimality=1e-14, gn_steps=60, newton_below=1e-2))
        solution = solver.solve(*given)
        assert solution.status is exact.status_of(0)
        gave_way += solution.status is al.Status.INFEASIBLE
        assert np.abs(solution.x - exact.x[0].numpy()).max() < 2e-3 and solution.defect < 1e-6
        price = [float(c + 3.0 * p.residuals(batch(p, given), x, u)[..., 8:].clamp_min(0.0).sum()) for c, x, u in (
            (solution.cost, *(torch.from_numpy(v)[None] for v in (solution.x, solution.u))),
            (float(exact.cost), exact.x, exact.u))]
        assert price[0] < price[1] + 1e-4 * (1.0 + price[1])
    assert gave_way >= 2


@pytest.mark.parametrize('settings', [Settings(), FIXED])
def test_numbers_that_are_not_finite_are_a_status(settings):
    p = problem()
    solver = RealtimeSolver(p, 5, settings)
    start = solver.solve(*instance()).warm_start
    for i in range(5):
        for bad in (np.nan, np.inf):
            given = [v.copy() for v in instance()]
            given[i].flat[-1] = bad
            solution = solver.solve(*given)
            assert solution.status is al.Status.NOT_FINITE and np.isnan(solution.x).all()
    broken = WarmStart(np.full_like(start.x, np.nan), start.u)
    assert solver.solve(*instance(), broken).status is al.Status.NOT_FINITE
    assert solver.solve(*instance(), start).status is not al.Status.NOT_FINITE  # and the solver is unharmed


@pytest.mark.parametrize('settings', [Settings(), FIXED])
def test_huge_numbers_end_with_a_status(settings):
    solver = RealtimeSolver(problem(), 5, settings)
    for scale in (1e3, 1e30, 1e200, 1e308):
        x, *rest = instance()
        assert solver.solve(scale * x, *rest).status in al.STATUS


def test_absent_spheres_and_the_order_of_spheres_do_not_matter():
    solver = RealtimeSolver(problem(), 30)
    x, ref, u_ref, centers, radii = instance(K=9)
    plain = solver.solve(x, ref, u_ref, centers, radii)
    padded = solver.solve(x, ref, u_ref, np.vstack([np.zeros((7, 3)), centers[::-1]]), np.r_[np.zeros(7), radii])
    assert np.abs(plain.x - padded.x).max() < 1e-4 and abs(plain.cost - padded.cost) < 1e-5


def test_without_spheres_and_bounds_one_newton_step_meets_a_dense_solve_of_the_tracking_problem():
    p = Problem(Crazyflie(), 0.05, 4, [1.0] * 12, [0.1] * 4)
    given = instance(4, 0)[:3]
    solution = RealtimeSolver(p, 0, Settings(tolerance=1e-9)).solve(*given)
    exact = al.solve(p, p.instances(*(torch.from_numpy(v)[None] for v in given)),
                     settings=al.Settings(feasibility=1e-10, optimality=1e-20, newton_below=1e-2, gn_steps=60))
    assert solution.status is al.Status.CONVERGED and np.abs(solution.x - exact.x[0].numpy()).max() < 1e-6


def test_shapes_that_do_not_fit_raise_with_name_got_and_expected():
    solver = RealtimeSolver(problem(), 5)
    good = dict(zip(('x_init', 'x_ref', 'u_ref', 'spheres', 'radii'), instance(), strict=True))
    for name, value, words in (
            ('x_init', np.zeros(11), r'x_init has shape \(11,\), expected \(12,\)'),
            ('x_ref', np.zeros((5, 12)), r'x_ref has shape \(5, 12\), expected \(6, 12\)'),
            ('u_ref', np.zeros((6, 4)), 'u_ref has shape'), ('spheres', np.zeros((5, 2)), 'spheres has shape'),
            ('spheres', np.zeros((4, 3)), 'spheres has shape'), ('radii', np.ones(6), r'at most spheres_max = 5'),
            ('radii', None, 'together'), ('warm_start', WarmStart(np.zeros((6, 12)), np.zeros((4, 4))), 'warm_start.u'),
            ('warm_start', WarmStart(np.zeros((6, 12)), np.zeros((5, 4)), lam=np.zeros((5, 8))), 'warm_start.lam')):
        with pytest.raises(ValueError, match=words):
            solver.solve(**{**good, name: value})
    with pytest.raises(ValueError, match='spheres_max'):
        RealtimeSolver(problem(), -1)
    with pytest.raises(ValueError, match='newton_below'):
        RealtimeSolver(problem(), 5, al.Settings(newton_below=1e-2))
    with pytest.raises(ValueError, match='tolerance = 0'):
        Settings(tolerance=0)


@pytest.mark.parametrize('settings', [Settings(max_steps=3), FIXED])
def test_memory_is_flat_over_many_solves(settings):
    solver = RealtimeSolver(problem(), 5, settings)
    given = instance()
    start = solver.solve(*given).warm_start
    for _ in range(2000):
        solver.solve(*given, start)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20_000):
        solver.solve(*given, start)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512  # kB


# --- building -------------------------------------------------------------------------------------

def test_without_a_compiler_the_torch_solver_serves_and_the_log_says_so_once(monkeypatch, caplog):
    p, given = problem(), instance()
    compiled = RealtimeSolver(p, 5).solve(*given)
    monkeypatch.setenv('PATH', '/nonexistent')
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(realtime, '_said', set())
    with caplog.at_level(logging.WARNING):
        slow, _ = RealtimeSolver(p, 5), RealtimeSolver(p, 5, FIXED)
    assert not slow.compiled and len([r for r in caplog.records if 'no C compiler' in r.message]) == 1
    solution = slow.solve(*given)
    assert solution.status is al.Status.CONVERGED and solution.residual < 1e-6
    assert np.abs(solution.x - compiled.x).max() < 1e-3 and abs(solution.cost - compiled.cost) < 1e-4
    with pytest.raises(ValueError, match='x_init has shape'):
        slow.solve(np.zeros(3), *given[1:])
    assert slow.solve(np.full(12, np.nan), *given[1:]).status is al.Status.NOT_FINITE


def test_a_compiler_that_fails_is_named_with_its_message(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.raises(build.NoCompiler, match='ended with 1: .*error'):
        build.load('this is not C')
    assert not [f for f in (tmp_path / 'deqmpc').iterdir() if f.suffix == '.so']


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path):
    code = (f"import runpy; build = runpy.run_path({build.__file__!r});"  # without torch, whose import takes seconds
            "assert build['load']('int answer(void) { return 42; }').answer() == 42")
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    running = [subprocess.Popen([sys.executable, '-c', code], env=env) for _ in range(2)]
    assert [p.wait(timeout=60) for p in running] == [0, 0]
    assert len([f for f in (tmp_path / 'deqmpc').iterdir()]) == 1  # one library, nothing left over


def test_a_broken_library_in_the_cache_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    text = 'int answer(void) { return 43; }'
    build.load(text)
    library, = (tmp_path / 'deqmpc').iterdir()
    library.unlink()
    library.write_bytes(b'cut off')
    assert build.load(text).answer() == 43


@dataclass(frozen=True)
class Falling:
    """A mass on a string of length 1, pulled by u."""

    n = 2
    m = 1

    def derivative(self, x, u):
        return [x[1], u[0] - 9.81 * x[0] * (1.0 - x[0] * x[0])]


def test_a_kept_text_of_other_dynamics_is_noticed_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    p = Problem(Falling(), 0.1, 3, [1.0] * 2, [1.0], position=[0])
    RealtimeSolver(p, 1)
    text, = (tmp_path / 'deqmpc').glob('*.c')
    right = text.read_text()
    text.write_text(right.replace('9.81', '9.51'))
    assert right != text.read_text()
    x, u = np.full((4, 2), 0.3), np.ones((3, 1))
    following, _ = RealtimeSolver(p, 1).linearize(x, u)
    assert text.read_text() == right
    assert np.abs(following - p.phi.step(torch.from_numpy(x[:3]), torch.from_numpy(u)).numpy()).max() < 1e-12


# --- against Ipopt --------------------------------------------------------------------------------

@pytest.mark.parametrize('T, failures', [(5, 0), (20, 1), (50, 1)])
def test_benchmark_instances_are_solved_to_the_optimum_of_ipopt(T, failures):
    """Residual 1e-6 and cost within 1e-4 of Ipopt's, or below it, from the given warm starts."""
    d = recorded(T)
    solver = RealtimeSolver(problem(T), 40)
    missed = []
    for i in range(len(d['x0'])):
        s = solver.solve(d['x0'][i], d['xr'][i], np.ones((T, 4)), d['obs'][i], RADII,
                         WarmStart(d['xw'][i], d['uw'][i]))
        if s.status is not al.Status.CONVERGED or s.residual > 1e-6 or s.cost > (1 + 1e-4) * d['cost'][i]:
            missed.append((i, s.status.name, s.residual, s.cost / d['cost'][i] - 1))
    assert len(missed) <= failures, missed
