"""Node `recorder`: writes every topic of the table for one robot to a bag, as the bytes arrive.

Nothing is decoded, so that six topics at 100 Hz cost a few per cent of a core. Log times are the
node's ROS clock on arrival.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros import node as ros
from deqmpc_ros.messages import TYPES
from flight_log.bag import FLUSH_SECONDS, BagError, BagWriter

# The table's depths suit nodes that want the newest message. A recorder wants all of them, also when
# the disk takes a second.
QUEUE = 500
LOW_DISK = 1_000_000_000  # bytes


@dataclass(frozen=True)
class RecorderSettings:
    """What is recorded, and where to."""

    bag_path: str = ros.parameter('', 'Folder of the bag; must not exist. Empty: runs/<date>_<robot>')
    metadata: list[str] = ros.parameter([], 'Kept with the bag: "key=value", such as seed=3, policy=mpc_only')
    neighbours: list[str] = ros.parameter([], 'Other robots whose odometry is recorded too: the policy hears it')


def read_metadata(where: str, entries: list[str]) -> dict[str, str]:
    """['seed=3'] -> {'seed': '3'}. SettingsError on an entry without '='."""
    pairs = [e.partition('=') for e in entries if e]
    for key, separator, _ in pairs:
        if not separator or not key:
            raise ros.SettingsError(f'{where}: parameter metadata has entry {key!r}; expected "key=value"')
    return {key.strip(): value.strip() for key, _, value in pairs}


class Recorder(Node):
    """Raw subscriptions into a `BagWriter`."""

    def __init__(self):
        super().__init__('recorder')
        self.robot = ros.robot_name(self)
        settings = ros.declare(self, RecorderSettings)
        path = settings.bag_path or str(Path('runs') / f'{time.strftime("%Y%m%d-%H%M%S")}_{self.robot}')
        where = self.get_fully_qualified_name()
        metadata = {'robot': self.robot, **read_metadata(where, settings.metadata)}
        try:
            self.writer = BagWriter(path, metadata)
        except BagError as error:
            raise ros.SettingsError(f'{where}: parameter bag_path: {error}') from error
        self.finished, self.exit_status = False, 0
        self._flight = ros.FlightWatch(self, self.robot)
        self.failure = ''
        self.diagnostics = ros.publisher(self, interface.DIAGNOSTICS, self.robot)
        self.subscribers = [*(self._subscribe(topic, self.robot) for topic in interface.RECORDED),
                            *(self._subscribe(interface.ODOM, name) for name in settings.neighbours)]
        ros.steady_timer(self, FLUSH_SECONDS, self._flush)
        ros.steady_timer(self, 1.0, self._report)
        self.get_logger().info(f'recording {len(self.subscribers)} topics of {self.robot} to {path}')

    def _subscribe(self, topic: interface.Topic, robot: str):
        name = topic.resolve(robot)

        def record(data: bytes) -> None:
            if not self.failure:
                try:
                    self.writer.write(name, topic.type, self.get_clock().now().nanoseconds, data, topic)
                except OSError as error:
                    self._fail(error)
        return ros.subscription(self, dataclasses.replace(topic, depth=QUEUE), robot, record, raw=True)

    def _fail(self, error: OSError) -> None:
        # A full disk must not stop a flight: say so, go on spinning, and end with status 1.
        self.failure, self.exit_status = f'recording stopped: {error.strerror or error}', 1
        self.get_logger().error(self.failure)

    def _flush(self) -> None:
        if not self.failure:
            try:
                self.writer.flush()
            except OSError as error:
                self._fail(error)

    def _report(self) -> None:
        free = shutil.disk_usage(self.writer.path).free
        level = interface.ERROR if self.failure else interface.WARN if free < LOW_DISK else interface.OK
        message = self.failure or ('disk nearly full' if free < LOW_DISK else 'recording')
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, ros.now(self), f'{self.robot}/recorder', level, message, {
                'bag': str(self.writer.path), 'messages': self.writer.messages,
                'topics': len(self.writer.topics), 'bytes': self.writer.bytes_written,
                'disk_free_bytes': free}, self.robot))

    def may_stop(self) -> bool:
        """A landing that a stop has brought about is recorded to its end."""
        return not self._flight.in_air()

    def close(self) -> None:
        """Finish the bag, so that any reader takes it."""
        try:
            self.writer.close()
        except OSError as error:
            self._fail(error)
            return
        self.get_logger().info(f'{self.writer.messages} messages on {len(self.writer.topics)} topics '
                               f'in {self.writer.path}')


def main(argv: list[str] | None = None) -> int:
    """Run the node."""
    return ros.run(Recorder, argv)
