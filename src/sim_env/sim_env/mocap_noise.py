"""What a motion-capture system makes of the truth: noise, latency, lost frames, occlusions, false poses.

A sensor takes an exposure of the truth every 1/rate s. With p, q the true pose at the exposure,
  measured position    p + e_p                          e_p ~ N(0, position_noise^2 I)
  measured quaternion  exp(e_q / 2) * q                 e_q ~ N(0, orientation_noise^2 I), world axes
  delivered at         exposure + latency + U(0, jitter), never before an earlier frame
Bursts of lost frames and occlusions begin as Poisson processes and last exponentially distributed
times. A lost frame never arrives (the frame number is skipped); an occluded body arrives untracked.
Time is the truth's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from deqmpc.dynamics import rotation
from deqmpc.types import RigidBodyState


@dataclass(frozen=True)
class MocapSettings:
    """Defaults: a calibrated OptiTrack volume on a wired network, without losses."""

    rate: float = 100.0  # 1/s, camera frames
    position_noise: float = 0.0003  # m, standard deviation of each axis
    orientation_noise: float = 0.003  # rad, standard deviation about each axis; 0.3 mm on markers 5 cm apart
    latency: float = 0.006  # s from mid-exposure to the frame's arrival
    jitter: float = 0.001  # s, uniform from 0 to this on top of the latency
    drop_probability: float = 0.0  # that a single frame is lost
    burst_rate: float = 0.0  # 1/s, bursts of lost frames
    burst_duration: float = 0.2  # s, mean length of a burst
    occlusion_rate: float = 0.0  # 1/s, occlusions of the body
    occlusion_duration: float = 0.2  # s, mean length of an occlusion
    false_pose_probability: float = 0.0  # that a frame shows the body somewhere else (swapped markers)
    false_pose_distance: float = 0.3  # m from the true position, in a random direction

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            high = 1.0 if f.name.endswith('probability') else math.inf
            if not 0.0 <= value <= high or value == math.inf or (f.name == 'rate' and value == 0.0):
                raise ValueError(f'MocapSettings.{f.name} = {value!r}; expected a number '
                                 f'{"> 0" if f.name == "rate" else f"from 0 to {high}"}')


@dataclass(frozen=True)
class MocapFrame:
    """One frame that arrives."""

    number: int  # counts exposures; a gap is a lost frame
    exposure: float  # s, time of the truth
    delivery: float  # s, >= exposure, never before an earlier frame's
    position: np.ndarray | None  # (3,) m, world; None = not tracked
    quaternion: np.ndarray | None  # (4,) x y z w, body -> world


class _Spells:
    """Spells that begin at `rate` (1/s) and last `duration` s in the mean."""

    def __init__(self, rate: float, duration: float, rng: np.random.Generator):
        self.rate, self.duration, self.rng = rate, duration, rng
        self.begin = self.end = math.inf
        if rate > 0.0:
            self._next(0.0)

    def _next(self, after):
        self.begin = after + self.rng.exponential(1.0 / self.rate)
        self.end = self.begin + self.rng.exponential(self.duration)

    def active(self, t: float) -> bool:
        while t >= self.end:
            self._next(self.end)
        return self.begin <= t


class MocapSensor:
    """Call `sample(truth)` whenever the truth has moved on; equal seeds give equal frames."""

    def __init__(self, settings: MocapSettings = MocapSettings(), seed: int = 0):
        self.settings = settings
        # One stream for each cause: switching one on leaves the others' draws as they were.
        noise, link, bursts, occlusions, false = (
            np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5))
        self._noise, self._link, self._false = noise, link, false
        self._bursts = _Spells(settings.burst_rate, settings.burst_duration, bursts)
        self._occlusions = _Spells(settings.occlusion_rate, settings.occlusion_duration, occlusions)
        self._number = 0
        self._first: float | None = None
        self._last_delivery = -math.inf

    @property
    def next_exposure(self) -> float:
        """Time of the next exposure (s); -inf before the first."""
        return -math.inf if self._first is None else self._first + self._number / self.settings.rate

    def sample(self, truth: RigidBodyState) -> MocapFrame | None:
        """The frame exposed at `truth.stamp`, or None when no exposure is due or the frame is lost.

        The first call is the first exposure. Exposures missed in between (a step longer than 1/rate)
        are frames that do not exist: their numbers are skipped.
        """
        s, t = self.settings, truth.stamp
        if t < self.next_exposure - 1e-9:
            return None
        if self._first is None:
            self._first = t
        number = int((t - self._first) * s.rate + 1e-6)
        self._number = number + 1
        e_p, e_q = self._noise.normal(size=(2, 3))
        lost, delay = self._link.random(2)
        false = self._false.random() < s.false_pose_probability
        direction = self._false.normal(size=3)
        occluded = self._occlusions.active(t - self._first)
        if self._bursts.active(t - self._first) or lost < s.drop_probability:
            return None
        delivery = self._last_delivery = max(self._last_delivery, t + s.latency + s.jitter * delay)
        if occluded:
            return MocapFrame(number, t, delivery, None, None)
        position = truth.position + s.position_noise * e_p
        if false:
            position = position + s.false_pose_distance * direction / np.linalg.norm(direction)
        tilt = np.append(0.5 * s.orientation_noise * e_q, 1.0)
        quaternion = rotation.normalize(rotation.multiply(tilt, truth.quaternion))
        return MocapFrame(number, t, delivery, position, quaternion)
