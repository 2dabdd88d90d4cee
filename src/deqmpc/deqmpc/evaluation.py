"""What a policy is worth: returns, failures, violations and times over rollouts, and its error on demonstrations.

  return R          mean over rollouts of the sum of rewards, with its standard error
  normalised        R / R_expert where rewards are gains; R_expert / R where they are costs (the best is 0). 1: as good
                    as the expert, more is better
  failures          with the 95 % interval of Wilson (1927) for their share
  violating plans   plans that leave a bound, or enter a sphere, by more than 1e-3 at a knot; of the spheres
                    themselves, without the margin that policies keep
  validation error  of a model: mean over windows of the validation trajectories of sum |x^N - x_expert| over knots and
                    states, x^N the last iterate: of cold plans, and of those streamed along the expert
                    (deqmpc.training.imitation, for every variant the same)

R_expert is the mean over the demonstrations the rollouts start from (at most as many as there are, those of the
validation split first), or over all of them where the rollouts start elsewhere.

  deqmpc evaluate-policy models/quadrotor --demonstrations ../shared/data/experts/quadrotor.npz
  deqmpc evaluate-policy models/crazyflie_obs --noise 0.001 --dropout 0.05 --set radius=0.15 spheres=60
  deqmpc evaluate-policy mpc_only --task crazyflie_obs --json
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from deqmpc import datasets, tasks
from deqmpc.baselines import GoalPlanner, MpcOnlyPlanner
from deqmpc.datasets import Demonstrations
from deqmpc.planners import ModelPlanner, Planner, load_model
from deqmpc.policies import model as model_folder
from deqmpc.policies.base import settings_from
from deqmpc.policies.deq_mpc import DeqMpc
from deqmpc.policies.network_only import NetworkOnly
from deqmpc.provenance import commit
from deqmpc.rollouts import Disturbance, GoalChange, Rollouts, rollout
from deqmpc.shooting import ShootingPlanner
from deqmpc.statistics import wilson
from deqmpc.tasks import Spheres, Task
from deqmpc.training.imitation import Settings as TrainingSettings
from deqmpc.training.imitation import Trainer

VIOLATION = 1e-3  # m or units of the bound: what a plan may leave its constraints by
BASELINES = {'mpc_only': MpcOnlyPlanner, 'goal': GoalPlanner, 'shooting': ShootingPlanner}


@dataclass(frozen=True)
class Scores:
    """What a planner reached on a task."""

    rollouts: int
    steps: int  # taken, of all rollouts
    mean_return: float
    standard_error: float  # of mean_return
    expert_return: float | None  # None: not known
    normalised: float | None  # see the top of the file; None without an expert
    normalised_error: float | None  # its standard error, the expert's mean taken as exact
    failures: int
    failure_share: float
    failure_low: float  # ends of its 95 % interval
    failure_high: float
    success_share: float
    final_reward: float  # mean reward of the last step of rollouts that did not end early; NaN where all did
    plans: int  # finite ones
    unplanned: int  # steps without a finite plan
    violating_plans: int
    largest_plan_violation: float
    largest_plan_defect: float  # largest violation of the dynamics by a plan
    violating_rollouts: int  # that left a bound or entered a sphere by more than 1e-3
    seconds_per_step: float  # of planning, of one rollout as a share of the batch


def scores(task: Task, made: Rollouts, expert_return: float | None = None) -> Scores:
    """The scores of rollouts. `expert_return` is the expert's mean."""
    R, B = made.returns, len(made.length)
    mean, error = float(R.mean()), float(R.std() / math.sqrt(B)) if B > 1 else float('nan')
    ratio = None if expert_return is None else normalised(task, mean, expert_return)
    failures, full = int(made.failed.sum()), made.length == made.reward.shape[1]
    low, high = wilson(failures, B)
    violation, defect = made.plan_violation[made.planned], made.plan_defect[made.planned]
    return Scores(
        rollouts=B, steps=int(made.length.sum()), mean_return=mean, standard_error=error,
        expert_return=expert_return, normalised=ratio,
        normalised_error=None if ratio is None else abs(ratio * error / mean) if mean else float('nan'),
        failures=failures, failure_share=failures / B, failure_low=low, failure_high=high,
        success_share=float(made.succeeded.double().mean()), final_reward=float(made.reward[full, -1].mean()),
        plans=int(made.planned.sum()), unplanned=int(made.unplanned.sum()),
        violating_plans=int((violation > VIOLATION).sum()), largest_plan_violation=_largest(violation),
        largest_plan_defect=_largest(defect), violating_rollouts=int((made.violation > VIOLATION).sum()),
        seconds_per_step=made.seconds_per_step)


def evaluate(task: Task, planner: Planner, x: Tensor, spheres: Spheres | None = None,
             expert_return: float | None = None, **how) -> Scores:
    """Scores of `planner` from the starts x (B, n); `how` goes to deqmpc.rollouts.rollout."""
    return scores(task, rollout(task, planner, x, spheres, **how), expert_return)


def normalised(task: Task, mean: float, expert: float) -> float:
    """Return as a share of the expert's: mean / expert; expert / mean for tasks whose best reward is 0."""
    above, below = (expert, mean) if task.best_reward == 0.0 else (mean, expert)
    return above / below if below else float('nan')


def expert_returns(task: Task, demonstrations: Demonstrations) -> np.ndarray:
    """(N,) return of every demonstration: the rewards of its first task.steps states. Where it is shorter, what
    follows counts 0 in tasks that end by success, and else as its last state, at which the experts rest."""
    d, short = demonstrations, demonstrations.lengths - task.steps
    r = task.reward(torch.from_numpy(d.states.astype(float)), torch.from_numpy(d.controls.astype(float))).numpy()
    taken = np.array([r[a:a + min(length, task.steps)].sum() for a, length in zip(d.first, d.lengths, strict=True)])
    return taken if task.hold else taken + np.maximum(-short, 0) * r[d.first + d.lengths - 1]


def episodes_of(demonstrations: Demonstrations, split_seed: int) -> np.ndarray:
    """The trajectories that begin as episodes do (all but restarts), those of the validation split first."""
    train, valid = datasets.split(demonstrations, split_seed)
    order = np.concatenate([valid, train])
    return order[~demonstrations.restart[order]]


def validation_error(model: DeqMpc | NetworkOnly, task: Task, demonstrations: Demonstrations, split_seed: int = 0,
                     streaming: int = 2, windows: int = 500) -> dict[str, float]:
    """`cold` and `streamed` errors over random windows of the validation trajectories, the same ones for all models,
    and how many plans were not finite."""
    settings = TrainingSettings(split_seed=split_seed, streaming=streaming)
    found = Trainer(task, model, demonstrations, settings).validate(windows)
    counts = found.counts or {}
    return {'cold': found.cold, 'streamed': found.streamed, 'windows': windows,
            'not_finite': counts.get('network_not_finite', 0) + counts.get('solver_not_finite', 0)}


def changed(task: Task, changes: list[str], where: str = '--set') -> Task:
    """The task with NAME=VALUE applied. ValueError names what is unknown or of the wrong type."""
    given = {f.name: getattr(task, f.name) for f in fields(task)}
    for text in changes:
        name, sign, value = text.partition('=')
        if not sign:
            raise ValueError(f'{where} {text!r}; expected NAME=VALUE')
        given[name] = yaml.safe_load(value)
    return settings_from(type(task), given, f'{where}: task {task.name}')


def main(argv: list[str] | None = None) -> int:
    """Score a policy on a task: returns, failures, violations, validation error."""
    a = _parser().parse_args(argv)
    torch.set_num_threads(a.threads)
    try:
        report = run(a)
        if a.write_card:
            write_card(Path(a.model), report, sys.argv[1:] if argv is None else argv)
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc evaluate-policy: {error}', file=sys.stderr)
        return 1
    if a.json:
        print(json.dumps(_json(report), indent=2))
    else:
        _say(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog='deqmpc evaluate-policy', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', help='a model folder, or a planner without a network: ' + ', '.join(BASELINES))
    p.add_argument('--task', choices=sorted(tasks.TASKS), help="default: the model card's")
    p.add_argument('--rollouts', type=int, default=200)
    p.add_argument('--seed', type=int, default=0, help='of starts, noise and drop-outs')
    p.add_argument('--steps', type=int, help="of an episode; default: the task's")
    p.add_argument('--iterations', type=int, default=0, help="of a cold start; 0: the model's")
    p.add_argument('--warm-iterations', type=int, default=0, help="of every later step; 0: the model's")
    p.add_argument('--no-finish', action='store_true', help='fly plans that have not converged as they are')
    p.add_argument('--noise', type=float, nargs='+', default=[0.0], metavar='S',
                   help='standard deviation of what is seen: one number for all states, or one for each')
    p.add_argument('--process-noise', type=float, nargs='+', default=[0.0], metavar='S',
                   help='standard deviation of what pushes the state in every step')
    p.add_argument('--dropout', type=float, default=0.0, metavar='P', help='share of observations that do not arrive')
    p.add_argument('--goal', type=float, nargs='+', metavar='M', help='move the goal by this (m)')
    p.add_argument('--goal-at', type=int, default=0, metavar='STEP', help='from this step on')
    p.add_argument('--set', nargs='+', action='extend', default=[], metavar='NAME=VALUE',
                   help='numbers of the task, e.g. radius=0.15 spheres=60 u_high=16')
    p.add_argument('--demonstrations', type=Path, help='file to normalise, start and validate with')
    p.add_argument('--starts', choices=('demonstrations', 'fresh'),
                   help='default: demonstrations where there are any and nothing is set')
    p.add_argument('--split-seed', type=int, help="default: the model card's, or 0")
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--write-card', action='store_true', help="add the scores to the model's card")
    p.add_argument('--json', action='store_true')
    return p


def run(a: argparse.Namespace) -> dict[str, Any]:
    """The report of a parsed command line. ValueError and FileNotFoundError say what is wrong."""
    if a.rollouts < 1 or (a.steps is not None and a.steps < 1):
        raise ValueError(f'--rollouts {a.rollouts} --steps {a.steps}; expected integers >= 1')
    if a.write_card and a.model in BASELINES:
        raise ValueError(f'--write-card with {a.model}; expected a model folder, which has a card')
    card = {} if a.model in BASELINES else model_folder.load(a.model).card
    name = a.task or card.get('task')
    if name not in tasks.TASKS:
        raise ValueError(f'{a.model}: task {name!r}; expected --task with one of {", ".join(sorted(tasks.TASKS))}')
    task = changed(tasks.make(name), a.set)
    learned = None if a.model in BASELINES else load_model(a.model, task)
    planner = BASELINES[a.model](task) if learned is None else ModelPlanner(
        task, learned, a.iterations, a.warm_iterations, finish=not a.no_finish)
    split_seed = card.get('split_seed', 0) if a.split_seed is None else a.split_seed
    d = datasets.load(a.demonstrations) if a.demonstrations else None
    generator = torch.Generator().manual_seed(a.seed)
    x, spheres, expert, whence = _starts(a, task, d, split_seed, generator)
    disturbance = Disturbance(_numbers(a.process_noise), _numbers(a.noise), a.dropout)
    found = evaluate(task, planner, x, spheres, expert, steps=a.steps, disturbance=disturbance, generator=generator,
                     change=GoalChange(tuple(a.goal), a.goal_at) if a.goal else None, progress=True)
    report = {'model': str(a.model), 'task': name, 'set': a.set, 'seed': a.seed, 'starts': whence,
              'iterations': a.iterations, 'warm_iterations': a.warm_iterations, 'finish': not a.no_finish,
              **asdict(disturbance),
              'goal': a.goal, **asdict(found)}
    if d is not None and learned is not None:
        report['validation_error'] = validation_error(learned, task, d, split_seed)
    return report


_ON_CARD = ('rollouts', 'starts', 'seed', 'mean_return', 'standard_error', 'expert_return', 'normalised',
            'normalised_error', 'failures', 'failure_low', 'failure_high', 'violating_plans', 'unplanned',
            'seconds_per_step')


def write_card(folder: Path, report: dict[str, Any], argv: list[str]) -> None:
    """Add the report of a command to a model's card, in place of what the same command has put there before."""
    made = model_folder.load(folder)
    command = 'deqmpc evaluate-policy ' + shlex.join(word for word in argv if word != '--write-card')
    score = {'command': command, 'commit': commit(), **{k: _rounded(report[k]) for k in _ON_CARD}}
    if 'validation_error' in report:
        score['validation_error'] = {k: _rounded(v) for k, v in report['validation_error'].items()}
    others = [s for s in made.card.get('scores', []) if s['command'] != command]
    model_folder.save(folder, replace(made, card={**made.card, 'scores': [*others, score]}))


def _rounded(value):
    return float(f'{value:.5g}') if isinstance(value, float) else value


def _starts(a, task, d, split_seed, generator) -> tuple[Tensor, Spheres, float | None, str]:
    """Starts, spheres, the expert's mean return, and where they come from."""
    if a.starts == 'demonstrations' and d is None:
        raise ValueError('--starts demonstrations; expected --demonstrations FILE with it')
    expert, episodes = None, None if d is None else episodes_of(d, split_seed)
    if d is not None and (a.starts == 'demonstrations' or (a.starts is None and not a.set)):
        episodes = episodes[:a.rollouts]
        x, spheres = d.starts(episodes)
        if spheres.radii.shape[1] == 0:
            spheres = Spheres.none(len(x), task.spatial)
        return x, spheres, float(expert_returns(task, d)[episodes].mean()), 'demonstrations'
    if d is not None:
        expert = float(expert_returns(task, d)[episodes].mean())
    return *task.sample(a.rollouts, generator), expert, 'fresh'


def _numbers(given: list[float]) -> float | tuple[float, ...]:
    return given[0] if len(given) == 1 else tuple(given)


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _json(value):
    """`value` with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(r: dict[str, Any]) -> None:
    """The report for a reader."""
    print(f'{r["model"]} on {r["task"]} {" ".join(r["set"])}: {r["rollouts"]} rollouts, {r["starts"]} starts, seed '
          f'{r["seed"]}')
    print(f'  return            {r["mean_return"]:.2f} +- {r["standard_error"]:.2f}')
    if r['expert_return'] is not None:
        print(f'  of the expert\'s   {r["normalised"]:.4f} +- {r["normalised_error"]:.4f} ({r["expert_return"]:.2f})')
    print(f'  failures          {r["failures"]} ({100 * r["failure_share"]:.1f} %, 95 %: '
          f'{100 * r["failure_low"]:.1f}..{100 * r["failure_high"]:.1f} %)')
    print(f'  successes         {100 * r["success_share"]:.1f} %; mean last reward {r["final_reward"]:.4f}')
    print(f'  plans             {r["plans"]}, {r["unplanned"]} steps without one')
    print(f'  violating plans   {r["violating_plans"]}, largest {r["largest_plan_violation"]:.2e}; defect '
          f'{r["largest_plan_defect"]:.2e}; {r["violating_rollouts"]} rollouts')
    print(f'  time a step       {1e6 * r["seconds_per_step"]:.0f} us in a batch of {r["rollouts"]}')
    if 'validation_error' in r:
        v = r['validation_error']
        print(f'  validation error  {v["cold"]:.4f} cold, {v["streamed"]:.4f} streamed')


if __name__ == '__main__':
    sys.exit(main())
