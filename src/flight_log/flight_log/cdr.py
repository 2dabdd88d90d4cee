"""Many messages of one topic at once: the numbers of poses, odometry and plans straight from their CDR bytes.

Messages of one topic mostly differ in their numbers only: the same frames, the same count of points, hence the same
layout. The first message of a length is walked field by field; in all others of that length the bytes that shape the
layout (encapsulation, strings, counts) are compared with its own, and the numbers are gathered by their offsets. What
is shaped otherwise is decoded one by one. Ten times faster than a decoder that makes an object for every message.

CDR (OMG DDS-XTypes, encapsulation 0001, little endian): 4 bytes of encapsulation, then fields, each aligned to its
size counted from byte 4; a string is its length with the final zero (uint32) and its bytes; a sequence its count.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from deqmpc import interface
from deqmpc.dynamics import rotation
from flight_log.bag import deserialize

POSE, ODOM, PLAN = interface.POSE.type, interface.ODOM.type, interface.PLAN.type
_LITTLE = b'\x00\x01'


@dataclass
class _Walk:
    """Reads the layout of one message."""

    data: bytes
    at: int = 4
    doubles: list[int] = field(default_factory=list)  # offsets of what is wanted, in the order of reading
    times: list[int] = field(default_factory=list)  # offsets of (sec, nanosec)
    shaping: list[tuple[int, int]] = field(default_factory=lambda: [(0, 4)])  # bytes [a, b) that fix the layout

    def time(self) -> None:
        self.times.append(self.at)
        self.at += 8

    def count(self) -> int:
        """A uint32 that shapes the layout."""
        self.at += -(self.at - 4) % 4
        self.shaping.append((self.at, self.at + 4))
        self.at += 4
        return struct.unpack_from('<I', self.data, self.at - 4)[0]

    def string(self) -> None:
        length = self.count()
        self.shaping.append((self.at, self.at + length))
        self.at += length

    def floats(self, number: int, wanted: bool = True) -> None:
        self.at += -(self.at - 4) % 8
        if wanted:
            self.doubles += range(self.at, self.at + 8 * number, 8)
        self.at += 8 * number

    def message(self, kind: str) -> bool:
        """Walk a whole message; False where it is no message of that kind, or not of the expected shape."""
        try:
            return self.data[:2] == _LITTLE and self._fields(kind) and self.at <= len(self.data)
        except struct.error:
            return False

    def _fields(self, kind: str) -> bool:
        self.time()
        self.string()
        if kind == POSE:
            self.floats(7)
            return True
        if kind == ODOM:
            self.string()
            self.floats(7)
            self.floats(36, wanted=False)
            self.floats(6)
            return True
        for _ in range(self.count()):
            self.string()
            self.at += -(self.at - 4) % 4
        points = self.count()
        for _ in range(points):
            for number in (7, 6, 6):
                if self.count() != 1:
                    return False
                self.floats(number)
            self.time()
        return points > 0


def read(kind: str, messages: list[bytes]) -> tuple[list[np.ndarray | None], dict[int, str]]:
    """Rows of numbers, one for every message of `kind`, and why there is none (None) by index.

    POSE: stamp, position, quaternion (8 numbers). ODOM: those, velocity in the world, rates (14). PLAN: (P, 17) a
    message with, for every point, its time (stamp + time_from_start), position, quaternion, velocity, rates and
    acceleration.
    """
    rows: list[np.ndarray | None] = [None] * len(messages)
    faults: dict[int, str] = {}
    lengths = np.array([len(m) for m in messages], dtype=int)
    for length in np.unique(lengths):
        at = np.flatnonzero(lengths == length)
        walk = _Walk(messages[at[0]])
        same = np.zeros(len(at), dtype=bool)
        if walk.message(kind):
            block = np.frombuffer(b''.join(messages[i] for i in at), dtype=np.uint8).reshape(len(at), length)
            shape = np.concatenate([np.arange(*span) for span in walk.shaping])
            same = (block[:, shape] == block[0, shape]).all(axis=1)
            for i, row in zip(at[same], _numbers(kind, walk, block[same]), strict=True):
                rows[i] = row
        for i in at[~same]:
            try:
                rows[i] = _decoded(kind, messages[i])
            except ValueError as error:
                faults[int(i)] = str(error)
    return rows, faults


def _numbers(kind: str, walk: _Walk, block: np.ndarray) -> np.ndarray:
    """(N, 8), (N, 14) or (N, P, 17) of N messages of one layout, `block` (N, bytes)."""
    def gathered(offsets, width, dtype):
        where = np.asarray(offsets)[:, None] + np.arange(width)
        return np.ascontiguousarray(block[:, where]).view(dtype)
    values = gathered(walk.doubles, 8, '<f8')[:, :, 0]
    seconds, nanoseconds = (gathered(np.asarray(walk.times) + shift, 4, dtype)[:, :, 0].astype(float)
                            for shift, dtype in ((0, '<i4'), (4, '<u4')))
    t = seconds + 1e-9 * nanoseconds
    if kind == PLAN:
        t = t[:, :1] + t[:, 1:]
        return np.concatenate([t[:, :, None], values.reshape(len(block), -1, 19)[:, :, :16]], axis=2)
    if kind == ODOM:
        values[:, 7:10] = rotation.rotate(values[:, 3:7], values[:, 7:10])
    return np.concatenate([t, values], axis=1)


def _decoded(kind: str, data: bytes) -> np.ndarray:
    """A row of one message, by the decoder of the bag and the readers of deqmpc.interface."""
    message = deserialize(data, kind)
    if kind == POSE:
        stamp, *pose = interface.read_pose(message)
        return np.concatenate([[stamp], *pose])
    if kind == ODOM:
        s = interface.read_odometry(message)
        return np.concatenate([[s.stamp], s.position, s.quaternion, s.velocity, s.rates])
    p = interface.read_plan(message)
    return np.column_stack([p.stamp + p.time_from_start, p.position, p.quaternion, p.velocity, p.rates,
                            p.acceleration])
