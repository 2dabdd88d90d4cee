"""The trial protocol as a state machine, without ROS and without a clock of its own.

    preflight -> arming -> taking_off -> to_start -> settling -> engaging -> following
              -> disengaging -> landing -> (disarming) -> done

A driver (the ROS node, or an in-process loop with simulated time) calls `step(now, seen)` about ten
times a second or more, carries out the action that it returns, and passes each service's answer to
`reply`. Calls that are refused are repeated every `retry` seconds until the stage's time is over, since
an interface refuses arming or engaging while its own checks are not yet content.

Any failure ends in the mildest thing that is right in the phase the drone is in: nothing when disarmed,
disarm when armed, land when flying. The motors are cut only when landing has taken too long and the
drone already is on the ground: high up, a conductor that does not understand what is going on must not
drop the drone; the setpoint guard beside the radio cuts when that is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deqmpc.types import Obstacles, RigidBodyState
from deqmpc_ros.settings import parameter


@dataclass(frozen=True)
class TrialSettings:
    """Start, length and patience of a trial. The fields are the parameters of node `trial`."""

    start: str = parameter('random', '"random", or "x y z yaw" (m, rad; world)')
    seed: int = parameter(0, 'Seed of a random start', 0, 2**31 - 1)
    goal: list[float] = parameter([0.0, 0.0, 1.0, 0.0], 'x, y, z (m, world), yaw (rad) of the policy\'s goal',
                                  -100.0, 100.0)
    max_steps: int = parameter(200, 'Policy ticks of a trial', 1, 100_000)
    rate: float = parameter(10.0, 'Policy ticks per second, for the time limit of following (Hz)', 0.1, 1000.0)
    require_obstacles: bool = parameter(True, 'Wait for a message on /obstacles; false flies without one')
    volume_low: list[float] = parameter([-1.5, -1.5, 0.5], 'Lower corner of random starts (m, world)', -100.0, 100.0)
    volume_high: list[float] = parameter([1.5, 1.5, 1.6], 'Upper corner of random starts (m, world)', -100.0, 100.0)
    start_clearance: float = parameter(0.3, 'Random start: least clearance of the spheres (m)', 0.0, 10.0)
    start_distance: float = parameter(1.0, 'Random start: least distance to the goal (m)', 0.0, 100.0)
    engage_clearance: float = parameter(0.1, 'Least clearance of the spheres when engaging (m)', 0.0, 10.0)
    settle_radius: float = parameter(0.10, 'At the start when closer than this (m)', 0.001, 2.0)
    settle_speed: float = parameter(0.05, 'Settled when slower than this on average over settle_time (m/s); the speed '
                                    'of a moment is mostly noise of the mocap', 0.001, 5.0)
    settle_time: float = parameter(1.0, 'Settled after this long at the start (s)', 0.0, 60.0)
    fresh: float = parameter(0.5, 'Pose and plan younger than this are fresh (s)', 0.01, 10.0)
    status_lost: float = parameter(2.0, 'Without a status for this long the trial is aborted (s)', 0.1, 60.0)
    preflight_timeout: float = parameter(60.0, 'Time for everything needed to come (s)', 0.1, 3600.0)
    arm_timeout: float = parameter(20.0, 'Time until armed, repeating the call (s)', 0.1, 600.0)
    takeoff_timeout: float = parameter(15.0, 'Time until hovering after take-off (s)', 0.1, 600.0)
    start_timeout: float = parameter(30.0, 'Time to fly to the start and settle there (s)', 0.1, 600.0)
    engage_timeout: float = parameter(10.0, 'Time until the drone follows the policy (s)', 0.1, 600.0)
    follow_slack: float = parameter(10.0, 'Time beyond max_steps / rate for following (s)', 0.1, 600.0)
    disengage_timeout: float = parameter(3.0, 'Time until holding; else land from following (s)', 0.1, 600.0)
    land_timeout: float = parameter(20.0, 'Time until landed and disarmed (s)', 0.1, 600.0)
    grounded: float = parameter(0.15, 'Lower than this, a landing that hangs ends in emergency (m)', 0.0, 1.0)
    retry: float = parameter(1.0, 'Time between two calls of a refused service (s)', 0.05, 60.0)

    def __post_init__(self):
        for name, length in (('goal', 4), ('volume_low', 3), ('volume_high', 3)):
            if len(getattr(self, name)) != length or not np.isfinite(getattr(self, name)).all():
                raise ValueError(f'{name} = {getattr(self, name)}; expected {length} finite numbers')
        if not np.all(np.array(self.volume_low) < np.array(self.volume_high)):
            raise ValueError(f'volume_low {self.volume_low} must be below volume_high {self.volume_high}')
        parse_start(self.start)


@dataclass(frozen=True)
class StartPose:
    """Where the policy takes over."""

    position: np.ndarray  # (3,) m, world
    yaw: float  # rad


def parse_start(text: str) -> StartPose | None:
    """'x y z yaw' -> the pose, 'random' -> None. ValueError names the text."""
    if text.strip() == 'random':
        return None
    try:
        x, y, z, yaw = map(float, text.replace(',', ' ').split())
    except ValueError:
        raise ValueError(f'start = {text!r}; expected "random" or four numbers "x y z yaw"') from None
    if not np.isfinite([x, y, z, yaw]).all():
        raise ValueError(f'start = {text!r}; expected finite numbers')
    return StartPose(np.array([x, y, z]), yaw)


def draw_start(seed: int, obstacles: Obstacles, settings: TrialSettings) -> StartPose:
    """A start drawn from `seed` in the volume, clear of `obstacles` and away from the goal, yaw 0 as the
    goal's. ValueError when 10,000 draws find none."""
    rng = np.random.default_rng(seed)
    goal = np.array(settings.goal[:3])
    for _ in range(10_000):
        p = rng.uniform(settings.volume_low, settings.volume_high)
        if (np.linalg.norm(p - goal) >= settings.start_distance
                and obstacles.clearance(p)[0] >= settings.start_clearance):
            return StartPose(p, 0.0)
    raise ValueError(f'no start within {settings.volume_low} to {settings.volume_high} is '
                     f'{settings.start_clearance} m clear of {len(obstacles.radius)} spheres and '
                     f'{settings.start_distance} m from the goal')


# --- what goes in and out -----------------------------------------------------------------------

@dataclass(frozen=True)
class Seen:
    """What the driver knows now. Ages in s, inf when nothing came yet."""

    phase: str = ''  # one of interface.PHASES, '' before the first status
    reason: str = ''  # of the guard
    go_to: str = ''  # idle | active | done
    status_age: float = math.inf
    pose_age: float = math.inf
    plan_age: float = math.inf
    position: np.ndarray | None = None  # (3,) m, world, estimate
    speed: float = 0.0  # m/s
    tick: int | None = None  # count of policy ticks since the policy's start
    obstacles: Obstacles | None = None  # None before the first message

    @classmethod
    def at(cls, now: float, flight: Mapping[str, str], came: Mapping[str, float], state: RigidBodyState | None,
           tick: int | None, obstacles: Obstacles | None) -> Seen:
        """From the values of the newest flight status, the instants (s) in `came` at which status, odom and plan
        came last (-inf: never), and the newest state, tick and obstacles."""
        return cls(
            phase=flight.get('phase', ''), reason=flight.get('reason', ''), go_to=flight.get('go_to', ''),
            status_age=now - came['status'], pose_age=now - came['odom'], plan_age=now - came['plan'],
            position=None if state is None else state.position,
            speed=math.nan if state is None else float(np.linalg.norm(state.velocity)),
            tick=tick, obstacles=obstacles)


@dataclass(frozen=True)
class Call:
    """Call the service `name` of interface.SERVICES; `value` is for arm (SetBool)."""

    name: str
    value: bool = True


@dataclass(frozen=True)
class GoTo:
    """Publish this pose on interface.GO_TO."""

    pose: StartPose


@dataclass(frozen=True)
class Done:
    """The trial is over; nothing more to do."""

    success: bool
    reason: str  # '' on success
    steps: int  # policy ticks flown
    start: StartPose | None
    distance: float  # m to the goal when following ended; NaN when it never began


Action = Call | GoTo | Done

_FLYING = ('taking_off', 'holding', 'following', 'landing')


class TrialConductor:
    """One trial. Attributes to read: `stage`, `steps`, `start`, `failure`, `done` (Done or None)."""

    def __init__(self, settings: TrialSettings):
        self.settings = settings
        self.stage = 'preflight'
        self.start = parse_start(settings.start)
        self.steps = 0
        self.failure = ''
        self.done: Done | None = None
        self._goal = np.array(settings.goal[:3])
        self._entered: float | None = None  # when the stage began
        self._asked: float | None = None  # when its action was last sent
        self._pending = ''  # service without an answer yet
        self._refusal = ''  # last answer that was a refusal
        self._arrived: tuple[float, np.ndarray] | None = None  # since when the drone has been at the start, and where
        self._first_tick: int | None = None
        self._distance = math.nan
        self._second_landing = False
        self._lines: list[str] = []

    def take_lines(self) -> list[str]:
        """Progress in words since the last call, one line a step of the protocol."""
        lines, self._lines = self._lines, []
        return lines

    def reply(self, service: str, ok: bool, message: str) -> None:
        """The answer of a service that was called."""
        if service == self._pending:
            self._pending = ''
        before, self._refusal = self._refusal, '' if ok else f'{service} refused: {message}'
        if self._refusal not in ('', before):  # a refusal that repeats is told once
            self._lines.append(self._refusal)

    def abort(self, reason: str, now: float, seen: Seen) -> None:
        """End the trial from outside (an operator); it still lands."""
        self._fail(reason, now, seen)

    def step(self, now: float, seen: Seen) -> Action | None:
        """The next action, or None to wait. After `Done` it keeps returning it."""
        if self.done is not None:
            return self.done
        if self._entered is None:
            self._enter('preflight', now, 'waiting for status, pose, plan and obstacles')
        if self._flying_blind(seen):
            self._fail(f'no status for {seen.status_age:.1f} s', now, seen)
        elif seen.phase == 'emergency' and self.stage != 'preflight':
            self._fail(f'emergency: motors cut{f" ({seen.reason})" if seen.reason else ""}', now, seen)
        return self.done or getattr(self, f'_{self.stage}')(now, seen)

    # --- stages on the way ---

    def _preflight(self, now: float, seen: Seen) -> Action | None:
        s = self.settings
        missing = [f'no {what}' for what, ok in (
            ('status', seen.status_age < s.status_lost), ('pose', seen.pose_age < s.fresh),
            ('plan', seen.plan_age < s.fresh), ('policy diagnostics', seen.tick is not None),
            ('obstacles', seen.obstacles is not None or not s.require_obstacles)) if not ok]
        if not missing and seen.phase not in ('disarmed', 'armed', 'holding'):
            missing = [f'phase {seen.phase}, expected disarmed, armed or holding']
        if missing:
            return self._late(now, seen, s.preflight_timeout, ', '.join(missing))
        spheres = seen.obstacles or Obstacles.none()
        try:
            self.start = self.start or draw_start(s.seed, spheres, s)
        except ValueError as error:
            self._fail(str(error), now, seen)
            return self.step(now, seen)
        clearance, sphere = spheres.clearance(self.start.position)
        where = f'start {np.round(self.start.position, 2).tolist()} m'
        if clearance < s.engage_clearance and not spheres.velocity.any():
            self._fail(f'{where} is {clearance:.2f} m from sphere {sphere}; expected at least '
                       f'{s.engage_clearance} m (engage_clearance)', now, seen)
            return self.step(now, seen)
        self._say(f'{where}, yaw {self.start.yaw:.2f} rad, {len(spheres.radius)} spheres')
        return self._enter('arming', now, 'arming')

    def _arming(self, now: float, seen: Seen) -> Action | None:
        if seen.phase in ('armed', 'holding'):
            return self._enter('taking_off', now, 'taking off')
        return self._ask(Call('arm', True), now, seen, self.settings.arm_timeout)

    def _taking_off(self, now: float, seen: Seen) -> Action | None:
        if seen.phase == 'holding':
            return self._enter('to_start', now, 'flying to the start')
        if seen.phase == 'taking_off':
            return self._late(now, seen, self.settings.takeoff_timeout, 'still taking off')
        if seen.phase != 'armed':
            return self._lost(now, seen)
        return self._ask(Call('takeoff'), now, seen, self.settings.takeoff_timeout)

    def _to_start(self, now: float, seen: Seen) -> Action | None:
        if seen.phase != 'holding':
            return self._lost(now, seen)
        if self._at_start(seen):
            return self._enter('settling', now, 'settling')
        if seen.go_to != 'active' and self._may_ask(now):
            self._asked = now
            return GoTo(self.start)
        where = np.round(seen.position, 2).tolist() if seen.position is not None else 'unknown'
        return self._late(now, seen, self.settings.start_timeout, f'not at the start, but at {where}')

    def _settling(self, now: float, seen: Seen) -> Action | None:
        if seen.phase != 'holding':
            return self._lost(now, seen)
        s = self.settings
        # An interface refuses to engage while its own motion is not over.
        if not self._at_start(seen) or seen.go_to == 'active':
            self._arrived = None
        elif self._arrived is None or (
                np.linalg.norm(seen.position - self._arrived[1]) > s.settle_speed * s.settle_time):
            self._arrived = now, np.array(seen.position)
        if self._arrived is not None and now - self._arrived[0] >= s.settle_time:
            clearance = self._clearance(now, seen)
            if seen.plan_age < s.fresh and clearance >= s.engage_clearance:
                return self._enter('engaging', now, 'engaging')
            state = f'clearance {clearance:.2f} m, plan {seen.plan_age:.1f} s old'
            return self._late(now, seen, s.start_timeout, state)
        return self._late(now, seen, s.start_timeout, f'not settled ({seen.speed:.2f} m/s)')

    def _engaging(self, now: float, seen: Seen) -> Action | None:
        if seen.phase == 'following':
            return self._enter('following', now, f'following the policy for {self.settings.max_steps} steps')
        if seen.phase != 'holding':
            return self._lost(now, seen)
        return self._ask(Call('engage'), now, seen, self.settings.engage_timeout)

    def _following(self, now: float, seen: Seen) -> Action | None:
        s = self.settings
        if seen.position is not None:
            self._distance = float(np.linalg.norm(seen.position - self._goal))
        if seen.phase != 'following':
            return self._lost(now, seen)
        if seen.tick is not None:
            if self._first_tick is None:
                self._first_tick = seen.tick
            if seen.tick - self._first_tick < self.steps:
                self._fail('the policy restarted: its tick count fell', now, seen)
                return self.step(now, seen)
            before, self.steps = self.steps, min(seen.tick - self._first_tick, s.max_steps)
            if self.steps // 50 > before // 50:
                self._say(f'step {self.steps} of {s.max_steps}: {self._distance:.2f} m to the goal, '
                               f'clearance {self._clearance(now, seen):.2f} m')
        clearance, sphere = self._nearest(now, seen)
        if clearance < 0.0:
            self._fail(f'collision with sphere {sphere} at step {self.steps}', now, seen)
            return self.step(now, seen)
        if self.steps >= s.max_steps:
            line = f'{self.steps} steps flown, {self._distance:.3f} m to the goal'
            return self._enter('disengaging', now, line)
        return self._late(now, seen, s.max_steps / s.rate + s.follow_slack, f'only {self.steps} policy ticks')

    # --- stages on the way down ---

    def _disengaging(self, now: float, seen: Seen) -> Action | None:
        if seen.phase != 'following':
            return self._enter('landing', now, 'landing')
        if self._over(now, self.settings.disengage_timeout):
            line = f'still following ({self._refusal or "no answer"}): landing from there'
            return self._enter('landing', now, line)
        return self._ask(Call('disengage'), now, seen)

    def _landing(self, now: float, seen: Seen) -> Action | None:
        if seen.phase == 'disarmed':
            return self._finish(now)
        if seen.phase == 'armed':
            return self._enter('disarming', now, 'disarming')
        if self._over(now, self.settings.land_timeout):
            return self._landing_hangs(now, seen)
        return None if seen.phase == 'landing' else self._ask(Call('land'), now, seen)

    def _landing_hangs(self, now, seen):
        took = f'not landed after {self.settings.land_timeout:g} s'
        known = seen.position is not None and seen.pose_age < self.settings.fresh
        if known and seen.position[2] < self.settings.grounded:
            self.failure = self.failure or took
            return self._enter('cutting', now, f'{took}, but on the ground: cutting the motors')
        if not self._second_landing:
            self._second_landing = True
            self.failure = self.failure or took
            self._enter('landing', now, f'{took}: calling land again')
            return self._ask(Call('land'), now, seen)
        self.failure += f'; {took}, phase {seen.phase or "unknown"}: TAKE OVER BY HAND'
        return self._finish(now)

    def _cutting(self, now: float, seen: Seen) -> Action | None:
        if seen.phase == 'disarmed' or self._over(now, self.settings.land_timeout):
            return self._finish(now)
        return self._ask(Call('emergency'), now, seen)

    def _disarming(self, now: float, seen: Seen) -> Action | None:
        if seen.phase == 'disarmed':
            return self._finish(now)
        if self._over(now, self.settings.land_timeout):
            self.failure = self.failure or f'not disarmed ({self._refusal or "no answer"})'
            return self._finish(now)
        return self._ask(Call('arm', False), now, seen)

    def _finish(self, now: float) -> Done:
        self.done = Done(not self.failure, self.failure, self.steps, self.start, self._distance)
        self._say('trial succeeded' if not self.failure else f'trial failed: {self.failure}')
        self.stage = 'finished'
        return self.done

    # --- helpers ---

    def _enter(self, stage: str, now: float, line: str) -> None:
        self.stage, self._entered = stage, now
        self._asked, self._pending, self._refusal, self._arrived = None, '', '', None
        self._say(line)

    def _say(self, line: str) -> None:
        self._lines.append(line)

    def _fail(self, reason: str, now: float, seen: Seen) -> None:
        """Note the first failure and turn to what is right in the drone's phase."""
        first = not self.failure
        if first:
            self.failure = reason
            self._lines.append(f'aborting: {reason}')
        if seen.phase == 'emergency':
            self._finish(now)
        elif not first or self.stage in ('disengaging', 'landing', 'cutting', 'disarming'):
            return  # already on the way down; a second failure must not restart the landing's clock
        elif seen.phase == 'following':
            self._enter('disengaging', now, 'disengaging')
        elif seen.phase in _FLYING:
            self._enter('landing', now, 'landing')
        elif seen.phase == 'armed':
            self._enter('disarming', now, 'disarming')
        else:
            self._finish(now)

    def _lost(self, now: float, seen: Seen) -> Action | None:
        """The drone left the phase this stage needs, without being asked to."""
        why = f': {seen.reason}' if seen.reason else ''
        step = f' at step {self.steps} of {self.settings.max_steps}' if self.stage == 'following' else ''
        self._fail(f'{self.stage} ended by phase {seen.phase}{step}{why}', now, seen)
        return self.step(now, seen)

    def _late(self, now: float, seen: Seen, limit: float, state: str) -> Action | None:
        """Wait, but fail when the stage has lasted longer than `limit`."""
        if not self._over(now, limit):
            return None
        self._fail(f'{self.stage} not done after {limit:g} s: {state}', now, seen)
        return self.step(now, seen)

    def _ask(self, action: Call, now: float, seen: Seen, limit: float = math.inf) -> Action | None:
        if self._over(now, limit):
            state = self._refusal or f'no answer from {action.name}, phase {seen.phase}'
            return self._late(now, seen, limit, state)
        if not self._may_ask(now):
            return None
        self._asked, self._pending = now, action.name
        return action

    def _may_ask(self, now: float) -> bool:
        return self._asked is None or now - self._asked >= self.settings.retry

    def _over(self, now: float, limit: float) -> bool:
        return now - self._entered > limit

    def _flying_blind(self, seen: Seen) -> bool:
        return self.stage != 'preflight' and seen.status_age > self.settings.status_lost

    def _at_start(self, seen: Seen) -> bool:
        return (seen.position is not None and seen.pose_age < self.settings.fresh
                and float(np.linalg.norm(seen.position - self.start.position)) <= self.settings.settle_radius)

    def _nearest(self, now: float, seen: Seen) -> tuple[float, int]:
        if seen.position is None or seen.obstacles is None:
            return math.inf, -1
        return seen.obstacles.at(now).clearance(seen.position)

    def _clearance(self, now: float, seen: Seen) -> float:
        return self._nearest(now, seen)[0]
