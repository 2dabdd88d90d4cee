"""Compiled solvers for one instance in real time. See README.md here."""

from deqmpc.realtime.solver import RealtimeSolver, Settings, Solution, WarmStart

__all__ = ['RealtimeSolver', 'Settings', 'Solution', 'WarmStart']
