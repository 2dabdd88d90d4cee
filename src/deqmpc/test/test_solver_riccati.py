"""The Riccati recursion against a dense solve of the same KKT system."""

import pytest
import torch

from deqmpc.solvers import riccati

torch.set_num_threads(1)
B, n, m = 3, 4, 2


def random_problem(N, D, dtype=torch.float64, seed=0):
    """Uniform data; R at least 0.1 and the Schur complement Q - M R^-1 M' at least 1e-3, so that the condition of
    the KKT matrix stays near 1e3 and the tolerances below speak about the recursion."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def spd(*shape, least=1e-3):
        a = uniform(*shape)
        w, v = torch.linalg.eigh(a + a.transpose(-1, -2))
        return v @ (w.clamp_min(least).unsqueeze(-1) * v.transpose(-1, -2))
    R, M = spd(B, N, m, m, least=0.1), uniform(B, N, n, m)
    Q = spd(B, N, n, n) + M @ torch.linalg.solve(R, M.transpose(-1, -2))
    H = torch.cat([torch.cat([Q, M], -1), torch.cat([M.transpose(-1, -2), R], -1)], -2)
    F = torch.cat([uniform(B, N, n, n) / 2, uniform(B, N, n, m)], -1)  # /2: keep 30 stages bounded
    D = spd(B, N + 1, n, n) if D == 'spd' else torch.full((B, N + 1, n), D, dtype=torch.float64)
    return [v.to(dtype) for v in (H, spd(B, n, n), F, D, uniform(B, N, n + m, 2), uniform(B, n, 2),
                                  uniform(B, N + 1, n, 2))]


def dense_kkt(H, QN, F, D, s, qN, c):
    """The matrix and right-hand side of one sample, unknowns (z_0 .. z_{N-1}, x_N, y_0 .. y_N)."""
    N, nm = H.shape[0], H.shape[-1]
    size = N * nm + n
    P, C, rhs = (torch.zeros(*shape, dtype=H.dtype) for shape in (
        (size, size), ((N + 1) * n, size), (size + (N + 1) * n, s.shape[-1])))
    for i in range(N + 1):
        z, y = slice(i * nm, i * nm + (nm if i < N else n)), slice(i * n, (i + 1) * n)
        P[z, z] = H[i] if i < N else QN
        rhs[z] = -(s[i] if i < N else qN)
        rhs[size + i * n:size + (i + 1) * n] = -c[i]
        C[y, i * nm:i * nm + n] = -torch.eye(n, dtype=H.dtype)
        if i < N:
            C[(i + 1) * n:(i + 2) * n, z] = F[i]
    full = torch.diag_embed(D) if D.dim() == 2 else D
    return torch.cat([torch.cat([P, C.T], 1), torch.cat([C, -torch.block_diag(*full)], 1)], 0), rhs


def stacked(x, u, y, b):
    N = u.shape[1]
    z = [torch.cat([x[b, i], u[b, i]]) for i in range(N)]
    return torch.cat([*z, x[b, N], *y[b]])


@pytest.mark.parametrize('N', [1, 5, 30])
@pytest.mark.parametrize('D', ['spd', 1e-3, 1e-6, 1e-9, 0.0])
def test_solution_equals_the_dense_kkt_solve(N, D):
    H, QN, F, D, s, qN, c = random_problem(N, D)
    factors = riccati.factor(H, QN, F, D)
    assert factors.ok.all()
    x, u, y = riccati.solve(factors, s, qN, c)
    for b in range(B):
        matrix, rhs = dense_kkt(H[b], QN[b], F[b], D[b], s[b], qN[b], c[b])
        got = stacked(x, u, y, b)
        assert (matrix @ got - rhs).abs().max() < 1e-11
        assert (got - torch.linalg.solve(matrix, rhs)).abs().max() < 1e-10


@pytest.mark.parametrize('D', ['spd', 1e-6, 0.0])
def test_float32_residual_is_at_rounding_level(D):
    H, QN, F, D, s, qN, c = random_problem(12, D, dtype=torch.float32)
    x, u, y = riccati.solve(riccati.factor(H, QN, F, D), s, qN, c)
    for b in range(B):
        matrix, rhs = dense_kkt(H[b], QN[b], F[b], D[b], s[b], qN[b], c[b])
        assert (matrix @ stacked(x, u, y, b) - rhs).abs().max() < 2e-5


def test_partly_zero_dual_regularisation_is_solved():
    H, QN, F, _, s, qN, c = random_problem(5, 0.0)
    D = torch.tensor([1.0, 0.0, 0.25, 0.0], dtype=torch.float64).expand(B, 6, n)
    diagonal = riccati.solve(riccati.factor(H, QN, F, D), s, qN, c)
    matrix = riccati.solve(riccati.factor(H, QN, F, torch.diag_embed(D)), s, qN, c)
    kkt, rhs = dense_kkt(H[0], QN[0], F[0], D[0], s[0], qN[0], c[0])
    assert (kkt @ stacked(*diagonal, 0) - rhs).abs().max() < 1e-11
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(diagonal, matrix, strict=True))


@pytest.mark.parametrize('seed', range(10))
def test_pivots_fail_exactly_when_the_kkt_matrix_has_the_wrong_inertia(seed):
    N = 4
    H, QN, F, D, s, qN, c = random_problem(N, 1e-2, seed=seed)
    shift = torch.linspace(0.0, 2.0, B, dtype=torch.float64)
    H[:, 2, n:, n:] -= shift.view(B, 1, 1) * torch.eye(m, dtype=torch.float64)
    ok = riccati.factor(H, QN, F, D).ok
    for b in range(B):
        eigenvalues = torch.linalg.eigvalsh(dense_kkt(H[b], QN[b], F[b], D[b], s[b], qN[b], c[b])[0])
        assert ok[b] == (int((eigenvalues > 0).sum()) == N * (n + m) + n)


def test_indefinite_stage_with_a_positive_pivot_is_accepted():
    """N = 1, Q0 = Q1 = 1, R = -1, A = 0, B = 2, D = 1: G = -1 + 4 * 1/2 = 1."""
    one = torch.ones(1, dtype=torch.float64)
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)).view(1, 1, 2, 2)
    F = torch.tensor([0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    factors = riccati.factor(H, one.view(1, 1, 1), F, torch.ones(1, 2, 1, dtype=torch.float64))
    assert factors.ok.all() and abs(factors.G.item() - 1.0) < 1e-15


def test_bad_samples_are_flagged_and_leave_the_others_bit_equal():
    H, QN, F, D, s, qN, c = random_problem(5, 'spd')
    good = riccati.solve(riccati.factor(H, QN, F, D), s, qN, c)
    H[1, 2, -1, -1] = -100.0
    D[2, 3] = float('nan')
    factors = riccati.factor(H, QN, F, D)
    assert factors.ok.tolist() == [True, False, False]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(good, riccati.solve(factors, s, qN, c), strict=True))


def test_wrong_shapes_name_the_argument_what_came_and_what_was_expected():
    H, QN, F, D, s, qN, c = random_problem(5, 0.0)
    with pytest.raises(ValueError, match=r'D has shape \(3, 5, 4\), expected \(3, 6, 4\)'):
        riccati.factor(H, QN, F, D[:, 1:])
    with pytest.raises(ValueError, match=r'c has shape \(3, 5, 4, 2\)'):
        riccati.solve(riccati.factor(H, QN, F, D), s, qN, c[:, 1:])
