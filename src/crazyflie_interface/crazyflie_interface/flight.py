# SPDX-License-Identifier: GPL-3.0-or-later
"""One drone's flight: requests, poses and plans in; radio commands out; the guard between.

Time is an argument everywhere: `now` is s of a steady clock, which the Radio's telemetry shares. Stamps of poses,
plans and obstacles are ROS time, read through `on_ros_time`; a loop in simulated time, where the two are one,
need not call that. It is not thread-safe: one thread calls it; only the Radio behind it may have threads of its
own.

Radio commands can be lost, so nothing here is believed because it was sent: arming is over when the
supervisor says so, a motion when the pose has arrived; what had no effect is sent again, and after its
time-out the flight ends by landing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crazyflie_interface import collision, guard, phases, preflight, radio
from crazyflie_interface.guard import Answer
from crazyflie_interface.radio import Radio
from crazyflie_interface.setpoint import Setpoint, plan_fault, positions_at, setpoint_at, setpoint_fault
from crazyflie_interface.settings import FlightSettings
from crazyflie_interface.stamp_clock import StampClock
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.neighbours import ColumnSettings, Neighbours
from deqmpc.types import Obstacles, Plan, RigidBodyState

TICK = 0.02  # s, period of FlightManager.tick
RESEND = 0.5  # s after which a request without effect is sent again
CUT_REPEAT = 0.5  # s for which an emergency stop is repeated on every tick
HANDOVER_REPEATS = 2  # ticks on which a hold, a landing or its end is sent again
MAX_RETRIES = 2  # times a motion without effect is sent again
ESTIMATOR_SETTLES = 2.0  # s after a reset of the onboard estimator before it is reset again
ON_GROUND = 0.05  # m above the take-off point below which a landing has landed
WATCHDOG_PERIOD = 0.15  # s; the firmware wants one a second, and packets get lost


@dataclass(frozen=True)
class Result:
    """Answer to a request."""

    success: bool
    message: str


@dataclass
class _Motion:
    """A high-level motion on its way."""

    kind: str  # takeoff | go_to | hold | land
    start: np.ndarray  # (3,) m
    target: np.ndarray  # (3,) m
    duration: float  # s
    command: Callable[[], None]  # sends it
    began: float  # s, first sent
    sent: float  # s, last sent; the drone may have begun then
    repeats: int  # ticks on which it is still sent again, because one lost packet would be silence
    retries: int = 0  # times it was sent again because it had no effect


class FlightManager:
    """The flight of one drone over one Radio."""

    def __init__(self, link: Radio, settings: FlightSettings | None = None, robot: str = 'cf1'):
        self.radio = link
        self.settings = settings or FlightSettings()
        self._body = self.settings.body_name or robot  # the rigid body that mocap must follow
        self.phase = 'disarmed'
        self.answer = Answer('idle')  # the guard's last answer
        self.reason = ''  # why the flight left the operator's hands; kept until the next request
        self.setpoints_sent = 0
        self._go_to = 'idle'
        self._arming_since: float | None = None
        self._arming_sent = 0.0
        self._motion: _Motion | None = None
        self._guard_held_since: float | None = None
        self._cut_since = -np.inf
        self.ending = False
        self._ground = 0.0  # m, height of the pose at take-off
        self._plan: Plan | None = None
        self._plan_received = -np.inf
        self._plan_fault = ''
        self._pose: tuple[float, np.ndarray, np.ndarray] | None = None  # stamp, position, quaternion
        self._pose_seen = -np.inf  # instant at which the drone is known to have been there
        self._pose_fault = ''
        self._refused_pose: tuple[np.ndarray, np.ndarray] | None = None  # position, quaternion of the last jump
        self._pose_window = preflight.PoseWindow(self.settings.preflight_time)
        self._odometry: tuple[float, np.ndarray] | None = None  # arrival, velocity
        self._odometry_fault = ''
        self._obstacles = Obstacles.none()  # stamped on the steady clock
        s = self.settings
        self._neighbours = Neighbours(s.neighbours, ColumnSettings(s.neighbour_radius, s.neighbour_spacing, 0.0))
        self.stamps = StampClock(self.settings.clock_step)
        self.heard: dict[str, tuple[float, interface.Diagnostic]] = {}  # node -> arrival, newest status
        self._last_setpoint: Setpoint | None = None
        self._since: dict[str, float] = {}
        self._watchdog_sent = -np.inf
        self._off_repeats = 0
        self._estimator_reset = -np.inf
        self._spheres_heard = False
        self._clock_difference: float | None = None

    # --- requests ---------------------------------------------------------------------------------

    def arm(self, on: bool, now: float) -> Result:
        """Arm after the preflight checks, or disarm (also ends `emergency`). Arming is done when phase
        becomes `armed`, which is when the drone confirms it."""
        if not on:
            return self._disarm()
        refusal = self._refusal('arm') or ('already arming' if self._arming_since is not None else '')
        if refusal:
            return Result(False, refusal)
        ready = self.try_preflight(now)
        if not ready.success:
            return ready
        self._arming_since = self._arming_sent = now
        self._off_repeats = 0
        self.reason = ''
        self.radio.arm(True)
        return Result(True, 'arming; done when phase is armed')

    def takeoff(self, now: float) -> Result:
        """Rise to takeoff_height; done when phase becomes `holding`."""
        refusal = self._refusal('takeoff')
        if refusal:
            return Result(False, refusal)
        ready = self.try_preflight(now)
        if not ready.success:
            return ready
        s = self.settings
        _, position, _ = self._pose
        self._ground = float(position[2])
        self._enter('takeoff')
        self._begin('takeoff', np.array([position[0], position[1], s.takeoff_height]), s.takeoff_duration,
                    lambda: self.radio.takeoff(s.takeoff_height, s.takeoff_duration), now)
        return Result(True, f'taking off to {s.takeoff_height} m in {s.takeoff_duration} s')

    def go_to(self, position, yaw: float, now: float) -> Result:
        """Move to a pose (m, rad, world) while holding; done when status key go_to is `done`."""
        refusal = self._refusal('go_to')
        if refusal:
            return Result(False, refusal)
        position = np.asarray(position, float)
        if position.shape != (3,) or not np.isfinite(position).all() or not np.isfinite(yaw):
            return Result(False, f'go_to {position.tolist()} m, yaw {yaw} rad: expected finite numbers')
        s = self.settings
        if guard.outside(position, s.fence_low, s.fence_high) > 0.0:
            return Result(False, f'go_to {np.round(position, 2).tolist()} m is outside the fence '
                          f'{s.fence_low} to {s.fence_high}')
        if self._motion is not None and self._motion.kind == 'go_to':
            # A second polynomial begun inside the first can swing far out (cflib, go_to).
            return Result(False, 'another go_to is active')
        if self._pose_age(now) >= s.pose_hold:
            return Result(False, f'no mocap pose for {self._pose_age(now):.2f} s (limit {s.pose_hold} s)')
        self._operator_takes_over()
        distance = float(np.linalg.norm(position - self._pose[1]))
        duration = max(1.0, distance / s.go_to_speed)
        self._begin('go_to', position, duration,
                    lambda: self.radio.go_to(position, float(yaw), duration), now)
        self._go_to = 'active'
        return Result(True, f'going {distance:.2f} m in {duration:.1f} s')

    def engage(self, now: float) -> Result:
        """Follow the plan from now on. Refused without a fresh pose, a fresh plan, or where the first
        setpoint would jump."""
        refusal = self._refusal('engage') or self._engage_refusal(now)
        if refusal:
            return Result(False, refusal)
        self._operator_takes_over()
        self._motion, self._go_to, self._last_setpoint = None, 'idle', None
        self._enter('engage')
        return Result(True, 'following the plan')

    def disengage(self, now: float) -> Result:
        """Stop following and hold at the last setpoint."""
        refusal = self._refusal('disengage')
        if refusal:
            return Result(False, refusal)
        self._hold(now)
        return Result(True, 'holding')

    def land(self, now: float) -> Result:
        """Land here; done when phase becomes `disarmed`."""
        refusal = self._refusal('land')
        if refusal:
            return Result(False, refusal)
        self._operator_takes_over()
        self._land(now)
        return Result(True, f'landing in {self._motion.duration:.1f} s')

    def emergency(self, now: float) -> Result:
        """Cut the motors, from any phase."""
        self._cut(now, 'emergency requested')
        return Result(True, 'motors cut; the drone locks until it is restarted')

    def shutdown(self, now: float) -> None:
        """The process ends: refuse requests from here on, land if flying, disarm if armed. The caller
        goes on ticking (and feeding poses) until `grounded`."""
        self.ending = True
        if self.phase in ('taking_off', 'holding', 'following'):
            self._guard_held_since = None
            self._land(now, 'the interface is shutting down')
        elif self.phase == 'armed' or self._arming_since is not None:
            self._stop_arming()
            self.radio.arm(False)
            if self.phase == 'armed':
                self._enter('disarm')

    @property
    def grounded(self) -> bool:
        """True when no motion of ours carries the drone."""
        return self.phase not in phases.FLYING

    # --- inputs -----------------------------------------------------------------------------------

    def on_ros_time(self, ros: float, now: float) -> None:
        """The ROS clock (s) at `now`, to be called before inputs and ticks."""
        self.stamps.observe(ros, now)

    def on_pose(self, stamp: float, position: np.ndarray, quaternion: np.ndarray, now: float) -> str:
        """A mocap pose (m, xyzw, world) taken at `stamp` (ROS time): forwarded to the drone and remembered.

        Returns why it is refused, empty when it is used. A refused pose counts as no pose.
        """
        stamp = self.stamps.steady(stamp, now)
        self._pose_fault = self._judge_pose(stamp, position, quaternion)
        if self._pose_fault:
            return self._pose_fault
        quaternion = rotation.normalize(quaternion)
        self.radio.extpose(position, quaternion)
        self._pose = (stamp, np.array(position, float), quaternion)
        self._pose_seen = min(stamp, now)  # a stamp ahead of our clock makes nothing fresher
        self._pose_window.add(now, now - stamp)
        return ''

    def _judge_pose(self, stamp, position, quaternion):
        if not (np.isfinite(stamp) and np.isfinite(position).all() and np.isfinite(quaternion).all()):
            return f'pose is not finite: {np.asarray(position).tolist()} {np.asarray(quaternion).tolist()}'
        norm = float(np.linalg.norm(quaternion))
        if abs(norm - 1.0) > 0.05:
            return f'pose quaternion has norm {norm:.3g}, expected 1'
        if self._pose is not None and stamp <= self._pose[0]:
            return f'pose stamp is not after the last one, but {self._pose[0] - stamp:.3f} s before it'
        if self.phase not in phases.FLYING:
            self._refused_pose = None
            return ''
        return self._impossible(stamp, position, quaternion)

    def _impossible(self, stamp, position, quaternion) -> str:
        """Why no flying drone has this pose after the last one. On the ground it may stand still, and be carried.

        What a drone can reach grows with the time since the last pose, so a place that was refused stays refused
        for as long as the new pose is more like it than like the last one that was believed.
        """
        s, (stamp_before, before, attitude) = self.settings, self._pose
        position, quaternion = np.asarray(position, float), rotation.normalize(quaternion)
        if self._height() > ON_GROUND and np.array_equal(position, before) and np.array_equal(quaternion, attitude):
            return 'pose repeats the last one bit for bit: frozen'
        dt, velocity = stamp - stamp_before, None if self._odometry is None else self._odometry[1]
        moved, turned = _distance(position, before), _angle(quaternion, attitude)
        strayed = moved if velocity is None else _distance(position, before + dt * velocity)
        fault = ''
        if moved > s.jump_speed * dt + s.jump_margin:
            fault = f'jumped {moved:.2f} m in {dt:.2f} s (limit {s.jump_speed * dt + s.jump_margin:.2f} m)'
        elif velocity is not None and strayed > 0.5 * s.jump_acceleration * dt**2 + s.jump_margin:
            fault = (f'jumped {strayed:.2f} m from where it was going in {dt:.2f} s '
                     f'(limit {0.5 * s.jump_acceleration * dt**2 + s.jump_margin:.2f} m)')
        elif turned > s.jump_rate * dt + s.jump_angle:
            fault = f'turned {turned:.2f} rad in {dt:.2f} s (limit {s.jump_rate * dt + s.jump_angle:.2f} rad)'
        elif self._refused_pose is not None:
            place, facing = self._refused_pose
            near = _distance(position, place) / s.jump_margin + _angle(quaternion, facing) / s.jump_angle
            if near < min(moved, strayed) / s.jump_margin + turned / s.jump_angle:
                fault = f'is still where it had jumped to, {moved:.2f} m and {turned:.2f} rad from the last good one'
        self._refused_pose = (position, quaternion) if fault else None
        return f'pose {fault}' if fault else ''

    def on_plan(self, plan: Plan, now: float) -> str:
        """A plan from the policy, stamped in ROS time. Returns why it is refused, empty when it is used."""
        s = self.settings
        if np.isfinite(plan.stamp):
            plan = dataclasses.replace(plan, stamp=self.stamps.steady(plan.stamp, now))
        self._plan_fault = plan_fault(plan)
        if not self._plan_fault and not -s.plan_latency <= now - plan.stamp <= s.plan_latency:
            self._plan_fault = (f'plan stamp is {now - plan.stamp:.2f} s old on arrival '
                                f'(limit {s.plan_latency} s)')
        if not self._plan_fault and self._plan is not None and plan.stamp <= self._plan.stamp:
            self._plan_fault = (f'plan stamp is not after the last one, but {self._plan.stamp - plan.stamp:.3f} s '
                                'before it')
        if not self._plan_fault and self.phase == 'following':
            apart = _distance(setpoint_at(plan, now).position, self._pose[1])
            if apart > s.plan_jump:
                self._plan_fault = f'plan is {apart:.2f} m away from the drone (limit {s.plan_jump} m)'
        if not self._plan_fault:
            self._plan, self._plan_received = plan, now
        return self._plan_fault

    def refuse_plan(self, reason: str) -> None:
        """A plan message that could not even be read."""
        self._plan_fault = reason

    def on_odometry(self, state: RigidBodyState, now: float) -> None:
        """Velocity for what looks ahead. A state that is not finite, or not where the pose is, is left out."""
        self._odometry_fault = self._judge_odometry(state, now)
        if not self._odometry_fault:
            self._odometry = (now, state.velocity)

    def _judge_odometry(self, state, now):
        if not state.is_finite():
            return 'odometry is not finite'
        if self._pose is not None:
            apart = float(np.linalg.norm(state.position - self._pose[1]))
            limit = self.settings.jump_margin + self.settings.jump_speed * max(self._pose_age(now), 0.0)
            if apart > limit:
                return f'odometry is {apart:.2f} m from the pose (limit {limit:.2f} m)'
        return ''

    def on_obstacles(self, obstacles: Obstacles, now: float) -> None:
        """The virtual spheres, stamped in ROS time."""
        self._obstacles = dataclasses.replace(obstacles, stamp=self.stamps.steady(obstacles.stamp, now))
        self._spheres_heard = True

    def on_neighbour(self, name: str, state: RigidBodyState, now: float) -> None:
        """Odometry of another robot of the settings' `neighbours`, stamped in ROS time."""
        self._neighbours.on_odometry(name, dataclasses.replace(state, stamp=self.stamps.steady(state.stamp, now)))

    def _spheres(self, now: float) -> Obstacles:
        """The virtual spheres, and the other drones as columns of them, as they are now."""
        return self._neighbours.join(self._obstacles, now).at(now)

    def on_diagnostic(self, node: str, diagnostic: interface.Diagnostic, now: float) -> None:
        """One status of /diagnostics of this robot's `node` (policy, recorder, mocap, ...)."""
        self.heard[node] = (now, diagnostic)

    def on_system_time(self, difference: float) -> None:
        """ROS time minus system time (s)."""
        self._clock_difference = difference

    # --- the 50 Hz tick ---------------------------------------------------------------------------

    def tick(self, now: float) -> Setpoint | None:
        """One step of the flight, every `TICK`; returns the full-state setpoint it sent, if any."""
        telemetry = self.radio.telemetry()
        self._watch_arming(telemetry, now)
        self._watch_motion(now)
        if self._off_repeats > 0:
            self._off_repeats -= 1
            self._motors_off()
        setpoint, fault = self._next_setpoint(now)
        self.answer = guard.decide(self._inputs(telemetry, setpoint, fault, now), self.settings)
        self._act(now)
        self._feed_watchdog(now)
        if self.phase == 'emergency' and now - self._cut_since <= CUT_REPEAT:
            self.radio.emergency_stop()
        if self.phase != 'following':
            return None
        self.radio.full_state(setpoint)
        self._last_setpoint = setpoint
        self.setpoints_sent += 1
        return setpoint

    def _feed_watchdog(self, now):
        # Once begun it must go on also on the ground, or the firmware locks the drone between two flights.
        wanted = self.phase != 'disarmed' or self._watchdog_sent > -np.inf
        if self.settings.firmware_watchdog and wanted and now - self._watchdog_sent >= WATCHDOG_PERIOD:
            self._watchdog_sent = now
            self.radio.emergency_watchdog()

    def _next_setpoint(self, now):
        if self.phase != 'following':
            return None, ''
        setpoint = setpoint_at(self._plan, now + self.settings.look_ahead)
        return setpoint, setpoint_fault(setpoint)

    def _inputs(self, telemetry, setpoint, fault, now) -> guard.Inputs:
        s = self.settings
        flying = self.phase in phases.FLYING
        tilt = rotation.tilt(self._pose[2]) if self._pose is not None else 0.0
        volts = telemetry.battery_v
        loaded = None if volts is None else volts + (s.battery_sag if flying else 0.0)
        odometry_age = np.inf if self._odometry is None else now - self._odometry[0]
        velocity = self._odometry[1] if odometry_age < s.pose_hold else None
        error = self._estimate_error(telemetry, now) if flying else 0.0
        meetings = self._meetings(setpoint, fault, velocity, now)
        meets = any(m.worse_than(s.collision_margin) for m in meetings.values())
        if meets or (self.phase == 'holding' and self._guard_held_since is not None):
            meetings |= self._ways_out(now)
        return guard.Inputs(
            phase=self.phase, pose_age=self._pose_age(now), plan_age=now - self._plan_received,
            odometry_age=odometry_age,
            position=None if self._pose is None else self._pose[1], velocity=velocity,
            setpoint=None if setpoint is None else setpoint.position, setpoint_fault=fault,
            plan_fault=self._plan_fault or self._policy_says(now), pose_fault=self._pose_fault,
            odometry_fault=self._odometry_fault,
            estimate_error=error, estimate_off_for=self._lasting('estimate', not error <= s.estimate_error, now),
            **meetings, meeting_for=self._lasting('meeting', meets, now),
            clock_step=self.stamps.last_step if self.stamps.settling(now) else 0.0,
            recorder_fault=self._recorder_fault(now) if flying else '',
            tilted_for=self._lasting('tilt', tilt > s.tilt_cut, now), battery_v=volts,
            battery_low_for=self._lasting(
                'low', flying and not (loaded is not None and loaded >= s.battery_land), now),
            battery_critical_for=self._lasting(
                'critical', flying and volts is not None and volts < s.battery_critical, now),
            supervisor=telemetry.supervisor, link=telemetry.link, link_fault=telemetry.fault,
            telemetry_age=np.inf if telemetry.stamp is None else max(now - telemetry.stamp, 0.0),
            guard_held_for=None if self._guard_held_since is None else now - self._guard_held_since)

    def _estimate_error(self, telemetry, now) -> float:
        """Distance (m) of the onboard estimate from the pose; NaN when it has none, 0 while either is stale."""
        stale = telemetry.stamp is None or now - telemetry.stamp >= self.settings.telemetry_land
        if stale or telemetry.position is None or self._pose_age(now) >= self.settings.pose_hold:
            return 0.0
        return float(np.linalg.norm(telemetry.position - self._pose[1]))

    def _meetings(self, setpoint, fault, velocity, now) -> dict[str, collision.Encounter]:
        """The flown plan and the measured motion with the spheres, while a plan is followed."""
        s = self.settings
        if setpoint is None or fault or s.collision_horizon == 0.0:
            return {}
        ahead, spheres = collision.instants(s.collision_horizon), self._spheres(now)
        if len(spheres.radius) == 0:
            return {}
        plan = positions_at(self._plan, now + s.look_ahead + ahead)
        meetings = {'planned': collision.encounter(plan, ahead, spheres)}
        if velocity is not None:
            apart, drift = self._pose[1] - plan[0], velocity - setpoint.velocity
            motion = plan + apart + ahead[:, None] * drift
            meetings['measured'] = collision.encounter(motion, ahead, spheres)
        return meetings

    def _ways_out(self, now) -> dict[str, collision.Encounter]:
        """A hold and a landing from where the drone would be held, with the spheres."""
        s, spheres = self.settings, self._spheres(now)
        ahead = collision.instants(s.hold_land)
        place, _ = self._hold_pose()
        hold = np.tile(place, (len(ahead), 1))
        landing = hold.copy()
        landing[:, 2] = np.maximum(hold[:, 2] - s.land_speed * ahead, s.land_height)
        return {'held': collision.encounter(hold, ahead, spheres),
                'landed': collision.encounter(landing, ahead, spheres)}

    def _policy_says(self, now) -> str:
        """Why there is no plan, as far as the policy's diagnostics tell."""
        if 'policy' not in self.heard:
            return ''
        came, word = self.heard['policy']
        if now - came >= self.settings.plan_warn:
            return f'the policy is silent for {now - came:.2f} s'
        return '' if word.level == interface.OK else f'the policy says: {word.message}'

    def _recorder_fault(self, now) -> str:
        if 'recorder' not in self.heard:
            return ''
        came, word = self.heard['recorder']
        if now - came >= self.settings.recorder_silence:
            return f'the recorder is silent for {now - came:.1f} s (limit {self.settings.recorder_silence} s)'
        return f'the recorder says: {word.message}' if word.level == interface.ERROR else ''

    def _lasting(self, name: str, condition: bool, now: float) -> float:
        """How long (s) `condition` has been true without a break."""
        if not condition:
            self._since.pop(name, None)
            return 0.0
        return now - self._since.setdefault(name, now)

    def _act(self, now):
        """Carry out a guard's answer that is worse than what the phase already is."""
        event = phases.ON_ANSWER[self.phase].get(self.answer.answer)
        if event == 'cut':
            self._cut(now, self.answer.reason)
        elif event == 'land':
            self._land(now, self.answer.reason)
        elif event == 'disengage':
            self._hold(now, self.answer.reason)
        elif event == 'disarm':
            self.radio.arm(False)
            self._enter('disarm')
            self.reason = self.answer.reason

    # --- what the drone is doing ------------------------------------------------------------------

    def _watch_arming(self, telemetry, now):
        bits = telemetry.supervisor or 0
        if self._arming_since is not None:
            ready = radio.ARMED | radio.CAN_FLY
            if bits & ready == ready:
                self._stop_arming()
                self._enter('arm')
            elif now - self._arming_since >= self.settings.arm_timeout:
                self._stop_arming()
                self.radio.arm(False)
                self.reason = (f'drone did not confirm arming in {self.settings.arm_timeout} s '
                               f'(supervisor 0x{bits:03x}, needs armed and canFly)')
            elif now - self._arming_sent >= RESEND:
                self._arming_sent = now
                self.radio.arm(True)
        elif self.phase == 'armed' and telemetry.supervisor is not None and not bits & radio.ARMED:
            self._enter('disarm')
            self.reason = f'drone disarmed itself on the ground (supervisor 0x{bits:03x})'

    def _stop_arming(self):
        self._arming_since = None

    def _watch_motion(self, now):
        m = self._motion
        if m is None:
            return
        if m.repeats > 0:
            m.repeats -= 1
            m.command()
        if m.kind == 'land':
            self._watch_landing(m, now)
        elif self._deaf(m, now):
            self._again(m, now)
        elif m.kind == 'takeoff':
            self._watch_takeoff(m, now)
        elif now - m.sent >= m.duration:
            self._watch_move(m, now)

    def _deaf(self, m, now) -> bool:
        """The command was lost: half the duration is half the way, but the drone has not begun."""
        if m.kind not in ('takeoff', 'go_to') or m.retries >= MAX_RETRIES or now - m.sent < 0.5 * m.duration:
            return False
        way = float(np.linalg.norm(m.target - m.start))
        moved = float(np.linalg.norm(self._pose[1] - m.start))
        return (self._pose_age(now) < self.settings.pose_hold and way > self.settings.arrival_distance
                and moved < 0.1 * way)

    def _watch_takeoff(self, m, now):
        fresh = self._pose_age(now) < self.settings.pose_hold
        if (now - m.sent >= m.duration and fresh
                and abs(self._pose[1][2] - m.target[2]) <= self.settings.arrival_distance):
            self._motion = None
            self._enter('arrived')
        elif now - m.began >= (1 + m.retries) * m.duration + self.settings.arrival_timeout:
            self._land(now, f'take-off reached {self._height():.2f} m of {m.target[2] - self._ground:.2f} m')

    def _watch_move(self, m, now):
        error = float(np.linalg.norm(self._pose[1] - m.target))
        arrived = error <= self.settings.arrival_distance and self._pose_age(now) < self.settings.pose_hold
        if m.kind == 'hold':
            self._motion = None
        elif arrived:
            self._motion, self._go_to = None, 'done'
        elif now - m.sent >= m.duration + self.settings.arrival_timeout:
            self._motion, self._go_to = None, 'idle'
            self.reason = f'go_to ended {error:.2f} m from its target'

    def _watch_landing(self, m, now):
        supervisor = self.radio.telemetry().supervisor
        if supervisor is not None and not supervisor & radio.ARMED:
            self._landed()
        elif now - m.sent >= m.duration:
            fresh = self._pose_age(now) < self.settings.pose_hold
            if fresh and self._height() <= ON_GROUND:
                self._landed()
            elif now - m.sent >= m.duration + RESEND:
                if fresh and m.retries < MAX_RETRIES:
                    self._again(m, now)
                else:
                    self._landed()

    def _begin(self, kind, target, duration, command, now, repeats=0):
        self._motion = _Motion(kind, self._pose[1], target, duration, command, now, now, repeats)
        command()

    def _again(self, m, now):
        m.sent = now
        m.retries += 1
        m.command()

    def _height(self) -> float:
        """Height (m) of the last pose above where it took off."""
        return float(self._pose[1][2] - self._ground)

    # --- changes of phase -------------------------------------------------------------------------

    def _refusal(self, event: str) -> str:
        return 'the interface is shutting down' if self.ending else phases.refusal(self.phase, event)

    def _enter(self, event: str) -> None:
        self.phase = phases.after(self.phase, event)

    def _operator_takes_over(self):
        self.reason, self._guard_held_since = '', None

    def _disarm(self) -> Result:
        if self._arming_since is None:
            refusal = self._refusal('disarm')
            if refusal:
                return Result(False, refusal)
            self._enter('disarm')
        self._stop_arming()
        self._operator_takes_over()
        self.radio.arm(False)
        return Result(True, 'disarmed')

    def _hold(self, now: float, reason: str = '') -> None:
        """Leave the plan for a high-level hold at the last setpoint.

        The go_to comes before the stop notice, because the firmware stops the motors while no setpoint
        and no trajectory is there (planner idle, crtp_commander_high_level.c). Both come again on the
        next ticks: without them the firmware levels out after 0.5 s and cuts after 2 s.
        """
        self._enter('disengage')
        target, yaw = self._hold_pose()
        duration = self.settings.hold_duration
        def command():
            self.radio.go_to(target, yaw, duration)
            self.radio.notify_stop()
        self._begin('hold', target, duration, command, now, HANDOVER_REPEATS)
        if reason:
            self.reason, self._guard_held_since = reason, now

    def _hold_pose(self) -> tuple[np.ndarray, float]:
        """Where (m) and with which heading (rad) a hold that begins now brings the drone to rest."""
        if self._last_setpoint is not None:
            return self._last_setpoint.position, self._last_setpoint.yaw
        return self._pose[1], float(rotation.yaw(self._pose[2]))

    def _land(self, now: float, reason: str = '') -> None:
        """Land from whatever flies now."""
        streaming = self.phase == 'following'
        self._enter('land')
        s = self.settings
        duration = max(s.land_duration_min, (self._pose[1][2] - s.land_height) / s.land_speed)
        def command():
            self.radio.land(s.land_height, duration)
            if streaming:
                self.radio.notify_stop()
        target = np.append(self._pose[1][:2], s.land_height)
        self._begin('land', target, duration, command, now, HANDOVER_REPEATS)
        self._go_to = 'idle'
        if reason:
            self.reason = reason

    def _landed(self):
        self._motion = None
        self._enter('landed')
        self._guard_held_since = None
        self._motors_off()
        self._off_repeats = HANDOVER_REPEATS

    def _motors_off(self):
        self.radio.stop()
        self.radio.arm(False)

    def _cut(self, now: float, reason: str) -> None:
        self._enter('cut')
        self._stop_arming()
        self._motion, self._go_to, self._guard_held_since = None, 'idle', None
        self._cut_since, self.reason = now, reason
        self.answer = Answer('cut', reason)
        self.radio.emergency_stop()

    # --- judgements -------------------------------------------------------------------------------

    def _pose_age(self, now: float) -> float:
        return now - self._pose_seen

    def _engage_refusal(self, now: float) -> str:
        s = self.settings
        if self._go_to == 'active':
            return 'engage is refused while a go_to is active'
        if self._pose_age(now) >= s.pose_warn:
            return f'no fresh mocap pose: {self._pose_age(now):.2f} s old (limit {s.pose_warn} s)'
        age = now - self._plan_received
        if age >= s.plan_warn:
            because = f' ({self._plan_fault})' if self._plan_fault else ''
            return f'no fresh plan: {age:.2f} s old (limit {s.plan_warn} s){because}'
        first = setpoint_at(self._plan, now + s.look_ahead)
        fault = setpoint_fault(first)
        if fault:
            return fault
        if guard.outside(first.position, s.fence_low, s.fence_high) > 0.0:
            return f'the plan begins at {np.round(first.position, 2).tolist()} m, outside the fence'
        jump = float(np.linalg.norm(first.position - self._pose[1]))
        if jump > s.engage_jump:
            return f'the plan begins {jump:.2f} m from the drone (limit {s.engage_jump} m)'
        return ''

    def preflight(self, now: float) -> tuple[preflight.Check, ...]:
        """The table of checks that arming and take-off ask for."""
        arrivals, latencies = self._pose_window.since(now - self.settings.preflight_time)
        _, position, quaternion = self._pose or (None, None, None)
        heard = {node: preflight.Heard(status, came, came - self.stamps.steady(status.stamp, came))
                 for node, (came, status) in self.heard.items()}
        return preflight.checks(preflight.Known(
            now=now, phase=self.phase, telemetry=self.radio.telemetry(), position=position, quaternion=quaternion,
            pose_age=self._pose_age(now), pose_fault=self._pose_fault, arrivals=arrivals, latencies=latencies,
            plan_age=now - self._plan_received, plan_fault=self._plan_fault,
            obstacles=self._spheres(now) if self._spheres_heard else None, heard=heard,
            clock_difference=self._clock_difference,
            clock_step=self.stamps.last_step if self.stamps.settling(now) else 0.0), self.settings, self._body)

    def try_preflight(self, now: float) -> Result:
        """Whether the drone may be armed, or every failed check with its value, limit and remedy.

        An onboard estimate that disagrees with mocap is also reset, so that a second try may pass.
        """
        table = self.preflight(now)
        astray = any(c.refuses and c.name.startswith('estimate_') for c in table)
        if (astray and self.phase == 'disarmed' and self._pose_age(now) < self.settings.pose_warn
                and now - self._estimator_reset >= ESTIMATOR_SETTLES):
            self._estimator_reset = now
            self.radio.reset_estimator()
        refusal = preflight.refusal(table)
        return Result(not refusal, refusal or 'ready')

    # --- status -----------------------------------------------------------------------------------

    def status(self, now: float) -> dict:
        """Values of interface.FLIGHT_KEYS."""
        telemetry = self.radio.telemetry()
        link = telemetry.link_statistics
        return dict(zip(interface.FLIGHT_KEYS, (
            self.phase, self.answer.answer, self.reason, telemetry.battery_v, telemetry.link_quality,
            telemetry.supervisor, self._go_to, link.uplink_hz, link.downlink_hz, link.uplink_use,
            link.downlink_use, link.retries, link.rssi_dbm,
            None if link.latency is None else 1000.0 * link.latency, link.pings_lost, link.reconnects), strict=True))

    def health(self, now: float) -> tuple[int, str]:
        """Diagnostic level and the sentence beside it."""
        s, telemetry = self.settings, self.radio.telemetry()
        if self.phase == 'emergency':
            return interface.ERROR, self.reason
        warnings = [self.reason] if self.reason else []
        if telemetry.link != 'up':
            warnings.append(f'radio link is {telemetry.link}{": " + telemetry.fault if telemetry.fault else ""}')
        if telemetry.battery_v is not None and telemetry.battery_v < s.battery_warn:
            warnings.append(f'battery {telemetry.battery_v:.2f} V, below {s.battery_warn} V')
        if self._pose_age(now) >= s.pose_warn:
            warnings.append(f'no mocap pose for {self._pose_age(now):.2f} s')
        if self.phase == 'following' and now - self._plan_received >= s.plan_warn:
            warnings.append(f'no plan for {now - self._plan_received:.2f} s')
        if self._pose_fault or self._odometry_fault:
            warnings.append(self._pose_fault or self._odometry_fault)
        if self.stamps.settling(now):
            warnings.append(f'the system clock was set by {self.stamps.last_step:+.3f} s')
        if self._recorder_fault(now):
            warnings.append(self._recorder_fault(now))
        return (interface.WARN, '; '.join(warnings)) if warnings else (interface.OK, self.phase)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle (rad) between two attitudes."""
    return 2.0 * float(np.arccos(min(1.0, abs(a @ b))))
