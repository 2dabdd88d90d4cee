"""The Crazyflie peer, held against the real cflib and against packets that no cflib would send."""

import copy
import errno
import math
import random
import socket
import struct
import threading
import time
from unittest.mock import MagicMock

import cflib.crtp
import numpy as np
import pytest
from cflib.crazyflie import Crazyflie
from cflib.crazyflie.log import LogConfig
from cflib.utils.encoding import compress_quaternion

from sim_env.crtp_peer import CrtpPeer, LinkDirection, decompress_quaternion, pack_number
from sim_env.simulated_crazyflie import Parameter, SimulatedCrazyflie

WAIT = 20.0  # s, for an event that takes milliseconds on an idle machine

cflib.crtp.init_drivers()


def stand_in():
    """Something with the simulated Crazyflie's methods, which records the calls."""
    crazyflie = MagicMock(spec=SimulatedCrazyflie)
    crazyflie.time = 0.0
    crazyflie.parameters = {
        'stabilizer.controller': Parameter('B', 1), 'stabilizer.estimator': Parameter('B', 1),
        'locSrv.extPosStdDev': Parameter('f', 0.01), 'deck.bcFlow2': Parameter('B', 0, read_only=True)}
    crazyflie.log_variables = {
        'pm.vbat': ('f', lambda: 3.9), 'stateEstimate.x': ('f', lambda: 1.25),
        'stateEstimate.y': ('f', lambda: -0.5), 'supervisor.info': ('H', lambda: 11)}
    crazyflie.console = ['SYS: ----------------------------', 'SYS: Crazyflie 2.1 is up and running!']
    crazyflie.supervisor_info = 0b1011
    for method in ('takeoff', 'land', 'go_to', 'high_level_stop'):
        getattr(crazyflie, method).return_value = 0
    crazyflie.arm.return_value = crazyflie.recover.return_value = True

    def set_parameter(name, value):
        crazyflie.parameters[name].value = value
    crazyflie.set_parameter.side_effect = set_parameter
    return crazyflie


class Pump:
    """Polls a peer in a thread, as the simulation's loop does, with its Crazyflie's time running."""

    def __init__(self, peer):
        self.peer, self.stopped = peer, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        start = time.monotonic()
        while not self.stopped.wait(0.001):
            self.peer.crazyflie.time = time.monotonic() - start
            self.peer.poll()

    def __enter__(self):
        self.thread.start()
        return self.peer

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.peer.close()


def until(condition, what):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f'not within {WAIT} s: {what}'
        time.sleep(0.002)


class Link:
    """A fully connected cflib."""

    def __init__(self, peer, resend=False, meanwhile=lambda: None):
        self.cf = Crazyflie()
        self.console = ''
        connected, failed = threading.Event(), []
        self.cf.fully_connected.add_callback(lambda uri: connected.set())
        self.cf.connection_failed.add_callback(lambda uri, error: failed.append(error))
        self.cf.console.receivedChar.add_callback(self.hear)
        if resend:
            driver = cflib.crtp.udpdriver.UdpDriver
            original = driver.connect

            def connect(driver_self, *arguments):
                original(driver_self, *arguments)
                driver_self.needs_resending = True
            driver.connect = connect
        try:
            self.cf.open_link(f'udp://127.0.0.1:{peer.address[1]}')
        finally:
            if resend:
                driver.connect = original
        meanwhile()
        until(lambda: connected.is_set() or failed, 'fully connected')
        assert not failed
        self.first_values = copy.deepcopy(self.cf.param.values)

    def hear(self, text):
        self.console += text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cf.close_link()


@pytest.fixture(scope='module')
def connection():
    crazyflie = stand_in()
    with Pump(CrtpPeer(crazyflie, ('127.0.0.1', 0))) as peer, Link(peer) as link:
        link.peer = peer
        yield crazyflie, link


@pytest.fixture
def pair(connection):
    """A stand-in Crazyflie that nothing was asked of yet and the cflib connected to it."""
    crazyflie, link = connection
    crazyflie.reset_mock()
    crazyflie.go_to.return_value = 0
    link.peer.counts.clear()
    return crazyflie, link


def called(method):
    until(lambda: method.called, method)
    return method.call_args.args


def test_cflib_connects_and_reads_every_parameter_log_variable_and_console_line(pair):
    crazyflie, link = pair
    assert link.cf.platform.get_protocol_version() == 12
    assert link.first_values == {'stabilizer': {'controller': '1', 'estimator': '1'},
                                 'locSrv': {'extPosStdDev': '0.009999999776482582'}, 'deck': {'bcFlow2': '0'}}
    assert link.cf.param.toc.get_element('deck', 'bcFlow2').get_readable_access() == 'RO'
    assert {f'{g}.{n}': e.ctype for g, names in link.cf.log.toc.toc.items() for n, e in names.items()} == {
        'pm.vbat': 'float', 'stateEstimate.x': 'float', 'stateEstimate.y': 'float',
        'supervisor.info': 'uint16_t'}
    until(lambda: link.console == '\n'.join(crazyflie.console) + '\n', 'console')


def test_a_parameter_that_cflib_sets_reads_back_changed(pair):
    crazyflie, link = pair
    heard = threading.Event()
    link.cf.param.add_update_callback('stabilizer', 'controller', lambda name, value: heard.set())
    link.cf.param.set_value('stabilizer.controller', 2)
    assert heard.wait(WAIT)
    assert link.cf.param.get_value('stabilizer.controller') == '2'
    assert crazyflie.parameters['stabilizer.controller'].value == 2
    defaults = []
    link.cf.param.get_default_value('stabilizer.controller', lambda name, value: defaults.append(value))
    until(lambda: defaults, 'default value')
    assert defaults == [1]


def test_log_blocks_arrive_at_their_period_with_their_values(pair):
    _, link = pair
    received = []
    config = LogConfig('state', 10)
    for name in ('stateEstimate.x', 'stateEstimate.y', 'pm.vbat'):
        config.add_variable(name)
    config.add_variable('supervisor.info', 'uint8_t')
    config.add_variable('pm.vbat', 'FP16')
    config.data_received_cb.add_callback(lambda stamp, data, block: received.append((stamp, data)))
    link.cf.log.add_config(config)
    config.start()
    until(lambda: len(received) >= 8, 'log data')
    stamps = [stamp for stamp, _ in received]
    assert min(np.diff(stamps)) >= 5  # ms: periodic, not one a poll
    assert received[0][1] == {'stateEstimate.x': 1.25, 'stateEstimate.y': -0.5,
                              'pm.vbat': pytest.approx(3.9, abs=2e-3), 'supervisor.info': 11}
    config.stop()
    until(lambda: not config.started, 'log block stopped')
    config.delete()
    until(lambda: not config.added, 'log block deleted')


def test_a_full_log_block_is_created_from_several_packets(pair):
    _, link = pair
    received = []
    config = LogConfig('many', 10)
    for _ in range(13):  # 9 of them fit into the first packet
        config.add_variable('supervisor.info')
    config.data_received_cb.add_callback(lambda stamp, data, block: received.append(data))
    link.cf.log.add_config(config)
    config.start()
    until(lambda: received, 'log data')
    assert received[0] == {'supervisor.info': 11}


def test_a_full_state_setpoint_arrives_in_si_units(pair):
    crazyflie, link = pair
    q = np.array([0.1, -0.2, 0.3, 0.9])
    q /= np.linalg.norm(q)
    link.cf.commander.send_full_state_setpoint([1.0, -2.0, 0.5], [0.25, 0.5, -0.75], [1.5, -2.5, 3.5], q,
                                               2.0, -4.0, 30.0)
    position, velocity, acceleration, quaternion, rates = called(crazyflie.set_full_state)
    assert position == pytest.approx([1.0, -2.0, 0.5])
    assert velocity == pytest.approx([0.25, 0.5, -0.75])
    assert acceleration == pytest.approx([1.5, -2.5, 3.5])
    assert quaternion == pytest.approx(q, abs=2e-3)
    assert rates == pytest.approx([2.0, -4.0, 30.0])  # rad/s


def test_the_other_setpoints_arrive_in_the_units_of_the_simulated_crazyflie(pair):
    crazyflie, link = pair
    link.cf.commander.send_position_setpoint(1.0, 2.0, 3.0, 90.0)
    position, yaw = called(crazyflie.set_position)
    assert position == pytest.approx([1.0, 2.0, 3.0]) and yaw == pytest.approx(math.pi / 2)
    link.cf.commander.send_setpoint(1.0, 2.0, 3.0, 40000)
    assert called(crazyflie.set_rpyt) == (1.0, 2.0, 3.0, 40000)
    link.cf.commander.send_notify_setpoint_stop(250)
    assert called(crazyflie.notify_setpoint_stop) == (250,)
    link.cf.commander.send_stop_setpoint()
    called(crazyflie.stop_setpoint)
    link.cf.commander.send_hover_setpoint(0.1, 0.2, 0.3, 0.4)
    until(lambda: link.peer.counts['unsupported'], 'hover setpoint counted')
    assert link.peer.counts['malformed'] == 0


def test_high_level_commands_arrive_and_are_answered_with_the_error_number(pair):
    crazyflie, link = pair
    answers = []
    link.cf.add_port_callback(8, lambda packet: answers.append(bytes(packet.data)))
    commander = link.cf.high_level_commander
    commander.takeoff(1.0, 2.5, yaw=None)
    assert called(crazyflie.takeoff) == (1.0, 2.5, None)
    crazyflie.go_to.return_value = errno.EBUSY
    commander.go_to(1.0, 2.0, 0.5, -1.5, 3.0, relative=True)
    position, yaw, duration, relative = called(crazyflie.go_to)
    assert position == pytest.approx([1.0, 2.0, 0.5]) and (yaw, duration, relative) == (-1.5, 3.0, True)
    commander.land(0.0, 2.0, yaw=0.5)
    assert called(crazyflie.land) == (0.0, 2.0, 0.5)
    commander.stop()
    called(crazyflie.high_level_stop)
    commander.spiral(1.0, 0.5, 0.5, 0.0, 2.0)
    until(lambda: len(answers) == 5, 'answers')
    assert [(a[0], a[3]) for a in answers] == [(7, 0), (12, errno.EBUSY), (8, 0), (3, 0), (11, errno.ENOEXEC)]


def test_external_poses_arrive_with_a_unit_quaternion(pair):
    crazyflie, link = pair
    link.cf.extpos.send_extpos(0.1, 0.2, 0.3)
    assert called(crazyflie.receive_extpos)[0] == pytest.approx([0.1, 0.2, 0.3])
    link.cf.extpos.send_extpose(1.0, 2.0, 3.0, 0.0, 0.0, 0.7071, 0.7071)
    position, quaternion = called(crazyflie.receive_extpose)
    assert position == pytest.approx([1.0, 2.0, 3.0])
    assert quaternion == pytest.approx([0.0, 0.0, math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize('packet', [
    b'\x6d' + struct.pack('<B7f', 8, 0, 0, 1, 0, 0, 0, 0),  # a quaternion of no length
    b'\x6d' + struct.pack('<B7f', 8, 0, 0, 1, 0, 0, math.nan, 1), b'\x6c' + struct.pack('<3f', 0, math.inf, 1),
    b'\x7c\x2a' + bytes(16),  # setpoints of an unknown type and of a velocity
    b'\x7c' + struct.pack('<B4f', 8, 0, 0, 0, 0), b'\x7c' + struct.pack('<B4f', 7, 0, math.nan, 1, 0),
    b'\x7c\x06' + bytes(10), b'\x7c', b'\x7d' + bytes(3)])  # lengths that the firmware asserts
def test_a_packet_that_stops_the_motors_of_a_real_drone_stops_them_here(packet):
    crazyflie = SimulatedCrazyflie()
    crazyflie.set_parameter('stabilizer.estimator', 2)
    for _ in range(50):
        crazyflie.receive_extpose((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        crazyflie.step(10)
    crazyflie.takeoff(0.5, 0.5)
    crazyflie.step(300)
    assert min(crazyflie.pwm) > 0
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), warn=lambda text: None)
    peer._handle(packet, ('127.0.0.1', 9))
    peer.close()
    crazyflie.step(10)
    assert crazyflie.pwm == (0, 0, 0, 0)


def test_the_supervisor_answers_and_acts(pair):
    crazyflie, link = pair
    assert link.cf.supervisor.read_bitfield() == 0b1011
    assert link.cf.supervisor.is_armed and not link.cf.supervisor.is_flying
    link.cf.supervisor.send_arming_request(True)
    assert called(crazyflie.arm) == (True,)
    link.cf.supervisor.send_crash_recovery_request()
    called(crazyflie.recover)
    link.cf.supervisor.send_emergency_stop_watchdog()
    called(crazyflie.emergency_watchdog)
    assert not crazyflie.emergency_stop.called
    link.cf.supervisor.send_emergency_stop()
    called(crazyflie.emergency_stop)


def test_closing_the_link_sends_a_zero_setpoint_and_a_second_cflib_can_connect():
    crazyflie = stand_in()
    with Pump(CrtpPeer(crazyflie, ('127.0.0.1', 0))) as peer:
        with Link(peer):
            pass
        until(lambda: crazyflie.set_rpyt.called, 'zero setpoint')
        assert crazyflie.set_rpyt.call_args.args == (0.0, 0.0, 0.0, 0)
        with Link(peer) as second:
            until(lambda: peer.client[1] == second.cf.link.socket.getsockname()[1], 'client taken over')


def test_two_peers_on_two_ports_serve_two_cflibs():
    first, second = stand_in(), stand_in()
    second.parameters['stabilizer.controller'].value = 2
    with (Pump(CrtpPeer(first, ('127.0.0.1', 0))) as a, Pump(CrtpPeer(second, ('127.0.0.1', 0))) as b,
          Link(a) as cf_a, Link(b) as cf_b):
        assert cf_a.cf.param.get_value('stabilizer.controller') == '1'
        assert cf_b.cf.param.get_value('stabilizer.controller') == '2'


def test_cflib_connects_over_a_link_that_loses_and_delays_packets():
    def degrade():
        # cflib never repeats its first two requests (link service, protocol version), whatever the driver.
        until(lambda: peer.counts['received'] >= 3, 'handshake and the request after it')
        peer.up = peer.down = LinkDirection(loss=0.1, latency=0.002, jitter=0.002)
    with (Pump(CrtpPeer(stand_in(), ('127.0.0.1', 0), seed=3)) as peer,
          Link(peer, resend=True, meanwhile=degrade)):
        assert peer.counts['lost_up'] + peer.counts['lost_down'] > 0


def test_an_occupied_port_is_named():
    peer = CrtpPeer(stand_in(), ('127.0.0.1', 0))
    with pytest.raises(OSError, match=f'Crazyflie peer: cannot open UDP 127.0.0.1:{peer.address[1]}'):
        CrtpPeer(stand_in(), peer.address)
    peer.close()


def test_the_scan_of_cflib_finds_the_peer():
    peer = CrtpPeer(stand_in(), ('127.0.0.1', 0))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(WAIT)
    client.sendto(b'\xff', peer.address)
    until(lambda: peer.poll() or peer.counts['received'], 'probe')
    assert client.recv(100)
    assert peer.client is None  # a scan is no connection
    client.close()
    peer.close()


def test_a_delay_holds_packets_back_in_order_and_a_loss_of_one_holds_all():
    crazyflie = stand_in()
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), up=LinkDirection(latency=0.1, jitter=0.05))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for i in range(20):
        client.sendto(bytes([0x7D]) + struct.pack('<BI', 0, i), peer.address)
    until(lambda: peer.poll() or peer.counts['received'] == 20, 'packets received')
    assert not crazyflie.notify_setpoint_stop.called
    crazyflie.time = 0.1 - 1e-6
    peer.poll()
    assert not crazyflie.notify_setpoint_stop.called
    crazyflie.time = 0.151
    peer.poll()
    assert [c.args[0] for c in crazyflie.notify_setpoint_stop.call_args_list] == list(range(20))
    peer.up = LinkDirection(loss=1.0)
    client.sendto(bytes([0x7D]) + struct.pack('<BI', 0, 99), peer.address)
    until(lambda: peer.poll() or peer.counts['lost_up'] == 1, 'packet lost')
    client.close()
    peer.close()


def test_a_restarted_drone_has_its_own_values_and_sends_no_log_data_until_asked():
    crazyflie, fresh = stand_in(), stand_in()
    crazyflie.console = fresh.console = []
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0))
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(WAIT)

    def ask(*packets):
        for packet in packets:
            client.sendto(packet, peer.address)
        until(lambda: peer.poll() or peer.counts['received'] == len(packets), 'packets received')
        peer.counts.clear()
        return [client.recv(40) for _ in packets]
    ask(b'\xfd\x00', bytes.fromhex('5d0601070000'), bytes.fromhex('5d03010a'))
    assert peer.client and peer._blocks
    fresh.parameters['stabilizer.controller'].value = 7
    peer.restart(fresh)
    assert peer.client is None and not peer._blocks
    assert ask(b'\x2d\x00\x00')[-1][-1] == 7
    client.close()
    peer.close()


def test_a_garbling_link_changes_or_cuts_packets_and_counts_them():
    crazyflie = stand_in()
    crazyflie.console = []
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), down=LinkDirection(garble=0.5), seed=1)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(WAIT)
    answers = []
    for _ in range(100):
        client.sendto(b'\xfc' + b'echo', peer.address)
        until(lambda: peer.poll() or peer.counts['received'] == len(answers) + 1, 'packet received')
        answers.append(client.recv(40))
    changed = [a for a in answers if a != b'\xfcecho']
    assert len(changed) == peer.counts['garbled_down'] and 30 < len(changed) < 70
    assert {len(a) for a in changed} > {5}
    client.close()
    peer.close()


def test_quaternions_are_decompressed_as_cflib_compresses_them():
    rng = np.random.default_rng(0)
    for q in rng.normal(size=(500, 4)):
        q /= np.linalg.norm(q)
        q *= np.sign(q[np.argmax(np.abs(q))])
        assert decompress_quaternion(compress_quaternion(q)) == pytest.approx(q, abs=2.5e-3)


@pytest.mark.parametrize('character, value, expected', [
    ('B', 300.7, b'\x2c'), ('b', -1.9, b'\xff'), ('H', -1, b'\xff\xff'), ('f', 1e300, b'\x00\x00\x80\x7f'),
    ('i', math.nan, bytes(4)), ('e', 1e9, b'\x00\x7c')])
def test_numbers_are_converted_as_by_a_c_cast(character, value, expected):
    assert pack_number(character, value) == expected


def well_formed():
    """One packet of each kind that a client sends."""
    floats = struct.pack('<7f', 1, 2, 3, 0, 0, 0, 1)
    return [bytes.fromhex(h) for h in (
        'ff', 'fc00', 'fd00', 'dd00', 'dc0101', '5d05', '5c03', '5c020000', '4d0001000000ff', '4c01',
        '2c03', '2c020100', '2d0000', '2e000002', '2f00', '2f080000', '5d0601070000', '5d0701070100',
        '5d03010a', '5d0401', '5d0201', '7c00', '7d0000000000', '8c0300', '6d03', '6d04', '9c0c', '9d0101',
        '9d02', '9d03', '9d04')] + [
        b'\x7c\x06' + struct.pack('<9hI3h', *range(9), 3 << 30, 1, 2, 3), b'\x7c\x07' + floats[:16],
        b'\x3c' + struct.pack('<fffH', 0, 0, 0, 0), b'\x8c\x07' + struct.pack('<Bff?f', 0, 1, 0, True, 2),
        b'\x8c\x0c' + struct.pack('<BBBfffff', 0, 0, 0, 1, 2, 3, 0, 2), b'\x6c' + floats[:12],
        b'\x6d\x08' + floats, b'\x6d\x09' + struct.pack('<BhhhI', 0xE7, 1, 2, 3, 3 << 30),
        b'\x6e' + struct.pack('<Bhhh', 0xE7, 1, 2, 3)]


@pytest.mark.parametrize('seed', [0, 1])
def test_ten_thousand_random_and_mutated_packets_do_not_stop_the_peer_or_the_physics(seed):
    crazyflie, said = SimulatedCrazyflie(), []
    peer = CrtpPeer(crazyflie, ('127.0.0.1', 0), warn=said.append)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    rng, seeds = random.Random(seed), well_formed()
    for i in range(10_000):
        if i % 2:
            packet = rng.randbytes(rng.randrange(0, 40))
        else:
            packet = bytearray(rng.choice(seeds))
            for _ in range(rng.randrange(0, 3)):
                packet[rng.randrange(len(packet))] = rng.randrange(256)
            packet = bytes(packet[:rng.randrange(len(packet) + 1)]) if rng.random() < 0.3 else bytes(packet)
        client.sendto(packet, peer.address)
        if i % 20 == 19:
            crazyflie.step(2)
            peer.poll()
    until(lambda: peer.poll() or peer.counts['received'] == 10_000, 'all packets received')
    assert peer.counts['malformed'] > 3000
    assert len(said) < 50  # 1 s, at most one line a second of a kind
    assert crazyflie.truth().is_finite()
    client.close()
    peer.close()


@pytest.mark.parametrize('name', ['novalue', 'a.' + 'b' * 30, '.x'])
def test_a_variable_whose_name_no_packet_holds_is_refused_at_start(name):
    crazyflie = stand_in()
    crazyflie.parameters[name] = Parameter('B', 0)
    with pytest.raises(ValueError, match='variable name'):
        CrtpPeer(crazyflie, ('127.0.0.1', 0))
