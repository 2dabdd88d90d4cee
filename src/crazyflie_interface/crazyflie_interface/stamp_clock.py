# SPDX-License-Identifier: GPL-3.0-or-later
"""Stamps of the ROS clock on the steady clock, across steps of the ROS clock.

Messages carry ROS time, which somebody may set (NTP, an operator); a flight measures ages and time-outs on a
clock that nobody can set. With r the ROS time and s the steady time of one instant,

    offset o = r - s,        a stamp r' was taken at steady time r' - o.

o follows a slow adjustment. A change of more than `step` between two observations is a clock that was set. For
SETTLES seconds after that, senders that have not noticed still stamp with the old clock: a stamp is then read
with the one of the two offsets that puts it nearer to the present.
"""

from __future__ import annotations

SETTLES = 1.0  # s in which every sender has found the new time (mocap_bridge.clock: five frames)


class StampClock:
    """Before the first `observe` both clocks count as the same, as in simulated time."""

    def __init__(self, step: float):
        self.step = step  # s, a larger change of the offset is a clock that was set
        self.steps = 0  # since the start
        self.last_step = 0.0  # s by which the clock was last set
        self._offset: float | None = None
        self._before: float | None = None  # the offset before the last step
        self._stepped = float('-inf')  # steady time of the last step

    def observe(self, ros: float, steady: float) -> float:
        """Both clocks (s), read at one instant. Returns by how much the ROS clock was set since the last
        observation; 0.0 when it was not."""
        offset, old = ros - steady, self._offset
        self._offset = offset
        if old is None or abs(offset - old) <= self.step:
            return 0.0
        self._before, self._stepped = old, steady
        self.steps, self.last_step = self.steps + 1, offset - old
        return self.last_step

    def settling(self, steady: float) -> bool:
        """True shortly after a step, while stamps of both clocks arrive."""
        return steady - self._stepped < SETTLES

    def steady(self, stamp: float, now: float) -> float:
        """The steady time (s) of the ROS time `stamp` (s) that arrived at steady time `now` (s)."""
        taken = stamp - (self._offset or 0.0)
        if self.settling(now):
            return min(taken, stamp - self._before, key=lambda t: abs(now - t))
        return taken
