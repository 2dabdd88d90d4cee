"""Node `view`: a running graph into a rerun scene (flight_log.viewing). It only listens.

| in | |
|---|---|
| of each robot: pose, odom, plan, setpoint, status | of the robots named, or of every robot that the graph shows |
| /obstacles, /diagnostics | |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros import node as ros
from flight_log.viewing import OF_ALL, OF_ROBOT, Scene, robots_in

PERIOD = 0.25  # s between two looks at who has fallen silent
SEARCH = 1.0  # s between two looks for robots
LONELY = 5.0  # s without any robot, after which the operator is told


class LiveView(Node):
    """Subscriptions into a scene.

    robots: those to show; when empty, every robot that appears. closed: True when nobody looks any more.
    """

    def __init__(self, scene: Scene, robots: Collection[str], closed: Callable[[], bool], **node_options):
        super().__init__('view', **node_options)
        self.scene, self._closed = scene, closed
        self._started = ros.now(self)
        self.subscribers = [self._listen(topic, '') for topic in OF_ALL]
        for robot in robots:
            self._add(robot)
        ros.steady_timer(self, PERIOD, self._advance)
        if not robots:
            self._search = ros.steady_timer(self, SEARCH, self._find)

    @property
    def finished(self) -> bool:
        """True when the viewer was closed."""
        return self._closed()

    def _add(self, robot: str) -> None:
        self.scene.add(robot)
        self.subscribers += [self._listen(topic, robot) for topic in OF_ROBOT]
        self.get_logger().info(f'showing {robot}')

    def _listen(self, topic: interface.Topic, robot: str):
        return ros.subscription(self, topic, robot, functools.partial(self._show, topic, robot))

    def _show(self, topic: interface.Topic, robot: str, message) -> None:
        now = ros.now(self)
        if self.scene.due(topic, robot, now):
            self.scene.show(topic, robot, message, now)

    def _advance(self) -> None:
        if self.scene.started:
            self.scene.advance(ros.now(self))

    def _find(self) -> None:
        for robot in robots_in(name for name, _ in self.get_topic_names_and_types()):
            if robot not in self.scene.robots:
                self._add(robot)
        if not self.scene.robots and ros.now(self) - self._started > LONELY:
            self.get_logger().warning(
                'no robot heard yet: is a graph running, with the same ROS_DOMAIN_ID and DEQMPC_NETWORK?', once=True)
