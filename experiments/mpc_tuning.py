"""Gauss-Newton tuning: with a wrong mass and drag in the MPC's model, it wins back half of the lost return.

The claim is issue 7's, the method Brandner, Gros and Lucia's (deqmpc.training.gauss_newton). The model of `mpc_only`
is 10 % too heavy and has half the drag; the plant is right and takes the thrusts of the plan's first knot. It is
tuned in two settings:

  flight   the flight task as it is: margin 0.05 m, 40 spheres of 0.10 m
  dense    60 spheres of 0.15 m and no margin: plans touch the spheres, and the model decides whether the drone does

  right, wrong    the policy with the right and the wrong model, as it is
  model           the wrong one, tuned: mass and drag
  margin          the wrong one, tuned: mass, drag and margin (dense begins with 1 mm)
  speed           the right one, tuned: the reference's speed and braking, position and velocity weight

A seed is one set of starts to tune on. All are judged by the flight's own code on the same fresh starts. A command that
was stopped continues.
Recovered is (tuned - wrong) / (right - wrong), in returns of the same episodes: the loss is far smaller than what
starts differ by.

Checks: in both settings model wins back at least half of what the wrong model loses, as a mean over seeds.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deqmpc import tasks
from deqmpc.airframe import Airframe
from deqmpc.provenance import commit
from deqmpc.reproduce import Check, Column, Plan, Results
from deqmpc.rollouts import rollout
from deqmpc.training import tune
from deqmpc.training.tunable import Tunable, flight_planner

X_LABEL = 'updates'
TASKS = {'flight': ({}, {}), 'dense': ({'spheres': 60, 'radius': 0.15}, {'margin': 0.001})}  # of the task, the policy
VARIANTS = {'right': (), 'wrong': (), 'model': ('mass', 'drag'), 'margin': ('mass', 'drag', 'margin'),
            'speed': ('cruise_speed', 'slow_down', 'position_weight', 'velocity_weight')}
COLUMNS = (Column('return', 'return'), Column('failures, %', 'failure_share', 100.0), Column('recovered', 'recovered'),
           Column('mass / true', 'mass'), Column('drag / true', 'drag'), Column('margin, m', 'margin'))
TRUE = Airframe()
WRONG = replace(TRUE, mass=1.1 * TRUE.mass, drag=tuple(0.5 * d for d in TRUE.drag))
JUDGES = 10_000_000  # seed of the starts that all are judged by


@dataclass(frozen=True)
class Size:
    """What a budget means here."""

    updates: int
    episodes: int
    steps: int  # of an episode
    judged: int  # episodes


SIZES = {'smoke': Size(1, 2, 3, 2), 'small': Size(12, 16, 40, 100), 'medium': Size(30, 32, 60, 200),
         'full': Size(30, 100, 200, 1000)}
SEEDS = {'smoke': 1, 'small': 3, 'medium': 5, 'full': 10}


def rows(plan: Plan, out: Path) -> list[dict]:
    """A row for every setting, variant and seed. ValueError for an unknown setting."""
    size, made = SIZES[plan.budget.name], []
    for name in plan.tasks or TASKS:
        if name not in TASKS:
            raise ValueError(f'--tasks {name}; expected some of {", ".join(TASKS)}')
        task = tasks.make('crazyflie_obs', **TASKS[name][0])
        starts = tune.drawn(task, size.judged, JUDGES, ())
        known = {}
        for variant in dict.fromkeys(('right', 'wrong', *(plan.variants or VARIANTS))):
            for seed in range(plan.seeds if VARIANTS[variant] else 1):
                folder = out / f'{name}-{variant}-s{seed}'
                tunable, theta = tuned(task, variant, TASKS[name][1], size, seed, folder)
                returns, failed = judged(task, starts, size.steps, folder)
                known.setdefault(variant, returns)
                made.append(row(name, variant, seed, size, tunable, theta, returns, failed, known))
    return made


def judged(task, starts: tune.Starts, steps: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns and failures (B,) of a folder's policy as it flies; kept there."""
    path = folder / 'judged.json'
    if not path.exists():
        flown = rollout(task, flight_planner(task, folder), starts.x, starts.spheres, steps=steps)
        path.write_text(json.dumps([flown.returns.tolist(), flown.failed.tolist()]))
    returns, failed = (torch.tensor(v, dtype=torch.float64) for v in json.loads(path.read_text()))
    return returns, failed


def tuned(task, variant: str, settings: dict, size: Size, seed: int, folder: Path) -> tuple[Tunable, torch.Tensor]:
    """A variant's policy, in the files of `folder`."""
    names = VARIANTS[variant]
    tunable = Tunable(task, settings, TRUE if variant in ('right', 'speed') else WRONG, names or ('mass', 'drag'))
    numbers = tune.Settings(updates=size.updates, episodes=size.episodes, steps=size.steps, seed=seed)
    limits = tune.limits_of(tunable.names, ['margin=30'] if 'margin' in names else [])
    tuner = tune.Tuner(tunable, tune.drawn(task, size.episodes, seed, ()), numbers, limits)
    log = tune.Log(folder, {'variant': variant, 'settings': settings, **asdict(numbers)}, restart=False)
    log.resume(tuner)
    while names and tuner.state.count < size.updates:
        log.write(tuner, tuner.update())
    theta = log.best(names) if names else tunable.first
    tunable.write(folder, theta)
    return tunable, theta


def row(task: str, variant: str, seed: int, size: Size, tunable: Tunable, theta, returns, failed, known) -> dict:
    """A line of results.csv."""
    found = dict(zip(tunable.names, theta.tolist(), strict=True))
    lost = float((known['right'] - known.get('wrong', known['right'])).mean())
    frame, began_wrong = tunable.frame, bool(VARIANTS[variant]) and tunable.frame == WRONG
    back = float((returns - known['wrong']).mean()) if began_wrong else math.nan
    return {'task': task, 'variant': variant, 'x': size.updates if VARIANTS[variant] else 0, 'seed': seed,
            'return': float(returns.mean()), 'failure_share': float(failed.mean()),
            'lost': lost, 'recovered': back / lost if lost else math.nan,
            'mass': found.get('mass', frame.mass) / TRUE.mass,
            'drag': found.get('drag', 1.0) * frame.drag[0] / TRUE.drag[0],
            'margin': found.get('margin', tunable.settings.margin), 'commit': commit()}


def draw(figure, results: Results):
    """Return of every variant, a panel a setting."""
    found = results.unique('task')
    figure.set_size_inches(4.5 * len(found), 3.6)
    for axis, task in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for i, variant in enumerate(dict.fromkeys(r['variant'] for r in results.select(task=task))):
            values = [r['return'] for r in results.select(task=task, variant=variant)]
            axis.plot([i] * len(values), values, 'o', color=f'C{i}')
        axis.set_xticks(range(i + 1), list(dict.fromkeys(r['variant'] for r in results.select(task=task))))
        axis.set(title=task, ylabel='return, fresh starts')


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made = []
    for task in results.unique('task'):
        if results.select(task=task, variant='model'):
            share, lost = (results.mean(m, task=task, variant='model') for m in ('recovered', 'lost'))
            made.append(Check(f'{task}: of a lost return of {lost:.3f}, {100 * share:.0f} % are won back; at least 50',
                              lost > 0.0 and share >= 0.5))
    return made
