"""The conversation with a server, without sockets, and the client over real ones."""

import socket
import struct
import time

import mocap_wire as wire
import numpy as np
import pytest

from mocap_bridge.client import NatNetClient
from mocap_bridge.session import ClientSettings, MocapError, Session

CONNECT, REQUEST, MODELDEF_REQUEST, KEEPALIVE, ECHO = 0, 2, 4, 10, 12


def kinds(datagrams):
    return [struct.unpack_from('<H', d)[0] for d in datagrams]


def up_axis_answer(axis):
    return wire.packet(3, struct.pack('<i', axis))


def connected(version=(4, 1), names=None, **settings):
    s = Session(ClientSettings(**settings))
    s.outgoing(0.0, 0.0)
    s.datagram(wire.server_info(version), 0.0, 0.0)
    s.datagram(wire.models(names or {'cf1': 1}, version), 0.0, 0.0)
    return s


def test_connecting_is_tried_again_with_a_pause_that_doubles_up_to_two_seconds():
    s = Session(ClientSettings())
    times = [k * 0.01 for k in range(1500) if CONNECT in kinds(s.outgoing(k * 0.01, 0.0))]
    np.testing.assert_allclose(np.diff(times)[:6], [0.1, 0.2, 0.4, 0.8, 1.6, 2.0], atol=0.011)


def test_models_are_asked_for_in_both_ways_until_they_come():
    s = Session(ClientSettings())
    s.outgoing(0.0, 0.0)
    s.datagram(wire.server_info(), 0.0, 0.0)
    asked = [d for k in range(100) for d in s.outgoing(k * 0.01, 0.0) if kinds([d]) == [MODELDEF_REQUEST]]
    assert [len(d) for d in asked] == [8, 4]
    assert struct.unpack('<i', asked[0][4:]) == (2,)
    s.datagram(wire.models({'cf1': 1}), 1.0, 1.0)
    assert MODELDEF_REQUEST not in kinds(d for k in range(100) for d in s.outgoing(1.0 + k * 0.01, 0.0))


def test_models_are_asked_for_again_when_the_server_says_that_they_changed():
    s = connected()
    s.datagram(wire.frame(1, [wire.body(1)], flags=2), 0.9, 0.9)
    assert MODELDEF_REQUEST in kinds(s.outgoing(0.9, 0.9))
    s.datagram(wire.models({'cf1': 5}), 0.95, 0.95)
    assert s.datagram(wire.frame(2, [wire.body(5)]), 1.0, 1.0).bodies['cf1'].valid


@pytest.mark.parametrize('multicast', [False, True])
def test_only_a_unicast_server_is_kept_alive(multicast):
    s = Session(ClientSettings())
    s.datagram(wire.server_info(multicast=multicast), 0.0, 0.0)
    sent = []
    for k in range(500):
        sent += s.outgoing(k * 0.01, 0.0)
        s.datagram(wire.frame(k), k * 0.01, 0.0)
    assert kinds(sent).count(KEEPALIVE) == (0 if multicast else 10)


def test_a_silent_server_is_connected_to_again_and_its_new_models_are_used():
    s = connected()
    s.datagram(wire.frame(1, [wire.body(1)]), 0.5, 0.5)
    assert CONNECT not in kinds(s.outgoing(1.4, 1.4))
    assert CONNECT in kinds(s.outgoing(1.6, 1.6)) and not s.connected and s.counters.reconnects == 1
    s.datagram(wire.server_info(), 3.0, 3.0)
    assert s.datagram(wire.frame(1, [wire.body(9)]), 3.0, 3.0) is None  # ids of before mean nothing
    s.datagram(wire.models({'cf1': 9}), 3.0, 3.0)
    assert s.datagram(wire.frame(2, [wire.body(9)]), 3.01, 3.01).bodies['cf1'].valid


def test_echoes_alone_do_not_pass_for_a_stream():
    s = connected()
    for k in range(200):
        for d in s.outgoing(k * 0.01, k * 0.01):
            if kinds([d]) == [ECHO]:
                s.datagram(wire.packet(13, d[4:12] + bytes(8)), k * 0.01, k * 0.01)
    assert s.counters.reconnects == 1


def test_a_frame_is_stamped_with_its_exposure_on_the_ros_clock():
    s, offset = connected(), 1.7e9
    for k in range(100):
        sent = 50.0 + 0.01 * k
        for d in s.outgoing(0.01 * k, offset + sent):
            if kinds([d]) == [ECHO]:
                ticks = struct.pack('<Q', round((sent + 1e-4) * wire.FREQUENCY))
                s.datagram(wire.packet(13, d[4:12] + ticks), 0.01 * k, offset + sent + 2e-4)
        f = s.datagram(wire.frame(k, [wire.body(1)], exposure=sent - 0.005, transmit=sent), 0.01 * k,
                       offset + sent + 1e-4)
    assert f.exposure_time == pytest.approx(sent - 0.005, abs=1e-6)
    assert f.stamp == pytest.approx(offset + sent - 0.005, abs=2e-4)


@pytest.mark.parametrize('exposure, transmit', [(0.0, 5.0), (9.0, 5.0), (1.0, 5.0)])
def test_an_implausible_exposure_is_counted_and_the_frame_stamped_at_reception(exposure, transmit):
    s = connected()
    f = s.datagram(wire.frame(1, [wire.body(1)], exposure=exposure, transmit=transmit), 7.0, 77.0)
    assert f.exposure_time is None and f.stamp == 77.0 and s.counters.unstamped == 1


def test_frames_that_never_came_are_counted():
    s = connected()
    for number in (1, 2, 5, 6, 3):
        s.datagram(wire.frame(number, [wire.body(1)]), 0.1, 0.1)
    assert s.counters.missed == 2


def test_an_unknown_body_is_refused_with_the_names_that_the_server_has():
    s = connected(names={'cf7': 3, 'wand': 1})
    with pytest.raises(MocapError, match="'cf1'.*cf7, wand"):
        s.require('cf1')
    s.require('cf7')


@pytest.mark.parametrize('size', [264, 100])
def test_a_server_older_than_3_0_is_named_in_the_fault(size):
    s = Session(ClientSettings())
    s.datagram(wire.packet(1, bytes(size)), 0.0, 0.0)
    assert not s.connected and f'{size} bytes' in s.counters.last_fault


def test_a_server_of_a_version_that_cannot_be_read_is_named_in_the_fault():
    s = Session(ClientSettings())
    s.datagram(wire.server_info((2, 9)), 0.0, 0.0)
    assert not s.connected and 'NatNet 2.9' in s.counters.last_fault


def test_the_up_axis_is_asked_for_and_told():
    s = connected()
    assert wire.packet(2, b'UpAxis\0') in s.outgoing(0.0, 0.0)
    s.datagram(up_axis_answer(1), 0.1, 0.1)
    assert s.up_axis == 'y' and not s.up_axis_untold
    assert REQUEST not in kinds(d for k in range(300) for d in s.outgoing(0.1 + k * 0.01, 0.0))


def test_a_server_that_does_not_tell_its_up_axis_is_not_asked_for_ever():
    s, n = connected(), 0
    for k in range(2000):
        n += kinds(s.outgoing(k * 0.01, 0.0)).count(REQUEST)
        s.datagram(wire.frame(k), k * 0.01, 0.0)
    assert n == 10 and s.up_axis_untold


@pytest.mark.parametrize('bad', [{'client': 'vrpn'}, {'transport': 'tcp'}])
def test_a_setting_that_does_not_exist_is_refused_with_the_choices(bad):
    with pytest.raises(MocapError, match='expected one of'):
        ClientSettings(**bad)


# --- over sockets -------------------------------------------------------------------------------------

def stream(server, client, until, frame=lambda k: wire.frame(k, [wire.body(1)])):
    """Serve and poll in turn until `until(frames)`; the frames that came."""
    frames, deadline, k = [], time.monotonic() + 20.0, 0
    while time.monotonic() < deadline:
        k += 1
        server.answer()
        server.send(frame(k))
        frames += client.poll(0.005)
        if until(frames):
            return frames
    raise AssertionError(f'{len(frames)} frames, {client.session}')


def settings(server, **more):
    return ClientSettings(server_address='127.0.0.1', command_port=server.port, local_address='127.0.0.1',
                          silence=0.1, first_pause=0.01, request_pause=0.02, **more)


@pytest.mark.parametrize('version', wire.VERSIONS)
@pytest.mark.parametrize('client', ['native', 'natnet'])
def test_a_unicast_stream_arrives(version, client):
    if client == 'natnet':
        pytest.importorskip('natnet')
    with wire.Server(version=version) as server, \
            NatNetClient(settings(server, client=client), lambda: 5.0) as c:
        frames = stream(server, c, lambda f: len(f) >= 20,
                        lambda k: wire.frame(k, [wire.body(1)], version))
    assert frames[-1].bodies['cf1'].valid and c.session.server.version == version


def test_a_multicast_stream_arrives():
    group = '239.255.42.98'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))
        sender.bind(('127.0.0.1', 0))
        port = sender.getsockname()[1] + 1 if sender.getsockname()[1] < 65535 else 40000
        with wire.Server(multicast=True, group=group, data_port=port) as server, \
                NatNetClient(settings(server), lambda: 5.0) as c:
            server.send = lambda data: sender.sendto(data, (group, port))
            try:
                server.send(b'')
            except OSError as error:
                pytest.skip(f'this machine cannot send multicast on loopback: {error}')
            frames = stream(server, c, lambda f: len(f) >= 5)
    assert frames[-1].bodies['cf1'].valid


def test_datagrams_from_another_address_are_counted_and_ignored():
    with wire.Server() as server, NatNetClient(settings(server), lambda: 5.0) as c, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        stream(server, c, lambda f: len(f) >= 3)
        other.bind(('127.0.0.2', 0))
        other.sendto(wire.frame(9, [wire.body(1, (9.0, 9.0, 9.0))]), server.client)
        frames = stream(server, c, lambda f: c.session.counters.foreign == 1)
    assert all(f.bodies['cf1'].position[0] < 1.0 for f in frames)


def test_a_server_that_was_restarted_is_found_again():
    with wire.Server() as server, NatNetClient(settings(server), lambda: 5.0) as c:
        stream(server, c, lambda f: len(f) >= 3)
        server.close()
        for _ in range(30):
            c.poll(0.01)
        assert not c.session.connected
        server.names = {'cf1': 4}
        server.open()
        frames = stream(server, c, lambda f: len(f) >= 3, lambda k: wire.frame(k, [wire.body(4)]))
    assert frames[-1].bodies['cf1'].valid and c.session.counters.reconnects >= 1


@pytest.mark.parametrize('bad, message', [({'server_address': 'no.such.host.invalid'}, 'server_address'),
                                          ({'local_address': '192.0.2.77'}, 'local_address')])
def test_an_address_that_cannot_be_used_is_named(bad, message):
    with pytest.raises(MocapError, match=message):
        NatNetClient(ClientSettings(**bad), lambda: 0.0)
