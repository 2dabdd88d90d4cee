"""Figure 6: under tight input limits DEQ-MPC trains stably, while Diff-MPC-DEQ does not.

The quadrotor's motor command is limited to u_high (18.3 in the task; hovering takes 14.5) when policies train and when
they fly; the demonstrations, and the returns to divide by, keep the task's limit. Roughness of a training run: by what
factor the loss rises, at most, in the second half of the run above the lowest one before.

Checks: at the tightest limit Diff-MPC-DEQ has the largest mean roughness of all variants; and the largest standard
deviation of the validation error over seeds; DEQ-MPC-DEQ's roughness there is at most 1.5 times its own at the task's
limit; at every limit its mean validation error is below that of Diff-MPC-DEQ.
"""

import csv
from pathlib import Path

import numpy as np

from deqmpc.dynamics.quadrotor import U_HIGH
from deqmpc.reproduce import COLUMNS as USUAL
from deqmpc.reproduce import MPC_VARIANTS, Check, Column, Plan, Results, lines, style

X_LABEL = 'upper limit of the motor command'
COLUMNS = (*USUAL, Column('roughness', 'roughness'))
LIMITS = {'smoke': (16.0, U_HIGH), 'small': (15.5, 16.5, U_HIGH)}


def cells(plan: Plan):
    """Limits under which each policy trains and flies."""
    limits = LIMITS.get(plan.budget.name, (15.0, 15.5, 16.0, 17.0, U_HIGH))
    return plan.cells(['quadrotor'], MPC_VARIANTS, limits, lambda u_high, variant: {'changes': (('u_high', u_high),)})


def losses(row: dict) -> np.ndarray:
    """(2, N) steps and losses of a training run."""
    with (Path(row['folder']) / 'metrics.csv').open() as file:
        return np.array([(float(line['step']), float(line['loss'])) for line in csv.DictReader(file)]).T


def metrics(row: dict) -> dict[str, float]:
    """Roughness of the training run."""
    loss = losses(row)[1]
    half, lowest = max(len(loss) // 2, 1), np.minimum.accumulate(loss)
    return {'roughness': float(np.max(loss[half:] / lowest[half - 1:-1]))}


def draw(figure, results: Results):
    """Errors and returns over the limit, and the losses at the tightest one."""
    tightest = min(results.unique('x'))
    axes = lines(figure, results, X_LABEL, metrics=('error', 'return', ''))[0]
    for row in results.select(x=tightest):
        axes[2].plot(*losses(row), linewidth=0.8, **style(row['variant']))
    axes[2].set(title=f'limit {tightest}', xlabel='steps of training', ylabel='training loss', yscale='log')


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    variants, limits = results.unique('variant'), sorted(results.unique('x'))
    if not {'deq_mpc_deq', 'diff_mpc_deq'} <= set(variants):
        return []
    rough = {v: results.mean('roughness', variant=v, x=limits[0]) for v in variants}
    spread = {v: results.stat('error', variant=v, x=limits[0]).sd for v in variants}
    made = [Check(f'largest {name} at {limits[0]}: {_listed(found)}; expected of diff_mpc_deq',
                  max(found, key=found.get) == 'diff_mpc_deq')
            for name, found in (('roughness', rough), ('sd of the error', spread))]
    grown = rough['deq_mpc_deq'] / results.mean('roughness', variant='deq_mpc_deq', x=limits[-1])
    made.append(Check(f"roughness of deq_mpc_deq at {limits[0]} is {grown:.2f} times that at the task's limit, <= 1.5",
                      grown <= 1.5))
    gaps = {x: results.gap('error', 'deq_mpc_deq', 'diff_mpc_deq', x=x) for x in limits}
    made.append(Check(f'error, deq_mpc_deq minus diff_mpc_deq: {_listed(gaps)}; all < 0',
                      all(gap < 0 for gap in gaps.values())))
    return made


def _listed(values: dict) -> str:
    return ', '.join(f'{name} {value:.3f}' for name, value in values.items())
