"""Compiled solvers for one instance in real time and for batches in training. See README.md here."""

from deqmpc.realtime.solver import RealtimeSolver, Settings, Solution, WarmStart

__all__ = ['RealtimeSolver', 'Settings', 'Solution', 'WarmStart']
