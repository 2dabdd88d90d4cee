"""Planners for batches of episodes: states and spheres to inputs, with their own memory from step to step.

`ModelPlanner` is a learned model in the receding horizon: cold with N iterations at first, then from the last plan
shifted by one knot. deqmpc.baselines has planners without a network.

A planner keeps nothing between calls: what it wants to remember is the memory it returns, which the caller passes
back, rows of ended episodes left out. Where a plan is not finite the input is u_ref, and that episode alone starts
cold the next time.

Angles are known modulo their period. The model sees them next to the goal's, as in its training windows
(Task.wrapped); the last plan is moved by whole periods so that it goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deqmpc.policies import deq_mpc, model
from deqmpc.policies.deq_mpc import DeqMpc, Iterates, WarmStart
from deqmpc.policies.network_only import NetworkOnly
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.tasks import Spheres, Task


@dataclass(frozen=True)
class Planned:
    """What one call of a planner made, for B episodes."""

    u: Tensor  # (B, m) inputs to apply now; u_ref where there is no plan
    x: Tensor  # (B, T+1, n) planned states
    ok: Tensor  # (B,) bool: there is a plan, and it is finite
    violation: Tensor  # (B,) largest violation of bounds and spheres at its knots, 0 where all hold; NaN without plan
    defect: Tensor  # (B,) largest violation of the dynamics; NaN without plan
    memory: Any  # for the next call; `memory[rows]` are those of some episodes


class Planner(Protocol):
    """Batched, in the receding horizon."""

    def plan(self, x: Tensor, spheres: Spheres, memory: Any = None) -> Planned:
        """Plans from x (B, n), float64, past `spheres`. `memory` is what the call one control step ago returned, or
        None. Never raises for numbers; ValueError for shapes."""


def load_model(folder: str | Path, task: Task) -> DeqMpc | NetworkOnly:
    """The model of a folder (deqmpc.policies.model) on the task's problem; the number of spheres is free.
    FileNotFoundError where a file is missing; ValueError where it is damaged or was made for a state, horizon or time
    step other than the task's."""
    made = model.load(folder)
    own = made.network.settings
    wanted = task.network(own.kind, own.hidden)
    for name in ('n', 'horizon', 'dt', 'positions', *(['spatial'] if own.spheres else [])):
        if getattr(own, name) != getattr(wanted, name):
            raise ValueError(f'{folder}: its network has {name} = {getattr(own, name)!r}, the task {task.name} '
                             f'{getattr(wanted, name)!r}; expected equal ones')
    if not made.method:
        return NetworkOnly(task.problem(), made.network, made.motion).eval()
    settings = model.settings_of(deq_mpc.Settings, made.method, f'{folder}: method')
    return DeqMpc(task.problem(), made.network, settings, made.motion).eval()


@dataclass(frozen=True)
class Memory:
    """What ModelPlanner remembers."""

    warm_start: WarmStart | None  # None of a network alone
    known: Tensor  # (B,) bool: whether there is a plan to start from

    def __getitem__(self, rows: Tensor) -> Memory:
        """Those of some episodes."""
        return rows_of(self, rows)


class ModelPlanner:
    """A model in the receding horizon. `iterations` and `warm_iterations` replace the model's N where not 0. Without
    `finish`, plans that have not converged are flown as they are (deqmpc.policies.deq_mpc)."""

    def __init__(self, task: Task, learned: DeqMpc | NetworkOnly, iterations: int = 0, warm_iterations: int = 0,
                 finish: bool = True):
        for name, value in (('iterations', iterations), ('warm_iterations', warm_iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 0 (0: the model\'s)')
        self.task, self.model = task, learned
        self.iterations, self.warm_iterations, self.finish = iterations, warm_iterations, finish
        self.times = task.dt * torch.arange(task.horizon + 1, dtype=torch.float64)
        self._inputs = OneStep(task) if isinstance(learned, NetworkOnly) else None

    @torch.no_grad()
    def plan(self, x: Tensor, spheres: Spheres, memory: Memory | None = None) -> Planned:
        """See Planner."""
        x = self.task.wrapped(x)
        given = self._given(x, spheres)
        if memory is None or memory.warm_start is None:
            planned = self._planned(given, spheres, self._call(given))
        else:
            planned = self._planned(given, spheres, self._call(given, self._continued(x, memory)))
            new = (~memory.known).nonzero()[:, 0]
            if len(new):  # the others keep their place in the batch, and with it every bit of their result
                some, near = tuple(v[new] for v in given), spheres[new]
                planned = _put(planned, new, self._planned(some, near, self._call(some)))
        u = torch.where(planned.ok.unsqueeze(1), planned.u, self.task.u_ref)
        return replace(planned, u=u)

    def _given(self, x: Tensor, spheres: Spheres) -> tuple[Tensor, ...]:
        """x_init, u_ref, centers, radii and velocity for the model, which says where spheres will be at the knots."""
        u_ref = self.task.u_ref.expand(len(x), self.task.horizon, -1)
        return x, u_ref, spheres.centers, spheres.inflated(self.task.margin), spheres.velocity

    def _call(self, given: tuple[Tensor, ...], warm_start: WarmStart | None = None) -> Iterates:
        x, u_ref, centers, radii, velocity = given
        count = self.iterations if warm_start is None else self.warm_iterations
        return self.model(x, u_ref, centers, radii, warm_start=warm_start, iterations=count or None,
                          velocity=velocity, finish=self.finish)

    def _continued(self, x: Tensor, memory: Memory) -> WarmStart:
        """The last plan one knot on, by whole periods nearest to x."""
        warm = memory.warm_start.shifted()
        plan = warm.solver.x
        moved = plan - self.task.turns(plan[:, :1] - x.unsqueeze(1))
        return replace(warm, solver=replace(warm.solver, x=moved))

    def _planned(self, given: tuple[Tensor, ...], spheres: Spheres, made: Iterates) -> Planned:
        problem, x, u = self.model.problem, made.x[-1], made.u[-1]
        ok = torch.isfinite(x).flatten(1).all(dim=1) & torch.isfinite(u).flatten(1).all(dim=1)
        centers = made.motions[-1].centers if made.motions else spheres.ahead(self.times)
        data = problem.instances(given[0], x, given[1], centers, spheres.radii)
        violation = largest_violation(problem, data, x, u, ok)
        if self._inputs is None:
            return Planned(u[:, 0], x, ok, violation, torch.where(ok, made.solutions[-1].defect, float('nan')),
                           Memory(made.warm_start, ok))
        first, defect = self._inputs(given[0], x[:, 1])
        return Planned(first, x, ok & torch.isfinite(first).all(dim=1), violation, defect, Memory(None, ok))


class OneStep:
    """The input whose step comes nearest to a wanted next state, for plans without inputs:

      min over u_low <= u <= u_high of  |phi(x, u) - x_next|_Q^2 + |u - u_ref|_R^2

    a horizon of one step in the task's weights Q, solved by deqmpc.realtime. R is a ten-thousandth
    of what an input does to the first term at x = 0, so that it only decides where the step does not.
    """

    def __init__(self, task: Task):
        p = task.problem()
        _, F = p.phi.linearize(torch.zeros(1, p.n, dtype=torch.float64), task.u_ref.view(1, -1))
        effect = (p.Q.unsqueeze(1) * F[0, :, p.n:].square()).sum(0)
        self.problem = Problem(p.equations, p.dt, 1, Q=p.Q, R=1e-4 * effect.clamp_min(1e-8), u_low=p.u_low,
                               u_high=p.u_high, position=range(p.n)[p.position])
        self.u_ref, self._solver = task.u_ref, RealtimeSolver(self.problem, 0)

    def __call__(self, x: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, m) from x to `following`, both (B, n), and the largest number (B,) by which the step misses."""
        u_ref = self.u_ref.expand(len(x), 1, -1)
        data = self.problem.instances(x, torch.stack([x, following], dim=1), u_ref)
        u = self._solver.solve_batch(data).u[:, 0]
        return u, (self.problem.phi.step(x, u) - following).abs().amax(dim=1)


def largest_violation(problem: Problem, data: Instances, x: Tensor, u: Tensor, ok: Tensor) -> Tensor:
    """(B,) largest residual of bounds and spheres along x (B, T+1, n), u (B, T, m), at least 0; NaN where not ok."""
    h = problem.residuals(data, x, u).flatten(1)
    largest = h.amax(dim=1).clamp_min(0.0) if h.shape[1] else h.new_zeros(len(h))
    return torch.where(ok, largest, float('nan'))


def rows_of(value, rows: Tensor):
    """Those rows of a tensor, or of every tensor in a dataclass; None stays None."""
    if isinstance(value, Tensor) or value is None:
        return None if value is None else value[rows]
    return replace(value, **{f.name: rows_of(getattr(value, f.name), rows) for f in fields(value)})


def _put(value, rows: Tensor, part):
    """`value` with `part` at those rows: tensors, or dataclasses of them."""
    if isinstance(value, Tensor) or value is None:
        return None if value is None else value.index_copy(0, rows, part)
    return replace(value, **{f.name: _put(getattr(value, f.name), rows, getattr(part, f.name)) for f in fields(value)})
