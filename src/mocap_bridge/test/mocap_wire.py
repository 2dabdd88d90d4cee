"""A second, independent writing of the NatNet layouts, from the field tables of the facts: what a server
sends, for the tests of this package. Nothing here is shared with the code under test."""

import socket
import struct

FREQUENCY = 10_000_000  # Hz
VERSIONS = ((3, 0), (3, 1), (4, 0), (4, 1), (4, 2))


def packet(kind, payload):
    return struct.pack('<HH', kind, len(payload)) + payload


def text(s):
    return s.encode() + b'\0'


def server_info(version=(4, 1), data_port=1511, multicast=False, group='239.255.42.99', frequency=FREQUENCY):
    return packet(1, struct.pack('<256s8BQHB4B', b'Motive', 3, 1, 0, 0, *version, 0, 0, frequency, data_port,
                                 multicast, *map(int, group.split('.'))))


def body(i, position=(0.1, 0.2, 0.3), quaternion=(0.0, 0.0, 0.0, 1.0), error=2e-4, flags=1):
    return struct.pack('<i3f4ffh', i, *position, *quaternion, error, flags)


def frame(number=1, bodies=(), version=(4, 1), exposure=1.0, transmit=None, flags=0, markers=2, rich=False):
    """`bodies` are results of body(); times in s of the server's clock. `rich` fills every section."""
    def section(count, data):
        size = struct.pack('<i', len(data)) if version >= (4, 1) else b''
        return struct.pack('<i', count) + size + data
    point = struct.pack('<3f', 1.0, 2.0, 3.0)
    labelled = b''.join(struct.pack('<i4fhf', k, 1.0, 2.0, 3.0, 0.012, 10, 1e-4) for k in range(markers))
    plates = struct.pack('<iiiffi', 5, 2, 2, 0.5, 0.25, 0)
    out = struct.pack('<i', number)
    out += section(1, text('all') + struct.pack('<i', markers) + markers * point)
    out += section(markers, markers * point)
    out += section(len(bodies), b''.join(bodies))
    out += section(1, struct.pack('<ii', 9, 2) + body(1) + body(2)) if rich else section(0, b'')
    if version >= (4, 1):
        marker = struct.pack('<i4fhf', 7, 1.0, 2.0, 3.0, 0.01, 0, 1e-4)
        asset = struct.pack('<ii', 3, 1) + body(4) + struct.pack('<i', 1) + marker
        out += section(1, asset) if rich else section(0, b'')
    out += section(markers, labelled)
    out += section(1, plates) if rich else section(0, b'')
    out += section(1, plates) if rich else section(0, b'')
    transmit = exposure + 0.004 if transmit is None else transmit
    ticks = [round(t * FREQUENCY) for t in (exposure, 0.5 * (exposure + transmit), transmit)]
    out += struct.pack('<IId3Q', 0, 0, exposure, *ticks)
    if version >= (4, 1):
        out += struct.pack('<II', 0xABCD, 0xFFFF)  # precision timestamp: as flags it would read 'changed'
    return packet(7, out + struct.pack('<hi', flags, 0))


def rigid_body_description(name, i, version, markers=3):
    out = text(name) + struct.pack('<ii3f', i, -1, 0.0, 0.0, 0.0)
    if version >= (4, 2):
        out += struct.pack('<4f', 0.0, 0.0, 0.0, 1.0)
    out += struct.pack('<i', markers) + struct.pack('<3f', 0.01, 0.02, 0.03) * markers
    out += struct.pack('<i', 0) * markers
    if version >= (4, 0):
        out += b''.join(text(f'{name}_{k}') for k in range(markers))
    return out


def models(names, version=(4, 1), rich=False):
    """`names`: {name: id}. `rich` puts descriptions of other kinds around the rigid bodies."""
    parts = [(1, rigid_body_description(n, i, version)) for n, i in names.items()]
    if rich:
        parts.insert(0, (0, text('all') + struct.pack('<i', 2) + text('a') + text('b')))
        skeleton = text('Anna') + struct.pack('<ii', 8, 1) + rigid_body_description('hip', 1, version)
        parts.insert(1, (2, skeleton))
        parts.insert(1, (4, struct.pack('<i', 2) + text('NI') + text('s1') + struct.pack('<iii', 0, 0, 1)
                         + text('ch')))
        parts.append((5, text('Prime 13') + struct.pack('<7f', 1, 2, 3, 0, 0, 0, 1)))
    out = struct.pack('<i', len(parts))
    for kind, data in parts:
        out += struct.pack('<i', kind)
        if version >= (4, 1):
            out += struct.pack('<i', len(data))
        out += data
    return packet(5, out)


class Server:
    """A scripted server on a free loopback port: answer() serves what has come, send() streams a frame."""

    def __init__(self, names=None, version=(4, 1), address='127.0.0.1', clock=lambda: 0.0, up=2,
                 port=0, **info):
        self.names = {'cf1': 1} if names is None else names
        self.version, self.clock, self.info = version, clock, info
        self.address, self.port, self.up = address, port, up
        self.open()

    def open(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((self.address, self.port))
        self.port = self.socket.getsockname()[1]
        self.socket.settimeout(0.0)
        self.client, self.requests = None, []

    def answer(self):
        while True:
            try:
                data, sender = self.socket.recvfrom(4096)
            except BlockingIOError:
                return
            kind = struct.unpack_from('<H', data)[0]
            self.requests.append(kind)
            if kind == 0:
                self.client = sender
                self.socket.sendto(server_info(self.version, **self.info), sender)
            elif kind == 4 and len(data) == 8:  # as Motive 3.1: no mask, no answer
                self.socket.sendto(models(self.names, self.version, rich=True), sender)
            elif kind == 12:
                ticks = struct.pack('<Q', round(self.clock() * FREQUENCY))
                self.socket.sendto(packet(13, data[4:12] + ticks), sender)
            elif kind == 2:
                self.socket.sendto(packet(3, struct.pack('<i', self.up)), sender)

    def send(self, data):
        if self.client is not None:
            self.socket.sendto(data, self.client)

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
