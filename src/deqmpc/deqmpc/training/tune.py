"""The command `deqmpc tune`: better numbers for a policy's MPC from episodes in closed loop.

  deqmpc tune crazyflie_obs --parameters mass drag --out runs/tune/mass
  deqmpc tune crazyflie_obs --policy-file my_policy.yaml --parameters margin cruise_speed velocity_weight \
      --limit cruise_speed=1.3 margin=2 --updates 30
  deqmpc tune crazyflie_obs --recorded runs/A/bag runs/B/bag --parameters drag

theta are settings of `mpc_only` or numbers of its model (deqmpc.training.tunable); they move in z = log(theta /
theta_0), at most by the factor of --limit up or down. Every update flies the same episodes with the policy as it is
and takes one Gauss-Newton step (deqmpc.training.gauss_newton) on

  J = mean over episodes of sum_t r_t,    r_t = reward(x_t, u_t) - price * sum_j max(0, 1 - gap_j / clearance)^2

The reward is the task's; the price is paid near spheres' surfaces, in full where one is touched. Gradient and Hessian
are those of deqmpc.training.policy_gradient: exact derivatives along each episode, from the plant's linearisation and
the policy's implicit derivatives. Two things they do not see: where an episode fails, which the price stands in for,
and where the reference jumps to another ray. So returns and failures are counted beside J.

The plant is the task's and takes the thrusts (N) of the plan's first knot. What is found flies best there: a mass or
drag need not be the true one. In a flight the drone's own controller follows the plan's states, and the model's mass
matters less. With --recorded the episodes start at states of recorded flights on their way, among their spheres, and
not at the task's random ones.

The tuned policy is the one of all updates with the largest J as flown, failures included: not worse on these episodes
than what it began with. Whether it is better on others, fresh starts tell.

A run is a folder: log.csv (a line an update), state.json (after every update: the same command again continues),
policy.yaml and airframe.yaml (the tuned policy; nothing flies it by itself), result.json (before and after on fresh
starts). The folder config/ is never written to.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deqmpc import datasets, tasks, whole_file, yaml_file
from deqmpc.airframe import Airframe
from deqmpc.datasets import Demonstrations
from deqmpc.evaluation import changed
from deqmpc.planners import Planned
from deqmpc.provenance import commit
from deqmpc.rollouts import Disturbance, Rollouts, rollout
from deqmpc.statistics import bootstrap_mean
from deqmpc.tasks import Spheres, Task
from deqmpc.training import gauss_newton
from deqmpc.training.policy_gradient import Episodes, Estimate, policy_gradient
from deqmpc.training.tunable import (
    PARAMETERS,
    POLICY_FILE,
    Calls,
    Tunable,
    TunedPlanner,
    flight_planner,
    joined,
)

LOG, STATE, RESULT, BEFORE = 'log.csv', 'state.json', 'result.json', 'before'
READERS = 'deqmpc.recordings'  # group of entry points: a function from a path to Demonstrations for every kind of file
LIMITS = {'mass': 1.25, 'drag': 4.0, 'margin': 3.0, 'cruise_speed': 1.5, 'slow_down': 2.0}  # factors; others: WIDEST
WIDEST = 5.0
REACHED = 0.1  # m from the goal, from which on a recorded state is none to start at
FRESH = 1_000_000  # added to the seed for the starts that a policy is judged by


@dataclass(frozen=True)
class Settings:
    """Numbers of a run."""

    updates: int = 30  # steps of the parameters
    episodes: int = 20  # of every update, the same ones
    steps: int = 60  # of an episode at most
    seed: int = 0  # of starts and noise
    noise: float = 0.0  # standard deviation of what the policy sees of every state (m, MRP, m/s, rad/s)
    clearance: float = 0.02  # m from every sphere's surface, below which the price begins
    price: float = 20.0  # of a step that touches a sphere; the reward of a step is 7.4 at most
    rate: float = 0.3  # alpha of deqmpc.training.gauss_newton, share of the Newton step
    momentum: float = 0.5  # beta, memory of gradients
    memory: float = 0.8  # eta, of Hessians
    step: float = 0.2  # farthest that log(theta) moves in one update

    def __post_init__(self):
        for name in ('updates', 'episodes', 'steps'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected an integer >= 1')
        for name in ('noise', 'price'):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number >= 0')
        for name in ('clearance', 'step'):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number > 0')

    def optimiser(self) -> gauss_newton.Settings:
        """Of the Gauss-Newton steps. The first curvature lets the first step of every parameter be `step`."""
        return gauss_newton.Settings(rate=self.rate, momentum=self.momentum, memory=self.memory, curvature_0=None)


@dataclass(frozen=True)
class Starts:
    """Where episodes begin."""

    x: Tensor  # (B, n)
    spheres: Spheres


@dataclass(frozen=True)
class Flown:
    """Episodes and what the policy did in them."""

    made: Rollouts
    alive: Tensor  # (B, N) bool: the step was taken
    calls: Calls  # of these steps, in the order of `alive`


@dataclass(frozen=True)
class Priced:
    """The task with the price on clearance: deqmpc.training.policy_gradient.Plant at the steps of `calls`."""

    task: Task
    calls: Calls
    settings: Settings

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """(S,) of the steps."""
        spheres, s = self.calls.spheres, self.settings
        gap = (spheres.centers - x[:, None, :3]).norm(dim=2) - spheres.radii
        missing = torch.where(spheres.radii > 0, 1.0 - gap / s.clearance, 0.0).clamp_min(0.0)
        return self.task.reward(x, u) - s.price * missing.square().sum(1)

    def reward_derivatives(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant."""
        n = x.shape[1]
        z = torch.cat([x, u], dim=1).requires_grad_()
        slope, = torch.autograd.grad(self.reward(z[:, :n], z[:, n:]).sum(), z, create_graph=True)
        bend = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in slope.unbind(1)]
        return slope.detach(), torch.stack(bend, dim=1)

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant."""
        return self.task.problem().phi.linearize(x, u)

    def curvature(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """See Plant."""
        return self.task.problem().phi.curvature(x, u, y)


class Recorder:
    """A planner that keeps its calls."""

    def __init__(self, planner: TunedPlanner):
        self.planner, self.calls = planner, []

    def plan(self, x: Tensor, spheres: Spheres, memory: Calls | None = None) -> Planned:
        """See deqmpc.planners.Planner."""
        made = self.planner.plan(x, spheres, memory)
        self.calls.append(made.memory)
        return made


class Tuner:
    """A run: parameters, what the optimiser remembers, and one line of the log for every update."""

    def __init__(self, tunable: Tunable, starts: Starts, settings: Settings, factors: Sequence[float]):
        for name, factor in zip(tunable.names, factors, strict=True):
            if not 1.0 < factor < math.inf:
                raise ValueError(f'limit of {name} = {factor!r}; expected a factor > 1')
        self.tunable, self.starts, self.settings = tunable, starts, settings
        far = torch.tensor([math.log(f) for f in factors], dtype=torch.float64)
        self.limits = gauss_newton.Limits(-far, far, torch.full_like(far, settings.step))
        self.z, self.state = torch.zeros_like(far), gauss_newton.start(len(far))

    @property
    def theta(self) -> Tensor:
        """(p,) in its own units."""
        return self.tunable.first * self.z.exp()

    def at_limit(self, theta: Tensor) -> list[str]:
        """The parameters of theta (p,) that are as far from where they began as they may be."""
        there = (theta / self.tunable.first).log().abs() >= self.limits.high - 1e-9
        return [name for name, is_there in zip(self.tunable.names, there.tolist(), strict=True) if is_there]

    def update(self) -> dict[str, Any]:
        """One update; what was found before it, and where it led."""
        theta = self.theta
        flown = fly(self.tunable, theta, self.starts, self.settings)
        found, share = self.estimate(theta, flown)
        g, H = theta * found.gradient, torch.outer(theta, theta) * found.gauss_newton  # d/dz = theta d/dtheta
        made = gauss_newton.update(self.z, g, H, self.state, self.settings.optimiser(), self.limits)
        self.z, self.state = made.theta, made.state
        row = {'update': self.state.count, 'objective': found.value, 'return': float(flown.made.returns.mean()),
               'failures': int(flown.made.failed.sum()), 'differentiable': share, 'gain': made.gain}
        for i, name in enumerate(self.tunable.names):
            row |= {name: float(theta[i]), f'{name} gradient': float(g[i]), f'{name} curvature': float(
                made.curvature[i]), f'{name} limited': bool(made.limited[i])}
        return row

    def estimate(self, theta: Tensor, flown: Flown) -> tuple[Estimate, float]:
        """J, gradient and Hessian by theta, and the share of steps at which the policy has derivatives."""
        task, alive, u = self.tunable.task, flown.alive, flown.made.u
        problem, plant = task.problem(), Priced(task, flown.calls, self.settings)
        pi = self.tunable.derivatives(theta, flown.calls)
        free = ((u[alive] > problem.u_low) & (u[alive] < problem.u_high)).unsqueeze(2)  # the others were clipped

        def of_steps(values):
            whole = values.new_zeros(*alive.shape, *values.shape[1:])
            whole[alive] = values
            return whole
        x = flown.made.x[:, :-1]
        episodes = Episodes(x, u, of_steps(plant.reward(x[alive], u[alive])), alive, of_steps(pi.by_x * free),
                            of_steps(pi.by_theta * free))
        return policy_gradient(episodes, plant), float(pi.ok.double().mean())


def fly(tunable: Tunable, theta: Tensor, starts: Starts, settings: Settings) -> Flown:
    """Episodes of the policy with theta (p,), with the same noise at every call."""
    recorder = Recorder(TunedPlanner(tunable, theta))
    made = rollout(tunable.task, recorder, starts.x, starts.spheres, **how(settings, settings.seed))
    alive = torch.arange(made.u.shape[1]) < made.length.unsqueeze(1)
    step, episode = alive.T.nonzero(as_tuple=True)  # the order of the calls
    order = torch.argsort(episode * alive.shape[1] + step)
    return Flown(made, alive, joined(recorder.calls)[order])


def how(settings: Settings, seed: int) -> dict[str, Any]:
    """Arguments of `rollout`."""
    return {'steps': settings.steps, 'disturbance': Disturbance(observation=settings.noise),
            'generator': torch.Generator().manual_seed(seed)}


# --- the command ----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Improve a policy's MPC parameters in closed loop."""
    argv = sys.argv[1:] if argv is None else argv
    a = _parser().parse_args(argv)
    torch.set_num_threads(a.threads)
    try:
        result = run(a, argv)
    except (ValueError, OSError) as error:
        print(f'deqmpc tune: {error}', file=sys.stderr)
        return 1
    if a.json:
        print(json.dumps(result, indent=2))
    else:
        _say(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog='deqmpc tune', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=sorted(n for n in tasks.TASKS if n.startswith('crazyflie')))
    p.add_argument('--parameters', nargs='+', required=True, metavar='NAME', help=f'some of: {", ".join(PARAMETERS)}')
    p.add_argument('--policy-file', type=Path, default=Path('config/policies/mpc_only.yaml'),
                   help='settings of mpc_only to begin with (%(default)s)')
    p.add_argument('--limit', nargs='+', action='extend', default=[], metavar='NAME=FACTOR',
                   help=f'how far a parameter may move, up or down; default: {_texts(LIMITS)}, others {WIDEST:g}')
    p.add_argument('--set', nargs='+', action='extend', default=[], metavar='NAME=VALUE',
                   help='numbers of the task, e.g. radius=0.15 spheres=60')
    p.add_argument('--recorded', nargs='+', type=Path, default=[], metavar='FLIGHT',
                   help='begin at states of these bags or demonstrations (.npz)')
    for f in fields(Settings):
        kind = {'int': int, 'float': float}[f.type]
        p.add_argument(f'--{f.name}', type=kind, default=f.default, help=f'default {f.default}')
    p.add_argument('--judge', type=int, default=50, metavar='EPISODES',
                   help='fresh ones, before and after (%(default)s)')
    p.add_argument('--out', type=Path, help='default: runs/tune/TASK-PARAMETERS-sSEED')
    p.add_argument('--restart', action='store_true', help='throw a run in --out away')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--json', action='store_true')
    return p


def run(a: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Tune as the command line says; what result.json holds. ValueError and OSError say what is wrong."""
    settings = Settings(**{f.name: getattr(a, f.name) for f in fields(Settings)})
    if a.judge < 2:
        raise ValueError(f'--judge {a.judge}; expected an integer >= 2')
    task = changed(tasks.make(a.task), a.set)
    given, frame = policy_of(a.policy_file)
    tunable = Tunable(task, given, frame, a.parameters)
    factors = limits_of(a.parameters, a.limit)
    folder = folder_of(a)
    starts, fresh = (drawn(task, count, seed, a.recorded) for count, seed in (
        (settings.episodes, settings.seed), (a.judge, settings.seed + FRESH)))
    tuner = Tuner(tunable, starts, settings, factors)
    about = {'task': a.task, 'set': a.set, 'policy': given, 'airframe': asdict(frame), 'parameters': a.parameters,
             'limits': factors, 'recorded': [str(p) for p in a.recorded], **asdict(settings)}
    log = Log(folder, about, a.restart)
    log.resume(tuner)
    begun = time.process_time()
    bar = tqdm(total=settings.updates, initial=tuner.state.count, desc=f'tune {a.task}', disable=None)
    while tuner.state.count < settings.updates:
        log.write(tuner, {**tuner.update(), 'cpu_s': round(time.process_time() - begun, 2)})
        bar.update()
    bar.close()
    words, theta = 'deqmpc tune ' + shlex.join(argv), log.best(a.parameters)
    tunable.write(folder / BEFORE, tunable.first, f'# What `{words}` began with.\n')
    tunable.write(folder, theta, f'# Made by `{words}`, commit {commit()}.\n')
    result = {'command': words, 'commit': commit(), **about, 'updates': tuner.state.count,
              'before': dict(zip(a.parameters, tunable.first.tolist(), strict=True)),
              'after': dict(zip(a.parameters, theta.tolist(), strict=True)),
              'curvature': {name: log.rows[-1][f'{name} curvature'] for name in a.parameters},
              'at_limit': tuner.at_limit(theta),
              **judged(task, folder / BEFORE, folder, fresh, settings), 'folder': str(folder)}
    whole_file.write_text(folder / RESULT, json.dumps(result, indent=2) + '\n')
    return result


def policy_of(path: Path) -> tuple[dict[str, Any], Airframe]:
    """Settings and airframe of a policy file. OSError and ValueError name the file that is missing or wrong."""
    given = yaml_file.load(path) or {}
    if not isinstance(given, dict):
        raise ValueError(f'{path} holds {type(given).__name__}; expected settings')
    name = given.pop('airframe', '')
    return given, Airframe.load(path.parent / name) if name else Airframe()


def limits_of(names: Sequence[str], given: Sequence[str]) -> list[float]:
    """The factor of every parameter. ValueError names a limit that cannot be used."""
    factors = {name: LIMITS.get(name, WIDEST) for name in names}
    for text in given:
        name, _, value = text.partition('=')
        if name not in factors:
            raise ValueError(f'--limit {text!r}; expected NAME=FACTOR with NAME one of {", ".join(names)}')
        try:
            factors[name] = float(value)
        except ValueError:
            raise ValueError(f'--limit {text!r}; expected NAME=FACTOR with a number') from None
    return [factors[name] for name in names]


def folder_of(a: argparse.Namespace) -> Path:
    """Of the run. ValueError where policies that fly are kept."""
    folder = a.out or Path('runs/tune') / f'{a.task}-{"-".join(a.parameters)}-s{a.seed}'
    if folder.resolve() == a.policy_file.resolve().parent or 'config' in folder.resolve().parts:
        raise ValueError(f'--out {folder}: policies there fly; expected a folder of its own')
    return folder


def judged(task: Task, before: Path, after: Path, starts: Starts, settings: Settings) -> dict[str, Any]:
    """Returns and failures of the policies of two folders, as they fly, from the same starts."""
    made = [rollout(task, flight_planner(task, folder), starts.x, starts.spheres,
                    **how(settings, settings.seed + FRESH)) for folder in (before, after)]
    gain = made[1].returns - made[0].returns
    low, high = bootstrap_mean(gain.numpy())
    return {'judged_episodes': len(gain), 'return_before': float(made[0].returns.mean()),
            'return_after': float(made[1].returns.mean()), 'gain': float(gain.mean()), 'gain_low': low,
            'gain_high': high, 'failures_before': int(made[0].failed.sum()),
            'failures_after': int(made[1].failed.sum())}


def drawn(task: Task, count: int, seed: int, recorded: Sequence[Path]) -> Starts:
    """At most `count` starts: the task's, or states of recorded flights on their way to the goal. OSError and
    ValueError name a file that is missing or cannot be used."""
    generator = torch.Generator().manual_seed(seed)
    if not recorded:
        return Starts(*task.sample(count, generator))
    found = [_states(task, path, 50 * count, generator) for path in recorded]  # most of a flight is hovering
    most = max(f.spheres.radii.shape[1] for f in found)
    x, spheres = torch.cat([f.x for f in found]), joined([padded(f.spheres, most) for f in found])
    order = torch.randperm(len(x), generator=generator)
    good = ~task.failed(x, spheres) & (x[:, :3].norm(dim=1) > REACHED)
    usable = order[good[order]][:count]
    if len(usable) == 0:
        raise ValueError(f'{", ".join(map(str, recorded))}: every state drawn is inside a sphere, on the ground or '
                         f'within {REACHED} m of the goal')
    return Starts(x[usable], spheres[usable])


def _states(task: Task, path: Path, count: int, generator: torch.Generator) -> Starts:
    """Random states of one recording, with the spheres as they were."""
    d = datasets.load(path) if path.suffix == '.npz' else read_recording(path)
    if d.states.shape[1] != task.equations.n:
        raise ValueError(f'{path}: states of {d.states.shape[1]} numbers; those of {task.name} have '
                         f'{task.equations.n}')
    trajectories, first = datasets.draw(d, np.arange(len(d.lengths)), count, generator)
    seen = datasets.windows(d, task, trajectories, first, 1)
    return Starts(seen.x[:, 0], seen.spheres(0))


def read_recording(path: Path) -> Demonstrations:
    """A bag by the package that knows bags. ValueError where it is not installed."""
    readers = {e.name: e for e in entry_points(group=READERS)}
    if 'bag' not in readers:
        raise ValueError(f'{path}: reading bags needs the package flight_log; expected it installed, or a file .npz')
    return readers['bag'].load()(path)


def padded(spheres: Spheres, count: int) -> Spheres:
    """With absent spheres (radius 0) up to `count`."""
    missing = count - spheres.radii.shape[1]
    return Spheres(*(torch.nn.functional.pad(v, (0, 0, 0, missing)) for v in (spheres.centers, spheres.velocity)),
                   torch.nn.functional.pad(spheres.radii, (0, missing)))


class Log:
    """log.csv and state.json of a run. `about` says which run it is; ValueError where the folder holds another."""

    def __init__(self, folder: Path, about: dict[str, Any], restart: bool):
        self.folder, self.about, self.rows = folder, json.loads(json.dumps(about)), []
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            (folder / STATE).unlink(missing_ok=True)

    def resume(self, tuner: Tuner) -> None:
        """Take what the folder holds, if anything."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            old = json.loads(path.read_text())
            was = old['about']
            z, momentum, hessian = (torch.tensor(old[k], dtype=torch.float64) for k in ('z', 'momentum', 'hessian'))
            state = gauss_newton.State(len(old['rows']), momentum, hessian)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}: not the state of a run ({error}); give another --out, or --restart') from error
        differ = [k for k in self.about if k != 'updates' and was.get(k) != self.about[k]]
        if differ:
            raise ValueError(f'{path} is of another run, with other {", ".join(differ)}; give another --out, or '
                             f'--restart')
        tuner.z, tuner.state, self.rows = z, state, old['rows']

    def best(self, names: Sequence[str]) -> Tensor:
        """(p,) the parameters with which J was largest."""
        row = max(self.rows, key=lambda row: row['objective'])
        return torch.tensor([row[name] for name in names], dtype=torch.float64)

    def write(self, tuner: Tuner, row: dict[str, Any]) -> None:
        """One update more."""
        self.rows.append(row)
        with whole_file.replacing(self.folder / LOG) as part, part.open('w', newline='') as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        whole_file.write_text(self.folder / STATE, json.dumps({
            'about': self.about, 'z': tuner.z.tolist(), 'momentum': tuner.state.momentum.tolist(),
            'hessian': tuner.state.hessian.tolist(), 'rows': self.rows}))


def _texts(values: dict[str, float]) -> str:
    return ' '.join(f'{k}={v:g}' for k, v in values.items())


def _say(r: dict[str, Any]) -> None:
    """The result for a reader."""
    print(f'  {"":<16} {"before":>9}    {"after":<9} curvature of J by log(it)')
    for name in r['before']:
        print(f'  {name:<16} {r["before"][name]:9.5g} -> {r["after"][name]:<9.5g} {r["curvature"][name]:.3g}'
              f'{", at its limit" if name in r["at_limit"] else ""}')
    print(f'  {r["judged_episodes"]} fresh episodes of {r["steps"]} steps: return {r["return_before"]:.3f} -> '
          f'{r["return_after"]:.3f}, gain {r["gain"]:.3f} (95 %: {r["gain_low"]:.3f} to {r["gain_high"]:.3f}); '
          f'failures {r["failures_before"]} -> {r["failures_after"]}')
    if not r['gain_low'] > 0.0:
        print('  not better beyond chance')
    print(f'  to fly it: deqmpc trial sim --in-process policy:=mpc_only policy_file:={r["folder"]}/{POLICY_FILE}')


if __name__ == '__main__':
    sys.exit(main())
