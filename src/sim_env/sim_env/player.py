"""Plays a recording through a NatNet server with its own time stamps."""

from __future__ import annotations

import math
from collections.abc import Callable

from sim_env.natnet_server import NatNetServer
from sim_env.recordings import Recording


class Player:
    """Sends each recorded pose when it is due; gaps and bunching come out as they were recorded.

    Drive it with `poll(now)`, `now` a monotonic clock in s, which is also the server's. It starts at the
    first poll, or `delay` s after the first client has shown itself.
    """

    def __init__(self, recording: Recording, server: NatNetServer, body: str, rate: float = 1.0,
                 loop: bool = False, wait_for_client: bool = True, delay: float = 0.0,
                 say: Callable[[str], None] = lambda text: None):
        """`rate`: recorded seconds a second; `loop`: begin again at the end, for ever; `delay`: s."""
        self.recording, self.server, self.body = recording, server, body
        self.rate, self.loop, self.wait_for_client, self.delay = rate, loop, wait_for_client, delay
        self.sent = 0  # frames
        self.lateness = 0.0  # s, the largest between a frame's time and its sending
        self.finished = False
        self.held = False  # set by the caller: do not begin yet
        self.started: float | None = None  # clock at the first pose
        self._say = say
        self._next = 0  # pose

    def poll(self, now: float) -> None:
        """Answer clients and send what is due at `now`."""
        self.server.poll(now)
        if self.finished:
            return
        if self.started is None:
            if self.held or (self.wait_for_client and not self.server.clients):
                return
            self.started = now + self.delay
            self._say(f'playing {len(self.recording.time)} poses, {self.recording.duration:.2f} s')
        while (due := self._due()) <= now:
            r = self.recording
            pose = r.position[self._next], r.quaternion[self._next]
            self.server.send_frame(self.sent, due, {self.body: pose}, now)
            self.sent += 1
            self.lateness = max(self.lateness, now - due)
            self._next += 1
            if self._next == len(r.time):
                self._end(due)

    def _due(self) -> float:
        """Clock at which the next pose is due; inf at the end."""
        if self.finished:
            return math.inf
        return self.started + (self.recording.time[self._next] - self.recording.time[0]) / self.rate

    def _end(self, last: float) -> None:
        if not self.loop:
            self.finished = True
            return
        # One mean interval after the last pose; the jump back to the first is the recording's, too.
        self._next = 0
        self.started = last + self.recording.duration / (len(self.recording.time) - 1) / self.rate
