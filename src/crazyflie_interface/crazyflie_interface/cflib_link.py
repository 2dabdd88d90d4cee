# SPDX-License-Identifier: GPL-3.0-or-later
"""One connection over unmodified cflib (0.1.34), by Crazyradio, USB or UDP: opened, or refused with a
sentence that says what to do.

Traps of cflib that are avoided here, from our side of its API:

- UDP: `needs_resending` is False, so one lost datagram hangs the connection for ever. `ResendingUdp`
  takes UdpDriver's place in cflib.crtp.CLASSES.
- The first two requests of a connection are never resent on any link: an attempt without an answer is
  given up and begun again. So is one whose tables stop arriving: an answer that was garbled on the way
  ends the resending and the table with it.
- The latency ping thread and a link error can wait for each other for ever (Latency.stop joins the
  thread that waits for the lock its caller holds): the pings are stopped once connected.
- An answer of the link or version service that comes after the connection is set up sets it up again,
  which clears the drone's log blocks, and may put the protocol version to -1: both handlers are removed.
- A dongle that is pulled out: cflib sees no USB error when it sends and goes round its loop for ever; one
  when it tunes kills the thread that all links of this dongle share, and they wait for ever, also in
  close(). `SteadyCrazyradio` takes Crazyradio's place and makes of both a packet without answer.
- 100 packets without answer end a link, which at 2M is a third of a second of a passing person or a Wi-Fi burst,
  and in flight a lost link is final. `LOST_PACKETS` leaves the decision to the 2 s that send_packet waits, which is
  also when the firmware gives up.
- A dongle that could not be opened again leaves an entry in RadioManager that keeps it from ever being
  opened again: `_forget_unopened` removes it.
- close_link() sends a zero setpoint, which would take a flying drone from the high-level commander: the
  link is muted first.

What several links share. In one process: cflib.crtp.CLASSES, and per dongle one RadioManager entry with one
thread, which tunes the dongle to channel, rate and address before every packet (so links on one dongle
share its packets, and their order is kept). Between processes: the folder of the tables of contents (a half-
written file is downloaded again), but no dongle: the second process is told that it is in use. So each
drone's node needs a dongle of its own, best named by its serial number, because numbers change when one
is plugged in again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import threading
import time

import cflib.crtp
import cflib.crtp.radiodriver
import usb.core
from cflib.crazyflie import Crazyflie
from cflib.crtp.crtpstack import CRTPPort
from cflib.crtp.radiodriver import RadioManager
from cflib.crtp.udpdriver import UdpDriver
from cflib.drivers.crazyradio import Crazyradio, _radio_ack

from crazyflie_interface.radio import RadioError
from crazyflie_interface.settings import RadioSettings

FIRST_ANSWER = 1.0  # s in which a drone that is there answers the first two requests
STALL = 5.0  # s without a packet of the tables after which they are begun again
CLOSE_TIME = 3.0  # s that closing a link may take before it is left to itself
LOST_PACKETS = 1000  # in a row without answer; more than fit into 2 s: 4 tries of 0.8 ms each at 2M
USB_PAUSE = 0.005  # s after a USB error

_URIS = (
    r'radio://(\d{1,9}|[0-9A-Fa-f]{10})/(\d|[1-9]\d|1[01]\d|12[0-5])/(250K|1M|2M)(/[0-9A-Fa-f]{1,10})?(\?.*)?',
    r'usb://\d+',
    r'udp://[^/:\s]+:\d{1,5}',
)
_logger = logging.getLogger(__name__)
_preparing = threading.Lock()
_logged: dict[str, float] = {}  # template of a record of cflib -> steady time (s) it was last let through


class LinkError(Exception):
    """An attempt failed; `hopeless` when only a person can help, and not by switching something on."""

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


def check_uri(uri: str) -> None:
    """RadioError unless `uri` is one that cflib opens as meant (it takes a mistyped rate for 2M)."""
    if not any(re.fullmatch(pattern, uri) for pattern in _URIS):
        raise RadioError(f'uri {uri!r}; expected radio://<dongle>/<channel 0-125>/<250K, 1M or 2M>/'
                         '<address>, usb://<number> or udp://<host>:<port>')


# What cflib's texts mean: a pattern, the sentence, and whether it is hopeless. The first that is found
# counts; the texts end in stack traces, which hold the cause where cflib's own sentence hides it.
_EXPLANATIONS = (
    (r'Errno 13|Access denied|insufficient permissions|no langid',
     'no permission to open the USB device; install the udev rule (docs/install_lab_pc.md), then unplug it '
     'and plug it in again', True),
    (r'NoBackendError|No backend available', 'libusb is missing on this computer', True),
    (r'Errno 16|Resource busy',
     'the USB device is in use by another program; close it, or give each drone a dongle of its own', False),
    (r'Cannot find a Crazyradio|Cannot find radio with serial|Errno 19|No such device',
     'no such Crazyradio dongle is plugged in', False),
    (r'Could not open usb', 'no Crazyflie is plugged in by USB', False),
    (r'gaierror|Name or service not known', 'the host name is not known', True),
    (r'ConnectionRefused|Errno 111', 'nothing listens there (connection refused)', False),
    (r'Too many packets lost|Could not send packet',
     'the Crazyradio hears no drone; is it plugged in, and the drone on, with this channel, rate and address?', False),
)


def explain(uri: str, text: str) -> LinkError:
    """cflib's connection error as one sentence that says what to do."""
    for pattern, sentence, hopeless in _EXPLANATIONS:
        if re.search(pattern, text):
            return LinkError(f'{uri}: {sentence}', hopeless)
    return LinkError(f'{uri}: {text.strip().splitlines()[0] if text.strip() else "no reason given"}')


class ResendingUdp(UdpDriver):
    """cflib's UDP driver, asking for the resending that the Crazyflie class does on lossy links."""

    def __init__(self):
        super().__init__()
        self.needs_resending = True

    def close(self):
        """As UdpDriver, which waits up to 1 s for the next packet; the shutdown wakes it."""
        if self._thread is not None and self.socket is not None:
            self._thread._sp = True
            with contextlib.suppress(OSError):  # not connected
                self.socket.shutdown(socket.SHUT_RDWR)
        super().close()


class SteadyCrazyradio(Crazyradio):
    """cflib's dongle, on which a USB error in flight is a packet without answer, as when the drone is off.

    A packet is not sent while the dongle could not be tuned: it would go to another drone.
    """

    def __init__(self, *args, **kwargs):
        self._opened = False  # errors while opening are for the one who opens
        self._untuned: set[str] = set()
        super().__init__(*args, **kwargs)
        self._opened = True

    def set_channel(self, channel):
        """As Crazyradio."""
        self._tune('current_channel', super().set_channel, channel)

    def set_address(self, address):
        """As Crazyradio."""
        self._tune('current_address', super().set_address, address)

    def set_data_rate(self, datarate):
        """As Crazyradio."""
        self._tune('current_datarate', super().set_data_rate, datarate)

    def set_arc(self, arc):
        """As Crazyradio."""
        self._tune('arc', super().set_arc, arc)

    def _tune(self, what, tune, value):
        try:
            tune(value)
        except usb.core.USBError:
            if not self._opened:
                raise
            setattr(self, what, None)  # unknown, so that the next packet sets it anew
            self._untuned.add(what)
        else:
            self._untuned.discard(what)

    def send_packet(self, dataOut):
        """As Crazyradio, but never None."""
        answer = None if self._untuned - {'arc'} else super().send_packet(dataOut)
        if answer is None:
            time.sleep(USB_PAUSE)
            answer = _radio_ack()
        return answer


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


def _told_by_us(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(('Got link error callback', "Couldn't load link driver"))


def _seldom(record: logging.LogRecord) -> bool:
    """At most one record a second of a kind: a drone that sends nonsense must not fill the disk."""
    now = time.monotonic()
    if now - _logged.get(record.msg, -math.inf) < 1.0:
        return False
    _logged[record.msg] = now
    return True


def prepare_cflib() -> None:
    """Our UDP link and dongle, and no stack traces in the log for errors that RadioError explains."""
    with _preparing:
        logging.getLogger('cflib.crazyflie').addFilter(_told_by_us)
        for name in ('cflib.crazyflie', 'cflib.crazyflie.log'):
            logging.getLogger(name).addFilter(_seldom)
        logging.getLogger('cflib.crazyflie.toccache').setLevel(logging.ERROR)
        cflib.crtp.radiodriver.Crazyradio = SteadyCrazyradio
        cflib.crtp.radiodriver.set_retries_before_disconnect(LOST_PACKETS)
        if not cflib.crtp.CLASSES:
            cflib.crtp.init_drivers()
        # init_drivers adds its classes at every call, and others may have called it too: each class once.
        classes = list(dict.fromkeys(ResendingUdp if c is UdpDriver else c for c in cflib.crtp.CLASSES))
        if classes != cflib.crtp.CLASSES:  # another thread may go through the list
            cflib.crtp.CLASSES[:] = classes


def _forget_unopened() -> None:
    """Remove dongles that failed to open again."""
    with RadioManager._lock:
        for number, shared in enumerate(RadioManager._radios):
            if shared is not None and shared._radio is None and shared._rsp_queues:
                RadioManager._radios[number] = None


def open_link(settings: RadioSettings, closing: threading.Event) -> Crazyflie:
    """One attempt: a fully connected Crazyflie. Raises LinkError; blocks for at most setup_timeout."""
    uri = settings.uri
    # A table that UDP garbled must not be kept; it has no checksum of its own.
    cache = os.path.expanduser(settings.toc_cache) if not uri.startswith('udp') else ''
    cf = Crazyflie(rw_cache=cache or None)
    done, failure, heard = threading.Event(), [], [time.monotonic()]
    def failed(_uri, message):
        failure.append(explain(uri, message))
        done.set()
    def on_packet(pk):
        if pk.port not in (CRTPPort.CONSOLE, CRTPPort.LINKCTRL):
            heard[0] = time.monotonic()
    cf.connection_failed.add_callback(failed)
    cf.connection_lost.add_callback(failed)
    cf.packet_received.add_callback(on_packet)
    cf.connected.add_callback(lambda _uri: cf.link_statistics.latency.stop())
    cf.fully_connected.add_callback(lambda _uri: done.set())
    cf.open_link(uri)
    begin = time.monotonic()
    while not done.wait(0.02) and not failure:
        now = time.monotonic()
        if closing.is_set():
            failure.append(LinkError(f'{uri}: closed while connecting', hopeless=True))
        elif cf.platform.get_protocol_version() < 0 and now - begin > FIRST_ANSWER:
            failure.append(explain(uri, 'Too many packets lost') if uri.startswith('radio')
                           else LinkError(f'{uri}: no Crazyflie answers'))
        elif now - begin > settings.setup_timeout:
            failure.append(LinkError(f'{uri}: the drone answers, but its tables did not arrive in '
                                     f'{settings.setup_timeout} s'))
        elif now - max(begin, heard[0]) > STALL:
            failure.append(LinkError(f'{uri}: the drone answered, but its tables stopped arriving for {STALL} s'))
    if not failure and cf.link is not None and uri.startswith('radio') and cf.link.needs_resending:
        failure.append(LinkError(f'{uri}: the drone came up while we called it, without safe link'))
    if failure:
        dispose(cf)
        _forget_unopened()
        raise failure[0]
    cf.packet_received.remove_callback(on_packet)
    cf.remove_port_callback(CRTPPort.PLATFORM, cf.platform._platform_callback)
    cf.remove_port_callback(CRTPPort.LINKCTRL, cf.platform._crt_service_callback)
    return cf


def dispose(cf: Crazyflie) -> None:
    """Close a Crazyflie without the zero setpoint that close_link() sends; returns after CLOSE_TIME at the
    latest, because cflib waits for threads that may wait for a dead device."""
    cf.incoming.stop()
    link = cf.link
    if link is not None:
        cf.link = _Muted(link)
        link.in_queue.put(None)  # wakes the thread that just was told to stop
    closing = threading.Thread(target=cf.close_link, name='radio_close', daemon=True)
    closing.start()
    closing.join(CLOSE_TIME)
    if closing.is_alive():
        _logger.warning('%s: cflib did not close the link within %s s', cf.link_uri, CLOSE_TIME)
