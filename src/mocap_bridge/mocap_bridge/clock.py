"""The server's clock seen from the ROS clock.

Let o = (ROS time) - (server time) of one instant. Nothing arrives before it was sent, so

    a frame sent at server time s and received at ROS time r:               o <= r - s
    an echo asked at ROS time a, stamped by the server s, answered at r:    a - s <= o <= r - s

are hard bounds. `ClockMap` keeps their intersection [lower, upper] and widens it with the age of what
it knows by the largest drift of the two clocks:

    lower -= max_drift * dt,    upper += max_drift * dt

The estimate lies below `upper` by half the interval, but by no more than `least_delay`: frames bound o
from above a hundred times a second, while the lower bound is only as good as the server is quick to read
its command port, and a slow echo must not pass for a slow frame. While no echo was answered it lies
below `upper` by `least_delay`. An observation that leaves the
intersection empty, or moves a one-way estimate by more than `step`, is a suspect; `patience` suspects
in a row mean that a clock was set, and the map starts again from the newest.
(The least-delay principle: Moon, Skelly, Towsley, "Estimation and removal of clock skew from network
delay measurements", INFOCOM 1999; the echo interval is NTP's, RFC 5905.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ClockSettings:
    """How far two clocks and a network can be trusted."""

    max_drift: float = 2e-4  # s/s; two crystals differ by less than 1e-4, NTP slews by up to 5e-4 for a while
    step: float = 0.005  # s; a change of offset larger than this is a clock that was set, not a delay
    patience: int = 5  # suspects of one kind in a row before the map starts again
    least_delay: float = 5e-4  # s; no wired network delays its fastest frame by more than twice this
    late: float = 2.0  # s; one-way: all frames later than `step` for so long mean a clock that was set


class ClockMap:
    """Maps server time (s) to ROS time (s)."""

    def __init__(self, settings: ClockSettings | None = None):
        self.settings = settings or ClockSettings()
        self.steps = 0  # times that a clock was found to have been set
        self.echoes = 0  # echoes since the map (re)started
        self.reset()

    def reset(self) -> None:
        """Forget everything but the count of steps."""
        self.lower, self.upper = -math.inf, math.inf
        self._at: float | None = None  # server time at which the bounds hold
        self._tight = 0.0  # server time of the last frame within `step` of the upper bound
        self._suspects = {'frame': 0, 'echo': 0}
        self.echoes = 0

    @property
    def ready(self) -> bool:
        """True once a time can be mapped."""
        return self._at is not None

    @property
    def settled(self) -> bool:
        """True when echoes agree and there have been enough of them to find a short delay."""
        return self.echoes >= 8 and not any(self._suspects.values())

    @property
    def offset(self) -> float:
        """ROS time minus server time (s); NaN before the first observation."""
        if not self.ready:
            return math.nan
        return self.upper - min(0.5 * (self.upper - self.lower), self.settings.least_delay)

    @property
    def uncertainty(self) -> float:
        """Half the interval (s); inf while no echo was answered."""
        return 0.5 * (self.upper - self.lower) if self.ready else math.inf

    def age(self, server: float) -> float:
        """Seconds of the server's clock since the last observation; NaN before the first."""
        return server - self._at if self.ready else math.nan

    def to_ros(self, server: float) -> float:
        """Server time (s) -> ROS time (s). Call only when `ready`."""
        return server + self.offset

    def observe_frame(self, transmitted: float, received: float) -> None:
        """A frame sent at server time `transmitted`, received at ROS time `received` (s)."""
        self._observe('frame', -math.inf, received - transmitted, transmitted)

    def observe_echo(self, asked: float, server: float, answered: float) -> None:
        """An echo asked and answered at ROS times (s), stamped `server` (s) in between."""
        if answered < asked:
            return  # the ROS clock was set back during the exchange: nothing can be said
        self._observe('echo', asked - server, answered - server, server)

    def _observe(self, kind: str, lower: float, upper: float, server: float) -> None:
        if not self.ready:
            self._start(kind, lower, upper, server)
            return
        s = self.settings
        widen = s.max_drift * abs(server - self._at)
        low, high = max(self.lower - widen, lower), min(self.upper + widen, upper)
        one_way = math.isinf(self.lower)
        if low > high or (one_way and high < self.upper - s.step):
            self._suspects[kind] += 1
            if self._suspects[kind] >= s.patience:
                self.steps += 1
                self._start(kind, lower, upper, server)
            return
        if upper <= self.upper + widen + s.step:
            self._tight = server
        elif one_way and kind == 'frame' and server - self._tight > s.late:
            self.steps += 1
            self._start(kind, lower, upper, server)
            return
        self._suspects[kind] = 0
        self.echoes += kind == 'echo'
        self.lower, self.upper, self._at = low, high, server

    def _start(self, kind, lower, upper, server):
        self.reset()
        self.lower, self.upper, self._at, self._tight = lower, upper, server, server
        self.echoes = int(kind == 'echo')
