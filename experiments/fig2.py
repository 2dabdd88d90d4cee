"""Figure 2: on most tasks DEQ-MPC is better than Diff-MPC and than networks alone.

All six variants with equal network sizes, steps and demonstrations. Small trains on the authors' released
demonstrations only; medium and full on all tasks (`deqmpc experts TASK` makes what is not released).

Checks, for each kind of network: on more than half of the tasks the mean validation error of DEQ-MPC is below that of
Diff-MPC; it is below that of the network alone; the mean return of DEQ-MPC is at least that of Diff-MPC.
"""

from deqmpc.reproduce import Check, Plan, Results, bars, pairs
from deqmpc.tasks import TASKS
from deqmpc.training.imitation import VARIANTS

X_LABEL = ''
RELEASED = ('pendulum', 'cartpole', 'quadrotor')


def cells(plan: Plan):
    """Every variant on every task."""
    tasks = {'smoke': ('quadrotor',), 'small': RELEASED}.get(plan.budget.name, tuple(TASKS))
    return plan.cells(tasks, VARIANTS)


def draw(figure, results: Results):
    """A bar for every variant."""
    bars(figure, results)


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made = []
    for ours, theirs in pairs(results):
        made.append(_most(results, 'validation error', 'error', -1, ours, theirs))
        if (alone := ours.removeprefix('deq_mpc_')) in results.unique('variant'):
            made.append(_most(results, 'validation error', 'error', -1, ours, alone))
        made.append(_most(results, 'return', 'return', 1, ours, theirs))
    return made


def _most(results, name, metric, sign, ours, theirs) -> Check:
    tasks = results.unique('task')
    better = [t for t in tasks if sign * results.mean(metric, task=t, variant=ours)
              >= sign * results.mean(metric, task=t, variant=theirs)]
    return Check(f'{name}: {ours} at least as good as {theirs} on {len(better)} of {len(tasks)} tasks '
                 f'({", ".join(better) or "none"})', 2 * len(better) > len(tasks))
