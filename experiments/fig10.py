"""Figure 10: the gap between DEQ-MPC and Diff-MPC opens after the fourth augmented-Lagrangian (AL) iteration.

Policies trained with k AL iterations in all from a cold start: DEQ-MPC with k / 2 iterations of two, Diff-MPC with one
solve of k. Returns are those of plans as they are, without the interior-point finish of flight. The right-hand panel
has the error after each DEQ-MPC iteration of the policies trained with the largest k.

Checks, for each kind of network and task, with the gap Diff-MPC's mean validation error minus DEQ-MPC's, as a share of
Diff-MPC's: at k <= 4 the gap is below 10 %; at the largest k it is above that at k = 4; and above 0.
"""

import numpy as np

from deqmpc.reproduce import MPC_VARIANTS, Check, Plan, Results, lines, pairs, style

X_LABEL = 'AL iterations'
COUNTS = {'smoke': (4, 6), 'small': (2, 4, 8, 12)}


def cells(plan: Plan):
    """Numbers of AL iterations with which each policy trains and flies."""
    counts = COUNTS.get(plan.budget.name, (2, 4, 6, 8, 10, 12))
    return plan.cells(['quadrotor'], MPC_VARIANTS, counts, lambda k, variant: {'method': (
        ('iterations', k // 2) if variant.startswith('deq_mpc') else ('converged_al_iterations', k),)},
        lambda k, variant: {'finish': False})


def draw(figure, results: Results):
    """Errors and returns over k, and the error after every iterate."""
    last = max(results.unique('x'))
    for axes, task in zip(lines(figure, results, X_LABEL, metrics=('error', 'return', '')),
                          results.unique('task'), strict=True):
        for variant in results.unique('variant'):
            errors = np.mean([row['by_iterate'] for row in results.select(task=task, variant=variant, x=last)], axis=0)
            at = 2 * np.arange(1, len(errors) + 1) if variant.startswith('deq_mpc') else [last]
            axes[2].plot(at, errors, marker='o', markersize=4, **style(variant))
        axes[2].set(title=f'{task}, trained with {last}', xlabel='after so many AL iterations',
                    ylabel='validation error')


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made, last = [], max(results.unique('x'))
    for task in results.unique('task'):
        for pair in pairs(results):
            gap = {k: -results.gap('error', *pair, task=task, x=k) / results.mean(
                'error', task=task, variant=pair[1], x=k) for k in results.unique('x')}
            name = f'{task}: {pair[0]} ahead of {pair[1]} by'
            made += [Check(f'{name} {100 * gap[k]:.1f} % at {k}, < 10 %', gap[k] < 0.1) for k in gap if k <= 4]
            made += [Check(f'{name} {100 * gap[last]:.1f} % at {last}, more than at 4', gap[last] > gap[4]),
                     Check(f'and more than 0 at {last}', gap[last] > 0)]
    return made
