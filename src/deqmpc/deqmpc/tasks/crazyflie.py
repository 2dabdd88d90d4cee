"""Crazyflie among spheres: the flight task, from a hover at least 1 m away to the goal, standing or moving spheres,
or a wall of them.

  x = (p - g, m, v, w)  u = thrusts / hover thrust     deqmpc.dynamics.crazyflie, in the frame of the goal g
  dt = 0.1 s, 200 steps: at most 200 exp(2) = 1477.8
  c = (10 |p - g|^2 + 10 |m|^2 + |v|^2 + |w|^2) / 200     |m| <= 1: the smaller one of the two sets
  reward = exp(2 - c / 2), or -c where c > 500
  failed: inside a sphere, on the ground (z = -g_z), not finite

The goal is g = (0, 0, 1) m in the world. Spheres fill the flight volume by the rules of deqmpc.obstacles, starts are
those of a trial: in the volume, 1 m from the goal, 0.3 m clear of the spheres, hovering but for small errors. The
reward is that of the flight log, which leaves out the share of the inputs (below 1e-6). Moving spheres fly straight
at 0.3 m/s and turn back at the walls of the volume.

The wall is a U of 54 spheres of 0.20 m, from the ground to 2 m, seen from above, drawn for a start in the direction x:

        o o o       y = 0.66     It opens away from the goal g, at a random heading; the start s is inside.
        o           y = 0.33     Neighbours are 0.33 m apart, so that with the margin no way leads between them.
  g     o   s       y = 0        Straight to the goal, a drone stops at the wall: the way leads back and around, or
        o           y = -0.33    over it.
        o o o       y = -0.66

Source: DEQ-MPC, A.7 (40 virtual spheres of 0.10 m, T = 5, 10 Hz). Speeds of moving spheres are not in the paper.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from deqmpc.airframe import Airframe
from deqmpc.dynamics.crazyflie import Crazyflie as Equations
from deqmpc.obstacles import FieldSettings
from deqmpc.policies.learned import CrazyflieProblem
from deqmpc.problem import Problem
from deqmpc.tasks.base import Spheres, Task, first_allowed, uniform

GOAL = (0.0, 0.0, 1.0)  # m, world
FIELD = FieldSettings()
LOW, HIGH = (tuple(a - g for a, g in zip(corner, GOAL, strict=True)) for corner in (FIELD.low, FIELD.high))  # walls, m
START_LOW, START_HIGH = (-1.5, -1.5, -0.5), (1.5, 1.5, 0.6)  # m from the goal, of a trial's starts
WALL = tuple((x, y, -GOAL[2] + 0.2 + 0.33 * row) for row in range(6) for x, y in (
    *((0.75, 0.33 * k) for k in range(-2, 3)), *((x, y) for x in (1.08, 1.41) for y in (-0.66, 0.66))))  # m, centres
START_DISTANCE, START_CLEARANCE = 1.0, 0.3  # m, least ones to the goal and to a sphere's surface


@dataclass(frozen=True)
class CrazyflieObs(Task):
    """The task with standing spheres."""

    name = 'crazyflie_obs'
    positions = 3
    margin = 0.05
    softness = 300.0  # a start inside a margin must have a plan that leaves it; as policies.mpc_only
    steps: int = 200
    dt: float = 0.1
    horizon: int = 5
    hold: int = 0
    spheres: int = FIELD.count
    radius: float = FIELD.radius
    speed: float = 0.0  # m/s of every sphere
    floor: float = 0.15 - GOAL[2]  # m, lowest z that is planned
    thrust_max: float = Airframe().thrust_max  # N a motor that plans may ask for

    def __post_init__(self):
        hover = Airframe().hover_thrust
        if not self.thrust_max > hover:
            raise ValueError(f'thrust_max = {self.thrust_max!r}; expected more than the {hover:.4f} N of hovering')

    @property
    def equations(self) -> Equations:
        """Continuous dynamics."""
        return Equations()

    def problem(self, horizon: int | None = None) -> Problem:
        """What flies the learned policy."""
        frame = replace(Airframe(), thrust_max=self.thrust_max)
        return CrazyflieProblem().build(frame, self.dt, horizon or self.horizon, self.floor)

    @property
    def flight_problem(self) -> dict[str, float]:
        """See Task."""
        return asdict(CrazyflieProblem())

    @property
    def u_ref(self) -> Tensor:
        """Hovering."""
        return torch.ones(4, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task. ValueError where the volume cannot hold the spheres or a start."""
        centers = draw_centers(count, self.spheres, self.radius, generator)
        direction = torch.randn(centers.shape, generator=generator, dtype=torch.float64)
        velocity = self.speed * direction / direction.norm(dim=-1, keepdim=True)
        position = draw_starts(centers, self.radius, generator)
        rest = uniform(count, [-0.05] * 2 + [-0.02] + [-0.2] * 3 + [-0.3] * 3,
                       [0.05] * 2 + [0.02] + [0.2] * 3 + [0.3] * 3, generator)  # m (11 deg of tilt), v, w
        radii = centers.new_full(centers.shape[:2], self.radius)
        return torch.cat([position, rest], dim=1), Spheres(centers, velocity, radii)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """exp(2 - c/2), or -c where c > 500."""
        square = x.square()
        m = square[:, 3:6].sum(1)
        other = square @ x.new_tensor([10.0] * 3 + [0.0] * 3 + [1.0] * 6)
        cost = (other + 10.0 * torch.minimum(m, 1.0 / m.clamp_min(1e-12))) / 200.0
        return torch.where(cost > 500.0, -cost, torch.exp(2.0 - 0.5 * cost))

    @property
    def best_reward(self) -> float:
        """exp(2)."""
        return math.exp(2.0)

    def move(self, spheres: Spheres, x: Tensor) -> Spheres:
        """Straight on, and back at the walls, as deqmpc.obstacles.ObstacleField."""
        low, high = (spheres.centers.new_tensor(wall) for wall in (LOW, HIGH))
        centers = spheres.centers + self.dt * spheres.velocity
        below, above = centers < low, centers > high
        centers = torch.where(below, 2.0 * low - centers, torch.where(above, 2.0 * high - centers, centers))
        return replace(spheres, centers=centers,
                       velocity=torch.where(below | above, -spheres.velocity, spheres.velocity))

    def failed(self, x: Tensor, spheres: Spheres) -> Tensor:
        """(B,) bool: not finite, inside a sphere, or on the ground."""
        return super().failed(x, spheres) | (x[:, 2] <= -GOAL[2])


@dataclass(frozen=True)
class CrazyflieDynObs(CrazyflieObs):
    """The task with moving spheres."""

    name = 'crazyflie_dynobs'
    speed: float = 0.3


@dataclass(frozen=True)
class CrazyflieWall(CrazyflieObs):
    """The task with a wall between start and goal."""

    name = 'crazyflie_wall'
    spheres: int = 54
    radius: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if self.spheres != len(WALL):
            raise ValueError(f'spheres = {self.spheres!r}; the wall has {len(WALL)}')

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task. The goal's side of the wall is 0.75 m from the goal; starts are 1.25 to 1.4 m from it."""
        heading = uniform(count, [-math.pi], [math.pi], generator)[:, 0]
        place = uniform(count, [1.25, -0.15, -0.3], [1.4, 0.15, 0.1], generator)
        rest = uniform(count, [-0.05] * 2 + [-0.02] + [-0.1] * 6, [0.05] * 2 + [0.02] + [0.1] * 6, generator)
        c, s, zero = heading.cos(), heading.sin(), torch.zeros_like(heading)
        turn = torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1.0], dim=1).view(count, 3, 3)
        centers = place.new_tensor(WALL) @ turn.transpose(1, 2)
        position = (turn @ place.unsqueeze(2)).squeeze(2)
        radii = centers.new_full(centers.shape[:2], self.radius)
        return torch.cat([position, rest], dim=1), Spheres(centers, torch.zeros_like(centers), radii)

    def move(self, spheres: Spheres, x: Tensor) -> Spheres:
        """The wall stands, also beyond the volume that moving spheres stay in."""
        return spheres


def draw_centers(count: int, spheres: int, radius: float, generator: torch.Generator) -> Tensor:
    """Centres (count, spheres, 3) by the rules of FieldSettings: clear of the goal, with gaps, in the volume."""
    centers = torch.zeros(count, spheres, 3, dtype=torch.float64)
    for k in range(spheres):
        def allowed(p, at, k=k):
            apart = torch.cdist(p, centers[at, :k]) if k else p.new_full((*p.shape[:2], 1), math.inf)
            return (p.norm(dim=-1) >= radius + FIELD.clear_radius) & (
                apart.amin(dim=-1) >= 2.0 * radius + FIELD.gap)
        centers[:, k] = first_allowed(count, LOW, HIGH, allowed, generator,
                                      f'sphere {k + 1} of {spheres} of radius {radius} m')
    return centers


def draw_starts(centers: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Positions (count, 3) of a trial's starts among the spheres at `centers` (count, K, 3)."""
    def allowed(p, at):
        apart = torch.cdist(p, centers[at]) if centers.shape[1] else p.new_full((*p.shape[:2], 1), math.inf)
        return (p.norm(dim=-1) >= START_DISTANCE) & (apart.amin(dim=-1) >= radius + START_CLEARANCE)
    return first_allowed(len(centers), START_LOW, START_HIGH, allowed, generator, 'a start')
