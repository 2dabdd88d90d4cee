# SPDX-License-Identifier: GPL-3.0-or-later
"""A Crazyradio as pyusb shows it, with drones in reach, so that cflib's own radio driver runs unchanged.

USB: vendor requests 1, 2, 3 and 6 tune (channel, address, rate, retries), endpoint 1 takes a packet and
0x81 gives `[status, answer...]`; status bit 0 is the acknowledgement, bits 4-7 count retries. The drone's side
is that of the Crazyflie's radio with safe link: bit 3 of the header counts packets up, bit 2 answers down,
what comes twice is dropped and what was not acknowledged comes again.
"""

import array
import collections
import socket
import time
from types import SimpleNamespace

import usb.core

CHANNEL, ADDRESS, RATE, ARC = 1, 2, 3, 6
SAFELINK = b'\xff\x05\x01'


class RadioDrone:
    """The radio of a drone whose firmware is a CrtpPeer at `address` (host, port)."""

    def __init__(self, address, rssi=40):
        self.on, self.rssi = True, rssi
        self.queue = collections.deque()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect(address)
        self.socket.setblocking(False)
        self.safelink, self.last_up, self.down, self.answer = False, 1, 0, b''

    def hear(self, packet):
        """One packet from the air; returns the payload of the acknowledgement."""
        if packet == SAFELINK:
            self.safelink, self.last_up, self.down, self.answer = True, 1, 0, b''
            return packet
        header = packet[0]
        if not self.safelink or header >> 3 & 1 != self.last_up:
            self.last_up = header >> 3 & 1
            if header & 0xF3 != 0xF3:
                self.socket.send(bytes([header | 0x0C]) + packet[1:])
        if not self.safelink or header >> 2 & 1 != self.down or not self.answer:
            self.down = header >> 2 & 1
            self.answer = self._next()
        return bytes([self.answer[0] & ~0x04 | self.down << 2]) + self.answer[1:]

    def _next(self):
        try:
            while True:
                self.queue.append(self.socket.recv(64))
        except (BlockingIOError, ConnectionError):
            pass
        return self.queue.popleft() if self.queue else bytes([0xF3, 0x01, self.rssi])


class Dongle:
    """One dongle; `air` maps (channel, rate, address) to RadioDrones."""

    bcdDevice = 0x0053

    def __init__(self, serial, air):
        self._serial, self.air = serial, air
        self.plugged = True
        self.refusal = None  # a USBError that opening it raises
        self.tuning_fails = False
        self.retries = 0
        self.sent = 0
        self.tuned = {}
        self._answer = None
        self._ctx = SimpleNamespace(dispose=lambda device: None)  # what usb.util.dispose_resources calls

    @property
    def serial_number(self):
        if self.refusal is not None:
            raise ValueError('The device has no langid (permission issue, no string descriptors supported or '
                             'device error)')
        return self._serial

    def set_configuration(self, _number):
        if self.refusal is not None:
            raise self.refusal
        self._alive()

    def reset(self):
        self._alive()

    def ctrl_transfer(self, _type, request, wValue, wIndex, timeout, data_or_wLength):
        self._alive()
        if self.tuning_fails:
            raise usb.core.USBError('Operation timed out', -7, 110)
        self.tuned[request] = tuple(data_or_wLength) if request == ADDRESS else wValue

    def write(self, endpoint, data, timeout):
        self._alive()
        time.sleep(0.001)
        self.sent += 1
        drone = self.air.get((self.tuned[CHANNEL], self.tuned[RATE], self.tuned[ADDRESS]))
        if drone is None or not drone.on:
            self._answer = b'\0'
        else:
            self._answer = bytes([0x01 | self.retries << 4]) + drone.hear(bytes(data))

    def read(self, endpoint, size, timeout):
        self._alive()
        return array.array('B', self._answer)

    def _alive(self):
        if not self.plugged:
            raise usb.core.USBError('No such device (it may have been disconnected)', -4, 19)
