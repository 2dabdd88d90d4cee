"""The sockets under a `Session`: command channel, unicast or multicast frames, one server only."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from mocap_bridge.session import ClientSettings, MocapError, MocapFrame, Session

_DATAGRAM = 65_536  # bytes; UDP carries no more
_BURST = 256  # datagrams read in one call at most, so that a flood cannot keep the caller
_RECEIVE_BUFFER = 1 << 20  # bytes the kernel may hold while the receiving thread sleeps


class NatNetClient:
    """Talks to one NatNet server. `clock` gives the ROS time in s.

    Call `poll` again and again from one thread. Raises MocapError when an address cannot be used.
    """

    def __init__(self, settings: ClientSettings, clock: Callable[[], float]):
        self.settings, self.clock = settings, clock
        self.session = Session(settings)
        try:
            self._server = socket.gethostbyname(settings.server_address)
        except OSError as error:
            raise MocapError(f'server_address {settings.server_address!r} cannot be resolved: {error}; '
                             'expected an IPv4 address or a known host name') from error
        self._data: socket.socket | None = None
        self._command = self._socket()
        try:
            self._command.bind((settings.local_address, 0))
        except OSError as error:
            self.close()
            raise MocapError(f'local_address {settings.local_address!r} cannot be bound: {error}; '
                             'expected the IPv4 address of one of this machine\'s interfaces') from error

    def poll(self, timeout: float) -> list[MocapFrame]:
        """Send what is due, wait up to `timeout` s for datagrams, return the frames among them."""
        for request in self.session.outgoing(time.monotonic(), self.clock()):
            try:
                self._command.sendto(request, (self._server, self.settings.command_port))
            except OSError as error:  # the network is down: the session asks again by itself
                self.session.counters.last_fault = f'cannot send to {self._server}: {error}'
        if self.session.multicast and self._data is None and self.session.server is not None:
            self._data = self._join()
        sockets = [s for s in (self._command, self._data) if s is not None]
        ready, _, _ = select.select(sockets, [], [], timeout)
        frames = []
        for source in ready:
            frames += self._read(source)
        return frames

    def _read(self, source: socket.socket) -> list[MocapFrame]:
        frames = []
        for _ in range(_BURST):
            try:
                data, address = source.recvfrom(_DATAGRAM)
            except BlockingIOError:
                break
            except ConnectionError:  # an ICMP refusal of an earlier request: the server is not up yet
                continue
            now, ros = time.monotonic(), self.clock()
            if address[0] != self._server:
                self.session.counters.foreign += 1
                continue
            frame = self.session.datagram(data, now, ros)
            if frame is not None:
                frames.append(frame)
        return frames

    def _join(self) -> socket.socket:
        server = self.session.server
        group = self.settings.multicast_group or server.multicast_group
        port = self.settings.data_port or server.data_port
        data = self._socket()
        data.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Bound to the group, not to the wildcard, so that unicast to the same port stays out.
            data.bind((group, port))
            interface = self.settings.local_address or '0.0.0.0'
            data.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                            socket.inet_aton(group) + socket.inet_aton(interface))
        except OSError as error:
            data.close()
            raise MocapError(f'cannot join multicast group {group}:{port} on interface '
                             f'{self.settings.local_address or "(default)"}: {error}') from error
        return data

    @staticmethod
    def _socket() -> socket.socket:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.setblocking(False)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        return s

    def close(self) -> None:
        """Close the sockets. Safe to call twice."""
        for s in (self._command, self._data):
            if s is not None:
                s.close()

    def __enter__(self) -> NatNetClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
