# SPDX-License-Identifier: GPL-3.0-or-later
"""The setpoint guard: what the drone may do next, judged before every setpoint.

The plan gate in the policy node judges plans while the policy lives; this guard judges its absence,
and everything else that can end a flight: mocap, fence, tilt, battery, supervisor, link. It is a pure
function of `Inputs`. Every check names the answer it asks for, the worst one wins:

    idle < follow < hold < land < cut

The answer never asks for less than the phase already is (a holding drone is not told to follow), and
phases only go back by an operator's engage, go_to or arm: that is the latch, so a regained mocap or
policy never resumes a flight by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crazyflie_interface import radio
from crazyflie_interface.settings import GuardSettings

ANSWERS = ('idle', 'follow', 'hold', 'land', 'cut')  # from mildest to worst

# What the guard answers in each phase when nothing is wrong.
BASELINE = {'disarmed': 'idle', 'armed': 'idle', 'taking_off': 'hold', 'holding': 'hold',
            'following': 'follow', 'landing': 'land', 'emergency': 'cut'}


@dataclass(frozen=True)
class Answer:
    """One answer of ANSWERS, and why when a check asked for it."""

    answer: str
    reason: str = ''


@dataclass(frozen=True)
class Inputs:
    """What the guard knows at one tick. Ages are s; inf means never."""

    phase: str  # one of interface.PHASES
    pose_age: float  # of the last usable mocap pose
    plan_age: float = 0.0  # of the last usable plan's arrival
    position: np.ndarray | None = None  # (3,) m, world, last usable pose
    velocity: np.ndarray | None = None  # (3,) m/s, world; None when odometry is stale
    setpoint: np.ndarray | None = None  # (3,) m, world, position about to be sent
    setpoint_fault: str = ''  # why that setpoint cannot be sent
    plan_fault: str = ''  # why the newest plan was refused
    pose_fault: str = ''  # why the newest pose was refused
    tilted_for: float = 0.0  # s the tilt has been above tilt_cut
    battery_v: float | None = None  # V, measured
    battery_low_for: float = 0.0  # s the voltage has been below battery_land
    battery_critical_for: float = 0.0  # s the voltage has been below battery_critical
    supervisor: int | None = None  # bits of radio.py
    link: str = 'up'  # Telemetry.link
    link_fault: str = ''  # Telemetry.fault
    telemetry_age: float = 0.0
    guard_held_for: float | None = None  # s since the guard, not the operator, began this hold


def outside(point: np.ndarray, low, high) -> float:
    """Distance (m) of `point` (3,) outside the box, the largest over the axes; negative inside."""
    return float(np.max(np.maximum(np.asarray(low) - point, point - np.asarray(high))))


def decide(inputs: Inputs, settings: GuardSettings) -> Answer:
    """The guard's answer."""
    worst = Answer(BASELINE[inputs.phase])
    if inputs.phase in ('disarmed', 'emergency'):
        return worst
    checks = _drone if inputs.phase == 'armed' else _in_flight
    for answer, reason in checks(inputs, settings):
        if ANSWERS.index(answer) > ANSWERS.index(worst.answer):
            worst = Answer(answer, reason)
    return worst


def _drone(i: Inputs, s: GuardSettings) -> Iterator[tuple[str, str]]:
    """Checks that hold from arming on."""
    if i.link == 'lost':
        yield 'cut', f'radio link lost: {i.link_fault}'
    for bit, what in ((radio.TUMBLED, 'tumbled'), (radio.CRASHED, 'crashed'), (radio.LOCKED, 'locked')):
        if i.supervisor is not None and i.supervisor & bit:
            yield 'cut', f'supervisor reports {what} (0x{i.supervisor:03x})'
    if i.tilted_for > s.tilt_time:
        yield 'cut', f'tilt above {s.tilt_cut:.2f} rad for {i.tilted_for:.2f} s'


def _in_flight(i: Inputs, s: GuardSettings) -> Iterator[tuple[str, str]]:
    """Checks that hold while the motors carry the drone."""
    yield from _drone(i, s)
    yield from _mocap(i, s)
    yield from _fence(i, s)
    if i.link_fault:
        yield 'land', f'radio: {i.link_fault}'
    if i.telemetry_age >= s.telemetry_land:
        yield 'land', f'no telemetry for {i.telemetry_age:.2f} s (limit {s.telemetry_land} s)'
    for below, limit, time in ((i.battery_critical_for, s.battery_critical, s.battery_critical_time),
                               (i.battery_low_for, s.battery_land, s.battery_time)):
        if below > time:
            yield 'land', f'battery {i.battery_v:.2f} V, below {limit} V for {below:.1f} s'
    if i.supervisor is not None and not i.supervisor & radio.ARMED and i.phase != 'landing':
        yield 'cut', f'drone disarmed itself (supervisor 0x{i.supervisor:03x})'
    if i.phase == 'holding' and i.guard_held_for is not None and i.guard_held_for >= s.hold_land:
        yield 'land', f'held {i.guard_held_for:.1f} s by the guard without a new engage'
    if i.phase == 'following':
        yield from _following(i, s)


def _mocap(i, s):
    because = f' ({i.pose_fault})' if i.pose_fault else ''
    for limit, answer in ((s.pose_cut, 'cut'), (s.pose_land, 'land'), (s.pose_hold, 'hold')):
        if i.pose_age >= limit:
            yield answer, f'no mocap pose for {i.pose_age:.2f} s (limit {limit} s){because}'
            return


def _fence(i, s):
    if i.position is None:
        return
    # The ground lies outside the fence's floor, so the floor only holds for a drone that follows a plan.
    low = np.array(s.fence_low, float)
    if i.phase != 'following':
        low[2] = -np.inf
    where = f'{np.round(i.position, 2).tolist()} m'
    distance = outside(i.position, low, s.fence_high)
    if distance > s.fence_margin:
        yield 'cut', f'at {where}, {distance:.2f} m outside the fence (margin {s.fence_margin} m)'
    elif distance > 0.0:
        yield 'land', f'at {where}, {distance:.2f} m outside the fence'
    elif i.velocity is not None:
        ahead = i.position + s.fence_horizon * i.velocity
        if outside(ahead, low, s.fence_high) > 0.0:
            yield 'hold', (f'at {where} with {np.round(i.velocity, 2).tolist()} m/s, outside the fence '
                           f'in {s.fence_horizon} s')


def _following(i, s):
    if i.setpoint_fault:
        yield 'hold', i.setpoint_fault
    elif i.setpoint is not None and outside(i.setpoint, s.fence_low, s.fence_high) > 0.0:
        yield 'hold', f'setpoint {np.round(i.setpoint, 2).tolist()} m is outside the fence'
    if i.plan_age >= s.plan_hold:
        because = f' ({i.plan_fault})' if i.plan_fault else ''
        yield 'hold', f'no plan for {i.plan_age:.2f} s (limit {s.plan_hold} s){because}'
