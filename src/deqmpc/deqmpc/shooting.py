"""A planner that can be stopped at any time: iLQR whose motor limits are a projection inside the dynamics.

  x_{t+1} = phi(x_t, P(u_t)),   P(u) the allowed inputs nearest to u     (dynamics.optimization_based.projection)

Every iterate of deqmpc.solvers.ilqr is a rollout of the plant under inputs strictly within their limits, so that a plan
can be flown after any number of iterations: its dynamics are exact and no motor saturates. A solver that treats the
limits as constraints has that at convergence only. Bounds on the state and spheres remain constraints, met as the
iterations go on, over several control steps; where they cannot be met, multipliers stop at the task's softness.

The cost's R acts on u, of which P(u) is at most as far from u_ref; without it u would drift off beyond the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqmpc.baselines import Memory, toward_goal
from deqmpc.dynamics.optimization_based.projection import Box, ProjectedInputs
from deqmpc.planners import Planned, largest_violation
from deqmpc.problem import Problem
from deqmpc.solvers import ilqr
from deqmpc.solvers.settings import check_numbers
from deqmpc.tasks import Spheres, Task


@dataclass(frozen=True)
class Settings:
    """Numbers of the planner."""

    iterations: int = 4  # of iLQR in a control step
    first_iterations: int = 30  # of iLQR in the first step, and after a plan that was not finite
    projected: bool = True  # limits of inputs inside the dynamics; False: as constraints, to compare
    sharpness: float = 1e-4  # mu of the projection, relative to the squared half-width of the limits
    smoothing: float = 0.1  # mu_grad of the projection, likewise
    input_weight: float = 0.1  # least R times the squared half-width of the limits, relative to the largest Q
    penalty: float = 100.0  # mu of the augmented Lagrangian, constant

    def __post_init__(self):
        check_numbers(self, finite=True)
        if self.sharpness > self.smoothing:
            raise ValueError(f'sharpness = {self.sharpness}; expected at most smoothing = {self.smoothing}')


def with_projected_inputs(problem: Problem, settings: Settings = Settings()) -> tuple[Problem, Box]:
    """The problem with the bounds of its inputs inside the dynamics, and P. ValueError where a bound is not finite."""
    box = Box(problem.u_low, problem.u_high, settings.sharpness, settings.smoothing)
    return _rebuilt(problem, ProjectedInputs(problem.equations, problem.dt, box), settings), box


def _rebuilt(problem: Problem, dynamics, settings: Settings, **limits) -> Problem:
    half = 0.5 * (problem.u_high - problem.u_low)
    R = torch.maximum(problem.R, settings.input_weight * problem.Q.max() / half.square())
    return Problem(dynamics, problem.dt, problem.horizon, problem.Q, R, problem.Qf, x_low=problem.x_low,
                   x_high=problem.x_high, position=range(problem.n)[problem.position], **limits)


class ShootingPlanner:
    """x_ref = goal at every knot, `iterations` of iLQR a control step from the last inputs shifted by one knot. A
    deqmpc.planners.Planner. `horizon` replaces the task's."""

    def __init__(self, task: Task, settings: Settings = Settings(), horizon: int | None = None):
        self.task, self.settings = task, settings
        own = task.problem(horizon)
        if settings.projected:
            self.problem, self.applied = with_projected_inputs(own, settings)
        else:
            self.problem, self.applied = _rebuilt(own, own.equations, settings, u_low=own.u_low,
                                                  u_high=own.u_high), lambda u: u
        self.limited = own  # with bounds, to judge plans
        self.times = task.dt * torch.arange(own.horizon + 1, dtype=torch.float64)

    @torch.no_grad()
    def plan(self, x: Tensor, spheres: Spheres, memory: Memory | None = None) -> Planned:
        """See deqmpc.planners.Planner."""
        task, x = self.task, self.task.wrapped(x)
        data = toward_goal(self.problem, task, x, spheres, self.times)
        start, new = self._start(data, memory)
        end = start
        for rows, count in ((new, self.settings.first_iterations), (~new, self.settings.iterations)):
            if rows.any():
                found = ilqr.solve(self.problem, data[rows], start[rows], self._settings(count))
                end = _put(end, rows, found.warm_start)
        states, u = end.x, self.applied(end.u)
        ok = torch.isfinite(states).flatten(1).all(dim=1) & torch.isfinite(u).flatten(1).all(dim=1)
        own = replace(toward_goal(self.limited, task, x, spheres, self.times), radii=spheres.radii)
        violation = largest_violation(self.limited, own, states, u, ok)
        first = torch.where(ok.unsqueeze(1), u[:, 0], task.u_ref)
        defect = torch.where(ok, x.new_zeros(len(x)), float('nan'))  # of a rollout
        return Planned(first, states, ok, violation, defect, Memory(end, ok))

    def _start(self, data, memory) -> tuple[ilqr.WarmStart, Tensor]:
        """Where to start, and which episodes have no plan yet (B,)."""
        cold = ilqr.cold_start(self.problem, data, self._settings(1))
        if memory is None:
            return cold, torch.ones(len(data.x_init), dtype=torch.bool)
        old = memory.solver.shifted()
        known = memory.known.view(-1, 1, 1)
        softness = self.task.softness
        return replace(cold, u=torch.where(known, old.u, cold.u),
                       lam=torch.where(known, old.lam.clamp_max(softness), cold.lam)), ~memory.known

    def _settings(self, count) -> ilqr.Settings:
        penalty = self.settings.penalty
        return ilqr.Settings(iterations=count, max_steps=count, inner_steps=max(1, count // 2), mu_0=penalty,
                             gamma=1.0, mu_max=penalty, feasibility=1e-3, gradient=1e-4, change=1e-6)


def _put(start: ilqr.WarmStart, rows: Tensor, part: ilqr.WarmStart) -> ilqr.WarmStart:
    """`start` with `part` at those episodes (B,)."""
    return ilqr.WarmStart(*(torch.where(rows.view(-1, *[1] * (old.dim() - 1)), old.new_zeros(old.shape).index_put(
        (rows,), new), old) for old, new in zip(start.tensors(), part.tensors(), strict=True)))
