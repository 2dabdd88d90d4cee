"""What a task is: dynamics, cost, constraints, starts, reward and the end of an episode, batched.

An episode runs in steps of dt, for t = 0..steps-1:

  u_t = policy(x_t, spheres_t)   x_{t+1} = phi(x_t, clip(u_t))   spheres_{t+1} = move(spheres_t, x_{t+1})
  r_t = reward(x_t, u_t)         return = sum of r_t

It ends early, with reward 0 from then on, where a state has failed (touched a sphere, left the numbers) and where
it has succeeded for `hold` steps in a row. Angles may be given modulo their period; policies see those within half a
period of the goal's, `wrapped`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deqmpc.dynamics.equations import Equations
from deqmpc.networks.obstacle_motion import constant_velocity
from deqmpc.networks.temporal import Settings as NetworkSettings
from deqmpc.problem import Problem


@dataclass(frozen=True)
class Spheres:
    """Spheres of B episodes at one instant. K may be zero."""

    centers: Tensor  # (B, K, d) m
    velocity: Tensor  # (B, K, d) m/s; zero where they stand still
    radii: Tensor  # (B, K) m

    @classmethod
    def none(cls, count: int, spatial: int = 3) -> Spheres:
        """Empty fields for `count` episodes."""
        zero = torch.zeros(count, 0, spatial, dtype=torch.float64)
        return cls(zero, zero, zero[..., 0])

    def __getitem__(self, episodes) -> Spheres:
        """The fields of some episodes (indices or mask over B)."""
        return Spheres(self.centers[episodes], self.velocity[episodes], self.radii[episodes])

    def ahead(self, times: Tensor) -> Tensor:
        """Centres (B, len(times), K, d) after `times` (s) at constant velocity."""
        return constant_velocity(self.centers, self.velocity, times)

    def inflated(self, margin: float) -> Tensor:
        """Radii (B, K) with `margin` (m) to keep from every surface; absent spheres (radius 0) stay absent."""
        return torch.where(self.radii > 0, self.radii + margin, 0.0)

    def gap(self, position: Tensor) -> Tensor:
        """(B,) m from `position` (B, d) to the nearest surface; inf without spheres."""
        if self.radii.shape[1] == 0:
            return position.new_full(position.shape[:1], float('inf'))
        return ((self.centers - position.unsqueeze(1)).norm(dim=-1) - self.radii).amin(dim=1)


@dataclass(frozen=True)
class Task(ABC):
    """One task. Subclasses give the numbers; a field changed by `dataclasses.replace` changes the task."""

    name: ClassVar[str]
    steps: int  # control steps of an episode
    dt: float  # s
    horizon: int  # T of the policy's problem
    hold: int  # steps in a row that must succeed to end an episode; 0: episodes never end by success
    spheres: int  # K
    radius: float  # m, of every sphere
    positions: ClassVar[int]  # first numbers of the state that the network predicts as x_0 + dt out
    spatial: ClassVar[int] = 3  # numbers of a sphere's centre: the first numbers of the state
    margin: ClassVar[float] = 0.0  # m that policies keep from every sphere's surface
    softness: ClassVar[float] = float('inf')  # largest multiplier of a constraint on the state, in policies
    give: ClassVar[float] = float('inf')  # how far these give way at that price; farther costs more (policies.deq_mpc)
    period: ClassVar[tuple[float, ...]] = ()  # of every state, 0 where it is no angle; empty: no angles

    @property
    @abstractmethod
    def equations(self) -> Equations:
        """Continuous dynamics."""

    @abstractmethod
    def problem(self, horizon: int | None = None) -> Problem:
        """The policy's tracking problem: weights, bounds, spheres. `horizon` replaces the task's own."""

    @property
    @abstractmethod
    def u_ref(self) -> Tensor:
        """(m,) inputs that cost nothing in `problem`."""

    @property
    def flight_problem(self) -> dict[str, float]:
        """What a model folder records for the policy that flies it (deqmpc.policies.learned.CrazyflieProblem)."""
        return {}

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """Random starts x (count, n), float64, and their spheres; none of them has failed."""

    @abstractmethod
    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """r (B,) of the input u (B, m) at the state x (B, n)."""

    @property
    def goal(self) -> Tensor:
        """(n,) state that is sought."""
        return torch.zeros(self.equations.n, dtype=torch.float64)

    @property
    @abstractmethod
    def best_reward(self) -> float:
        """The largest reward of a step."""

    def network(self, kind: str, hidden: int, **changes) -> NetworkSettings:
        """Settings of a network for this task."""
        given = dict(kind=kind, hidden=hidden, n=self.equations.n, horizon=self.horizon, positions=self.positions,
                     dt=self.dt, spheres=self.spheres > 0, spatial=self.spatial)
        return NetworkSettings(**{**given, **changes})

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """The state (B, n) after dt, with u (B, m) clipped to the bounds."""
        problem = self._plant()
        return problem.phi.step(x, torch.minimum(torch.maximum(u, problem.u_low.to(u)), problem.u_high.to(u)))

    def move(self, spheres: Spheres, x: Tensor) -> Spheres:
        """The spheres after dt, where the state is x by then. Here: at constant velocity."""
        return replace(spheres, centers=spheres.centers + self.dt * spheres.velocity)

    def failed(self, x: Tensor, spheres: Spheres) -> Tensor:
        """(B,) bool: not finite, or inside a sphere."""
        return ~torch.isfinite(x).all(dim=1) | (spheres.gap(x[:, :spheres.centers.shape[-1]]) < 0)

    def succeeded(self, x: Tensor) -> Tensor:
        """(B,) bool; counts only where `hold` > 0."""
        return torch.zeros(len(x), dtype=torch.bool)

    def turns(self, x: Tensor) -> Tensor:
        """What to subtract from x (..., n) to have every angle in [-period/2, period/2]: multiples of the periods."""
        if not self.period:
            return torch.zeros_like(x)
        period = x.new_tensor(self.period)
        return torch.where(period > 0, torch.round(x / period.clamp_min(1e-9)) * period, 0.0)

    def nearest_goal(self, x: Tensor) -> Tensor:
        """The goal with every angle within half a period of that of x (..., n)."""
        return self.goal.to(x) + self.turns(x - self.goal.to(x))

    def motion(self, spheres: Spheres, x: Tensor) -> tuple[Tensor, Tensor]:
        """Centres and velocities (B, T+1, K, d) of the spheres of episodes that go through the states x (B, T+1, n)."""
        path = [spheres]
        for t in range(1, x.shape[1]):
            path.append(self.move(path[-1], x[:, t]))
        return torch.stack([s.centers for s in path], dim=1), torch.stack([s.velocity for s in path], dim=1)

    def wrapped(self, x: Tensor) -> Tensor:
        """x (..., n) with every angle within half a period of the goal's."""
        return x - self.turns(x - self.goal.to(x))

    def _plant(self) -> Problem:
        """The problem whose phi is the plant; kept, because deriving it takes time."""
        key = (type(self), self)
        if key not in _PLANTS:
            _PLANTS[key] = self.problem()
        return _PLANTS[key]


_PLANTS: dict = {}


def uniform(count: int, low: Sequence[float], high: Sequence[float], generator: torch.Generator) -> Tensor:
    """(count, len(low)) float64, uniform between `low` and `high`."""
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return a + (b - a) * torch.rand(count, len(low), generator=generator, dtype=torch.float64)


def first_allowed(count: int, low: Sequence[float], high: Sequence[float], allowed: Callable[[Tensor, Tensor], Tensor],
                  generator: torch.Generator, what: str, tries: int = 32, rounds: int = 100) -> Tensor:
    """(count, 3): for each field the first uniform draw that `allowed(draws (F, tries, 3), fields (F,))` takes.
    ValueError names `what` found no place."""
    found, left = torch.zeros(count, 3, dtype=torch.float64), torch.arange(count)
    for _ in range(rounds):
        if len(left) == 0:
            return found
        draws = uniform(len(left) * tries, low, high, generator).view(len(left), tries, 3)
        good = allowed(draws, left)
        first = good.to(torch.uint8).argmax(dim=1)
        has = good.any(dim=1)
        found[left[has]] = draws[has, first[has]]
        left = left[~has]
    if len(left) == 0:
        return found
    raise ValueError(f'{rounds * tries} draws found no place for {what} in {len(left)} of {count} fields between {low} '
                     f'and {high} m from the goal; expected fewer or smaller spheres')
