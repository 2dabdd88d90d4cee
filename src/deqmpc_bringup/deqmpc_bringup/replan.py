"""`deqmpc replay BAG --policy NAME`: what a policy would have planned at every tick of a recorded flight.

No ROS graph and no clock: the policy with its gate gets the recorded state and spheres of each tick in turn, as fast as
it plans. Its own plans lead to its warm start, not to the drone, which flies as it was recorded. The same bag and the
same policy give the same plans bit for bit (the digest says so); the policy that flew gives the plans that were flown,
where the bag shows what it saw.

  distance    mean over the plan's points of |p - p_flown|, of points at the same time               m
  next        the same of the next point only, the setpoint that would have been sent                m
  clearance   least distance from the plan to a sphere's surface, spheres carried on at their speed  m
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles, Plan, RigidBodyState
from deqmpc_bringup.composition import CompositionError, compose, parse_assignments
from deqmpc_bringup.fly import main as fly
from deqmpc_bringup.fly import new_run_dir
from deqmpc_controller.node import Settings as PolicySettings
from deqmpc_controller.node import policy_loop
from deqmpc_controller.plan_gate import ACCEPTED
from deqmpc_ros.settings import SettingsError
from flight_log.bag import BagError, read_bag
from flight_log.flight import Flight, load_flight
from flight_log.metrics import latest, percentile


@dataclass(frozen=True)
class Seen:
    """What the policy saw at one recorded tick, and what came of it."""

    t: float  # s, the tick's end
    now: float  # s, the tick's begin
    state: RigidBodyState | None
    obstacles: list[Obstacles]  # received since the tick before
    times: np.ndarray | None  # (T+1,) s of the flown plan's points; None where there was no plan
    path: np.ndarray | None  # (T+1, 3) m


@dataclass(frozen=True)
class Row:
    """One tick of the comparison."""

    t: float  # s, since the first tick
    gate: str
    gate_flown: str
    distance: float  # m; NaN where one of the two has no plan
    next: float  # m
    clearance: float  # m; inf without spheres
    clearance_flown: float  # m
    solve_ms: float
    solve_ms_flown: float


def seen(flight: Flight) -> Iterator[Seen]:
    """The recorded ticks in order. BagError where there are none."""
    if not len(flight.ticks.t):
        raise BagError(f'{flight.path}: no ticks of a policy (DiagnosticStatus {flight.robot}/policy on /diagnostics)')
    name = interface.OBSTACLES.resolve(flight.robot)
    fields, before = [], None
    for _, _, log, message in read_bag(flight.path, [name]):
        before = interface.read_obstacles(message, before)
        fields.append((log, before))
    plans = _plans_of(flight)
    at = 0
    for k, t in enumerate(flight.ticks.t):
        spent = 1e-3 * np.array([flight.ticks.solve_ms[k], flight.ticks.tick_ms[k]])
        now = t - np.max(spent, initial=0.0, where=np.isfinite(spent))
        new = []
        while at < len(fields) and fields[at][0] <= now:
            new.append(fields[at][1])
            at += 1
        i = plans[k]
        times, path = (None, None) if i is None else (flight.plans.times[i], flight.plans.path[i])
        yield Seen(float(t), float(now), _state(flight, now, times), new, times, path)


def _plans_of(flight: Flight) -> list[int | None]:
    """For every tick the index of its plan: accepted ones were published just before the tick reported itself."""
    found: list[int | None] = []
    free = 0
    for k, t in enumerate(flight.ticks.t):
        if flight.ticks.gate[k] != ACCEPTED:
            found.append(None)
            continue
        after = flight.ticks.t[k + 1] if k + 1 < len(flight.ticks.t) else math.inf
        while free < len(flight.plans.t) and flight.plans.t[free] < t - 0.5 * (after - t if after < math.inf else 0.2):
            free += 1
        mine = free < len(flight.plans.t) and flight.plans.t[free] < 0.5 * (t + min(after, t + 0.2))
        found.append(free if mine else None)
        free += mine
    return found


def _state(flight: Flight, now: float, times: np.ndarray | None) -> RigidBodyState | None:
    """The odometry that the tick planned from: the plan's stamp says which; else the newest before the tick."""
    o = flight.odom
    i = int(latest(np.array([now if times is None else times[0] + 1e-6]), o.t)[0])
    return None if i < 0 else RigidBodyState(float(o.t[i]), o.position[i], o.quaternion[i], o.velocity[i], o.rates[i])


def replan(flight: Flight, settings: PolicySettings) -> Iterator[tuple[Row, Plan | None]]:
    """The policy's plan at every recorded tick, beside the one that was flown."""
    loop = policy_loop(settings, 'replay')
    loop.warm_up()
    first, obstacles = None, None
    for k, s in enumerate(seen(flight)):
        first = s.t if first is None else first
        for obstacles in s.obstacles:
            loop.on_obstacles(obstacles)
        if s.state is not None:
            loop.on_odometry(s.state)
        tick = loop.tick(s.state.stamp if s.times is not None and s.state is not None else s.now)
        distance, following = _apart(tick.plan, s)
        stamp = s.now if s.state is None else s.state.stamp
        yield Row(s.t - first, tick.gate, flight.ticks.gate[k], distance, following,
                  clearance(tick.plan and tick.plan.stamp + tick.plan.time_from_start, tick.plan and tick.plan.position,
                            obstacles, stamp),
                  clearance(s.times, s.path, obstacles, stamp), 1e3 * tick.solve_time,
                  float(flight.ticks.solve_ms[k])), tick.plan


def _apart(plan: Plan | None, s: Seen) -> tuple[float, float]:
    if plan is None or s.times is None:
        return math.nan, math.nan
    times = plan.stamp + plan.time_from_start
    inside = (times >= s.times[0] - 1e-9) & (times <= s.times[-1] + 1e-9)
    flown = np.stack([np.interp(times, s.times, s.path[:, axis]) for axis in range(3)], axis=1)
    away = np.linalg.norm(plan.position - flown, axis=1)
    return float(away[inside].mean()), float(away[min(1, len(away) - 1)])


def clearance(times: np.ndarray | None, path: np.ndarray | None, obstacles: Obstacles | None, now: float) -> float:
    """Least distance (m) from a path (P, 3) at `times` (P,) to the spheres as they will be; NaN without a path."""
    if times is None or path is None:
        return math.nan
    if obstacles is None or not len(obstacles.radius):
        return math.inf
    return float(obstacles.clearances(path, np.maximum(np.asarray(times) - now, 0.0)).min())


@dataclass(frozen=True)
class Summary:
    """All ticks."""

    ticks: int
    planned: int  # by this policy
    planned_flown: int
    distance_p50: float  # m, over ticks at which both have a plan
    distance_max: float
    next_p50: float
    next_max: float
    collisions: int  # plans that lead into a sphere
    collisions_flown: int
    solve_ms_p50: float
    solve_ms_p99: float
    solve_ms_flown_p50: float
    refusals: dict[str, int]
    digest: str  # SHA-256 of all plans' bytes


def summarise(rows: list[Row], plans: list[Plan | None]) -> Summary:
    """Of all ticks."""
    def column(name):
        return np.array([getattr(r, name) for r in rows])
    digest = hashlib.sha256()
    for plan in plans:
        if plan is not None:
            for f in dataclasses.fields(plan):
                digest.update(np.asarray(getattr(plan, f.name), dtype=float).tobytes())
    refused = [r.gate for r in rows if r.gate != ACCEPTED]
    both = np.isfinite(column('distance'))
    def largest(name):
        return float(column(name)[both].max()) if both.any() else math.nan
    return Summary(
        len(rows), sum(p is not None for p in plans), sum(r.gate_flown == ACCEPTED for r in rows),
        percentile(column('distance'), 50), largest('distance'), percentile(column('next'), 50), largest('next'),
        int((column('clearance') < 0).sum()), int((column('clearance_flown') < 0).sum()),
        *(percentile(column('solve_ms'), q) for q in (50, 99)), percentile(column('solve_ms_flown'), 50),
        {why: refused.count(why) for why in dict.fromkeys(refused)}, digest.hexdigest())


def text(s: Summary, policy: str) -> str:
    """The summary for a terminal."""
    def mm(value):
        return f'{1e3 * value:.2f} mm' if math.isfinite(value) else '-'
    lines = [f'{policy} at {s.ticks} recorded ticks: {s.planned} plans, {s.planned_flown} in flight',
             f'distance to the flown plan: median {mm(s.distance_p50)}, at most {mm(s.distance_max)}; '
             f'next point: median {mm(s.next_p50)}, at most {mm(s.next_max)}',
             f'plans that lead into a sphere: {s.collisions}, in flight {s.collisions_flown}',
             f'solve: median {s.solve_ms_p50:.2f} ms, 99 % {s.solve_ms_p99:.2f} ms; in flight median '
             f'{s.solve_ms_flown_p50:.2f} ms']
    lines += [f'refused {count} x: {why}' for why, count in s.refusals.items()]
    return '\n'.join([*lines, f'SHA-256 of all plans: {s.digest}'])


def refly(flight: Flight, given: dict[str, str], run_dir: Path) -> Path:
    """Fly the recorded start again in simulation, with the recorded spheres; the new bag. CompositionError where the
    bag does not say what is needed, or the trial did not end well."""
    from deqmpc_bringup.trial import fly_in_process  # the simulator: not for --help
    follows = next((s.t for s in flight.status if s.phase == 'following'), None)
    if follows is None:
        raise CompositionError(f'{flight.path}: the drone never followed a plan; there is no start to fly again')
    i = max(int(latest(np.array([follows]), flight.odom.t)[0]), 0)
    start = ' '.join(f'{v:.4f}' for v in (*flight.odom.position[i], rotation.yaw(flight.odom.quaternion[i])))
    run_dir.mkdir(parents=True, exist_ok=True)
    if flight.spheres.moving:
        if 'seed' not in flight.metadata:
            raise CompositionError(f'{flight.path}: its spheres move and it names no seed; give seed:=N')
        field = {'obstacles': 'moving', 'seed': flight.metadata['seed']}
    elif flight.spheres.position.shape[1]:
        file = run_dir / 'obstacles.yaml'
        centres, radii = (v[0] for v in flight.spheres.at(np.array([follows])))
        file.write_text(yaml.safe_dump({'spheres': [
            {'position': c.tolist(), 'radius': float(r)} for c, r in zip(centres, radii, strict=True)]}))
        field = {'obstacles': 'static', 'obstacles_file': str(file), 'seed': flight.metadata.get('seed', '0')}
    else:
        field = {'obstacles': 'off', 'seed': flight.metadata.get('seed', '0')}
    reason = fly_in_process({'trial': 'true', 'record': 'true', **field, 'start': start, **given,
                             'run_dir': str(run_dir)})
    if reason:
        raise CompositionError(f'{run_dir}: the trial in simulation ended early: {reason}')
    return run_dir / 'bag'


def main(argv: list[str]) -> int:
    """Play a bag into the policy node in real time; or, with --policy, replan every recorded tick without a clock."""
    parser = argparse.ArgumentParser(prog='deqmpc replay', description=main.__doc__)
    parser.add_argument('bag', metavar='BAG')
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments of mode replay (rate:=2)')
    parser.add_argument('--policy', metavar='NAME', help='replan with this policy, e.g. deq_mpc_deq')
    parser.add_argument('--step', action='store_true', help='with --policy: one tick at a time, Enter for the next')
    parser.add_argument('--csv', metavar='FILE', help='with --policy: a row for every tick')
    parser.add_argument('--json', action='store_true', help='with --policy: print the summary as JSON')
    parser.add_argument('--sim', action='store_true', help='fly the recorded start again in simulation, and compare')
    options = parser.parse_intermixed_args(argv)
    if not options.policy and not options.sim:
        return fly(['replay', f'bag:={options.bag}', *options.arguments])
    try:
        given = parse_assignments(options.arguments)
        if options.policy:
            given['policy'] = options.policy
        flight = load_flight(options.bag, given.get('robot', ''))
        if options.sim:
            return _side_by_side(flight, given)
        return _replanned(flight, given, options)
    except (CompositionError, BagError, SettingsError, OSError) as error:
        print(f'deqmpc replay: {error}', file=sys.stderr)
        return 2


def _replanned(flight: Flight, given: dict[str, str], options) -> int:
    from deqmpc_bringup.in_process import settings_of  # the simulator: not for --help
    given = {'robot': flight.robot, **given, 'bag': str(flight.path)}
    row = next(r for r in compose('replay', given) if r.name == 'policy')
    rows, plans = [], []
    for found, plan in replan(flight, settings_of(row, PolicySettings)):
        rows.append(found)
        plans.append(plan)
        if options.step:
            print(f'{found.t:8.3f} s  {found.gate}; {1e3 * found.distance:.2f} mm from the flown plan, clearance '
                  f'{found.clearance:.3f} m (flown {found.clearance_flown:.3f} m), {found.solve_ms:.2f} ms')
            if sys.stdin.readline() == '':
                break
    summary = summarise(rows, plans)
    if options.csv:
        with Path(options.csv).open('w', newline='') as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(r) for r in rows)
    if options.json:
        print(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                          for k, v in dataclasses.asdict(summary).items()}, indent=1))
    else:
        print(text(summary, given.get('policy', '')))
    return 0


def _side_by_side(flight: Flight, given: dict[str, str]) -> int:
    from flight_log.evaluate import main as evaluate
    run_dir = Path(given.pop('run_dir', '') or new_run_dir('refly')).resolve()
    bag = refly(flight, given, run_dir)
    print(f'bag and page: {run_dir}', file=sys.stderr)
    return evaluate([str(flight.path), str(bag), '--by', 'mode', '--html', str(run_dir / 'side_by_side.html')])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
