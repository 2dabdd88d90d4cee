"""The packet readers against an independent writer, against each other, and against damage."""

import random
import socket
import struct
import threading
import time
import tracemalloc

import mocap_wire as wire
import pytest

from mocap_bridge.protocol import MalformedPacket, server_info, split
from mocap_bridge.session import PARSERS, ClientSettings, MocapError, Session


@pytest.fixture(params=sorted(PARSERS))
def parser(request):
    if request.param == 'natnet':
        pytest.importorskip('natnet')
    return PARSERS[request.param]()


@pytest.mark.parametrize('rich', [False, True])
@pytest.mark.parametrize('version', wire.VERSIONS)
def test_a_frame_is_read_as_it_was_written(parser, version, rich):
    bodies = [wire.body(7, (1.0, 2.0, 3.0), (0.5, -0.5, 0.5, 0.5), 0.25, 1), wire.body(-3, flags=0)]
    data = wire.frame(42, bodies, version, exposure=123.5, flags=0, rich=rich)
    f = parser.frame(split(data)[1], version)
    assert f.number == 42 and not f.models_changed
    assert [b.id for b in f.bodies] == [7, -3]
    assert [b.valid for b in f.bodies] == [True, False]
    assert tuple(f.bodies[0].position) == (1.0, 2.0, 3.0)
    assert tuple(f.bodies[0].quaternion) == (0.5, -0.5, 0.5, 0.5)
    assert f.bodies[0].mean_error == 0.25
    assert (f.exposure, f.transmit) == (1_235_000_000, 1_235_040_000)
    assert parser.frame(split(wire.frame(1, version=version, flags=2))[1], version).models_changed


@pytest.mark.parametrize('version', wire.VERSIONS)
def test_model_definitions_give_names_and_ids(parser, version):
    names = {'cf1': 1, 'cf2': 231, 'Körper 3': 3}
    assert parser.models(split(wire.models(names, version, rich=True))[1], version) == names


def test_server_info_is_read_as_it_was_written():
    info = server_info(split(wire.server_info((4, 1), 1600, True, '239.1.2.3', 12_345_678))[1])
    assert (info.version, info.data_port, info.multicast) == ((4, 1), 1600, True)
    assert (info.multicast_group, info.clock_frequency, info.name) == ('239.1.2.3', 12_345_678, 'Motive')


def test_a_section_that_grows_in_a_later_4_x_does_not_shift_what_follows():
    parser = PARSERS['native']()
    data = wire.frame(5, [wire.body(1) + bytes(6), wire.body(2) + bytes(6)], (4, 1))
    f = parser.frame(split(data)[1], (4, 5))
    assert [b.id for b in f.bodies] == [1, 2] and f.exposure == wire.FREQUENCY


@pytest.mark.parametrize('version', [(3, 0), (4, 1)])
def test_a_truncated_frame_is_malformed_at_every_length(parser, version):
    payload = split(wire.frame(1, [wire.body(1)], version, rich=True))[1]
    for n in range(len(payload)):
        with pytest.raises(MalformedPacket):
            parser.frame(payload[:n], version)


@pytest.mark.parametrize('client, packets', [('native', 10_000), ('natnet', 2_000)])
def test_ten_thousand_mutated_packets_are_counted_and_survived(client, packets):
    if client == 'natnet':
        pytest.importorskip('natnet')
    rng = random.Random(7)
    for version in ((3, 0), (4, 1)):
        session = streaming_session(version, client)
        seeds = [wire.frame(3, [wire.body(1)], version, rich=True), wire.server_info(version),
                 wire.models({'cf1': 1}, version, rich=True), wire.packet(13, bytes(16))]
        tracemalloc.start()
        for k in range(packets // 2):
            session.datagram(mutated(rng, seeds[k % len(seeds)]), 1e-3 * k, 1e-3 * k)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert session.counters.malformed > packets // 20
        assert peak < 4e6
        # and it still works
        session.datagram(wire.server_info(version), 6.0, 6.0)
        session.datagram(wire.models({'cf1': 1}, version), 6.0, 6.0)
        assert session.datagram(wire.frame(4, [wire.body(1)], version), 6.0, 6.0).bodies['cf1'].valid


def streaming_session(version=(4, 1), client='native', names=None):
    session = Session(ClientSettings(client=client))
    session.outgoing(0.0, 0.0)
    session.datagram(wire.server_info(version), 0.0, 0.0)
    session.datagram(wire.models(names or {'cf1': 1}, version), 0.0, 0.0)
    assert session.models
    return session


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.random(), rng.randrange(len(data))
        if kind < 0.4:
            data[at] = rng.randrange(256)
        elif kind < 0.6 and len(data) >= at + 4:
            lie = rng.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
            data[at:at + 4] = struct.pack('<I', lie)
        elif kind < 0.8:
            del data[at:]
        else:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        if not data:
            return b''
    if rng.random() < 0.7 and len(data) >= 4:  # an honest length, so that the damage reaches the readers
        struct.pack_into('<H', data, 2, min(len(data) - 4, 0xFFFF))
    return bytes(data)


def test_a_count_of_four_billion_costs_neither_time_nor_memory(parser):
    lie = struct.pack('<I', 0xFFFFFFFF)
    start = time.process_time()
    tracemalloc.start()
    for version in ((3, 0), (4, 1)):
        payload = split(wire.frame(1, [wire.body(1)], version, rich=True))[1]
        for at in range(len(payload) - 4):
            try:
                parser.frame(payload[:at] + lie + payload[at + 4:], version)
            except MalformedPacket:
                pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert time.process_time() - start < 20.0  # a loop of four billion would be hours


# --- why the libraries are not the default ----------------------------------------------------------

def test_natnet_itself_misreads_the_flags_of_a_4_1_frame():
    natnet, buffer, version = natnet_modules()
    payload = split(wire.frame(1, [wire.body(1)], (4, 1), flags=0))[1]
    suffix = natnet.DataFrame.read_from_buffer(buffer.PacketBuffer(payload), version.Version(4, 1)).suffix
    assert suffix.param == 0xABCD  # the first half of the precision timestamp; the flags sent were 0


def test_natnet_itself_allocates_what_a_packet_claims():
    natnet, buffer, version = natnet_modules()
    claim = 300_000  # floats in a packet of 100 bytes; the field allows 2^32
    empty = struct.pack('<i', 0)
    payload = struct.pack('<i', 1) + 5 * empty + struct.pack('<iiiI', 1, 1, 1, claim)
    tracemalloc.start()
    with pytest.raises(struct.error):
        natnet.DataFrame.read_from_buffer(buffer.PacketBuffer(payload), version.Version(3, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > claim


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_natnet_itself_loses_its_receiving_thread_to_one_malformed_packet():
    natnet, *_ = natnet_modules()
    with wire.Server() as server:
        client = natnet.NatNetClient('127.0.0.1', '127.0.0.1', command_port=server.port, use_multicast=False)
        serving = threading.Thread(target=lambda: (time.sleep(0.05), server.answer()))
        serving.start()
        client.connect(timeout=5.0)
        serving.join()
        before = set(threading.enumerate())
        client.run_async()
        threads = set(threading.enumerate()) - before
        server.send(wire.frame(1, [wire.body(1)])[:60])
        deadline = time.monotonic() + 5.0
        while all(t.is_alive() for t in threads) and time.monotonic() < deadline:
            time.sleep(0.01)
        dead = [t for t in threads if not t.is_alive()]
        client.shutdown()
    assert len(threads) == 2 and len(dead) == 1


def test_natnet_itself_does_not_tell_the_clock_frequency():
    _, buffer, version = natnet_modules()
    payload = buffer.PacketBuffer(split(wire.server_info())[1])
    server_info_class = pytest.importorskip('natnet.server_info').ServerInfo
    info = server_info_class.read_from_buffer(payload, version.Version(4, 1))
    assert info._fields == ('application_name', 'server_version', 'nat_net_protocol_version')


def natnet_modules():
    return tuple(pytest.importorskip(name) for name in ('natnet', 'natnet.packet_buffer', 'natnet.version'))


def natnetclient(name='cf1'):
    """natnetclient past its constructor, with the model it would have fetched."""
    pytest.importorskip('natnetclient')
    from natnetclient import natnet, tracker
    client = natnet.NatClient.__new__(natnet.NatClient)
    client.natnet_version = (3, 0, 0, 0)
    client.labeled_markers, client.marker_sets = {}, {}
    marker_set = tracker.MarkerSet('all')
    marker_set.markers = [tracker.Marker(), tracker.Marker()]
    client.marker_sets['all'] = marker_set
    client.rigid_bodies_by_id = {1: tracker.RigidBody(name, id=1)}
    return natnet, client


def test_natnetclient_cannot_connect_to_a_server_of_3_0_or_later():
    natnet, client = natnetclient()

    class Answering:
        def get_data(self, _):
            return natnet.NatPacket(wire.server_info((3, 0)))
    client.comm_sock = Answering()
    with pytest.raises(struct.error, match='264'):
        client.ping()


def test_natnetclient_cannot_read_a_frame_of_3_0_or_later():
    natnet, client = natnetclient()

    class Streaming:
        def recv(self):
            return natnet.NatPacket(wire.frame(1, [wire.body(1)], (3, 0)))
    client.data_sock = Streaming()
    # it takes the mean error of a body for a number of markers, as 2.x had it there
    with pytest.raises(struct.error):
        client.get_data()


def test_natnetclient_does_not_hear_multicast_on_linux():
    pytest.importorskip('natnetclient')
    from natnetclient.natnet import NatDataSocket
    with wire.Server() as free:
        port = free.port
    library = NatDataSocket('127.0.0.1', port)._sock
    own, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with library, own, sender:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(('239.255.42.99', port))
        membership = socket.inet_aton('239.255.42.99') + socket.inet_aton('127.0.0.1')
        own.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        own.settimeout(5.0)
        library.settimeout(0.2)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))
        sender.sendto(b'frame', ('239.255.42.99', port))
        assert own.recv(100) == b'frame'
        with pytest.raises(TimeoutError):
            library.recv(100)


def test_natnetclient_is_refused_with_the_reason():
    with pytest.raises(MocapError, match='3.0 and later'):
        ClientSettings(client='natnetclient')
