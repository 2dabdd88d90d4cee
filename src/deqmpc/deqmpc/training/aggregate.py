"""Dataset aggregation: the expert's answers at the states that a policy leads itself to.

A policy that imitates trajectories leaves them by small errors and is then where no trajectory tells the way back.
DAgger (Ross, Gordon and Bagnell, AISTATS 2011) asks the expert there: episodes begin as the task's do and are flown by
the policy up to a random step,

  t = floor(steps v^2)      v uniform: more early; 5 steps before its end, where an episode has failed before

and from x_t on the expert of deqmpc.experts plans, with a shorter horizon. Its trajectories join the demonstrations as
restarts: they stand behind nominal ones that train, so that those that validate stay apart.

  python -m deqmpc.training.aggregate qpole models/qpole/deq_mpc_deq --demonstrations runs/experts/qpole.npz \\
      --output runs/experts/qpole_1.npz --trajectories 500
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deqmpc import datasets, experts, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.experts import Trajectory
from deqmpc.planners import ModelPlanner, Planner, load_model
from deqmpc.policies import model as model_folder
from deqmpc.provenance import commit, sha256
from deqmpc.rollouts import rollout
from deqmpc.tasks import Spheres, Task

BEFORE_FAILURE = 5  # steps


@dataclass(frozen=True)
class Settings:
    """What to ask the expert."""

    trajectories: int = 500  # episodes, each with one answer of the expert
    steps: int = 60  # of an episode at most, before the expert is asked
    horizon: int = 80  # steps that the expert plans
    length: int = 50  # steps that are kept of it
    seed: int = 1  # of starts and steps; demonstrations begin with 0
    split_seed: int = 0  # which demonstrations validate

    def __post_init__(self):
        for name, least in (('trajectories', 1), ('steps', 0), ('length', 1), ('horizon', self.length)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f'{name} = {value!r}; expected an integer >= {least}')


def visited(task: Task, planner: Planner | None, settings: Settings) -> tuple[Tensor, Spheres]:
    """A state (B, n) of every episode and the spheres then. Without a planner: the episodes' first states."""
    generator = torch.Generator().manual_seed(settings.seed)
    x, spheres = task.sample(settings.trajectories, generator)
    share = torch.rand(len(x), generator=generator, dtype=torch.float64)
    if planner is None or settings.steps == 0:
        return x, spheres
    made = rollout(task, planner, x, spheres, steps=settings.steps)
    last = torch.where(made.failed, (made.length - BEFORE_FAILURE).clamp_min(0), settings.steps - 1)
    at = torch.minimum((settings.steps * share.square()).long(), last)
    centers, velocity = spheres.centers.clone(), spheres.velocity.clone()
    for t in range(1, int(at.max()) + 1):
        spheres = task.move(spheres, made.x[:, t])
        now = at == t
        centers[now], velocity[now] = spheres.centers[now], spheres.velocity[now]
    return made.x[torch.arange(len(x)), at], Spheres(centers, velocity, spheres.radii)


def answers(task: Task, x: Tensor, spheres: Spheres, settings: Settings) -> Iterator[Trajectory | None]:
    """The expert's trajectory from every state of x (B, n), None where it finds none."""
    recipe = replace(experts.RECIPES[task.name], horizon=settings.horizon, length=settings.length, rest=math.inf)
    planner, random = experts.Planner(task, recipe), np.random.default_rng(settings.seed)
    for i, state in enumerate(task.wrapped(x)):
        yield planner.plan(state[None], spheres[i:i + 1], random, experts.GRACE)[0]


def joined(demonstrations: Demonstrations, made: list[Trajectory], split_seed: int) -> Demonstrations:
    """The demonstrations with the trajectories as restarts behind nominal ones that train, evenly."""
    d = demonstrations
    train, _ = datasets.split(d, split_seed)
    nominal = train[~d.restart[train]]
    behind = {i: made[k::len(nominal)] for k, i in enumerate(nominal)}
    parts: dict[str, list] = {name: [] for name in ('states', 'controls', 'lengths', 'centers', 'velocity', 'radii',
                                                    'restart')}
    for i, (first, length) in enumerate(zip(d.first, d.lengths, strict=True)):
        rows = slice(first, first + length)
        around = rows if d.moving else slice(i, i + 1)
        _append(parts, d.states[rows], d.controls[rows], d.centers[around], d.velocity[around], d.radii[i],
                d.restart[i])
        for t in behind.get(i, []):
            keep = slice(None) if d.moving else slice(1)
            _append(parts, t.x, t.u, t.centers[keep], t.velocity[keep], t.radii, True)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    return Demonstrations(**{name: whole[name].astype(getattr(d, name).dtype) for name in whole}, about=d.about)


def _append(parts, x, u, centers, velocity, radii, restart) -> None:
    for name, value in (('states', x), ('controls', u), ('lengths', [len(x)]), ('centers', centers),
                        ('velocity', velocity), ('radii', radii[None]), ('restart', [restart])):
        parts[name].append(np.asarray(value))


def main(argv: list[str] | None = None) -> int:
    """Add the expert's answers at a policy's states to demonstrations."""
    argv = sys.argv[1:] if argv is None else argv
    a = _parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        run(a, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc.training.aggregate: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog='deqmpc.training.aggregate', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=sorted(experts.RECIPES))
    p.add_argument('model', nargs='?', type=Path, help='folder of the policy; left out: the expert from first states')
    p.add_argument('--demonstrations', type=Path, required=True, help='file to add to')
    p.add_argument('--output', type=Path, required=True)
    for name, default in asdict(Settings()).items():
        p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default, help=f'default {default}')
    return p


def run(a: argparse.Namespace, argv: list[str]) -> Demonstrations:
    """Do what the command line says. ValueError and FileNotFoundError say what is wrong."""
    settings = Settings(**{name: getattr(a, name) for name in asdict(Settings())})
    task, given = tasks.make(a.task), datasets.load(a.demonstrations)
    planner = ModelPlanner(task, load_model(a.model, task)) if a.model else None
    x, spheres = visited(task, planner, settings)
    known = torch.isfinite(x).all(dim=1).nonzero()[:, 0]
    found = list(tqdm(answers(task, x[known], spheres[known], settings), total=len(known), disable=None, desc=a.task))
    made = [t for t in found if t is not None]
    if not made:
        raise ValueError(f'{a.task}: the expert has no answer at any of {len(x)} states')
    digest = sha256(a.model / model_folder.WEIGHTS) if a.model else ''
    about = {**asdict(settings), 'command': 'python -m deqmpc.training.aggregate ' + shlex.join(argv),
             'commit': commit(), 'answered': len(made), 'weights_sha256': digest}
    whole = joined(given, made, settings.split_seed)
    whole = replace(whole, about={**whole.about, 'aggregated': [*whole.about.get('aggregated', []), about]})
    datasets.save(a.output, whole)
    print(f'{a.output}: {len(made)} answers at {len(x)} states joined {len(given.lengths)} trajectories')
    return whole


if __name__ == '__main__':
    sys.exit(main())
