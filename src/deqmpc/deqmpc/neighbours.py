"""The other drones of a fleet, as moving spheres for a policy.

  column of drone j at time t:   centres p_j + (t - t_j) v_j + k d e_z,  k = -1, 0, 1;  all of radius r and velocity v_j

with p_j, v_j its newest odometry, of the instant t_j. The drone that plans is a point, so r is the least distance of
two centres beside each other. Above and below it is r + d, because a drone in the downwash of another sinks; between
the spheres the column narrows to sqrt(r^2 - d^2 / 4).

Two drones that meet head on see the same and wait for the other to turn, so a policy is shown each column a second
time, to the left of the first by a as seen from itself:

  + a e_z x d / |d|,   d the horizontal way from the drone that plans to drone j

Right is then the shorter way round for both, as in the rules of the air (ICAO Annex 2, 3.2.2.2). A policy with a habit
of its own may still go round the left of both columns; what matters is that nothing is symmetric any more. What a plan
is judged by is the first column alone.

Source of the distances: Hoenig et al., Trajectory Planning for Quadrotor Swarms, IEEE T-RO 34(4), 2018, keep two
Crazyflies 0.24 m apart beside and 0.60 m above each other (ellipsoids of 0.12, 0.12, 0.30 m around each).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deqmpc.types import Obstacles, RigidBodyState


@dataclass(frozen=True)
class ColumnSettings:
    """The column of spheres around another drone."""

    radius: float = 0.25  # m, r: least distance of two centres beside each other
    spacing: float = 0.35  # m, d: between the centres of its spheres, at most sqrt(3) r
    aside: float = 0.15  # m, a: of the second column that a policy is shown; 0: none

    def __post_init__(self):
        # At sqrt(3) r the waist is r / 2; a Crazyflie with its propellers reaches 0.07 m from its centre.
        if not 0.0 < self.radius < math.inf or not 0.0 <= self.spacing <= math.sqrt(3.0) * self.radius:
            raise ValueError(f'column of radius {self.radius} m and spacing {self.spacing} m: expected a radius > 0 '
                             'and a spacing from 0 to sqrt(3) radius')
        if not 0.0 <= self.aside < math.inf:
            raise ValueError(f'column with a second one {self.aside} m aside: expected a number >= 0')


class Neighbours:
    """The newest odometry of the drones `names`."""

    def __init__(self, names: Sequence[str], settings: ColumnSettings = ColumnSettings()):
        self.settings = settings
        self._states: dict[str, RigidBodyState | None] = dict.fromkeys(names)

    def on_odometry(self, name: str, state: RigidBodyState) -> None:
        """Newest state of drone `name` (KeyError for a stranger). An older one, or one not finite, is ignored."""
        held = self._states[name]
        if state.is_finite() and (held is None or state.stamp >= held.stamp):
            self._states[name] = state

    def fault(self, now: float, max_age: float) -> str:
        """Why it is not known where all of them are; '' when it is. `now` (s) on the clock of the stamps."""
        for name, state in self._states.items():
            if state is None:
                return f'no odometry of {name} yet'
            if now - state.stamp > max_age:
                return f'odometry of {name} is {now - state.stamp:.2f} s old, limit {max_age:g} s'
        return ''

    def join(self, field: Obstacles, now: float, seen_from: np.ndarray | None = None) -> Obstacles:
        """`field` and the columns of all drones heard so far, moved to `now` (s); given the position (3,) that a policy
        plans from, with the second columns."""
        states = [s for s in self._states.values() if s is not None]
        if not states:
            return field
        feet = [(s.position + (now - s.stamp) * s.velocity, s.velocity) for s in states]
        if seen_from is not None and self.settings.aside > 0.0:
            feet += [(p + self.settings.aside * _left(p - seen_from), v) for p, v in feet]
        levels = np.array([[0.0, 0.0, k * self.settings.spacing] for k in (-1, 0, 1)])
        field = field.at(now)
        return Obstacles(now, np.concatenate([field.position, *(p + levels for p, _ in feet)]),
                         np.append(field.radius, np.full(3 * len(feet), self.settings.radius)),
                         np.concatenate([field.velocity, *(np.tile(v, (3, 1)) for _, v in feet)]))


def _left(way: np.ndarray) -> np.ndarray:
    """The horizontal unit vector (3,) to the left of `way` (3,); 0 where that is vertical."""
    length = math.hypot(way[0], way[1])
    return np.array([-way[1], way[0], 0.0]) / length if length > 1e-3 else np.zeros(3)
