# SPDX-License-Identifier: GPL-3.0-or-later
"""The real link: unmodified cflib over Crazyradio, USB or UDP. `cflib_link` opens and closes connections;
this file keeps one for a flight.

- On the ground the link is opened again as often as it takes, with growing pauses; never in flight, where
  a lost link stays lost until the flight has ended.
- The link is up when the drone's telemetry arrives, not when it was asked for. Telemetry at 10 Hz shows
  that the link lives, also on UDP and USB, which never report silence.
- send_packet can block for 2 s while the radio retries: one thread of our own sends, the flight's never
  waits. In its queue a newer setpoint or pose replaces an older one that has not been sent.
- Body rates go in rad/s, and int() truncates: see setpoint.int16_milli_to_cflib_si.

Link budget. Up: 100 poses, 50 setpoints, 5 watchdog and 2 ping packets a second; down, on the
acknowledgements of these: 10 + 2 log packets and 2 pings. A packet of 32 bytes and an acknowledgement as
long take 2 x 41 bytes of air and 2 x 130 us to turn the radio round (nRF24L01+ datasheet): 0.6 ms at 2M,
0.9 ms at 1M, 2.9 ms at 250K, so 157 of them fill 9, 14 or 45 % of the air, without retries.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable

import numpy as np
from cflib.crazyflie import Crazyflie
from cflib.crazyflie.log import LogConfig
from cflib.crtp.crtpstack import CRTPPacket, CRTPPort

from crazyflie_interface.cflib_link import LinkError, check_uri, dispose, explain, open_link, prepare_cflib
from crazyflie_interface.link_meter import LinkMeter
from crazyflie_interface.radio import FLYING, RadioError, Telemetry
from crazyflie_interface.setpoint import Setpoint, int16_milli_to_cflib_si, si_to_int16_milli
from crazyflie_interface.settings import RadioSettings

FIRST_PAUSE, PAUSE_FACTOR, LAST_PAUSE = 0.2, 1.5, 3.0  # s between two attempts to connect
QUIET_START = 2.0  # s in which the log does not complain: the drone may be starting, too
HOPELESS_ATTEMPTS = 3  # an error that waiting cannot cure must come so often in a row: udev acts a moment
# after a dongle is plugged in
TELEMETRY_START = 3.0  # s from asking for the telemetry to the first of each block
PARAMETER_TIMEOUT = 2.0  # s for one parameter to be written and read back
SILENCE = 5.0  # s without telemetry after which the link counts as lost
DEADMAN_STREAM = 0.4  # s after the last setpoint; the firmware levels out at 0.5 s
DEADMAN_AIR = 1.5  # s after the flight's last look at the telemetry, while it flies without setpoints
DEADMAN_SPEED = 0.4  # m/s of the landing that follows

# Log blocks: period (ms) and variables, at most 26 bytes each. supervisor.info is 2 bytes, the others are 4.
LOG_BLOCKS = {
    'state': (100, ('pm.vbat', 'supervisor.info', 'stateEstimate.x', 'stateEstimate.y', 'stateEstimate.z',
                    'stateEstimate.yaw')),
    'variance': (500, ('kalman.varPX', 'kalman.varPY', 'kalman.varPZ')),
}
OPTIONAL_PARAMETERS = ('commander.enHighLevel',)  # firmware without it has it always on
_RADIO_NUMBERS = ('link_quality', 'uplink_rssi', 'uplink_rate', 'downlink_rate', 'uplink_congestion',
                  'downlink_congestion')  # cflib's callbacks are called <name>_updated

_logger = logging.getLogger(__name__)


class Outbox:
    """What waits to be sent, oldest first. Not thread-safe."""

    def __init__(self):
        self._items: collections.deque[tuple[str, Callable[[Crazyflie], None]]] = collections.deque()

    def __len__(self):
        return len(self._items)

    def put(self, kind: str, send: Callable[[Crazyflie], None]) -> None:
        """Queue a packet. A pose replaces a waiting pose; a setpoint replaces a waiting setpoint unless
        a command came between, because the two must arrive in that order."""
        item = (kind, send)
        for i in range(len(self._items) - 1, -1, -1):
            waiting = self._items[i][0]
            if waiting == kind and kind in ('pose', 'setpoint'):
                self._items[i] = item
                return
            if kind != 'pose' and waiting == 'command':
                break
        self._items.append(item)

    def clear(self) -> None:
        """Forget all that waits."""
        self._items.clear()

    def take(self) -> tuple[str, Callable[[Crazyflie], None]]:
        """The oldest. IndexError when empty."""
        return self._items.popleft()


class CflibRadio:
    """Radio over cflib. `clock` is a steady one (s): telemetry is stamped with it, and silence measured."""

    def __init__(self, settings: RadioSettings, clock: Callable[[], float] = time.monotonic):
        check_uri(settings.uri)
        self.settings, self._clock = settings, clock
        self._lock = threading.Condition()
        self._telemetry = Telemetry()
        self._meter = LinkMeter()
        self._connections = 0  # links that came up
        self._told = ''  # the error that the log last told
        self._outbox = Outbox()
        self._cf: Crazyflie | None = None
        self._closing = threading.Event()
        self._sender: threading.Thread | None = None
        self._setpoint_given: float | None = None  # when the last setpoint came, until a stop notice
        self._airborne = False  # the flight has told the drone to fly, and not yet to land
        self._flight_heard = math.inf  # when the flight last asked for telemetry

    # --- connection -------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the link; blocks until telemetry arrives. Raises RadioError when no drone answers within
        `connect_timeout`, at once where waiting cannot help.

        Called again, it begins anew: it forgets what was known of the drone, and waits for it until
        `close`, because on the ground a drone is switched off, its battery changed, a dongle moved.
        Refused while a drone flies by our command.
        """
        if self._airborne:
            raise RadioError(f'{self.settings.uri}: the link is not opened again in flight')
        self._forget_drone()
        prepare_cflib()
        cf = self._persist(math.inf if self._connections else self.settings.connect_timeout)
        self._connections += 1
        self._update(link='up', fault='')
        cf.connection_lost.add_callback(lambda uri, why: self._on_lost(cf, why))
        if cf.link is None:  # lost between the two lines above
            self._on_lost(cf, 'lost right after connecting')
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_loop, name='radio_sender', daemon=True)
            self._sender.start()

    def _forget_drone(self):
        cf, self._cf = self._cf, None
        if cf is not None:
            dispose(cf)
        with self._lock:
            self._outbox.clear()
            self._telemetry, self._meter = Telemetry(), LinkMeter()
        self._setpoint_given, self._flight_heard = None, math.inf

    def _persist(self, limit: float) -> Crazyflie:
        """Try until connected, or for `limit` s."""
        begin, pause, hopeless = self._clock(), FIRST_PAUSE, 0
        while True:
            try:
                return self._attempt()
            except LinkError as error:
                waited = self._clock() - begin
                self._tell(error, waited)
                hopeless = hopeless + 1 if error.hopeless else 0
                if self._closing.is_set() or (hopeless >= HOPELESS_ATTEMPTS and math.isfinite(limit)):
                    raise RadioError(str(error)) from None
                if waited > limit:
                    raise RadioError(f'{error} (tried for {limit} s)') from None
            self._closing.wait(min(pause, max(limit - waited, 0.02)))
            pause = min(PAUSE_FACTOR * pause, LAST_PAUSE)

    def _tell(self, error, waited):
        """Say why there is no link yet: in the telemetry at once, in the log once a change."""
        self._update(fault=str(error))
        if waited > QUIET_START and str(error) != self._told:
            self._told = str(error)
            _logger.warning('%s; trying again', error)

    def _attempt(self) -> Crazyflie:
        self._cf = cf = open_link(self.settings, self._closing)
        try:
            self._start_telemetry(cf)
        except LinkError:
            self._cf = None
            dispose(cf)
            raise
        return cf

    def _start_telemetry(self, cf):
        meter = self._meter
        cf.add_header_callback(lambda pk: meter.on_echo(bytes(pk.data), self._clock()), CRTPPort.LINKCTRL, 0)
        for name in _RADIO_NUMBERS:
            getattr(cf.link_statistics, f'{name}_updated').add_callback(
                lambda value, name=name: meter.on_radio(name, value))
        missing, errors = set(LOG_BLOCKS), []
        def on_data(_stamp, data, block):
            missing.discard(block.name)
            self._on_log(cf, data)
        for name, (period, variables) in LOG_BLOCKS.items():
            block = LogConfig(name, period)
            for variable in variables:
                block.add_variable(variable)
            block.data_received_cb.add_callback(on_data)
            block.error_cb.add_callback(lambda block, why: errors.append(f'log block {block.name}: {why}'))
            try:
                cf.log.add_config(block)
            except KeyError as error:
                raise LinkError(f'{self.settings.uri}: the firmware is too old, {error.args[0]}', True) from None
            block.start()
        end = time.monotonic() + TELEMETRY_START
        while missing:
            if errors or cf.link is None or self._closing.is_set() or time.monotonic() > end:
                why = errors[0] if errors else f'no telemetry of {", ".join(sorted(missing))} came'
                raise LinkError(f'{self.settings.uri}: connected, but {why}')
            self._closing.wait(0.01)

    def close(self) -> None:
        """Send what is queued (for at most 0.5 s), then close the link. A drone that still flies is told
        to land, which it then does by itself."""
        if self._airborne:
            self._land_and_notify()
        end = time.monotonic() + 0.5
        while self._sender is not None and self._sender.is_alive() and time.monotonic() < end:
            with self._lock:
                if not len(self._outbox):
                    break
            time.sleep(0.01)
        self._closing.set()
        with self._lock:
            self._lock.notify_all()
        if self._sender is not None:
            self._sender.join(0.5)  # a sender stuck in cflib is a daemon and ends with the process
        cf, self._cf = self._cf, None
        if cf is not None:
            dispose(cf)
        self._update(link='lost', fault='closed')

    def _on_lost(self, cf, message):
        if cf is self._cf:
            self._update(link='lost', fault=str(explain(self.settings.uri, message)))

    # --- parameters -------------------------------------------------------------------------------

    def parameters(self) -> dict[str, float]:
        """What the flight needs set: Mellinger (2), Kalman (2), high-level commander, trust in mocap."""
        return {'stabilizer.controller': 2, 'stabilizer.estimator': 2, 'commander.enHighLevel': 1,
                'locSrv.extPosStdDev': self.settings.ext_pos_std_dev,
                'locSrv.extQuatStdDev': self.settings.ext_quat_std_dev}

    def set_and_check_parameters(self) -> tuple[str, ...]:
        """Set `parameters()`, read each back from the drone, reset the estimator (not of a drone that
        flies: its link was lost in flight); blocks for at most 2 s a parameter. Returns the faults, which
        the telemetry then carries too."""
        faults = tuple(filter(None, (self._set_and_check(n, v) for n, v in self.parameters().items())))
        if not (self._telemetry.supervisor or 0) & FLYING:
            self.reset_estimator()
        self._update(parameter_faults=faults)
        return faults

    def _set_and_check(self, name: str, value: float) -> str:
        cf = self._cf
        if cf is None:
            return f'parameter {name}: the link is closed'
        if cf.param.toc.get_element_by_complete_name(name) is None:
            return '' if name in OPTIONAL_PARAMETERS else f'the firmware has no parameter {name}'
        try:
            return self._write_and_read(cf, name, value)
        except Exception as error:  # whatever cflib raises when the link breaks meanwhile
            return f'parameter {name}: {error!r}'

    @staticmethod
    def _write_and_read(cf, name, value):
        read, answers = threading.Event(), []
        def on_value(_name, text):
            answers.append(float(text))
            read.set()
        cf.param.add_update_callback(*name.split('.'), cb=on_value)
        try:
            cf.param.set_value(name, value)
            if not read.wait(PARAMETER_TIMEOUT / 2):
                return f'parameter {name}: the drone did not confirm {value:g}'
            read.clear()  # that was the echo of the write; now ask what is stored
            cf.param.request_param_update(name)
            if not read.wait(PARAMETER_TIMEOUT / 2):
                return f'parameter {name}: no answer to reading it back'
        finally:
            cf.param.remove_update_callback(*name.split('.'), cb=on_value)
        if not math.isclose(answers[-1], value, rel_tol=1e-6):
            return f'parameter {name} reads {answers[-1]:g}, was set to {value:g}'
        return ''

    def reset_estimator(self) -> None:
        """kalman.resetEstimation up and down; cflib's own queue sends it."""
        self._put('command', lambda cf: cf.param.set_value('kalman.resetEstimation', 1))
        self._put('command', lambda cf: cf.param.set_value('kalman.resetEstimation', 0))

    # --- telemetry (cflib's threads) --------------------------------------------------------------

    def telemetry(self) -> Telemetry:
        """The newest; `lost` also after 5 s of silence. Asking shows the radio thread that the flight's
        thread lives."""
        self._flight_heard = now = self._clock()
        with self._lock:
            t, meter = self._telemetry, self._meter
        if t.link == 'up' and t.stamp is not None and now - t.stamp > SILENCE:
            t = dataclasses.replace(t, link='lost', fault=f'{self.settings.uri}: silent for {SILENCE} s')
        return dataclasses.replace(t, link_quality=meter.quality,
                                   link_statistics=meter.statistics(max(0, self._connections - 1)))

    def _update(self, **values):
        with self._lock:
            self._telemetry = dataclasses.replace(self._telemetry, **values)

    def _on_log(self, cf, data):
        if cf is not self._cf:  # a link that is being closed
            return
        values = {}
        if 'pm.vbat' in data:
            values |= {'stamp': self._clock(), 'battery_v': data['pm.vbat'],
                       'supervisor': data['supervisor.info'],
                       'position': np.array([data[f'stateEstimate.{a}'] for a in 'xyz']),
                       'yaw': math.radians(data['stateEstimate.yaw'])}
        if 'kalman.varPX' in data:
            values['variance'] = np.array([data[f'kalman.varP{a}'] for a in 'XYZ'])
        self._update(**values)

    # --- commands ---------------------------------------------------------------------------------

    def extpose(self, position, quaternion) -> None:
        """See Radio."""
        p, q = [float(x) for x in position], [float(x) for x in quaternion]
        self._put('pose', lambda cf: cf.loc.send_extpose(p, q))

    def full_state(self, setpoint: Setpoint) -> None:
        """See Radio."""
        p, v, a, w = (int16_milli_to_cflib_si(si_to_int16_milli(x)) for x in (
            setpoint.position, setpoint.velocity, setpoint.acceleration, setpoint.rates))
        q = [float(x) for x in setpoint.quaternion]
        self._setpoint_given, self._airborne = self._clock(), True
        self._put('setpoint', lambda cf: cf.commander.send_full_state_setpoint(p, v, a, q, *w))

    def notify_stop(self) -> None:
        """See Radio."""
        self._setpoint_given = None
        self._put('command', lambda cf: cf.commander.send_notify_setpoint_stop())

    def takeoff(self, height, duration) -> None:
        """See Radio."""
        self._airborne = True
        self._put('command', lambda cf: cf.high_level_commander.takeoff(
            float(height), float(duration), yaw=None))

    def land(self, height, duration) -> None:
        """See Radio."""
        self._airborne = False
        self._put('command', lambda cf: cf.high_level_commander.land(
            float(height), float(duration), yaw=None))

    def go_to(self, position, yaw, duration) -> None:
        """See Radio."""
        self._airborne = True
        x, y, z = (float(c) for c in position)
        self._put('command', lambda cf: cf.high_level_commander.go_to(
            x, y, z, float(yaw), float(duration)))

    def stop(self) -> None:
        """See Radio."""
        self._put('command', lambda cf: cf.high_level_commander.stop())

    def arm(self, on) -> None:
        """See Radio. Arming begins a new flight, so what the last one could not send is forgotten."""
        if not on:
            self._setpoint_given, self._airborne = None, False
        elif self.telemetry().link == 'up':
            self._update(fault='')
        self._put('command', lambda cf: cf.supervisor.send_arming_request(bool(on)))

    def emergency_stop(self) -> None:
        """See Radio. Overtakes everything that waits."""
        self._setpoint_given, self._airborne = None, False
        with self._lock:
            self._outbox.clear()
        self._put('command', lambda cf: cf.supervisor.send_emergency_stop())

    def emergency_watchdog(self) -> None:
        """See Radio."""
        self._put('command', lambda cf: cf.supervisor.send_emergency_stop_watchdog())

    # --- the sending thread -----------------------------------------------------------------------

    def _put(self, kind, send):
        with self._lock:
            if self._telemetry.link != 'up':
                return
            self._outbox.put(kind, send)
            self._lock.notify_all()

    def _send_loop(self):
        while not self._closing.is_set():
            with self._lock:
                if not len(self._outbox):
                    self._lock.wait(0.05)
                item = self._outbox.take() if len(self._outbox) else None
            self._deadman()
            if self._telemetry.link == 'up':
                if item is not None:
                    self._send(*item)
                self._ping()

    def _ping(self):
        payload = self._meter.ping(self._clock())
        if payload is not None:
            packet = CRTPPacket(CRTPPort.LINKCTRL << 4, payload)
            self._send('ping', lambda cf: cf.send_packet(packet))

    def _send(self, kind, send):
        cf = self._cf
        if cf is None:  # the link is being opened anew
            return
        try:
            send(cf)
        except Exception as error:  # whatever cflib raises: the thread must live to send the landing
            _logger.exception('cannot send a %s', kind)
            self._update(fault=f'cannot send a {kind}: {error!r}')

    def _deadman(self):
        """The flight's thread has fallen silent in the air: land for it."""
        now = self._clock()
        streaming = self._setpoint_given is not None and now - self._setpoint_given > DEADMAN_STREAM
        if streaming or (self._airborne and now - self._flight_heard > DEADMAN_AIR):
            self._update(fault='the flight fell silent, the radio thread lands the drone')
            self._land_and_notify()

    def _land_and_notify(self):
        estimate = self._telemetry.position
        duration = max(1.0, (1.0 if estimate is None else float(estimate[2])) / DEADMAN_SPEED)
        for _ in range(2):
            self.land(0.0, duration)
            self.notify_stop()
