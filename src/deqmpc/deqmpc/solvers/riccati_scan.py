"""Dual-regularised linear-quadratic regulator by associative scans, batched: depth O(log N) instead of O(N).

Problem, letters, arguments and results are those of `deqmpc.solvers.riccati`; only the order of the operations is
another (Sousa-Pinto and Orban, arXiv 2509.16370). Three scans:

1. Value function. The stages of an interval i..j, their inputs and the states between eliminated, are the function
     1/2 x_i' P x_i - 1/2 y_j' C y_j + y_j' A x_i                 of its first state and the co-state behind its end
   One stage:  P = Q - M R^-1 M',  A = A_i - B_i R^-1 M',  C = D_{i+1} + B_i R^-1 B_i'                    `stages`
   An interval (1) and its successor (2), with E = (I + C1 P2)^-1:
     P = P1 + A1' P2 E A1    A = A2 E A1    C = C2 + A2 E C1 A2'                                            `combine`
   An interval in front of a value function P2: the P of its beginning alone.                                 `value`
2. Co-states' offsets, from N down:    p_i = T_i' p_{i+1} + v_i,   v_i = q_i + K_i' r_i + (A + BK)' W c_{i+1}
3. States, from 0 up:                  x_{i+1} = T_i x_i + t_i,    t_i = E (B_i k_i + c_{i+1} - D p_{i+1})
   Both use the products T_{j-1} .. T_i of the same intervals, one the transposed: `factor` makes them once.

Between the scans all stages are done at once, by the functions of the sequential recursion. Each scan is a binary
tree: up, intervals of 1, 2, 4, .. stages; down, the values at the ends, then in the middles, of ever shorter intervals.

Where R is small against B, C is large and the sums over intervals lose digits (residuals of 1e-6 for R = 1e-3). They
are done in float64 always, and where P misses the Riccati equation P_i = f(P_{i+1}) by more than ROUGH, one Newton
step restores what is lost: f'(P) d = T' d T, so that its correction d_i = T_i' d_{i+1} T_i + f(P_{i+1}) - P_i is one
more scan over the same products.

`ok` is the certificate of the sequential recursion: every pivot S_i and G_i at the final P is positive definite. Only
the pivots decide on a minimum; R_i and the matrices E of intervals may be indefinite. They must be invertible, which
the recursion does not ask of R, and where one nearly is not, digits are lost: `ok` also says that P satisfies the
Riccati equation to sqrt(eps) of its size. A problem with R_i > 0 and Q_i - M_i R_i^-1 M_i' >= 0 always passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqmpc.solvers import riccati
from deqmpc.solvers.riccati import solve

__all__ = ['Factors', 'combine', 'factor', 'is_faster', 'solve', 'stages', 'value']

# What P may miss the Riccati equation by without a Newton step, in units of rounding: 2e-13 in float64
ROUGH = 1e3
Element = tuple[Tensor, Tensor, Tensor]  # P, A, C of intervals, (B, count, n, n) each


@dataclass(frozen=True)
class Factors(riccati.Factors):
    """The factors of the sequential recursion, with the products that turn its two loops into scans."""

    products: Tensor  # (B, about 2 N, n, n): T_{j-1} .. T_i of the intervals of 1, 2, 4, .. N stages

    def backward(self, v: Tensor, pN: Tensor) -> Tensor:
        """p_0 .. p_N of p_i = T_i' p_{i+1} + v_i, for v (B, N, n, k) and pN (B, n, k)."""
        return _suffixes(self.products, v, pN, lambda T, p: T.transpose(-1, -2) @ p)

    def forward(self, t: Tensor, x0: Tensor) -> Tensor:
        """x_0 .. x_N of x_{i+1} = T_i x_i + t_i, for t (B, N, n, k) and x0 (B, n, k)."""
        Ts = _levels(self.products, t.shape[1])
        ts = [t]
        for T in Ts[:-1]:
            left, right = _halves(ts[-1])
            ts.append(_merged(ts[-1], right + _halves(T)[1] @ left))
        x = torch.stack([x0, ts[-1][:, 0] + Ts[-1][:, 0] @ x0], dim=1)
        for T, t in zip(Ts[-2::-1], ts[-2::-1], strict=True):
            T, t = _halves(T)[0], _halves(t)[0]
            x = _interleaved(x, t + T @ x[:, :t.shape[1]])
        return x


def is_faster(batch: int, stages: int, device: torch.device) -> bool:
    """Whether factor and solve here beat deqmpc.solvers.riccati.

    CPU, one thread, 12 states and 4 inputs, float64 (benchmarks/riccati.py): single problems break even at 15 stages,
    and are 1.1 times faster at 20, 2.9 at 100, 4.1 at 500; batches of 4 0.9 at 20, 1.3 at 100; batches of 64 or 200
    two to four times slower, since a batch already fills the steps of the recursion and the scan does more arithmetic.
    The rule for accelerators, where every one of the O(N) steps is a launch, is reasoned and not measured.
    """
    if device.type != 'cpu':
        return stages >= 20
    return batch <= 4 and stages >= 20 * batch


def factor(H: Tensor, QN: Tensor, F: Tensor, D: Tensor) -> Factors:
    """Factor H (B, N, n+m, n+m), QN (B, n, n), F (B, N, n, n+m), D (B, N+1, n) diagonal or (B, N+1, n, n).

    D must be positive semi-definite; zero is allowed. A sample whose pivots fail, or that has a singular
    R_i, is flagged in `ok` and does not touch the others. Raises ValueError on shapes that do not fit.
    """
    N, n, _ = riccati._check(H, QN, F, D)
    element, singular_input = stages(H.double(), F.double(), D.double())
    P = _value_functions(element, QN.double()).to(H.dtype)
    root = riccati._square_root(D)

    def each(function, *arguments):  # of the recursion, for all stages of all samples at once
        return (v.unflatten(0, (len(H), -1)) for v in function(*(v.flatten(0, 1) for v in arguments)))

    def closed_loop(P):  # everything that follows from P, and by how much P misses the Riccati equation
        E, W, *infos = each(riccati._damped, P, D, root)
        again, V, G, info = each(riccati._stage, H, F, W[:, 1:])
        K = torch.linalg.solve_triangular(G.transpose(2, 3), V, upper=True).neg_()
        phi = F[..., :n] + F[..., n:] @ K
        T = E[:, 1:] @ phi
        ok = (torch.cat([singular_input, *infos, info], dim=1) == 0).all(dim=1)
        return Factors(F, D, P, E, W, K, G, phi, T, ok, _products(T)), again - P[:, :N]

    def is_within(rounding, defect, P):  # (B,) False for NaN
        error, size = (v.flatten(1).abs().amax(dim=1) for v in (defect, P))
        return error <= rounding * torch.finfo(P.dtype).eps * size
    factors, defect = closed_loop(P)
    rough = factors.ok & ~is_within(ROUGH, defect, P)
    if rough.any():
        step = _suffixes(factors.products, defect, torch.zeros_like(QN), lambda T, d: T.transpose(-1, -2) @ d @ T)
        P = P + torch.where(rough.view(-1, 1, 1, 1), step, 0.0)
        factors, defect = closed_loop(P)
    return replace(factors, ok=factors.ok & is_within(torch.finfo(P.dtype).eps ** -0.5, defect, P))


def stages(H: Tensor, F: Tensor, D: Tensor) -> tuple[Element, Tensor]:
    """The elements of the single stages, and a flag (B, N): 0 where R_i is invertible."""
    n = F.shape[2]
    A, Bu, M = F[..., :n], F[..., n:], H[..., :n, n:]
    solved, info = torch.linalg.solve_ex(H[..., n:, n:], torch.cat([M, Bu], dim=2).transpose(2, 3))
    RM, RB = solved.split(n, dim=3)  # R^-1 M', R^-1 B'
    C = torch.diag_embed(D[:, 1:]) if D.dim() == 3 else D[:, 1:]
    return (_symmetric(H[..., :n, :n] - M @ RM), A - Bu @ RM, _symmetric(C + Bu @ RB)), info


def combine(left: Element, right: Element) -> Element:
    """The elements of intervals and their successors as one."""
    (P1, A1, C1), (P2, A2, C2) = left, right
    n = P1.shape[-1]
    EA, EC = _damp(C1, P2, torch.cat([A1, C1], dim=-1)).split(n, dim=-1)
    return (_symmetric(P1 + A1.transpose(-1, -2) @ (P2 @ EA)), A2 @ EA,
            _symmetric(C2 + A2 @ EC @ A2.transpose(-1, -2)))


def value(element: Element, P: Tensor) -> Tensor:
    """The value function at the beginning of intervals, given P at their ends."""
    P1, A1, C1 = element
    return _symmetric(P1 + A1.transpose(-1, -2) @ (P @ _damp(C1, P, A1)))


def _damp(C: Tensor, P: Tensor, v: Tensor) -> Tensor:
    """(I + C P)^-1 v, not finite where singular."""
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    return torch.linalg.solve_ex(eye + C @ P, v).result


def _symmetric(v: Tensor) -> Tensor:
    return 0.5 * (v + v.transpose(-1, -2))


def _value_functions(element: Element, QN: Tensor) -> Tensor:
    """P_0 .. P_N (B, N+1, n, n)."""
    tree = [element]
    while tree[-1][0].shape[1] > 1:
        halves = zip(*map(_halves, tree[-1]), strict=True)
        tree.append(tuple(map(_merged, tree[-1], combine(*halves))))
    QN = QN.unsqueeze(1)
    P = torch.cat([value(tree[-1], QN), QN], dim=1)
    for element in tree[-2::-1]:
        right = tuple(_halves(v)[1] for v in element)
        P = _interleaved(P, value(right, P[:, 1:right[0].shape[1] + 1]))
    return P


def _products(T: Tensor) -> Tensor:
    tree = [T]
    while tree[-1].shape[1] > 1:
        left, right = _halves(tree[-1])
        tree.append(_merged(tree[-1], right @ left))
    return torch.cat(tree, dim=1)


def _levels(products: Tensor, N: int) -> tuple[Tensor, ...]:
    """The products of the intervals of 1, 2, 4, .. N stages."""
    counts = [N]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    return products.split(counts, dim=1)


def _suffixes(products: Tensor, v: Tensor, last: Tensor, pull: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """p_0 .. p_N of p_i = pull(T_i, p_{i+1}) + v_i and p_N = last, for pull linear in p and composed by products."""
    Ts = _levels(products, v.shape[1])
    vs = [v]
    for T in Ts[:-1]:
        left, right = _halves(vs[-1])
        vs.append(_merged(vs[-1], left + pull(_halves(T)[0], right)))
    p = torch.stack([vs[-1][:, 0] + pull(Ts[-1][:, 0], last), last], dim=1)
    for T, v in zip(Ts[-2::-1], vs[-2::-1], strict=True):
        T, v = _halves(T)[1], _halves(v)[1]
        p = _interleaved(p, v + pull(T, p[:, 1:v.shape[1] + 1]))
    return p


def _halves(level: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right intervals of the pairs of a level (B, count, ..); an odd last one has no partner."""
    return level[:, 0:level.shape[1] - 1:2], level[:, 1::2]


def _merged(level: Tensor, pairs: Tensor) -> Tensor:
    """The next level: the merged pairs, and the last interval where it had no partner."""
    return torch.cat([pairs, level[:, -1:]], dim=1) if level.shape[1] % 2 else pairs


def _interleaved(ends: Tensor, middles: Tensor) -> Tensor:
    """Values at all ends of a level, from those of the next level and those in the middle of the pairs."""
    pairs = middles.shape[1]
    return torch.cat([torch.stack([ends[:, :pairs], middles], dim=2).flatten(1, 2), ends[:, pairs:]], dim=1)
