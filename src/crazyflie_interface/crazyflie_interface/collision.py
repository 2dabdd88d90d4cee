# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a path meets the virtual spheres.

With the path p(t), t in [0, H], and spheres that keep their velocity, c_k(t) = c_k + t u_k, radius R_k:

    clearance(t) = min over k of |p(t) - c_k(t)| - R_k

The paths that the guard asks about, with x, v the measured position and velocity and p the plan from now on:

    flown plan        p(t)
    measured motion   p(t) + (x - p(0)) + (v - p'(0)) t     (the true motion to first order, bent as planned)
    hold              the point where it would come to rest
    landing           straight down from there at the landing's mean speed
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deqmpc.types import Obstacles

STEP = 0.04  # s between two instants that are looked at; 4 cm at 1 m/s


@dataclass(frozen=True)
class Encounter:
    """The nearest approach of one path to the spheres."""

    clearance: float  # m from a sphere's surface, negative inside; inf without spheres
    after: float  # s from now
    sphere: int  # index, -1 without spheres
    present: float  # m, the clearance now

    def worse_than(self, margin: float) -> bool:
        """True when the path comes nearer than `margin` (m) and does not merely lead out from there."""
        return self.clearance < margin and self.clearance < self.present - 0.01


def instants(horizon: float) -> np.ndarray:
    """Times (n,) s from 0 to `horizon`, about STEP apart."""
    return np.linspace(0.0, horizon, max(2, round(horizon / STEP) + 1))


def encounter(path: np.ndarray, ahead: np.ndarray, spheres: Obstacles) -> Encounter:
    """Nearest approach of `path` (n, 3) m, world, at the times `ahead` (n,) s to `spheres`, which hold at 0."""
    if len(spheres.radius) == 0:
        return Encounter(np.inf, 0.0, -1, np.inf)
    clearance = spheres.clearances(path, ahead)  # (n, K)
    i, k = np.unravel_index(np.argmin(clearance), clearance.shape)
    return Encounter(float(clearance[i, k]), float(ahead[i]), int(k), float(clearance[0].min()))
