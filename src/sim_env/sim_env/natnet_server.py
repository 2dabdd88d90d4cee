"""An OptiTrack server on NatNet: what Motive does on the network, polled, without a thread or a clock.

The server clock is the caller's: any seconds that only grow (`now`, and the exposure times of frames).
Clients hear of it in ticks, as from Motive.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deqmpc.dynamics import rotation
from sim_env import natnet_packets as natnet
from sim_env.natnet_packets import Body, BodySample
from sim_env.udp import bind_udp, waiting

_logger = logging.getLogger(__name__)

Pose = tuple[np.ndarray, np.ndarray]  # position (3,) m, quaternion (4,) x y z w


@dataclass(frozen=True)
class NatNetSettings:
    """Where the server is and what it speaks."""

    address: str = '127.0.0.1'  # interface that the command port is opened on
    command_port: int = 1510  # 0 = any free one
    data_port: int = 1511  # of multicast frames; unicast frames go to where the client asked from
    multicast: bool = False  # frames to `group` instead of to each client that keeps itself alive
    group: str = '239.255.42.99'  # multicast address
    version: tuple[int, int] = (4, 1)  # NatNet version, one of natnet_packets.VERSIONS
    y_up: bool = False  # stream in Motive's y-up axes; poses are given z-up either way
    frame_rate: float = 100.0  # 1/s, what a client that asks for FrameRate is told
    clock_frequency: int = 10_000_000  # ticks a second of the server clock
    client_timeout: float = 10.0  # s without a sign of life after which a unicast client gets no more frames


class NatNetServer:
    """Streams rigid bodies.

    `clients`: unicast clients as (host, port) -> last sign of life (s). `counts`: requests, frames
    (datagrams sent), malformed, lost (not sent).
    """

    def __init__(self, bodies: Sequence[Body], settings: NatNetSettings = NatNetSettings(),
                 warn: Callable[[str], None] = _logger.warning):
        """OSError when the command port cannot be opened; ValueError on settings that do not fit."""
        if settings.version not in natnet.VERSIONS:
            raise ValueError(f'NatNet version {settings.version}; expected one of {natnet.VERSIONS}')
        if settings.multicast and not _is_multicast(settings.group):
            raise ValueError(f'multicast group {settings.group!r}; expected an address in 224.0.0.0/4')
        for what in ('name', 'id'):
            values = [getattr(b, what) for b in bodies]
            if len(set(values)) < len(values):
                raise ValueError(f'two rigid bodies have the same {what}: {values}')
        self.settings = settings
        self.bodies = {b.name: b for b in bodies}
        self.clients: dict[tuple[str, int], float] = {}
        self.counts: Counter[str] = Counter()
        self._warn, self._warned = warn, -np.inf
        self._versions: dict[tuple[str, int], tuple[int, int]] = {}  # asked for by `Bitstream`
        self._last_pose = {b.name: (np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0])) for b in bodies}
        self._last_frame: Callable[[tuple[int, int]], bytes] | None = None
        self._socket = bind_udp((settings.address, settings.command_port), 'NatNet server')
        self.address: tuple[str, int] = self._socket.getsockname()
        if settings.multicast:
            interface = socket.inet_aton(self.address[0])
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)

    def close(self) -> None:
        """Release the port."""
        self._socket.close()

    def poll(self, now: float) -> None:
        """Answer the requests that wait; `now` in s of the server clock."""
        for packet, sender in waiting(self._socket):
            self.counts['requests'] += 1
            if len(packet) < 4:
                self._malformed(f'{len(packet)} bytes', sender, now)
                continue
            number, _ = struct.unpack_from('<HH', packet)  # the size is not relied on: natnetclient errs
            self._answer(number, packet[4:], sender, now)
        for client, last in list(self.clients.items()):
            if now - last > self.settings.client_timeout:
                del self.clients[client]

    def send_frame(self, frame_number: int, exposure_time: float, poses: Mapping[str, Pose | None],
                   now: float | None = None) -> None:
        """Send one frame to every client.

        `exposure_time`: s of the server clock, camera mid-exposure. `poses`: name -> (position m,
        quaternion x y z w), z-up, body -> world; None or missing: not tracked, which streams the last
        pose with the tracking-valid bit off, so that only the bit tells. `now`: s, time of transmission
        (default: the exposure). KeyError for a body that the server does not have.
        """
        unknown = set(poses) - set(self.bodies)
        if unknown:
            raise KeyError(f'no rigid body {sorted(unknown)}; the server has {sorted(self.bodies)}')
        samples = [self._sample(body, poses.get(name)) for name, body in self.bodies.items()]
        sent = exposure_time if now is None else now
        exposure, transmitted = self._ticks(exposure_time), self._ticks(sent)

        def encode(version):
            return natnet.frame(version, frame_number, samples, exposure_time, exposure,
                                received=transmitted, transmitted=transmitted)
        self._last_frame = encode
        if self.settings.multicast:
            self._send(encode(self.settings.version), (self.settings.group, self.settings.data_port))
            return
        encoded = {}
        for client in self.clients:
            version = self._versions.get(client, self.settings.version)
            if version not in encoded:
                encoded[version] = encode(version)
            self._send(encoded[version], client)

    # --- inside ---------------------------------------------------------------------------------

    def _ticks(self, seconds: float) -> int:
        return round(seconds * self.settings.clock_frequency)

    def _sample(self, body: Body, pose: Pose | None) -> BodySample:
        if pose is not None:
            self._last_pose[body.name] = pose
        position, quaternion = self._last_pose[body.name]
        markers = [position + rotation.rotate(quaternion, np.array(m)) for m in body.markers]
        if self.settings.y_up:
            markers = [natnet.z_up_to_y_up(m, quaternion)[0] for m in markers]
            position, quaternion = natnet.z_up_to_y_up(position, quaternion)
        return BodySample(body, position, quaternion, pose is not None, markers)

    def _send(self, packet: bytes, receiver: tuple[str, int]) -> None:
        try:
            self._socket.sendto(packet, receiver)
            self.counts['frames'] += 1
        except OSError as error:
            self.counts['lost'] += 1
            _logger.debug('frame to %s not sent: %s', receiver, error)

    def _malformed(self, what: str, sender: tuple[str, int], now: float) -> None:
        self.counts['malformed'] += 1
        if now - self._warned >= 1.0:
            self._warned = now
            self._warn(f'ignored a malformed NatNet request from {sender[0]}:{sender[1]}: {what} '
                       f'({self.counts["malformed"]} so far)')

    def _answer(self, number: int, payload: bytes, sender: tuple[str, int], now: float) -> None:
        version = self._versions.get(sender, self.settings.version)
        alive = number in (natnet.CONNECT, natnet.KEEPALIVE, natnet.REQUEST, natnet.REQUEST_MODELDEF)
        if alive:
            self.clients[sender] = now
        if number in (natnet.CONNECT, natnet.DISCOVERY):
            self._reply(natnet.server_info(
                self.settings.version, 'sim_env', self.settings.clock_frequency, self.settings.data_port,
                self.settings.group if self.settings.multicast else None), sender)
        elif number == natnet.REQUEST_MODELDEF:
            self._reply(natnet.model_definitions(version, list(self._described())), sender)
        elif number == natnet.REQUEST_FRAME:
            if self._last_frame is not None:
                self._reply(self._last_frame(version), sender)
        elif number == natnet.ECHO_REQUEST:
            if len(payload) < 8:
                self._malformed(f'echo request of {len(payload)} bytes, expected 8', sender, now)
            else:
                self._reply(natnet.message(natnet.ECHO_RESPONSE,
                                           payload[:8] + struct.pack('<Q', self._ticks(now))), sender)
        elif number == natnet.REQUEST:
            self._reply(self._command(payload, sender), sender)
        elif number == natnet.DISCONNECT:
            self.clients.pop(sender, None)
            self._versions.pop(sender, None)
        elif number != natnet.KEEPALIVE:
            self._malformed(f'message {number}', sender, now)

    def _reply(self, packet: bytes, receiver: tuple[str, int]) -> None:
        try:
            self._socket.sendto(packet, receiver)
        except OSError as error:
            self.counts['lost'] += 1
            _logger.debug('answer to %s not sent: %s', receiver, error)

    def _described(self):
        """The bodies with their markers in the axes that are streamed."""
        for body in self.bodies.values():
            markers = body.markers
            if self.settings.y_up:
                markers = tuple((x, z, -y) for x, y, z in markers)
            yield Body(body.name, body.id, markers)

    def _command(self, payload: bytes, sender: tuple[str, int]) -> bytes:
        """Remote commands of Motive that concern the stream: FrameRate, UpAxis, UnitsToMillimeters and
        Bitstream,<version> (unicast only, as there)."""
        name, _, argument = payload.split(b'\0')[0].decode('latin-1').partition(',')
        if name == 'FrameRate':
            return natnet.message(natnet.RESPONSE, struct.pack('<f', self.settings.frame_rate))
        if name == 'UnitsToMillimeters':
            return natnet.message(natnet.RESPONSE, struct.pack('<f', 1000.0))
        if name == 'UpAxis':
            return natnet.message(natnet.RESPONSE, struct.pack('<i', 1 if self.settings.y_up else 2))
        if name == 'Bitstream' and not self.settings.multicast:
            version = next((v for v in natnet.VERSIONS if argument == f'{v[0]}.{v[1]}'), None)
            if version is not None:
                self._versions[sender] = version
            return natnet.message(natnet.RESPONSE, struct.pack('<i', 0 if version else 1))
        return natnet.message(natnet.UNRECOGNIZED)


def _is_multicast(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_multicast
    except ValueError:
        return False
