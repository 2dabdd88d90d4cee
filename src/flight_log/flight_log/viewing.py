"""The stack's messages as entities of a rerun recording, the same from a bag and from a running graph. ROS-free.

| entity | what it shows | from |
|---|---|---|
| world/<robot> | pose and body axes; the box takes the colour of the status | pose, or odom where no pose comes |
| world/flown/<robot> | flown path, one piece for each `PATH_STEP` | the same |
| world/plan/<robot> | plan horizon and its knots, gone when no new plan came for `PLAN_SILENCE` | plan |
| world/setpoint/<robot> | what was sent on the radio last | setpoint |
| world/obstacles | the spheres, where they are now | /obstacles |
| state/<robot>/phase, guard, plan | states over time; plan is accepted or refused by the gate | status, /diagnostics |
| log/... | each change of phase, guard, reason, gate, of any node's level; silences; unreadable messages | all |
| battery_v/<robot> | V | status |
| solver/time_ms/<robot>/solve, tick, latency | ms | /diagnostics |
| solver/iterations/<robot>, solver/residual_log10/<robot>, solver/deadline_misses/<robot> | | /diagnostics |

Timelines: `time`, s since the first message, and `clock`, the ROS clock. Both are when a message was received
(of a bag: its log time), so that messages of nodes with different clocks stand in one order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from deqmpc import interface
from flight_log.bag import BagError, deserialize, opened

OF_ROBOT = (interface.POSE, interface.ODOM, interface.PLAN, interface.SETPOINT, interface.STATUS)
OF_ALL = (interface.OBSTACLES, interface.DIAGNOSTICS)

FRAME = 0.03  # s between two drawings of what comes faster than a screen shows: poses and setpoints
FAST = (interface.POSE, interface.ODOM, interface.SETPOINT)
PATH_STEP = 0.02  # m between two points of the flown path
PLAN_SILENCE = 0.5  # s, five ticks at 10 Hz: then the drawn plan is nobody's plan any more
SILENCES = {interface.POSE: 0.5, interface.STATUS: 1.0}  # s without a message that the log mentions
BODY = (0.046, 0.046, 0.0145)  # m, half of a Crazyflie 2.1's 92 x 92 x 29 mm (Bitcraze datasheet)
AXES = 0.12  # m, length of the body axes

_LEVELS = {interface.OK: 'INFO', interface.WARN: 'WARN', interface.ERROR: 'ERROR', interface.STALE: 'WARN'}
_COLORS = {interface.OK: (60, 200, 80), interface.WARN: (255, 180, 0), interface.ERROR: (255, 60, 60),
           interface.STALE: (150, 150, 150)}
_PATHS = ((90, 160, 255), (255, 140, 200), (160, 230, 120), (250, 200, 90))  # of the first robot, the second ...
_PLAN, _SETPOINT, _SPHERE = (80, 240, 160), (255, 255, 255), (200, 80, 60)
_STATES = {
    'phase': dict(zip(interface.PHASES, (
        (110, 110, 110), (200, 170, 60), (90, 140, 220), (80, 180, 200), (60, 200, 80), (150, 110, 220),
        (255, 60, 60)), strict=True)),
    'guard': {'idle': (110, 110, 110), 'follow': (60, 200, 80), 'hold': (255, 180, 0), 'land': (255, 120, 0),
              'cut': (255, 60, 60)},
    'plan': {'accepted': (60, 200, 80), 'refused': (255, 180, 0)},
}
_SOLVER = {'solve_ms': 'time_ms/{}/solve', 'tick_ms': 'time_ms/{}/tick', 'latency_ms': 'time_ms/{}/latency',
           'iterations': 'iterations/{}', 'deadline_misses': 'deadline_misses/{}'}


@dataclass
class _Robot:
    """What is remembered of one robot from message to message."""

    color: tuple[int, int, int]
    heard: dict[interface.Topic, float] = field(default_factory=dict)  # s, the last message of a topic
    drawn: dict[interface.Topic, float] = field(default_factory=dict)  # s, the last one drawn of FAST
    corner: np.ndarray | None = None  # (3,) m, the flown path's last point
    plan_drawn: bool = False


class Scene:
    """Draws messages into a recording.

    recording: where to; it may be connected to a viewer or a file before or after. path_seconds: how much of the
    flown path is shown, all when None. follow: the viewer's time follows the newest message.
    """

    def __init__(self, recording: rr.RecordingStream, path_seconds: float | None = None, follow: bool = False):
        self.recording = recording
        self.robots: dict[str, _Robot] = {}
        self._path_seconds, self._follow = path_seconds, follow
        self._first: float | None = None
        self._said: dict[str, object] = {}  # what was written last, by entity
        recording.set_log_time_enabled(False)
        recording.set_log_tick_enabled(False)
        recording.log('world', rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)

    @property
    def started(self) -> bool:
        """True once there was a message."""
        return self._first is not None

    def add(self, robot: str) -> None:
        """Show `robot` from now on."""
        self.robots[robot] = _Robot(_PATHS[len(self.robots) % len(_PATHS)])
        # Without a colour: one that is static would hide every later one.
        shape = rr.Boxes3D(half_sizes=[BODY], fill_mode='solid', labels=[robot])
        self.recording.log(f'world/{robot}/body', shape, static=True)
        self.recording.log(f'world/{robot}', rr.TransformAxes3D(AXES), static=True)
        for name, colors in _STATES.items():
            self.recording.log(f'state/{robot}/{name}', rr.StateConfiguration(
                values=list(colors), labels=list(colors), colors=list(colors.values())), static=True)
        self.recording.send_blueprint(blueprint(self.robots, self._path_seconds, self._follow))

    def due(self, topic: interface.Topic, robot: str, time: float) -> bool:
        """Take note that a message came at `time` (s); True when it is to be decoded and shown. Not shown: what is
        too soon after the last one (`FRAME`), and odometry where poses come. `robot`: whose topic, of those added;
        of a topic of all it is not read."""
        if topic not in OF_ROBOT:
            return True
        of = self.robots[robot]
        of.heard[topic] = time
        if topic is interface.ODOM and interface.POSE in of.heard:
            return False
        # Half a mocap period earlier will do: every third pose of 100 Hz, in spite of jitter.
        if topic in FAST and 0.0 <= time - of.drawn.get(topic, -math.inf) < FRAME - 0.005:
            return False
        of.drawn[topic] = time
        return True

    def show(self, topic: interface.Topic, robot: str, message, time: float) -> None:
        """Draw one message that was `due` at `time` (s). One that cannot be read is a line in the log."""
        self.advance(time)
        try:
            _DRAW[topic](self, robot, message)
        except ValueError as error:
            self._say(f'log/{topic.resolve(robot).strip("/")}', f'unreadable: {error}', interface.ERROR)

    def advance(self, time: float) -> None:
        """Move on to `time` (s): take away a plan that was not renewed, say who has fallen silent."""
        if self._first is None:
            self._first = time
        self.recording.set_time('time', duration=time - self._first)
        self.recording.set_time('clock', timestamp=time)
        for name, robot in self.robots.items():
            if robot.plan_drawn and time - robot.heard[interface.PLAN] > PLAN_SILENCE:
                robot.plan_drawn = False
                self.recording.log(f'world/plan/{name}', rr.Clear(recursive=False))
            for topic, limit in SILENCES.items():
                silent = time - robot.heard.get(topic, time) > limit
                entity = f'log/{name}/{topic.name}/silence'
                if silent or entity in self._said:
                    self._say(entity, f'no {topic.name} for {limit:g} s' if silent else f'{topic.name} again',
                              interface.ERROR if silent else interface.OK)

    def _say(self, entity: str, text: str, level: int) -> None:
        """A line in the log, unless it is the last one again."""
        if self._changed(entity, (text, level)):
            self.recording.log(entity, rr.TextLog(text, level=_LEVELS.get(level, 'WARN')))

    def _changed(self, entity: str, value: object) -> bool:
        changed = self._said.get(entity) != value
        self._said[entity] = value
        return changed

    def _state(self, entity: str, value: str) -> None:
        if self._changed(entity, value):
            self.recording.log(entity, rr.StateChange(state=value))

    def _scalar(self, entity: str, value: float) -> None:
        if math.isfinite(value):
            self.recording.log(entity, rr.Scalars(value))

    def _pose(self, name, message) -> None:
        _, position, quaternion = interface.read_pose(message)
        self._place(name, position, quaternion)

    def _odometry(self, name, message) -> None:
        state = interface.read_odometry(message)
        self._place(name, state.position, state.quaternion)

    def _place(self, name, position, quaternion) -> None:
        if not (np.isfinite(position).all() and np.isfinite(quaternion).all() and np.any(quaternion)):
            raise ValueError(f'position {position}, quaternion {quaternion}; expected finite numbers')
        robot = self.robots[name]
        self.recording.log(f'world/{name}', rr.Transform3D(
            translation=position, quaternion=rr.Quaternion(xyzw=quaternion)))
        if robot.corner is None:
            robot.corner = position
        elif np.linalg.norm(position - robot.corner) >= PATH_STEP:
            self.recording.log(f'world/flown/{name}', rr.LineStrips3D(
                [[robot.corner, position]], colors=[robot.color], radii=[0.004]))
            robot.corner = position

    def _plan(self, name, message) -> None:
        plan = interface.read_plan(message)
        self.robots[name].plan_drawn = True
        self.recording.log(f'world/plan/{name}', rr.LineStrips3D([plan.position], colors=[_PLAN], radii=[0.006]),
                           rr.Points3D(plan.position, colors=[_PLAN], radii=[0.012]))

    def _setpoint(self, name, message) -> None:
        position = interface.read_plan(message).position[:1]
        self.recording.log(f'world/setpoint/{name}', rr.Points3D(position, colors=[_SETPOINT], radii=[0.015]))

    def _obstacles(self, _, message) -> None:
        spheres = interface.read_obstacles(message)
        self.recording.log('world/obstacles', rr.Points3D(spheres.position, radii=spheres.radius, colors=[_SPHERE]))

    def _diagnostics(self, _, message) -> None:
        for status in interface.read_diagnostics(message):
            robot, _, rest = status.name.partition('/')
            if rest and robot not in self.robots:
                continue
            if rest == 'flight':
                self._flight(robot, status)
            elif rest == 'policy':
                self._policy(robot, status)
            elif self._changed(f'level/{status.name}', status.level) or status.level != interface.OK:
                self._say(f'log/{status.name}', status.message or '-', status.level)

    def _flight(self, robot: str, status: interface.Diagnostic) -> None:
        phase, guard, reason = (status.values.get(k, '') for k in ('phase', 'guard', 'reason'))
        self._state(f'state/{robot}/phase', phase)
        self._state(f'state/{robot}/guard', guard)
        self._say(f'log/{robot}/flight', f'{phase} ({guard})' + (f': {reason}' if reason else ''), status.level)
        self._scalar(f'battery_v/{robot}', _number(status.values.get('battery_v')))
        if self._changed(f'world/{robot}/body', status.level):
            color = _COLORS.get(status.level, _COLORS[interface.STALE])
            self.recording.log(f'world/{robot}/body', rr.Boxes3D.from_fields(colors=[color]))

    def _policy(self, robot: str, status: interface.Diagnostic) -> None:
        for key, entity in _SOLVER.items():
            self._scalar('solver/' + entity.format(robot), _number(status.values.get(key)))
        residual = _number(status.values.get('residual'))
        if residual > 0.0:
            self._scalar(f'solver/residual_log10/{robot}', math.log10(residual))
        gate, solver = status.values.get('gate', ''), status.values.get('status', '')
        accepted = gate == 'accepted'
        self._state(f'state/{robot}/plan', 'accepted' if accepted else 'refused')
        self._say(f'log/{robot}/policy', f'{status.values.get("policy", "policy")}: plan {gate or "missing"}'
                  + (f', solver: {solver}' if solver else '') + (f'; {status.message}' if status.message else ''),
                  status.level if accepted else max(status.level, interface.WARN))


_DRAW = {interface.POSE: Scene._pose, interface.ODOM: Scene._odometry, interface.PLAN: Scene._plan,
         interface.SETPOINT: Scene._setpoint, interface.OBSTACLES: Scene._obstacles,
         interface.STATUS: Scene._diagnostics, interface.DIAGNOSTICS: Scene._diagnostics}


def _number(text: str | None) -> float:
    """NaN where `text` is no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def blueprint(robots: Iterable[str], path_seconds: float | None = None, follow: bool = False) -> rrb.Blueprint:
    """The layout: the scene over states and log, battery and solver beside them."""
    since = (rrb.TimeRangeBoundary.infinite() if path_seconds is None
             else rrb.TimeRangeBoundary.cursor_relative(seconds=-path_seconds))
    shown = rrb.VisibleTimeRanges(timeline='time', start=since, end=rrb.TimeRangeBoundary.cursor_relative())
    scene = rrb.Spatial3DView(
        origin='/world', name='Scene', overrides={f'/world/flown/{robot}': shown for robot in robots},
        eye_controls=rrb.EyeControls3D(position=(3.0, -3.0, 2.8), look_target=(0.0, 0.0, 0.8), eye_up=(0.0, 0.0, 1.0)))
    series = [rrb.TimeSeriesView(origin=f'/{origin}', name=name) for origin, name in (
        ('solver/time_ms', 'Solve, tick, latency (ms)'), ('solver/iterations', 'Iterations'),
        ('solver/residual_log10', 'log10 of the residual'), ('solver/deadline_misses', 'Deadline misses'),
        ('battery_v', 'Battery (V)'))]
    return rrb.Blueprint(
        rrb.Horizontal(
            rrb.Vertical(scene, rrb.Horizontal(
                rrb.StateTimelineView(origin='/state', name='Phase, guard, plan'),
                rrb.TextLogView(origin='/log', name='Log'), column_shares=[1, 1]), row_shares=[5, 2]),
            rrb.Vertical(*series), column_shares=[2, 1]),
        rrb.TimePanel(state='collapsed', timeline='time', play_state='following' if follow else 'playing'),
        rrb.BlueprintPanel(state='collapsed'), rrb.SelectionPanel(state='collapsed'), auto_views=False)


def robots_in(topics: Iterable[str]) -> list[str]:
    """The robots whose topics are among `topics`, sorted."""
    known = {t.name for t in OF_ROBOT}
    parts = [name.strip('/').split('/') for name in topics]
    return sorted({p[0] for p in parts if len(p) == 2 and p[1] in known})


@dataclass(frozen=True)
class Shown:
    """What was drawn of a bag."""

    robots: list[str]
    messages: int
    seconds: float  # from the first to the last message
    torn: bool
    unreadable: int  # messages that are not of their type, left out


def show_bag(scene: Scene, path: str | Path, robots: Collection[str] = ()) -> Shown:
    """Draw the bag at `path`. `robots`: those to show, all when empty.

    BagError when the bag cannot be read, or has no topic of a robot.
    """
    with opened(path) as (info, messages):
        names = _wanted(path, info.topics, robots)
        for robot in dict.fromkeys(robot for _, robot in names.values() if robot):
            scene.add(robot)
        count, unreadable, first, last = 0, 0, None, 0.0
        for name, kind, log_time, data in messages(list(names)):
            last, count = 1e-9 * log_time, count + 1
            first = last if first is None else first
            if not scene.due(*names[name], last):
                continue
            try:
                message = deserialize(data, kind)
            except BagError:
                unreadable += 1
                continue
            scene.show(*names[name], message, last)
        return Shown(list(scene.robots), count, last - first if count else 0.0, info.torn, unreadable)


def _wanted(path, held: dict[str, str], robots: Collection[str]) -> dict[str, tuple[interface.Topic, str]]:
    """Topic name -> row of the topic table and robot, of everything in the bag that is shown."""
    present = robots_in(held)
    missing = [robot for robot in robots if robot not in present]
    if missing or not present:
        raise BagError(f'{path}: no topic of robot {missing[0] if missing else "any"}; expected some of '
                       f'{[t.name for t in OF_ROBOT]}, it has {sorted(held)}')
    rows = [(t, robot) for robot in robots or present for t in OF_ROBOT] + [(t, '') for t in OF_ALL]
    names = {t.resolve(robot): (t, robot) for t, robot in rows if held.get(t.resolve(robot)) == t.type}
    for robot in present:
        if interface.POSE.resolve(robot) in names:  # then its odometry would be decoded for nothing
            names.pop(interface.ODOM.resolve(robot), None)
    return names
