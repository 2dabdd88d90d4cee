"""Anderson acceleration of a fixed point z = f(z), batched, with every sample on its own.

With residuals g_i = f(z_i) - z_i of the last m iterates, the next one is

  z <- sum_i a_i (z_i + beta g_i),     a = argmin |sum_i a_i g_i|  s.t.  sum_i a_i = 1

(Walker and Ni, SIAM J. Numer. Anal. 49, 2011). The minimiser is a ~ D^-1 (C + lambda I)^-1 D^-1 1 with
D = diag(|g_i|) and the correlations C_ij = g_i'g_j / (|g_i||g_j|), so that lambda has no unit and old, large residuals
do not blur new, small ones.

A sample has converged where |g| <= tolerance |f(z)|. It then leaves the batch, so the cost follows the samples that
still need work. No norm, stopping rule or mixing weight ever sees two samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Numbers of the iteration. Defaults are those of the DEQ-MPC authors' code."""

    memory: int = 5  # m, iterates mixed
    damping: float = 0.8  # beta, share of the residuals in the mix
    tolerance: float = 1e-2  # on |f(z) - z| relative to |f(z)|
    evaluations: int = 10  # of f at most
    regularization: float = 1e-4  # lambda, on correlations: well above their rounding in float32

    def __post_init__(self):
        for name in ('memory', 'evaluations'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 1')
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f'damping = {self.damping!r}; expected a number in (0, 1]')
        for name in ('tolerance', 'regularization'):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number in (0, 1)')


@dataclass(frozen=True)
class FixedPoint:
    """Result of a solve."""

    z: Tensor  # (B, ...) f at the iterate with the least residual; the initial z where f was never finite
    residual: Tensor  # (B,) least |f(z) - z| / |f(z)|; infinite where f was never finite
    evaluations: Tensor  # (B,) of f
    converged: Tensor  # (B,) bool: residual <= tolerance
    finite: Tensor  # (B,) bool: False where f gave NaN or infinity; such a sample stopped there


def solve(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, settings: Settings = Settings()) -> FixedPoint:
    """Iterate from z (B, ...). `f(z, samples)` maps the rows z (A, ...) of the samples (A,) that are still on their
    way to rows of the same shape. Not differentiable; see deqmpc.networks.equilibrium."""
    B, shape, m = z.shape[0], z.shape[1:], settings.memory
    now = z.detach().reshape(B, -1)
    best = now.clone()
    least = best.new_full((B,), float('inf'))
    count = torch.zeros(B, dtype=torch.long, device=z.device)
    finite = torch.ones(B, dtype=torch.bool, device=z.device)
    active = torch.arange(B, device=z.device)
    gram = best.new_zeros(B, m, m)
    Z: list[Tensor] = []  # the last m iterates (A, D); a list, so that a smaller batch copies only what there is
    G: list[Tensor] = []  # their residuals
    for k in range(settings.evaluations):
        out = f(now.reshape(-1, *shape), active).reshape(len(active), -1)
        g = out - now
        size = out.norm(dim=1)
        residual = g.norm(dim=1) / size.clamp_min(torch.finfo(out.dtype).tiny)
        known = torch.isfinite(residual)
        count[active] += 1
        finite[active] = known
        better = known & (residual < least[active])
        best[active[better]] = out[better]
        least[active[better]] = residual[better]
        going = known & (residual > settings.tolerance)
        if k + 1 == settings.evaluations or not going.any():
            break
        if not going.all():
            active, now, out, g, gram = (v[going] for v in (active, now, out, g, gram))
            Z, G = [v[going] for v in Z], [v[going] for v in G]
        slot = k % m
        Z[slot:slot + 1], G[slot:slot + 1] = [now], [g]
        row = torch.stack([(v * g).sum(dim=1) for v in G], dim=1)
        gram[:, slot, :len(G)] = gram[:, :len(G), slot] = row
        now = out
        if k > 0:
            a = _weights(gram[:, :len(G), :len(G)], slot, settings.regularization).unsqueeze(2)
            now = a[:, 0] * Z[0]
            for j in range(len(G)):
                if j:
                    now = torch.addcmul(now, a[:, j], Z[j])
                now = torch.addcmul(now, a[:, j], G[j], value=settings.damping)
    return FixedPoint(best.reshape(B, *shape), least, count, least <= settings.tolerance, finite)


def _weights(gram: Tensor, newest: int, regularization: float) -> Tensor:
    """a (A, k) from the inner products (A, k, k) of the residuals; all weight on the newest iterate where they
    cannot be factorised."""
    exact = gram.double()
    scale = exact.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    C = scale.unsqueeze(1) * exact * scale.unsqueeze(2)
    C.diagonal(dim1=1, dim2=2).add_(regularization)
    chol, info = torch.linalg.cholesky_ex(C)
    a = scale * torch.cholesky_solve(scale.unsqueeze(2), chol).squeeze(2)
    a = a / a.sum(dim=1, keepdim=True)
    usable = (info == 0) & torch.isfinite(a).all(dim=1)
    plain = torch.zeros_like(a)
    plain[:, newest] = 1.0
    return torch.where(usable.unsqueeze(1), a, plain).to(gram.dtype)
