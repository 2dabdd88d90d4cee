"""One policy in closed loop, without ROS: newest state and obstacles in, a judged plan out each tick."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqmpc.neighbours import Neighbours
from deqmpc.policies.base import Policy
from deqmpc.types import Obstacles, Plan, RigidBodyState
from deqmpc_controller.plan_gate import ACCEPTED, GateSettings, judge

OVERTAKEN = 1.0  # s; no message is overtaken by another that was sent so much later


@dataclass(frozen=True)
class LoopSettings:
    """When a tick may plan."""

    period: float = 0.1  # s between ticks
    max_state_age: float = 0.1  # s, older odometry gives no plan
    max_obstacle_age: float = 0.5  # s, for moving spheres and neighbours only


@dataclass(frozen=True)
class Tick:
    """What one tick gave."""

    number: int  # count of ticks since start, from 1
    plan: Plan | None  # None when there is nothing to fly
    gate: str  # ACCEPTED or the reason why there is no plan
    status: str  # the policy's own status in words
    solve_time: float  # s in the policy call; 0 when it was not called
    iterations: int
    residual: float
    misses: int  # ticks since start that came too late or not at all
    due: float  # s, when the tick should have come, on the clock of `now`

    def values(self, policy: str, published: float, latency: float) -> dict[str, Any]:
        """The tick under the keys of deqmpc.interface.POLICY_KEYS; `published`: when its plan had gone out
        (s, clock of `due`); `latency` in s."""
        return {'policy': policy, 'tick': self.number, 'status': self.status, 'gate': self.gate,
                'solve_ms': 1e3 * self.solve_time, 'tick_ms': 1e3 * (published - self.due),
                'latency_ms': 1e3 * latency,
                'iterations': self.iterations, 'residual': float(self.residual),
                'deadline_misses': self.misses}


class PolicyLoop:
    """Holds the newest inputs and the warm start; `tick(now)` runs the policy once.

    The warm start is dropped whenever a plan was refused or a tick had no plan: what led to a bad plan
    must not seed the next one.
    """

    def __init__(self, policy: Policy, settings: LoopSettings = LoopSettings(),
                 gate: GateSettings = GateSettings(), clock: Callable[[], float] = time.perf_counter,
                 neighbours: Neighbours | None = None):
        self.policy = policy
        self.neighbours = neighbours or Neighbours(())  # whoever hears their odometry gives it to them
        self._settings = settings
        self._gate = gate
        self._clock = clock
        self._state: RigidBodyState | None = None
        self._obstacles: Obstacles | None = None
        self._warm_start: Any = None
        self._number = 0
        self._misses = 0
        self._last_tick: float | None = None
        self._due = -float('inf')

    def on_odometry(self, state: RigidBodyState) -> None:
        """Newest state; one that was overtaken on its way is ignored. A stamp further back than OVERTAKEN is that of
        a clock that was set."""
        if self._state is None or not 0.0 < self._state.stamp - state.stamp < OVERTAKEN:
            self._state = state

    def on_obstacles(self, obstacles: Obstacles) -> None:
        """Newest field of spheres."""
        self._obstacles = obstacles

    @property
    def obstacles(self) -> Obstacles | None:
        """The field held, to take velocities from."""
        return self._obstacles

    @property
    def state(self) -> RigidBodyState | None:
        """The state held."""
        return self._state

    def warm_up(self) -> float:
        """Run the policy twice on a hovering state, so that the first tick in flight is no slower than
        the others. Returns the second call's time (s)."""
        state = RigidBodyState(0.0, np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0, 1.0]), np.zeros(3),
                               np.zeros(3))
        spheres = Obstacles(0.0, np.tile([[9.0, 9.0, 9.0]], (40, 1)), np.full(40, 0.1), np.zeros((40, 3)))
        warm_start = None
        for _ in range(2):
            begin = self._clock()
            _, warm_start, _ = self.policy.plan(state, spheres, warm_start)
        return self._clock() - begin

    def tick(self, now: float) -> Tick:
        """Plan once. `now` in s of the clock that stamps the odometry."""
        self._number += 1
        if self._last_tick is not None:
            # A tick half a period late is counted where its predecessor's plan went stale.
            self._misses += max(0, round((now - self._last_tick) / self._settings.period) - 1)
        self._last_tick = now
        # The schedule is the earliest that ticks have kept; after a missed one it starts anew.
        due = self._due if 0.0 <= now - self._due <= self._settings.period else now
        self._due = due + self._settings.period
        reason = self._not_ready(now)
        if reason:
            self._warm_start = None
            return Tick(self._number, None, reason, 'not run', 0.0, 0, float('nan'), self._misses, due)
        shown = self.neighbours.join(self._obstacles, now, seen_from=self._state.position)
        begin = self._clock()
        plan, warm_start, status = self.policy.plan(self._state, shown, self._warm_start)
        solve_time = self._clock() - begin
        if solve_time > self._settings.period:
            self._misses += 1
        gate = (status.message if plan is None else
                judge(plan, status, self._state, self.neighbours.join(self._obstacles, now), self._gate))
        accepted = gate == ACCEPTED
        self._warm_start = warm_start if accepted else None
        return Tick(self._number, plan if accepted else None, gate, status.message, solve_time,
                    status.iterations, status.residual, self._misses, due)

    def _not_ready(self, now):
        s = self._settings
        if self._state is None:
            return 'no odometry yet'
        if self._obstacles is None:
            return 'no obstacles yet (an empty field must be published too)'
        if not self._state.is_finite():
            return 'odometry has a number that is not finite'
        age = now - self._state.stamp
        if age > s.max_state_age:
            return f'odometry is {age:.2f} s old, limit {s.max_state_age:g} s'
        if age < -s.max_state_age:
            return f'odometry is stamped {-age:.2f} s ahead, limit {s.max_state_age:g} s: was a clock set?'
        if self._obstacles.velocity.any() and now - self._obstacles.stamp > s.max_obstacle_age:
            return (f'moving obstacles are {now - self._obstacles.stamp:.2f} s old, '
                    f'limit {s.max_obstacle_age:g} s')
        return self.neighbours.fault(now, s.max_obstacle_age)
