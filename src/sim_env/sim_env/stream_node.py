"""Node `stream`: a NatNet server that plays a recorded CSV file or bag with its real time stamps."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from rclpy.node import Node

from deqmpc import interface
from deqmpc_ros.messages import TYPES
from deqmpc_ros.node import SettingsError, declare, now, parameter, publisher, robot_name, run, steady_timer
from sim_env.natnet_packets import VERSIONS, Body
from sim_env.natnet_server import NatNetServer, NatNetSettings
from sim_env.player import Player
from sim_env.recordings import Recording, RecordingError, read_recording

_LOOP = 0.002  # s; the largest delay that playing adds
_TAIL = 0.5  # s after the last frame, in which the graph takes it in


@dataclass(frozen=True)
class Settings:
    """Parameters of the node."""

    file: str = parameter('', 'recording: CSV (t, x y z or px py pz, qx qy qz qw), .mcap, .db3 or bag folder')
    start: float = parameter(0.0, 'begin this much after the first pose (s)', 0.0, 1e6)
    duration: float = parameter(0.0, 'play this much (s); 0 = to the end', 0.0, 1e6)
    rate: float = parameter(1.0, 'recorded seconds a second', 0.01, 100.0)
    loop: bool = parameter(False, 'begin again at the end, until stopped')
    body: str = parameter('', "name of the rigid body; empty: the robot's name")
    wait_for_client: bool = parameter(True, 'begin when the first NatNet client has come')
    delay: float = parameter(1.0, 'begin this much later, when the other nodes are there, too (s)', 0.0, 60.0)
    wait_for_policy: bool = parameter(False, 'begin when the robot has a publisher of plans')
    client_timeout: float = parameter(60.0, 'give up when one of these has not come after this (s)', 0.1, 3600.0)
    natnet_address: str = parameter('127.0.0.1', 'interface of the NatNet server')
    natnet_command_port: int = parameter(1510, 'NatNet command port', 0, 65535)
    natnet_data_port: int = parameter(1511, 'NatNet data port (multicast)', 0, 65535)
    natnet_version: str = parameter('4.1', 'NatNet version', choices=tuple(f'{a}.{b}' for a, b in VERSIONS))
    natnet_multicast: bool = parameter(False, 'stream to the multicast group instead of to each client')
    natnet_y_up: bool = parameter(False, "stream in Motive's y-up axes; the recording is z-up")


def load(s: Settings, robot: str) -> Recording:
    """The part of the recording that `s` asks for. SettingsError names the file and what is wrong."""
    if not s.file:
        raise SettingsError("stream: file = ''; expected a recorded CSV file or bag")
    try:
        return read_recording(s.file, robot).cut(s.start, s.duration)
    except RecordingError as error:
        raise SettingsError(f'stream: {error}') from None


def make_player(s: Settings, robot: str, say, warn) -> Player:
    """The player that `s` asks for. SettingsError says what cannot be."""
    recording = load(s, robot)
    body = s.body or robot
    for note in recording.notes:
        warn(f'{recording.name}: {note}')
    mean_rate = s.rate * (len(recording.time) - 1) / recording.duration
    try:
        server = NatNetServer([Body(body, 1)], NatNetSettings(
            address=s.natnet_address, command_port=s.natnet_command_port, data_port=s.natnet_data_port,
            version=tuple(int(n) for n in s.natnet_version.split('.')), multicast=s.natnet_multicast,
            y_up=s.natnet_y_up, frame_rate=mean_rate), warn)
    except (OSError, ValueError) as error:
        raise SettingsError(error.strerror if isinstance(error, OSError) else str(error)) from None
    return Player(recording, server, body, s.rate, s.loop, s.wait_for_client, s.delay, say)


class StreamNode(Node):
    """Plays in a timer; ends with status 0 after the last frame, 1 when no client came."""

    def __init__(self):
        super().__init__('stream')
        self.robot = robot_name(self)
        self.settings = declare(self, Settings)
        log = self.get_logger()
        self.player = make_player(self.settings, self.robot, lambda text: log.info(text),
                                  lambda text: log.warning(text))
        self.diagnostics = publisher(self, interface.DIAGNOSTICS, self.robot)
        self.finished, self.exit_status = False, 0
        self._begin, self._end = time.monotonic(), None
        steady_timer(self, _LOOP, self._advance)
        steady_timer(self, 1.0, self._report)
        address = self.player.server.address
        log.info(f'{self.settings.file} as {self.player.body} at NatNet {address[0]}:{address[1]}')

    def _advance(self):
        clock = time.monotonic()
        player = self.player
        if player.started is None and self.settings.wait_for_policy:
            player.held = not self.count_publishers(interface.PLAN.resolve(self.robot))
        player.poll(clock)
        if player.started is None and clock - self._begin > self.settings.client_timeout:
            missing = 'policy' if player.held else 'NatNet client'
            self.get_logger().error(f'no {missing} in {self.settings.client_timeout:g} s')
            self.finished, self.exit_status = True, 1
        if player.finished and self._end is None:
            self._end = clock + _TAIL
            self.get_logger().info(
                f'finished: {player.sent} frames, at most {1e3 * player.lateness:.1f} ms late')
            self._report()
        if self._end is not None and clock >= self._end:
            self.finished = True

    def _report(self):
        player = self.player
        state = 'finished' if player.finished else 'waiting' if player.started is None else 'playing'
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/stream', interface.OK, state, {
                'file': self.settings.file, 'frames': player.sent, 'of': len(player.recording.time),
                'lateness_ms': 1e3 * player.lateness, 'clients': len(player.server.clients)}, self.robot))

    def close(self):
        """Release the port."""
        self.player.server.close()


def main(argv: list[str] | None = None) -> int:
    """Entry point; see deqmpc_ros.node.run for the exit status."""
    return run(StreamNode, argv)


if __name__ == '__main__':
    sys.exit(main())
