"""A discrete-time optimal-control problem and the data of a batch of its instances.

  min  sum_{t<T} [1/2 |x_t - xr_t|_Q^2 + 1/2 |u_t - ur_t|_R^2] + 1/2 |x_T - xr_T|_Qf^2
  s.t. x_0 = x_init,   x_{t+1} = phi(x_t, u_t)                       defects k
       low <= (x_{t+1}, u_t) <= high,   |p_{t+1} - o_{t+1,j}| >= r_j      residuals h <= 0

for t = 0..T-1 and spheres j = 0..K-1. Q, R, Qf are diagonal; p is the position part of x. The residual of a sphere
is (r^2 - |p - o|^2) / (2 r): smooth, and metres of penetration to first order at the surface, so that one
tolerance and one penalty fit bounds and spheres of any radius. A sphere of radius 0 is absent (padding).

Shapes: x (..., B, T+1, n), u (..., B, T, m), k (..., B, T+1, n), h (..., B, T, C) with C = bounds + K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deqmpc.dynamics.equations import Equations
from deqmpc.dynamics.integrators import kind_of

INF = float('inf')


@dataclass(frozen=True)
class Instances:
    """B instances. Made by `Problem.instances`, which checks the shapes."""

    x_init: Tensor  # (B, n)
    x_ref: Tensor  # (B, T+1, n)
    u_ref: Tensor  # (B, T, m)
    Q: Tensor  # (B, n) diagonal
    R: Tensor  # (B, m)
    Qf: Tensor  # (B, n)
    centers: Tensor  # (B, T+1, K, d) positions of the spheres at every knot; knot 0 is not used
    radii: Tensor  # (B, K)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def __getitem__(self, samples) -> Instances:
        """The instances that `samples` (indices or mask over B) selects."""
        return Instances(*(v[samples] for v in self.tensors()))

    def is_finite(self) -> Tensor:
        """(B,) True where every number of the instance is finite."""
        return torch.stack([torch.isfinite(v).flatten(1).all(dim=1) for v in self.tensors()]).all(dim=0)


class Problem:
    """Dynamics, horizon, weights and constraints, shared by all instances.

    Q (n,), R (m,), Qf (n,) are the diagonal weights (Q, Qf >= 0, R > 0); x_low, x_high (n,) and u_low, u_high (m,)
    the bounds, infinite by default; `position` the consecutive indices of x that the spheres act on. ValueError
    names a number that cannot be used.
    """

    def __init__(self, equations: Equations, dt: float, horizon: int, Q: Sequence[float], R: Sequence[float],
                 Qf: Sequence[float] | None = None, u_low: Sequence[float] | None = None,
                 u_high: Sequence[float] | None = None, x_low: Sequence[float] | None = None,
                 x_high: Sequence[float] | None = None, position: Sequence[int] = (0, 1, 2)):
        n, m = equations.n, equations.m
        if not 0.0 < dt < INF:
            raise ValueError(f'dt = {dt!r}; expected a number of seconds > 0')
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f'horizon = {horizon!r}; expected an integer >= 1')
        self.equations, self.dt, self.horizon = equations, float(dt), horizon
        self.n, self.m = n, m
        self.phi = kind_of(equations)(equations, dt)
        self.Q, self.R = _vector('Q', Q, n), _vector('R', R, m)
        self.Qf = self.Q if Qf is None else _vector('Qf', Qf, n)
        for name, weight in (('Q', self.Q), ('Qf', self.Qf), ('R', self.R)):
            if not torch.isfinite(weight).all() or weight.min() < 0 or (name == 'R' and weight.min() == 0):
                raise ValueError(f'{name} = {weight.tolist()}; expected numbers {">" if name == "R" else ">="} 0')
        low = torch.cat([_vector('x_low', x_low, n, -INF), _vector('u_low', u_low, m, -INF)])
        high = torch.cat([_vector('x_high', x_high, n, INF), _vector('u_high', u_high, m, INF)])
        if not (low < high).all():
            raise ValueError(f'lower bounds {low.tolist()} must be below upper bounds {high.tolist()}')
        self.x_low, self.x_high, self.u_low, self.u_high = low[:n], high[:n], low[n:], high[n:]
        first, last = (position[0], position[-1] + 1) if len(position) else (0, 0)
        if list(position) != list(range(first, last)) or not 0 <= first < last <= n:
            raise ValueError(f'position = {position}; expected consecutive indices of a state of {n} numbers')
        self.position = slice(first, last)
        # rows of `sign` pick the bounded components of (x_{t+1}, u_t): h = sign z - limit
        above, below = torch.isfinite(high).nonzero()[:, 0], torch.isfinite(low).nonzero()[:, 0]
        eye = torch.eye(n + m, dtype=torch.float64)
        self.sign = torch.cat([eye[above], -eye[below]])  # (bounds, n+m)
        self.limit = torch.cat([high[above], -low[below]])  # (bounds,)
        self._cast: dict = {}

    def constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`sign` and `limit` in the type and on the device of `like`."""
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = (self.sign.to(like), self.limit.to(like))
        return self._cast[key]

    def instances(self, x_init: Tensor, x_ref: Tensor, u_ref: Tensor, centers: Tensor | None = None,
                  radii: Tensor | None = None, Q: Tensor | None = None, R: Tensor | None = None,
                  Qf: Tensor | None = None) -> Instances:
        """Check and complete a batch. centers (B, K, d) stand still, (B, T+1, K, d) move; radii (B, K) or (K,);
        Q, R, Qf (B, .) or (.,) replace the problem's weights. ValueError names argument, got and expected."""
        n, m, T, d = self.n, self.m, self.horizon, self.position.stop - self.position.start
        _check('x_init', x_init, [('B', n)])
        B = x_init.shape[0]
        _check('x_ref', x_ref, [(B, T + 1, n)])
        _check('u_ref', u_ref, [(B, T, m)])
        if (centers is None) != (radii is None):
            raise ValueError('centers and radii must be given together')
        if centers is None:
            centers, radii = x_init.new_zeros(B, T + 1, 0, d), x_init.new_zeros(B, 0)
        K = centers.shape[-2] if centers.dim() >= 2 else 'K'
        _check('centers', centers, [(B, K, d), (B, T + 1, K, d)])
        _check('radii', radii, [(B, K), (K,)])
        if centers.dim() == 3:
            centers = centers.unsqueeze(1).expand(B, T + 1, K, d)
        weights = []
        for name, given, own, size in (('Q', Q, self.Q, n), ('R', R, self.R, m), ('Qf', Qf, self.Qf, n)):
            value = own.to(x_init) if given is None else given
            _check(name, value, [(B, size), (size,)])
            weights.append(value.expand(B, size))
        data = Instances(x_init, x_ref, u_ref, *weights, centers, radii.expand(B, K))
        for f, v in zip(fields(data), data.tensors(), strict=True):
            if v.dtype != x_init.dtype or v.device != x_init.device:
                raise ValueError(f'{f.name} is {v.dtype} on {v.device}, expected {x_init.dtype} on '
                                 f'{x_init.device} as x_init')
        return data

    def cost(self, data: Instances, x: Tensor, u: Tensor) -> Tensor:
        """Objective, (..., B)."""
        ex, eu = x - data.x_ref, u - data.u_ref
        running = (ex[..., :-1, :].square().sum(-2) * data.Q).sum(-1) + (eu.square().sum(-2) * data.R).sum(-1)
        return 0.5 * (running + (ex[..., -1, :].square() * data.Qf).sum(-1))

    def defects(self, data: Instances, x: Tensor, u: Tensor) -> Tensor:
        """x_init - x_0 and phi(x_t, u_t) - x_{t+1}, (..., B, T+1, n)."""
        start = data.x_init.expand(x[..., 0, :].shape)
        return torch.cat([start.unsqueeze(-2), self.phi.step(x[..., :-1, :], u)], dim=-2) - x

    def residuals(self, data: Instances, x: Tensor, u: Tensor) -> Tensor:
        """h, (..., B, T, C): bounds first, then spheres."""
        return self.residuals_and_offsets(data, x, u)[0]

    def residuals_and_offsets(self, data: Instances, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """h, and p - o (..., B, T, K, d), from which the spheres' gradients -(p - o) / r follow."""
        sign, limit = self.constants(x)
        bounds = torch.cat([x[..., 1:, :], u], dim=-1) @ sign.T - limit
        offset = x[..., 1:, self.position].unsqueeze(-2) - data.centers[:, 1:]
        r, inverse = radius_and_inverse(data.radii)
        spheres = torch.addcmul(r, offset.square().sum(-1), inverse, value=-1.0)
        return torch.cat([bounds, spheres], dim=-1), offset


def radius_and_inverse(radii: Tensor) -> tuple[Tensor, Tensor]:
    """r / 2 and 1 / (2 r), (B, 1, K); 0 for an absent sphere."""
    half = 0.5 * radii.unsqueeze(-2)
    return half, torch.where(half > 0, 0.25 / half, 0.0)


def _vector(name, value, size, default=None) -> Tensor:
    value = torch.full((size,), default, dtype=torch.float64) if value is None else torch.as_tensor(
        value, dtype=torch.float64)
    _check(name, value, [(size,)])
    if value.isnan().any():
        raise ValueError(f'{name} = {value.tolist()}; expected no NaN')
    return value


def _check(name, value, shapes):
    """ValueError unless `value` is a tensor of one of `shapes`; a str stands for any size."""
    if not isinstance(value, Tensor):
        raise ValueError(f'{name} is a {type(value).__name__}, expected a torch.Tensor')
    for shape in shapes:
        if value.dim() == len(shape) and all(
                isinstance(e, str) or g == e for g, e in zip(value.shape, shape, strict=True)):
            return
    expected = ' or '.join(f'({", ".join(map(str, s))})' for s in shapes)
    raise ValueError(f'{name} has shape {tuple(value.shape)}, expected {expected}')
