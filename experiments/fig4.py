"""Figure 4: larger networks help DEQ-MPC, where Diff-MPC saturates.

Checks, for each kind of network and task: the mean validation error of DEQ-MPC falls from every size to the next; from
the last but one to the largest, DEQ-MPC gains a larger share of its error than Diff-MPC.
"""

from deqmpc.reproduce import MPC_VARIANTS, Plan, Results, gains, lines

X_LABEL = 'channels of the network'
HIDDEN = {'smoke': (16, 32), 'small': (16, 32, 64), 'medium': (32, 64, 128, 256)}


def cells(plan: Plan):
    """Sizes of the network."""
    sizes = HIDDEN.get(plan.budget.name, (64, 128, 256, 512))
    return plan.cells(['quadrotor'], MPC_VARIANTS, sizes, lambda hidden, variant: {'hidden': hidden})


def draw(figure, results: Results):
    """Errors and returns over the size."""
    lines(figure, results, X_LABEL, log=True)


checks = gains
