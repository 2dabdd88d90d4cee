"""Paths past walls of spheres, as first guesses where a local solver stays in front of the wall.

A point mass (deqmpc.dynamics.point_mass) goes from where a drone is to the goal, with spheres as hills, by constrained
diffusion (deqmpc.solvers.langevin): many flows from scattered paths, short and loud, so that they explore. What comes
out is a path, not yet a plan: it breaks the dynamics by centimetres, and the solver that it is a guess for decides.

  min  sum_t [1/2 |v_t|_V^2 + 1/2 |a_t|_R^2] + 1/2 |p_T - goal|_P^2 + 1/2 |v_T|_P^2 + hills
  s.t. p, v of a point mass,   |v| <= speed, |a| <= acceleration, p within `room` of start, goal and spheres

A knot of it stands for `stride` knots of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deqmpc.dynamics.point_mass import PointMass
from deqmpc.problem import Instances, Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import langevin


@dataclass(frozen=True)
class Settings:
    """How paths are sought. Defaults are for metres and walls as tall as a drone flies."""

    stride: int = 4  # knots of a plan in one of a path: 0.3 m, less than a wall is thick
    acceleration: float = 3.0  # m/s^2 along each axis
    room: float = 1.0  # m beyond start, goal and spheres
    velocity_weight: float = 0.02  # V, per (m/s)^2
    input_weight: float = 0.02  # R, per (m/s^2)^2
    final_weight: float = 20.0  # P, per m^2 and (m/s)^2
    flow: langevin.Settings = langevin.Settings(steps=2000, sigma=2.0)


def detours(start: np.ndarray, goal: np.ndarray, centers: np.ndarray, radii: np.ndarray, speed: np.ndarray,
            floor: float, dt: float, horizon: int, count: int, seed: int, settings: Settings = Settings()
            ) -> tuple[np.ndarray, np.ndarray]:
    """`count` paths from `start` (6,), position and velocity, to the position `goal` (3,) among spheres at `centers`
    (T+1, K, 3) with `radii` (K,), above the height `floor`, in `horizon` = T steps of `dt` s.

    `speed` (3,) m/s are the largest velocities. Returns positions and velocities (count, T+1, 3). ValueError unless T
    is a multiple of the stride.
    """
    T, rest = divmod(horizon, settings.stride)
    if rest:
        raise ValueError(f'horizon = {horizon}; expected a multiple of stride = {settings.stride}')
    problem, data = _problem(start, goal, centers[::settings.stride], radii, speed, floor, dt * settings.stride, T,
                             count, settings)
    generator = torch.Generator().manual_seed(seed)
    low, high = (v[:3] for v in (problem.x_low, problem.x_high))
    x = torch.zeros(count, T + 1, 6, dtype=torch.float64)
    x[..., :3] = low + (high - low) * torch.rand(count, T + 1, 3, generator=generator, dtype=torch.float64)
    x[:, 0] = data.x_init
    scattered = al.guess(problem, data, x, data.u_ref, al.Settings())
    found = langevin.diffuse(problem, data, settings.flow, seed, scattered).x.numpy()
    times, knots = np.arange(horizon + 1), settings.stride * np.arange(T + 1)
    between = np.stack([[np.interp(times, knots, c) for c in path.T] for path in found]).transpose(0, 2, 1)
    return between[..., :3], between[..., 3:]


def _problem(start, goal, centers, radii, speed, floor, dt, T, count, settings) -> tuple[Problem, Instances]:
    corners = np.concatenate([start[None, :3], goal[None], *(centers[0] + s * radii[:, None] for s in (-1.0, 1.0))])
    low, high = corners.min(axis=0) - settings.room, corners.max(axis=0) + settings.room
    low[2] = max(low[2], floor)
    speed = np.maximum(speed, np.abs(start[3:]) + 1e-3)
    problem = Problem(PointMass(), dt, T, Q=[0.0] * 3 + [settings.velocity_weight] * 3, R=[settings.input_weight] * 3,
                      Qf=[settings.final_weight] * 6, u_low=[-settings.acceleration] * 3,
                      u_high=[settings.acceleration] * 3, x_low=[*low, *-speed], x_high=[*high, *speed])
    at = torch.tensor(np.concatenate([goal, np.zeros(3)])).expand(count, T + 1, -1)
    spheres = [torch.tensor(v).expand(count, *v.shape) for v in (centers, radii)]
    return problem, problem.instances(torch.tensor(start).expand(count, -1), at, at.new_zeros(count, T, 3), *spheres)
