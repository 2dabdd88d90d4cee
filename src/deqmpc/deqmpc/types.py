"""The values that pass between the parts of the stack, as NumPy arrays with units and frames.

Frames: `world` is z-up, x forward, y left, as the mocap bridge publishes it; `body` is the
Crazyflie's own frame (x forward, y left, z up). Quaternions are (x, y, z, w), body -> world.
Stamps are seconds of the ROS clock as a float (the in-process loop uses simulated seconds).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RigidBodyState:
    """State of one drone at one instant."""

    stamp: float  # s
    position: np.ndarray  # (3,) m, world
    quaternion: np.ndarray  # (4,) x y z w, body -> world, unit norm
    velocity: np.ndarray  # (3,) m/s, world
    rates: np.ndarray  # (3,) rad/s, body

    def is_finite(self) -> bool:
        """True when every number of the state is finite."""
        return bool(np.isfinite(self.stamp)) and all(
            np.isfinite(a).all() for a in (self.position, self.quaternion, self.velocity, self.rates))


@dataclass(frozen=True)
class Obstacles:
    """Spheres, K of them. K may be zero."""

    stamp: float  # s, instant at which the positions hold
    position: np.ndarray  # (K, 3) m, world
    radius: np.ndarray  # (K,) m
    velocity: np.ndarray  # (K, 3) m/s, world; zero where unknown or static

    @classmethod
    def none(cls, stamp: float = 0.0) -> Obstacles:
        """An empty field."""
        return cls(stamp, np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)))

    def at(self, stamp: float) -> Obstacles:
        """The field moved to `stamp` with constant velocity."""
        return dataclasses.replace(
            self, stamp=stamp, position=self.position + (stamp - self.stamp) * self.velocity)

    def clearances(self, path: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Distances (n, K) in m from the points of `path` (n, 3) to the spheres' surfaces, each `ahead` (n,) s after
        the stamp, at constant velocity. Negative inside a sphere."""
        centres = self.position + ahead[:, None, None] * self.velocity  # (n, K, 3)
        return np.linalg.norm(path[:, None] - centres, axis=2) - self.radius

    def clearance(self, point: np.ndarray) -> tuple[float, int]:
        """Distance (m) from `point` (3,) to the nearest sphere's surface, and that sphere's index.

        Negative inside a sphere; (inf, -1) when there are no spheres.
        """
        if len(self.radius) == 0:
            return float('inf'), -1
        d = np.linalg.norm(self.position - point, axis=1) - self.radius
        k = int(np.argmin(d))
        return float(d[k]), k


@dataclass(frozen=True)
class Plan:
    """A planned trajectory of T+1 full states; point 0 is the state the plan started from."""

    stamp: float  # s, instant of point 0
    time_from_start: np.ndarray  # (T+1,) s, first entry 0, increasing
    position: np.ndarray  # (T+1, 3) m, world
    quaternion: np.ndarray  # (T+1, 4) x y z w, body -> world
    velocity: np.ndarray  # (T+1, 3) m/s, world
    rates: np.ndarray  # (T+1, 3) rad/s, body
    acceleration: np.ndarray  # (T+1, 3) m/s^2, world, kinematic (0 at hover)

    def __post_init__(self):
        n = len(self.time_from_start)
        for name, width in (('position', 3), ('quaternion', 4), ('velocity', 3), ('rates', 3),
                            ('acceleration', 3)):
            got = np.shape(getattr(self, name))
            if got != (n, width):
                raise ValueError(f'Plan.{name} has shape {got}, expected {(n, width)}')

    def is_finite(self) -> bool:
        """True when every number of the plan is finite."""
        return bool(np.isfinite(self.stamp)) and all(
            np.isfinite(getattr(self, f.name)).all()
            for f in dataclasses.fields(self) if f.name != 'stamp')
