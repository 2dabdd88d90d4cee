# SPDX-License-Identifier: GPL-3.0-or-later
"""The real link: unmodified cflib (0.1.34) over Crazyradio, USB or UDP.

Traps of cflib that are avoided here, from our side of its API:

- UDP: `needs_resending` is False, so one lost datagram hangs the connection for ever. `ResendingUdp`
  takes UdpDriver's place in cflib.crtp.CLASSES.
- The first two requests of a connection are never resent on any link: an attempt without an answer is
  given up and begun again.
- The latency ping thread and a link error can wait for each other for ever (Latency.stop joins the
  thread that waits for the lock its caller holds): the pings are stopped once connected. Telemetry at
  10 Hz shows that the link lives, also on UDP and USB, which never report silence.
- send_packet can block for 2 s while the radio retries: one thread of our own sends, the flight's never
  waits. In its queue a newer setpoint or pose replaces an older one that has not been sent.
- close_link() sends a zero setpoint, which would take a flying drone from the high-level commander: the
  link is muted first.
- Body rates go in rad/s, and int() truncates: see setpoint.int16_milli_to_cflib_si.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable

import cflib.crtp
import numpy as np
from cflib.crazyflie import Crazyflie
from cflib.crazyflie.log import LogConfig
from cflib.crtp.udpdriver import UdpDriver

from crazyflie_interface.radio import RadioError, Telemetry
from crazyflie_interface.setpoint import Setpoint, int16_milli_to_cflib_si, si_to_int16_milli
from crazyflie_interface.settings import RadioSettings

FIRST_ANSWER = 1.0  # s in which a drone that is there answers the first two requests
RETRY_PAUSE = 0.2  # s between two attempts
PARAMETER_TIMEOUT = 2.0  # s for one parameter to be written and read back
SILENCE = 5.0  # s without telemetry after which the link counts as lost
DEADMAN_STREAM = 0.4  # s after the last setpoint; the firmware levels out at 0.5 s
DEADMAN_AIR = 1.5  # s after the flight's last look at the telemetry, while it flies without setpoints
DEADMAN_SPEED = 0.4  # m/s of the landing that follows
LOG_PERIOD = 100  # ms

# Log blocks: at most 26 bytes each. supervisor.info is 2 bytes, the others are 4.
LOG_BLOCKS = {
    'state': ('pm.vbat', 'supervisor.info', 'stateEstimate.x', 'stateEstimate.y', 'stateEstimate.z',
              'stateEstimate.yaw'),
    'variance': ('kalman.varPX', 'kalman.varPY', 'kalman.varPZ'),
}
OPTIONAL_PARAMETERS = ('commander.enHighLevel',)  # firmware without it has it always on

_URIS = (
    r'radio://(\d{1,9}|[0-9A-Fa-f]{10})/(\d|[1-9]\d|1[01]\d|12[0-5])/(250K|1M|2M)(/[0-9A-Fa-f]{1,10})?(\?.*)?',
    r'usb://\d+',
    r'udp://[^/:\s]+:\d{1,5}',
)


def check_uri(uri: str) -> None:
    """RadioError unless `uri` is one that cflib opens as meant (it takes a mistyped rate for 2M)."""
    if not any(re.fullmatch(pattern, uri) for pattern in _URIS):
        raise RadioError(f'uri {uri!r}; expected radio://<dongle>/<channel 0-125>/<250K, 1M or 2M>/'
                         '<address>, usb://<number> or udp://<host>:<port>')


class ResendingUdp(UdpDriver):
    """cflib's UDP driver, asking for the resending that the Crazyflie class does on lossy links."""

    def __init__(self):
        super().__init__()
        self.needs_resending = True


class _Muted:
    """A link on its way out: nothing is sent any more."""

    needs_resending = False

    def __init__(self, link):
        self._link = link

    def send_packet(self, pk):
        """Drop it."""

    def receive_packet(self, wait=0):
        """As the link."""
        return self._link.receive_packet(wait)

    def close(self):
        """As the link."""
        self._link.close()


class Outbox:
    """What waits to be sent, oldest first. Not thread-safe."""

    def __init__(self):
        self._items: collections.deque[tuple[str, Callable[[], None]]] = collections.deque()

    def __len__(self):
        return len(self._items)

    def put(self, kind: str, send: Callable[[], None]) -> None:
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

    def take(self) -> tuple[str, Callable[[], None]]:
        """The oldest. IndexError when empty."""
        return self._items.popleft()


def _told_by_us(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(('Got link error callback', "Couldn't load link driver"))


def _prepare_cflib() -> None:
    """Drivers with our UDP link, and no stack traces in the log for errors that RadioError explains."""
    logging.getLogger('cflib.crazyflie').addFilter(_told_by_us)
    logging.getLogger('cflib.crazyflie.toccache').setLevel(logging.ERROR)
    if not cflib.crtp.CLASSES:
        cflib.crtp.init_drivers()
    # init_drivers adds its classes at every call, and others may have called it too: each class once.
    cflib.crtp.CLASSES[:] = dict.fromkeys(ResendingUdp if c is UdpDriver else c for c in cflib.crtp.CLASSES)


def explain(uri: str, text: str) -> tuple[str, bool]:
    """cflib's connection error as one sentence that says what to do, and whether a retry can help."""
    first = text.strip().splitlines()[0] if text.strip() else 'no reason given'
    if 'Errno 13' in text or 'Access denied' in text or 'insufficient permissions' in text:
        return (f'{uri}: no permission to open the USB device; install the udev rules of '
                'https://www.bitcraze.io (USB permissions), then plug it in again'), False
    if 'Cannot find a Crazyradio' in text or 'Cannot find radio with serial' in text:
        return f'{uri}: no such Crazyradio dongle is plugged in', False
    if 'NoBackendError' in text or 'No backend available' in text:
        return f'{uri}: libusb is missing on this computer', False
    if 'Could not open usb' in text:
        return f'{uri}: no Crazyflie is plugged in by USB', False
    if 'gaierror' in text or 'Name or service not known' in text:
        return f'{uri}: the host name is not known', False
    if 'ConnectionRefused' in text or 'Errno 111' in text:
        return f'{uri}: nothing listens there (connection refused)', True
    if 'Too many packets lost' in text:
        return f'{uri}: the Crazyradio hears no drone; is it on, with this channel, rate and address?', True
    return f'{uri}: {first}', True


class CflibRadio:
    """Radio over cflib. `clock` gives the seconds that the telemetry is stamped with."""

    def __init__(self, settings: RadioSettings, clock: Callable[[], float] = time.monotonic):
        check_uri(settings.uri)
        self.settings, self._clock = settings, clock
        self._lock = threading.Condition()
        self._telemetry = Telemetry()
        self._outbox = Outbox()
        self._cf: Crazyflie | None = None
        self._closing = threading.Event()
        self._sender: threading.Thread | None = None
        self._setpoint_given: float | None = None  # when the last setpoint came, until a stop notice
        self._airborne = False  # the flight has told the drone to fly, and not yet to land
        self._flight_heard = math.inf  # when the flight last asked for telemetry

    # --- connection -------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the link and start the telemetry; blocks. Raises RadioError when no drone answers within
        `connect_timeout`, at once where waiting cannot help."""
        _prepare_cflib()
        s, begin = self.settings, time.monotonic()
        while True:
            error, retry = self._attempt()
            if not error:
                break
            if self._closing.is_set():
                raise RadioError(f'{s.uri}: closed while connecting')
            if not retry or time.monotonic() - begin > s.connect_timeout:
                raise RadioError(error if not retry else f'{error} (tried for {s.connect_timeout} s)')
            self._closing.wait(RETRY_PAUSE)
        self._start_telemetry()
        self._update(link='up', fault='', stamp=self._clock())
        self._sender = threading.Thread(target=self._send_loop, name='radio_sender', daemon=True)
        self._sender.start()

    def _attempt(self) -> tuple[str, bool]:
        """One try to connect: (error, whether another try can help), or ('', False) when connected."""
        s = self.settings
        cache = os.path.expanduser(s.toc_cache) if not s.uri.startswith('udp') else ''
        cf = Crazyflie(rw_cache=cache or None)
        done, failure = threading.Event(), []
        def failed(_uri, message):
            failure.append(message)
            done.set()
        cf.connection_failed.add_callback(failed)
        cf.connection_lost.add_callback(failed)
        cf.connected.add_callback(lambda _uri: cf.link_statistics.latency.stop())
        cf.fully_connected.add_callback(lambda _uri: done.set())
        cf.link_statistics.link_quality_updated.add_callback(self._on_link_quality)
        cf.open_link(s.uri)
        begin = time.monotonic()
        while not done.wait(0.02):
            waited = time.monotonic() - begin
            if self._closing.is_set():
                failure.append('closed')
                break
            if cf.platform.get_protocol_version() < 0 and waited > FIRST_ANSWER:
                failure.append('no Crazyflie answers')
                break
            if waited > s.setup_timeout:
                failure.append(f'the drone answers, but its tables did not arrive in {s.setup_timeout} s')
                break
        if failure:
            _dispose(cf)
            return explain(s.uri, failure[0])
        self._cf = cf
        cf.connection_lost.add_callback(self._on_lost)
        if cf.link is None:  # lost between the two lines above
            self._on_lost(s.uri, 'lost right after connecting')
        return '', False

    def _start_telemetry(self):
        for name, variables in LOG_BLOCKS.items():
            block = LogConfig(name, LOG_PERIOD)
            for variable in variables:
                block.add_variable(variable)
            block.data_received_cb.add_callback(self._on_log)
            try:
                self._cf.log.add_config(block)
            except KeyError as error:
                self.close()
                raise RadioError(f'{self.settings.uri}: the firmware is too old, {error.args[0]}') from None
            block.start()

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
            _dispose(cf)
        self._update(link='lost', fault='closed')

    def _on_lost(self, _uri, message):
        self._update(link='lost', fault=explain(self.settings.uri, message)[0])

    # --- parameters -------------------------------------------------------------------------------

    def parameters(self) -> dict[str, float]:
        """What the flight needs set: Mellinger (2), Kalman (2), high-level commander, trust in mocap."""
        return {'stabilizer.controller': 2, 'stabilizer.estimator': 2, 'commander.enHighLevel': 1,
                'locSrv.extPosStdDev': self.settings.ext_pos_std_dev,
                'locSrv.extQuatStdDev': self.settings.ext_quat_std_dev}

    def set_and_check_parameters(self) -> tuple[str, ...]:
        """Set `parameters()`, read each back from the drone, reset the estimator; blocks for at most
        2 s a parameter. Returns the faults, which the telemetry then carries too."""
        faults = tuple(filter(None, (self._set_and_check(n, v) for n, v in self.parameters().items())))
        self.reset_estimator()
        self._update(parameter_faults=faults)
        return faults

    def _set_and_check(self, name: str, value: float) -> str:
        cf = self._cf
        if cf is None:
            return f'parameter {name}: the link is closed'
        if cf.param.toc.get_element_by_complete_name(name) is None:
            return '' if name in OPTIONAL_PARAMETERS else f'the firmware has no parameter {name}'
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
        self._put('command', lambda: self._cf.param.set_value('kalman.resetEstimation', 1))
        self._put('command', lambda: self._cf.param.set_value('kalman.resetEstimation', 0))

    # --- telemetry (cflib's threads) --------------------------------------------------------------

    def telemetry(self) -> Telemetry:
        """The newest; `lost` also after 5 s of silence. Asking shows the radio thread that the flight's
        thread lives."""
        self._flight_heard = self._clock()
        with self._lock:
            t = self._telemetry
        if t.link == 'up' and t.stamp is not None and self._clock() - t.stamp > SILENCE:
            return dataclasses.replace(t, link='lost', fault=f'{self.settings.uri}: silent for {SILENCE} s')
        return t

    def _update(self, **values):
        with self._lock:
            self._telemetry = dataclasses.replace(self._telemetry, **values)

    def _on_log(self, _timestamp, data, _block):
        values = {'stamp': self._clock()}
        if 'pm.vbat' in data:
            values |= {'battery_v': data['pm.vbat'], 'supervisor': data['supervisor.info'],
                       'position': np.array([data[f'stateEstimate.{a}'] for a in 'xyz']),
                       'yaw': math.radians(data['stateEstimate.yaw'])}
        if 'kalman.varPX' in data:
            values['variance'] = np.array([data[f'kalman.varP{a}'] for a in 'XYZ'])
        self._update(**values)

    def _on_link_quality(self, percent):
        self._update(link_quality=float(percent))

    # --- commands ---------------------------------------------------------------------------------

    def extpose(self, position, quaternion) -> None:
        """See Radio."""
        p, q = [float(x) for x in position], [float(x) for x in quaternion]
        self._put('pose', lambda: self._cf.loc.send_extpose(p, q))

    def full_state(self, setpoint: Setpoint) -> None:
        """See Radio."""
        p, v, a, w = (int16_milli_to_cflib_si(si_to_int16_milli(x)) for x in (
            setpoint.position, setpoint.velocity, setpoint.acceleration, setpoint.rates))
        q = [float(x) for x in setpoint.quaternion]
        self._setpoint_given, self._airborne = self._clock(), True
        self._put('setpoint', lambda: self._cf.commander.send_full_state_setpoint(p, v, a, q, *w))

    def notify_stop(self) -> None:
        """See Radio."""
        self._setpoint_given = None
        self._put('command', lambda: self._cf.commander.send_notify_setpoint_stop())

    def takeoff(self, height, duration) -> None:
        """See Radio."""
        self._airborne = True
        self._put('command', lambda: self._cf.high_level_commander.takeoff(
            float(height), float(duration), yaw=None))

    def land(self, height, duration) -> None:
        """See Radio."""
        self._airborne = False
        self._put('command', lambda: self._cf.high_level_commander.land(
            float(height), float(duration), yaw=None))

    def go_to(self, position, yaw, duration) -> None:
        """See Radio."""
        self._airborne = True
        x, y, z = (float(c) for c in position)
        self._put('command', lambda: self._cf.high_level_commander.go_to(
            x, y, z, float(yaw), float(duration)))

    def stop(self) -> None:
        """See Radio."""
        self._put('command', lambda: self._cf.high_level_commander.stop())

    def arm(self, on) -> None:
        """See Radio. Arming begins a new flight, so what the last one could not send is forgotten."""
        if on and self.telemetry().link == 'up':
            self._update(fault='')
        self._put('command', lambda: self._cf.supervisor.send_arming_request(bool(on)))

    def emergency_stop(self) -> None:
        """See Radio. Overtakes everything that waits."""
        self._setpoint_given, self._airborne = None, False
        with self._lock:
            self._outbox.clear()
        self._put('command', lambda: self._cf.supervisor.send_emergency_stop())

    def emergency_watchdog(self) -> None:
        """See Radio."""
        self._put('command', lambda: self._cf.supervisor.send_emergency_stop_watchdog())

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
            if item is not None and self._telemetry.link == 'up':
                self._send(*item)

    def _send(self, kind, send):
        try:
            send()
        except Exception as error:  # whatever cflib raises: the thread must live to send the landing
            logging.getLogger(__name__).exception('cannot send a %s', kind)
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


def _dispose(cf: Crazyflie) -> None:
    """Close a Crazyflie without the zero setpoint that close_link() sends."""
    if cf.link is not None:
        cf.link = _Muted(cf.link)
    cf.close_link()
