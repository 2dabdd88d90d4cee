"""A bag as light arrays: what evaluation and report need of a flight, read in one pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deqmpc import interface
from deqmpc.types import Obstacles
from flight_log import cdr
from flight_log.bag import BagError, deserialize, opened
from flight_log.metrics import SphereTrack
from flight_log.replay import robot_in

_READ = (interface.POSE, interface.ODOM, interface.OBSTACLES, interface.PLAN, interface.SETPOINT,
         interface.STATUS, interface.DIAGNOSTICS)
_TICK_KEYS = ('tick', 'solve_ms', 'tick_ms', 'latency_ms', 'deadline_misses', 'iterations', 'residual')
_NUMBERS = (cdr.POSE, cdr.ODOM, cdr.PLAN)  # types that are read in bulk

# Stamps that are further than this (s) from the log times come from another clock than the recorder's,
# as in a replay without restamping; then log times are used throughout.
CLOCK_DISAGREEMENT = 5.0


@dataclass(frozen=True)
class States:
    """Odometry or pose samples; velocity and rates are NaN for poses."""

    t: np.ndarray  # (N,) s
    position: np.ndarray  # (N, 3) m, world
    quaternion: np.ndarray  # (N, 4) x y z w
    velocity: np.ndarray  # (N, 3) m/s, world
    rates: np.ndarray  # (N, 3) rad/s, body

    def between(self, start: float, end: float) -> States:
        """The samples with start <= t <= end."""
        keep = (self.t >= start) & (self.t <= end)
        return States(*(getattr(self, f)[keep] for f in ('t', 'position', 'quaternion', 'velocity', 'rates')))


@dataclass(frozen=True)
class FlightStatus:
    """One status of the drone's interface."""

    t: float  # s
    phase: str
    guard: str
    reason: str
    battery_v: float
    supervisor: int | None  # bits, None when unknown


@dataclass(frozen=True)
class Ticks:
    """Policy ticks, N of them."""

    t: np.ndarray  # (N,) s, the end of the tick's work
    number: np.ndarray  # (N,) count since the policy's start
    solve_ms: np.ndarray  # (N,) NaN where the policy was not called
    tick_ms: np.ndarray  # (N,) the instant the tick was due to plan published
    latency_ms: np.ndarray  # (N,) odometry stamp to plan published
    deadline_misses: np.ndarray  # (N,) counter
    iterations: np.ndarray  # (N,) of the solver
    residual: np.ndarray  # (N,) of the solver
    gate: list[str]

    def between(self, start: float, end: float) -> Ticks:
        """The ticks with start <= t < end."""
        keep = (self.t >= start) & (self.t < end)
        arrays = (self.t, self.number, self.solve_ms, self.tick_ms, self.latency_ms, self.deadline_misses,
                  self.iterations, self.residual)
        return Ticks(*(a[keep] for a in arrays), [g for g, k in zip(self.gate, keep, strict=True) if k])


@dataclass(frozen=True)
class Plans:
    """Published plans."""

    t: np.ndarray  # (N,) s, when they were recorded
    path: list[np.ndarray]  # N arrays (T+1, 3) m, world
    times: list[np.ndarray]  # N arrays (T+1,) s of their points, on the clock of the stamps


@dataclass(frozen=True)
class Flight:
    """Everything of one bag."""

    path: Path
    robot: str
    torn: bool
    metadata: dict[str, str]
    odom: States
    pose: States
    setpoint: States  # velocity as sent; rates and attitude too
    status: list[FlightStatus]
    ticks: Ticks
    plans: Plans
    spheres: SphereTrack
    notes: list[str]  # what the reader should know about the data

    @property
    def motion(self) -> States:
        """Odometry, or poses where there is none."""
        return self.odom if self.odom.t.size else self.pose


def _number(text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return float('nan')


def _bits(text: str) -> int | None:
    try:
        return int(text, 0)
    except (TypeError, ValueError):
        return None


class _Gather:
    """Rows of numbers with their log times, the stamp in column 0."""

    def __init__(self, width: int):
        self.rows: list[np.ndarray] = []
        self.log: list[float] = []
        self.width = width

    def add(self, log: float, row: np.ndarray) -> None:
        """One row; numbers that the message does not have are NaN."""
        self.rows.append(row if len(row) == self.width else np.append(row, np.full(self.width - len(row), np.nan)))
        self.log.append(log)

    def array(self, use_log: bool) -> np.ndarray:
        """(N, width) with the stamp, or the log time, in column 0, in the order of time."""
        a = np.array(self.rows).reshape(-1, self.width)
        if use_log:
            a[:, 0] = self.log
        return a[np.argsort(a[:, 0], kind='stable')]


def _states(a: np.ndarray) -> States:
    return States(a[:, 0], a[:, 1:4], a[:, 4:8], a[:, 8:11], a[:, 11:14])


class _Read:
    """What is taken from every message, in one pass."""

    def __init__(self, robot: str, names: dict[str, interface.Topic], messages):
        self.states = {t: _Gather(14) for t in (interface.ODOM, interface.POSE, interface.SETPOINT)}
        self.ticks, self.plans = _Gather(1 + len(_TICK_KEYS)), []
        self.status: list[tuple[float, FlightStatus]] = []
        self.gates: list[str] = []
        self.fields: list[tuple[float, Obstacles]] = []
        self.broken: dict[str, str] = {}
        self._robot = robot
        numbers: dict[str, list[tuple[float, bytes]]] = {n: [] for n, t in names.items() if t.type in _NUMBERS}
        for name, kind, log_time, data in messages:
            log = 1e-9 * log_time
            if name in numbers:
                numbers[name].append((log, data))
                continue
            try:
                self._words(names[name], log, deserialize(data, kind))
            except ValueError as error:
                self.broken.setdefault(name, str(error))
        for name, given in numbers.items():
            self._numbers(name, names[name], given)

    def _words(self, topic, log, message) -> None:
        if topic is interface.OBSTACLES:
            self.fields.append((log, interface.read_obstacles(message)))
            return
        for d in interface.read_diagnostics(message):
            v = d.values
            if d.name == f'{self._robot}/flight':
                self.status.append((log, FlightStatus(
                    d.stamp, v.get('phase', ''), v.get('guard', ''), v.get('reason', ''),
                    _number(v.get('battery_v')), _bits(v.get('supervisor')))))
            elif d.name == f'{self._robot}/policy':
                self.ticks.add(log, np.array([d.stamp, *(_number(v.get(k)) for k in _TICK_KEYS)]))
                self.gates.append(v.get('gate', ''))

    def _numbers(self, name, topic, given) -> None:
        rows, faults = cdr.read(topic.type, [data for _, data in given])
        for (log, _), row in zip(given, rows, strict=True):
            if row is None:
                continue
            if topic is interface.PLAN:
                self.plans.append((log, row[:, 1:4], row[:, 0]))
            else:
                self.states[topic].add(log, row if row.ndim == 1 else row[0, :14])
        if faults:
            self.broken[name] = faults[min(faults)]


def load_flight(path: str | Path, robot: str = '') -> Flight:
    """Read a bag. `robot`: whose topics, needed only when the bag holds several.

    BagError when the bag is unreadable or holds neither pose nor odometry of the robot.
    """
    with opened(path) as (info, messages):
        robot = robot or robot_in(path, info.topics)
        names = {t.resolve(robot): t for t in _READ}
        wanted = [n for n, t in names.items() if info.topics.get(n) == t.type]
        read = _Read(robot, names, messages(wanted))
    states, ticks, status = read.states, read.ticks, read.status
    if not states[interface.ODOM].rows and not states[interface.POSE].rows:
        raise BagError(f'{path}: no pose and no odometry of {robot}; it has {sorted(info.topics)}')

    notes = [f'{name}: messages skipped, the first because: {why}' for name, why in read.broken.items()]
    motion = states[interface.ODOM] if states[interface.ODOM].rows else states[interface.POSE]
    delay = np.median(np.array(motion.log) - np.array([r[0] for r in motion.rows]))
    use_log = not abs(delay) <= CLOCK_DISAGREEMENT
    if use_log:
        notes.append('stamps are not on the clock of the recording: log times are used instead')
    arrays = {}
    for topic, gathered in states.items():
        a = gathered.array(use_log)
        finite = np.isfinite(a[:, :8]).all(axis=1) & (np.linalg.norm(a[:, 4:8], axis=1) > 1e-6)
        if not finite.all():
            notes.append(f'{topic.name}: {int((~finite).sum())} of {len(a)} samples are not finite, left out')
        arrays[topic] = _states(a[finite])
    t = ticks.array(use_log)
    order = np.argsort(ticks.log if use_log else [r[0] for r in ticks.rows], kind='stable')
    if status and use_log:
        status = [(log, replace(s, t=log)) for log, s in status]
    if not arrays[interface.ODOM].t.size:
        notes.append('no odometry: positions are the mocap poses, and there is no return (it needs velocity)')
    return Flight(
        path=Path(path), robot=robot, torn=info.torn, metadata=info.metadata, odom=arrays[interface.ODOM],
        pose=arrays[interface.POSE], setpoint=arrays[interface.SETPOINT],
        status=sorted((s for _, s in status), key=lambda s: s.t),
        ticks=Ticks(*t.T, [read.gates[i] for i in order]),
        plans=Plans(np.array([log for log, _, _ in read.plans]), [p for _, p, _ in read.plans],
                    [t for _, _, t in read.plans]),
        spheres=SphereTrack.of([f for _, f in read.fields],
                               [log if use_log or len(f.radius) == 0 else f.stamp for log, f in read.fields]),
        notes=notes)
