"""Node `replay`: publishes a bag's topics for one robot with their recorded timing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros import node as ros
from deqmpc_ros.messages import TYPES
from flight_log.bag import BagError
from flight_log.replay import DEFAULT_TOPICS, restamp, schedule, select


@dataclass(frozen=True)
class ReplaySettings:
    """What is replayed, and how."""

    bag: str = ros.parameter('', 'Bag folder or file')
    topics: list[str] = ros.parameter(list(DEFAULT_TOPICS), 'Names in the topic table, without the robot')
    rate: float = ros.parameter(1.0, 'Speed: 2 is twice as fast as recorded', 0.01, 100.0)
    restamp: bool = ros.parameter(True, 'Move header stamps to now, so that age checks of live nodes hold; '
                                        'false publishes the recorded bytes unchanged')
    subscribers: int = ros.parameter(1, 'Subscribers of odom (or of the first topic) to wait for', 0, 100)
    wait_s: float = ros.parameter(10.0, 'Longest wait for them (s); the replay then starts', 0.0, 600.0)
    source_robot: str = ros.parameter('', 'Robot in the bag; empty: the only one there')


class Replay(Node):
    """A thread that sleeps until the next message is due. `finished` after the last one."""

    def __init__(self):
        super().__init__('replay')
        self.robot = ros.robot_name(self)
        self.settings = ros.declare(self, ReplaySettings)
        where = self.get_fully_qualified_name()
        if not self.settings.bag:
            raise ros.SettingsError(f'{where}: parameter bag is empty; expected a bag folder or file')
        try:
            self.tracks = select(self.settings.bag, self.settings.topics, self.settings.source_robot)
        except BagError as error:
            raise ros.SettingsError(f'{where}: {error}') from error
        self.finished, self.exit_status = False, 1
        self.published, self.late_max = 0, 0.0
        self.diagnostics = ros.publisher(self, interface.DIAGNOSTICS, self.robot)
        self.outputs = {t.topic.name: ros.publisher(self, t.topic, self.robot) for t in self.tracks}
        self.stopping = threading.Event()
        ros.steady_timer(self, 1.0, self._report)
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def _play(self) -> None:
        try:
            self._wait_for_subscribers()
            start, start_ros = time.monotonic(), self.get_clock().now().nanoseconds
            for due, topic, log_time, data in schedule(self.settings.bag, self.tracks, self.settings.rate):
                late = time.monotonic() - start - due
                if (late < 0 and self.stopping.wait(-late)) or self.stopping.is_set():
                    break
                self.late_max = max(self.late_max, late)
                if self.settings.restamp:
                    data = restamp(data, topic.type, start_ros + round(due * 1e9) - log_time)
                self.outputs[topic.name].publish(data)
                self.published += 1
            self.get_logger().info(f'{self.published} messages replayed, at most '
                                   f'{1e3 * self.late_max:.1f} ms late')
            self.exit_status = 0
        except BagError as error:
            self.get_logger().error(str(error))
        finally:
            self.finished = True

    def _wait_for_subscribers(self) -> None:
        # A bag that starts before the graph has found itself would lose its first seconds.
        output = self.outputs.get(interface.ODOM.name, self.outputs[self.tracks[0].topic.name])
        deadline = time.monotonic() + self.settings.wait_s
        while output.get_subscription_count() < self.settings.subscribers and not self.stopping.wait(0.05):
            if time.monotonic() > deadline:
                self.get_logger().warning(
                    f'{output.get_subscription_count()} of {self.settings.subscribers} subscribers of '
                    f'{output.topic_name} after {self.settings.wait_s:g} s; starting all the same')
                return
        # A recorder's other subscriptions follow within a moment; a topic that nobody wants never does.
        deadline = min(deadline, time.monotonic() + 1.0)
        while any(o.get_subscription_count() == 0 for o in self.outputs.values()) and (
                time.monotonic() < deadline) and not self.stopping.wait(0.05):
            continue

    def _report(self) -> None:
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, ros.now(self), f'{self.robot}/replay', interface.OK, 'replaying', {
                'bag': self.settings.bag, 'messages': self.published, 'late_max_ms': 1e3 * self.late_max},
            self.robot))

    def close(self) -> None:
        """Stop the thread."""
        self.stopping.set()
        self.thread.join(2.0)


def main(argv: list[str] | None = None) -> int:
    """Run the node."""
    return ros.run(Replay, argv)
