"""Planners without a network (deqmpc.planners.Planner), to compare learned ones with.

  GoalPlanner      tracks the goal at every knot, on the task's own problem: what the solver does alone
  MpcOnlyPlanner   the flight stack's policy `mpc_only`, one episode after the other, for the Crazyflie's tasks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqmpc import realtime
from deqmpc.dynamics import rotation
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.planners import Planned, largest_violation, rows_of
from deqmpc.policies.mpc_only import MpcOnly
from deqmpc.policies.mpc_only import Settings as MpcOnlySettings
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.tasks import Spheres, Task
from deqmpc.types import Obstacles, RigidBodyState


def toward_goal(problem: Problem, task: Task, x: Tensor, spheres: Spheres, times: Tensor) -> Instances:
    """From x (B, n), with the goal as the reference at every knot, around the spheres with the task's margin; `times`
    (T+1,) are those of the knots."""
    B, T = len(x), problem.horizon
    return problem.instances(x, task.goal.expand(B, T + 1, -1), task.u_ref.expand(B, T, -1), spheres.ahead(times),
                             spheres.inflated(task.margin))


class GoalPlanner:
    """x_ref = goal at every knot, solved to convergence by the interior-point method from the last plan shifted by one
    knot. `horizon` replaces the task's."""

    def __init__(self, task: Task, horizon: int | None = None):
        self.task, self.problem = task, task.problem(horizon)
        self.times = task.dt * torch.arange(self.problem.horizon + 1, dtype=torch.float64)
        self._solver = RealtimeSolver(self.problem, max(task.spheres, 1), realtime.Settings(
            tolerance=1e-4, elastic=task.softness, max_steps=60))

    @torch.no_grad()
    def plan(self, x: Tensor, spheres: Spheres, memory: Memory | None = None) -> Planned:
        """See deqmpc.planners.Planner."""
        task, x = self.task, self.task.wrapped(x)
        data = toward_goal(self.problem, task, x, spheres, self.times)
        start = al.cold_start(self.problem, data, al.Settings())
        if memory is not None:
            old = memory.solver.shifted()
            moved = old.x - task.turns(old.x[:, :1] - x.unsqueeze(1))
            known = memory.known.view(-1, 1, 1)
            start = replace(start, x=torch.where(known, torch.cat([start.x[:, :1], moved[:, 1:]], dim=1), start.x),
                            u=torch.where(known, old.u, start.u))
        found = self._solver.solve_batch(data, start)
        ok = torch.isfinite(found.cost)
        violation = largest_violation(self.problem, replace(data, radii=spheres.radii), found.x, found.u, ok)
        return Planned(torch.where(ok.unsqueeze(1), found.u[:, 0], task.u_ref), found.x, ok, violation, found.defect,
                       Memory(found.warm_start, ok))


@dataclass(frozen=True)
class Memory:
    """What GoalPlanner and deqmpc.shooting.ShootingPlanner remember."""

    solver: al.WarmStart
    known: Tensor  # (B,) bool: whether there is a plan to start from

    def __getitem__(self, rows: Tensor) -> Memory:
        """Those of some episodes."""
        return rows_of(self, rows)


class MpcOnlyPlanner:
    """The policy `mpc_only` with the task's dt, horizon, margin and floor, in the goal's frame; `changes` replace its
    settings. Where its airframe is another one than the task's, the drone gets the thrusts (N) that it plans.
    ValueError where the task's dynamics are not the Crazyflie's."""

    def __init__(self, task: Task, **changes):
        if not isinstance(task.equations, Crazyflie):
            raise ValueError(f'task {task.name} has the dynamics {type(task.equations).__name__}; mpc_only flies '
                             f'{Crazyflie.__name__} only')
        given = dict(goal=(0.0,) * 4, dt=task.dt, horizon=task.horizon, margin=task.margin, floor=task.floor)
        self.task, self.policy = task, MpcOnly(MpcOnlySettings(**{**given, **changes}))
        self.times = task.dt * torch.arange(self.policy.horizon + 1, dtype=torch.float64)
        self.thrust = self.policy.problem.equations.airframe.hover_thrust / task.equations.airframe.hover_thrust

    @torch.no_grad()
    def plan(self, x: Tensor, spheres: Spheres, memory: Flights | None = None) -> Planned:
        """See deqmpc.planners.Planner."""
        B, T, n = len(x), self.policy.horizon, x.shape[1]
        stamp = 0.0 if memory is None else memory.stamp + self.task.dt
        plans, inputs = np.full((B, T + 1, n), np.nan), np.full((B, T, Crazyflie.m), np.nan)
        residual, starts = np.full(B, np.nan), []
        arrays = [v.numpy() for v in (x, spheres.centers, spheres.radii, spheres.velocity)]
        for i, (state, *field) in enumerate(zip(*arrays, strict=True)):
            _, start, status = self.policy.plan(_rigid_body(stamp, state), Obstacles(stamp, *field),
                                                None if memory is None else memory.starts[i])
            starts.append(start)
            if start is not None:
                plans[i], inputs[i], residual[i] = start.solver.x, start.solver.u, status.residual
        planned, u, defect = (torch.from_numpy(v) for v in (plans, inputs, residual))
        ok = torch.isfinite(planned).flatten(1).all(dim=1)
        data = self.policy.problem.instances(x, planned, u, spheres.ahead(self.times), spheres.radii)
        violation = largest_violation(self.policy.problem, data, planned, u, ok)
        first = torch.where(ok.unsqueeze(1), self.thrust * u[:, 0], self.task.u_ref)
        return Planned(first, planned, ok, violation, defect,
                       Flights(stamp, tuple(starts)))


@dataclass(frozen=True)
class Flights:
    """What MpcOnlyPlanner remembers."""

    stamp: float  # s, of the last call
    starts: tuple[Any, ...]  # the policy's warm starts, one an episode

    def __getitem__(self, rows: Tensor) -> Flights:
        """Those of some episodes."""
        return Flights(self.stamp, tuple(self.starts[i] for i in rows.tolist()))


def _rigid_body(stamp: float, x: np.ndarray) -> RigidBodyState:
    """The state of a drone with the model state x (12,)."""
    return RigidBodyState(stamp, x[:3], rotation.quaternion_from_mrp(x[3:6]), x[6:9], x[9:])
