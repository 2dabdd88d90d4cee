"""The NatNet server, held against the `natnet` and `natnetclient` packages as independent clients."""

import random
import socket
import struct
import time

import natnet as natnet_client
import numpy as np
import pytest

from deqmpc.dynamics import rotation
from sim_env import natnet_packets
from sim_env.natnet_packets import VERSIONS, Body
from sim_env.natnet_server import NatNetServer, NatNetSettings

WAIT = 20.0  # s, for an event that takes milliseconds on an idle machine
BODIES = (Body('cf1', 1, ((0.03, 0.0, 0.01), (-0.02, 0.02, 0.0), (0.0, -0.03, 0.02))), Body('wand', 7))
POSE = (np.array([1.0, -2.0, 0.5]), rotation.normalize(np.array([0.1, -0.2, 0.3, 0.9])))


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Pair:
    """A server and a `natnet` client, both in this thread; the server's clock stands at `now`."""

    def __init__(self, **settings):
        self.now = 100.0
        data_port = free_port()
        self.server = NatNetServer(BODIES, NatNetSettings(command_port=0, data_port=data_port, **settings))
        self.client = natnet_client.NatNetClient(
            command_port=self.server.address[1], data_port=data_port,
            use_multicast=self.server.settings.multicast)
        self.frames, self.models = [], []
        self.client.on_data_frame_received_event.handlers.append(self.frames.append)
        self.client.on_data_description_received_event.handlers.append(self.models.append)

    def __enter__(self):
        # connect() blocks until the answer is there, so ask and answer before it looks.
        original = self.client.send_request

        def send_and_answer(*arguments):
            result = original(*arguments)
            self.server.poll(self.now)
            return result
        self.client.send_request = send_and_answer
        self.client.connect(timeout=WAIT)
        return self

    def __exit__(self, *_):
        self.client.shutdown()
        self.server.close()

    def receive(self, what, count=1):
        end = time.monotonic() + WAIT
        while len(what) < count:
            assert time.monotonic() < end, f'{len(what)} of {count} received'
            self.client.update_sync()
        return what


@pytest.mark.parametrize('multicast', [False, True], ids=['unicast', 'multicast'])
@pytest.mark.parametrize('version', VERSIONS, ids=lambda v: f'NatNet{v[0]}.{v[1]}')
def test_the_natnet_client_reads_models_and_frames_as_they_were_sent(version, multicast):
    with Pair(version=version, multicast=multicast) as pair:
        info = pair.client.server_info
        assert (info.nat_net_protocol_version.major, info.nat_net_protocol_version.minor) == version
        pair.client.request_modeldef()
        model, = pair.receive(pair.models)
        assert [(b.name, b.id_num) for b in model.rigid_bodies] == [('cf1', 1), ('wand', 7)]
        assert [m.pos for m in model.rigid_bodies[0].markers] == [pytest.approx(m) for m in BODIES[0].markers]
        pair.server.send_frame(42, 100.0, {'cf1': POSE, 'wand': None}, now=100.0065)
        frame, = pair.receive(pair.frames)
        assert frame.prefix.frame_number == 42
        cf1, wand = frame.rigid_bodies
        assert (cf1.id_num, cf1.tracking_valid, wand.id_num, wand.tracking_valid) == (1, True, 7, False)
        assert cf1.pos == pytest.approx(POSE[0]) and cf1.rot == pytest.approx(POSE[1], abs=1e-7)
        assert frame.suffix.timestamp == 100.0
        assert frame.suffix.stamp_camera_mid_exposure == 1_000_000_000
        assert frame.suffix.stamp_transmit - frame.suffix.stamp_camera_mid_exposure == 65_000
        expected = [POSE[0] + rotation.rotate(POSE[1], np.array(m)) for m in BODIES[0].markers]
        assert [m.pos for m in frame.labeled_markers] == [pytest.approx(m) for m in expected]
        assert [(m.model_id, m.marker_id) for m in frame.labeled_markers] == [(1, 1), (1, 2), (1, 3)]
        assert [s.model_name for s in frame.marker_sets] == ['cf1', 'all']


@pytest.mark.parametrize('version', VERSIONS, ids=lambda v: f'NatNet{v[0]}.{v[1]}')
def test_no_byte_of_a_frame_is_left_over_or_missing(version):
    # natnet stops before the end and skips 4.1's precision timestamp, so the tail is read here.
    with Pair(version=version) as pair:
        pair.server.send_frame(1, 12.25, {'cf1': POSE, 'wand': POSE})
        packet = pair.server._last_frame(version)
    tail = struct.Struct('<dQQQ' + ('II' if version >= (4, 1) else '') + 'hi')
    timestamp, exposure, received, transmitted, *rest = tail.unpack(packet[-tail.size:])
    assert (timestamp, exposure, received, transmitted) == (12.25, *[122_500_000] * 3)
    assert rest == ([12, 2**30] if version >= (4, 1) else []) + [0, 0]
    assert struct.unpack_from('<HH', packet) == (7, len(packet) - 4)
    assert len(natnet_packets.server_info(version, 'x', 1, 1511, None)) == 283


def test_y_up_axes_are_turned_back_by_the_rotation_that_motive_documents():
    quarter = rotation.normalize(np.array([1.0, 0.0, 0.0, 1.0]))  # y-up -> z-up: 90 degrees about x
    with Pair(y_up=True) as pair:
        pair.server.send_frame(1, 1.0, {'cf1': POSE})
        body = pair.receive(pair.frames)[0].rigid_bodies[0]
        marker = pair.frames[0].labeled_markers[0]
    assert rotation.rotate(quarter, np.array(body.pos)) == pytest.approx(POSE[0], abs=1e-6)
    turned = rotation.multiply(rotation.multiply(quarter, np.array(body.rot)), rotation.conjugate(quarter))
    assert turned == pytest.approx(POSE[1], abs=1e-6)
    assert rotation.rotate(quarter, np.array(marker.pos)) == pytest.approx(
        POSE[0] + rotation.rotate(POSE[1], np.array(BODIES[0].markers[0])), abs=1e-6)


def test_a_body_that_is_lost_keeps_its_last_pose_and_only_the_bit_tells():
    with Pair() as pair:
        pair.server.send_frame(1, 1.0, {'cf1': POSE})
        pair.server.send_frame(2, 1.01, {})
        tracked, lost = (f.rigid_bodies[0] for f in pair.receive(pair.frames, 2))
    assert (tracked.tracking_valid, lost.tracking_valid) == (True, False)
    assert lost.pos == tracked.pos


def ask(server, packet, now=0.0):
    """The server's answers to one packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setblocking(False)
        s.sendto(packet, server.address)
        end = time.monotonic() + WAIT
        before = server.counts['requests']
        while server.counts['requests'] == before:
            assert time.monotonic() < end
            server.poll(now)
        try:
            return s.recv(65536)
        except BlockingIOError:
            return None


@pytest.fixture
def server():
    server = NatNetServer(BODIES, NatNetSettings(command_port=0, version=(4, 0)))
    yield server
    server.close()


def test_echo_returns_the_clients_time_and_the_servers_clock(server):
    answer = ask(server, natnet_packets.message(12, struct.pack('<Q', 123456789)), now=2.5)
    assert struct.unpack('<HHQQ', answer) == (13, 16, 123456789, 25_000_000)


def test_remote_commands_answer_as_motive(server):
    def command(text):
        answer = ask(server, natnet_packets.message(2, text + b'\0'))
        return struct.unpack_from('<H', answer)[0], answer[4:]
    assert command(b'FrameRate') == (3, struct.pack('<f', 100.0))
    assert command(b'UpAxis') == (3, struct.pack('<i', 2))
    assert command(b'UnitsToMillimeters') == (3, struct.pack('<f', 1000.0))
    assert command(b'Bitstream,3.1') == (3, struct.pack('<i', 0))
    assert command(b'Bitstream,2.10') == (3, struct.pack('<i', 1))
    assert command(b'StartRecording') == (100, b'')


def test_bitstream_changes_the_version_of_that_client_alone():
    with Pair() as pair, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
        old.settimeout(WAIT)
        old.sendto(natnet_packets.message(2, b'Bitstream,3.0\0'), pair.server.address)
        while old.getsockname()[1] not in [port for _, port in pair.server.clients]:
            pair.server.poll(100.0)
        assert old.recv(100)
        pair.server.send_frame(1, 1.0, {'cf1': POSE})
        assert old.recv(65536)[4:] == natnet_packets.frame(
            (3, 0), 1, [pair.server._sample(BODIES[0], POSE), pair.server._sample(BODIES[1], None)],
            1.0, 10_000_000, 10_000_000, 10_000_000)[4:]
        assert pair.receive(pair.frames)[0].rigid_bodies[0].pos == pytest.approx(POSE[0])


def test_a_client_that_falls_silent_gets_no_more_frames_and_a_keepalive_keeps_it(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(('127.0.0.1', 0))
        for i, (now, kind) in enumerate([(0.0, 0), (9.0, 10)]):
            s.sendto(natnet_packets.message(kind), server.address)
            while server.counts['requests'] <= i:
                server.poll(now)
            assert server.clients == {s.getsockname(): now}
        server.poll(18.9)
        assert server.clients
        server.poll(19.1)
        assert not server.clients
        server.send_frame(1, 19.2, {})
        assert server.counts['frames'] == 0


def test_ten_thousand_random_and_mutated_requests_do_not_stop_the_server():
    said = []
    server = NatNetServer(BODIES, NatNetSettings(command_port=0), warn=said.append)
    rng = random.Random(0)
    seeds = [natnet_packets.message(n, p) for n, p in [
        (0, b'Ping\0'), (2, b'FrameRate\0'), (2, b'Bitstream,4.0\0'), (4, b''), (6, b''), (9, b''), (10, b''),
        (12, bytes(8)), (14, b'')]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for i in range(10_000):
            packet = bytearray(rng.choice(seeds)) if i % 2 else bytearray(rng.randbytes(rng.randrange(0, 64)))
            for _ in range(rng.randrange(0, 3)):
                if packet:
                    packet[rng.randrange(len(packet))] = rng.randrange(256)
            length = rng.randrange(len(packet) + 1) if rng.random() < 0.2 else len(packet)
            s.sendto(packet[:length], server.address)
            if i % 20 == 19:
                server.poll(1e-3 * i)
                server.send_frame(i, 1e-3 * i, {'cf1': POSE})
        while server.counts['requests'] < 10_000:
            server.poll(10.0)
    assert server.counts['malformed'] > 3000
    assert len(said) <= 11  # 10 s, at most one a second
    server.close()


def test_an_occupied_port_is_named(server):
    with pytest.raises(OSError, match=f'NatNet server: cannot open UDP 127.0.0.1:{server.address[1]}'):
        NatNetServer(BODIES, NatNetSettings(command_port=server.address[1]))


@pytest.mark.parametrize('bodies, settings, said', [
    (BODIES, {'version': (2, 9)}, 'NatNet version'), ((Body('a', 1), Body('a', 2)), {}, 'same name'),
    ((Body('a', 1), Body('b', 1)), {}, 'same id'),
    (BODIES, {'multicast': True, 'group': '10.0.0.1'}, 'multicast')])
def test_settings_that_cannot_be_served_are_named(bodies, settings, said):
    with pytest.raises(ValueError, match=said):
        NatNetServer(bodies, NatNetSettings(command_port=0, **settings))


def test_an_unknown_body_is_named(server):
    with pytest.raises(KeyError, match="'cf2'"):
        server.send_frame(1, 0.0, {'cf2': POSE})


def test_natnetclient_asks_as_the_server_understands_but_cannot_read_a_natnet_3_server(server):
    """natnetclient 0.8.3 expects the 264-byte SERVERINFO of NatNet 2; since 3.0 it has 279 bytes, with the
    clock frequency that time stamps need. So no NatNet 3 or 4 server can serve it."""
    natnetclient = pytest.importorskip('natnetclient.natnet')
    client = natnetclient.NatCommSocket('127.0.0.1', server.address[1])
    client.send(natnetclient.NAT_PING, sleep_time=0.0)
    while not server.counts['requests']:
        server.poll(0.0)
    packet = client.recv()
    assert packet.iMessage == natnet_packets.SERVERINFO and packet.nDataBytes == 279
    with pytest.raises(struct.error):  # what NatClient.ping does with the answer
        struct.unpack('256s4B4B', packet._packet[4:])
    client._sock.close()
