"""Quadrotor with a pole: swing it up and hover at the origin, alone, among standing or among moving spheres.

  x = (r, m, theta, v, w, theta'), theta = pi upright     deqmpc.dynamics.quadrotor_pole
  u = motor commands, |u| <= 0.1545: 30 % of the hover thrust either way (`PAPER` has the paper's bounds)
  dt = 0.05 s, 200 steps
  e = x - goal, the pole's angle in +-pi; goal: theta = pi, all else 0
  cost c = sum Q e^2 / 200 + sum R u^2 / 20     Q = 10 (first six), 80 (theta), 1 (last seven), R = 1e-8
  reward = exp(2 - c / 2): at most exp(2) a step
  start: r in +-5 m, Euler angles in +-45 deg, theta anywhere, velocities and rates in +-1

Policies see theta in 0..2 pi (`wrapped`). Upright is also at -pi and 3 pi: a plan that swings up through the hanging
end has one of these as its target.

Spheres (qpole_obs, qpole_dynobs): 40 of 0.5 m, their centres uniform in +-5 m, none nearer than 1.31 m to the origin
or than 0.72 m to another, as in the authors' field. It is one field for all episodes, as theirs; `fields='fresh'`
draws one for each. A start inside a sphere is drawn again; touching one ends the episode.

Moving spheres head for where the quadrotor will be 5 steps ahead if it keeps its velocity, from the same places. Their
speed is not in the paper. 0.25 m/s is chosen so that staying at the origin is neither safe nor hopeless: in an episode
they travel 2.5 m, and about 5 of the 40 start within 3 m of it. A controller that plans 40 knots of `problem` ahead
with the goal as reference, spheres at constant velocity and hard, is touched in 4 of 40 episodes (0.2 m/s: 1, 0.5 m/s:
34).

Source: the DEQ-MPC authors' code and Figure 5 (radii 0.2 to 0.5 m); for moving spheres no code was released.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqmpc.dynamics.quadrotor import U_HIGH, U_LOW
from deqmpc.dynamics.quadrotor import Quadrotor as QuadrotorEquations
from deqmpc.dynamics.quadrotor_pole import QuadrotorPole as Equations
from deqmpc.problem import Problem
from deqmpc.tasks.base import Spheres, Task, first_allowed, uniform
from deqmpc.tasks.quadrotor import mrp_from_euler

_Q = [10.0] * 6 + [80.0] + [1.0] * 7
_FIELD_LOW, _FIELD_HIGH = (-5.0,) * 3, (5.0,) * 3  # m, of starts and of spheres' centres
_CLEAR, _APART = 1.31, 0.72  # m from a sphere's centre, to the origin and to other centres


def _own_command(command: float) -> float:
    """The command of this quadrotor that has the thrust of a `command` of deqmpc.dynamics.quadrotor."""
    theirs, own = QuadrotorEquations(), Equations().quadrotor
    return (theirs.thrust_slope * command + theirs.thrust_offset - own.thrust_offset) / own.thrust_slope


# The paper bounds the inputs of all quadrotors by 11.5 and 18.3, commands of the heavier one: -2.4 to 14.2 N a motor.
PAPER = {'u_low': _own_command(U_LOW), 'u_high': _own_command(U_HIGH)}  # tasks.make('qpole', **PAPER)


@dataclass(frozen=True)
class QPole(Task):
    """The task without spheres."""

    name = 'qpole'
    positions = 7
    period = (0.0,) * 6 + (2.0 * math.pi,) + (0.0,) * 7
    steps: int = 200
    dt: float = 0.05
    horizon: int = 5
    hold: int = 0
    spheres: int = 0
    radius: float = 0.0
    u_low: float = -0.1545  # least motor command
    u_high: float = 0.1545  # largest motor command

    @property
    def equations(self) -> Equations:
        """Continuous dynamics."""
        return Equations()

    def problem(self, horizon: int | None = None) -> Problem:
        """Tracking with the task's weights."""
        return Problem(self.equations, self.dt, horizon or self.horizon, Q=_Q, R=[1e-8] * 4, u_low=[self.u_low] * 4,
                       u_high=[self.u_high] * 4)

    @property
    def u_ref(self) -> Tensor:
        """Hovering."""
        return torch.zeros(4, dtype=torch.float64)

    @property
    def goal(self) -> Tensor:
        """Hovering at the origin with the pole upright."""
        goal = torch.zeros(14, dtype=torch.float64)
        goal[6] = math.pi
        return goal

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task."""
        return self._starts(count, generator), Spheres.none(count)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """exp(2 - c/2)."""
        e = self.wrapped(x) - self.goal.to(x)
        cost = (e.square() @ e.new_tensor(_Q)) / 200.0 + 1e-8 * u.square().sum(1) / 20.0
        return torch.exp(2.0 - 0.5 * cost)

    @property
    def best_reward(self) -> float:
        """exp(2)."""
        return math.exp(2.0)

    def _starts(self, count, generator) -> Tensor:
        tilt = math.radians(45.0)
        x = uniform(count, [*_FIELD_LOW, *[-tilt] * 3, 0.0, *[-1.0] * 7],
                    [*_FIELD_HIGH, *[tilt] * 3, 2.0 * math.pi, *[1.0] * 7], generator)
        return torch.cat([x[:, :3], mrp_from_euler(x[:, 3:6]), x[:, 6:]], dim=1)


@dataclass(frozen=True)
class QPoleObs(QPole):
    """The task among standing spheres."""

    name = 'qpole_obs'
    margin = 0.02  # plans are exact to less, and an episode ends where a sphere is touched
    softness = 3e3  # at 5 m/s, 5 knots from a sphere, nothing keeps clear of it; hard constraints made the drone tumble
    give = margin  # beyond it the sphere itself is entered
    spheres: int = 40
    radius: float = 0.5
    fields: str = 'one'  # one: the same spheres in every episode; fresh: new ones for each
    field_seed: int = 0  # that the one field is drawn with

    def __post_init__(self):
        if self.fields not in ('one', 'fresh'):
            raise ValueError(f'fields = {self.fields!r}; expected one or fresh')

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task. ValueError where there is no room for the spheres or a start."""
        x = self._starts(count, generator)
        if self.fields == 'fresh':
            centers = draw_centers(count, self.spheres, generator)
        else:
            centers = the_field(self.spheres, self.field_seed).expand(count, -1, -1).clone()
        x[:, :3] = draw_positions(centers, self.radius, generator)
        return x, Spheres(centers, torch.zeros_like(centers), centers.new_full(centers.shape[:2], self.radius))


@dataclass(frozen=True)
class QPoleDynObs(QPoleObs):
    """The task among spheres that chase the quadrotor."""

    name = 'qpole_dynobs'
    speed: float = 0.25  # m/s of every sphere
    lead: int = 5  # steps ahead of the quadrotor that they head for

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task."""
        x, spheres = super().sample(count, generator)
        return x, self._steered(spheres, x)

    def move(self, spheres: Spheres, x: Tensor) -> Spheres:
        """On by dt, then turned to where the quadrotor will be."""
        return self._steered(super().move(spheres, x), x)

    def _steered(self, spheres: Spheres, x: Tensor) -> Spheres:
        rate = self.equations.derivative(x.unbind(-1), self.u_ref.to(x))
        ahead = x[:, :3] + self.lead * self.dt * torch.stack(rate[:3], dim=-1)  # r' = R v
        way = ahead.unsqueeze(1) - spheres.centers
        distance = way.norm(dim=-1, keepdim=True)
        return replace(spheres, velocity=self.speed * way / distance.clamp_min(1e-9))


@functools.lru_cache(maxsize=32)
def the_field(spheres: int, seed: int) -> Tensor:
    """Centres (1, spheres, 3) of the field that all episodes share."""
    return draw_centers(1, spheres, torch.Generator().manual_seed(seed))


def draw_centers(count: int, spheres: int, generator: torch.Generator) -> Tensor:
    """Centres (count, spheres, 3) m of `count` fields."""
    centers = torch.zeros(count, spheres, 3, dtype=torch.float64)
    for k in range(spheres):
        def allowed(p, at, k=k):
            far = p.norm(dim=-1) >= _CLEAR
            return far & (torch.cdist(p, centers[at, :k]) >= _APART).all(dim=-1)
        centers[:, k] = first_allowed(count, _FIELD_LOW, _FIELD_HIGH, allowed, generator,
                                      f'sphere {k + 1} of {spheres}')
    return centers


def draw_positions(centers: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Positions (count, 3) m outside the spheres at `centers` (count, K, 3)."""
    def allowed(p, at):
        return (torch.cdist(p, centers[at]) >= radius).all(dim=-1)
    return first_allowed(len(centers), _FIELD_LOW, _FIELD_HIGH, allowed, generator, 'a start')
