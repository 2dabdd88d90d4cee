# SPDX-License-Identifier: GPL-3.0-or-later
import itertools
import logging
import math
import socket
import struct
import threading
from unittest.mock import MagicMock

import cflib.crtp
import numpy as np
import pytest
from cflib.crazyflie import Crazyflie
from cflib.crazyflie.commander import Commander
from cflib.crazyflie.high_level_commander import HighLevelCommander
from cflib.crazyflie.localization import Localization
from cflib.crazyflie.log import LogTocElement
from cflib.crazyflie.param import Param
from cflib.crazyflie.supervisor import Supervisor
from cflib.crtp.udpdriver import UdpDriver

from crazyflie_interface import cflib_link, cflib_radio, link_meter
from crazyflie_interface.cflib_link import ResendingUdp, check_uri, explain
from crazyflie_interface.cflib_radio import LOG_BLOCKS, CflibRadio, Outbox
from crazyflie_interface.link_meter import LinkMeter
from crazyflie_interface.radio import Radio, RadioError
from crazyflie_interface.setpoint import Setpoint
from crazyflie_interface.settings import RadioSettings

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
HERE = Setpoint(np.array([0.1, 0.2, 0.3]), np.zeros(3), np.zeros(3), LEVEL, np.array([0.0, 0.0, 2.0]))


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


@pytest.fixture
def linked():
    """A CflibRadio over a mocked Crazyflie, without its thread: `flush` sends what waits."""
    clock = Clock()
    r = CflibRadio(RadioSettings(uri='udp://127.0.0.1:19850'), clock)
    cf = MagicMock(spec=Crazyflie)
    cf.commander, cf.loc = MagicMock(spec=Commander), MagicMock(spec=Localization)
    cf.high_level_commander, cf.supervisor = MagicMock(spec=HighLevelCommander), MagicMock(spec=Supervisor)
    cf.param = MagicMock(spec=Param)
    cf.link, cf.incoming = MagicMock(), MagicMock()
    r._cf = cf
    r._update(link='up', stamp=clock.now)
    def flush():
        while len(r._outbox):
            r._send(*r._outbox.take())
    return r, cf, clock, flush


@pytest.mark.parametrize('uri', [
    'radio://0/80/2M/E7E7E7E7E7', 'radio://0/0/250K', 'radio://1/125/1M/E7', 'usb://0', 'udp://127.0.0.1:19850',
    'udp://sim-host:19850', 'radio://0/80/2M/E7E7E7E7E7?rate_limit=100'])
def test_uris_that_cflib_opens_as_meant_are_taken(uri):
    check_uri(uri)


@pytest.mark.parametrize('uri', [
    '', 'radio://0/126/2M', 'radio://0/80/2m', 'radio://0/80/3M', 'radio://0/80', 'radio://x/80/2M', 'usb://',
    'udp://127.0.0.1', 'udp://:19850', 'tcp://1:1', 'radio://0/80/2M/E7E7E7E7E7E7', '/dev/ttyACM0'])
def test_uris_that_cflib_would_misread_are_refused_with_what_was_expected(uri):
    with pytest.raises(RadioError, match='expected radio://'):
        CflibRadio(RadioSettings(uri=uri))


@pytest.mark.parametrize('text,word,hopeless', [
    ("Couldn't load link driver: Cannot find a Crazyradio Dongle", 'no such Crazyradio', False),
    ('usb.core.USBError: [Errno 13] Access denied (insufficient permissions)', 'udev', True),
    ('usb.core.USBError: [Errno 16] Resource busy', 'another program', False),
    ('usb.core.NoBackendError: No backend available', 'libusb', True),
    ('Could not open usb://0', 'by USB', False),
    ('Too many packets lost', 'hears no drone', False),
    ('ConnectionRefusedError: [Errno 111] Connection refused', 'nothing listens', False),
    ('something new\nwith a traceback', 'something new', False), ('', 'no reason', False)])
def test_each_connection_error_says_in_one_line_what_to_do(text, word, hopeless):
    error = explain('radio://0/80/2M', text)
    assert word in str(error) and '\n' not in str(error) and error.hopeless is hopeless
    assert str(error).startswith('radio://0/80/2M')


def test_an_absent_drone_ends_connect_with_its_reason_after_the_timeout():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # a port where nobody answers
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
        r = CflibRadio(RadioSettings(uri=f'udp://127.0.0.1:{port}', connect_timeout=0.5))
        with pytest.raises(RadioError, match='no Crazyflie answers'):
            r.connect()


def test_connecting_stops_when_the_radio_is_closed():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(('127.0.0.1', 0))
        r = CflibRadio(RadioSettings(uri=f'udp://127.0.0.1:{s.getsockname()[1]}', connect_timeout=300.0))
        errors = []
        def connect():
            try:
                r.connect()
            except RadioError as error:
                errors.append(str(error))
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        r.close()
        thread.join(10.0)
        assert errors and 'closed' in errors[0]


def test_cflib_uses_the_udp_link_that_resends():
    cflib_link.prepare_cflib()
    cflib_link.prepare_cflib()
    assert cflib.crtp.CLASSES.count(ResendingUdp) == 1 and UdpDriver not in cflib.crtp.CLASSES
    assert ResendingUdp().needs_resending is True


def test_cflib_complains_of_the_same_thing_once_a_second(caplog, monkeypatch):
    cflib_link.prepare_cflib()
    monkeypatch.setattr(cflib_link, '_logged', {})
    for port in range(50):
        logging.getLogger('cflib.crazyflie').error('nonsense on port %d', port)
    logging.getLogger('cflib.crazyflie').error('other nonsense')
    assert [r.getMessage() for r in caplog.records] == ['nonsense on port 0', 'other nonsense']


def test_log_blocks_fit_into_their_packets():
    size = {'uint16_t': 2, 'float': 4}
    for _, variables in LOG_BLOCKS.values():
        kinds = ['uint16_t' if v == 'supervisor.info' else 'float' for v in variables]
        assert sum(size[k] for k in kinds) <= 26
        assert all(k in {t[0] for t in LogTocElement.types.values()} for k in kinds)


def test_it_has_every_method_of_the_protocol():
    for name in (n for n in vars(Radio) if not n.startswith('_')):
        assert callable(getattr(CflibRadio, name))


def test_a_full_state_goes_out_in_si_units_and_rates_in_rad_per_s(linked):
    r, cf, _, flush = linked
    r.full_state(HERE)
    flush()
    p, v, a, q, *w = cf.commander.send_full_state_setpoint.call_args.args
    assert [int(x * 1000) for x in p] == [100, 200, 300] and [int(x * 1000) for x in w] == [0, 0, 2000]
    assert q == [0.0, 0.0, 0.0, 1.0]


def test_commands_go_out_in_their_order_and_newer_setpoints_replace_waiting_ones(linked):
    r, cf, _, flush = linked
    r.full_state(HERE)
    r.full_state(HERE)
    r.extpose(np.zeros(3), LEVEL)
    r.go_to(np.ones(3), 0.5, 2.0)
    r.extpose(np.ones(3), LEVEL)
    r.notify_stop()
    flush()
    names = [name for name, _, _ in cf.mock_calls]
    assert names == ['commander.send_full_state_setpoint', 'loc.send_extpose', 'high_level_commander.go_to',
                     'commander.send_notify_setpoint_stop']
    assert cf.loc.send_extpose.call_args.args[0] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize('seed', range(20))
def test_the_outbox_keeps_every_command_in_order_and_the_newest_setpoint_of_each_stretch(seed):
    rng, box, given = np.random.default_rng(seed), Outbox(), []
    for k in range(40):
        kind = ('command', 'setpoint', 'pose')[rng.integers(3)]
        given.append((kind, k))
        box.put(kind, k)
    sent = [box.take() for _ in range(len(box))]
    assert [k for kind, k in sent if kind == 'command'] == [k for kind, k in given if kind == 'command']
    assert [k for kind, k in sent if kind == 'pose'] == [k for kind, k in given if kind == 'pose'][-1:]
    stretches = itertools.groupby((g for g in given if g[0] != 'pose'), key=lambda g: g[0])
    newest = [list(group)[-1][1] for kind, group in stretches if kind == 'setpoint']
    assert [k for kind, k in sent if kind == 'setpoint'] == newest


def test_an_emergency_stop_overtakes_all_that_waits(linked):
    r, cf, _, flush = linked
    r.full_state(HERE)
    r.go_to(np.ones(3), 0.0, 1.0)
    r.emergency_stop()
    flush()
    assert [name for name, _, _ in cf.mock_calls] == ['supervisor.send_emergency_stop']


def test_a_flight_that_falls_silent_in_mid_stream_is_landed_before_the_firmware_levels_out(linked):
    r, cf, clock, flush = linked
    r._update(position=np.array([0.0, 0.0, 1.0]))
    r.full_state(HERE)
    flush()
    clock.now += 0.39
    r._deadman()
    assert r._telemetry.fault == ''
    clock.now += 0.02
    r._deadman()
    flush()
    assert 'radio thread lands' in r.telemetry().fault
    names = [name for name, _, _ in cf.mock_calls][1:]
    assert names == ['high_level_commander.land', 'commander.send_notify_setpoint_stop'] * 2
    assert cf.high_level_commander.land.call_args.args == (0.0, 2.5)
    clock.now += 5.0
    r._deadman()
    assert len(r._outbox) == 0


def test_a_flight_that_falls_silent_in_a_high_level_hold_is_landed_and_one_on_the_ground_is_left(linked):
    r, cf, clock, flush = linked
    r.telemetry()
    clock.now += 10.0
    r._deadman()
    assert len(r._outbox) == 0
    r.takeoff(0.5, 2.0)
    r.telemetry()
    clock.now += 1.4
    r._deadman()
    flush()
    assert not cf.high_level_commander.land.called
    clock.now += 0.2
    r._deadman()
    flush()
    assert cf.high_level_commander.land.called


def test_closing_in_the_air_lands(linked):
    r, cf, _, flush = linked
    r.go_to(np.ones(3), 0.0, 1.0)
    r._sender = None
    r._land_and_notify = lambda: (type(r)._land_and_notify(r), flush())
    r.close()
    assert cf.high_level_commander.land.called and cf.close_link.called


def test_after_a_stop_notice_silence_is_allowed(linked):
    r, _, clock, flush = linked
    r.full_state(HERE)
    r.go_to(np.ones(3), 0.0, 1.0)
    r.notify_stop()
    flush()
    clock.now += 3.0
    r.telemetry()
    r._deadman()
    assert len(r._outbox) == 0 and r.telemetry().fault == ''


def test_an_exception_in_cflib_is_a_fault_of_the_link_and_not_the_end_of_the_thread(linked):
    r, cf, _, flush = linked
    cf.high_level_commander.land.side_effect = struct.error('too big')
    r.land(0.0, 2.0)
    flush()
    assert 'too big' in r.telemetry().fault


def test_nothing_is_queued_before_the_link_is_up_or_after_it_is_lost(linked):
    r, _, _, _ = linked
    r._on_lost(r._cf, 'Too many packets lost')
    r.arm(True)
    assert len(r._outbox) == 0 and r.telemetry().link == 'lost' and 'hears no drone' in r.telemetry().fault


def test_five_seconds_of_silence_are_a_lost_link(linked):
    r, _, clock, _ = linked
    clock.now += 4.9
    assert r.telemetry().link == 'up'
    clock.now += 0.2
    assert r.telemetry().link == 'lost' and 'silent' in r.telemetry().fault


def test_telemetry_is_in_si_units_and_stamped_with_our_clock(linked):
    r, _, clock, _ = linked
    clock.now = 12.5
    r._on_log(r._cf, {'pm.vbat': 4.1, 'supervisor.info': 9, 'stateEstimate.x': 1.0, 'stateEstimate.y': 2.0,
                  'stateEstimate.z': 3.0, 'stateEstimate.yaw': 90.0})
    r._on_log(r._cf, {'kalman.varPX': 1e-4, 'kalman.varPY': 2e-4, 'kalman.varPZ': 3e-4})
    t = r.telemetry()
    assert (t.stamp, t.battery_v, t.supervisor, t.yaw) == (12.5, 4.1, 9, math.pi / 2)
    np.testing.assert_array_equal(t.position, [1, 2, 3])
    np.testing.assert_array_equal(t.variance, [1e-4, 2e-4, 3e-4])


def test_pings_go_out_at_their_period_and_their_round_trips_and_losses_are_counted():
    meter, t, sent = LinkMeter(), 0.0, []
    while t < 30.0:
        payload = meter.ping(t)
        if payload is not None:
            sent.append(t)
            if len(sent) % 4:  # every fourth is lost
                meter.on_echo(payload, t + 0.010)
                meter.on_echo(payload, t + 0.2)  # twice, as after a resend: the first counts
        t += 0.05
    assert len(sent) == pytest.approx(30.0 / link_meter.PERIOD, abs=2)
    s = meter.statistics(reconnects=3)
    assert s.latency == pytest.approx(0.010) and s.pings_lost == pytest.approx(0.25, abs=0.06)
    assert s.reconnects == 3 and len(meter._waiting) <= 3


@pytest.mark.parametrize('payload', [b'', b'\x01', b'\x00' + bytes(8), struct.pack('<Bd', 1, math.nan),
                                     struct.pack('<Bd', 1, 1e300), bytes(30)])
def test_an_echo_that_is_not_ours_changes_nothing(payload):
    meter = LinkMeter()
    meter.ping(0.0)
    meter.on_echo(payload, 0.01)
    assert meter.statistics() == LinkMeter().statistics()


def test_what_cflib_counts_is_given_in_the_units_of_the_status():
    meter = LinkMeter()
    for name, value in (('link_quality', 85.0), ('uplink_rssi', 52), ('uplink_rate', 300.0),
                        ('uplink_congestion', 0.4)):
        meter.on_radio(name, value)
    s = meter.statistics()
    assert (meter.quality, s.retries, s.rssi_dbm, s.uplink_hz, s.uplink_use) == (85.0, 1.5, -52.0, 300.0, 0.4)
    assert s.downlink_hz is None and s.latency is None and s.pings_lost is None


class Parameters:
    """Stands in for cflib's Param: a drone that keeps what it is set to, but for `stubborn`."""

    def __init__(self, mock, stubborn=(), missing=(), deaf=()):
        self.values, self.callbacks = {}, {}
        self.stubborn, self.deaf = stubborn, deaf
        mock.toc = MagicMock()
        mock.toc.get_element_by_complete_name.side_effect = lambda n: None if n in missing else object()
        mock.add_update_callback.side_effect = lambda g, n, cb: self.callbacks.__setitem__(f'{g}.{n}', cb)
        mock.remove_update_callback.side_effect = lambda g, n, cb: self.callbacks.pop(f'{g}.{n}')
        mock.set_value.side_effect = self.set
        mock.request_param_update.side_effect = self.read

    def set(self, name, value):
        self.values[name] = 1 if name in self.stubborn else float(np.float32(value))
        if name not in self.deaf and name in self.callbacks:
            self.callbacks[name](name, str(self.values[name]))

    def read(self, name):
        self.callbacks[name](name, str(self.values[name]))


def test_parameters_are_set_and_read_back(linked):
    r, cf, _, flush = linked
    drone = Parameters(cf.param)
    assert r.set_and_check_parameters() == ()
    flush()
    assert drone.values['stabilizer.controller'] == 2 and drone.values['stabilizer.estimator'] == 2
    assert drone.values['locSrv.extQuatStdDev'] == pytest.approx(0.0045)
    assert [c.args for c in cf.param.set_value.call_args_list][-2:] == [
        ('kalman.resetEstimation', 1), ('kalman.resetEstimation', 0)]
    assert r.telemetry().parameter_faults == () and drone.callbacks == {}


def test_each_parameter_that_does_not_read_back_is_named(linked, monkeypatch):
    monkeypatch.setattr(cflib_radio, 'PARAMETER_TIMEOUT', 0.02)
    r, cf, _, _ = linked
    Parameters(cf.param, stubborn=('stabilizer.controller',), deaf=('locSrv.extPosStdDev',),
               missing=('stabilizer.estimator', 'commander.enHighLevel'))
    controller, estimator, std_dev = r.set_and_check_parameters()
    assert controller == 'parameter stabilizer.controller reads 1, was set to 2'
    assert estimator == 'the firmware has no parameter stabilizer.estimator'  # enHighLevel is optional
    assert 'locSrv.extPosStdDev' in std_dev and 'confirm' in std_dev
    assert r.telemetry().parameter_faults == (controller, estimator, std_dev)


def test_closing_sends_no_zero_setpoint():
    cf = Crazyflie()
    sent, link = [], MagicMock()
    link.send_packet.side_effect = lambda pk: sent.append(pk)
    link.receive_packet.return_value = None
    cf.link = link
    cflib_link.dispose(cf)
    assert sent == [] and link.close.called and cf.link is None
