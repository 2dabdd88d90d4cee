"""The plan gate: judges one plan while the policy lives (its absence is the setpoint guard's matter).

A plan passes when it is finite, starts where the drone is, converged to a small residual, stays inside
the fence and the speed limit, and keeps its distance from every sphere at `samples` instants between
consecutive knots. A plan that starts inside that distance passes as long as it leads out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deqmpc.policies.base import PolicyStatus
from deqmpc.types import Obstacles, Plan, RigidBodyState

ACCEPTED = 'accepted'


@dataclass(frozen=True)
class GateSettings:
    """Limits of a plan that may be flown."""

    max_residual: float = 0.02  # largest constraint violation (m, m/s, ...: the solver's units)
    fence_low: tuple[float, float, float] = (-2.5, -2.5, 0.0)  # m, world
    fence_high: tuple[float, float, float] = (2.5, 2.5, 2.5)  # m, world
    max_speed: float = 2.0  # m/s
    max_start_error: float = 0.10  # m between the plan's first point and the state it was made from
    min_clearance: float = 0.0  # m from a sphere's surface
    samples: int = 4  # instants checked from one knot to the next, the knot included


def judge(plan: Plan, status: PolicyStatus, state: RigidBodyState, obstacles: Obstacles,
          settings: GateSettings = GateSettings()) -> str:
    """`ACCEPTED`, or the first reason in words why this plan must not be flown."""
    if not plan.is_finite():
        return 'plan has a number that is not finite'
    if not status.residual <= settings.max_residual:
        return f'residual {status.residual:.3g} above {settings.max_residual:g} ({status.message})'
    start_error = float(np.linalg.norm(plan.position[0] - state.position))
    if start_error > settings.max_start_error:
        return f'plan starts {start_error:.2f} m from the drone, limit {settings.max_start_error:g} m'
    outside = np.maximum(np.array(settings.fence_low) - plan.position,
                         plan.position - np.array(settings.fence_high))[1:]
    # Outside is allowed only on the way in: no knot farther out than the drone is now.
    now_outside = max(0.0, float(np.max(np.maximum(np.array(settings.fence_low) - state.position,
                                                   state.position - np.array(settings.fence_high)))))
    if len(outside) and float(outside.max()) > now_outside + 1e-6:
        return f'plan leaves the fence by {float(outside.max()):.2f} m'
    speed = float(np.linalg.norm(plan.velocity[1:], axis=1).max(initial=0.0))
    if speed > max(settings.max_speed, float(np.linalg.norm(state.velocity))):
        return f'plan reaches {speed:.2f} m/s, limit {settings.max_speed:g} m/s'
    return _judge_clearance(plan, obstacles, settings)


def _judge_clearance(plan, obstacles, settings):
    if len(obstacles.radius) == 0:
        return ACCEPTED
    s = np.arange(1, settings.samples + 1) / settings.samples
    h = np.diff(plan.time_from_start)[:, None, None]  # (T, 1, 1)
    s = s[None, :, None]
    p0, p1 = plan.position[:-1, None], plan.position[1:, None]
    v0, v1 = plan.velocity[:-1, None], plan.velocity[1:, None]
    # Cubic Hermite between knots, as the setpoints will be interpolated.
    path = ((2 * s**3 - 3 * s**2 + 1) * p0 + (s**3 - 2 * s**2 + s) * h * v0
            + (3 * s**2 - 2 * s**3) * p1 + (s**3 - s**2) * h * v1).reshape(-1, 3)  # (T * samples, 3)
    t = (plan.time_from_start[:-1, None] + s[0, :, 0] * np.diff(plan.time_from_start)[:, None]).reshape(-1)
    clearance = obstacles.clearances(path, plan.stamp + t - obstacles.stamp)  # (n, K)
    worst, k = np.unravel_index(np.argmin(clearance), clearance.shape)
    start, _ = obstacles.at(plan.stamp).clearance(plan.position[0])
    if clearance[worst, k] < min(settings.min_clearance, start - 1e-3):
        return (f'plan passes sphere {k} at {clearance[worst, k]:.3f} m from its surface '
                f'in {t[worst]:.2f} s, limit {settings.min_clearance:g} m')
    return ACCEPTED
