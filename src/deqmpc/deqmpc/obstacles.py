"""Fields of spherical obstacles: drawn from a seed, read from YAML, static or moving.

A moving sphere flies straight and turns back at the walls of the volume, so that the field stays in
the volume for ever and every position is a closed form of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deqmpc import yaml_file
from deqmpc.types import Obstacles


@dataclass(frozen=True)
class FieldSettings:
    """How a field is drawn. Defaults are the paper's hardware task (A.7): 40 spheres of 0.10 m."""

    count: int = 40
    radius: float = 0.10  # m
    low: tuple[float, float, float] = (-1.5, -1.5, 0.3)  # m, corner of the volume, world
    high: tuple[float, float, float] = (1.5, 1.5, 1.8)  # m
    keep_clear: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 1.0),)  # points, world, m
    clear_radius: float = 0.30  # m from such a point to a sphere's surface
    gap: float = 0.10  # m at least between two surfaces, so that a drone is not walled in
    speed: float = 0.0  # m/s of every sphere, in a random direction; 0 = static


@dataclass(frozen=True)
class ObstacleField:
    """Spheres with their motion."""

    start: np.ndarray  # (K, 3) m, positions at t = 0
    radius: np.ndarray  # (K,) m
    velocity: np.ndarray  # (K, 3) m/s at t = 0
    low: np.ndarray = field(default_factory=lambda: np.full(3, -np.inf))  # (3,) m, walls
    high: np.ndarray = field(default_factory=lambda: np.full(3, np.inf))  # (3,) m

    def at(self, t: float, stamp: float | None = None) -> Obstacles:
        """The field `t` seconds after its start, stamped `stamp` (default t)."""
        stamp = t if stamp is None else stamp
        if not self.velocity.any():
            return Obstacles(stamp, self.start.copy(), self.radius.copy(), np.zeros_like(self.start))
        width = self.high - self.low
        phase = np.mod(self.start + self.velocity * t - self.low, 2.0 * width)  # unfolded triangle wave
        back = phase > width
        position = self.low + np.where(back, 2.0 * width - phase, phase)
        return Obstacles(stamp, position, self.radius.copy(), np.where(back, -1.0, 1.0) * self.velocity)


def draw(seed: int, settings: FieldSettings = FieldSettings()) -> ObstacleField:
    """A field drawn from `seed`. ValueError when the volume cannot hold it."""
    rng = np.random.default_rng(seed)
    low, high = np.array(settings.low), np.array(settings.high)
    placed: list[np.ndarray] = []
    for _ in range(200 * max(settings.count, 1)):
        if len(placed) == settings.count:
            break
        p = rng.uniform(low, high)
        if any(np.linalg.norm(p - c) < settings.radius + settings.clear_radius for c in settings.keep_clear):
            continue
        if any(np.linalg.norm(p - c) < 2 * settings.radius + settings.gap for c in placed):
            continue
        placed.append(p)
    if len(placed) < settings.count:
        raise ValueError(f'only {len(placed)} of {settings.count} spheres of {settings.radius} m with gaps of '
                         f'{settings.gap} m fit between {settings.low} and {settings.high}')
    direction = rng.normal(size=(settings.count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return ObstacleField(np.array(placed).reshape(-1, 3), np.full(settings.count, settings.radius),
                         settings.speed * direction, low, high)


def load(path: str | Path) -> ObstacleField:
    """A field from YAML: {spheres: [{position: [x, y, z], radius: r, velocity: [x, y, z]}, ...],
    low: [...], high: [...]}; velocity, low and high are optional, low and high are the walls that
    moving spheres turn back at. ValueError names the entry that is wrong."""
    data = yaml_file.load(path)
    if not isinstance(data, dict) or not isinstance(data.get('spheres'), list):
        raise ValueError(f'{path}: expected a mapping with a list `spheres`')
    unknown = set(data) - {'spheres', 'low', 'high'}
    if unknown:
        raise ValueError(f'{path}: unknown key {sorted(unknown)}; expected spheres, low, high')

    def vector(value, what):
        try:
            v = np.array(value, dtype=float)
        except (TypeError, ValueError):
            v = np.array(np.nan)
        if v.shape != (3,) or not np.isfinite(v).all():
            raise ValueError(f'{path}: {what} = {value!r}; expected three finite numbers')
        return v
    start, radius, velocity = [], [], []
    for k, sphere in enumerate(data['spheres']):
        if not isinstance(sphere, dict) or not {'position', 'radius'} <= set(sphere) <= {
                'position', 'radius', 'velocity'}:
            raise ValueError(f'{path}: spheres[{k}] = {sphere!r}; expected position, radius and perhaps velocity')
        start.append(vector(sphere['position'], f'spheres[{k}].position'))
        velocity.append(vector(sphere.get('velocity', [0, 0, 0]), f'spheres[{k}].velocity'))
        r = sphere['radius']
        if isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 < r < np.inf:
            raise ValueError(f'{path}: spheres[{k}].radius = {r!r}; expected a number > 0')
        radius.append(float(r))
    start, velocity = np.array(start).reshape(-1, 3), np.array(velocity).reshape(-1, 3)
    walls = {k: vector(data[k], k) for k in ('low', 'high') if k in data}
    if velocity.any() and len(walls) < 2:
        raise ValueError(f'{path}: spheres move, so `low` and `high` must be given')
    return ObstacleField(start, np.array(radius), velocity, **walls)
