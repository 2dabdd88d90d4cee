"""Experiments of the DEQ-MPC paper, each a file in experiments/: what they share.

  runs     policies to train and to test, each done once and kept
  results  their numbers: table, plot, and whether a claim holds
  command  `deqmpc reproduce`
"""

from deqmpc.reproduce.command import main
from deqmpc.reproduce.results import COLUMNS, MPC_VARIANTS, Check, Column, Results, bars, gains, lines, pairs, style
from deqmpc.reproduce.runs import BUDGETS, Budget, Cell, Plan, Run, Test, execute

__all__ = ['BUDGETS', 'COLUMNS', 'MPC_VARIANTS', 'Budget', 'Cell', 'Check', 'Column', 'Plan', 'Results', 'Run', 'Test',
           'bars', 'execute', 'gains', 'lines', 'main', 'pairs', 'style']
