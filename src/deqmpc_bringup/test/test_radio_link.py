# SPDX-License-Identifier: GPL-3.0-or-later
"""CflibRadio with an unmodified cflib on its real UDP link, against the peer, whose faults are injected."""

import socket
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import numpy as np
import pytest

pytest.importorskip('cflib', reason='cflib is not installed')
from crazyflie_interface import cflib_link, cflib_radio, link_meter, radio  # noqa: E402
from crazyflie_interface.cflib_radio import CflibRadio  # noqa: E402
from crazyflie_interface.radio import RadioError  # noqa: E402
from crazyflie_interface.settings import RadioSettings  # noqa: E402
from sim_env.crtp_peer import CrtpPeer, LinkDirection  # noqa: E402
from sim_env.simulated_crazyflie import Parameter, SimulatedCrazyflie  # noqa: E402

WAIT = 30.0  # s, for an event that takes well under one on an idle machine
GROUND = radio.CAN_ARM | radio.CAN_FLY


def drone(volts=4.1):
    """A Crazyflie of few words, so that tables arrive quickly; it stands still."""
    cf = MagicMock(spec=SimulatedCrazyflie)
    cf.time, cf.console, cf.supervisor_info = 0.0, ['up and running'], GROUND
    cf.parameters = {
        'stabilizer.controller': Parameter('B', 1), 'stabilizer.estimator': Parameter('B', 1),
        'commander.enHighLevel': Parameter('B', 0), 'locSrv.extPosStdDev': Parameter('f', 1.0),
        'locSrv.extQuatStdDev': Parameter('f', 1.0), 'kalman.resetEstimation': Parameter('B', 0)}
    cf.log_variables = {'pm.vbat': ('f', lambda: volts),
                        'supervisor.info': ('H', lambda: float(cf.supervisor_info))}
    cf.log_variables |= {f'stateEstimate.{name}': ('f', lambda: 0.25) for name in ('x', 'y', 'z', 'yaw')}
    cf.log_variables |= {f'kalman.varP{axis}': ('f', lambda: 1e-5) for axis in 'XYZ'}
    cf.arm.return_value = True
    cf.set_parameter.side_effect = lambda name, value: setattr(cf.parameters[name], 'value', value)
    return cf


class Air:
    """Drones in their peers, polled by one thread as the simulation's loop does, time running."""

    def __init__(self, *drones, **peer_options):
        self.peers = [CrtpPeer(d, ('127.0.0.1', 0), warn=lambda text: None, **peer_options) for d in drones]
        self.off = set()  # peers that are switched off: they hear nothing
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        start = time.monotonic()
        while not self.stopped.wait(0.001):
            for peer in self.peers:
                peer.crazyflie.time = time.monotonic() - start
                if peer not in self.off:
                    peer.poll()

    def close(self):
        self.stopped.set()
        self.thread.join()
        for peer in self.peers:
            peer.close()


@pytest.fixture
def lab(monkeypatch):
    """lab(drone, ...) -> its peers and a CflibRadio to each, not connected."""
    opened = []
    monkeypatch.setattr(cflib_radio, 'LAST_PAUSE', 0.3)

    def build(*drones, timeout=WAIT, **peer_options):
        air = Air(*drones, **peer_options)
        radios = [CflibRadio(RadioSettings(uri=f'udp://127.0.0.1:{p.address[1]}', connect_timeout=timeout,
                                           setup_timeout=WAIT)) for p in air.peers]
        opened.extend([*radios, air])
        return air, radios
    yield build
    for item in opened:
        item.close()


def until(condition, what):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f'not within {WAIT} s: {what}'
        time.sleep(0.005)


def running(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def bad(**values):
    return LinkDirection(**values)


def test_a_link_that_is_up_has_telemetry_parameters_and_a_latency(lab):
    d = drone()
    _, (r,) = lab(d)
    r.connect()
    t = r.telemetry()  # without waiting: up means that the telemetry is there
    assert (t.link, t.fault, t.supervisor) == ('up', '', GROUND)
    assert t.battery_v == pytest.approx(4.1) and t.variance is not None and t.parameter_faults is None
    assert r.set_and_check_parameters() == ()
    assert d.parameters['stabilizer.controller'].value == 2
    until(lambda: r.telemetry().link_statistics.latency, 'a ping answered')
    s = r.telemetry().link_statistics
    assert 0.0 < s.latency < link_meter.PATIENCE and s.pings_lost == 0.0 and s.reconnects == 0
    assert s.retries is None and s.rssi_dbm is None and r.telemetry().link_quality is None  # UDP has none


def test_a_drone_switched_on_late_is_found(lab):
    air, (r,) = lab(drone())
    air.off.add(air.peers[0])
    thread = running(r.connect)
    until(lambda: 'no Crazyflie answers' in r.telemetry().fault, 'the reason in the telemetry')
    assert r.telemetry().link == 'connecting'
    air.off.clear()
    thread.join(WAIT)
    assert r.telemetry().link == 'up' and r.telemetry().fault == ''


def test_the_pauses_between_attempts_grow_to_a_bound(monkeypatch):
    clock, pauses = [0.0], []
    r = CflibRadio(RadioSettings(uri='udp://127.0.0.1:9', connect_timeout=60.0), lambda: clock[0])
    monkeypatch.setattr(cflib_radio, 'open_link', MagicMock(side_effect=cflib_link.LinkError('nobody')))
    def wait(pause):
        pauses.append(pause)
        clock[0] += pause
    r._closing = MagicMock(**{'is_set.return_value': False, 'wait.side_effect': wait})
    with pytest.raises(RadioError, match='nobody .tried for 60.0 s'):
        r.connect()
    grown = pauses[:-2]  # the last two fill the time
    assert grown[0] == cflib_radio.FIRST_PAUSE and grown[-1] == cflib_radio.LAST_PAUSE == max(pauses)
    assert grown == sorted(grown) and clock[0] == pytest.approx(60.0, abs=0.1)


def test_what_waiting_cannot_cure_ends_connecting_soon_at_the_start_but_not_later(lab, monkeypatch):
    _, (r,) = lab(drone(), timeout=300.0)
    attempts = MagicMock(side_effect=cflib_link.explain(r.settings.uri, '[Errno 13] Access denied'))
    real = cflib_radio.open_link
    monkeypatch.setattr(cflib_radio, 'open_link', attempts)
    with pytest.raises(RadioError, match='udev'):
        r.connect()
    assert attempts.call_count == cflib_radio.HOPELESS_ATTEMPTS
    monkeypatch.setattr(cflib_radio, 'open_link', real)
    r.connect()
    monkeypatch.setattr(cflib_radio, 'open_link', attempts)
    monkeypatch.setattr(cflib_radio, 'LAST_PAUSE', 0.01)
    attempts.call_count = 0
    thread = running(lambda: pytest.raises(RadioError, r.connect))
    until(lambda: attempts.call_count > 2 * cflib_radio.HOPELESS_ATTEMPTS, 'attempts after a replug')
    r._closing.set()
    thread.join(WAIT)


def test_a_drone_that_falls_silent_is_lost_and_found_again_on_request(lab, monkeypatch):
    monkeypatch.setattr(cflib_radio, 'SILENCE', 0.5)
    air, (r,) = lab(drone())
    r.connect()
    r.set_and_check_parameters()
    air.peers[0].down = bad(loss=1.0)
    until(lambda: r.telemetry().link == 'lost', 'silence noticed')
    assert 'silent for' in r.telemetry().fault
    air.peers[0].down = bad()
    r.connect()
    t = r.telemetry()
    assert t.link == 'up' and t.parameter_faults is None and t.link_statistics.reconnects == 1


def test_a_drone_that_restarted_gets_its_parameters_again(lab, monkeypatch):
    monkeypatch.setattr(cflib_radio, 'SILENCE', 0.5)
    air, (r,) = lab(drone())
    r.connect()
    assert r.set_and_check_parameters() == ()
    fresh = drone(volts=3.9)
    air.peers[0].restart(fresh)
    until(lambda: r.telemetry().link == 'lost', 'its log blocks are gone')
    r.connect()
    assert r.set_and_check_parameters() == () and r.telemetry().battery_v == pytest.approx(3.9)
    assert fresh.parameters['stabilizer.controller'].value == 2


def test_nothing_of_the_lost_link_is_sent_on_the_new_one(lab):
    air, (r,) = lab(drone())
    r.connect()
    air.peers[0].down = bad(loss=1.0)
    r._update(link='lost')
    r.arm(True)
    r.extpose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]))
    air.peers[0].down = bad()
    r.connect()
    time.sleep(0.1)
    assert not air.peers[0].crazyflie.arm.called and not air.peers[0].crazyflie.receive_extpose.called


def test_in_flight_the_link_is_not_opened_again(lab):
    air, (r,) = lab(drone())
    r.connect()
    r.takeoff(0.5, 2.0)
    with pytest.raises(RadioError, match='not opened again in flight'):
        r.connect()
    assert r.telemetry().link == 'up'
    r.arm(False)  # the flight has ended
    r.connect()


def test_the_estimator_of_a_drone_that_still_flies_is_not_reset(lab):
    d = drone()
    d.supervisor_info = GROUND | radio.ARMED | radio.FLYING
    _, (r,) = lab(d)
    r.connect()
    assert r.set_and_check_parameters() == ()
    r.arm(True)
    until(lambda: d.arm.called, 'the command after the parameters')
    time.sleep(0.1)
    assert ('kalman.resetEstimation', 1) not in [c.args for c in d.set_parameter.call_args_list]


def test_tables_that_come_after_their_requests_were_resent_are_taken_once(lab):
    d = drone()
    air, (r,) = lab(d)
    air.peers[0].table_latency = 0.22  # cflib resends after 0.2 s
    r.connect()
    assert r.set_and_check_parameters() == () and d.parameters['stabilizer.controller'].value == 2


def test_tables_that_stop_coming_are_begun_again(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'STALL', 0.7)
    air, (r,) = lab(drone())
    air.peers[0].table_latency = 1e6
    thread = running(r.connect)
    until(lambda: 'tables stopped arriving' in r.telemetry().fault, 'the stall noticed')
    air.peers[0].table_latency = 0.0
    air.peers[0]._queues['down'].clear()
    thread.join(WAIT)
    assert r.telemetry().link == 'up'


def test_a_slow_link_connects_and_says_so(lab):
    _, (r,) = lab(drone(), up=bad(latency=0.03), down=bad(latency=0.03))
    r.connect()
    assert r.set_and_check_parameters() == ()
    until(lambda: r.telemetry().link_statistics.latency, 'a ping answered')
    assert r.telemetry().link_statistics.latency > 0.06


def test_a_link_that_loses_every_fifth_packet_each_way_connects_and_says_so(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'FIRST_ANSWER', 0.3)
    monkeypatch.setattr(link_meter, 'PERIOD', 0.05)
    monkeypatch.setattr(link_meter, 'PATIENCE', 0.2)
    _, (r,) = lab(drone(), up=bad(loss=0.2), down=bad(loss=0.2), seed=4)
    r.connect()
    assert r.set_and_check_parameters() == ()
    until(lambda: (r.telemetry().link_statistics.pings_lost or 0.0) > 0.0, 'a ping lost')
    assert r.telemetry().link == 'up'


def test_garbled_packets_end_neither_the_link_nor_its_threads(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'FIRST_ANSWER', 0.3)
    monkeypatch.setattr(cflib_link, 'STALL', 0.7)
    monkeypatch.setattr(cflib_radio, 'TELEMETRY_START', 0.7)
    air, (r,) = lab(drone(), up=bad(garble=0.03), down=bad(garble=0.03), seed=2)
    r.connect()
    air.peers[0].up = air.peers[0].down = bad(garble=0.5)
    sent = air.peers[0].counts['sent']
    for k in range(300):
        r.extpose(np.full(3, 0.01 * k), np.array([0.0, 0.0, 0.0, 1.0]))
        time.sleep(0.002)
    assert air.peers[0].counts['sent'] > sent and air.peers[0].counts['garbled_down'] > 0
    air.peers[0].up = air.peers[0].down = bad()
    before = r.telemetry().stamp
    until(lambda: r.telemetry().stamp > before, 'telemetry after the noise')
    r.arm(True)
    until(lambda: air.peers[0].crazyflie.arm.called, 'a command after the noise')
    assert r.telemetry().link == 'up'


def test_a_late_answer_of_the_handshake_does_not_set_a_flying_link_up_again(lab):
    air, (r,) = lab(drone())
    r.connect()
    peer = air.peers[0]
    version = r._cf.platform.get_protocol_version()
    blocks = dict(peer._blocks)
    for port, channel, data in ((15, 1, b'Nobody'), (15, 1, b'Bitcraze Crazyflie'), (13, 1, b'\0\3')):
        peer._send(port, channel, data, peer.client)
    before = r.telemetry().stamp
    until(lambda: r.telemetry().stamp > before + 0.25, 'telemetry goes on')
    assert r._cf.platform.get_protocol_version() == version and dict(peer._blocks) == blocks


def test_a_log_block_that_the_drone_refuses_is_named(lab):
    air, (r,) = lab(drone(), timeout=0.1)
    air.peers[0]._create_block = lambda number, data: 12  # ENOMEM
    with pytest.raises(RadioError, match='connected, but log block .*memory'):
        r.connect()


def test_firmware_without_the_telemetry_is_called_too_old(lab):
    d = drone()
    del d.log_variables['kalman.varPX']
    _, (r,) = lab(d)
    with pytest.raises(RadioError, match='too old, Variable kalman.varPX'):
        r.connect()


def test_attempts_that_fail_leave_no_thread_behind(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'FIRST_ANSWER', 0.2)
    air, (r,) = lab(drone(), timeout=0.01)
    air.off.add(air.peers[0])
    before = set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(RadioError, match='no Crazyflie answers'):
            r.connect()
    until(lambda: not set(threading.enumerate()) - before, 'no thread more than before')


def test_closing_while_connecting_ends_it(lab):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(('127.0.0.1', 0))
        r = CflibRadio(RadioSettings(uri=f'udp://127.0.0.1:{s.getsockname()[1]}', connect_timeout=300.0))
        thread = running(lambda: pytest.raises(RadioError, r.connect))
        time.sleep(0.2)
        r.close()
        thread.join(WAIT)
        assert not thread.is_alive() and r.telemetry().link == 'lost'


def test_two_radios_in_one_process_keep_apart_while_one_is_opened_again(lab):
    first, second = drone(volts=4.1), drone(volts=3.9)
    air, radios = lab(first, second)
    threads = [running(r.connect) for r in radios]
    for thread in threads:
        thread.join(WAIT)
    assert [r.telemetry().battery_v for r in radios] == pytest.approx([4.1, 3.9])
    before = radios[1].telemetry().stamp
    radios[0].connect()
    assert radios[1].telemetry().link == 'up'
    until(lambda: radios[1].telemetry().stamp > before, "the other's telemetry")
    radios[1].arm(True)
    until(lambda: second.arm.called, 'a command to the second')
    assert not first.arm.called
    radios[0].close()
    before = radios[1].telemetry().stamp
    until(lambda: radios[1].telemetry().stamp > before, 'telemetry after the other was closed')


ONE = '''
import sys
from crazyflie_interface.cflib_radio import CflibRadio
from crazyflie_interface.settings import RadioSettings
r = CflibRadio(RadioSettings(uri=sys.argv[1], connect_timeout=30.0))
r.connect()
print(r.set_and_check_parameters(), round(r.telemetry().battery_v, 2), flush=True)
r.close()
'''


def test_two_processes_fly_two_drones(lab):
    air, radios = lab(drone(volts=4.1), drone(volts=3.9))
    processes = [subprocess.Popen([sys.executable, '-c', ONE, r.settings.uri], text=True,
                                  stdout=subprocess.PIPE) for r in radios]
    assert [p.communicate(timeout=60.0)[0] for p in processes] == ['() 4.1\n', '() 3.9\n']
