"""Near-optimal demonstrations by long-horizon constrained optimisation: `deqmpc experts TASK`.

The tasks' reward is exp(2 - c/2) with a small quadratic cost c, so that the largest return is, to first order, the
least sum of c. A demonstration solves, for a random start x_0 of the task and over T steps of its plant phi,

  min  sum_{t<T} [1/2 |x_t - goal|_Q^2 + 1/2 |u_t - u_ref|_R^2] + 1/2 |x_T - goal|_Qf^2
  s.t. x_{t+1} = phi(x_t, u_t),  |x_t| <= limit,  bounds of the task's problem,  |p_t - o_jt| >= r_j + clearance + g_j

with the interior-point method of deqmpc.realtime, or another one of SOLVERS, from several first guesses, where the
recipe or the caller asks for them also along detours that constrained diffusion finds (deqmpc.detours); o_jt is where
sphere j will be, known to the expert. Constraints on the state are elastic: where there is no room for the clearance,
less of it is kept. The best answer that passes `check` is taken: exact under the plant, within all bounds, and outside
the task's margin of the spheres between the knots too. A sphere whose margin is cut grows by g_j and the plan is made
again.

Spheres that react to the quadrotor follow the plan, and it is made again among where they went, until both agree. Such
a plan is followed for `stage` steps and made again from there, as an episode is longer than what can be agreed upon.

Q is that of c, or larger for velocities and rates where the plan is to be flown by a controller that lags.

A policy in closed loop leaves these trajectories, so each of them is joined by `restarts` that begin at a perturbed
state of it: beside it, behind it, slower or faster, and some inside the margin of the nearest sphere. They have to be
outside of margins and within limits after `GRACE` steps, and never touch a sphere.

Trajectory i depends on the seed and i alone. It is saved in a folder beside the output as soon as it is made, so that
a run that was stopped continues, to the same result. The file is described in deqmpc.datasets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deqmpc import datasets, realtime, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.detours import detours
from deqmpc.dynamics.integrators import RK4
from deqmpc.problem import Problem
from deqmpc.provenance import commit
from deqmpc.realtime import RealtimeSolver, WarmStart
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point
from deqmpc.tasks import Spheres, Task

Guess = tuple[np.ndarray, np.ndarray]  # x (T+1, n), u (T, m)
SOLVERS = {  # settings by name, but for the largest multiplier of a soft constraint
    'realtime': realtime.Settings(tolerance=1e-9, max_steps=200),
    'interior_point': interior_point.Settings(tolerance=1e-9, delta_min=1e-7, linear_solver='parallel'),
    'augmented_lagrangian': al.Settings(mu_0=1e4, mu_max=1e8, feasibility=1e-7, optimality=1e-7, iterations=60,
                                        gn_steps=30, max_steps=2000)}


@dataclass(frozen=True)
class Recipe:
    """How the demonstrations of a task are planned."""

    Q: tuple[float, ...]  # weights of the state
    R: float  # weight of every input
    guesses: Callable[[Task, np.ndarray, int, np.random.Generator], Iterator[Guess]]  # (task, x_0, T, random)
    horizon: int  # T, steps that are planned
    length: int  # steps that are kept: fewer, where the end of the plan is short-sighted
    rest: float  # largest distance of any state from the goal at the end of what is kept: inf where spheres move
    perturbation: tuple[float, ...]  # standard deviation by which restarts leave a trajectory, of every state
    stage: int = 0  # steps after which to plan again, where spheres react to what is flown; 0: never
    restart_length: int = 0  # steps that are kept of a restart; 0: as of others
    velocity: int = 6  # index of the first of three linear velocities in the state
    lag: float = 0.0  # s, standard deviation of the time by which restarts are behind or ahead
    pace: float = 0.0  # standard deviation of their relative speed
    near: float = 0.0  # share of them that begins inside a margin
    home: float = 0.0  # share of them that begins at rest beside the goal
    beside: float = 0.2  # m, standard deviation of these along each axis
    limit: tuple[float, ...] = ()  # largest magnitude of every state after the grace; empty: the problem's bounds
    calm: tuple[float, ...] = ()  # largest magnitude of every state at any time, of plans that are kept
    clearance: float = 0.0  # m from spheres that is sought; the task's margin is what has to be kept
    final: float = 10.0  # Qf / Q
    elastic: float = 1e4  # largest multiplier of a constraint on the state: a start may violate some
    detours: int = 0  # first guesses by constrained diffusion after the others (deqmpc.detours)


@dataclass(frozen=True)
class Settings:
    """What to make."""

    task: str  # name of deqmpc.tasks
    trajectories: int = 400  # nominal ones
    restarts: int = 3  # perturbed ones of each
    seed: int = 0
    starts: str = ''  # demonstrations from whose first states to start, in their order; empty: the task's own starts
    solver: str = 'realtime'  # name in SOLVERS
    detours: int | None = None  # first guesses by constrained diffusion; None: as many as the recipe has

    def __post_init__(self):
        if self.task not in RECIPES:
            raise ValueError(f'task {self.task!r} has no recipe; expected one of {", ".join(RECIPES)}')
        if self.solver not in SOLVERS:
            raise ValueError(f'solver = {self.solver!r}; expected one of {", ".join(SOLVERS)}')
        counts = ('trajectories', 1), ('restarts', 0), ('seed', 0), ('detours', 0)
        for name, least in counts if self.detours is not None else counts[:-1]:
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= least):
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected an integer >= {least}')

    @property
    def recipe(self) -> Recipe:
        """The task's, with these detours."""
        recipe = RECIPES[self.task]
        return recipe if self.detours is None else replace(recipe, detours=self.detours)


# --- first guesses ------------------------------------------------------------------------------

def deflected_lines(task: Task, x: np.ndarray, T: int, random: np.random.Generator) -> Iterator[Guess]:
    """For the Crazyflie: hovering along the line to the goal; then bent to four sides and to four random ones."""
    side = np.cross(x[:3], [0.0, 0.0, 1.0])
    side = side / max(np.linalg.norm(side), 1e-9) if np.linalg.norm(side) > 1e-6 else np.array([0.0, 1.0, 0.0])
    up = np.cross(side, x[:3] / max(np.linalg.norm(x[:3]), 1e-9)) if np.linalg.norm(x[:3]) > 1e-6 else np.eye(3)[2]
    bends = [0.0 * side, *(0.35 * v for v in (side, -side, up, -up)), *random.normal(scale=0.3, size=(4, 3))]
    duration = 1.0 + np.abs(x[:3]).max() / 0.6  # s
    s = np.clip(task.dt * np.arange(T + 1) / duration, 0.0, 1.0)[:, None]
    for bend in bends:
        guess = np.zeros((T + 1, len(x)))
        guess[:, :3] = (1.0 - s * s * (3.0 - 2.0 * s)) * x[:3] + 4.0 * s * (1.0 - s) * bend
        guess[:, 2] = np.maximum(guess[:, 2], task.floor + 0.05)
        guess[:-1, 6:9] = np.diff(guess[:, :3], axis=0) / task.dt
        guess[0] = x
        yield guess, np.ones((T, 4))


def interpolations(task: Task, x: np.ndarray, T: int, random: np.random.Generator) -> Iterator[Guess]:
    """For quadrotors: staying, and all states moved evenly to the goal in several times. The attitude's MRPs go
    straight to zero, through 180 degrees where they start in the shadow set."""
    goal, u = task.goal.numpy(), np.tile(task.u_ref.numpy(), (T, 1))
    yield np.tile(x, (T + 1, 1)), u
    for duration in (0.8, 1.5, 3.0):  # s
        yield _blend(task, x, goal, T, duration), u


def swing_ups(task: Task, x: np.ndarray, T: int, random: np.random.Generator) -> Iterator[Guess]:
    """For a pole: to upright directly and through hanging, at two paces, straight and (among spheres) aside."""
    goal, u = task.goal.numpy(), np.tile(task.u_ref.numpy(), (T, 1))
    pole = int(np.argmax(task.period))  # index of its angle
    for turn in (0.0, -2.0 * np.pi if x[pole] < goal[pole] else 2.0 * np.pi):
        end = goal.copy()
        end[pole] += turn
        for duration in (1.0, 3.0):  # s
            guess = _blend(task, x, end, T, duration)
            yield guess, u
            if task.spheres:
                s = np.clip(task.dt * np.arange(T + 1) / duration, 0.0, 1.0)[:, None]
                guess[:, :3] += 4.0 * s * (1.0 - s) * random.normal(size=3)
                yield guess, u


def _blend(task, x, goal, T, duration) -> np.ndarray:
    """States (T+1, n) from x to the goal in `duration` s, at rest at both ends."""
    s = np.clip(task.dt * np.arange(T + 1) / duration, 0.0, 1.0)[:, None]
    return x + s * s * (3.0 - 2.0 * s) * (goal - x)


_FREE = float('inf')
# Flown by the simulated drone's own controller, plans for the reward alone (velocity and rates of weight 1, 1 m/s) came
# within 0.011 m of a sphere, as they brake late: velocity has more weight here. Rates have less: with weight 4 the
# first 0.1 s of the way back from 0.1 m off ask for 2 mm/s, and a flown policy that learned it stays there.
_CRAZYFLIE = dict(Q=(10.0,) * 6 + (3.0,) * 3 + (0.2,) * 3, R=0.1, guesses=deflected_lines, clearance=0.11, elastic=1e3,
                  limit=(_FREE,) * 6 + (0.75,) * 3 + (_FREE,) * 3, calm=(_FREE,) * 3 + (0.14, 0.14, _FREE) +
                  (_FREE,) * 3 + (8.0,) * 3,  # tilt of 32 deg about each of two axes: 45 deg
                  perturbation=(0.03,) * 3 + (0.025,) * 3 + (0.15,) * 3 + (0.4,) * 3,  # 0.025: 0.1 rad
                  lag=0.1, pace=0.25, near=0.06,
                  home=0.25)  # a policy that never saw them holds 0.1 m off, where its plans hardly move
# R of quadrotors is not the reward's 1e-8: 1 keeps thrusts from chattering where they hardly matter, and costs no
# return. With a pole that is not enough for a policy to learn from: the attitude then jumps within a step or two, and
# so do the states to track. R = 300 and 10 instead of 1 for the body rates cost 0.6 % of the return in closed loop
# (1355.7 instead of 1364.0), change inputs half as much from step to step, and bound 4 % of them instead of 13 %.
_QPOLE = dict(Q=(10.0,) * 6 + (80.0,) + (1.0,) * 3 + (10.0,) * 3 + (1.0,), R=300.0, guesses=swing_ups, velocity=7,
              lag=0.05, perturbation=(0.1,) * 3 + (0.03,) * 3 + (0.1,) + (0.2,) * 7)
# The reward is -(|theta| + |x|) until the pole has been upright for ten steps. With 0.01 for both velocities and
# R = 1e-5 the return is 3 better in closed loop (-104.3 instead of -107.4), with inputs a third larger (RMS 71 N).
_CARTPOLE = dict(Q=(1.0, 1.0, 0.1, 0.1), R=1e-4, guesses=swing_ups, velocity=2, lag=0.05,
                 perturbation=(0.1, 0.1, 0.3, 0.3))
RECIPES = {
    'cartpole': Recipe(**_CARTPOLE, horizon=80, length=80, rest=0.3),
    'crazyflie_obs': Recipe(**_CRAZYFLIE, horizon=60, length=60, rest=0.03),
    'crazyflie_dynobs': Recipe(**_CRAZYFLIE, horizon=80, length=60, rest=_FREE),
    'crazyflie_wall': Recipe(**_CRAZYFLIE, horizon=100, length=100, rest=0.03, detours=8),
    'quadrotor': Recipe(Q=(10.0,) * 6 + (1.0,) * 6, R=0.01, guesses=interpolations, horizon=100, length=100, rest=0.1,
                        perturbation=(0.1,) * 3 + (0.05,) * 3 + (0.2,) * 6, lag=0.05),
    'qpole': Recipe(**_QPOLE, horizon=160, length=120, rest=0.1),
    'qpole_obs': Recipe(**_QPOLE, horizon=160, length=120, rest=0.1, clearance=0.05),
    'qpole_dynobs': Recipe(**_QPOLE, horizon=100, length=200, rest=_FREE, clearance=0.15, stage=25, restart_length=50),
}


# --- planning -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Trajectory:
    """A demonstration of L steps."""

    x: np.ndarray  # (L, n)
    u: np.ndarray  # (L, m)
    centers: np.ndarray  # (L, K, d) m
    velocity: np.ndarray  # (L, K, d) m/s
    radii: np.ndarray  # (K,) m
    value: float  # return of an episode along the whole plan, of which L steps are kept


class Planner:
    """Plans for one task. ValueError where the recipe does not fit the task."""

    rounds = 6  # plans with grown spheres at most
    fractions = (0.2, 0.4, 0.6, 0.8)  # of a step, where clearance is checked between the knots
    tolerance = 1e-6  # on transitions and bounds

    def __init__(self, task: Task, recipe: Recipe, solver: str = 'realtime'):
        self.task, self.recipe = task, recipe
        self.problem = replanned(task.problem(recipe.horizon), recipe)
        self._solver = RealtimeSolver(self.problem, task.spheres, replace(SOLVERS[solver], elastic=recipe.elastic))
        self._between = [RK4(task.equations, f * task.dt) for f in self.fractions]
        self._u_ref = np.tile(task.u_ref.numpy(), (recipe.horizon, 1))
        self._calm = np.array(recipe.calm or [np.inf] * self.problem.n)

    def plan(self, x: torch.Tensor, spheres: Spheres, random: np.random.Generator, grace: int = 0,
             length: int = 0) -> tuple[Trajectory | None, str]:
        """The best trajectory found from x (1, n) among `spheres` (of one episode), or None and why there is none.
        `length` replaces the recipe's."""
        length, parts, before, done = length or self.recipe.length, [], None, 0
        radii = spheres.radii
        while done < length:
            stage, reason = self._stage(x, spheres, random, 0 if done else grace, before)
            if stage is None:
                return None, f'after {done} steps: {reason}' if done else reason
            plan, centers, velocity = stage
            k = min(self.recipe.stage or length, length - done)
            parts.append((plan.x[:k], plan.u[:k], centers[:k], velocity[:k]))
            done, before = done + k, plan.warm_start.shifted(k)
            x = torch.from_numpy(plan.x[k][None])
            spheres = Spheres(*(torch.from_numpy(v[k][None]) for v in (centers, velocity)), radii)
        kept = [np.concatenate(v) for v in zip(*parts, strict=True)]
        value = episode_return(self.task, *(np.concatenate(v) for v in (
            (kept[0], plan.x[k:-1]), (kept[1], plan.u[k:]))))
        return Trajectory(*kept, radii[0].numpy(), value), ''

    def _stage(self, x, spheres, random, grace, before):
        """One plan that passes, with the spheres' motion, or None and a reason: what was planned `before`, continued;
        else the best one from the guesses."""
        start, radii = x[0].numpy(), spheres.radii[0].numpy() + self.recipe.clearance
        if before is not None:
            found, reason = self._refined(start, spheres, radii, self._among(start, spheres, radii, before), grace)
            if found is not None:
                return found, ''
        still, _ = self._motion(spheres, np.tile(start, (self.recipe.horizon + 1, 1)))
        answers = [self._solve(start, still, radii, WarmStart(*guess))
                   for guess in self._guesses(start, still, radii, random)]
        answers = sorted((a for a in answers if np.isfinite(a.x).all()),
                         key=lambda a: (a.defect > self.tolerance, a.cost))
        reason = 'no guess led to a finite plan'
        for i, answer in enumerate(answers):
            if i and abs(answer.cost - answers[i - 1].cost) <= 1e-6 * answer.cost:
                continue  # the same plan again
            found, reason = self._refined(start, spheres, radii, answer, grace)
            if found is not None:
                return found, ''
        return None, reason

    def _guesses(self, start, centers, radii, random) -> Iterator[Guess]:
        """Those of the recipe; then the first of them along detours past the spheres."""
        recipe, p, v = self.recipe, slice(0, 3), slice(self.recipe.velocity, self.recipe.velocity + 3)
        made = list(recipe.guesses(self.task, start, recipe.horizon, random))
        yield from made
        if not recipe.detours:
            return
        problem = self.problem
        paths = detours(np.concatenate([start[p], start[v]]), self._goal_of(start)[p], centers, radii,
                        problem.x_high[v].clamp_max(1.0).numpy(), float(problem.x_low[2]), self.task.dt,
                        recipe.horizon, recipe.detours, int(random.integers(2 ** 31)))
        for position, velocity in zip(*paths, strict=True):
            x, u = (a.copy() for a in made[0])
            x[1:, p], x[1:, v] = position[1:], velocity[1:]
            yield x, u

    def _refined(self, start, spheres, radii, answer, grace):
        """The plan made again among spheres that move as they do beside it and are grown where they were cut, with
        their centres and velocities; or None and a reason."""
        N, reason = self.recipe.stage or self.recipe.horizon, 'a plan is not finite'
        for _ in range(self.rounds):
            if not np.isfinite(answer.x).all():
                break
            centers, velocity = self._motion(spheres, answer.x)
            reason, cut = self.check(answer.x[:N + 1], answer.u[:N], centers[:N + 1], spheres.radii[0].numpy(), grace)
            if not reason:
                return (answer, centers, velocity), ''
            radii = radii + np.where(cut > 0.0, cut + 2e-3, 0.0)
            answer = self._solve(start, centers, radii, answer.warm_start)
        return None, reason

    def _among(self, start, spheres, radii, warm_start):
        """The plan among spheres that move as they do beside the warm start."""
        return self._solve(start, self._motion(spheres, warm_start.x)[0], radii, warm_start)

    def _solve(self, start, centers, radii, warm_start):
        goal = np.tile(self._goal_of(warm_start.x[-1]), (self.recipe.horizon + 1, 1))
        return self._solver.solve(start, goal, self._u_ref, centers, radii, warm_start)

    def _goal_of(self, x):
        """The goal, angles turned to within half a period of the state x (n,)."""
        return self.task.nearest_goal(torch.from_numpy(x)).numpy()

    def _motion(self, spheres, x) -> tuple[np.ndarray, np.ndarray]:
        """Centres and velocities (T+1, K, d) of the spheres of an episode that goes through the states x (T+1, n)."""
        centers, velocity = self.task.motion(spheres, torch.from_numpy(x)[None])
        return centers[0].numpy(), velocity[0].numpy()

    def check(self, x: np.ndarray, u: np.ndarray, centers: np.ndarray, radii: np.ndarray,
              grace: int = 0) -> tuple[str, np.ndarray]:
        """What is wrong with x (T+1, n), u (T, m) among spheres at centers (T+1, K, d): '' or a sentence; and by how
        many metres every sphere's margin is cut (K,). In the first `grace` steps only touching counts."""
        with torch.no_grad():
            X, U = torch.from_numpy(x[:-1]), torch.from_numpy(u)
            defect = float((self.task.step(X, U) - torch.from_numpy(x[1:])).abs().max())
            between = [phi.step(X, U)[:, self.problem.position].numpy() for phi in self._between]
        margin = np.full(len(u), self.task.margin)
        margin[:grace] = 0.0
        cut = np.zeros(len(radii))
        for f, p in zip((*self.fractions, 1.0), (*between, x[1:, self.problem.position]), strict=True):
            o = (1.0 - f) * centers[:-1] + f * centers[1:]
            gap = np.linalg.norm(p[:, None] - o, axis=-1) - radii - margin[:, None]
            cut = np.maximum(cut, -gap.min(axis=0, initial=np.inf))
        bound = self._bound_violation(x, u, grace)
        end = x[min(self.recipe.length, len(u))]
        last = np.abs(end - self._goal_of(end)).max()
        wild = (np.abs(x[1:]) / self._calm).max()
        if defect > self.tolerance:
            return f'a transition is wrong by {defect:.1e}', cut
        if bound > 1e3 * self.tolerance:
            return f'a bound is violated by {bound:.1e}', cut
        if wild > 1.0:
            return f'a state is {wild:.2f} times its calm limit', cut
        if cut.max(initial=0.0) > 1e3 * self.tolerance:
            return f'a margin is cut by {cut.max():.3f} m', cut
        return (f'not at rest at the end: {last:.3f}' if last > self.recipe.rest else ''), cut

    def _bound_violation(self, x, u, grace) -> float:
        sign, limit = self.problem.sign.numpy(), self.problem.limit.numpy()
        h = np.hstack([x[1:], u]) @ sign.T - limit
        of_state = np.abs(sign[:, :self.problem.n]).sum(axis=1) > 0
        h[:grace, of_state] = 0.0
        return float(h.max(initial=0.0))


def replanned(problem: Problem, recipe: Recipe) -> Problem:
    """`problem` with the weights and limits of a recipe. ValueError where their number is not that of the states."""
    n, m = problem.n, problem.m
    sizes = {name: len(getattr(recipe, name)) for name in ('Q', 'perturbation', 'limit', 'calm')}
    if any(size not in ((n, 0) if name in ('limit', 'calm') else (n,)) for name, size in sizes.items()):
        raise ValueError(f'the recipe has {sizes}; expected {n} numbers each')
    own = torch.tensor(recipe.limit or [np.inf] * n, dtype=torch.float64)
    Q = np.array(recipe.Q)
    return Problem(problem.equations, problem.dt, problem.horizon, Q=Q, R=[recipe.R] * m, Qf=recipe.final * Q,
                   u_low=problem.u_low, u_high=problem.u_high, x_low=torch.maximum(problem.x_low, -own),
                   x_high=torch.minimum(problem.x_high, own), position=range(n)[problem.position])


# --- one nominal trajectory and its restarts ----------------------------------------------------

GRACE = 5  # steps in which a restart may be inside a margin
START_GAP = 0.02  # m, least clearance of a restart


def family(planner: Planner, settings: Settings, index: int) -> Demonstrations:
    """Nominal trajectory `index` and its restarts; what failed is told in `about`."""
    seeds = np.random.SeedSequence([settings.seed, index]).generate_state(2)
    generator, random = torch.Generator().manual_seed(int(seeds[0])), np.random.default_rng(seeds[1])
    x, spheres = _start(planner.task, settings, index, generator)
    nominal, reason = planner.plan(x, spheres, random)
    made, failures = [nominal], [f'nominal {index}: {reason}'] if reason else []
    for r in range(settings.restarts if nominal else 0):
        state, around = perturbed(planner, nominal, random)
        restart, reason = planner.plan(state, around, random, GRACE, planner.recipe.restart_length)
        made.append(restart)
        failures += [f'restart {index}.{r}: {reason}'] if reason else []
    return _together(planner.task, [t for t in made if t is not None], failures)


def _start(task, settings, index, generator) -> tuple[torch.Tensor, Spheres]:
    return datasets.load(settings.starts).starts([index]) if settings.starts else task.sample(1, generator)


def perturbed(planner: Planner, nominal: Trajectory, random: np.random.Generator) -> tuple[torch.Tensor, Spheres]:
    """A state (1, n) beside a random one of `nominal`, and the spheres then. The unperturbed one, where 100 draws are
    all too close to a sphere."""
    home = random.random() < planner.recipe.home
    t = len(nominal.x) - 1 if home else int(len(nominal.x) * random.random() ** 2)  # more early, before it rests
    at = [torch.from_numpy(np.array(v)[None]) for v in (nominal.centers[t], nominal.velocity[t], nominal.radii)]
    spheres, x = Spheres(*at), nominal.x[t]
    near = random.random() < planner.recipe.near
    for _ in range(100):
        moved = _off_track(planner, x, nominal.u[t], random)
        if home:
            moved[planner.problem.position] += planner.recipe.beside * random.normal(size=3)
        elif near:
            _approach(moved, nominal.centers[t], nominal.radii, random.uniform(START_GAP, planner.task.margin),
                      planner.recipe.velocity)
        batch = torch.from_numpy(moved[None])
        if not planner.task.failed(batch, spheres).any() and \
                spheres.gap(batch[:, :spheres.centers.shape[-1]]).min() >= START_GAP - 1e-9:
            return batch, spheres
    return torch.from_numpy(x[None]), spheres


def _off_track(planner, x, u, random) -> np.ndarray:
    """x (n,) at another pace, behind or ahead, and beside."""
    recipe, task = planner.recipe, planner.task
    p, moved = planner.problem.position, x + random.normal(size=len(x)) * np.array(recipe.perturbation)
    moved[p] -= recipe.lag * random.normal() * np.array(task.equations.derivative(x, u))[p]
    v = slice(recipe.velocity, recipe.velocity + 3)
    moved[v] += recipe.pace * random.normal() * x[v]
    return moved


def _approach(x, centers, radii, gap, velocity):
    """Move the position in x (n,) to `gap` from the surface of the nearest sphere, past which it then flies."""
    away = x[:3] - centers
    distance = np.linalg.norm(away, axis=1)
    j = np.argmin(distance - radii)
    out = away[j] / distance[j]
    x[:3] = centers[j] + (radii[j] + gap) * out
    v = x[velocity:velocity + 3]
    v -= min(v @ out, 0.0) * out


def _together(task, trajectories, failures) -> Demonstrations:
    """Trajectories one after another, in single precision. Spheres that move are stored for every state."""
    def stack(values, shape):
        return np.concatenate(values) if values else np.zeros((0, *shape), np.float32)
    K, (n, m) = task.spheres, (task.equations.n, task.equations.m)
    moving = any(t.velocity.any() for t in trajectories)
    keep = slice(None) if moving else slice(1)
    centers, velocity = (stack([v[keep].astype(np.float32) for v in part], (K, task.spatial)) for part in (
        [t.centers for t in trajectories], [t.velocity for t in trajectories]))
    restart = np.arange(len(trajectories)) > 0  # the nominal one is first
    about = {'failures': failures, 'returns': [t.value for t in trajectories]}
    return Demonstrations(stack([t.x for t in trajectories], (n,)).astype(np.float32),
                          stack([t.u for t in trajectories], (m,)).astype(np.float32),
                          np.array([len(t.x) for t in trajectories], dtype=np.int64), centers, velocity,
                          stack([t.radii[None] for t in trajectories], (K,)), about, restart)


def episode_return(task: Task, x: np.ndarray, u: np.ndarray) -> float:
    """Return of an episode along x (L, n), u (L, m), the last state held where the episode is longer."""
    r = task.reward(torch.from_numpy(x.astype(float)), torch.from_numpy(u.astype(float)))[:task.steps]
    return float(r.sum() + (task.steps - len(r)) * r[-1])


# --- many, in parts -----------------------------------------------------------------------------

def make(settings: Settings, output: Path, processes: int = 1, progress: bool = False,
         command: str = '') -> Demonstrations:
    """Make what is missing of the parts beside `output`, join them there, return them. ValueError where the parts are
    of other settings."""
    parts = output.with_suffix('.parts')
    _claim(parts, settings)
    if settings.starts:
        _check_starts(settings)
    missing = [i for i in range(settings.trajectories) if not _part(parts, i).exists()]
    with tqdm(total=settings.trajectories, initial=settings.trajectories - len(missing), unit='trajectory',
              desc=settings.task, disable=not progress) as bar:
        for _ in _run(settings, parts, missing, processes):
            bar.update()
    joined = join([datasets.load(_part(parts, i)) for i in range(settings.trajectories)], settings, command)
    datasets.save(output, joined)
    return joined


def _check_starts(settings):
    """ValueError where the file to start from does not fit."""
    given, n = datasets.load(settings.starts), tasks.make(settings.task).equations.n
    if len(given.lengths) < settings.trajectories or given.states.shape[1] != n:
        raise ValueError(f'{settings.starts} has {len(given.lengths)} trajectories of {given.states.shape[1]} numbers; '
                         f'expected at least {settings.trajectories} of {n}')


def _claim(parts, settings):
    """Note in the folder what it is for, or see that it is for the same."""
    own = asdict(settings) | {'recipe': described(settings.recipe)}
    del own['trajectories']  # more of them may follow
    note = parts / 'settings.json'
    if note.exists():
        other = json.loads(note.read_text())
        if _completed(other) != own:
            raise ValueError(f'{parts} holds parts of {other}; expected {own}. Delete the folder or choose another '
                             f'--output')
    parts.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(own))


def _completed(note) -> dict:
    """A note with the defaults of what was not known when it was written."""
    def defaults(cls):
        return {f.name: _plain(f.default) for f in fields(cls) if f.default is not MISSING}
    given = defaults(Settings) | note | {'recipe': defaults(Recipe) | note['recipe']}
    return {k: v for k, v in given.items() if k != 'trajectories'}


def _part(parts, index) -> Path:
    return parts / f'{index:06d}.npz'


def _run(settings, parts, indices, processes) -> Iterator[int]:
    if processes == 1 or len(indices) < 2:
        _prepare(settings, parts)
        yield from map(_make_part, indices)
        return
    with multiprocessing.get_context('spawn').Pool(processes, _prepare, (settings, parts)) as pool:
        yield from pool.imap_unordered(_make_part, indices)


_worker: dict = {}  # of this process: planner, settings, folder, commit of the code that it runs


def _prepare(settings, parts):
    torch.set_num_threads(1)
    _worker.update(planner=Planner(tasks.make(settings.task), settings.recipe, settings.solver), settings=settings,
                   parts=parts, commit=commit())


def _make_part(index) -> int:
    made = family(_worker['planner'], _worker['settings'], index)
    made.about['commit'] = _worker['commit']
    datasets.save(_part(_worker['parts'], index), made)
    return index


def join(parts: list[Demonstrations], settings: Settings, command: str = '') -> Demonstrations:
    """All parts as one, with where they come from. ValueError where no plan succeeded at all."""
    restart = np.concatenate([p.restart for p in parts])
    failures = sum((p.about['failures'] for p in parts), [])
    returns = np.array(sum((p.about['returns'] for p in parts), []))
    nominal = returns[~restart]
    if not len(nominal):
        raise ValueError(f'{settings.task}: none of {len(parts)} starts led to a plan; {failures[0]}')
    about = asdict(settings) | {
        'commit': ' '.join(sorted({p.about['commit'] for p in parts})), 'command': command,
        'recipe': described(settings.recipe),
        'success_share': len(restart) / (len(restart) + len(failures)), 'failures': failures,
        'nominal_return_mean': float(nominal.mean()), 'nominal_return_sd': float(nominal.std()), **_given(settings)}
    return Demonstrations(*(np.concatenate([getattr(p, name) for p in parts]) for name in (
        'states', 'controls', 'lengths', 'centers', 'velocity', 'radii')), about, restart)


def _given(settings) -> dict[str, float]:
    """Returns of the demonstrations whose starts were used."""
    if not settings.starts:
        return {}
    given, task = datasets.load(settings.starts), tasks.make(settings.task)
    parts = [slice(a, a + length) for a, length in zip(given.first, given.lengths, strict=True)]
    returns = np.array([episode_return(task, given.states[p], given.controls[p])
                        for p in parts[:settings.trajectories]])
    return {'starts_return_mean': float(returns.mean()), 'starts_return_sd': float(returns.std())}


def described(recipe: Recipe) -> dict:
    """A recipe in what JSON knows: functions by name, numbers that are not finite as text."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe)}


def _plain(value):
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if callable(value):
        return value.__name__
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


# --- command line -------------------------------------------------------------------------------

def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='deqmpc experts', description=main.__doc__)
    parser.add_argument('task', metavar='TASK', help=', '.join(RECIPES))
    parser.add_argument('--trajectories', type=int, default=Settings.trajectories, help='nominal ones (%(default)s)')
    parser.add_argument('--restarts', type=int, default=Settings.restarts,
                        help='perturbed ones of each (%(default)s)')
    parser.add_argument('--seed', type=int, default=Settings.seed)
    parser.add_argument('--starts', default='', metavar='FILE',
                        help="demonstrations from whose first states to start; default: the task's own starts")
    parser.add_argument('--solver', default=Settings.solver, help=f'{", ".join(SOLVERS)} (%(default)s)')
    parser.add_argument('--detours', type=int, metavar='N',
                        help="first guesses by constrained diffusion, past walls (default: the recipe's)")
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--output', type=Path, help='default: runs/experts/TASK.npz')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a sentence')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make near-optimal demonstrations of a task; a stopped run continues."""
    argv = sys.argv[1:] if argv is None else argv
    options = _arguments(argv)
    output = options.output or Path('runs/experts') / f'{options.task}.npz'
    try:
        settings = Settings(options.task, options.trajectories, options.restarts, options.seed, options.starts,
                            options.solver, options.detours)
        made = make(settings, output, max(options.processes, 1), sys.stderr.isatty(),
                    ' '.join(['deqmpc experts', *argv]))
    except (ValueError, FileNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    about = {k: v for k, v in made.about.items() if k not in ('recipe', 'failures')}
    about |= {'output': str(output), 'demonstrations': len(made.lengths), 'states': len(made.states)}
    print(json.dumps(about) if options.json else _sentence(output, made))
    return 0


def _sentence(output, made) -> str:
    about = made.about
    beside = (f', of the demonstrations started from {about["starts_return_mean"]:.1f} +- '
              f'{about["starts_return_sd"]:.1f}' if about['starts'] else '')
    return (f'{output}: {len(made.lengths)} demonstrations, {len(made.states)} states; {about["success_share"]:.1%} of '
            f'the plans succeeded; return {about["nominal_return_mean"]:.1f} +- {about["nominal_return_sd"]:.1f}'
            f'{beside}')
