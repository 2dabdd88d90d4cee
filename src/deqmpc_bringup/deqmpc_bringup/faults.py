"""What can go wrong in a flight, and what the stack must answer: the table of the fault matrix.

A fault is put into the in-process graph through its seams; flight code knows nothing of it. `expected`
gives, for each phase in which it begins, what may happen without the operator's help:

    none      the flight goes on as it was     refuse    a take-off that is asked for is refused
    disarm    disarmed on the ground           hold, land, cut    as the guard's answers, in this order
    -         the fault does not begin in this phase

`a>b` is first a, then b; `a|b` is either. A cut lets the drone fall, so the speed at which it meets the floor
is judged only where none of these is taken and where the fault itself has not stopped the motors (`falls`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deqmpc.obstacles import ObstacleField
from deqmpc.types import Plan
from deqmpc_bringup.in_process import InProcessGraph
from sim_env.mocap_noise import MocapFrame
from sim_env.supervisor import State

PHASES = ('armed', 'taking_off', 'holding', 'following', 'landing')  # in which faults begin

Undo = Callable[[], None]
Inject = Callable[[InProcessGraph, np.random.Generator], Undo]
Settings = dict[str, dict[str, str]]  # node -> parameter -> value


@dataclass(frozen=True)
class Fault:
    """One row of the matrix."""

    name: str
    inject: Inject  # begins the fault, returns what ends it
    expected: str  # for armed, taking_off, holding, following, landing: see above
    within: float = math.inf  # s from its beginning to the first answer, where there is one
    lasts: float = math.inf  # s
    landing_within: float = math.nan  # the same as `within` where it begins in a landing; NaN: `within`
    falls: bool = False  # it stops the motors by itself, or keeps the ground from reaching the drone
    settings: Settings = field(default_factory=dict)  # parameters that this fault is flown with
    arguments: dict[str, str] = field(default_factory=dict)  # launch arguments, likewise
    short: tuple[str, ...] = ('following',)  # phases of the short matrix

    def __post_init__(self):
        if len(self.expected.split()) != len(PHASES):
            raise ValueError(f'fault {self.name!r}: expected = {self.expected!r}; expected one word for each of '
                             f'{", ".join(PHASES)}')

    def limit(self, phase: str) -> float:
        """s to the first answer when the fault begins in `phase`."""
        return self.within if phase != 'landing' or math.isnan(self.landing_within) else self.landing_within

    def answers(self, phase: str) -> tuple[str, ...]:
        """What may happen when the fault begins in `phase`; empty where it does not begin there."""
        word = self.expected.split()[PHASES.index(phase)]
        return () if word == '-' else tuple(word.split('|'))


def put(thing: object, name: str, value: object) -> Undo:
    """Replace an attribute; the result puts the old one back."""
    old = getattr(thing, name)
    setattr(thing, name, value)
    return lambda: setattr(thing, name, old)


def together(*injections: Inject) -> Inject:
    """Several faults at once."""
    def inject(graph, rng):
        undo = [i(graph, rng) for i in injections]
        def restore():
            for u in reversed(undo):
                u()
        return restore
    return inject


def nothing() -> None:
    """Ends what needs no ending."""


# --- mocap ----------------------------------------------------------------------------------------

def frames(change: Callable[[MocapFrame, np.random.Generator], MocapFrame | None]) -> Inject:
    """Each tracked frame goes through `change`; None is a lost frame."""
    def inject(graph, rng):
        def changed(frame):
            if frame.position is None:
                return (frame,)
            other = change(frame, rng)
            return () if other is None else (other,)
        return put(graph, 'mocap', changed)
    return inject


def frozen(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """Every frame repeats the first pose, bit for bit."""
    first = []
    def change(frame):
        first.append(frame)
        return (dataclasses.replace(frame, position=first[0].position, quaternion=first[0].quaternion),)
    return put(graph, 'mocap', change)


def stamps_backwards(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """Exposure times decrease from frame to frame."""
    begin = graph.crazyflie.time
    def change(frame):
        return (dataclasses.replace(frame, exposure=2.0 * begin - frame.exposure),)
    return put(graph, 'mocap', change)


def wrong_body(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The cameras take another body for ours, which is carried slowly through the room."""
    begin = graph.crazyflie.time
    def change(frame):
        t = frame.exposure - begin
        position = np.array([-0.8, 0.9, 1.2]) + t * np.array([0.2, 0.1, 0.0]) + 3e-4 * rng.standard_normal(3)
        return (dataclasses.replace(frame, position=position, quaternion=np.array([0.0, 0.0, 0.6, 0.8])),)
    return put(graph, 'mocap', change)


def turned(turn: tuple[float, float, float, float]) -> Inject:
    """The body's markers are taken for a body turned by `turn` (xyzw, body axes)."""
    x, y, z, w = turn
    def change(frame, rng):
        a, b, c, d = frame.quaternion
        q = np.array([d * x + a * w + b * z - c * y, d * y - a * z + b * w + c * x,
                      d * z + a * y - b * x + c * w, d * w - a * x - b * y - c * z])
        return dataclasses.replace(frame, quaternion=q)
    return frames(change)


def renamed(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The rigid body is streamed under another name."""
    return put(graph, 'body', 'Rigid Body 2')


LOST = frames(lambda frame, rng: None)
JUMPED = frames(lambda f, rng: dataclasses.replace(f, position=f.position + np.array([0.0, 0.5, 0.0])))
NAN_POSE = frames(lambda f, rng: dataclasses.replace(f, position=np.full(3, np.nan)))
LATE_FRAMES = frames(lambda f, rng: dataclasses.replace(f, delivery=f.delivery + 0.08))
LATE_STAMPS = frames(lambda f, rng: dataclasses.replace(f, exposure=f.exposure - 0.3))
FALSE_POSES = frames(lambda f, rng: dataclasses.replace(f, position=f.position + 0.3 * rng.standard_normal(3))
                     if rng.random() < 0.05 else f)


def dropped(share: float) -> Inject:
    """Single frames are lost."""
    return frames(lambda f, rng: None if rng.random() < share else f)


# --- policy ---------------------------------------------------------------------------------------

def policy_dies(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The policy's process stops, or hangs until it is undone."""
    return put(graph, 'policy_alive', False)


def plans(change: Callable[[InProcessGraph, Plan], Plan]) -> Inject:
    """A process that has lost its mind: what it publishes is `change` of a sound plan."""
    def inject(graph, rng):
        return put(graph, 'plan', lambda plan: None if plan is None else change(graph, plan))
    return inject


def _nan_plan(graph, plan):
    return dataclasses.replace(plan, velocity=np.full_like(plan.velocity, np.nan))


def _far_plan(graph, plan):
    return dataclasses.replace(plan, position=plan.position + np.array([0.0, 1.5, 0.0]))


def straight(plan: Plan, start: np.ndarray, velocity: np.ndarray) -> Plan:
    """`plan` replaced by level flight from `start` (3,) m with `velocity` (3,) m/s."""
    n = len(plan.time_from_start)
    return dataclasses.replace(
        plan, position=start + plan.time_from_start[:, None] * velocity, velocity=np.tile(velocity, (n, 1)),
        acceleration=np.zeros((n, 3)), rates=np.zeros((n, 3)), quaternion=np.tile([0.0, 0.0, 0.0, 1.0], (n, 1)))


def outward(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """A plan that flies at 0.8 m/s out of the fence, x > 2 m."""
    begin, start = graph.now, graph.state.position
    velocity = np.array([0.8, 0.0, 0.0])
    def out(plan):
        return None if plan is None else straight(plan, start + (plan.stamp - begin) * velocity, velocity)
    return put(graph, 'plan', out)


def through_sphere(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """A sphere 0.6 m ahead, and a policy that flies through it at 0.6 m/s as if it were not there."""
    begin, start = graph.now, graph.state.position
    velocity = np.array([-0.6, 0.0, 0.0])
    def blind(plan):
        return None if plan is None else straight(plan, start + (plan.stamp - begin) * velocity, velocity)
    _show_sphere(graph, start + np.array([-0.6, 0.0, 0.0]))
    return put(graph, 'plan', blind)


# --- obstacles ------------------------------------------------------------------------------------

def _show_sphere(graph, centre):
    graph.field = ObstacleField(np.array([centre]), np.array([0.15]), np.zeros((1, 3)))
    graph.publish_obstacles()


def sphere_on_drone(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """A sphere of radius 0.15 m is published where the drone is."""
    p = graph.crazyflie.plant
    _show_sphere(graph, np.array([p.x, p.y, p.z]))
    return nothing


def obstacles_die(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The node that publishes moving spheres stops."""
    return put(graph, 'obstacles_alive', False)


# --- drone ----------------------------------------------------------------------------------------

def pushed(force: tuple[float, float, float]) -> Inject:
    """A force (N, world) on the drone."""
    return lambda graph, rng: put(graph.crazyflie.plant, 'push', force)


def flung(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """A blow on one arm, that leaves the drone turning with 35 rad/s."""
    graph.crazyflie.plant.wx += 35.0
    return nothing


def battery(volts: float) -> Inject:
    """The battery gives `volts` under load."""
    return lambda graph, rng: put(graph.crazyflie.plant, 'fixed_voltage', volts)


def motor(factor: float) -> Inject:
    """Motor 2 gives `factor` of its thrust."""
    def inject(graph, rng):
        graph.crazyflie.plant.weaken(1, factor)
        return nothing
    return inject


def supervisor_state(state: State) -> Inject:
    """The firmware's supervisor goes to `state`."""
    def inject(graph, rng):
        supervisor = graph.crazyflie.supervisor
        supervisor.state = state
        supervisor.crashed = state == State.CRASHED
        supervisor.armed = False
        return nothing
    return inject


def disarms(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The drone disarms itself, and does not arm itself again."""
    graph.crazyflie.supervisor.auto_arm = False
    graph.crazyflie.supervisor.armed = False
    return nothing


# --- radio ----------------------------------------------------------------------------------------

def link_down(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """Nothing on the air, both ways."""
    return put(graph.radio, 'link_down', True)


def silent(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """Commands arrive, log packets do not."""
    return put(graph.radio, 'down', lambda: False)


def lossy(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """A fifth of the packets is lost, each way."""
    undo = [put(graph.radio, way, lambda: rng.random() >= 0.2) for way in ('up', 'down')]
    def restore():
        for u in undo:
            u()
    return restore


# --- computer -------------------------------------------------------------------------------------

def clock_set(step: float) -> Inject:
    """Somebody sets the system clock by `step` (s)."""
    def inject(graph, rng):
        graph.clock_step += step
        return nothing
    return inject


def recorder_dies(graph: InProcessGraph, rng: np.random.Generator) -> Undo:
    """The recorder's process stops."""
    return put(graph, 'recorder_alive', False)


MOVING = {'obstacles': 'moving'}

# Mocap: hold at 0.2 s, land at 0.5 s, cut at 1.5 s without a pose. A landing from 1 m takes 2.5 s.
#   name, injection, answer when it begins in:  armed  taking_off  holding  following  landing
FAULTS: tuple[Fault, ...] = (
    Fault('mocap gap 0.15 s', LOST, 'none|refuse none none none none', lasts=0.15),
    Fault('mocap gap 0.3 s', LOST, 'none|refuse none none hold>land none', 0.25, 0.3, short=('following', 'holding')),
    Fault('mocap gap 1 s', LOST, 'refuse land land hold>land none', 0.55, 1.0),
    Fault('mocap gap 3 s', LOST, 'refuse land>cut land>cut hold>land>cut cut|none', 0.55, 3.0, landing_within=1.55),
    Fault('mocap lost', LOST, 'refuse land>cut land>cut hold>land>cut cut|none', 0.55,
          landing_within=1.55, short=PHASES),
    Fault('mocap jump 0.5 m', JUMPED, 'none|refuse land|land>cut land|land>cut hold>land|hold>land>cut|land|land>cut'
          ' none|cut', 0.55, landing_within=1.55, short=('following', 'holding')),
    Fault('mocap frozen', frozen, 'refuse land>cut land>cut hold>land>cut cut|none', 0.65, landing_within=1.65),
    Fault('mocap wrong body', wrong_body, 'refuse land|land>cut land|land>cut '
          'hold>land|hold>land>cut|land|land>cut none|cut', 0.55, landing_within=1.55, short=('holding',)),
    Fault('mocap body renamed', renamed, 'refuse land>cut land>cut hold>land>cut cut|none', 0.55,
          landing_within=1.55, short=('holding',)),
    Fault('mocap upside down', turned((1.0, 0.0, 0.0, 0.0)), 'refuse|disarm land|land>cut|cut land|land>cut|cut '
          'hold>land|hold>land>cut|cut|hold>cut cut|none', 0.55, landing_within=1.55),
    Fault('mocap heading flipped', turned((0.0, 0.0, 1.0, 0.0)), 'refuse land|land>cut|cut land|land>cut|cut '
          'hold>land|hold>land>cut|hold>cut|land>cut cut|none', 0.55, landing_within=1.55, short=('holding',)),
    Fault('mocap NaN', NAN_POSE, 'refuse land>cut land>cut hold>land>cut cut|none', 0.55, landing_within=1.55),
    Fault('mocap latency 80 ms', LATE_FRAMES, 'none|refuse none none none|hold>land none', short=('following',)),
    Fault('mocap drop-outs 5 %', dropped(0.05), 'none none none none none'),
    Fault('mocap drop-outs 20 %', dropped(0.20), 'none|refuse none none none none'),
    Fault('mocap false poses 5 %', FALSE_POSES, 'none|refuse none none none none'),
    Fault('mocap stamps 0.3 s late', LATE_STAMPS, 'refuse none|land|land>cut none|land|land>cut '
          'hold>land|hold>land>cut none|cut', 0.55, landing_within=1.55),
    Fault('mocap stamps backwards', stamps_backwards, 'refuse land>cut land>cut hold>land>cut cut|none', 0.55,
          landing_within=1.55),

    Fault('policy dies', policy_dies, 'none|refuse none none hold>land none', 0.55, short=('following', 'holding')),
    Fault('policy stalls 0.3 s', policy_dies, 'none|refuse none none none none', lasts=0.25),
    Fault('policy stalls 1 s', policy_dies, 'none|refuse none none hold>land none', 0.55, 1.0),
    Fault('policy plans NaN', plans(_nan_plan), 'none|refuse none none hold>land none', 0.55),
    Fault('policy plans far away', plans(_far_plan), '- - - hold>land -', 0.55),
    Fault('policy plans out of the fence', outward, '- - - hold>land -', 2.0),
    Fault('policy plans through a sphere', through_sphere, '- - - hold>land -', 1.0),

    Fault('sphere appears on the drone', sphere_on_drone, '- none|land none|land none|hold>land|land none', 0.25),
    Fault('obstacles die', obstacles_die, 'none|refuse none none hold>land none', 1.3, arguments=MOVING),

    Fault('pushed out of the fence', pushed((0.6, 0.0, 0.0)), '- land|cut|land>cut land|cut|land>cut '
          'hold>land|hold>cut|hold>land>cut|land|cut|land>cut none|cut', 0.6, 0.25, falls=True),
    Fault('flung over', flung, '- cut cut cut|hold>cut cut', 0.3, falls=True),
    Fault('battery sags to 3.25 V', battery(3.25), 'refuse land land land none', 3.2),
    Fault('battery critical, 3.1 V', battery(3.1), 'refuse land land land none', 0.8, short=('holding',)),
    Fault('supervisor crashed', supervisor_state(State.CRASHED), 'disarm cut cut cut none|cut', 0.25, falls=True),
    Fault('supervisor locked', supervisor_state(State.LOCKED), 'disarm cut cut cut none|cut', 0.25, falls=True,
          short=('taking_off',)),
    Fault('drone disarms itself', disarms, 'disarm cut cut cut none|cut', 0.25, falls=True, short=('landing',)),
    Fault('weak motor, 85 %', motor(0.85), 'none none none none none'),
    Fault('motor lost', motor(0.0), 'none|refuse|cut cut|land>cut cut cut|hold>cut|hold>land>cut|land>cut cut|none',
          1.5, falls=True),

    Fault('radio link lost', link_down, 'disarm|land|land>cut land>cut land>cut land>cut|hold>land>cut cut|none', 2.1,
          falls=True, short=('holding',)),
    Fault('radio gap 0.4 s', link_down, 'none|refuse none none none none', lasts=0.4),
    Fault('telemetry silent', silent, 'refuse|land land land land none', 1.2, short=('taking_off',)),
    Fault('radio loses 20 %', lossy, 'none|refuse none none none none'),

    Fault('clock set +1 s', clock_set(1.0), 'none|refuse none|land none|land none|hold>land|land none', 0.6),
    Fault('clock set -1 s', clock_set(-1.0), 'none|refuse none|land none|land none|hold>land|land none', 0.6),
    Fault('clock set +1 h', clock_set(3600.0), 'none|refuse none|land none|land none|hold>land|land none', 0.6),
    Fault('clock set -1 h', clock_set(-3600.0), 'none|refuse none|land none|land none|hold>land|land none', 0.6,
          short=('following', 'landing')),
    Fault('recorder dies', recorder_dies, 'none|refuse|land land land land none', 6.5),

    Fault('mocap lost, battery critical', together(LOST, battery(3.1)),
          'refuse land>cut land>cut hold>land>cut cut|none', 0.55, landing_within=1.55),
    Fault('policy dead, mocap gap 0.3 s', together(policy_dies, LOST), 'none|refuse none none hold>land none', 0.25,
          0.3),
    Fault('clock set -1 s, mocap lost', together(clock_set(-1.0), LOST), 'refuse land>cut land>cut '
          'hold>land>cut|land>cut cut|none', 0.55, landing_within=1.55),
    Fault('telemetry silent, policy dead', together(silent, policy_dies), 'refuse land land hold>land none', 1.2),
)
