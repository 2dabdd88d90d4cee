"""What happened in a recorded flight: one bag's arrays into one `Evaluation`, several into a `Summary`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from deqmpc.dynamics import rotation
from deqmpc.statistics import wilson
from flight_log import metrics
from flight_log.bag import BagError
from flight_log.flight import Flight, FlightStatus, States

# Supervisor bits of the firmware that mean a crash (supervisor.info, see crazyflie-firmware supervisor.c).
_CRASH_BITS = ((5, 'tumbled'), (6, 'locked'), (7, 'crashed'))
_AIRBORNE = ('armed', 'taking_off', 'holding', 'landing', 'emergency')


@dataclass(frozen=True)
class EvaluationSettings:
    """What counts as what."""

    goal: tuple[float, float, float] | None = None  # m, world; None: from the bag's metadata, else (0, 0, 1)
    max_steps: int | None = None  # policy ticks of a trial; None: from the bag's metadata, else 200
    reached: float = 0.10  # m: the last second must stay within this of the goal
    crash_tilt: float = math.pi / 2  # rad: beyond this the drone cannot hold its height
    crash_height: float = 0.05  # m: lower than this while following is the ground
    mocap_gap: float = 0.1  # s without a pose that counts as a gap (the setpoint guard's first limit)
    tick_slack: int = 2  # ticks that the 10 Hz status may cut off at the ends of a trial


@dataclass(frozen=True)
class Failure:
    """Why a trial failed, at its first failure."""

    cause: str  # collision | crash | fence | guard | never_engaged | incomplete
    detail: str
    t: float  # s after engage; NaN when it never engaged


@dataclass
class Evaluation:
    """One bag. Times in s, lengths in m, latencies in ms; NaN where the bag cannot tell."""

    bag: str
    robot: str
    mode: str  # trial | open_loop
    torn: bool
    goal: list[float]
    duration: float  # following, or the whole recording in open loop
    failure: Failure | None = None
    success: bool | None = None  # None in open loop
    reached_goal: bool | None = None
    steps: int = 0
    max_steps: int = 0
    total_return: float = math.nan
    normalised_return: float = math.nan
    min_clearance: float = math.nan
    min_clearance_sphere: int = -1
    min_clearance_t: float = math.nan
    spheres: int = 0
    final_max: float = math.nan
    final_mean: float = math.nan
    tracking_rms: float = math.nan
    tracking_max: float = math.nan
    solve_ms_p50: float = math.nan
    solve_ms_p99: float = math.nan
    tick_ms_p50: float = math.nan
    tick_ms_p99: float = math.nan
    latency_ms_p50: float = math.nan
    latency_ms_p99: float = math.nan
    ticks: int = 0
    tick_rate: float = math.nan
    missed_ticks: int = 0
    deadline_misses: int = 0
    rejected_plans: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    ticks_without_plan: int = 0
    mocap_rate: float = math.nan
    mocap_gaps: int = 0
    mocap_longest_gap: float = math.nan
    battery_min_v: float = math.nan
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- one trial ----------------------------------------------------------------------------------

def following(status: list[FlightStatus]) -> tuple[float, float, FlightStatus | None] | None:
    """(engage, end, the status that ended it) of the first `following` interval; None without one.
    The end is the last status when the recording stops while following."""
    begin = next((i for i, s in enumerate(status) if s.phase == 'following'), None)
    if begin is None:
        return None
    after = next((s for s in status[begin:] if s.phase != 'following'), None)
    return status[begin].t, (after or status[-1]).t, after


def goal_of(flight: Flight, settings: EvaluationSettings, notes: list[str]) -> np.ndarray:
    """(3,) m, world: the settings', else the bag's, else (0, 0, 1), with a note where the bag's cannot be read."""
    if settings.goal is not None:
        return np.array(settings.goal, dtype=float)
    if 'goal' in flight.metadata:
        try:
            numbers = flight.metadata['goal'].strip('[]()').replace(',', ' ').split()
            return np.array([float(numbers[i]) for i in range(3)])
        except (ValueError, IndexError):
            notes.append(f'metadata goal = {flight.metadata["goal"]!r} is not x,y,z; using (0, 0, 1)')
    return np.array([0.0, 0.0, 1.0])


def _max_steps(flight: Flight, settings: EvaluationSettings) -> int:
    if settings.max_steps is not None:
        return settings.max_steps
    text = flight.metadata.get('max_steps', '')
    return int(text) if text.isdigit() else 200


def _ended_by(after: FlightStatus) -> tuple[str, str] | None:
    """(cause, detail) when something other than the protocol ended the following; else None."""
    if after.phase == 'emergency' or after.guard == 'cut':
        crash = not after.reason or any(w in after.reason for w in ('tilt', 'tumbled', 'crashed', 'locked'))
        cause = 'crash' if crash else 'fence' if 'fence' in after.reason else 'guard'
        return cause, f'motors cut: {after.reason or "emergency stop"}'
    if after.reason:
        return 'fence' if 'fence' in after.reason else 'guard', f'{after.guard}: {after.reason}'
    return None


def find_failure(states: States, distance: np.ndarray, sphere: np.ndarray, status: list[FlightStatus],
                 after: FlightStatus | None, start: float, settings: EvaluationSettings) -> Failure | None:
    """The earliest failure of a trial. `states`, `distance` (N,) and `sphere` (N,): while following;
    `status` likewise; `after`: the status that ended it."""
    candidates: list[tuple[float, str, str]] = []

    def first(mask, cause, say):
        if mask.any():
            i = int(np.argmax(mask))
            candidates.append((states.t[i], cause, say(i)))
    def at(i):
        return f'at {np.round(states.position[i], 2).tolist()} m'
    first(distance < 0, 'collision', lambda i: f'inside sphere {sphere[i]} {at(i)}')
    tilt = rotation.tilt(states.quaternion)
    first(tilt > settings.crash_tilt, 'crash', lambda i: f'tilt {math.degrees(tilt[i]):.0f} deg {at(i)}')
    first(states.position[:, 2] < settings.crash_height, 'crash', lambda i: f'on the ground {at(i)}')
    for s in status:
        said = [word for bit, word in _CRASH_BITS if s.supervisor is not None and s.supervisor >> bit & 1]
        if said:
            candidates.append((s.t, 'crash', f'the drone\'s supervisor says {", ".join(said)}'))
            break
    ended = _ended_by(after) if after is not None else None
    if ended:
        candidates.append((after.t, *ended))
    if not candidates:
        return None
    t, cause, detail = min(candidates, key=lambda c: c[0])
    return Failure(cause, detail, t - start)


def evaluate(flight: Flight, settings: EvaluationSettings = EvaluationSettings()) -> Evaluation:
    """Judge one flight. A bag whose status never shows a phase beyond `disarmed` is judged open loop."""
    notes = list(flight.notes)
    goal = goal_of(flight, settings, notes)
    if flight.torn:
        notes.append('torn recording, read up to the tear; `deqmpc recover BAG` writes a whole copy')
    result = Evaluation(bag=str(flight.path), robot=flight.robot, mode='trial', torn=flight.torn,
                        goal=goal.tolist(), duration=math.nan, max_steps=_max_steps(flight, settings),
                        spheres=flight.spheres.position.shape[1], metadata=flight.metadata, notes=notes)
    states = flight.motion
    interval = following(flight.status)
    if interval is None:
        phases = [s.phase for s in flight.status if s.phase in _AIRBORNE]
        if phases:
            last = flight.status[-1]
            why = next((s.reason for s in flight.status if s.reason), '')
            result.failure = Failure('never_engaged', f'reached {phases[-1]}, ended {last.phase}'
                                     + (f': {why}' if why else ''), math.nan)
            result.success = result.reached_goal = False
            _judge_wires(result, flight, settings, states.t[0], states.t[-1])
        else:
            _judge_open_loop(result, flight, settings, states)
        return result
    start, end, after = interval
    flown = states.between(start, end)
    if not flown.t.size:
        raise BagError(f'{flight.path}: no pose while following ({start:.2f} to {end:.2f} s)')
    if sum(a.phase != 'following' and b.phase == 'following' for a, b in pairwise(flight.status)) > 1:
        notes.append('engaged more than once: only the first time is judged')
    distance, sphere = metrics.clearance(flown.t, flown.position, flight.spheres)
    result.duration = end - start
    result.failure = find_failure(flown, distance, sphere, [s for s in flight.status if start <= s.t < end],
                                  after, start, settings)
    until = start + result.failure.t if result.failure else end

    ticks = flight.ticks.between(start, end)
    counted = ticks.t[ticks.t < until][:result.max_steps]
    result.steps = len(counted)
    if result.failure is None and result.steps < result.max_steps - settings.tick_slack:
        how = 'the recording ends' if after is None else f'following ended ({after.phase}) without a reason'
        steps = f'{result.steps} of {result.max_steps} policy ticks'
        result.failure = Failure('incomplete', f'{how} after {steps}', end - start)
    if flight.odom.t.size:
        at = metrics.latest(counted, flight.odom.t)
        at = at[at >= 0]
        odom = flight.odom
        rewards = metrics.reward(metrics.cost(odom.position[at], odom.quaternion[at], odom.velocity[at],
                                              odom.rates[at], goal))
        result.total_return = float(rewards.sum())
        result.normalised_return = result.total_return / (metrics.MAX_REWARD * result.max_steps)
    result.success = result.failure is None
    _judge_clearance(result, flown, distance, sphere, start)
    last = flown.between(until - 1.0, until)
    if last.t.size:
        away = np.linalg.norm(last.position - goal, axis=1)
        result.final_max, result.final_mean = float(away.max()), float(away.mean())
        result.reached_goal = result.success and result.final_max <= settings.reached
    _judge_tracking(result, flight, start, end)
    battery = [s.battery_v for s in flight.status if start <= s.t < end and math.isfinite(s.battery_v)]
    result.battery_min_v = min(battery, default=math.nan)
    _judge_wires(result, flight, settings, start, end)
    return result


def tracking(flight: Flight, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Times (S,) of the setpoints sent in [start, end] and their distance (S,) to the pose at that time."""
    sent = flight.setpoint.between(start, end)
    flown = flight.pose if flight.pose.t.size else flight.odom
    at_that_time = metrics.interpolate(sent.t, flown.t, flown.position)
    return sent.t, np.linalg.norm(sent.position - at_that_time, axis=1)


def _judge_tracking(result, flight, start, end):
    error = tracking(flight, start, end)[1]
    if np.isfinite(error).any():
        result.tracking_rms, result.tracking_max = metrics.rms(error), float(np.nanmax(error))


def _judge_clearance(result, flown, distance, sphere, start):
    if result.spheres and np.isfinite(distance).any():
        i = int(np.argmin(distance))
        result.min_clearance, result.min_clearance_sphere = float(distance[i]), int(sphere[i])
        result.min_clearance_t = float(flown.t[i] - start)


def _judge_wires(result, flight, settings, start, end):
    """Timing of policy and mocap in [start, end)."""
    ticks = flight.ticks.between(start, end)
    result.ticks = len(ticks.t)
    for name in ('solve_ms', 'tick_ms', 'latency_ms'):
        values = getattr(ticks, name)
        setattr(result, f'{name}_p50', metrics.percentile(values, 50))
        setattr(result, f'{name}_p99', metrics.percentile(values, 99))
    if len(ticks.t) > 1:
        # A live tick is stamped when its work is done, a simulated one when it begins: the beginnings
        # are the steadier of the two.
        begun = min(ticks.t, ticks.t - 1e-3 * np.nan_to_num(ticks.solve_ms), key=lambda t: np.std(np.diff(t)))
        period = float(np.median(np.diff(begun)))
        result.tick_rate = 1.0 / period if period > 0 else math.nan
        result.missed_ticks = metrics.missed_ticks(begun, period)
        before = flight.ticks.deadline_misses[flight.ticks.t < start][-1:]
        result.deadline_misses = metrics.counted(np.concatenate([before, ticks.deadline_misses]))
        if len(flight.plans.t):
            nearest = np.abs(ticks.t[:, None] - flight.plans.t[None, :]).min(axis=1)
            result.ticks_without_plan = int(np.sum(nearest > 0.5 * period))
        else:
            result.ticks_without_plan = len(ticks.t)
    elif not len(ticks.t):
        result.notes.append('no policy ticks: the bag has no diagnostics of the policy, or it did not run')
    result.rejections = dict(Counter(g for g in ticks.gate if g and g != 'accepted'))
    result.rejected_plans = sum(result.rejections.values())
    source = flight.pose if flight.pose.t.size else flight.odom
    t = source.t[(source.t >= start) & (source.t <= end)]
    result.mocap_gaps, result.mocap_longest_gap = metrics.gaps(t, settings.mocap_gap)
    if len(t) > 1:
        result.mocap_rate = float(1.0 / np.median(np.diff(t)))


def _judge_open_loop(result, flight, settings, states):
    result.mode = 'open_loop'
    result.notes.append('no flight: the policy is judged open loop, against what was flown by other means')
    # Ticks before the first odometry have nothing to plan from.
    start, end = states.t[0], states.t[-1]
    result.duration = float(end - start)
    _judge_wires(result, flight, settings, start, end)
    result.steps = result.ticks
    _judge_tracking(result, flight, start, end)
    distance, sphere = metrics.clearance(states.t, states.position, flight.spheres)
    _judge_clearance(result, states, distance, sphere, start)


# --- several trials -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Summary:
    """Several trials together (open-loop bags are left out)."""

    trials: int
    successes: int
    success_share: float
    success_low: float  # 95 % Wilson interval
    success_high: float
    reached_goal: int
    return_mean: float
    return_sd: float  # sample standard deviation; NaN for one trial
    return_min: float
    return_max: float
    normalised_mean: float
    normalised_sd: float
    causes: dict[str, int]


def earned(evaluation: Evaluation) -> float:
    """Return of a trial. One that never engaged earned nothing: that is a return of 0, not a missing one."""
    never = evaluation.failure is not None and evaluation.failure.cause == 'never_engaged'
    return 0.0 if never else evaluation.total_return


def summarise(evaluations: list[Evaluation]) -> Summary:
    """The trials among `evaluations` as one."""
    trials = [e for e in evaluations if e.mode == 'trial']
    wins = sum(bool(e.success) for e in trials)
    returns = np.array([earned(e) for e in trials])
    normalised = returns / np.array([metrics.MAX_REWARD * e.max_steps for e in trials])

    def sd(x):
        return float(np.std(x, ddof=1)) if len(x) > 1 else math.nan
    def one(f, x):
        return float(f(x)) if len(x) else math.nan
    low, high = wilson(wins, len(trials))
    return Summary(
        trials=len(trials), successes=wins, success_share=wins / len(trials) if trials else math.nan,
        success_low=low, success_high=high, reached_goal=sum(bool(e.reached_goal) for e in trials),
        return_mean=one(np.mean, returns), return_sd=sd(returns), return_min=one(np.min, returns),
        return_max=one(np.max, returns), normalised_mean=one(np.mean, normalised),
        normalised_sd=sd(normalised),
        causes=dict(Counter(e.failure.cause for e in trials if e.failure)))
