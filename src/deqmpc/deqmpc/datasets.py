"""Expert demonstrations: a NumPy archive (.npz, read without pickle), a split by trajectory, and windows to train on.

Arrays of a file, N trajectories with S = sum of `lengths` states stored one after another:

  states (S, n)   controls (S, m), row t leads from state t to t+1   lengths (N,)
  centers, velocity (N, K, d), radii (N, K)       where there are spheres; (S, K, d) where they move
  restart (N,)    1 where a trajectory begins beside another one instead of as episodes do; left out: nowhere
  about           one JSON text: task, seed, commit, how it was made, share of successes, returns

The released files of the DEQ-MPC authors hold the first three. A window is W consecutive states of one trajectory;
beyond its end the last state is repeated (the experts end at rest).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqmpc.tasks.base import Spheres, Task
from deqmpc.whole_file import replacing


@dataclass(frozen=True)
class Demonstrations:
    """N trajectories. Arrays as in the file, spheres completed (K = 0 where there are none)."""

    states: np.ndarray  # (S, n)
    controls: np.ndarray  # (S, m)
    lengths: np.ndarray  # (N,)
    centers: np.ndarray  # (N, K, d) or (S, K, d) m
    velocity: np.ndarray  # as centers, m/s
    radii: np.ndarray  # (N, K) m
    about: dict[str, Any] = field(default_factory=dict)
    restart: np.ndarray | None = None  # (N,) bool, see above; None: none is

    def __post_init__(self):
        if self.restart is None:
            object.__setattr__(self, 'restart', np.zeros(len(self.lengths), dtype=bool))

    @property
    def first(self) -> np.ndarray:
        """(N,) row of every trajectory's first state."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    @property
    def moving(self) -> bool:
        """Whether the spheres are stored for every state."""
        return len(self.centers) == len(self.states) and len(self.centers) != len(self.lengths)

    def starts(self, trajectories: np.ndarray) -> tuple[Tensor, Spheres]:
        """First states (B, n) and spheres of some trajectories."""
        first = np.zeros_like(trajectories)
        return torch.from_numpy(self.states[self.first[trajectories]].astype(float)), self.spheres(trajectories, first)

    def spheres(self, trajectories: np.ndarray, first: np.ndarray) -> Spheres:
        """Those of some trajectories (B,) at their states `first` (B,)."""
        at = self.first[trajectories] + first if self.moving else trajectories
        return Spheres(*(torch.from_numpy(v.astype(float)) for v in (self.centers[at], self.velocity[at],
                                                                     self.radii[trajectories])))


def load(path: str | Path) -> Demonstrations:
    """Read a file. FileNotFoundError where there is none; ValueError, with its name, where an array does not fit."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; `deqmpc experts` makes demonstrations')
    with np.load(path, allow_pickle=False) as archive:
        given = {name: archive[name] for name in archive.files}
    for name in ('states', 'controls', 'lengths'):
        if name not in given:
            raise ValueError(f'{path}: has {sorted(given)}; expected at least states, controls and lengths')
    S, N = len(given['states']), len(given['lengths'])
    if len(given['controls']) != S or int(given['lengths'].sum()) != S or not np.isfinite(given['states']).all():
        raise ValueError(f'{path}: {S} states, {len(given["controls"])} controls, lengths that sum to '
                         f'{int(given["lengths"].sum())}; expected equal counts of finite numbers')
    centers = given.get('centers', np.zeros((N, 0, 3)))
    velocity, radii = given.get('velocity', np.zeros_like(centers)), given.get('radii', np.zeros((N, 0)))
    if len(centers) not in (N, S) or velocity.shape != centers.shape or radii.shape != (N, centers.shape[1]):
        raise ValueError(f'{path}: centers {centers.shape}, velocity {velocity.shape}, radii {radii.shape} do not fit '
                         f'{N} trajectories of {S} states')
    restart = given.get('restart', np.zeros(N)).astype(bool)
    if restart.shape != (N,):
        raise ValueError(f'{path}: restart {restart.shape}; expected one number for each of {N} trajectories')
    about = json.loads(str(given['about'])) if 'about' in given else {}
    return Demonstrations(given['states'], given['controls'], given['lengths'].astype(np.int64), centers, velocity,
                          radii, about, restart)


def save(path: str | Path, demonstrations: Demonstrations) -> None:
    """Write a file onto its name only when it is whole."""
    d, path = demonstrations, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open('wb') as file:
        np.savez_compressed(file, states=d.states, controls=d.controls, lengths=d.lengths, centers=d.centers,
                            velocity=d.velocity, radii=d.radii, restart=d.restart.astype(np.int8),
                            about=np.array(json.dumps(d.about)))


def split(demonstrations: Demonstrations, seed: int, share: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Trajectories to train on and to validate on, by a permutation from `seed`. Restarts stay with the trajectory
    they follow in the file: they fly among the same spheres."""
    family = np.maximum(np.cumsum(~demonstrations.restart) - 1, 0)
    order = np.random.default_rng(seed).permutation(family[-1] + 1)
    if len(order) < 2 or not 0.0 < share < 1.0:
        raise ValueError(f'{len(order)} trajectories (without restarts) cannot be split with share = {share}; expected '
                         f'at least 2, and a share between 0 and 1')
    train = np.isin(family, order[:min(max(round(share * len(order)), 1), len(order) - 1)])
    return np.flatnonzero(train), np.flatnonzero(~train)


@dataclass(frozen=True)
class Windows:
    """B windows of W states."""

    x: Tensor  # (B, W, n) float64; angles continuous, of the first state next to the goal's
    centers: Tensor  # (B, W, K, d) where the spheres were at every state of the window
    velocity: Tensor  # (B, W, K, d)
    radii: Tensor  # (B, K)
    known: Tensor  # (B, W) bool: False beyond an end by success, where x only repeats the last state

    def spheres(self, at: int) -> Spheres:
        """What was seen at state `at` of the window."""
        return Spheres(self.centers[:, at], self.velocity[:, at], self.radii)


def windows(demonstrations: Demonstrations, task: Task, trajectories: np.ndarray, first: np.ndarray,
            length: int) -> Windows:
    """The windows of `length` states that start at state `first` (B,) of `trajectories` (B,). Beyond the end of a
    trajectory its last state is repeated. Where episodes end by success (task.hold) the expert was still moving there,
    so such states are not `known`; elsewhere experts rest at the goal."""
    d = demonstrations
    x, known, at = _states(d, task, trajectories, first, length)
    rows = at if d.moving else np.repeat(trajectories[:, None], length, axis=1)
    centers, velocity = (torch.from_numpy(v[rows].astype(float)) for v in (d.centers, d.velocity))
    if d.radii.shape[1] == 0:  # files without spheres do not say how many numbers a centre has
        centers = velocity = centers.new_zeros(*at.shape, 0, task.spatial)
    return Windows(x, centers, velocity, torch.from_numpy(d.radii[trajectories].astype(float)), known)


def states(demonstrations: Demonstrations, task: Task, trajectories: np.ndarray, first: np.ndarray,
           length: int) -> tuple[Tensor, Tensor]:
    """`x` and `known` of those windows alone: the spheres of many windows are gigabytes."""
    return _states(demonstrations, task, trajectories, first, length)[:2]


def _states(d, task, trajectories, first, length) -> tuple[Tensor, Tensor, np.ndarray]:
    """x, known, and the rows of the file that x is from."""
    last = d.lengths[trajectories] - 1
    known = torch.from_numpy((first[:, None] + np.arange(length) <= last[:, None]) | (task.hold == 0))
    at = np.minimum(first[:, None] + np.arange(length), last[:, None]) + d.first[trajectories][:, None]
    x = torch.from_numpy(d.states[at].astype(float))
    if task.period:
        x = continuous(x, task)
        x = x - task.turns(x[:, :1] - task.goal)
    return x, known, at


def continuous(x: Tensor, task: Task) -> Tensor:
    """Trajectories x (..., W, n) with the jumps of wrapped angles taken out."""
    jumps = task.turns(x.diff(dim=-2))
    return x - torch.cat([torch.zeros_like(x[..., :1, :]), jumps.cumsum(dim=-2)], dim=-2)


def draw(demonstrations: Demonstrations, trajectories: np.ndarray, count: int, generator: torch.Generator,
         inside: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """First states of `count` random windows, (trajectory, first state): as likely is every state of `trajectories`
    with which `inside` states lie within the trajectory, or the first state of one that is shorter."""
    usable = np.maximum(demonstrations.lengths[trajectories] - inside + 1, 1)
    ends = np.cumsum(usable)
    number = torch.randint(int(ends[-1]), (count,), generator=generator).numpy()
    which = np.searchsorted(ends, number, side='right')
    return trajectories[which], number - np.concatenate([[0], ends[:-1]])[which]
