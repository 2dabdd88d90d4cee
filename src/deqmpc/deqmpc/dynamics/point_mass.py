"""A point that is accelerated at will: what is left of a drone where only its path matters.

  x = (p, v)   u = a        p m, v m/s, a m/s^2, world
  p' = v   v' = a
"""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars


@dataclass(frozen=True)
class PointMass:
    """The equations; a step of RK4 is exact."""

    n = 6
    m = 3

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (6 scalars)."""
        return [*x[3:6], *u]
