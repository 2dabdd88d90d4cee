"""The Crazyflie's end of the radio: CRTP, one packet a datagram, on cflib's UDP link.

A packet is a header byte `port << 4 | 0x0C | channel` and at most 30 bytes, little-endian. The peer
answers as bitcraze/crazyflie-firmware does (crtpservice.c, platformservice.c, log.c, param_logic.c,
crtp_commander_generic.c, crtp_commander_high_level.c, crtp_localization_service.c,
crtp_supervisor.c), so that an unmodified cflib connects, and hands commands to a
`SimulatedCrazyflie` in SI units. It has no thread and no clock: `poll()` does what is due, in the
Crazyflie's own time.
"""

from __future__ import annotations

import errno
import logging
import math
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sim_env.simulated_crazyflie import SimulatedCrazyflie
from sim_env.udp import bind_udp, waiting

PROTOCOL_VERSION = 12  # the first with the supervisor port
FIRMWARE = b'simulated'
DEVICE_TYPE = b'CF21'
RADIO_ID = 0xE7  # last byte of the default address E7E7E7E7E7; packed positions are addressed by it

CONSOLE, PARAM, COMMANDER, MEMORY, LOG, LOCALIZATION = 0, 2, 3, 4, 5, 6
GENERIC, HIGH_LEVEL, SUPERVISOR, PLATFORM, LINK = 7, 8, 9, 13, 15
NULL_PACKET = b'\xff'  # cflib's scan sends it; any answer counts

MAX_DATA = 30
MAX_BLOCKS, MAX_VARIABLES, MAX_LOG_BYTES = 16, 128, 26  # log.c

# struct character -> type number in the TOC (cflib LogTocElement, ParamTocElement)
LOG_TYPES = {'B': 1, 'H': 2, 'I': 3, 'b': 4, 'h': 5, 'i': 6, 'f': 7, 'e': 8}
PARAM_TYPES = {'B': 0x08, 'H': 0x09, 'I': 0x0A, 'b': 0x00, 'h': 0x01, 'i': 0x02, 'f': 0x06}
_LOG_CHARACTER = {number: character for character, number in LOG_TYPES.items()}
READ_ONLY = 0x40

# Setpoints that Mellinger does not follow; those of vertical velocity leave it without a thrust: the motors stop.
VERTICAL_VELOCITY = (1, 4, 8)
NOT_FOLLOWED = {1: 'velocity', 2: 'z distance', 3: 'CPPM', 4: 'altitude hold', 5: 'hover', 8: 'velocity',
                9: 'z distance', 10: 'hover'}
# Bytes after the type, where crtp_commander_generic.c asserts them; position setpoints (7) have no such check there.
SETPOINT_SIZES = {None: 1, 1: 16, 2: 16, 4: 16, 5: 16, 6: 28, 8: 16, 9: 16, 10: 16, 11: 15}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkDirection:
    """What the link does to the packets of one direction. Packets are lost, never reordered."""

    loss: float = 0.0  # probability that a packet is lost
    latency: float = 0.0  # s added to every packet
    jitter: float = 0.0  # s, uniform from 0 to this on top of the latency
    garble: float = 0.0  # probability that a packet arrives changed or cut; a radio's checksum prevents it


PERFECT = LinkDirection()


class MalformedPacket(ValueError):
    """A packet that the firmware would not understand."""


class AssertionTripped(MalformedPacket):
    """A packet of a wrong length that the firmware answers by restarting itself (cfassert.c)."""


@dataclass
class LogBlock:
    """A set of variables that is sent together, periodically once started."""

    variables: list[tuple[str, Callable[[], float]]] = field(default_factory=list)  # struct character, getter
    period: float | None = None  # s; None while stopped
    due: float = 0.0  # s, Crazyflie time

    def size(self) -> int:
        return sum(struct.calcsize('<' + character) for character, _ in self.variables)


def decompress_quaternion(word: int) -> tuple[float, float, float, float]:
    """32 bits -> unit quaternion (x, y, z, w), as the firmware's quatcompress.h: 2 bits index of the
    largest component, which is positive and left out, then sign and 9-bit magnitude of the others."""
    largest = word >> 30
    q = [0.0] * 4
    for i in (3, 2, 1, 0):
        if i != largest:
            magnitude = (word & 0x1FF) / 0x1FF * math.sqrt(0.5)
            q[i] = -magnitude if word & 0x200 else magnitude
            word >>= 10
    q[largest] = math.sqrt(max(0.0, 1.0 - sum(c * c for c in q)))
    norm = math.sqrt(sum(c * c for c in q))
    return tuple(c / norm for c in q)


def pack_number(character: str, value: float) -> bytes:
    """`value` in the C type of `character`: integers are truncated and wrap, as a C cast does on the
    firmware's processor."""
    if character in 'fe':
        try:
            return struct.pack('<' + character, value)
        except OverflowError:
            return struct.pack('<' + character, math.copysign(math.inf, value))
    size = struct.calcsize('<' + character)
    number = int(value) if math.isfinite(value) else 0
    return (number % (1 << 8 * size)).to_bytes(size, 'little')


def _unpack(layout: str, data: bytes) -> tuple:
    """struct.unpack of the whole of `data`. An infinity becomes NaN, which the drone takes as the firmware does: it
    has no check, and a NaN in a pose or setpoint stops the motors."""
    if len(data) != struct.calcsize(layout):
        raise MalformedPacket(f'{len(data)} bytes, expected {struct.calcsize(layout)}')
    return tuple(math.nan if isinstance(v, float) and math.isinf(v) else v for v in struct.unpack(layout, data))


class CrtpPeer:
    """One simulated Crazyflie on one UDP address.

    `counts`: packets received, sent, malformed, unsupported (understood, but not simulated),
    lost_up, lost_down, garbled_up, garbled_down. `table_latency` (s) is added to every answer of the tables
    of contents.
    """

    def __init__(self, crazyflie: SimulatedCrazyflie, address: tuple[str, int] = ('127.0.0.1', 19850),
                 up: LinkDirection = PERFECT, down: LinkDirection = PERFECT, seed: int = 0,
                 warn: Callable[[str], None] = _logger.warning):
        """OSError when `address` cannot be opened; ValueError when a variable's name does not fit."""
        self.up, self.down, self.table_latency = up, down, 0.0
        self.counts: Counter[str] = Counter()
        self.client: tuple[str, int] | None = None  # who gets log data and console text
        self._warn, self._warned = warn, {}
        self._rng = np.random.default_rng(seed)
        self._queues = {'up': deque(), 'down': deque()}  # (due s, packet, address)
        self._boot(crazyflie)
        self._handlers = {
            (LINK, 0): self._echo, (LINK, 1): self._link_source, (LINK, 2): self._sink,
            (PLATFORM, 0): self._platform_command, (PLATFORM, 1): self._version,
            (PLATFORM, 2): self._app_channel,
            (LOG, 0): self._log_toc_request, (LOG, 1): self._log_control,
            (MEMORY, 0): self._memory_info, (MEMORY, 1): self._memory_read, (MEMORY, 2): self._memory_write,
            (PARAM, 0): self._parameter_toc_request, (PARAM, 1): self._read_parameter,
            (PARAM, 2): self._write_parameter, (PARAM, 3): self._parameter_misc,
            (COMMANDER, 0): self._rpyt, (GENERIC, 0): self._setpoint, (GENERIC, 1): self._meta_command,
            (HIGH_LEVEL, 0): self._high_level,
            (LOCALIZATION, 0): self._extpos, (LOCALIZATION, 1): self._localization,
            (LOCALIZATION, 2): self._extpos_packed,
            (SUPERVISOR, 0): self._supervisor_info, (SUPERVISOR, 1): self._supervisor_command,
        }
        self._socket = bind_udp(address, 'Crazyflie peer')
        self.address: tuple[str, int] = self._socket.getsockname()

    def _boot(self, crazyflie: SimulatedCrazyflie) -> None:
        self.crazyflie = crazyflie
        self._parameters = list(crazyflie.parameters)
        self._defaults = {name: p.value for name, p in crazyflie.parameters.items()}
        self._variables = list(crazyflie.log_variables)
        self._parameter_toc = _toc({name: PARAM_TYPES[p.ctype] | (READ_ONLY if p.read_only else 0)
                                    for name, p in crazyflie.parameters.items()})
        self._log_toc = _toc({name: LOG_TYPES[ctype] for name, (ctype, _) in crazyflie.log_variables.items()})
        self._blocks: dict[int, LogBlock] = {}
        self._console_lines = 0
        self._group_mask = 0

    def restart(self, crazyflie: SimulatedCrazyflie) -> None:
        """The drone was switched off and on: `crazyflie` takes its place, and knows nothing of a client."""
        self.client = None
        self._warned = {}
        for queue in self._queues.values():
            queue.clear()
        self._boot(crazyflie)

    def close(self) -> None:
        """Release the port."""
        self._socket.close()

    def poll(self) -> None:
        """Handle every packet that has arrived and send what is due at `crazyflie.time`."""
        now = self.crazyflie.time
        for packet, sender in waiting(self._socket):
            self.counts['received'] += 1
            self._delay('up', packet, sender, now)
        for packet, sender in self._arrived('up', now):
            self._handle(packet, sender)
        if self.client is not None:
            self._send_console()
            self._send_log_data(now)
        for packet, receiver in self._arrived('down', now):
            self._transmit(packet, receiver)

    # --- link -------------------------------------------------------------------------------------

    def _delay(self, way: str, packet: bytes, address: tuple[str, int], now: float) -> None:
        """Lose the packet, or queue it for the time (s) it arrives after `now`."""
        link, queue = getattr(self, way), self._queues[way]
        if link.loss and self._rng.random() < link.loss:
            self.counts[f'lost_{way}'] += 1
            return
        if link.garble and self._rng.random() < link.garble:
            self.counts[f'garbled_{way}'] += 1
            packet = self._garbled(packet)
        due = now + link.latency + (link.jitter * self._rng.random() if link.jitter else 0.0)
        queue.append((max(due, queue[-1][0]) if queue else due, packet, address))

    def _garbled(self, packet: bytes) -> bytes:
        """Every third packet is cut, the others have one byte changed."""
        changed = bytearray(packet or b'\0')
        if self._rng.random() < 1.0 / 3.0:
            return bytes(changed[:self._rng.integers(len(changed))])
        changed[self._rng.integers(len(changed))] ^= int(self._rng.integers(1, 256))
        return bytes(changed)

    def _arrived(self, way: str, now: float):
        queue = self._queues[way]
        while queue and queue[0][0] <= now + 1e-9:
            yield queue.popleft()[1:]

    def _transmit(self, packet: bytes, receiver: tuple[str, int]) -> None:
        try:
            self._socket.sendto(packet, receiver)
            self.counts['sent'] += 1
        except OSError as error:  # the client is gone or its buffer is full: a radio would lose it, too
            self.counts['lost_down'] += 1
            self._say('send', f'cannot send to {receiver[0]}:{receiver[1]}: {error.strerror}')

    def _send(self, port: int, channel: int, data: bytes, receiver: tuple[str, int]) -> None:
        packet = bytes([port << 4 | 0x0C | channel]) + data[:MAX_DATA]
        late = self.table_latency if port in (LOG, PARAM) and channel == 0 else 0.0
        self._delay('down', packet, receiver, self.crazyflie.time + late)

    def _handle(self, packet: bytes, sender: tuple[str, int]) -> None:
        if packet == NULL_PACKET:
            self._delay('down', NULL_PACKET, sender, self.crazyflie.time)
            return
        try:
            if not 1 <= len(packet) <= MAX_DATA + 1:
                raise MalformedPacket(f'{len(packet)} bytes, expected 1 to {MAX_DATA + 1}')
            port, channel = packet[0] >> 4, packet[0] & 0x03
            if (port, channel) not in self._handlers:
                raise MalformedPacket('no such port and channel')
            replies = self._handlers[port, channel](packet[1:])
        except MalformedPacket as error:
            self.counts['malformed'] += 1
            if isinstance(error, AssertionTripped):
                self.crazyflie.fail_assertion()
            where = f'port {packet[0] >> 4} channel {packet[0] & 3}' if packet else 'no header'
            self._say('malformed',
                      f'ignored a malformed packet from {sender[0]}:{sender[1]} ({where}): {error}')
            return
        # A new connection begins with the link service; it takes over log data and console.
        if self.client is None or (port, channel) == (LINK, 1):
            self.client = sender
        for reply in replies:
            self._send(*reply, sender)

    def _say(self, kind: str, text: str) -> None:
        """Warn at most once a second (Crazyflie time) of a kind, with the count in between."""
        last, muted = self._warned.get(kind, (-math.inf, 0))
        if self.crazyflie.time - last < 1.0:
            self._warned[kind] = (last, muted + 1)
            return
        self._warn(text + (f' ({muted} more since)' if muted else ''))
        self._warned[kind] = (self.crazyflie.time, 0)

    def _unsupported(self, what: str) -> None:
        self.counts['unsupported'] += 1
        self._say(what, f'{what} is not simulated and has no effect')

    # --- link, platform, memory -------------------------------------------------------------------

    def _echo(self, data):
        return [(LINK, 0, data)]

    def _sink(self, data):
        return []

    def _link_source(self, data):
        return [(LINK, 1, b'Bitcraze Crazyflie'.ljust(MAX_DATA, b'\0'))]

    def _version(self, data):
        command, = _unpack('<B', data[:1])
        answers = {0: bytes([PROTOCOL_VERSION]), 1: FIRMWARE, 2: DEVICE_TYPE}
        if command not in answers:
            raise MalformedPacket(f'version command {command}')
        return [(PLATFORM, 1, bytes([command]) + answers[command])]

    def _platform_command(self, data):
        """Protocols before 12 arm and recover here."""
        command, = _unpack('<B', data[:1])
        if command in (1, 2):
            return [(PLATFORM, 0, bytes([command, *self._arm_or_recover(command, data)]))]
        if command not in (0, 3):  # continuous wave, user notification: nothing to simulate
            raise MalformedPacket(f'platform command {command}')
        return [(PLATFORM, 0, data)]

    def _app_channel(self, data):
        self._unsupported('the app channel')
        return []

    def _memory_info(self, data):
        command, = _unpack('<B', data[:1])
        if command == 0:
            return [(MEMORY, 0, b'\0\0')]
        if command == 1:
            return [(MEMORY, 0, b'\1\0')]  # number of memories: none
        return [(MEMORY, 0, data[:2])]  # details of a memory that is not there

    def _memory_read(self, data):
        memory, address, _ = _unpack('<BIB', data)
        return [(MEMORY, 1, struct.pack('<BIB', memory, address, errno.ENODEV))]

    def _memory_write(self, data):
        memory, address = _unpack('<BI', data[:5])
        return [(MEMORY, 2, struct.pack('<BIB', memory, address, errno.ENODEV))]

    # --- tables of contents, parameters -----------------------------------------------------------

    def _log_toc_request(self, data):
        return self._read_toc(LOG, self._log_toc, data, limits=bytes([MAX_BLOCKS, MAX_VARIABLES]))

    def _parameter_toc_request(self, data):
        return self._read_toc(PARAM, self._parameter_toc, data)

    @staticmethod
    def _read_toc(port, toc, data, limits=b''):
        items, crc = toc
        command, = _unpack('<B', data[:1])
        if command == 3:
            return [(port, 0, struct.pack('<BHI', 3, len(items), crc) + limits)]
        if command != 2:
            raise MalformedPacket(f'TOC command {command}, expected 2 or 3')
        index, = _unpack('<H', data[1:])
        return [(port, 0, data + items[index] if index < len(items) else b'\2')]

    def _parameter(self, data):
        """Parameter named by the 16-bit index that `data` begins with, or None."""
        index, = _unpack('<H', data[:2])
        return self._parameters[index] if index < len(self._parameters) else None

    def _value(self, name: str) -> bytes:
        p = self.crazyflie.parameters[name]
        return pack_number(p.ctype, p.value)

    def _read_parameter(self, data):
        name = self._parameter(data)
        if name is None:
            return [(PARAM, 1, data[:2] + bytes([errno.ENOENT]))]
        return [(PARAM, 1, data[:2] + b'\0' + self._value(name))]

    def _write_parameter(self, data):
        name = self._parameter(data)
        if name is None:
            return [(PARAM, 2, data[:2] + bytes([errno.ENOENT]))]
        if self.crazyflie.parameters[name].read_only:  # the firmware does not answer, either
            self._unsupported(f'writing the read-only parameter {name}')
            return []
        self._set_parameter(name, data[2:])
        return [(PARAM, 2, data[:2] + self._value(name))]  # the old value where the new one was refused

    def _set_parameter(self, name: str, raw: bytes) -> int:
        try:
            self.crazyflie.set_parameter(name, _unpack('<' + self.crazyflie.parameters[name].ctype, raw)[0])
        except ValueError as error:
            self.counts['malformed'] += 1
            self._say('parameter', f'parameter {name} not changed: {error}')
            return errno.EINVAL
        return 0

    def _parameter_misc(self, data):
        command, = _unpack('<B', data[:1])
        if command == 0:
            return self._set_parameter_by_name(data)
        name = self._parameter(data[1:3])
        head = data[:3]
        if command == 6 and name is not None:  # default value, before protocol 11
            return [(PARAM, 3, head + self._default(name))]
        if command == 8 and name is not None:  # default value
            return [(PARAM, 3, head + b'\0' + self._default(name))]
        if command in (2, 3, 4, 5, 6, 7, 8):  # no parameter is persistent or has an extended type
            return [(PARAM, 3, head + bytes([errno.ENOENT]))]
        raise MalformedPacket(f'parameter command {command}')

    def _default(self, name):
        return pack_number(self.crazyflie.parameters[name].ctype, self._defaults[name])

    def _set_parameter_by_name(self, data):
        """[0, group\\0, name\\0, type, value] -> [0, group\\0, name\\0, error]"""
        parts = data[1:].split(b'\0', 2)
        if len(parts) != 3 or not parts[2]:
            raise MalformedPacket('expected group, name, type and value')
        name = b'.'.join(parts[:2]).decode('latin-1')
        parameter = self.crazyflie.parameters.get(name)
        if parameter is None:
            error = errno.ENOENT
        elif parts[2][0] != PARAM_TYPES[parameter.ctype]:
            error = errno.EINVAL
        elif parameter.read_only:
            error = errno.EACCES
        else:
            error = self._set_parameter(name, parts[2][1:])
        return [(PARAM, 3, b'\0' + parts[0] + b'\0' + parts[1] + b'\0' + bytes([error]))]

    # --- log, console -----------------------------------------------------------------------------

    def _log_control(self, data):
        command, = _unpack('<B', data[:1])
        if command == 5:
            self._blocks.clear()
            return [(LOG, 1, bytes([5, 0, 0]))]
        if len(data) < 2:
            raise MalformedPacket('log command without a block')
        block = data[1]
        if command == 6:
            error = self._create_block(block, data[2:])
        elif command == 7:
            error = self._append_to_block(block, data[2:])
        elif command == 2:
            error = 0 if self._blocks.pop(block, None) else errno.ENOENT
        elif command == 3:
            error = self._start_block(block, 0.010 * _unpack('<B', data[2:])[0])
        elif command == 8:
            error = self._start_block(block, 0.001 * _unpack('<H', data[2:])[0])
        elif command == 4:
            error = self._start_block(block, None)
        else:
            error = errno.ENOEXEC
        return [(LOG, 1, bytes([command, block, error]))]

    def _create_block(self, number: int, data: bytes) -> int:
        if number in self._blocks:
            return errno.EEXIST
        if len(self._blocks) >= MAX_BLOCKS:
            return errno.ENOMEM
        self._blocks[number] = LogBlock()
        return self._append_to_block(number, data)

    def _append_to_block(self, number: int, data: bytes) -> int:
        block = self._blocks.get(number)
        if block is None:
            return errno.ENOENT
        # cflib leaves the type byte of a variable that did not fit at the end: whole entries count.
        for kind, index in struct.iter_unpack('<BH', data[:len(data) // 3 * 3]):
            character = _LOG_CHARACTER.get(kind & 0x0F)
            if character is None or index >= len(self._variables):
                return errno.ENOENT
            if block.size() + struct.calcsize('<' + character) > MAX_LOG_BYTES:
                return errno.E2BIG
            if sum(len(b.variables) for b in self._blocks.values()) >= MAX_VARIABLES:
                return errno.ENOMEM
            block.variables.append((character, self.crazyflie.log_variables[self._variables[index]][1]))
        return 0

    def _start_block(self, number: int, period: float | None) -> int:
        block = self._blocks.get(number)
        if block is None:
            return errno.ENOENT
        block.period = period
        block.due = self.crazyflie.time + (period or 0.0)
        return 0

    def _send_log_data(self, now: float) -> None:
        for number, block in self._blocks.items():
            if block.period is None or now < block.due - 1e-9:
                continue
            stamp = int(now * 1000.0) % (1 << 24)  # ms since start
            values = b''.join(pack_number(character, get()) for character, get in block.variables)
            self._send(LOG, 2, bytes([number]) + stamp.to_bytes(3, 'little') + values, self.client)
            if block.period == 0.0:
                block.period = None  # single shot
            else:  # keep the rhythm; after a long step send once, not a burst of equal values
                block.due += block.period * max(1, math.ceil((now - block.due) / block.period))

    def _send_console(self) -> None:
        for line in self.crazyflie.console[self._console_lines:]:
            text = (line.rstrip('\n') + '\n').encode('ascii', 'replace')
            for i in range(0, len(text), MAX_DATA):
                self._send(CONSOLE, 0, text[i:i + MAX_DATA], self.client)
        self._console_lines = len(self.crazyflie.console)

    # --- setpoints --------------------------------------------------------------------------------

    def _rpyt(self, data):
        roll, pitch, yaw_rate, thrust = _unpack('<fffH', data)
        self.crazyflie.set_rpyt(roll, -pitch, yaw_rate, thrust)  # cflib sends the pitch negated
        return []

    def _setpoint(self, data):
        kind = data[0] if data else None
        size = SETPOINT_SIZES.get(kind, len(data) - 1)
        if len(data) - 1 != size:
            raise AssertionTripped(f'setpoint of type {kind} and {max(0, len(data) - 1)} bytes, expected {size}')
        if kind == 0:
            self.crazyflie.stop_setpoint()
        elif kind == 6:
            self._full_state(data[1:])
        elif kind == 7:
            x, y, z, yaw = _unpack('<4f', data[1:])
            self.crazyflie.set_position(np.array([x, y, z]), math.radians(yaw))
        elif kind == 11:
            roll, pitch, yaw_rate, thrust, rate = _unpack('<fffHB', data[1:])
            if rate:
                self._unsupported('a manual setpoint of roll and pitch rates')
            else:
                self.crazyflie.set_rpyt(roll, -pitch, yaw_rate, thrust)
        elif kind in NOT_FOLLOWED:
            if kind in VERTICAL_VELOCITY:
                self.crazyflie.stop_setpoint()
            self._unsupported(f'the {NOT_FOLLOWED[kind]} setpoint (type {kind}), which the Mellinger '
                              'controller does not follow,')
        else:  # the firmware takes it for a setpoint without any mode
            self.crazyflie.stop_setpoint()
            raise MalformedPacket(f'setpoint type {kind}')
        return []

    def _full_state(self, data):
        numbers = _unpack('<9hI3h', data)
        milli = np.array(numbers[:9] + numbers[10:]) / 1000.0  # mm, mm/s, mm/s^2, mrad/s
        self.crazyflie.set_full_state(milli[0:3], milli[3:6], milli[6:9],
                                      np.array(decompress_quaternion(numbers[9])), milli[9:12])

    def _meta_command(self, data):
        command, = _unpack('<B', data[:1])
        if command != 0:
            raise MalformedPacket(f'meta command {command}')
        if len(data) != 5:
            raise AssertionTripped(f'notify-stop of {len(data)} bytes, expected 5')
        self.crazyflie.notify_setpoint_stop(*_unpack('<I', data[1:]))
        return []

    def _high_level(self, data):
        """[command, group mask, ...] -> the request's first three bytes and an errno."""
        if not data:
            raise MalformedPacket('no command')
        head, result = data[:3].ljust(3, b'\0'), 0
        command, body = data[0], data[1:]
        mask = body[0] if body else 0
        if command == 0:
            self._group_mask, = _unpack('<B', body)
        elif mask == 0 or mask & self._group_mask:
            result = self._high_level_command(command, body)
        return [(HIGH_LEVEL, 0, head + bytes([result]))]

    def _high_level_command(self, command: int, body: bytes) -> int:
        crazyflie = self.crazyflie
        if command in (1, 2):  # take off, land: before 2023, to yaw 0
            _, height, duration = _unpack('<Bff', body)
            return (crazyflie.takeoff if command == 1 else crazyflie.land)(height, duration, 0.0)
        if command in (7, 8):
            _, height, yaw, current_yaw, duration = _unpack('<Bff?f', body)
            return (crazyflie.takeoff if command == 7 else crazyflie.land)(
                height, duration, None if current_yaw else yaw)
        if command == 3:
            _unpack('<B', body)
            return crazyflie.high_level_stop()
        if command in (4, 12):
            linear = False
            if command == 4:
                _, relative, x, y, z, yaw, duration = _unpack('<BBfffff', body)
            else:
                _, relative, linear, x, y, z, yaw, duration = _unpack('<BBBfffff', body)
            if not linear:
                return crazyflie.go_to(np.array([x, y, z]), yaw, duration, bool(relative))
        self._unsupported(f'the high-level command {command}' + (' (linear)' if command == 12 else ''))
        return errno.ENOEXEC

    # --- localization, supervisor -----------------------------------------------------------------

    def _extpos(self, data):
        self.crazyflie.receive_extpos(np.array(_unpack('<fff', data)))
        return []

    def _localization(self, data):
        kind, = _unpack('<B', data[:1])
        if kind == 8:
            pose = _unpack('<7f', data[1:])
            self._extpose(pose[:3], pose[3:])
        elif kind == 9:
            for number, x, y, z, q in self._items('<BhhhI', data[1:]):
                if number == RADIO_ID:
                    self._extpose((x / 1000.0, y / 1000.0, z / 1000.0), decompress_quaternion(q))
        elif kind == 3:
            self.crazyflie.emergency_stop()
        elif kind == 4:
            self.crazyflie.emergency_watchdog()
        elif kind in (2, 11):
            self._unsupported(f'the localization packet {kind}')
        else:
            raise MalformedPacket(f'localization type {kind}')
        return []

    def _extpose(self, position, quaternion):
        norm = math.sqrt(sum(c * c for c in quaternion)) or math.nan  # of no length: no attitude, so no number
        self.crazyflie.receive_extpose(np.array(position), np.array(quaternion) / norm)

    def _extpos_packed(self, data):
        for number, x, y, z in self._items('<Bhhh', data):
            if number == RADIO_ID:
                self.crazyflie.receive_extpos(np.array([x, y, z]) / 1000.0)
        return []

    @staticmethod
    def _items(layout, data):
        if not data or len(data) % struct.calcsize(layout):
            raise MalformedPacket(f'{len(data)} bytes, expected a multiple of {struct.calcsize(layout)}')
        return struct.iter_unpack(layout, data)

    def _supervisor_info(self, data):
        command, = _unpack('<B', data[:1])
        bits = self.crazyflie.supervisor_info
        if command == 0x0C:
            return [(SUPERVISOR, 0, struct.pack('<BH', 0x80 | command, bits))]
        if not 1 <= command <= 11:
            raise MalformedPacket(f'supervisor information {command}')
        return [(SUPERVISOR, 0, bytes([0x80 | command, bits >> (command - 1) & 1]))]

    def _supervisor_command(self, data):
        command, = _unpack('<B', data[:1])
        if command in (1, 2):
            return [(SUPERVISOR, 1, bytes([0x80 | command, *self._arm_or_recover(command, data)]))]
        if command == 3:
            self.crazyflie.emergency_stop()
        elif command == 4:
            self.crazyflie.emergency_watchdog()
        else:
            raise MalformedPacket(f'supervisor command {command}')
        return []

    def _arm_or_recover(self, command: int, data: bytes) -> tuple[int, int]:
        """(accepted, state after it): armed for 1, not crashed for 2."""
        if command == 2:
            accepted = self.crazyflie.recover()
            return int(accepted), int(not self.crazyflie.crashed)
        _, on = _unpack('<B?', data)
        return int(self.crazyflie.arm(on)), int(self.crazyflie.armed)


def _toc(types: dict[str, int]) -> tuple[list[bytes], int]:
    """{'group.name': type byte} -> items (type, group\\0, name\\0) in order, and their checksum, by
    which cflib caches the table."""
    items = []
    for name, kind in types.items():
        group, _, variable = name.partition('.')
        item = bytes([kind]) + group.encode() + b'\0' + variable.encode() + b'\0'
        if not group or not variable or len(item) > 27:
            raise ValueError(f'variable name {name!r}: expected group.name of at most 25 characters')
        items.append(item)
    return items, zlib.crc32(b''.join(items))
