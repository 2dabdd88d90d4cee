"""Dataset aggregation: the expert's answers at the states that a policy leads itself to.

A policy that imitates trajectories leaves them by small errors and is then where no trajectory tells the way back.
DAgger (Ross, Gordon and Bagnell, AISTATS 2011) asks the expert there. Episodes begin as the task's do. In every state
x_t the problem of deqmpc.experts is solved over a shorter horizon,

  from the answer before, shifted, and at every `fresh`-th time from the recipe's first guesses too; the least cost wins

and every `turn` steps it is drawn who flies on: the expert, with the probability `share` and with noise of `noise`
times half the range on its inputs (Laskey et al., DART, CoRL 2017), or the policy. Without a policy: the expert.

The first states of every answer that is exact and touches no sphere join the demonstrations as restarts: they stand
behind nominal ones that train, so that those that validate stay apart.

On qpole 40 knots from x_t are as good as 160 (closed loop of this expert: the same returns with 30, 40 and 60).

  python -m deqmpc.training.aggregate qpole models/qpole/deq_mpc_deq --demonstrations runs/experts/qpole.npz \\
      --output runs/experts/qpole_1.npz --episodes 100
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deqmpc import datasets, experts, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.experts import Trajectory
from deqmpc.planners import ModelPlanner, Planner, load_model, rows_of
from deqmpc.policies import model as model_folder
from deqmpc.provenance import commit, sha256
from deqmpc.realtime import RealtimeSolver
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.tasks import Spheres, Task

EXACT = 1e-6  # largest defect of an answer


@dataclass(frozen=True)
class Settings:
    """What to ask the expert."""

    episodes: int = 100
    steps: int = 200  # of an episode
    turn: int = 10  # steps after which it is drawn who flies on
    share: float = 0.3  # probability that it is the expert
    noise: float = 0.1  # standard deviation on the expert's inputs, as a share of half their range
    fresh: int = 5  # steps after which first guesses are tried again
    horizon: int = 40  # steps that the expert plans
    length: int = 8  # states that are kept of it: a window of the training, horizon + 1 + streaming
    seed: int = 1  # of starts; demonstrations begin with 0
    split_seed: int = 0  # which demonstrations validate

    def __post_init__(self):
        if not (0.0 <= self.share <= 1.0 and 0.0 <= self.noise < float('inf')):
            raise ValueError(f'share = {self.share!r}, noise = {self.noise!r}; expected a probability and a number '
                             f'>= 0')
        for name, least in (('episodes', 1), ('steps', 1), ('turn', 1), ('fresh', 1), ('length', 1),
                            ('horizon', self.length)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f'{name} = {value!r}; expected an integer >= {least}')


class Expert:
    """The expert of a task's recipe, batched, in the receding horizon."""

    def __init__(self, task: Task, settings: Settings):
        self.task, self.settings = task, settings
        self.recipe = replace(experts.RECIPES[task.name], horizon=settings.horizon)
        self.problem = experts.replanned(task.problem(settings.horizon), self.recipe)
        self._solver = RealtimeSolver(self.problem, max(task.spheres, 1), replace(
            experts.SOLVERS['realtime'], tolerance=EXACT, elastic=self.recipe.elastic))
        self._random = np.random.default_rng(settings.seed)

    def fresh(self, x: Tensor, spheres: Spheres) -> al.Solution:
        """The best answers from the recipe's guesses, for x (B, n)."""
        guesses = [list(self.recipe.guesses(self.task, state.numpy(), self.settings.horizon, self._random))
                   for state in x]
        found = [self._solve(x, spheres, *(torch.from_numpy(np.stack(v)) for v in zip(*kth, strict=True)))
                 for kth in zip(*guesses, strict=True)]
        return functools.reduce(better, found)

    def continued(self, x: Tensor, spheres: Spheres, before: al.Solution) -> al.Solution:
        """The answers at x (B, n), a step after those `before`."""
        old = before.warm_start.shifted()
        moved = old.x - self.task.turns(old.x[:, :1] - x.unsqueeze(1))
        return self._solve(x, spheres, torch.cat([x.unsqueeze(1), moved[:, 1:]], dim=1), old.u)

    def _solve(self, x, spheres, plan, u) -> al.Solution:
        """From a guess, to the goal that it leads to, past spheres as they move beside it."""
        task, T = self.task, self.settings.horizon
        goal = task.nearest_goal(plan[:, -1]).unsqueeze(1).expand(-1, T + 1, -1)
        data = self.problem.instances(x, goal, task.u_ref.expand(len(x), T, -1), task.motion(spheres, plan)[0],
                                      spheres.inflated(task.margin + self.recipe.clearance))
        return self._solver.solve_batch(data, al.guess(self.problem, data, plan, u, al.Settings()))

    def trajectories(self, found: al.Solution, spheres: Spheres) -> list[Trajectory]:
        """What is kept of the answers that are exact and outside the spheres."""
        k = self.settings.length
        x, u = found.x[:, :k], found.u[:, :k]
        centers, velocity = self.task.motion(spheres, x)
        good = found.defect <= EXACT
        if spheres.radii.shape[1]:
            distance = torch.linalg.vector_norm(centers - x[:, :, None, self.problem.position], dim=-1)
            good &= (distance >= spheres.radii.unsqueeze(1)).flatten(1).all(dim=1)
        kept = (v[good].numpy() for v in (x, u, centers, velocity, spheres.radii))
        return [Trajectory(*parts, 0.0) for parts in zip(*kept, strict=True)]


def better(a: al.Solution, b: al.Solution) -> al.Solution:
    """Of every sample the exact answer, of two such the one with less cost."""
    def price(s):
        return torch.where(s.defect <= EXACT, s.cost, torch.inf)
    first = price(a) <= price(b)

    def chosen(one, other):
        return torch.where(first.view(-1, *[1] * (one.dim() - 1)), one, other)
    parts = {f.name: chosen(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != 'warm_start'}
    warm = al.WarmStart(*map(chosen, a.warm_start.tensors(), b.warm_start.tensors()))
    return al.Solution(warm_start=warm, **parts)


def answers(task: Task, planner: Planner | None, settings: Settings,
            progress: bool = False) -> tuple[list[Trajectory], int]:
    """The expert's answers along episodes that it and the planner fly in turns, and how many it was asked for."""
    s, generator = settings, torch.Generator().manual_seed(settings.seed)
    x, spheres = task.sample(s.episodes, generator)
    expert, made, asked, before, memory = Expert(task, s), [], 0, None, None
    low, high = expert.problem.u_low, expert.problem.u_high
    for t in tqdm(range(s.steps), desc=task.name, disable=None if progress else True):
        x = task.wrapped(x)
        found = None if before is None else expert.continued(x, spheres, before)
        if found is None or t % s.fresh == 0:
            fresh = expert.fresh(x, spheres)
            found = fresh if found is None else better(found, fresh)
        made += expert.trajectories(found, spheres)
        asked += len(x)
        if t % s.turn == 0:
            flies = torch.rand(len(x), generator=generator) < (s.share if planner is not None else 1.0)
        noise = s.noise * 0.5 * (high - low) * torch.randn(len(x), len(low), generator=generator, dtype=x.dtype)
        u = torch.where((found.defect <= EXACT).unsqueeze(1), found.u[:, 0], task.u_ref) + noise
        if planner is not None:
            planned = planner.plan(x, spheres, memory)
            memory, u = planned.memory, torch.where(flies.unsqueeze(1), u, planned.u)
        x = task.step(x, u)
        spheres = task.move(spheres, x)
        going = ~task.failed(x, spheres)
        if not going.any():
            break
        rows = going.nonzero()[:, 0]
        x, spheres, flies, before = x[rows], spheres[rows], flies[rows], rows_of(found, rows)
        memory = None if memory is None else memory[rows]
    return made, asked


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
    a = parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        run(a, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc.training.aggregate: {error}', file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; `run` takes what it parses."""
    p = argparse.ArgumentParser(prog='deqmpc.training.aggregate', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=sorted(experts.RECIPES))
    p.add_argument('model', nargs='?', type=Path, help='folder of the policy; left out: the expert flies')
    p.add_argument('--demonstrations', type=Path, required=True, help='file to add to')
    p.add_argument('--output', type=Path, required=True)
    for name, default in asdict(Settings()).items():
        p.add_argument(f'--{name.replace("_", "-")}', type=type(default), default=default,
                       help=f'default {default}')
    return p


def run(a: argparse.Namespace, argv: list[str]) -> Demonstrations:
    """Do what the command line says. ValueError and FileNotFoundError say what is wrong."""
    settings = Settings(**{name: getattr(a, name) for name in asdict(Settings())})
    task, given = tasks.make(a.task), datasets.load(a.demonstrations)
    planner = ModelPlanner(task, load_model(a.model, task)) if a.model else None
    made, asked = answers(task, planner, settings, progress=True)
    if not made:
        raise ValueError(f'{a.task}: the expert has no answer at any of {asked} states')
    about = {**asdict(settings), 'command': 'python -m deqmpc.training.aggregate ' + shlex.join(argv),
             'commit': commit(), 'asked': asked, 'answered': len(made),
             **({'weights_sha256': sha256(a.model / model_folder.WEIGHTS)} if a.model else {})}
    whole = joined(given, made, settings.split_seed)
    whole = replace(whole, about={**whole.about, 'aggregated': [*whole.about.get('aggregated', []), about]})
    datasets.save(a.output, whole)
    print(f'{a.output}: {len(made)} answers at {asked} states joined {len(given.lengths)} trajectories')
    return whole


if __name__ == '__main__':
    sys.exit(main())
