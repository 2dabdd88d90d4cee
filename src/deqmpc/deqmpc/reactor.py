"""The stirred tank under an MPC with two uncertain coefficients: a benchmark for tuning an MPC from its episodes.

Brandner, Gros and Lucia, Computationally efficient Gauss-Newton reinforcement learning for model predictive control,
and its released code. The plant is deqmpc.dynamics.cstr with alpha and beta drawn from [0.95, 1.05] for each episode;
the policy does not know them. It is the first input of

  min  sum 0.01 (T_R - 126)^2 + 0.01 (T_K - 120)^2 + 0.001 |change / 100 %|^2     over 20 steps of 0.005 h
  s.t. the tank with theta_a, theta_b of the policy; inputs within 0 .. 100 %; 0.1 <= c_A, c_B <= 2 mol/l,
       80 <= T_R, T_K <= 140 degC, soft: 100 for every mol/l and degC of violation, at every knot

which is a deqmpc.problem: weights Q and R, bounds, and `elastic` = 100. The held inputs are states, too, but their
bounds stay hard: per cent are so small a unit that their multipliers are far below 100. The reward of a step is minus
its cost, with the same price of violations; an episode ends after five samples in a row within 1 degC of both set
points, or when its time is over.
Authors: Radau collocation and Ipopt; here one Runge-Kutta step an interval and the compiled interior point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deqmpc.dynamics.cstr import INPUT_HIGH, INPUT_LOW, StirredTank
from deqmpc.dynamics.integrators import RK4
from deqmpc.problem import INF, Instances, Problem
from deqmpc.realtime import RealtimeSolver, Settings
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.training.policy_gradient import Episodes

DT = 0.005  # h
HORIZON = 20
SET_POINT = (126.0, 120.0)  # degC, of T_R and T_K
BAND = 1.0  # degC around the set point
HOLD = 5  # samples in the band that end an episode
TIME_LIMIT = 100  # samples; from then on every sample counts as one in the band, as in the released code
LOW = (0.1, 0.1, 80.0, 80.0, 0.0, 0.0)  # of the first six states
HIGH = (2.0, 2.0, 140.0, 140.0, 100.0, 100.0)
PRICE = 100.0  # of a violation of 1 mol/l or 1 degC
TEMPERATURE_WEIGHT = 0.01  # 1/degC^2
CHANGE_WEIGHT = 0.001  # of (change / 100 %)^2
TRAINING, TEST = 20241128, 20250614  # seeds of episode 0, as the authors'
N, M, P = 8, 2, 2  # states, inputs, parameters


def problem() -> Problem:
    """The policy's problem; theta are the states 6 and 7."""
    Q = [0.0, 0.0, 2.0 * TEMPERATURE_WEIGHT, 2.0 * TEMPERATURE_WEIGHT, 0.0, 0.0, 0.0, 0.0]
    return Problem(StirredTank(), DT, HORIZON, Q, [2e-4 * CHANGE_WEIGHT] * M, x_low=[*LOW, -INF, -INF],
                   x_high=[*HIGH, INF, INF], position=(0,))


def starts(seeds: Sequence[int], first: int = TRAINING) -> Tensor:
    """x (B, 8) of the episodes with these seeds, with the plant's theta_a and theta_b: the authors' draws."""
    low, high = (np.array([*v[:4], *inputs]) for v, inputs in ((LOW, INPUT_LOW), (HIGH, INPUT_HIGH)))
    made = []
    for seed in seeds:
        states, coefficients = np.random.default_rng(first + seed), np.random.default_rng(first + seed + 1)
        states.uniform(low, high), coefficients.uniform(0.95, 1.05, size=2)  # their first draw is not used
        x, (alpha, beta) = states.uniform(low, high), coefficients.uniform(0.95, 1.05, size=2)
        x[4:] = 100.0 * (x[4:] - INPUT_LOW) / np.subtract(INPUT_HIGH, INPUT_LOW)
        made.append([*x, alpha / 0.95 - 1.0, beta - 1.0])
    return torch.tensor(np.array(made), dtype=torch.float64)


class Tank:
    """The plant, as deqmpc.training.policy_gradient.Plant."""

    def __init__(self):
        self.phi = RK4(StirredTank(), DT)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """f (P, 8)."""
        return self.phi.step(x, u)

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant."""
        return self.phi.linearize(x, u)

    def curvature(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """See Plant."""
        return self.phi.curvature(x, u, y)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """r (P,), of the state before the step."""
        off = x[:, 2:4] - x.new_tensor(SET_POINT)
        cost = TEMPERATURE_WEIGHT * off.square().sum(1) + 1e-4 * CHANGE_WEIGHT * u.square().sum(1)
        return -cost - PRICE * torch.relu(_outside(x)).sum(1)

    def reward_derivatives(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant. The kinks of the price have no second derivative."""
        weight = x.new_zeros(N + M)
        weight[2:4], weight[N:] = 2.0 * TEMPERATURE_WEIGHT, 2e-4 * CHANGE_WEIGHT
        gradient = -weight * torch.cat([x, u], dim=1)
        gradient[:, 2:4] += 2.0 * TEMPERATURE_WEIGHT * x.new_tensor(SET_POINT)
        below, above = (_outside(x) > 0).to(x).split(6, dim=1)
        gradient[:, :6] += PRICE * (below - above)
        return gradient, (-torch.diag(weight)).expand(len(x), -1, -1)


def _outside(x: Tensor) -> Tensor:
    """(P, 12) how far the first six states are below their lower and above their upper bounds."""
    return torch.cat([x.new_tensor(LOW) - x[:, :6], x[:, :6] - x.new_tensor(HIGH)], dim=1)


@dataclass(frozen=True)
class Decision:
    """Inputs of B states."""

    u: Tensor  # (B, 2) change, per cent
    by_x: Tensor  # (B, 2, 8) derivative; 0 with respect to the plant's coefficients
    by_theta: Tensor  # (B, 2, 2)
    plan: al.WarmStart
    status: Tensor  # (B,) index into al.STATUS; INFEASIBLE: soft bounds gave way


class Policy:
    """The MPC."""

    def __init__(self, settings: Settings = Settings(tolerance=1e-8, elastic=PRICE)):
        self.problem = problem()
        self._solver = RealtimeSolver(self.problem, 0, settings)

    def decide(self, x: Tensor, theta: Tensor, before: al.WarmStart | None = None,
               derivatives: bool = True) -> Decision:
        """Inputs at x (B, 8) with parameters theta (2,) or (B, 2), from the plans of the step before. Where a plan does
        not converge from there, it is made anew from rest."""
        data = self._instances(x, theta)
        guess = None if before is None else al.guess(self.problem, data, before.x, before.u, al.Settings()).shifted()
        made = self._solve(data, guess, derivatives)
        again = _unsolved(made.status).nonzero()[:, 0]
        if len(again) and before is not None:
            made.put(again, self._solve(data[again], None, derivatives))
        u = _applied(x, made.u)
        by_x = torch.cat([made.by[..., :6], torch.zeros_like(made.by[..., 6:])], dim=2)
        return Decision(u, by_x, made.by[..., 6:], made.plan, made.status)

    def _solve(self, data: Instances, guess: al.WarmStart | None, derivatives: bool) -> _Solved:
        x_init = data.x_init.clone().requires_grad_(derivatives)
        found = self._solver.solve_batch(replace(data, x_init=x_init), guess)
        first = found.u[:, 0]
        by = torch.stack([torch.autograd.grad(first[:, j].sum(), x_init, retain_graph=True)[0] for j in range(M)],
                         dim=1) if derivatives else x_init.new_zeros(len(x_init), M, N)
        return _Solved(first.detach().clone(), by, found.warm_start, found.status)

    def _instances(self, x, theta) -> Instances:
        start = torch.cat([x[:, :6], theta.expand(len(x), P)], dim=1)
        reference = x.new_zeros(len(x), HORIZON + 1, N)
        reference[..., 2:4] = x.new_tensor(SET_POINT)
        return self.problem.instances(start, reference, x.new_zeros(len(x), HORIZON, M))


@dataclass(frozen=True)
class _Solved:
    """Plans of B states."""

    u: Tensor  # (B, 2) first inputs
    by: Tensor  # (B, 2, 8) their derivative with respect to the first state
    plan: al.WarmStart
    status: Tensor  # (B,)

    def put(self, rows: Tensor, other: _Solved) -> None:
        """Write `other` over some rows."""
        mine, theirs = ((s.u, s.by, s.status, *s.plan.tensors()) for s in (self, other))
        for a, b in zip(mine, theirs, strict=True):
            a[rows] = b


def _unsolved(status: Tensor) -> Tensor:
    """(B,) bool: neither a minimum nor, within soft bounds that give way, one of the exact penalty."""
    names = (al.Status.CONVERGED, al.Status.INFEASIBLE)
    return ~torch.isin(status, torch.tensor([al.STATUS.index(s) for s in names]))


def _applied(x, u) -> Tensor:
    """u (B, 2) with the held inputs x_4, x_5 kept in their bounds."""
    return (x[:, 4:6] + u).clamp(0.0, 100.0) - x[:, 4:6]


@dataclass(frozen=True)
class Exploration:
    """One step with another input from every visited state, in the shapes of the episodes (B, N, ..)."""

    u: Tensor
    reward: Tensor
    following: Tensor  # (B, N, 8) state after it
    last: Tensor  # (B, N) bool: the episode ended with this step


@dataclass(frozen=True)
class Rollout:
    """Episodes, and what was tried beside them."""

    episodes: Episodes
    exploration: Exploration | None
    solved: float  # share of the plans that converged


def rollout(policy: Policy, theta: Tensor, x: Tensor, derivatives: bool = True, second: bool = False,
            noise: float = 0.0, seed: int = 0, limit: int = TIME_LIMIT) -> Rollout:
    """Episodes from x (B, 8) with the policy's parameters theta (2,).

    `derivatives`: of the policy, else they are 0; `second`: also pi_theta_theta, by differences of pi_theta; `noise`:
    standard deviation (per cent) of explored inputs around the policy's, 0 for none; `limit`: samples until time is
    over.
    """
    plant, generator, B = Tank(), torch.Generator().manual_seed(seed), len(x)
    steps, plan, inside = [], None, torch.zeros(B, dtype=torch.long)
    live = torch.arange(B)
    solved, plans = 0, 0
    for k in range(limit + HOLD):
        if not len(live):
            break
        d = policy.decide(x, theta, plan, derivatives)
        solved, plans = solved + int((~_unsolved(d.status)).sum()), plans + len(d.status)
        inside = torch.where(in_band(x) | (k >= limit), inside + 1, 0)
        over = inside == HOLD
        step = {'x': x, 'u': d.u, 'reward': plant.reward(x, d.u), 'alive': torch.ones(len(x), dtype=torch.bool),
                'pi_x': d.by_x, 'pi_theta': d.by_theta, 'last': over}
        if second:
            step['pi_theta_theta'] = _second_derivative(policy, theta, x)
        if noise > 0:
            tried = _reflected(x[:, 4:6] + d.u + noise * torch.randn(d.u.shape, generator=generator, dtype=x.dtype))
            step['tried'] = tried - x[:, 4:6]
            step['tried_reward'] = plant.reward(x, step['tried'])
            step['following'] = plant.step(x, step['tried'])
        steps.append({name: _all(value, live, B) for name, value in step.items()})
        keep = ~over
        x, live, inside, plan = plant.step(x, d.u)[keep], live[keep], inside[keep], d.plan[keep]
    made = {name: torch.stack([s[name] for s in steps], dim=1) for name in steps[0]}
    last = made.pop('last')
    tried = [made.pop(name, None) for name in ('tried', 'tried_reward', 'following')]
    return Rollout(Episodes(**made), Exploration(*tried, last) if noise > 0 else None, solved / max(plans, 1))


def in_band(x: Tensor) -> Tensor:
    """(B,) bool: within the bounds, and both temperatures within BAND of their set points."""
    near = (x[:, 2:4] - x.new_tensor(SET_POINT)).abs() <= BAND
    return near.all(1) & (_outside(x) <= 0).all(1)


def _second_derivative(policy: Policy, theta: Tensor, x: Tensor, h: float = 1e-4) -> Tensor:
    """(B, 2, 2, 2) by central differences of pi_theta, symmetric."""
    columns = []
    for step in h * torch.eye(P, dtype=theta.dtype):
        ahead, behind = (policy.decide(x, theta + sign * step).by_theta for sign in (1.0, -1.0))
        columns.append((ahead - behind) / (2.0 * h))
    made = torch.stack(columns, dim=3)
    return 0.5 * (made + made.transpose(2, 3))


def _reflected(held: Tensor) -> Tensor:
    """Held inputs (B, 2) mirrored at 0 and 100 per cent."""
    return 100.0 - (100.0 - held.abs()).abs()


def _all(value: Tensor, live: Tensor, count: int) -> Tensor:
    """`value` of the episodes `live`, zeros (False) for the others."""
    out = value.new_zeros(count, *value.shape[1:])
    out[live] = value
    return out
