# SPDX-License-Identifier: GPL-3.0-or-later
"""The setpoint guard: what the drone may do next, judged before every setpoint.

The plan gate in the policy node judges plans while the policy lives; this guard judges its absence,
and everything else that can end a flight: mocap, fence, tilt, battery, supervisor, link. It is a pure
function of `Inputs`. Every check names the answer it asks for, the worst one wins:

    idle < follow < hold < land < cut

The answer never asks for less than the phase already is (a holding drone is not told to follow), and
phases only go back by an operator's engage, go_to or arm: that is the latch, so a regained mocap or
policy never resumes a flight by itself.

Names in the last column are parameters (GuardSettings). "Flying" is taking_off, holding, following and landing;
an answer that is milder than the phase (hold while landing) changes nothing.

    condition                                              while        answer  limit
    radio link lost                                        armed on     cut*    at once; final until disarmed
    supervisor: tumbled, crashed or locked                 armed on     cut*    at once
    tilt                                                   armed on     cut*    tilt_cut for tilt_time
    drone disarmed itself                                  flying, not  cut     at once
                                                           landing
    mocap: no pose that is believed (below)                flying       hold    pose_hold
                                                                        land    pose_land
                                                                        cut     pose_cut
    drone outside the fence                                flying       land    0 m (no floor unless following)
                                                                        cut     fence_margin
    measured velocity leads out of the fence               flying       hold    fence_horizon
    onboard estimate away from mocap, or not a number      flying       land    estimate_error for estimate_time
    battery low (plus battery_sag), or unknown             flying       land    battery_land for battery_time
    battery critical (as measured)                         flying       land    battery_critical for its time
    no telemetry                                           flying       land    telemetry_land
    a packet could not be sent                             flying       land    at once
    recorder silent or failed, if it has been heard        flying       recorder_answer after recorder_silence
    no plan that is believed (below)                       following    hold    plan_hold
    no odometry that is believed                           following    hold    pose_hold
    setpoint not finite, beyond the radio, or out of the   following    hold    at once, before it is sent
    fence
    flown plan or measured motion meets a virtual sphere   following    hold    collision_margin within
    or another drone (neighbour_*)                                              collision_horizon for collision_time
    ... and the hold would be hit, a landing less          following,   land    collision_margin within hold_land
                                                           guard's hold
    system clock was set                                   following    hold    clock_step
    hold that the guard began                              holding      land    hold_land

    * on the ground, phase armed: disarmed instead, which locks nothing

A pose is not believed (FlightManager.on_pose; its reason stands beside the age) when a number is not finite, the
quaternion has no unit norm, its stamp does not advance (late poses are as old as their stamp), or, in the air,
when it repeats the last one bit for bit (frozen) or lies where no drone can have flown since (jump_*: a jump,
another body, a flipped attitude), and then for as long as it stays there. Odometry: not finite, or away from the
pose. A plan: not finite, times that do not increase, no unit quaternion, a stamp that does not advance or is
further than plan_latency from the present, or, while following, a beginning further than plan_jump from the drone.

Ages and times are of the steady clock; the ROS clock may be set without making anything older or younger
(stamp_clock). Requests end a flight too: land, emergency (from any phase), and shutdown of the node, which lands.
Below this guard stand the radio thread's dead man (cflib_radio) and the firmware's own time-outs: level after
0.5 s without a setpoint, motors off after 2 s, and its emergency watchdog once `firmware_watchdog` began it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crazyflie_interface import radio
from crazyflie_interface.collision import Encounter
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
    odometry_age: float = 0.0  # of the last usable odometry's arrival
    position: np.ndarray | None = None  # (3,) m, world, last usable pose
    velocity: np.ndarray | None = None  # (3,) m/s, world; None when odometry is stale
    setpoint: np.ndarray | None = None  # (3,) m, world, position about to be sent
    setpoint_fault: str = ''  # why that setpoint cannot be sent
    plan_fault: str = ''  # why the newest plan was refused, or what the policy says
    pose_fault: str = ''  # why the newest pose was refused
    odometry_fault: str = ''  # why the newest odometry was refused
    tilted_for: float = 0.0  # s the tilt has been above tilt_cut
    battery_v: float | None = None  # V, measured
    battery_low_for: float = 0.0  # s the voltage has been below battery_land or unknown
    battery_critical_for: float = 0.0  # s the voltage has been below battery_critical
    supervisor: int | None = None  # bits of radio.py
    link: str = 'up'  # Telemetry.link
    link_fault: str = ''  # Telemetry.fault
    telemetry_age: float = 0.0
    guard_held_for: float | None = None  # s since the guard, not the operator, began this hold
    estimate_error: float = 0.0  # m from the onboard estimate to the pose
    estimate_off_for: float = 0.0  # s it has been above estimate_error
    planned: Encounter | None = None  # the flown plan with the spheres, within collision_horizon
    measured: Encounter | None = None  # the measured motion, likewise
    meeting_for: float = 0.0  # s for which one of the two has met a sphere
    held: Encounter | None = None  # a hold from here, within hold_land
    landed: Encounter | None = None  # a landing from here, likewise
    clock_step: float = 0.0  # s by which the ROS clock was set just now
    recorder_fault: str = ''  # why the flight is not recorded any more


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
    if i.estimate_off_for > s.estimate_time:
        yield 'land', (f'onboard estimate {i.estimate_error:.2f} m from mocap for {i.estimate_off_for:.1f} s '
                       f'(limit {s.estimate_error} m)')
    yield from _battery(i, s)
    if i.recorder_fault and s.recorder_answer != 'warn':
        yield s.recorder_answer, i.recorder_fault
    if i.supervisor is not None and not i.supervisor & radio.ARMED and i.phase != 'landing':
        yield 'cut', f'drone disarmed itself (supervisor 0x{i.supervisor:03x})'
    if i.phase == 'holding' and i.guard_held_for is not None:
        if i.guard_held_for >= s.hold_land:
            yield 'land', f'held {i.guard_held_for:.1f} s by the guard without a new engage'
        if _landing_is_clearer(i, s):
            yield 'land', f'the hold would be hit: {_meeting(i.held)}'
    if i.phase == 'following':
        yield from _following(i, s)


def _battery(i, s):
    for below, limit, time in ((i.battery_critical_for, s.battery_critical, s.battery_critical_time),
                               (i.battery_low_for, s.battery_land, s.battery_time)):
        if below > time:
            if i.battery_v is None or not np.isfinite(i.battery_v):
                yield 'land', f'battery voltage is unknown for {below:.1f} s'
            else:
                yield 'land', f'battery {i.battery_v:.2f} V, below {limit} V for {below:.1f} s'


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
    if i.odometry_age >= s.pose_hold:
        because = f' ({i.odometry_fault})' if i.odometry_fault else ''
        yield 'hold', f'no odometry for {i.odometry_age:.2f} s (limit {s.pose_hold} s){because}'
    if i.clock_step:
        yield 'hold', f'the system clock was set by {i.clock_step:+.3f} s'
    if i.meeting_for > s.collision_time:
        answer = 'land' if _landing_is_clearer(i, s) else 'hold'
        for encounter, what in ((i.planned, 'plan'), (i.measured, 'motion')):
            if encounter is not None and encounter.worse_than(s.collision_margin):
                yield answer, f'the {what} meets a sphere: {_meeting(encounter)}'


def _landing_is_clearer(i, s) -> bool:
    return (i.held is not None and i.landed is not None and i.held.worse_than(s.collision_margin)
            and i.landed.clearance > i.held.clearance)


def _meeting(encounter: Encounter) -> str:
    return f'{encounter.clearance:.2f} m from the surface of sphere {encounter.sphere} in {encounter.after:.2f} s'
