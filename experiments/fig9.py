"""Figure 9: DEQ-MPC is better than Diff-MPC at every horizon from 3 to 12.

Policies train and fly with T knots after the current one. The validation error is a sum over T knots: compare it at
equal T only.

Checks, for each kind of network, task and T: the mean validation error of DEQ-MPC is below that of Diff-MPC; its mean
return is at least as large.
"""

from deqmpc.reproduce import MPC_VARIANTS, Check, Plan, Results, lines, pairs

X_LABEL = 'horizon T'
HORIZONS = {'smoke': (3, 4), 'small': (3, 5, 8, 12)}


def cells(plan: Plan):
    """Horizons with which each policy trains and flies."""
    horizons = HORIZONS.get(plan.budget.name, (3, 5, 7, 9, 12))
    return plan.cells(['quadrotor'], MPC_VARIANTS, horizons, lambda T, variant: {'changes': (('horizon', T),)})


def draw(figure, results: Results):
    """Errors and returns over the horizon."""
    lines(figure, results, X_LABEL)


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made = []
    for task in results.unique('task'):
        for pair in pairs(results):
            for T in results.unique('x'):
                error, gain = (results.gap(metric, *pair, task=task, x=T) for metric in ('error', 'return'))
                name = f'{task}, T = {T}, {pair[0]} minus {pair[1]}'
                made += [Check(f'{name}: error {error:.3f}, < 0', error < 0),
                         Check(f'{name}: return {gain:.3f}, >= 0', gain >= 0)]
    return made
