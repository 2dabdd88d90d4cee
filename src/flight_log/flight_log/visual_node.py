"""Node `visual`: what RViz and Foxglove need to draw a flight, from the topics that fly it.

| in | out |
|---|---|
| plan (MultiDOFJointTrajectory) | plan_path (Path), as plans come |
| pose | flown_path (Path): where the drone was, from arming on |
| status | flight_markers (MarkerArray): phase and guard in words above the drone |

Nobody flies by these topics: the node may be started, stopped and killed in flight (composition: optional).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros import node as ros
from deqmpc_ros.messages import TYPES

PERIOD = 0.2  # s between two flown paths and texts
SILENCE = 1.0  # s without a status, after which the text says so
TEXT_ABOVE = 0.2  # m from the drone to the text
COLORS = {interface.OK: (0.2, 0.8, 0.2, 1.0), interface.WARN: (1.0, 0.7, 0.0, 1.0),
          interface.ERROR: (1.0, 0.2, 0.2, 1.0), interface.STALE: (0.6, 0.6, 0.6, 1.0)}


@dataclass(frozen=True)
class VisualSettings:
    """How much of the flight is drawn."""

    trail_duration: float = ros.parameter(30.0, 'length of the flown path (s)', 1.0, 600.0)
    trail_period: float = ros.parameter(0.1, 'time between two points of the flown path (s)', 0.01, 10.0)


class Trail:
    """The newest `duration` s of timed items, one every `period` s."""

    def __init__(self, duration: float, period: float):
        self.period = period
        self._items: deque[Any] = deque(maxlen=max(2, round(duration / period)))
        self._due = -math.inf

    def offer(self, stamp: float, item: Any) -> None:
        """Keep `item` if one is due at `stamp` (s). A stamp that steps back starts the trail anew."""
        if stamp < self._due - 2.0 * self.period:
            self.clear()
        if stamp >= self._due:
            self._due = stamp + self.period
            self._items.append(item)

    def clear(self) -> None:
        """Forget all items."""
        self._items.clear()
        self._due = -math.inf

    def items(self) -> list[Any]:
        """Oldest first."""
        return list(self._items)


def describe(robot: str, flight: interface.Diagnostic | None, age: float) -> tuple[str, tuple[float, ...]]:
    """Text and colour (rgba) of the flight's last status, `age` s old."""
    if flight is None:
        return f'{robot}: no status yet', COLORS[interface.STALE]
    if age > SILENCE:
        return f'{robot}: no status for {age:.0f} s', COLORS[interface.ERROR]
    values = flight.values
    text = f"{robot}: {values.get('phase', '?')} ({values.get('guard', '?')})"
    reason = values.get('reason', '')
    return text + (f'\n{reason}' if reason else ''), COLORS.get(flight.level, COLORS[interface.STALE])


class Visual(Node):
    """Three subscriptions, three publishers, one timer."""

    def __init__(self, **node_options):
        super().__init__('visual', **node_options)
        self.robot = ros.robot_name(self)
        settings = ros.declare(self, VisualSettings)
        self.trail = Trail(settings.trail_duration, settings.trail_period)
        self.position: np.ndarray | None = None
        self.flight: interface.Diagnostic | None = None
        self.heard = -math.inf  # s, arrival of the last status
        self.plans, self.unreadable = 0, ''
        self.outputs = {t.name: ros.publisher(self, t, self.robot) for t in interface.VISUAL}
        self.diagnostics = ros.publisher(self, interface.DIAGNOSTICS, self.robot)
        self.subscribers = [ros.subscription(self, topic, self.robot, callback) for topic, callback in (
            (interface.PLAN, self._on_plan), (interface.POSE, self._on_pose), (interface.STATUS, self._on_status))]
        ros.steady_timer(self, PERIOD, self._draw)
        ros.steady_timer(self, 1.0, self._report)

    def _publish(self, topic: interface.Topic, message) -> None:
        self.outputs[topic.name].publish(message)

    def _on_plan(self, msg) -> None:
        try:
            plan = interface.read_plan(msg)
        except ValueError as error:
            self.unreadable = str(error)
            return
        self.plans, self.unreadable = self.plans + 1, ''
        self._publish(interface.PLAN_PATH, interface.plan_path_message(TYPES, plan))

    def _on_pose(self, msg) -> None:
        stamp, position, _ = interface.read_pose(msg)
        if np.isfinite(position).all():
            self.position = position
            self.trail.offer(stamp, msg)

    def _on_status(self, msg) -> None:
        for status in interface.read_diagnostics(msg):
            if status.name != f'{self.robot}/flight':
                continue
            was = self.flight.values.get('phase') if self.flight else None
            if was == 'disarmed' and status.values.get('phase') == 'armed':
                self.trail.clear()
            self.flight, self.heard = status, ros.now(self)

    def _draw(self) -> None:
        if self.position is None:
            return
        now = ros.now(self)
        self._publish(interface.FLOWN_PATH, interface.path_message(TYPES, now, self.trail.items()))
        text, color = describe(self.robot, self.flight, now - self.heard)
        above = self.position + (0.0, 0.0, TEXT_ABOVE)
        self._publish(interface.FLIGHT_MARKERS, interface.text_message(TYPES, now, above, text, color))

    def _report(self) -> None:
        level = interface.WARN if self.unreadable else interface.OK
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, ros.now(self), f'{self.robot}/visual', level, self.unreadable or 'drawing', {
                'plans': self.plans, 'trail_points': len(self.trail.items())}, self.robot))


def main(argv: list[str] | None = None) -> int:
    """Run the node."""
    return ros.run(Visual, argv)
