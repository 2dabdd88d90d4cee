"""Figure 3: more demonstrations help DEQ-MPC, where Diff-MPC saturates.

The same demonstrations validate whatever the number that train; those of a smaller number are among those of a larger.

Checks, for each kind of network and task: the mean validation error of DEQ-MPC falls from every number of
demonstrations to the next; from the last but one to the most, DEQ-MPC gains a larger share of its error than Diff-MPC.
"""

from deqmpc.reproduce import MPC_VARIANTS, Plan, Results, gains, lines

X_LABEL = 'demonstrations to train on'
ALL = 243  # nine tenths of the 270 that are released; the paper trains on 270
COUNTS = {'smoke': (10, 20), 'small': (30, 90, ALL)}


def cells(plan: Plan):
    """Numbers of demonstrations; all of them is the run of the other figures."""
    counts = COUNTS.get(plan.budget.name, (10, 30, 90, ALL))
    return plan.cells(['quadrotor'], MPC_VARIANTS, counts,
                      lambda count, variant: {'trajectories': 0 if count == ALL else count})


def draw(figure, results: Results):
    """Errors and returns over the number of demonstrations."""
    lines(figure, results, X_LABEL, log=True)


checks = gains
