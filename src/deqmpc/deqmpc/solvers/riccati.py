"""Dual-regularised linear-quadratic regulator by a sequential Riccati recursion, batched.

Problem (Sousa-Pinto and Orban, arXiv 2509.16370), for each sample of a batch, with z_i = (x_i, u_i):

  max_y min_{x,u}  sum_{i<N} [1/2 z_i' H_i z_i + s_i' z_i] + 1/2 x_N' Q_N x_N + q_N' x_N
                   + y_0' (c_0 - x_0) + sum_{i<N} y_{i+1}' (F_i z_i + c_{i+1} - x_{i+1}) - 1/2 sum_i y_i' D_i y_i

  H_i = [Q_i M_i; M_i' R_i] (n+m, n+m) stage Hessian, s_i = (q_i, r_i) its gradient, F_i = [A_i B_i] (n, n+m) the
  dynamics, c_i (n) their offsets (c_0 the initial state), D_i >= 0 (n, n) the dual regularisation. D = 0 is the
  standard regulator; D = I/mu is a Gauss-Newton step of an augmented Lagrangian with penalty mu on the dynamics.

Recursion, value function 1/2 x' P_i x + p_i' x and co-state y_i = P_i x_i + p_i, from P_N = Q_N, p_N = q_N:
  E = (I + D P)^-1   W = P E             D is never inverted, and may be zero or singular
  H + F' W F = [Y_xx Y_xu; Y_ux G]   K = -G^-1 Y_ux   P <- Y_xx + Y_xu K
  T = E (A + B K)                        the closed loop of x
  p_i = q_i + K' r_i + (A + BK)' W c_{i+1} + T' p_{i+1}          (all stages but one product at a time)
  k_i = -G^-1 (r_i + B' (p_{i+1} + W (c_{i+1} - D p_{i+1})))
  b_0 = c_0 - D p_0,  b_{i+1} = A x_i + B u_i + c_{i+1} - D p_{i+1},  x_i = E b_i,  y_i = W b_i + p_i
E, P, K, W, T do not depend on (s, c): `factor` once, `solve` many right-hand sides. E comes from an LU solve, since
W = P - P L S^-1 L'P (D = L L', S = I + L'P L) cancels where D P is large.

Certificate: the KKT matrix has the inertia of a minimum exactly when every S_i and G_i is positive definite, so a
failed Cholesky factorisation of either says that the sample needs more primal regularisation (`Factors.ok`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What the recursion keeps for its solves. B samples, N stages."""

    F: Tensor  # (B, N, n, n+m)
    D: Tensor  # (B, N+1, n) diagonal or (B, N+1, n, n)
    P: Tensor  # (B, N+1, n, n)
    E: Tensor  # (B, N+1, n, n)
    W: Tensor  # (B, N+1, n, n)
    K: Tensor  # (B, N, m, n)
    G: Tensor  # (B, N, m, m) lower Cholesky factor of G
    phi: Tensor  # (B, N, n, n) A + B K
    T: Tensor  # (B, N, n, n)
    ok: Tensor  # (B,) bool: every pivot was positive definite; where False the other fields mean nothing

    def backward(self, v: Tensor, pN: Tensor) -> Tensor:
        """p_0 .. p_N of p_i = T_i' p_{i+1} + v_i, for v (B, N, n, k) and pN (B, n, k)."""
        back = self.T.transpose(2, 3)
        p = [pN]
        for i in range(v.shape[1] - 1, -1, -1):
            p.append(torch.baddbmm(v[:, i], back[:, i], p[-1]))
        return torch.stack(p[::-1], dim=1)

    def forward(self, t: Tensor, x0: Tensor) -> Tensor:
        """x_0 .. x_N of x_{i+1} = T_i x_i + t_i, for t (B, N, n, k) and x0 (B, n, k)."""
        x = [x0]
        for i in range(t.shape[1]):
            x.append(torch.baddbmm(t[:, i], self.T[:, i], x[-1]))
        return torch.stack(x, dim=1)


def factor(H: Tensor, QN: Tensor, F: Tensor, D: Tensor) -> Factors:
    """Factor H (B, N, n+m, n+m), QN (B, n, n), F (B, N, n, n+m), D (B, N+1, n) diagonal or (B, N+1, n, n).

    D must be positive semi-definite; zero is allowed. A sample whose pivots fail is flagged in `ok` and does not
    touch the others. Raises ValueError on shapes that do not fit.
    """
    N, n, _ = _check(H, QN, F, D)
    half, standard = _square_root(D), not D.any()
    eye = torch.eye(n, dtype=QN.dtype, device=QN.device).expand_as(QN)
    P, Ps, Es, Ws, Ks, Gs, infos = QN, [QN], [], [], [], [], []
    for i in range(N, -1, -1):
        E, W, *info = (eye, P) if standard else _damped(P, D[:, i], half[:, i])
        Es.append(E)
        Ws.append(W)
        infos += info
        if i:
            P, V, chol, info = _stage(H[:, i - 1], F[:, i - 1], W)
            Ps.append(P)
            Gs.append(chol)
            Ks.append(V)
            infos.append(info)
    Ps, Es, Ws, Ks, Gs = (torch.stack(v[::-1], dim=1) for v in (Ps, Es, Ws, Ks, Gs))
    K = torch.linalg.solve_triangular(Gs.transpose(2, 3), Ks, upper=True).neg_()
    phi = F[..., :n] + F[..., n:] @ K
    ok = (torch.stack(infos) == 0).all(dim=0) & torch.isfinite(Ps[:, 0]).all(dim=2).all(dim=1)
    return Factors(F, D, Ps, Es, Ws, K, Gs, phi, phi if standard else Es[:, 1:] @ phi, ok)


def _damped(P: Tensor, D: Tensor, L: Tensor) -> tuple[Tensor, ...]:
    """E, W = P (I + D P)^-1, and two flags (0: S positive definite, E exists) of matrices P (b, n, n), D (b, n) or
    (b, n, n) with its root L."""
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    if D.dim() == 2:
        S, DP = torch.addcmul(eye, L.unsqueeze(-1) * P, L.unsqueeze(-2)), D.unsqueeze(-1) * P
    else:
        S, DP = eye + L.transpose(1, 2) @ P @ L, D @ P
    not_positive = torch.linalg.cholesky_ex(S).info
    E, singular = torch.linalg.solve_ex(eye + DP, eye.expand_as(P))
    W = P @ E
    return E, 0.5 * (W + W.transpose(1, 2)), not_positive, singular


def _stage(H: Tensor, F: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P of stages with H (b, n+m, n+m), F (b, n, n+m) and W (b, n, n) of the next; V with K = -G^-T V; the Cholesky
    factor of the pivot G; its flag (0: positive definite)."""
    n = F.shape[1]
    Y = torch.baddbmm(H, F.transpose(1, 2), W @ F)
    chol, info = torch.linalg.cholesky_ex(Y[:, n:, n:])
    V = torch.linalg.solve_triangular(chol, Y[:, n:, :n], upper=False)
    P = torch.baddbmm(Y[:, :n, :n], V.transpose(1, 2), V, alpha=-1.0)
    return 0.5 * (P + P.transpose(1, 2)), V, chol, info


def solve(factors: Factors, s: Tensor, qN: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for k right-hand sides s (B, N, n+m, k), qN (B, n, k), c (B, N+1, n, k).

    Returns x (B, N+1, n, k), u (B, N, m, k), y (B, N+1, n, k). Samples with `ok` False get numbers without meaning.
    """
    F, D, E, W, K = factors.F, factors.D, factors.E, factors.W, factors.K
    B, N, n, _ = F.shape
    for name, got, expected in (('s', s.shape[:3], (B, N, F.shape[3])), ('qN', qN.shape[:2], (B, n)),
                                ('c', c.shape[:3], (B, N + 1, n))):
        if tuple(got) != expected or not s.dim() == c.dim() == 4 or qN.dim() != 3:
            raise ValueError(f'{name} has shape {tuple({"s": s, "qN": qN, "c": c}[name].shape)}, expected '
                             f'{(*expected, "k")}')
    phi = factors.phi
    constant = s[:, :, :n] + K.transpose(2, 3) @ s[:, :, n:] + phi.transpose(2, 3) @ (W[:, 1:] @ c[:, 1:])
    p = factors.backward(constant, qN)
    b = c - _times(D, p)
    g = p[:, 1:] + W[:, 1:] @ b[:, 1:]
    h = s[:, :, n:] + F[..., n:].transpose(2, 3) @ g
    k = torch.cholesky_solve(h, factors.G).neg_()
    drift = F[..., n:] @ k + b[:, 1:]
    x = factors.forward(E[:, 1:] @ drift, E[:, 0] @ b[:, 0])
    u = K @ x[:, :N] + k
    b[:, 1:] = phi @ x[:, :N] + drift
    return x, u, W @ b + p


def _times(D: Tensor, v: Tensor) -> Tensor:
    """D v for D diagonal (..., n) or full (..., n, n) and v (..., n, k)."""
    return D.unsqueeze(-1) * v if D.dim() == v.dim() - 1 else D @ v


def _square_root(D: Tensor) -> Tensor:
    """L with L L' = D: the diagonal's root, or the eigenvalue root of a matrix, which may be singular."""
    if D.dim() == 3:
        return D.clamp_min(0.0).sqrt()
    # torch.linalg.eigh raises for the whole batch on a single NaN
    finite = torch.isfinite(D).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, D, 0.0))
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    return torch.where(finite, root, float('nan'))


def _check(H, QN, F, D):
    if F.dim() != 4 or F.shape[3] <= F.shape[2]:
        raise ValueError(f'F has shape {tuple(F.shape)}, expected (B, N, n, n+m) with m >= 1')
    B, N, n, nm = F.shape
    for name, got, expected in (('H', H, [(B, N, nm, nm)]), ('QN', QN, [(B, n, n)]),
                                ('D', D, [(B, N + 1, n), (B, N + 1, n, n)])):
        if tuple(got.shape) not in expected:
            raise ValueError(f'{name} has shape {tuple(got.shape)}, expected {" or ".join(map(str, expected))} '
                             f'to go with F of shape {tuple(F.shape)}')
    return N, n, nm - n
