"""Discrete dynamics: one step of an integrator and its exact first and second derivatives.

The classical Runge-Kutta step, `RK4`:
  k1 = f(x, u)   k2 = f(x + h/2 k1, u)   k3 = f(x + h/2 k2, u)   k4 = f(x + h k3, u)
  phi(x, u) = x + h/6 (k1 + 2 k2 + 2 k3 + k4)

With z = (x, u), J_i = [A_i B_i] = df/dz at stage i and K_i = dk_i/dz the chain rule gives
  K_1 = J_1   K_2 = J_2 + h/2 A_2 K_1   K_3 = J_3 + h/2 A_3 K_2   K_4 = J_4 + h A_4 K_3
  dphi/dz = [I 0] + h/6 (K_1 + 2 K_2 + 2 K_3 + K_4)
and for the Hessian of y' phi, with adjoints w_i of the stages and S_i = dz_i/dz,
  w_4 = h/6 y   w_3 = h/3 y + h A_4' w_4   w_2 = h/3 y + h/2 A_3' w_3   w_1 = h/6 y + h/2 A_2' w_2
  d^2(y' phi)/dz^2 = sum_i S_i' [d^2(w_i' f)/dz^2](z_i) S_i

The explicit step, `Euler`, is the same with one stage:
  phi(x, u) = x + h f(x, u)   dphi/dz = [I 0] + h J   d^2(y' phi)/dz^2 = d^2(h y' f)/dz^2
It serves maps that are not a Runge-Kutta step of continuous dynamics: f = (phi - x) / h, for a phi that is known.
Semi-implicit Euler of q' = v, v' = a(q, v, u), say, has f = (v + h a, a); such equations know their step, `dt`.

Inputs may be changes of a value that is held over the step, and kept as a state x_i with x_i' = 0. The equations then
name the pairs (i, j) of such a state and its input as `jump`: at the end of the step, phi_i += u_j.

J and d^2(w' f)/dz^2 are generated from the equations (deqmpc.dynamics.equations).

Dynamics that are themselves a step, such as the solutions of a program (deqmpc.dynamics.optimization_based), are taken
as they are, `Own`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from deqmpc.dynamics.equations import Equations, Scalars, curvature_function, jacobian_function

# Up to this many points the straight-line code runs point by point on Python floats: an operation on a float
# costs 0.04 us, on a small NumPy array 0.5 us, on a small tensor 3 us. Floats are double: float64 only.
_FEW_POINTS = 10


def rk4(derivative: Callable[[Scalars, Scalars], list], x: Scalars, u: Scalars,
        h: float) -> tuple[list, tuple[Scalars, ...]]:
    """One step over scalars -> next state, and the states of the four stages."""
    k1 = derivative(x, u)
    x2 = [a + (0.5 * h) * k for a, k in zip(x, k1, strict=True)]
    k2 = derivative(x2, u)
    x3 = [a + (0.5 * h) * k for a, k in zip(x, k2, strict=True)]
    k3 = derivative(x3, u)
    x4 = [a + h * k for a, k in zip(x, k3, strict=True)]
    k4 = derivative(x4, u)
    following = [a + (h / 6.0) * (p + 2.0 * (q + r) + s) for a, p, q, r, s in zip(x, k1, k2, k3, k4, strict=True)]
    return following, (x, x2, x3, x4)


def euler(derivative: Callable[[Scalars, Scalars], list], x: Scalars, u: Scalars,
          h: float) -> tuple[list, tuple[Scalars, ...]]:
    """One step over scalars -> next state, and the state of the only stage."""
    return [a + h * k for a, k in zip(x, derivative(x, u), strict=True)], (x,)


class Integrator(ABC):
    """The step phi of `equations` over `dt` seconds, batched: x (..., n), u (..., m)."""

    steps: ClassVar[tuple[float, ...]]  # stage i+1 is at x + steps[i] h k_i
    weights: ClassVar[tuple[float, ...]]  # phi = x + h sum of weights[i] k_i
    over_scalars: Callable[..., tuple[list, tuple[Scalars, ...]]]  # `rk4` or `euler`

    def __init__(self, equations: Equations, dt: float):
        self.equations, self.dt = equations, float(dt)
        self.jump: tuple[tuple[int, int], ...] = getattr(equations, 'jump', ())
        own = getattr(equations, 'dt', self.dt)
        if own != self.dt:
            raise ValueError(f'dt = {dt!r}; {type(equations).__name__} is made for steps of {own!r} s')

    def step(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """phi(x, u), shape (..., n). Differentiable by torch."""
        if torch.is_grad_enabled() and (x.requires_grad or u.requires_grad):
            return torch.stack(self._advance(x.unbind(-1), u.unbind(-1))[0], dim=-1)
        return self._step(x, u)[0].reshape(x.shape)

    def _advance(self, x: Scalars, u: Scalars) -> tuple[list, tuple[Scalars, ...]]:
        """phi over scalars, and the states of the stages."""
        following, states = self.over_scalars(self.equations.derivative, x, u, self.dt)
        for i, j in self.jump:
            following[i] = following[i] + u[j]
        return following, states

    @abstractmethod
    def linearize(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """phi (..., n) and dphi/d(x, u) (..., n, n+m). Not differentiable by torch."""

    @abstractmethod
    def curvature(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Hessian of y' phi with respect to (x, u), (..., n+m, n+m), for y (..., n). Not differentiable."""

    def _step(self, x, u):
        """phi (P, n) and the states of the S stages (S, P, n) of P points."""
        n = self.equations.n
        points = torch.cat([x.detach(), u.detach()], dim=-1)
        points = points.reshape(-1, points.shape[-1])
        if points.device.type != 'cpu':
            columns = points.unbind(-1)
            following, states = self._advance(columns[:n], columns[n:])
            return torch.stack(following, dim=-1), torch.stack([torch.stack(list(s), dim=-1) for s in states])
        if 0 < len(points) <= _FEW_POINTS and points.dtype == torch.float64:
            made = [self._advance(p[:n], p[n:]) for p in points.tolist()]
            return (torch.tensor([following for following, _ in made], dtype=x.dtype),
                    torch.tensor([s for _, s in made], dtype=x.dtype).transpose(0, 1))
        columns = np.ascontiguousarray(points.numpy().T)
        following, states = self._advance(columns[:n], columns[n:])
        return (torch.from_numpy(np.stack(following, axis=-1)),
                torch.from_numpy(np.stack([np.stack(list(s), axis=-1) for s in states])))

    def _add_identity(self, f):
        """dx/dz and the jumps, to f (P, n, n+m)."""
        n = self.equations.n
        f[:, :, :n].diagonal(dim1=1, dim2=2).add_(1.0)
        for i, j in self.jump:
            f[:, i, n + j] += 1.0

    def _jacobians(self, states, u):
        """df/d(x, u) of the stages (S, P, n, n+m)."""
        n, m = self.equations.n, self.equations.m
        points = states.flatten(0, 1), _repeated(u, len(states))
        j = _evaluate(jacobian_function(self.equations), points, (n, n + m))
        return j.reshape(len(states), -1, n, n + m)


class RK4(Integrator):
    """The classical Runge-Kutta step."""

    steps = (0.5, 0.5, 1.0)
    weights = (1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0)
    over_scalars = staticmethod(rk4)

    def linearize(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Integrator."""
        n, m = self.equations.n, self.equations.m
        following, states = self._step(x, u)
        k1, k2, k3, k4 = self._chain(self._jacobians(states, u))
        f = (k2 + k3).mul_(2.0).add_(k1).add_(k4).mul_(self.dt / 6.0)
        self._add_identity(f)
        return following.reshape(x.shape), f.reshape(*x.shape[:-1], n, n + m)

    def curvature(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See Integrator."""
        n, m, h = self.equations.n, self.equations.m, self.dt
        _, states = self._step(x, u)
        j = self._jacobians(states, u)
        k = self._chain(j)
        a = j[..., :n].transpose(2, 3)
        y = y.detach().reshape(-1, n, 1)
        w4 = (h / 6.0) * y
        w3 = (h / 3.0) * y + h * (a[3] @ w4)
        w2 = (h / 3.0) * y + (0.5 * h) * (a[2] @ w3)
        w1 = (h / 6.0) * y + (0.5 * h) * (a[1] @ w2)
        s = torch.eye(n + m, dtype=x.dtype, device=x.device).repeat(4, len(y), 1, 1)
        for i, step in ((1, 0.5 * h), (2, 0.5 * h), (3, h)):
            s[i, :, :n] += step * k[i - 1]
        w = torch.stack([w1, w2, w3, w4]).flatten(0, 1)[..., 0]
        c = _evaluate(curvature_function(self.equations), (states.flatten(0, 1), _repeated(u, 4), w), (n + m, n + m))
        c = (c + torch.triu(c, diagonal=1).transpose(1, 2)).reshape(s.shape)
        return (s.transpose(2, 3) @ c @ s).sum(0).reshape(*x.shape[:-1], n + m, n + m)

    def _chain(self, j):
        n, h = self.equations.n, self.dt
        k1 = j[0]
        k2 = torch.baddbmm(j[1], j[1, :, :, :n], k1, alpha=0.5 * h)
        k3 = torch.baddbmm(j[2], j[2, :, :, :n], k2, alpha=0.5 * h)
        k4 = torch.baddbmm(j[3], j[3, :, :, :n], k3, alpha=h)
        return k1, k2, k3, k4


class Euler(Integrator):
    """The explicit step."""

    steps = ()
    weights = (1.0,)
    over_scalars = staticmethod(euler)

    def linearize(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Integrator."""
        n, m = self.equations.n, self.equations.m
        following, states = self._step(x, u)
        f = self.dt * self._jacobians(states, u)[0]
        self._add_identity(f)
        return following.reshape(x.shape), f.reshape(*x.shape[:-1], n, n + m)

    def curvature(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See Integrator."""
        n, m = self.equations.n, self.equations.m
        points = x.detach().reshape(-1, n), _repeated(u, 1), self.dt * y.detach().reshape(-1, n)
        c = _evaluate(curvature_function(self.equations), points, (n + m, n + m))
        return (c + torch.triu(c, diagonal=1).transpose(1, 2)).reshape(*x.shape[:-1], n + m, n + m)


class Own(Integrator):
    """The step of dynamics with `n`, `m`, `step(x, u) -> phi` and `linearize(x, u) -> phi, A, B`. They have no second
    derivatives: the curvature is zero, and solvers are left with Gauss-Newton's Hessian of the dynamics."""

    def step(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """See Integrator."""
        return self.equations.step(x, u)

    def linearize(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Integrator."""
        following, A, B = self.equations.linearize(x.detach(), u.detach())
        return following, torch.cat([A, B], dim=-1)

    def curvature(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Zero, see above."""
        size = x.shape[-1] + u.shape[-1]
        return x.new_zeros(*x.shape[:-1], size, size)


INTEGRATORS: dict[str, type[Integrator]] = {'rk4': RK4, 'euler': Euler}


def kind_of(equations: Equations) -> type[Integrator]:
    """The integrator that `equations` are made for: `Own` where they are a step themselves, else RK4 where they name
    none. ValueError for an unknown name."""
    if hasattr(equations, 'linearize'):
        return Own
    name = getattr(equations, 'integrator', 'rk4')
    if name not in INTEGRATORS:
        raise ValueError(f'{type(equations).__name__}.integrator = {name!r}; expected one of {", ".join(INTEGRATORS)}')
    return INTEGRATORS[name]


def _repeated(u: torch.Tensor, stages: int) -> torch.Tensor:
    """The inputs of all stages (S P, m)."""
    return u.detach().reshape(-1, u.shape[-1]).repeat(stages, 1)


def _evaluate(function: Callable, vectors: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    """Run generated code `function(*vectors, out)` on P points (P, length); returns (P, *shape)."""
    first = vectors[0]
    if first.device.type != 'cpu':
        out = first.new_zeros(*shape, len(first))
        function(*(v.unbind(-1) for v in vectors), out)
        return out.permute(2, 0, 1).contiguous()
    if len(first) <= 4 * _FEW_POINTS and first.dtype == torch.float64:
        points = np.zeros((len(first), *shape))
        for out, *point in zip(points, *(v.tolist() for v in vectors), strict=True):
            function(*point, out)
        return torch.from_numpy(points)
    columns = [np.ascontiguousarray(v.numpy().T) for v in vectors]
    out = np.zeros((*shape, len(first)), dtype=columns[0].dtype)
    function(*columns, out)
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))
