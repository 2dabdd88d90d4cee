"""A client's side of a NatNet conversation, without sockets: datagrams and times in, frames and requests out.

    connecting --SERVERINFO--> describing --MODELDEF--> streaming --silence--> connecting ...

While connecting, CONNECT is sent with a pause that doubles up to `longest_pause`. While streaming, a
unicast server is kept alive, and the server's clock is asked for by echoes: often until the clock map has
settled, then every `echo_period`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mocap_bridge import protocol
from mocap_bridge.clock import ClockMap
from mocap_bridge.protocol import MalformedPacket, NativeParser, Parser, ServerInfo

TRANSPORTS = ('auto', 'unicast', 'multicast')

class MocapError(RuntimeError):
    """The mocap system cannot be used as asked; the message says what to change."""


def _natnet() -> Parser:
    try:
        from mocap_bridge.natnet_parser import NatNetParser
    except ImportError as error:
        raise MocapError(f'client natnet needs the package natnet (pip install natnet): {error}') from error
    return NatNetParser()


PARSERS: dict[str, Callable[[], Parser]] = {'native': NativeParser, 'natnet': _natnet}


NO_NATNETCLIENT = (
    'client natnetclient cannot do the job: it raises on the server information of NatNet 3.0 and later, '
    'misreads rigid bodies from 3.0 on and knows no exposure time (src/mocap_bridge/README.md, '
    '"Which client"); expected one of ' + ', '.join(PARSERS))


@dataclass(frozen=True)
class ClientSettings:
    """Where the NatNet server is and how to talk to it."""

    server_address: str = '127.0.0.1'  # IPv4 address or host name of the server
    local_address: str = ''  # IPv4 address of the interface that faces the server; '' lets the system choose
    command_port: int = 1510  # UDP port of the server's command channel
    data_port: int = 0  # multicast data port; 0 takes the one the server announces
    multicast_group: str = ''  # '' takes the one the server announces
    transport: str = 'auto'  # auto (as the server announces) | unicast | multicast
    client: str = 'native'  # who reads frames: native | natnet
    silence: float = 1.0  # s without a frame after which the client connects again
    first_pause: float = 0.1  # s between the first two CONNECTs
    longest_pause: float = 2.0  # s, the pause doubles up to this
    request_pause: float = 0.5  # s between requests for one thing, and between keep-alives
    up_axis_requests: int = 10  # unanswered requests for the up axis after which the client stops asking
    echo_period: float = 0.5  # s between echoes once the clock map has settled
    first_echo_period: float = 0.02  # s between echoes before that

    def __post_init__(self):
        if self.client == 'natnetclient':
            raise MocapError(NO_NATNETCLIENT)
        if self.client not in PARSERS:
            raise MocapError(f'client = {self.client!r}; expected one of {", ".join(PARSERS)}')
        if self.transport not in TRANSPORTS:
            raise MocapError(f'transport = {self.transport!r}; expected one of {", ".join(TRANSPORTS)}')


@dataclass(frozen=True)
class BodyPose:
    """One rigid body of one frame, in the server's axes."""

    position: np.ndarray  # (3,) m
    quaternion: np.ndarray  # (4,) x y z w, body -> mocap axes, as sent
    valid: bool  # the server tracked it in this frame; False: position and quaternion mean nothing
    mean_error: float  # m, mean marker error


@dataclass(frozen=True)
class MocapFrame:
    """One frame with its times."""

    frame_number: int
    exposure_time: float | None  # s of the server's clock, camera mid-exposure; None where it gives none
    receive_time: float  # s of the ROS clock
    stamp: float  # s of the ROS clock: the exposure, or the reception where the exposure is unknown
    bodies: dict[str, BodyPose]
    up_axis: str | None  # the axis that the server says is up; None while it has not said


@dataclass
class Counters:
    """What happened since the start."""

    frames: int = 0
    missed: int = 0  # frame numbers that never came
    malformed: int = 0
    foreign: int = 0  # datagrams from another address than the server's
    early: int = 0  # frames before the models were known
    unstamped: int = 0  # frames without a plausible exposure time
    echoes: int = 0  # answers to echo requests
    reconnects: int = 0
    last_fault: str = ''  # the newest malformed packet or send error, in words


@dataclass
class _Due:
    """When each kind of request may be sent next (monotonic s)."""

    connect: float = -np.inf
    models: float = -np.inf
    up_axis: float = -np.inf
    keep_alive: float = -np.inf
    echo: float = -np.inf


@dataclass
class Session:
    """One conversation with one server. `now` is a monotonic clock, `ros` the ROS clock, both in s."""

    settings: ClientSettings = field(default_factory=ClientSettings)
    clock: ClockMap = field(default_factory=ClockMap)

    def __post_init__(self):
        self.server: ServerInfo | None = None
        self.models: dict[str, int] | None = None
        self.counters = Counters()
        self.connected = False
        self.up_axis: str | None = None  # x | y | z, as the server says
        self._axis_requests = 0
        self._parser = PARSERS[self.settings.client]()
        self._names: dict[int, str] = {}
        self._due = _Due()
        self._pause = self.settings.first_pause
        self._last_frame: float | None = None  # monotonic s
        self._last_number: int | None = None
        self._refetch = False
        self._masked = self._asked = True  # form of the next and of the last request for models
        self._echo: tuple[int, float] | None = None  # token and ROS time of the echo under way
        self._token = 0

    @property
    def multicast(self) -> bool:
        """True when frames are to be taken from a multicast group."""
        if self.settings.transport == 'auto':
            return self.server is not None and self.server.multicast
        return self.settings.transport == 'multicast'

    @property
    def up_axis_untold(self) -> bool:
        """True when the server was asked often enough and did not say which axis is up."""
        return self.up_axis is None and self._axis_requests >= self.settings.up_axis_requests

    def require(self, body: str) -> None:
        """Raises MocapError, naming the bodies the server has, when `body` is none of them."""
        if self.models is not None and body not in self.models:
            known = ', '.join(sorted(self.models)) or 'none'
            raise MocapError(f'rigid body {body!r} is not in the mocap system; it has: {known}')

    def outgoing(self, now: float, ros: float) -> list[bytes]:
        """The datagrams to send to the server's command port now."""
        s, due, out = self.settings, self._due, []
        if self.connected and self._last_frame is not None and now - self._last_frame > s.silence:
            self.connected, self.models = False, None
            self.counters.reconnects += 1
            self._pause, due.connect = s.first_pause, now
        if not self.connected:
            if now >= due.connect:
                out.append(protocol.connect_request())
                due.connect, self._pause = now + self._pause, min(2.0 * self._pause, s.longest_pause)
            return out
        if (self.models is None or self._refetch) and now >= due.models:
            out.append(protocol.models_request(self._masked))
            self._asked, self._masked = self._masked, not self._masked
            due.models = now + s.request_pause
        if self._axis_requests < s.up_axis_requests and now >= due.up_axis:
            out.append(protocol.up_axis_request())
            self._axis_requests += 1
            due.up_axis = now + s.request_pause
        if not self.multicast and now >= due.keep_alive:
            out.append(protocol.keep_alive())
            due.keep_alive = now + s.request_pause
        if now >= due.echo:
            self._token = (self._token + 1) % (1 << 64)
            self._echo = (self._token, ros)
            out.append(protocol.echo_request(self._token))
            # A server that never answers is not asked fifty times a second for ever.
            hurry = not self.clock.settled and (self.counters.echoes > 0 or self._token <= 50)
            due.echo = now + (s.first_echo_period if hurry else s.echo_period)
        return out

    def datagram(self, data: bytes, now: float, ros: float) -> MocapFrame | None:
        """Take one datagram of the server, received at monotonic `now` and ROS time `ros` (s).

        Returns a frame when it was one and the models are known. A malformed one is counted, never raised.
        """
        try:
            kind, payload = protocol.split(data)
            if kind == protocol.FRAME:
                return self._frame(payload, now, ros)
            if kind == protocol.SERVERINFO:
                self._server_info(payload, now)
            elif kind == protocol.MODELDEF and self.server is not None:
                self._models(payload)
            elif kind == protocol.RESPONSE:
                self.up_axis = protocol.up_axis_response(payload)
                self._axis_requests = self.settings.up_axis_requests
            elif kind == protocol.ECHO_RESPONSE and self.server is not None:
                self._echo_response(payload, ros)
        except MalformedPacket as error:
            self.counters.malformed += 1
            self.counters.last_fault = str(error)
        return None

    def _server_info(self, payload, now):
        info = protocol.server_info(payload)
        if not (3, 0) <= info.version < (5, 0):
            raise MalformedPacket(f'server {info.name!r} speaks NatNet {info.version[0]}.{info.version[1]}; '
                                  'expected 3.0 to 4.x')
        if self.server is not None and info.clock_frequency != self.server.clock_frequency:
            self.clock.reset()
        if not self.connected:
            self.models, self._last_frame, self._due = None, now, _Due()
            self._axis_requests = 0
        self.server, self.connected = info, True

    def _models(self, payload):
        models = self._parser.models(payload, self.server.version)
        self.models, self._names = models, {i: name for name, i in models.items()}
        self._refetch, self._masked = False, self._asked  # the form that was answered is the first next time

    def _echo_response(self, payload, ros):
        token, ticks = protocol.echo_response(payload)
        if self._echo is None or token != self._echo[0]:
            return  # late or repeated; its time of asking is gone
        asked, self._echo = self._echo[1], None
        self.counters.echoes += 1
        self.clock.observe_echo(asked, ticks / self.server.clock_frequency, ros)

    def _frame(self, payload, now, ros):
        if self.server is None:
            self.counters.early += 1
            return None
        frame = self._parser.frame(payload, self.server.version)
        self._last_frame = now
        if not self.connected:
            self._due.connect = min(self._due.connect, now)  # it is back: do not wait out the pause
        if self.models is None:
            self.counters.early += 1
            return None
        c = self.counters
        c.frames += 1
        if self._last_number is not None and 0 < frame.number - self._last_number < 10_000:
            c.missed += frame.number - self._last_number - 1
        self._last_number = frame.number
        bodies = {}
        for b in frame.bodies:
            name = self._names.get(b.id)
            if name is None:
                self._refetch = True  # a body that was added since the models were fetched
                continue
            bodies[name] = BodyPose(np.array(b.position), np.array(b.quaternion), b.valid, b.mean_error)
        self._refetch = self._refetch or frame.models_changed
        exposure = self._exposure(frame, ros)
        if exposure is None:
            c.unstamped += 1
        stamp = self.clock.to_ros(exposure) if exposure is not None and self.clock.ready else ros
        return MocapFrame(frame.number, exposure, ros, stamp, bodies, self.up_axis)

    def _exposure(self, frame, ros) -> float | None:
        """Exposure time on the server's clock (s), None where it is no time before the transmission."""
        frequency = self.server.clock_frequency
        if frame.transmit > 0:
            self.clock.observe_frame(frame.transmit / frequency, ros)
        if not 0 < frame.exposure <= frame.transmit <= frame.exposure + frequency:
            return None
        return frame.exposure / frequency
