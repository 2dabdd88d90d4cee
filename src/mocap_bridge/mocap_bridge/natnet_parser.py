"""The PyPI package `natnet` as a second reader of frames and model definitions (`client: natnet`).

Only its packet classes are used; sockets, clock and reconnection are this package's (the README says
why). Three of its faults are repaired here, at its edge:
- it allocates what a packet claims (a string 'fff...' of up to 4 GB, lists of up to 2^32 empty names):
  `_BoundedBuffer` refuses a read past the end before it happens;
- it does not skip the precision timestamp of 4.1, so the frame's flags are read here, 8 bytes on;
- its u64 has the machine's width ('L'): read as 8 bytes here.
"""

from __future__ import annotations

import struct

from natnet import DataDescriptions, DataFrame
from natnet.exceptions import NatNetError
from natnet.packet_buffer import PacketBuffer
from natnet.version import Version as NatNetVersion

from mocap_bridge.protocol import Frame, MalformedPacket, RigidBody, Version

_PRECISION_BYTES = 8
_END = struct.Struct('<hi')


class _BoundedBuffer(PacketBuffer):
    """A buffer in which no count can make a read longer than the packet."""

    def read_string(self, max_length=None, static_length=False):
        if self.pointer >= len(self.data):
            raise MalformedPacket('string past the end of the packet')
        return super().read_string(max_length, static_length)

    def read_float32_array(self, count):
        if 4 * count > len(self.data) - self.pointer:
            raise MalformedPacket(f'{count} floats past the end of the packet')
        return super().read_float32_array(count)

    def read_uint64(self):
        return self.read('<Q')[0]


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


class NatNetParser:
    """Reads with the library `natnet`."""

    def frame(self, payload: bytes, version: Version) -> Frame:
        """Raises MalformedPacket."""
        buffer = _BoundedBuffer(payload)
        f = self._read(DataFrame, buffer, version)
        # It stopped behind the two bytes that it takes for the flags.
        flags_at = buffer.pointer - 2 + (_PRECISION_BYTES if version >= (4, 1) else 0)
        if len(payload) < flags_at + _END.size:
            raise MalformedPacket(f'frame of {len(payload)} bytes; expected {flags_at + _END.size}')
        flags, _ = _END.unpack_from(payload, flags_at)
        return Frame(
            _signed(f.prefix.frame_number),
            tuple(RigidBody(_signed(b.id_num), b.pos, b.rot, b.tracking_valid, b.marker_error)
                  for b in f.rigid_bodies),
            f.suffix.stamp_camera_mid_exposure, f.suffix.stamp_transmit, bool(flags & 0x02))

    def models(self, payload: bytes, version: Version) -> dict[str, int]:
        """Rigid body name -> id. Raises MalformedPacket."""
        return {b.name: _signed(b.id_num)
                for b in self._read(DataDescriptions, _BoundedBuffer(payload), version).rigid_bodies}

    @staticmethod
    def _read(kind, buffer, version):
        try:
            return kind.read_from_buffer(buffer, NatNetVersion(*version))
        except (struct.error, UnicodeDecodeError, NatNetError) as error:
            raise MalformedPacket(f'natnet cannot read the packet: {error}') from error
