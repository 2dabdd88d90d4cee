"""The Riccati recursion by associative scans: dense KKT solves, textbook LQR, inertia, depth, isolation of samples."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.problem import Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import riccati, riccati_scan

torch.set_num_threads(1)
SOLVERS = {'sequential': riccati, 'parallel': riccati_scan}
B, n, m = 3, 4, 2
both = pytest.mark.parametrize('solver', SOLVERS)


class Uniform:
    """Seeded random matrices, entries in 0..1."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def spd(self, *shape, least):
        a = self(*shape)
        w, v = torch.linalg.eigh(0.5 * (a + a.mT))
        return v @ (w.clamp_min(least).unsqueeze(-1) * v.mT)


def random_problem(N, D, seed=0, least_R=1e-3, dtype=torch.float64):
    """The recipe of the paper's authors: R and Q - M R^-1 M' projected to eigenvalues >= 1e-3, the rest uniform; two
    right-hand sides."""
    draw = Uniform(seed)
    R, M = draw.spd(B, N, m, m, least=least_R), draw(B, N, n, m)
    Q = draw.spd(B, N, n, n, least=1e-3) + M @ torch.linalg.solve(R, M.mT)
    H = torch.cat([torch.cat([Q, M], -1), torch.cat([M.mT, R], -1)], -2)
    data = H, draw.spd(B, n, n, least=1e-3), draw(B, N, n, n + m), regularisation(D, N, draw)
    return [v.to(dtype) for v in (*data, draw(B, N, n + m, 2), draw(B, n, 2), draw(B, N + 1, n, 2))]


def regularisation(D, N, draw):
    if D == 'spd':
        return draw.spd(B, N + 1, n, n, least=1e-3)
    if D == 'singular':
        return torch.diag_embed(torch.tensor([1.0, 0.0, 0.25, 0.0], dtype=torch.float64).repeat(B, N + 1, 1))
    return torch.full((B, N + 1, n), D, dtype=torch.float64)


def dense_kkt(H, QN, F, D):
    """The matrix of one sample in the unknowns (z_0 .. z_{N-1}, x_N, y_0 .. y_N)."""
    N = len(H)
    P = torch.block_diag(*H, QN)
    C = torch.zeros((N + 1) * n, len(P), dtype=H.dtype)
    C[n:, :-n] = torch.block_diag(*F)
    for i in range(N + 1):
        C[i * n:(i + 1) * n, i * (n + m):i * (n + m) + n] -= torch.eye(n, dtype=H.dtype)
    D = torch.block_diag(*(torch.diag_embed(D) if D.dim() == 2 else D))
    return torch.cat([torch.cat([P, C.T], 1), torch.cat([C, -D], 1)])


def stacked(z, last, y):
    """(N, n+m, k), (n, k), (N+1, n, k) in the order of the dense system."""
    return torch.cat([z.flatten(0, 1), last, y.flatten(0, 1)])


def worst_residual(solver, data):
    H, QN, F, D, s, qN, c = data
    factors = SOLVERS[solver].factor(H, QN, F, D)
    assert factors.ok.all()
    x, u, y = SOLVERS[solver].solve(factors, s, qN, c)
    z = torch.cat([x[:, :-1], u], dim=2)
    return max(float((dense_kkt(H[b], QN[b], F[b], D[b]) @ stacked(z[b], x[b, -1], y[b])
                      + stacked(s[b], qN[b], c[b])).abs().max()) for b in range(B))


@both
@pytest.mark.parametrize('N', [1, 2, 5, 30, 100])
@pytest.mark.parametrize('D', ['spd', 'singular', 1e-3, 1e-6, 1e-9, 0.0])
def test_the_solution_satisfies_the_dense_kkt_system(solver, N, D):
    assert worst_residual(solver, random_problem(N, D)) < {'sequential': 1e-10, 'parallel': 1e-8}[solver]


@both
@pytest.mark.parametrize('D', ['spd', 'singular', 1e-6, 0.0])
def test_the_solution_equals_the_dense_solve(solver, D):
    H, QN, F, D, s, qN, c = random_problem(30, D, least_R=0.1)
    x, u, y = SOLVERS[solver].solve(SOLVERS[solver].factor(H, QN, F, D), s, qN, c)
    for b in range(B):
        exact = torch.linalg.solve(dense_kkt(H[b], QN[b], F[b], D[b]), -stacked(s[b], qN[b], c[b]))
        got = stacked(torch.cat([x[b, :-1], u[b]], dim=1), x[b, -1], y[b])
        assert (got - exact).abs().max() < 1e-11


@both
@pytest.mark.parametrize('D', ['spd', 'singular', 1e-6, 0.0])
def test_float32_residual_is_at_rounding_level(solver, D):
    assert worst_residual(solver, random_problem(12, D, least_R=0.1, dtype=torch.float32)) < 2e-5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_the_scan_is_as_accurate_as_the_recursion_where_r_is_small(dtype):
    """R = 1e-3: the intervals' sums alone are off by 1e-3 of P in float32."""
    H, QN, F, D, *_ = random_problem(100, 1e-3)
    exact = riccati.factor(H, QN, F, D).P
    error = {}
    for name in SOLVERS:
        factors = SOLVERS[name].factor(*(v.to(dtype) for v in (H, QN, F, D)))
        assert factors.ok.all()
        error[name] = float((factors.P - exact).abs().max() / exact.abs().max())
    assert error['parallel'] < (1e-12 if dtype == torch.float64 else 3.0 * error['sequential'])


@both
def test_without_dual_regularisation_it_is_the_textbook_lqr(solver):
    """Against the recursion P = Q + A'PA - (A'PB + M)(R + B'PB)^-1(B'PA + M') and a rollout of u = K x, in NumPy."""
    N = 30
    H, QN, F, D, s, qN, c = random_problem(N, 0.0, least_R=0.1)
    c[:, 1:], s[:], qN[:] = 0.0, 0.0, 0.0
    factors = SOLVERS[solver].factor(H, QN, F, D)
    x, u, _ = SOLVERS[solver].solve(factors, s, qN, c)
    for b in range(B):
        h, f, P, K = H[b].numpy(), F[b].numpy(), QN[b].numpy(), [None] * N
        for i in reversed(range(N)):
            Q, M, R, A, Bi = h[i, :n, :n], h[i, :n, n:], h[i, n:, n:], f[i, :, :n], f[i, :, n:]
            K[i] = -np.linalg.solve(R + Bi.T @ P @ Bi, Bi.T @ P @ A + M.T)
            P = Q + A.T @ P @ A + (A.T @ P @ Bi + M) @ K[i]
        assert np.abs(factors.P[b, 0].numpy() - P).max() < 1e-10
        assert np.abs(factors.K[b].numpy() - np.stack(K)).max() < 1e-10
        state = c[b, 0].numpy()
        for i in range(N):
            assert np.abs(x[b, i].numpy() - state).max() < 1e-9 and np.abs(u[b, i].numpy() - K[i] @ state).max() < 1e-9
            state = f[i] @ np.concatenate([state, K[i] @ state])


@both
def test_a_long_horizon_reaches_the_algebraic_riccati_solution(solver):
    scipy_linalg = pytest.importorskip('scipy.linalg')
    H, QN, F, D, *_ = random_problem(1, 0.0, least_R=0.1)
    N = 100
    factors = SOLVERS[solver].factor(H.expand(-1, N, -1, -1), QN, F.expand(-1, N, -1, -1),
                                     D[:, :1].expand(-1, N + 1, -1))
    for b in range(B):
        h, f = H[b, 0].numpy(), F[b, 0].numpy()
        exact = scipy_linalg.solve_discrete_are(f[:, :n], f[:, n:], h[:n, :n], h[n:, n:], s=h[:n, n:])
        assert np.abs(factors.P[b, 0].numpy() - exact).max() < 1e-9 * np.abs(exact).max()


@both
def test_a_problem_without_state_cost_is_solved(solver):
    data = random_problem(5, 1e-3)
    data[0][:, :, :n] = data[0][:, :, :, :n] = data[1][:] = 0.0
    assert worst_residual(solver, data) < 1e-8


def test_combining_intervals_is_associative():
    draw = Uniform()
    a, b, c = ((draw.spd(20, n, n, least=0.0), draw(20, n, n), draw.spd(20, n, n, least=0.0)) for _ in range(3))
    left = riccati_scan.combine(riccati_scan.combine(a, b), c)
    right = riccati_scan.combine(a, riccati_scan.combine(b, c))
    assert max(float((v - w).abs().max()) for v, w in zip(left, right, strict=True)) < 1e-10
    P = draw.spd(20, n, n, least=0.0)
    assert (riccati_scan.value(riccati_scan.combine(a, b), P)
            - riccati_scan.value(a, riccati_scan.value(b, P))).abs().max() < 1e-10


# --- depth ----------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts tensor operations, each one after the other: on an accelerator that is the number of launches."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(solver, N):
    H, QN, F, D, s, qN, c = random_problem(N, 1e-3)
    with Operations() as counter:
        SOLVERS[solver].solve(SOLVERS[solver].factor(H, QN, F, D), s, qN, c)
    return counter.count


@pytest.mark.parametrize('newton', [False, True])
def test_the_number_of_sequential_operations_grows_with_the_logarithm_of_the_horizon(newton, monkeypatch):
    monkeypatch.setattr(riccati_scan, 'ROUGH', -1.0 if newton else float('inf'))
    counts = [operations('parallel', 2 ** k) for k in range(2, 8)]
    per_doubling = {b - a for a, b in zip(counts, counts[1:], strict=False)}
    assert len(per_doubling) == 1 and per_doubling.pop() < 250
    assert operations('sequential', 64) > 1.9 * operations('sequential', 32)  # the count can tell the two apart


@pytest.mark.parametrize('N', [1, 2, 3, 31, 32, 33, 100, 500])
def test_intervals_are_combined_in_ceil_log2_of_n_levels(N, monkeypatch):
    levels = {'combine': 0, 'value': 0}

    def counted(name):
        function = getattr(riccati_scan, name)

        def call(*arguments):
            levels[name] += 1
            return function(*arguments)
        return call
    for name in levels:
        monkeypatch.setattr(riccati_scan, name, counted(name))
    riccati_scan.factor(*random_problem(N, 1e-3)[:4])
    assert levels == {'combine': math.ceil(math.log2(N)), 'value': math.ceil(math.log2(N)) + 1}


# --- certificate ----------------------------------------------------------------------------------

def test_pivots_tell_the_inertia_of_the_kkt_matrix_in_all_of_100_random_cases():
    """Cases with indefinite R or Q or both, a share of which are minima nevertheless."""
    minima = of_indefinite_R = cases = 0
    for seed in range(34):
        N = 4 + seed % 7
        H, QN, F, D, *_ = random_problem(N, 'spd' if seed % 3 else 1e-2, seed=seed)
        F *= 0.5
        shift = Uniform(seed + 1000)(B, 2, 1, 1)
        H[:, 2, n:, n:] -= 0.3 * shift[:, 0] * torch.eye(m, dtype=torch.float64)
        H[:, 1, :n, :n] -= 0.3 * shift[:, 1] * torch.eye(n, dtype=torch.float64)
        ok = [SOLVERS[k].factor(H, QN, F, D).ok for k in SOLVERS]
        for b in range(B):
            eigenvalues = torch.linalg.eigvalsh(dense_kkt(H[b], QN[b], F[b], D[b]))
            minimum = int((eigenvalues > 0).sum()) == N * (n + m) + n
            assert all(v[b] == minimum for v in ok)
            cases, minima = cases + 1, minima + minimum
            of_indefinite_R += minimum and bool((torch.linalg.eigvalsh(H[b, :, n:, n:]) < 0).any())
    assert cases >= 100 and 20 < minima < 80 and of_indefinite_R > 10  # so that agreement says something


@both
def test_an_indefinite_stage_with_a_positive_pivot_is_solved(solver):
    """N = 1, Q0 = Q1 = 1, R = -1, A = 0, B = 2, D = 1: inertia (3, 2, 0), G = -1 + 2 * 1/2 * 2 = 1."""
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)).view(1, 1, 2, 2)
    F = torch.tensor([0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    factors = SOLVERS[solver].factor(H, one, F, torch.ones(1, 2, 1, dtype=torch.float64))
    assert factors.ok.all() and abs(float(factors.G) - 1.0) < 1e-15
    matrix = torch.tensor([[1, 0, 0, -1, 0], [0, -1, 0, 0, 2], [0, 0, 1, 0, -1], [-1, 0, 0, -1, 0], [0, 2, -1, 0, -1]],
                          dtype=torch.float64)  # of (x0, u0, x1, y0, y1)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (int((eigenvalues > 0).sum()), int((eigenvalues < 0).sum())) == (3, 2)
    x, u, y = SOLVERS[solver].solve(factors, one.new_ones(1, 1, 2, 1), one, one.new_ones(1, 2, 1, 1))
    got = torch.stack([x[0, 0], u[0, 0], x[0, 1], *y[0]]).flatten()
    assert (matrix @ got + 1.0).abs().max() < 1e-15


def test_a_singular_input_hessian_is_flagged_by_the_scan_and_not_by_the_recursion():
    H, QN, F, D, *_ = random_problem(5, 'spd')
    H[1, 2, n:] = 0.0
    H[1, 2, :, n:] = 0.0
    assert riccati.factor(H, QN, F, D).ok.all()
    assert riccati_scan.factor(H, QN, F, D).ok.tolist() == [True, False, True]


@both
@pytest.mark.parametrize(('eta', 'slope'), [(0.5, -5.79), (1.0, -2.43), (2.0, -0.71), (3.0, -0.61), (10.0, -5.86)])
def test_the_regularised_step_descends_where_newtons_does_not(solver, eta, slope):
    """Cost (x0^2 + u0^2 + x1^2)/2, x1 = x0 + u0, x0 = 0 at (0, 0, 1) with y = (0, 3): the slope of the augmented
    Lagrangian along Newton's step is 2 - eta; along the regularised one it is negative for every eta."""
    C = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    k = torch.tensor([0.0, -1.0], dtype=torch.float64)
    gradient = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) + C.T @ torch.tensor([0.0, 3.0], dtype=torch.float64)
    for D, expected in ((0.0, 2.0 - eta), (1.0 / eta, slope)):
        factors = SOLVERS[solver].factor(torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2), C.new_ones(1, 1, 1),
                                         C.new_ones(1, 1, 1, 2), C.new_full((1, 2, 1), D))
        x, u, _ = SOLVERS[solver].solve(factors, gradient[:2].view(1, 1, 2, 1), gradient[2:].view(1, 1, 1),
                                        k.view(1, 2, 1, 1))
        d = torch.stack([x[0, 0], u[0, 0], x[0, 1]]).flatten()
        assert factors.ok.all()
        assert abs(float((gradient + eta * C.T @ k) @ d) - expected) < (1e-12 if D == 0 else 5e-3)


# --- samples --------------------------------------------------------------------------------------

def test_batched_equals_looped_and_every_right_hand_side_alone():
    H, QN, F, D, s, qN, c = random_problem(13, 'spd', least_R=0.1)
    whole = riccati_scan.solve(riccati_scan.factor(H, QN, F, D), s, qN, c)
    for b in range(B):
        i = slice(b, b + 1)
        factors = riccati_scan.factor(H[i], QN[i], F[i], D[i])
        for k in range(2):
            alone = riccati_scan.solve(factors, s[i, ..., k:k + 1], qN[i, ..., k:k + 1], c[i, ..., k:k + 1])
            assert all((v[b, ..., k] - w[0, ..., 0]).abs().max() < 1e-12 for v, w in zip(whole, alone, strict=True))


@pytest.mark.parametrize('field', ['H', 'QN', 'F', 'D'])
def test_bad_samples_are_flagged_and_leave_the_others_bit_equal(field):
    data = dict(zip(('H', 'QN', 'F', 'D', 's', 'qN', 'c'), random_problem(13, 'spd'), strict=True))
    rhs = data['s'], data['qN'], data['c']
    four = [data[k] for k in ('H', 'QN', 'F', 'D')]
    good = riccati_scan.solve(riccati_scan.factor(*four), *rhs)
    data[field][1].view(-1)[0] = float('nan')
    data['H'][2, 4, -1, -1] = -100.0  # no minimum
    factors = riccati_scan.factor(*four)
    assert factors.ok.tolist() == [True, False, False]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(good, riccati_scan.solve(factors, *rhs), strict=True))


def test_wrong_shapes_name_the_argument_what_came_and_what_was_expected():
    H, QN, F, D, s, qN, c = random_problem(5, 0.0)
    with pytest.raises(ValueError, match=r'D has shape \(3, 5, 4\), expected \(3, 6, 4\)'):
        riccati_scan.factor(H, QN, F, D[:, 1:])
    with pytest.raises(ValueError, match=r'c has shape \(3, 5, 4, 2\)'):
        riccati_scan.solve(riccati_scan.factor(H, QN, F, D), s, qN, c[:, 1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_gives_the_solution_of_the_cpu():
    H, QN, F, D, s, qN, c = random_problem(100, 'spd', least_R=0.1)
    here = riccati_scan.solve(riccati_scan.factor(H, QN, F, D), s, qN, c)
    H, QN, F, D, s, qN, c = (v.cuda() for v in (H, QN, F, D, s, qN, c))
    there = riccati_scan.solve(riccati_scan.factor(H, QN, F, D), s, qN, c)
    assert all((a - b.cpu()).abs().max() < 1e-10 for a, b in zip(here, there, strict=True))


# --- in the augmented-Lagrangian solver -----------------------------------------------------------

def flight(T, dtype=torch.float64):
    """Flights along x past a sphere in the way."""
    problem = Problem(Crazyflie(), 0.05, T, [20.0] * 3 + [1.0] * 6 + [0.05] * 3, [0.05] * 4, u_low=[0.16] * 4,
                      u_high=[1.5] * 4)
    draw = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(B, 12, generator=draw, dtype=torch.float64)
    x[:, 6] += 1.0
    x_ref = torch.zeros(B, T + 1, 12, dtype=torch.float64)
    x_ref[:, :, 0] = problem.dt * torch.arange(T + 1) * 1.2
    x_ref[:, :, 6] = 1.2
    spheres = torch.tensor([[0.28, 0.0, 0.05], [0.7, 0.1, -0.05]], dtype=torch.float64).expand(B, 2, 3)
    return problem, problem.instances(*(v.to(dtype) for v in (
        x, x_ref, torch.ones(B, T, 4), spheres, torch.full((B, 2), 0.1))))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_the_al_solver_finds_the_same_solution_and_gradient_with_either(dtype):
    problem, data = flight(12, dtype)
    tight = al.Settings(feasibility=1e-8, optimality=1e-16, gn_steps=60) if dtype == torch.float64 else al.Settings()
    found = []
    for name in SOLVERS:
        x_ref = data.x_ref.clone().requires_grad_()
        solution = al.solve(problem, dataclasses.replace(data, x_ref=x_ref),
                            settings=dataclasses.replace(tight, linear_solver=name))
        assert solution.converged.all() and solution.differentiable.all()
        assert (solution.warm_start.lam > 1e-3).any()
        gradient, = torch.autograd.grad(solution.x.square().sum(), x_ref)
        found.append((solution.x.detach(), solution.u.detach(), gradient))
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < tolerance * a.abs().max()


def test_auto_takes_the_scan_for_one_long_horizon_and_the_recursion_for_a_batch():
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    assert riccati_scan.is_faster(1, 100, cpu) and not riccati_scan.is_faster(200, 20, cpu)
    assert not riccati_scan.is_faster(1, 5, cpu) and riccati_scan.is_faster(200, 100, gpu)
    problem, data = flight(100)
    one = {name: al.solve(problem, data[:1], settings=al.Settings(linear_solver=name, max_steps=1))
           for name in ('auto', *SOLVERS)}
    assert torch.equal(one['auto'].x, one['parallel'].x) and not torch.equal(one['auto'].x, one['sequential'].x)
    with pytest.raises(ValueError, match="linear_solver = 'scan'; expected auto, sequential or parallel"):
        al.Settings(linear_solver='scan')
