"""NatNet messages of an OptiTrack server, NatNet 3.0 to 4.1, little-endian.

A message is its id (u16), the number of payload bytes (u16) and the payload. The layouts are those of
OptiTrack's NatNet SDK (PacketClient, "direct depacketization"). What changes with the version:
4.0 adds marker names to MODELDEF; 4.1 adds the assets section and the precision timestamp to FRAME and
a byte size (i32) after each section's count and each description's type.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VERSIONS = ((3, 0), (3, 1), (4, 0), (4, 1))

CONNECT, SERVERINFO, REQUEST, RESPONSE, REQUEST_MODELDEF, MODELDEF = 0, 1, 2, 3, 4, 5
REQUEST_FRAME, FRAME, DISCONNECT, KEEPALIVE, ECHO_REQUEST, ECHO_RESPONSE, DISCOVERY = 6, 7, 9, 10, 12, 13, 14
UNRECOGNIZED = 100

TRACKING_VALID = 0x01  # rigid body
OCCLUDED, POINT_CLOUD_SOLVED, HAS_MODEL = 0x01, 0x02, 0x08  # labelled marker

Vector = Sequence[float]


@dataclass(frozen=True)
class Body:
    """A rigid body that the server knows."""

    name: str
    id: int
    markers: tuple[tuple[float, float, float], ...] = ()  # m, in the body frame; () streams no markers


@dataclass(frozen=True)
class BodySample:
    """A rigid body in one frame, in the server's axes."""

    body: Body
    position: Vector  # (3,) m
    quaternion: Vector  # (4,) x y z w
    tracked: bool
    markers: Sequence[Vector] = ()  # (M, 3) m
    error: float = 0.0002  # m, mean marker error


def z_up_to_y_up(position: np.ndarray, quaternion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pose (m; x y z w) in z-up axes -> the same pose in Motive's y-up axes, x kept. World and body axes
    change together, as when a body was made with the axes of its world."""
    x, y, z = position
    qx, qy, qz, qw = quaternion
    return np.array([x, z, -y]), np.array([qx, qz, -qy, qw])


def message(number: int, payload: bytes = b'') -> bytes:
    """A whole message."""
    return struct.pack('<HH', number, len(payload)) + payload


def server_info(version: tuple[int, int], application: str, clock_frequency: int, data_port: int,
                group: str | None) -> bytes:
    """SERVERINFO; `clock_frequency` in ticks a second, `group` the multicast address, None for unicast."""
    address = socket.inet_aton(group or '0.0.0.0')
    return message(SERVERINFO, struct.pack(
        '<256s4B4BQHB4s', application.encode()[:255], 1, 0, 0, 0, *version, 0, 0, clock_frequency, data_port,
        group is not None, address))


def model_definitions(version: tuple[int, int], bodies: Sequence[Body]) -> bytes:
    """MODELDEF: a marker set for each body with markers, and each body."""
    descriptions = []
    for body in bodies:
        names = [_string(f'Marker{k + 1}') for k in range(len(body.markers))]
        if body.markers:
            descriptions.append((0, _string(body.name) + struct.pack('<i', len(names)) + b''.join(names)))
        rigid = _string(body.name) + struct.pack('<ii3fi', body.id, -1, 0.0, 0.0, 0.0, len(names))
        rigid += b''.join(struct.pack('<3f', *m) for m in body.markers)
        rigid += struct.pack(f'<{len(names)}i', *range(1, len(names) + 1))  # active labels
        if version >= (4, 0):
            rigid += b''.join(names)
        descriptions.append((1, rigid))
    payload = struct.pack('<i', len(descriptions))
    for kind, data in descriptions:
        size = struct.pack('<i', len(data)) if version >= (4, 1) else b''
        payload += struct.pack('<i', kind) + size + data
    return message(MODELDEF, payload)


def frame(version: tuple[int, int], number: int, samples: Sequence[BodySample], timestamp: float,
          exposure: int, received: int, transmitted: int) -> bytes:
    """FRAME number `number`. `timestamp`: s since the server started; `exposure` (camera mid-exposure),
    `received` and `transmitted`: ticks of the server's clock."""
    def section(items):
        data = b''.join(items)
        size = struct.pack('<i', len(data)) if version >= (4, 1) else b''
        return struct.pack('<i', len(items)) + size + data
    with_markers = [s for s in samples if s.body.markers]
    marker_sets = [_string(s.body.name) + _points(s.markers) for s in with_markers]
    if marker_sets:
        marker_sets.append(_string('all') + _points([m for s in with_markers for m in s.markers]))
    bodies = [struct.pack('<i3f4ffh', s.body.id, *s.position, *s.quaternion, s.error,
                          TRACKING_VALID if s.tracked else 0) for s in samples]
    labelled = [struct.pack('<i3ffhf', s.body.id << 16 | k + 1, *m, 0.0063,
                            HAS_MODEL | (POINT_CLOUD_SOLVED if s.tracked else OCCLUDED), 1000.0 * s.error)
                for s in with_markers for k, m in enumerate(s.markers)]
    empty = section([])
    payload = struct.pack('<i', number) + section(marker_sets) + empty + section(bodies) + empty
    payload += empty if version >= (4, 1) else b''  # assets
    payload += section(labelled) + empty + empty  # then force plates, devices
    payload += struct.pack('<IIdQQQ', 0, 0, timestamp, exposure, received, transmitted)
    if version >= (4, 1):
        payload += struct.pack('<II', int(timestamp), int(timestamp % 1.0 * 2**32))
    return message(FRAME, payload + struct.pack('<hi', 0, 0))


def _string(text: str) -> bytes:
    return text.encode() + b'\0'


def _points(points: Sequence[Vector]) -> bytes:
    return struct.pack('<i', len(points)) + b''.join(struct.pack('<3f', *p) for p in points)
