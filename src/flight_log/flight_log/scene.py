"""A flight as the numbers that its web page draws: small, JSON, times in s after engage, lengths in m."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flight_log import metrics
from flight_log.evaluation import Evaluation, following, tracking
from flight_log.flight import Flight, FlightStatus, States
from flight_log.table import label, remarks

MAX_SAMPLES = 1500  # of a curve
MAX_PLANS = 400
MAX_SPAN = 300.0  # s of a long recording shown around the trial
PHASES = ('taking_off', 'holding', 'following', 'landing', 'emergency')


def interval(flight: Flight) -> tuple[float, float]:
    """The part of a flight that is judged: following, or everything."""
    found = following(flight.status)
    t = flight.motion.t
    return found[:2] if found else (float(t[0]), float(t[-1]))


def shown(flight: Flight) -> tuple[float, float]:
    """First and last time on the page: from just before the motors run, at most MAX_SPAN around the trial."""
    start, end = interval(flight)
    t = flight.motion.t
    awake = next((s.t for s in flight.status if s.phase in PHASES), t[0])
    return max(t[0], start - MAX_SPAN, awake - 1.0), min(t[-1], end + MAX_SPAN)


def scene(flight: Flight, evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the page draws of one flight."""
    (start, end), (first, last) = interval(flight), shown(flight)
    states = _thinned(flight.motion.between(first, last))
    t = states.t - start
    speed = np.linalg.norm(states.velocity, axis=1)
    if not np.isfinite(speed).any() and len(t) > 1:
        speed = np.linalg.norm(np.gradient(states.position, states.t, axis=0), axis=1)
    clearance = metrics.clearance(states.t, states.position, flight.spheres)[0]
    sent, error = tracking(flight, first, last)
    ticks = flight.ticks.between(first, last)
    keep = _every(len(sent), MAX_SAMPLES)
    tick = _every(len(ticks.t), MAX_SAMPLES)
    failure = evaluation.failure
    return {
        'label': label(evaluation), 'mode': evaluation.mode, 'verdict': verdict(evaluation),
        'failed': failure is not None, 'remarks': remarks(evaluation), 'metadata': evaluation.metadata,
        'goal': evaluation.goal, 'end': _number(end - start, 3),
        'failure': None if failure is None or not math.isfinite(failure.t) else _number(failure.t, 3),
        'nearest': evaluation.min_clearance_sphere, 'closest': _number(evaluation.min_clearance_t, 3),
        't': _list(t, 3), 'position': [_list(states.position[:, i], 4) for i in range(3)], 'speed': _list(speed, 3),
        'clearance': _list(clearance, 4),
        'tracking': [_list(sent[keep] - start, 3), _list(100.0 * error[keep], 2)],
        'ticks': {'t': _list(ticks.t[tick] - start, 3),
                  **{name: _list(getattr(ticks, name)[tick], digits) for name, digits in (
                      ('solve_ms', 3), ('latency_ms', 3), ('iterations', 0), ('residual', 9))},
                  'refused': [[_number(ticks.t[i] - start, 3), ticks.gate[i]] for i in tick
                              if ticks.gate[i] not in ('', 'accepted')]},
        'phases': phases(flight.status, first, last, start), 'events': events(flight.status, first, last, start),
        'plans': _plans(flight, first, last, start), 'spheres': _spheres(flight, first, last, start)}


def verdict(e: Evaluation) -> str:
    """One or two words."""
    if e.mode == 'open_loop':
        return 'open loop'
    if e.failure:
        return e.failure.cause.replace('_', ' ')
    return 'success' if e.reached_goal else 'finished off the goal'


def phases(status: list[FlightStatus], first: float, last: float, start: float) -> list[list]:
    """[phase, from, to] of every interval in one phase."""
    made: list[list] = []
    for i, s in enumerate(status):
        until = status[i + 1].t if i + 1 < len(status) else last
        begin, end = max(s.t, first) - start, min(until, last) - start
        if end <= begin:
            continue
        if made and made[-1][0] == s.phase:
            made[-1][2] = round(end, 3)
        else:
            made.append([s.phase, round(begin, 3), round(end, 3)])
    return made


def events(status: list[FlightStatus], first: float, last: float, start: float) -> list[list]:
    """[t, guard's answer, reason] wherever a reason appears or changes."""
    made, before = [], ''
    for s in status:
        if s.reason != before and s.reason and first <= s.t <= last:
            made.append([round(s.t - start, 3), s.guard, s.reason])
        before = s.reason
    return made


def _plans(flight: Flight, first: float, last: float, start: float) -> dict[str, Any]:
    made = np.flatnonzero((flight.plans.t >= first) & (flight.plans.t <= last))
    made = made[_every(len(made), MAX_PLANS)]
    return {'t': _list(flight.plans.t[made] - start, 3),
            'path': [[_list(flight.plans.path[i][:, axis], 3) for axis in range(3)] for i in made]}


def _spheres(flight: Flight, first: float, last: float, start: float) -> dict[str, Any]:
    """Radii, and centres at one instant, or at several where they move."""
    track = flight.spheres
    if not len(track.t) or not track.position.shape[1]:
        return {'radius': [], 't': [], 'centers': []}
    at = np.arange(first, last, max(0.1, (last - first) / MAX_PLANS)) if track.moving else np.array([first])
    centers, radius = track.at(at)
    return {'radius': _list(radius[0], 4), 't': _list(at - start, 3), 'centers': [_list(c.ravel(), 3) for c in centers]}


def _thinned(states: States) -> States:
    keep = _every(len(states.t), MAX_SAMPLES)
    return States(*(getattr(states, f)[keep] for f in ('t', 'position', 'quaternion', 'velocity', 'rates')))


def _every(count: int, most: int) -> np.ndarray:
    """At most `most` indices of range(count), evenly, the last one included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.zeros(0, int)


def _number(value: float, digits: int) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None


def _list(values: np.ndarray, digits: int) -> list:
    return [_number(v, digits) for v in np.asarray(values, dtype=float).tolist()]
