"""Node `mocap_bridge`: one rigid body of a NatNet server -> /<robot>/pose, /<robot>/odom, /diagnostics.

A thread of its own blocks on the sockets and publishes each frame as it comes, so that a frame waits for
no executor; the executor only runs the 1 Hz report.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, fields

from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros.messages import TYPES
from deqmpc_ros.node import (
    FlightWatch,
    SettingsError,
    declare,
    now,
    parameter,
    publisher,
    robot_name,
    run,
    steady_timer,
)
from mocap_bridge.bridge import UP_AXES, Bridge, HealthSettings
from mocap_bridge.client import NatNetClient
from mocap_bridge.odometry import OdometrySettings
from mocap_bridge.session import TRANSPORTS, ClientSettings, MocapError

_POLL = 0.1  # s, longest wait for a datagram; bounds the time to stop
_REMIND = 5.0  # s between two messages that the node still waits


@dataclass(frozen=True)
class Settings:
    """Parameters of the node."""

    server_address: str = parameter('127.0.0.1', 'address of the NatNet server (Motive)')
    local_address: str = parameter('', 'address of the interface to the server; empty: the system chooses')
    command_port: int = parameter(1510, 'command port of the server', 1, 65535)
    data_port: int = parameter(0, 'multicast data port; 0: as the server announces', 0, 65535)
    multicast_group: str = parameter('', 'multicast group; empty: as the server announces')
    transport: str = parameter('auto', 'how frames come', choices=TRANSPORTS)
    client: str = parameter('native', 'who reads packets: native or natnet')
    silence: float = parameter(1.0, 's without frames before connecting again', 0.1, 60.0)
    connect_timeout: float = parameter(0.0, 's to wait for the first frame; 0: for ever', 0.0, 3600.0)

    body_name: str = parameter('', 'rigid body to follow; empty: the robot\'s name')
    up_axis: str = parameter('auto', 'up axis that the server streams; auto: as it says', choices=UP_AXES)

    rate_low: float = parameter(80.0, 'Hz of poses, below: warning', 0.0, 1000.0)
    rate_high: float = parameter(120.0, 'Hz of poses, above: warning', 0.0, 1000.0)
    latency: float = parameter(0.010, 's from exposure to publication, above: warning', 0.0, 1.0)
    stale: float = parameter(0.25, 's without a pose, above: error', 0.01, 10.0)

    max_speed: float = parameter(4.0, 'm/s, faster motion between samples is a jump', 0.1, 100.0)
    max_acceleration: float = parameter(30.0, 'm/s^2, more between samples is a jump', 0.1, 1000.0)
    position_margin: float = parameter(0.03, 'm added to both: noise, stamp jitter times speed', 0.001, 10.0)
    max_rate: float = parameter(20.0, 'rad/s, faster turning between samples is a jump', 0.1, 200.0)
    angle_margin: float = parameter(0.35, 'rad added to it', 0.01, 3.2)
    reaccept: int = parameter(10, 'consistent samples that make a jump the truth', 1, 1000)
    frozen: int = parameter(10, 'identical poses from which on they are refused; 0: never', 0, 1000)
    gap: float = parameter(0.05, 's between poses that count as a gap', 0.001, 10.0)
    restart: float = parameter(0.5, 's without a pose after which the filter starts from nothing', 0.01, 10.0)
    settle: int = parameter(3, 'samples after a start before odometry is published', 1, 100)
    position_noise: float = parameter(3e-4, 'm, standard deviation of a position', 1e-6, 0.1)
    angle_noise: float = parameter(3e-3, 'rad, standard deviation of an attitude', 1e-6, 1.0)
    jerk: float = parameter(15.0, 'm/s^3/sqrt(Hz), density of the white jerk', 0.1, 1e4)
    angular_jerk: float = parameter(150.0, 'rad/s^3/sqrt(Hz), density of the white angular jerk', 0.1, 1e5)
    huber: float = parameter(3.0, 'standard deviations beyond which a sample loses weight', 1.0, 100.0)

    priority: int = parameter(22, 'real-time priority (SCHED_FIFO) where the system permits it; 0: none', 0, 99)

    def part(self, kind: type):
        """The dataclass `kind` filled with the parameters of the same names."""
        mine = {f.name for f in fields(self)}
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind) if f.name in mine})


class MocapBridge(Node):
    """Publishes one rigid body. Ends with `exit_status` 2 when the mocap system cannot be used as asked."""

    def __init__(self):
        super().__init__('mocap_bridge')
        self.finished, self.exit_status = False, 0
        self.robot = robot_name(self)
        self.settings = declare(self, Settings)
        self.priority = self.settings.priority  # read by run()
        body = self.settings.body_name or self.robot
        try:
            self._bridge = Bridge(body, self.settings.up_axis, self.settings.part(OdometrySettings),
                                  self.settings.part(HealthSettings), now(self))
            self._client = NatNetClient(self.settings.part(ClientSettings), lambda: now(self))
        except MocapError as error:
            raise SettingsError(f'{self.get_fully_qualified_name()}: {error}') from error
        self._pose = publisher(self, interface.POSE, self.robot)
        self._odom = publisher(self, interface.ODOM, self.robot)
        self._diagnostics = publisher(self, interface.DIAGNOSTICS, self.robot)
        self._flight = FlightWatch(self, self.robot)
        self._lock = threading.Lock()  # between the receiving thread and the report
        self._stop = threading.Event()
        steady_timer(self, 1.0, self._report)
        self._thread = threading.Thread(target=self._receive, name='natnet', daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            started = reminded = time.monotonic()
            while not self._stop.is_set():
                frames = self._client.poll(_POLL)
                with self._lock:
                    samples = [s for f in frames if (s := self._bridge.frame(f)) is not None]
                for sample in samples:
                    self._publish(sample)
                if not self._bridge.seen:
                    reminded = self._wait(started, reminded)
        except MocapError as error:
            self._fail(str(error), 2)
        except Exception:
            traceback.print_exc()
            self._fail('the receiving thread stopped', 1)

    def _publish(self, sample) -> None:
        self._pose.publish(interface.pose_message(TYPES, sample.stamp, sample.position, sample.quaternion))
        if sample.state is not None:
            self._odom.publish(interface.odometry_message(TYPES, sample.state, self.robot))
        with self._lock:
            self._bridge.published(sample, now(self))

    def _wait(self, started: float, reminded: float) -> float:
        """Before the first sight of the body: refuse an unknown one, give up after connect_timeout, else
        say every few seconds what is missing. Returns when that was said last (monotonic s)."""
        session, s, t = self._client.session, self.settings, time.monotonic()
        session.require(self._bridge.body)
        self._bridge.check_axes(session)
        server = f'{s.server_address}:{s.command_port}'
        what = (f'no answer from a NatNet server at {server}' if not session.connected else
                f'no model definitions from {server}' if session.models is None else
                f'no frames from {server}' if session.counters.frames == 0 else
                f'rigid body {self._bridge.body!r} is known to {server} but not tracked')
        if session.counters.last_fault:
            what += f' (last fault: {session.counters.last_fault})'
        if session.counters.foreign:
            what += f' ({session.counters.foreign} datagrams came from other addresses)'
        if 0.0 < s.connect_timeout < t - started:
            raise MocapError(f'{what} within connect_timeout = {s.connect_timeout:g} s')
        if t - reminded > _REMIND:
            self.get_logger().warning(f'waiting: {what}')
            return t
        return reminded

    def _fail(self, message: str, status: int) -> None:
        print(f'error: {self.get_fully_qualified_name()}: {message}', file=sys.stderr, flush=True)
        self.exit_status, self.finished = status, True

    def _report(self) -> None:
        stamp = now(self)
        with self._lock:
            level, message, values = self._bridge.report(self._client.session, stamp)
        self._diagnostics.publish(interface.diagnostics_message(
            TYPES, stamp, f'{self.robot}/mocap', level, message, values, self.settings.server_address))

    def may_stop(self) -> bool:
        """A drone that lands because all was asked to stop still needs its pose."""
        return not self._flight.in_air()

    def close(self) -> None:
        """Stop receiving; called by run() while ROS is still up."""
        self._stop.set()
        self._thread.join()
        self._client.close()


def main(argv: list[str] | None = None) -> int:
    """Console script."""
    return run(MocapBridge, argv)


if __name__ == '__main__':
    sys.exit(main())
