"""Figure 8: one DEQ-MPC iteration a control step is within 2 % of six, and the gap to Diff-MPC grows with fewer.

Policies trained as in Figure 2; changed is only how long they may compute at each warm-started control step: DEQ-MPC n
iterations of two augmented-Lagrangian (AL) iterations, Diff-MPC 2 n AL iterations, n = 1..6. The first plan of a
rollout is a cold start as in training, for Diff-MPC with 2 n AL iterations too. Plans that have not converged are flown
as they are: in flight the interior-point method would finish them, and hide what the iterations do.

Checks, for each kind of network and task: DEQ-MPC's mean return with n = 1 is at least that with n = 6 less 2 %; its
lead over Diff-MPC in return is at least as large with n = 1 as with n = 6.
"""

from deqmpc.reproduce import MPC_VARIANTS, Check, Plan, Results, lines, pairs

X_LABEL = 'DEQ-MPC iterations a control step (of two AL iterations)'


def cells(plan: Plan):
    """Iterations with which each policy is tested."""
    counts = (1, 6) if plan.budget.name == 'smoke' else range(1, 7)
    tasks = ('quadrotor',) if plan.budget.name in ('smoke', 'small') else ('quadrotor', 'qpole_obs')
    return plan.cells(tasks, MPC_VARIANTS, counts, test=lambda n, variant: {'finish': False, 'method': (
        ('warm_iterations', n) if variant.startswith('deq_mpc') else ('converged_al_iterations', 2 * n),)})


def draw(figure, results: Results):
    """Returns and failures over the iterations."""
    lines(figure, results, X_LABEL, metrics=('return', 'failure_share'))


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made = []
    for task in results.unique('task'):
        for pair in pairs(results):
            one, six = (results.mean('return', task=task, variant=pair[0], x=n) for n in (1, 6))
            few, many = (results.gap('return', *pair, task=task, x=n) for n in (1, 6))
            made += [Check(f'{task}: return of {pair[0]} is {one:.3f} with 1 iteration, {six:.3f} with 6; at most 2 % '
                           f'less', one >= six - 0.02 * abs(six)),
                     Check(f'{task}: its lead over {pair[1]} is {few:.3f} with 1, {many:.3f} with 6; not less',
                           few >= many)]
    return made
