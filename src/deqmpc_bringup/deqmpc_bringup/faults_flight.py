"""One flight with one fault: fly to a phase, begin the fault, leave the drone alone, measure.

After the fault begins, the operator does nothing but what a row of `faults.FAULTS` is asked for: take-off when
armed. A flight that the stack has left as it was is landed by the operator after WAIT, to see that it still can
be. What the stack did is read from the phases alone: a phase that nobody asked for is an answer.

Measured from the truth of the simulation:
  reaction   s from the fault to the first answer
  touchdown  m/s downwards just before the first contact with the floor after the fault
  drift      m, horizontal, from where the answer (else the fault) came to where the drone ends
  outside    m outside the fence at the worst
  silence    s with the motors running and a setpoint older than 0.5 s, when the firmware levels out
  clearance  m to the nearest virtual sphere at the worst
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crazyflie_interface import guard
from deqmpc_bringup.composition import Row as NodeRow
from deqmpc_bringup.composition import compose
from deqmpc_bringup.faults import Fault
from deqmpc_bringup.in_process import InProcessGraph
from sim_env.supervisor import State

ARGUMENTS = {'obstacles': 'off', 'record': 'false'}
SETTINGS = {'sim': {'start': '1.0 -0.5 0.0 0.3'}, 'crazyflie_interface': {'takeoff_height': '1.0'}}
# s in a phase before the fault begins: half-way up, hovering, at full speed towards the goal, half-way down
BEFORE = {'armed': 0.3, 'taking_off': 1.2, 'holding': 0.5, 'following': 0.8, 'landing': 0.8}
WAIT = 1.5  # s beyond the fault's `within`, or its end, after which the operator lands what flies on
LIMIT = 20.0  # s after the fault; what then still flies is undecided
SOFT = 0.5  # m/s, hardest touchdown of a flight that nobody cut
SILENCE = 0.5  # s, age of a setpoint at which the firmware levels out
ANSWER_OF = {'holding': 'hold', 'landing': 'land', 'emergency': 'cut', 'disarmed': 'disarm'}


@dataclass(frozen=True)
class Outcome:
    """What became of one flight."""

    fault: str
    phase: str
    expected: tuple[str, ...]
    answer: str  # what happened, in the words of `faults`
    reason: str
    reaction: float  # s, NaN without an answer
    end: str  # landed | cut | on the ground | undecided
    touchdown: float  # m/s, NaN where it never left the ground
    drift: float  # m
    outside: float  # m, negative inside
    silence: float  # s
    clearance: float  # m, inf without spheres
    problems: tuple[str, ...]


def with_settings(rows: list[NodeRow], settings: Mapping[str, Mapping[str, str]]) -> list[NodeRow]:
    """`rows` with more parameters, node -> parameter -> value, that win over the rows' own."""
    return [dataclasses.replace(row, ros_arguments=(*row.ros_arguments, *(
        word for name, value in settings.get(row.name, {}).items() for word in ('-p', f'{name}:={value}'))))
        for row in rows]


class Pilot:
    """Asks for one phase after the other until `phase` has lasted BEFORE[phase]; afterwards only what the
    module's docstring says."""

    def __init__(self, graph: InProcessGraph, phase: str):
        self.graph, self.goal = graph, phase
        self.ready = False
        self.refusal = ''  # of a take-off after the fault
        self.asked: set[str] = set()  # phases that the pilot has asked for
        self._phase, self._since = '', 0.0

    def step(self) -> None:
        """Ask for the next phase; every 0.1 s before the fault."""
        flight, now, time = self.graph.flight, self.graph.steady, self.graph.crazyflie.time
        if flight.phase != self._phase:
            self._phase, self._since = flight.phase, time
        if flight.phase == self.goal:
            self.ready = time - self._since >= BEFORE[self.goal] - 1e-6
            return
        request = {'disarmed': lambda: flight.arm(True, now), 'armed': lambda: flight.takeoff(now),
                   'holding': lambda: (flight.engage if self.goal == 'following' else flight.land)(now),
                   }.get(flight.phase)
        if request is not None:
            request()

    def take_off(self) -> None:
        """Ask once, after a fault that began on the ground."""
        result = self.graph.flight.takeoff(self.graph.steady)
        self.refusal = '' if result.success else result.message
        self.asked |= {'taking_off'}

    def end(self) -> None:
        """Bring to the ground what the stack has left in the air, or armed."""
        flight, now = self.graph.flight, self.graph.steady
        if flight.phase == 'armed':
            self.asked |= {'disarmed'}
            flight.arm(False, now)
        elif flight.phase in ('taking_off', 'holding', 'following'):
            self.asked |= {'landing'}
            flight.land(now)


class Watch:
    """Measures one flight from the instant of the fault on; `look` once a millisecond."""

    def __init__(self, graph: InProcessGraph, pilot: Pilot):
        self.graph, self.pilot = graph, pilot
        self.began = graph.crazyflie.time
        self.answers: list[str] = []
        self.reaction = math.nan
        self.reason = ''
        self.touchdown = math.nan
        self.outside, self.clearance, self.silence = -math.inf, math.inf, 0.0
        self._phase = graph.flight.phase
        self._where = self._position()
        self._flew = self._where[2] > 0.05
        self._fall = 0.0

    def _position(self):
        p = self.graph.crazyflie.plant
        return np.array([p.x, p.y, p.z])

    def look(self) -> None:
        """Take one millisecond into account."""
        graph = self.graph
        plant, crazyflie = graph.crazyflie.plant, graph.crazyflie
        if graph.flight.phase != self._phase:
            self._on_phase(graph.flight.phase)
        if plant.on_ground and self._flew and math.isnan(self.touchdown):
            self.touchdown = self._fall
        self._flew = self._flew or plant.z > 0.05
        self._fall = max(0.0, -plant.vz)
        if math.isnan(self.touchdown) and self._flew:
            age = crazyflie.time - 1e-3 * crazyflie.commander.setpoint.stamp
            running = crazyflie.supervisor.state in (State.FLYING, State.LEVEL_OUT)
            self.silence += 1e-3 * (running and age > SILENCE)
            self._look_around()

    def _look_around(self):
        s, p = self.graph.flight.settings, self._position()
        self.outside = max(self.outside, guard.outside(p, [*s.fence_low[:2], -math.inf], s.fence_high))
        if self.graph.obstacles is not None:
            self.clearance = min(self.clearance, self.graph.obstacles.at(self.graph.now).clearance(p)[0])

    def _on_phase(self, phase):
        before, self._phase = self._phase, phase
        usual = (before, phase) in (('taking_off', 'holding'), ('landing', 'disarmed'))
        if usual or phase in self.pilot.asked:
            return
        if not self.answers:
            self.reaction = self.graph.crazyflie.time - self.began
            self._where = self._position()
        self.answers.append(ANSWER_OF[phase])
        self.reason = self.reason or self.graph.flight.reason

    @property
    def drift(self) -> float:
        """Horizontal distance from the answer to here (m)."""
        return float(np.linalg.norm((self._position() - self._where)[:2]))

    def at_rest(self) -> bool:
        """True when the drone lies or stands still and nobody wants it in the air."""
        p = self.graph.crazyflie.plant
        return (self.graph.flight.phase in ('disarmed', 'emergency') and p.on_ground
                and math.hypot(p.vx, p.vy, p.vz) < 0.05 and max(self.graph.crazyflie.pwm) == 0)


def fly(fault: Fault, phase: str, seed: int = 0) -> Outcome:
    """Fly one case. RuntimeError when the phase is not reached before the fault begins."""
    settings = {node: {**SETTINGS.get(node, {}), **fault.settings.get(node, {})}
                for node in {*SETTINGS, *fault.settings}}
    rows = compose('sim', {**ARGUMENTS, 'seed': str(seed), **fault.arguments})
    graph = InProcessGraph(with_settings(rows, settings))
    graph.recorder_alive = True  # it reports, though nothing is written here
    pilot = Pilot(graph, phase)
    while not pilot.ready:
        for _ in range(100):
            graph.advance()
        pilot.step()
        if graph.crazyflie.time > 60.0:
            raise RuntimeError(f'{fault.name}: phase {phase} not reached in 60 s, but {graph.flight.phase}: '
                               f'{"; ".join(graph.flight.preflight(graph.steady))}')
    watch = Watch(graph, pilot)
    undo = fault.inject(graph, np.random.default_rng([seed, 0xFA]))
    if math.isfinite(fault.lasts):
        graph.at(watch.began + fault.lasts, undo)
    if phase == 'armed':
        graph.at(watch.began + 0.5, pilot.take_off)
    last = max(t for t in (fault.limit(phase), fault.lasts, 0.5, 2.5 * (phase == 'armed')) if math.isfinite(t))
    graph.at(watch.began + last + WAIT, lambda: None if watch.answers else pilot.end())
    while graph.crazyflie.time - watch.began < LIMIT:
        graph.advance()
        watch.look()
        if watch.at_rest() and (watch.answers or graph.crazyflie.time - watch.began > last):
            break
    return judge(fault, phase, pilot, watch)


def judge(fault: Fault, phase: str, pilot: Pilot, watch: Watch) -> Outcome:
    """The outcome of a flight, with what is wrong about it."""
    answer = '>'.join(watch.answers) or ('refuse' if pilot.refusal else 'none')
    end = ('undecided' if not watch.at_rest() else 'cut' if watch.graph.flight.phase == 'emergency'
           else 'on the ground' if math.isnan(watch.touchdown) else 'landed')
    expected = fault.answers(phase)
    problems = []
    if answer not in expected:
        problems.append(f'answer {answer}, expected {"|".join(expected)}')
    if watch.reaction > fault.limit(phase):
        problems.append(f'answered after {watch.reaction:.2f} s, limit {fault.limit(phase):g} s')
    if end == 'undecided':
        problems.append(f'still in phase {watch.graph.flight.phase} after {LIMIT:g} s')
    if watch.touchdown > SOFT and not fault.falls and 'cut' not in answer:
        problems.append(f'met the floor with {watch.touchdown:.2f} m/s, limit {SOFT} m/s')
    if watch.silence > 0.0 and not fault.falls and 'cut' not in answer:
        problems.append(f'flew {watch.silence:.2f} s on a setpoint older than {SILENCE} s')
    return Outcome(fault.name, phase, expected, answer, watch.reason or pilot.refusal, watch.reaction, end,
                   watch.touchdown, watch.drift, watch.outside, watch.silence, watch.clearance, tuple(problems))
