"""Batched episodes of a task under a planner, as deqmpc.tasks.base defines them.

For t = 0..steps-1, where the episode has not ended:

  y_t = x_t + observation noise, or the last y that arrived where this one drops out
  u_t = clip(plan(y_t, spheres_t))      r_t = reward(x_t, u_t)
  x_{t+1} = phi(x_t, u_t) + process noise      spheres_{t+1} = move(spheres_t, x_{t+1})

A goal that is moved by g (GoalChange) is a change of frame for planner and reward, x - g and spheres - g, that plant,
spheres and failure do not notice; the planner starts cold then.

Only the state drops out and is noisy; the spheres are known. Random numbers are drawn for all episodes at every step,
ended or not: what one episode meets does not depend on how the others end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deqmpc.planners import Planner
from deqmpc.problem import Problem
from deqmpc.tasks import Spheres, Task


@dataclass(frozen=True)
class Disturbance:
    """What a rollout suffers. Standard deviations in the units of the state: one number, or n."""

    process: float | tuple[float, ...] = 0.0  # of what is added to every following state
    observation: float | tuple[float, ...] = 0.0  # of what is added to the state that the planner sees
    dropout: float = 0.0  # probability that an observation does not arrive; the first one always does

    def __post_init__(self):
        for name in ('process', 'observation'):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if value.dim() > 1 or not (torch.isfinite(value) & (value >= 0)).all():
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected one number >= 0, or one for each state')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout = {self.dropout!r}; expected a probability in [0, 1)')

    @property
    def none(self) -> bool:
        """Whether nothing is random."""
        return not (self.dropout or any(torch.as_tensor(v).any() for v in (self.process, self.observation)))


@dataclass(frozen=True)
class GoalChange:
    """The goal moves during the episode."""

    offset: tuple[float, ...]  # by so much, in the first numbers of the state (m)
    step: int = 0  # from this step on

    def applied(self, x: Tensor, spheres: Spheres) -> tuple[Tensor, Spheres]:
        """x (B, n) and spheres as seen from the new goal."""
        g = x.new_zeros(x.shape[1])
        g[:len(self.offset)] = x.new_tensor(self.offset)
        return x - g, replace(spheres, centers=spheres.centers - g[:spheres.centers.shape[-1]])


@dataclass(frozen=True)
class Rollouts:
    """B episodes of N steps. After its end an episode's state stays as it was; inputs and rewards are 0."""

    x: Tensor  # (B, N+1, n)
    u: Tensor  # (B, N, m) as applied, within the bounds
    reward: Tensor  # (B, N)
    length: Tensor  # (B,) steps taken
    failed: Tensor  # (B,) bool: ended by failure
    succeeded: Tensor  # (B,) bool: ended by success; in tasks that never end so, succeeding at the last state
    planned: Tensor  # (B, N) bool: a finite plan was found; False after the end
    plan_violation: Tensor  # (B, N) largest violation of bounds and spheres by the plan; NaN where none
    plan_defect: Tensor  # (B, N) largest violation of the dynamics by the plan; NaN where none
    violation: Tensor  # (B,) largest violation of bounds and spheres by x_1..x_length
    seconds: float  # of planning, all episodes together

    @property
    def returns(self) -> Tensor:
        """(B,) sum of rewards."""
        return self.reward.sum(dim=1)

    @property
    def unplanned(self) -> Tensor:
        """(B,) steps without a finite plan."""
        return self.length - self.planned.sum(dim=1)

    @property
    def seconds_per_step(self) -> float:
        """Planning time of one step of one episode, as a share of its batch's."""
        return self.seconds / max(int(self.length.sum()), 1)


@torch.no_grad()
def rollout(task: Task, planner: Planner, x: Tensor, spheres: Spheres | None = None, steps: int | None = None,
            disturbance: Disturbance = Disturbance(), generator: torch.Generator | None = None,
            change: GoalChange | None = None, progress: bool = False) -> Rollouts:
    """Episodes from the starts x (B, n), float64, among `spheres` (None: none), for `steps` (None: the task's).
    `generator` draws what `disturbance` asks for; `progress` shows a bar on a terminal. `change` moves the goal.
    ValueError for shapes, and where the generator is missing."""
    spheres = Spheres.none(len(x), task.spatial) if spheres is None else spheres
    if generator is None and not disturbance.none:
        raise ValueError('generator = None; expected a torch.Generator for the disturbances')
    problem = task.problem()
    if x.dim() != 2 or x.shape[1] != problem.n or x.dtype != torch.float64 or len(spheres.radii) != len(x):
        raise ValueError(f'x is {x.dtype} of shape {tuple(x.shape)} among spheres for {len(spheres.radii)} episodes; '
                         f'expected {torch.float64} of shape (B, {problem.n}) and B')
    if change is not None and not 0 < len(change.offset) <= min(task.spatial, task.positions):
        raise ValueError(f'offset = {change.offset!r} of the goal; expected 1 to {min(task.spatial, task.positions)} '
                         f'numbers (m) for the task {task.name}')
    run = _Run(task, problem, x, spheres, task.steps if steps is None else steps, change)
    observe = _Observer(disturbance, x, generator)
    with np.errstate(over='ignore', invalid='ignore'):  # a state that leaves the numbers is a failure, not a warning
        for t in tqdm(range(run.steps), desc=f'{task.name}: {len(x)} rollouts', disable=None if progress else True):
            seen, push = observe(run.now), observe.push()
            if len(run.rows) == 0:
                break
            run.advance(t, planner, seen, push)
    return run.result()


class _Observer:
    """What the planner sees, and what pushes the state."""

    def __init__(self, disturbance: Disturbance, x: Tensor, generator: torch.Generator | None):
        self.disturbance, self.generator, self.last = disturbance, generator, None
        self.shape = x.shape

    def __call__(self, x: Tensor) -> Tensor:
        d = self.disturbance
        fresh = x + self._normal(d.observation)
        if self.last is not None and d.dropout:
            lost = torch.rand(len(x), generator=self.generator, dtype=torch.float64) < d.dropout
            fresh = torch.where(lost.unsqueeze(1), self.last, fresh)
        self.last = fresh
        return fresh

    def push(self) -> Tensor:
        return self._normal(self.disturbance.process)

    def _normal(self, deviation) -> Tensor:
        deviation = torch.as_tensor(deviation, dtype=torch.float64).expand(self.shape)
        if not deviation.any():
            return torch.zeros(self.shape, dtype=torch.float64)
        return deviation * torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


class _Run:
    """Episodes under way. `rows` are those that have not ended; `spheres`, `memory` and `streak` are theirs."""

    def __init__(self, task: Task, problem: Problem, x: Tensor, spheres: Spheres, steps: int,
                 change: GoalChange | None):
        B, self.steps = len(x), steps
        self.task, self.problem, self.change = task, problem, change
        self.x = x.unsqueeze(1).repeat(1, steps + 1, 1)
        self.u = x.new_zeros(B, steps, problem.m)
        self.reward = x.new_zeros(B, steps)
        self.length = torch.zeros(B, dtype=torch.long)
        self.failed = task.failed(x, spheres)
        self.succeeded = torch.zeros(B, dtype=torch.bool)
        self.planned = torch.zeros(B, steps, dtype=torch.bool)
        self.plan_violation, self.plan_defect = (x.new_full((B, steps), float('nan')) for _ in range(2))
        self.violation = x.new_zeros(B)
        self.seconds, self.memory = 0.0, None
        self.now = x.clone()  # (B, n)
        self.rows = torch.arange(B)
        self.spheres, self.streak = spheres, torch.zeros(B, dtype=torch.long)
        self._keep(~self.failed)

    def advance(self, t: int, planner: Planner, seen: Tensor, push: Tensor) -> None:
        """One step of the episodes that have not ended."""
        rows, task, x = self.rows, self.task, self.now[self.rows]
        towards, looked, near = x, seen[rows], self.spheres
        if self.change is not None and t >= self.change.step:
            (towards, _), (looked, near) = (self.change.applied(v, near) for v in (towards, looked))
            self.memory = None if t == self.change.step else self.memory
        began = time.perf_counter()
        made = planner.plan(looked, near, self.memory)
        self.seconds += time.perf_counter() - began
        self.memory = made.memory
        u = torch.minimum(torch.maximum(made.u, self.problem.u_low), self.problem.u_high)
        self.u[rows, t], self.reward[rows, t] = u, task.reward(towards, u)
        self.planned[rows, t] = made.ok
        self.plan_violation[rows, t], self.plan_defect[rows, t] = made.violation, made.defect
        x = task.step(x, u) + push[rows]
        self.spheres = task.move(self.spheres, x)
        self.length[rows] = t + 1
        self.now[rows] = x
        self.x[rows, t + 1:] = x.unsqueeze(1)
        self.violation[rows] = torch.fmax(self.violation[rows], self._violation(x, u))
        self._end(t, x)

    def _end(self, t: int, x: Tensor) -> None:
        """Find out which episodes this state ends."""
        failed, good = self.task.failed(x, self.spheres), self.task.succeeded(x)
        self.streak = torch.where(good, self.streak + 1, 0)
        done = (self.streak >= self.task.hold) if self.task.hold else good & (t + 1 == self.steps)
        self.failed[self.rows], self.succeeded[self.rows] = failed, done & ~failed
        self._keep(~(failed | done))

    def _keep(self, going: Tensor) -> None:
        if not going.all():
            rows = going.nonzero()[:, 0]
            self.rows, self.streak, self.spheres = self.rows[rows], self.streak[rows], self.spheres[rows]
            self.memory = None if self.memory is None else self.memory[rows]

    def _violation(self, x: Tensor, u: Tensor) -> Tensor:
        """(B,) of bounds and spheres, in their units, by a state and the input that led to it."""
        inside = -self.spheres.gap(x[:, :self.task.spatial])
        beyond = torch.cat([x, u], dim=1) @ self.problem.sign.T - self.problem.limit
        return torch.cat([beyond, inside.unsqueeze(1)], dim=1).amax(dim=1).clamp_min(0.0)

    def result(self) -> Rollouts:
        """What was recorded."""
        return Rollouts(self.x, self.u, self.reward, self.length, self.failed, self.succeeded, self.planned,
                        self.plan_violation, self.plan_defect, self.violation, self.seconds)
