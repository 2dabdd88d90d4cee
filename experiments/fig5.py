"""Figure 5: the gap between DEQ-MPC and Diff-MPC grows with the radius of the obstacles.

The paper varies r from 0.2 to 0.5 m in qpole_obs. Here policies are trained on demonstrations among spheres of the
task's radius, the largest one, and tested among smaller ones at the same places: every start is free, and one policy
serves all radii. (Whether the paper trained one for each, its text does not say.) Smoke and small take crazyflie_obs
with r = 0.05 to 0.10 m. `deqmpc experts qpole_obs` and `deqmpc experts crazyflie_obs` make the demonstrations.

Checks, for each kind of network: at the largest radius the mean return of DEQ-MPC is above that of Diff-MPC; this gap
is larger than at the smallest radius; at the largest radius DEQ-MPC fails no more often.
"""

from deqmpc.reproduce import MPC_VARIANTS, Check, Column, Plan, Results, lines, pairs

X_LABEL = 'radius of the obstacles, m'
COLUMNS = (Column('normalised return', 'return'), Column('failures, %', 'failure_share', 100.0),
           Column('violating plans', 'violating_plans'))
RADII = {'crazyflie_obs': (0.05, 0.075, 0.1), 'qpole_obs': (0.2, 0.3, 0.4, 0.5)}


def cells(plan: Plan):
    """Radii at which each policy is tested."""
    task = plan.tasks[0] if plan.tasks else (
        'crazyflie_obs' if plan.budget.name in ('smoke', 'small') else 'qpole_obs')
    if len(plan.tasks) > 1 or task not in RADII:
        raise ValueError(f'--tasks {" ".join(plan.tasks)}; expected one of {", ".join(RADII)}')
    return plan.cells([task], MPC_VARIANTS, RADII[task], test=lambda r, variant: {'changes': (('radius', r),)})


def draw(figure, results: Results):
    """Failures and returns over the radius."""
    lines(figure, results, X_LABEL, metrics=('failure_share', 'return'))


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made, low, high = [], min(results.unique('x')), max(results.unique('x'))
    for pair in pairs(results):
        small, large = (results.gap('return', *pair, x=r) for r in (low, high))
        fails = results.gap('failure_share', *pair, x=high)
        name = f'{pair[0]} minus {pair[1]}'
        made += [Check(f'return, {name}: {large:.3f} at {high} m, > 0', large > 0),
                 Check(f'and larger than at {low} m, {small:.3f}', large > small),
                 Check(f'share of failures, {name}: {fails:.3f} at {high} m, <= 0', fails <= 0)]
    return made
