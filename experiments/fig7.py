"""Figure 7: DEQ-MPC-DEQ stays stable over the widest range of cost conditioning.

The weights of position and attitude in the quadrotor's tracking cost stay 10, those of velocity and rates are
10 / kappa: kappa, the condition number of Q for kappa >= 1, is 10 in the task. Policies train and fly with it; rewards
keep the task's weights. (Which weights the paper varies, its text does not say.) A variant is stable at a kappa where
its mean return is at least 0.9 of the best variant's at the task's kappa.

Checks: DEQ-MPC-DEQ is stable at no fewer values of kappa than every other variant (one check each); and at more than
Diff-MPC-DEQ.
"""

from deqmpc.reproduce import MPC_VARIANTS, Check, Plan, Results, lines

X_LABEL = 'condition number of Q'
OURS, TASK = 'deq_mpc_deq', 10.0  # kappa of the task
KAPPA = {'smoke': (TASK, 1e3), 'small': (1.0, TASK, 1e3, 1e5)}


def cells(plan: Plan):
    """Condition numbers with which each policy trains and flies."""
    kappas = KAPPA.get(plan.budget.name, (0.1, 1.0, TASK, 1e2, 1e3, 1e4, 1e5, 1e6))
    return plan.cells(['quadrotor'], MPC_VARIANTS, kappas,
                      lambda kappa, variant: {'changes': (('velocity_weight', 10.0 / kappa),)})


def draw(figure, results: Results):
    """Errors and returns over the condition number."""
    lines(figure, results, X_LABEL, log=True)


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    variants, best = results.unique('variant'), 0.9 * max(
        results.mean('return', variant=v, x=TASK) for v in results.unique('variant'))
    stable = {v: sum(results.mean('return', variant=v, x=x) >= best for x in results.unique('x')) for v in variants}
    if OURS not in stable:
        return []
    count = stable[OURS]
    made = [Check(f'{OURS} is stable at {count} condition numbers, {v} at {stable[v]}', count >= stable[v])
            for v in variants if v != OURS]
    if 'diff_mpc_deq' in stable:
        made.append(Check(f'{OURS} at more than diff_mpc_deq', count > stable['diff_mpc_deq']))
    return made
