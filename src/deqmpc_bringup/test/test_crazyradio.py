# SPDX-License-Identifier: GPL-3.0-or-later
"""CflibRadio over cflib's own Crazyradio driver: a dongle as pyusb shows it, simulated drones in the air."""

import threading
import time

import pytest
import usb.core

pytest.importorskip('cflib', reason='cflib is not installed')
from cflib.crtp.radiodriver import RadioManager  # noqa: E402
from crazyradio_dongle import Dongle, RadioDrone  # noqa: E402
from test_radio_link import WAIT, Air, drone, running, until  # noqa: E402

from crazyflie_interface import cflib_link, cflib_radio  # noqa: E402
from crazyflie_interface.cflib_link import SteadyCrazyradio  # noqa: E402
from crazyflie_interface.cflib_radio import CflibRadio  # noqa: E402
from crazyflie_interface.radio import RadioError  # noqa: E402
from crazyflie_interface.settings import RadioSettings  # noqa: E402

RATE_2M = 2
DENIED = usb.core.USBError('Access denied (insufficient permissions)', -3, 13)
BUSY = usb.core.USBError('Resource busy', -6, 16)


class Lab:
    """Two drones at channel 80, addresses E7E7E7E701 and ...02, and the dongles that are plugged in."""

    def __init__(self):
        self.firmware = [drone(volts=4.1), drone(volts=3.9)]
        self.pump = Air(*self.firmware)
        self.drones = [RadioDrone(peer.address) for peer in self.pump.peers]
        air = {(80, RATE_2M, (0xE7, 0xE7, 0xE7, 0xE7, k + 1)): d for k, d in enumerate(self.drones)}
        self.dongles = [Dongle('AAAAAAAA01', air), Dongle('BBBBBBBB02', air)]
        self.radios = []

    def find(self, **_):
        """usb.core.find"""
        return iter([d for d in self.dongles if d.plugged])

    def radio(self, number=1, dongle='0', timeout=WAIT):
        r = CflibRadio(RadioSettings(uri=f'radio://{dongle}/80/2M/E7E7E7E70{number}', connect_timeout=timeout,
                                     setup_timeout=WAIT, toc_cache=''))
        self.radios.append(r)
        return r

    def connected(self, *args, **kwargs):
        r = self.radio(*args, **kwargs)
        r.connect()
        return r


@pytest.fixture
def lab(monkeypatch):
    lab = Lab()
    monkeypatch.setattr(usb.core, 'find', lab.find)
    monkeypatch.setattr(RadioManager, '_radios', [])
    monkeypatch.setattr(cflib_radio, 'LAST_PAUSE', 0.3)
    monkeypatch.setattr(cflib_link, 'USB_PAUSE', 0.001)
    yield lab
    for r in lab.radios:
        r.close()
    lab.pump.close()
    for d in lab.drones:
        d.socket.close()


def test_what_the_dongle_measures_is_in_the_telemetry(lab):
    lab.dongles[0].retries = 2
    r = lab.connected()
    assert r.set_and_check_parameters() == ()
    until(lambda: r.telemetry().link_statistics.rssi_dbm is not None
          and r.telemetry().link_statistics.uplink_hz, 'statistics')
    t = r.telemetry()
    s = t.link_statistics
    assert s.retries == pytest.approx(2.0, abs=0.5) and t.link_quality == pytest.approx(80.0, abs=5.0)
    assert s.rssi_dbm == pytest.approx(-40.0)
    assert s.uplink_hz > 20.0 and s.downlink_hz > 20.0 and 0.0 <= s.uplink_use <= 1.0 and 0.0 < s.downlink_use
    until(lambda: r.telemetry().link_statistics.latency, 'a ping answered')


def test_a_dongle_plugged_in_late_is_found(lab):
    lab.dongles[0].plugged = lab.dongles[1].plugged = False
    r = lab.radio()
    thread = running(r.connect)
    until(lambda: 'no such Crazyradio dongle' in r.telemetry().fault, 'the reason in the telemetry')
    lab.dongles[0].plugged = True
    thread.join(WAIT)
    assert r.telemetry().link == 'up'


@pytest.mark.parametrize('name', ['0', 'AAAAAAAA01'])
def test_a_missing_usb_permission_is_told_at_once_with_its_remedy(lab, name):
    lab.dongles[0].refusal = DENIED
    with pytest.raises(RadioError, match='no permission .* udev'):
        lab.radio(dongle=name, timeout=300.0).connect()


def test_a_dongle_in_use_is_named_so_and_waited_for(lab):
    lab.dongles[0].refusal = BUSY
    r = lab.radio()
    thread = running(r.connect)
    until(lambda: 'in use by another program' in r.telemetry().fault, 'the reason in the telemetry')
    lab.dongles[0].refusal = None
    thread.join(WAIT)
    assert r.telemetry().link == 'up'


def test_dongles_are_found_by_their_serial_numbers(lab):
    first, second = lab.connected(1, 'AAAAAAAA01'), lab.connected(2, 'BBBBBBBB02')
    assert [r.telemetry().battery_v for r in (first, second)] == pytest.approx([4.1, 3.9])
    assert min(d.sent for d in lab.dongles) > 50
    with pytest.raises(RadioError, match='no such Crazyradio'):
        lab.radio(1, 'CCCCCCCC03', timeout=0.1).connect()


def test_a_drone_switched_off_is_lost_and_found_when_it_is_on_again(lab):
    r = lab.connected()
    lab.drones[0].on = False
    until(lambda: r.telemetry().link == 'lost', 'the loss')
    assert 'hears no drone' in r.telemetry().fault
    thread = running(r.connect)
    until(lambda: r.telemetry().link == 'connecting' and 'hears no drone' in r.telemetry().fault, 'an attempt')
    lab.drones[0].on = True
    thread.join(WAIT)
    assert r.telemetry().link == 'up'


def test_a_radio_link_outlives_an_interruption_of_a_second(lab):
    r = lab.connected()
    lab.drones[0].on = False
    time.sleep(1.0)
    r.land(0.0, 2.0)
    assert r.telemetry().link == 'up'
    lab.drones[0].on = True
    until(lambda: lab.firmware[0].land.called, 'the landing sent meanwhile')
    assert r.telemetry().link == 'up'


def test_two_drones_on_one_dongle_hear_only_their_own_packets(lab):
    first, second = lab.connected(1), lab.connected(2)
    assert [r.telemetry().battery_v for r in (first, second)] == pytest.approx([4.1, 3.9])
    second.arm(True)
    until(lambda: lab.firmware[1].arm.called, 'a command to the second')
    assert not lab.firmware[0].arm.called
    first.close()
    before = second.telemetry().stamp
    until(lambda: second.telemetry().stamp > before, 'telemetry after the other was closed')


def test_a_dongle_pulled_out_is_a_lost_link_that_ends_no_thread_and_heals_when_it_is_back_each_time(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'LOST_PACKETS', 100)  # only to be quicker
    radios = [lab.connected(1), lab.connected(2)]
    for _ in range(2):
        lab.dongles[0].plugged = lab.dongles[1].plugged = False
        until(lambda: all(r.telemetry().link == 'lost' for r in radios), 'the loss')
        assert all('hears no drone' in r.telemetry().fault for r in radios)  # not after 5 s of silence
        threads = [running(r.connect) for r in radios]
        until(lambda: all('no such Crazyradio' in r.telemetry().fault for r in radios), 'the reason')
        assert not [t for t in threading.enumerate() if t.name == 'RadioDriverThread']
        lab.dongles[0].plugged = True
        for thread in threads:
            thread.join(WAIT)
        assert all(r.telemetry().link == 'up' for r in radios)


def test_a_link_that_waits_for_its_drone_leaves_no_thread_behind(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'FIRST_ANSWER', 0.3)
    lab.drones[0].on = False
    with pytest.raises(RadioError):
        lab.radio(timeout=0.01).connect()
    before = set(threading.enumerate())  # with the thread that all links of the dongle share
    with pytest.raises(RadioError):
        lab.radio(timeout=1.5).connect()
    until(lambda: not set(threading.enumerate()) - before, 'no thread more than before')


def test_nothing_is_sent_while_the_dongle_is_not_tuned_to_its_drone(lab, monkeypatch):
    monkeypatch.setattr(cflib_link, 'USB_PAUSE', 0.0)
    dongle = lab.dongles[0]
    radio = SteadyCrazyradio(device=dongle)
    radio.set_address((0xE7, 0xE7, 0xE7, 0xE7, 1))
    radio.set_channel(80)
    assert radio.send_packet([0xFF]).ack
    sent = dongle.sent
    dongle.tuning_fails = True
    radio.set_address((0xE7, 0xE7, 0xE7, 0xE7, 2))
    assert radio.send_packet([0xFF]).ack is False and dongle.sent == sent
    dongle.tuning_fails = False
    radio.set_address((0xE7, 0xE7, 0xE7, 0xE7, 1))  # which it was before: tuned again all the same
    assert radio.send_packet([0xFF]).ack and dongle.tuned[2] == (0xE7, 0xE7, 0xE7, 0xE7, 1)


def test_a_drone_that_comes_up_without_safe_link_is_called_again(lab, monkeypatch):
    calls, real = [], cflib_radio.open_link
    hear = RadioDrone.hear
    def deaf_to_safelink(drone_, packet):
        return b'' if packet == b'\xff\x05\x01' and not calls else hear(drone_, packet)
    monkeypatch.setattr(RadioDrone, 'hear', deaf_to_safelink)
    def attempt(settings, closing):
        try:
            return real(settings, closing)
        except cflib_link.LinkError as error:
            calls.append(str(error))
            raise
    monkeypatch.setattr(cflib_radio, 'open_link', attempt)
    r = lab.connected()
    assert 'without safe link' in calls[0] and not r._cf.link.needs_resending
