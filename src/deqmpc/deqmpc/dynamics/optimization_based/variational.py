"""Variational midpoint rule for a mechanical system with impulses.

With the Lagrangian L(q, v), step h, qa = (q0 + q1)/2, va = (q1 - q0)/h, qb = (q1 + q2)/2, vb = (q2 - q1)/h, the next
configuration q2 solves the discrete Euler-Lagrange equation with a generalised impulse J

  h/2 D1(qa, va) + D2(qa, va) + h/2 D1(qb, vb) - D2(qb, vb) + J = 0        D1 = dL/dq,  D2 = dL/dv

which is second-order accurate and keeps the energy of free motion within a bounded error.

The code published with Howell et al. (thowell/optimization_dynamics) has D1 = -b(q, v) with b the bias of
M v' + b = tau, that is dL/dq - (d/dt dL/dv at v' = 0): the term dM/dt v is counted twice. Its free motion does not
converge to that of the continuous system (an acrobot's angles are off by 0.08 rad after 1 s at any h; a test shows
it). `published` selects that form: the paper's tables can only be compared with it. Everything else should not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from deqmpc.dynamics.equations import Scalars


@dataclass(frozen=True)
class Variational(ABC):
    """A system with state x = (q_{t-1}, q_t) and inputs that are impulses (force times h). Scalars are sympy's."""

    h: float = 0.05  # s, step
    published: bool = False  # D1 = -b as in the paper's code, to compare with its tables, instead of D1 = dL/dq

    def __post_init__(self):
        if not 0.0 < self.h < float('inf'):
            raise ValueError(f'h = {self.h!r}; expected a number of seconds > 0')

    @property
    @abstractmethod
    def nq(self) -> int:
        """Coordinates."""

    @property
    @abstractmethod
    def m(self) -> int:
        """Inputs."""

    @property
    def n(self) -> int:
        """States."""
        return 2 * self.nq

    @property
    def memory(self) -> int:
        """The next state keeps q_t."""
        return self.nq

    @property
    def parameters(self) -> int:
        """Entries of theta = (q_{t-1}, q_t, u)."""
        return self.n + self.m

    @abstractmethod
    def lagrangian(self, q: Scalars, v: Scalars) -> Any:
        """L, J."""

    def bias(self, q: Scalars, v: Scalars) -> list:
        """b of M v' + b = tau: d/dt dL/dv at v' = 0, minus dL/dq."""
        import sympy
        L = self.lagrangian(q, v)
        momentum = [sympy.diff(L, e) for e in v]
        return [sum(sympy.diff(p, a) * b for a, b in zip(q, v, strict=True)) - sympy.diff(L, e)
                for p, e in zip(momentum, q, strict=True)]

    def split(self, theta: Scalars) -> tuple[list, list, list]:
        """q_{t-1}, q_t and u."""
        return list(theta[:self.nq]), list(theta[self.nq:self.n]), list(theta[self.n:])

    def midpoint(self, qa: Scalars, qb: Scalars) -> list:
        """(qa + qb)/2."""
        return [(a + b) / 2 for a, b in zip(qa, qb, strict=True)]

    def velocity(self, q1: Scalars, q2: Scalars) -> list:
        """(q2 - q1)/h."""
        return [(b - a) / self.h for a, b in zip(q1, q2, strict=True)]

    def momentum_balance(self, q0: Scalars, q1: Scalars, q2: Scalars) -> list:
        """The left-hand side above without J, one impulse a coordinate."""
        import sympy
        q, v = sympy.symbols(f'q:{self.nq}', real=True), sympy.symbols(f'v:{self.nq}', real=True)
        L = self.lagrangian(q, v)
        d1 = [-b for b in self.bias(q, v)] if self.published else [sympy.diff(L, e) for e in q]
        d2 = [sympy.diff(L, e) for e in v]

        def half_step(start, end, sign):
            here = dict(zip((*q, *v), (*self.midpoint(start, end), *self.velocity(start, end)), strict=True))
            return [(self.h / 2 * a + sign * b).xreplace(here) for a, b in zip(d1, d2, strict=True)]
        return [a + b for a, b in zip(half_step(q0, q1, 1), half_step(q1, q2, -1), strict=True)]
