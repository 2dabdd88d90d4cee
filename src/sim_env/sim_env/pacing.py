"""Simulated time against a monotonic clock."""

from __future__ import annotations


class Pacer:
    """Says how many steps are due, so that simulated time keeps `factor` x real time.

    After a hold-up it catches up at most `max_steps` a call; a lag beyond `max_lag` s is given up, so
    that the simulation goes on late rather than racing. `slips` counts how often, `slipped` is the sum
    (s of simulated time), `lag` the part still to be caught up.
    """

    def __init__(self, now: float, factor: float = 1.0, step: float = 1e-3, max_steps: int = 10,
                 max_lag: float = 0.1):
        self.factor, self.step, self.max_steps, self.max_lag = factor, step, max_steps, max_lag
        self.slips, self.slipped, self.lag = 0, 0.0, 0.0
        self._origin = now  # clock at simulated time 0, moved by slips
        self._done = 0

    def due(self, now: float) -> int:
        """Steps to make now; they count as made."""
        behind = (now - self._origin) * self.factor - self._done * self.step
        steps = max(0, min(int(behind / self.step + 1e-6), self.max_steps))
        self._done += steps
        self.lag = max(0.0, behind - steps * self.step)
        if self.lag > self.max_lag:
            self.slips += 1
            self.slipped += self.lag
            self._origin += self.lag / self.factor
            self.lag = 0.0
        return steps

    def clock(self, simulated: float) -> float:
        """The clock's time at which simulated time `simulated` (s) is due."""
        return self._origin + simulated / self.factor
