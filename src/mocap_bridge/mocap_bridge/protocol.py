"""The NatNet 3.0 to 4.x wire format, read strictly: the part of it that a rigid body's pose needs.

A message is `u16 id, u16 nbytes, payload`, little-endian. A frame of mocap data (id 7) is

    frame number i32
    marker sets | other markers | rigid bodies | skeletons | assets (4.1+) | labelled markers
        | force plates | devices          each: count i32, [4.1+: size of the section in bytes i32], records
    timecode 2 x u32, timestamp f64, ticks 3 x u64 (camera mid-exposure, data received, transmit),
    [4.1+: precision timestamp 2 x u32], flags i16 (bit 1: tracked models changed), end i32

and a rigid body is 38 bytes: id i32, position 3 f32, quaternion x y z w 4 f32, mean marker error f32,
flags i16 (bit 0: tracking valid). From 4.1 on, sections are skipped by their size, so that a record that
grows in a later 4.x does not shift what follows it.

Every count is checked against the bytes that are left before anything is read or allocated: a packet
of n bytes costs O(n) time and memory, whatever it claims.

Sources: OptiTrack's NatNet SDK documentation (docs.optitrack.com), facts in the README of this package.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Protocol

CONNECT, SERVERINFO = 0, 1
REQUEST, RESPONSE = 2, 3
REQUEST_MODELDEF, MODELDEF = 4, 5
FRAME = 7
KEEPALIVE = 10
ECHO_REQUEST, ECHO_RESPONSE = 12, 13

HEADER = struct.Struct('<HH')
_INT = struct.Struct('<i')
_SERVERINFO = struct.Struct('<256s4B4BQHB4s')
_RIGID_BODY = struct.Struct('<i8fh')
_TAIL_30 = struct.Struct('<2Id3Qhi')
_TAIL_41 = struct.Struct('<2Id3Q2Ihi')
_ECHO = struct.Struct('<QQ')
_LABELLED_MARKER_BYTES = 26
_MODELS_CHANGED = 0x02
_TRACKING_VALID = 0x01
_RIGID_BODY_DESCRIPTION = 1
# Mask of description types in a MODELDEF request: bit 1 = rigid bodies.
_RIGID_BODY_MASK = 1 << _RIGID_BODY_DESCRIPTION

Version = tuple[int, int]


class MalformedPacket(ValueError):
    """A datagram that is not the NatNet message it claims to be."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself when a client connects."""

    name: str
    application_version: tuple[int, int, int, int]
    version: Version  # NatNet version of the stream
    clock_frequency: int  # Hz, of the three tick stamps of a frame
    data_port: int
    multicast: bool
    multicast_group: str


@dataclass(frozen=True)
class RigidBody:
    """One rigid body of a frame, in the server's axes."""

    id: int
    position: tuple[float, float, float]  # m
    quaternion: tuple[float, float, float, float]  # x y z w, as sent
    valid: bool  # the server tracked it in this frame
    mean_error: float  # m, mean marker error


@dataclass(frozen=True)
class Frame:
    """One frame of mocap data."""

    number: int
    bodies: tuple[RigidBody, ...]
    exposure: int  # ticks, camera mid-exposure; 0 where the server knows none
    transmit: int  # ticks, when the server sent the frame
    models_changed: bool  # the model definitions must be fetched again


class Parser(Protocol):
    """Reads the two payloads whose layout depends on the stream's version."""

    def frame(self, payload: bytes, version: Version) -> Frame:
        """Raises MalformedPacket."""

    def models(self, payload: bytes, version: Version) -> dict[str, int]:
        """Rigid body name -> id. Raises MalformedPacket."""


# --- requests -------------------------------------------------------------------------------------

def message(message_id: int, payload: bytes = b'') -> bytes:
    """A whole datagram."""
    return HEADER.pack(message_id, len(payload)) + payload


def connect_request() -> bytes:
    """Asks for SERVERINFO and, in unicast, for frames to the port this is sent from."""
    return message(CONNECT, b'Ping\0')


def models_request(masked: bool) -> bytes:
    """Asks for MODELDEF. Motive 3.1 is reported to answer only a request that names the types it wants;
    older servers expect an empty one, so a client alternates."""
    return message(REQUEST_MODELDEF, _INT.pack(_RIGID_BODY_MASK) if masked else b'')


def keep_alive() -> bytes:
    """Tells a unicast server that the client still listens."""
    return message(KEEPALIVE)


def up_axis_request() -> bytes:
    """Asks which axis is up, as the SDK's samples do."""
    return message(REQUEST, b'UpAxis\0')


def echo_request(token: int) -> bytes:
    """Asks for the server's clock; the answer carries `token` (u64) back."""
    return message(ECHO_REQUEST, struct.pack('<Q', token))


# --- answers --------------------------------------------------------------------------------------

def split(datagram: bytes) -> tuple[int, bytes]:
    """Message id and payload. Raises MalformedPacket when the datagram is shorter than it says."""
    if len(datagram) < HEADER.size:
        raise MalformedPacket(f'{len(datagram)} bytes are no NatNet message; expected at least {HEADER.size}')
    message_id, size = HEADER.unpack_from(datagram)
    if size > len(datagram) - HEADER.size:
        raise MalformedPacket(f'message {message_id} says {size} bytes, got {len(datagram) - HEADER.size}')
    return message_id, datagram[HEADER.size:HEADER.size + size]


def server_info(payload: bytes) -> ServerInfo:
    """SERVERINFO of NatNet 3.0 and later. Raises MalformedPacket."""
    if len(payload) < _SERVERINFO.size:
        raise MalformedPacket(f'server info of {len(payload)} bytes; NatNet 3.0 and later send '
                              f'{_SERVERINFO.size} (older servers have no exposure time)')
    name, *v, frequency, port, multicast, group = _SERVERINFO.unpack_from(payload)
    if not 1_000 <= frequency <= 100_000_000_000:
        raise MalformedPacket(f'server clock frequency {frequency} Hz; expected 1 kHz to 100 GHz')
    return ServerInfo(_text(name.split(b'\0', 1)[0]), tuple(v[:4]), (v[4], v[5]), frequency, port,
                      bool(multicast), '.'.join(map(str, group)))


def up_axis_response(payload: bytes) -> str:
    """'x', 'y' or 'z'. Raises MalformedPacket."""
    axis = _INT.unpack_from(payload)[0] if len(payload) >= _INT.size else -1
    if not 0 <= axis <= 2:
        raise MalformedPacket(f'up axis {payload[:8].hex() or "(empty)"}; expected 0, 1 or 2')
    return 'xyz'[axis]


def echo_response(payload: bytes) -> tuple[int, int]:
    """The token sent, and the server's ticks when it received the request. Raises MalformedPacket."""
    if len(payload) < _ECHO.size:
        raise MalformedPacket(f'echo response of {len(payload)} bytes; expected {_ECHO.size}')
    return _ECHO.unpack_from(payload)


def _text(raw: bytes) -> str:
    return raw.decode('utf-8', 'replace')


class _Reader:
    """A cursor over a payload that never passes its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def need(self, size: int, what: str) -> None:
        if size < 0 or size > len(self.data) - self.at:
            raise MalformedPacket(f'{what}: {size} bytes at {self.at} of {len(self.data)}')

    def skip(self, size: int, what: str) -> None:
        self.need(size, what)
        self.at += size

    def read(self, layout: struct.Struct, what: str) -> tuple:
        self.need(layout.size, what)
        self.at += layout.size
        return layout.unpack_from(self.data, self.at - layout.size)

    def integer(self, what: str) -> int:
        return self.read(_INT, what)[0]

    def count(self, what: str, least: int) -> int:
        """A number of records, each of at least `least` bytes."""
        n = self.integer(what)
        self.need(n * least, f'{n} {what}')
        return n

    def string(self, what: str) -> str:
        end = self.data.find(b'\0', self.at)
        if end < 0:
            raise MalformedPacket(f'{what} at {self.at} has no end')
        raw, self.at = self.data[self.at:end], end + 1
        return _text(raw)


class NativeParser:
    """This package's own reader."""

    def frame(self, payload: bytes, version: Version) -> Frame:
        """Raises MalformedPacket."""
        r, sized = _Reader(payload), version >= (4, 1)
        number = r.integer('frame number')
        for name in ('marker sets', 'other markers'):
            _skip_section(r, name, sized)
        bodies = _rigid_bodies(r, sized)
        assets = ('assets',) if sized else ()
        for name in ('skeletons', *assets, 'labelled markers', 'force plates', 'devices'):
            _skip_section(r, name, sized)
        tail = r.read(_TAIL_41 if sized else _TAIL_30, 'frame tail')
        _, _, timestamp, exposure, _, transmit = tail[:6]
        if not math.isfinite(timestamp):
            raise MalformedPacket(f'frame {number} has timestamp {timestamp}')
        return Frame(number, bodies, exposure, transmit, bool(tail[-2] & _MODELS_CHANGED))

    def models(self, payload: bytes, version: Version) -> dict[str, int]:
        """Rigid body name -> id. Raises MalformedPacket."""
        r, sized, models = _Reader(payload), version >= (4, 1), {}
        for _ in range(r.count('descriptions', 4)):
            kind = r.integer('description type')
            end = None
            if sized:
                size = r.integer('description size')
                r.need(size, f'description of type {kind}')
                end = r.at + size
            if kind == _RIGID_BODY_DESCRIPTION:
                name, body_id = _rigid_body_description(r, version)
                models[name] = body_id
            elif end is None:
                _skip_description(r, kind, version)
            if end is not None:
                if r.at > end:
                    raise MalformedPacket(f'description of type {kind} is longer than its {size} bytes')
                r.at = end
        return models


def _rigid_bodies(r: _Reader, sized: bool) -> tuple[RigidBody, ...]:
    stride = _RIGID_BODY.size
    n = r.count('rigid bodies', stride)
    if sized:
        size = r.integer('size of rigid bodies')
        r.need(size, 'rigid bodies')
        if size < n * stride or (n and size % n):
            raise MalformedPacket(f'{n} rigid bodies in {size} bytes; expected {stride} each')
        stride = size // n if n else stride
    bodies = []
    for i in range(n):
        body_id, x, y, z, qx, qy, qz, qw, error, flags = _RIGID_BODY.unpack_from(r.data, r.at + i * stride)
        bodies.append(RigidBody(body_id, (x, y, z), (qx, qy, qz, qw), bool(flags & _TRACKING_VALID), error))
    r.skip(size if sized else n * stride, 'rigid bodies')
    return tuple(bodies)


def _skip_section(r: _Reader, name: str, sized: bool) -> None:
    if sized:
        if r.integer(name) < 0:
            raise MalformedPacket(f'negative number of {name}')
        r.skip(r.integer(f'size of {name}'), name)
    elif name == 'marker sets':
        for _ in range(r.count(name, 5)):
            r.string('marker set name')
            r.skip(12 * r.count('markers', 12), 'markers')
    elif name == 'other markers':
        r.skip(12 * r.count(name, 12), name)
    elif name == 'labelled markers':
        r.skip(_LABELLED_MARKER_BYTES * r.count(name, _LABELLED_MARKER_BYTES), name)
    elif name == 'skeletons':
        for _ in range(r.count(name, 8)):
            r.integer('skeleton id')
            r.skip(_RIGID_BODY.size * r.count('bones', _RIGID_BODY.size), 'bones')
    else:  # force plates, devices: id, channels, each with its samples
        for _ in range(r.count(name, 8)):
            r.integer('id')
            for _ in range(r.count('channels', 4)):
                r.skip(4 * r.count('samples', 4), 'samples')


def _rigid_body_description(r: _Reader, version: Version) -> tuple[str, int]:
    name = r.string('rigid body name')
    body_id = r.integer('rigid body id')
    r.skip(4 + 12 + (16 if version >= (4, 2) else 0), 'parent and offset')
    markers = r.count('markers', 16)
    r.skip(16 * markers, 'marker positions and labels')
    if version >= (4, 0):
        for _ in range(markers):
            r.string('marker name')
    return name, body_id


def _skip_description(r: _Reader, kind: int, version: Version) -> None:
    """Skips a description that carries no size (before 4.1)."""
    if kind == 0:  # marker set
        r.string('marker set name')
        _skip_strings(r, 'marker names')
    elif kind == 2:  # skeleton
        r.string('skeleton name')
        r.integer('skeleton id')
        for _ in range(r.count('bones', 21)):
            _rigid_body_description(r, version)
    elif kind == 3:  # force plate: id, serial, size 2, origin 3, calibration 12 x 12, corners 4 x 3, types 2
        r.integer('force plate id')
        r.string('serial number')
        r.skip(4 * (2 + 3 + 144 + 12 + 2), 'force plate')
        _skip_strings(r, 'channel names')
    elif kind == 4:  # device
        r.integer('device id')
        r.string('device name')
        r.string('serial number')
        r.skip(8, 'device types')
        _skip_strings(r, 'channel names')
    elif kind == 5:  # camera
        r.string('camera name')
        r.skip(28, 'camera pose')
    else:
        raise MalformedPacket(f'description type {kind}; NatNet {version[0]}.{version[1]} has 0 to 5')


def _skip_strings(r: _Reader, what: str) -> None:
    for _ in range(r.count(what, 1)):
        r.string(what)
