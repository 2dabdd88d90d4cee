# SPDX-License-Identifier: GPL-3.0-or-later
"""How good the link is: round trips of our own pings, and what cflib counts on a Crazyradio.

cflib pings ten times a second in a thread that can deadlock with a link error (see cflib_link), and only
a Crazyradio counts retries and rates. A ping of ours rides in the sending thread and works on every link.
"""

from __future__ import annotations

import collections
import math
import struct
import threading

from crazyflie_interface.radio import LinkStatistics

PERIOD = 0.5  # s between two pings
PATIENCE = 1.0  # s after which a ping counts as lost
WINDOW = 20  # pings that the statistics look back on

_HEADER = 1  # first byte of our echo packets; cflib's own handler takes 0 for its pings and ignores others
_LAYOUT = '<Bd'  # which is also cflib's, so that its handler can read ours


class LinkMeter:
    """Statistics of one link. Times are s on any steady clock."""

    def __init__(self):
        self._lock = threading.Lock()
        self._next = -math.inf
        self._waiting: set[float] = set()  # sending times of pings that may still be answered
        self._trips: collections.deque[float] = collections.deque(maxlen=WINDOW)  # s; inf: lost
        self._radio: dict[str, float] = {}

    def ping(self, now: float) -> bytes | None:
        """The payload of an echo packet when one is due, else None."""
        with self._lock:
            late = {sent for sent in self._waiting if now - sent > PATIENCE}
            self._waiting -= late
            self._trips.extend([math.inf] * len(late))
            if now < self._next:
                return None
            self._next = now + PERIOD
            self._waiting.add(now)
        return struct.pack(_LAYOUT, _HEADER, now)

    def on_echo(self, payload: bytes, now: float) -> None:
        """An echo packet came back; one that is not ours, came twice or was changed on the way is left."""
        if len(payload) != struct.calcsize(_LAYOUT):
            return
        header, sent = struct.unpack(_LAYOUT, payload)
        with self._lock:
            if header == _HEADER and sent in self._waiting:
                self._waiting.remove(sent)
                self._trips.append(now - sent)

    def on_radio(self, name: str, value: float) -> None:
        """A number that cflib counted, under the name that cflib gives it."""
        with self._lock:
            self._radio[name] = float(value)

    @property
    def quality(self) -> float | None:
        """Percent, 100 without retries; None where nobody counts them."""
        return self._radio.get('link_quality')

    def statistics(self, reconnects: int = 0) -> LinkStatistics:
        """The newest."""
        with self._lock:
            trips, radio = list(self._trips), dict(self._radio)
        answered = sorted(t for t in trips if math.isfinite(t))
        rssi, quality = radio.get('uplink_rssi'), radio.get('link_quality')
        return LinkStatistics(
            uplink_hz=radio.get('uplink_rate'), downlink_hz=radio.get('downlink_rate'),
            uplink_use=radio.get('uplink_congestion'), downlink_use=radio.get('downlink_congestion'),
            retries=None if quality is None else 10.0 - quality / 10.0,  # cflib: mean of 10 - retries, x 10
            rssi_dbm=None if rssi is None else -rssi,  # the drone's radio reports -dBm
            latency=answered[math.ceil(0.95 * len(answered)) - 1] if answered else None,
            pings_lost=1.0 - len(answered) / len(trips) if trips else None, reconnects=reconnects)
