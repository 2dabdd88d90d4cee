"""From frames of the mocap system to what one robot's topics carry, and the health of that stream.

No ROS and no sockets: frames, a session and times come in, samples and a report go out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from deqmpc.interface import ERROR, OK, WARN
from deqmpc.types import RigidBodyState
from mocap_bridge.axes import CONVERSIONS
from mocap_bridge.odometry import REASONS, OdometryFilter, OdometrySettings
from mocap_bridge.session import MocapError, MocapFrame, Session

UP_AXES = ('auto', *CONVERSIONS)


@dataclass(frozen=True)
class HealthSettings:
    """When the stream is no longer good enough."""

    rate_low: float = 80.0  # Hz of poses, below: WARN
    rate_high: float = 120.0  # Hz of poses, above: WARN
    latency: float = 0.010  # s from exposure to publication, mean over the report's interval, above: WARN
    stale: float = 0.25  # s without a pose, above: ERROR


@dataclass(frozen=True)
class Sample:
    """One pose that is believed, in `world`."""

    stamp: float  # s, ROS clock, camera mid-exposure
    position: np.ndarray  # (3,) m
    quaternion: np.ndarray  # (4,) x y z w, unit
    state: RigidBodyState | None  # None while the filter settles


@dataclass
class _Interval:
    """What happened since the last report."""

    since: float
    poses: int = 0
    latencies: int = 0
    latency_sum: float = 0.0
    latency_max: float = 0.0
    rejected: Counter = field(default_factory=Counter)  # reason -> count
    gaps: int = 0
    unstamped: int = 0
    malformed: int = 0


class Bridge:
    """Follows one rigid body. Raises MocapError on an unknown up axis."""

    def __init__(self, body: str, up_axis: str, odometry: OdometrySettings, health: HealthSettings,
                 now: float):
        if up_axis not in UP_AXES:
            raise MocapError(f'up_axis = {up_axis!r}; expected one of {", ".join(UP_AXES)}')
        self.body, self.health = body, health
        self.filter = OdometryFilter(odometry)
        self.up_axis = up_axis
        self.invalid = 0  # frames in which the body was not tracked
        self.absent = 0  # frames without the body
        self.seen = False  # the body was in a frame since the start
        self.tracked = False  # it was tracked in the newest frame
        self.mean_error = math.nan  # m, of the newest tracked frame
        self._last_frame = self._last_pose = -math.inf
        self._interval = _Interval(now)
        self._counted = (0, 0)

    def check_axes(self, session: Session) -> None:
        """Raises MocapError when the server's axes cannot be told or used."""
        if self.up_axis != 'auto':
            return
        if session.up_axis_untold:
            raise MocapError('the NatNet server does not say which axis is up; set up_axis to z or y as in '
                             'its streaming settings')
        if session.up_axis not in (None, *CONVERSIONS):
            raise MocapError(f'the NatNet server streams {session.up_axis} up; expected one of '
                             f'{", ".join(CONVERSIONS)} (change it in its streaming settings)')

    def frame(self, frame: MocapFrame) -> Sample | None:
        """The sample in `frame`, None when the body is absent, not tracked or not believed."""
        self._last_frame = frame.receive_time
        up_axis = frame.up_axis if self.up_axis == 'auto' else self.up_axis
        if up_axis not in CONVERSIONS:
            return None  # a pose in unknown axes is no pose
        body = frame.bodies.get(self.body)
        if body is None or not body.valid:
            self.absent += body is None
            self.invalid += body is not None
            self.tracked = False
            return None
        self.seen = self.tracked = True
        self.mean_error = body.mean_error
        position, quaternion = CONVERSIONS[up_axis](body.position, body.quaternion)
        result = self.filter.update(frame.stamp, position, quaternion)
        self._interval.gaps += result.gap > 0.0
        if not result.accepted:
            self._interval.rejected[result.reason] += 1
            return None
        self._interval.poses += 1
        self._last_pose = frame.receive_time
        return Sample(frame.stamp, position, quaternion / np.linalg.norm(quaternion), result.state)

    def published(self, sample: Sample, now: float) -> None:
        """Note that `sample` went out at `now` (s, ROS clock)."""
        i, latency = self._interval, now - sample.stamp
        i.latencies += 1
        i.latency_sum += latency
        i.latency_max = max(i.latency_max, latency)

    def report(self, session: Session, now: float) -> tuple[int, str, dict[str, object]]:
        """Level, message and values of the time since the last report; `now` in s, ROS clock."""
        i, c, f, clock = self._interval, session.counters, self.filter.statistics, session.clock
        i.unstamped, i.malformed = c.unstamped - self._counted[0], c.malformed - self._counted[1]
        elapsed = now - i.since
        rate = i.poses / elapsed if elapsed > 0.0 else 0.0
        latency = i.latency_sum / i.latencies if i.latencies else math.nan
        level, message = self._judge(session, now, rate, latency)
        server = session.server
        values = {
            'server': server.name if server else '', 'body': self.body,
            'natnet': '.'.join(map(str, server.version)) if server else '',
            'up_axis': self.up_axis, 'server_up_axis': session.up_axis,
            'tracked': self.tracked, 'rate_hz': rate,
            'latency_ms': 1e3 * latency, 'latency_max_ms': 1e3 * i.latency_max,
            'mean_error_mm': 1e3 * self.mean_error,
            'accepted': f.accepted, 'invalid': self.invalid, 'absent': self.absent,
            **{f'rejected_{r}': f.rejected[r] for r in REASONS},
            'gaps': f.gaps, 'last_gap_s': f.last_gap, 'longest_gap_s': f.longest_gap,
            'sign_flips': f.sign_flips, 'filter_restarts': f.restarts,
            'frames': c.frames, 'missed_frames': c.missed, 'malformed': c.malformed, 'foreign': c.foreign,
            'unstamped': c.unstamped, 'reconnects': c.reconnects, 'last_fault': c.last_fault,
            # As text: six digits of a Unix time would be hours.
            'clock_offset_s': f'{clock.offset:.6f}',
            'clock_uncertainty_ms': 1e3 * clock.uncertainty, 'clock_age_s': clock.age(now - clock.offset),
            'clock_echoes': c.echoes, 'clock_steps': clock.steps,
        }
        self._interval, self._counted = _Interval(now), (c.unstamped, c.malformed)
        return level, message, values

    def _judge(self, session, now, rate, latency) -> tuple[int, str]:
        h, i = self.health, self._interval
        if not session.connected:
            return ERROR, f'no answer from the NatNet server {session.settings.server_address}'
        if now - self._last_frame > h.stale:
            return ERROR, 'no frames from the NatNet server'
        if session.models is not None and self.body not in session.models:
            return ERROR, f'rigid body {self.body!r} is gone from the mocap system'
        if now - self._last_pose > h.stale:
            if not self.tracked:
                return ERROR, f'rigid body {self.body!r} is not tracked'
            return ERROR, f'poses of {self.body!r} are refused: {self._refusals()}'
        faults = []
        if self.up_axis != 'auto' and session.up_axis not in (None, self.up_axis):
            faults.append(f'up_axis is {self.up_axis} but the server says that it streams '
                          f'{session.up_axis} up')
        if not h.rate_low <= rate <= h.rate_high:
            faults.append(f'rate {rate:.1f} Hz outside {h.rate_low:g} to {h.rate_high:g} Hz')
        if latency > h.latency:
            faults.append(f'latency {1e3 * latency:.1f} ms above {1e3 * h.latency:g} ms')
        for count, what in ((i.gaps, 'gaps'), (i.rejected.total(), f'poses refused: {self._refusals()}'),
                            (i.unstamped, 'frames without exposure time'),
                            (i.malformed, 'malformed packets')):
            if count:
                faults.append(f'{count} {what}')
        return (WARN, '; '.join(faults)) if faults else (OK, 'tracking')

    def _refusals(self) -> str:
        return ', '.join(f'{count} {reason}' for reason, count in self._interval.rejected.most_common())
