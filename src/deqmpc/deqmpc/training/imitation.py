"""Imitation of an expert, streaming: what one step of training is.

For a window x_0..x_{T+L} of an expert's trajectory the policy plans from x_0 cold (N iterations), then from
x_1..x_L, each time warm-started from the plan before, as in flight (DEQ-MPC, section on streaming):

  loss = mean over windows of  sum_{s=0..L} sum_i |x^i - x_{s..s+T}|_1 + network_share |theta^i - x_{s..s+T}|_1

over the iterates i of every plan. Iterates that are not finite or have no gradient are left out and counted. Where an
expert's episode ended by success, the knots beyond its end are left out of the sums: nothing says what comes next. The
gradient is clipped to a norm; a step whose gradient is not finite changes nothing and is counted.

The validation error is the mean of |x^N - x_{s..s+T}|_1 of the last iterates over random windows of the
validation trajectories: of the cold plan (s = 0), and of the streamed ones (s = 1..L).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deqmpc import datasets
from deqmpc.datasets import Demonstrations, Windows
from deqmpc.networks.obstacle_motion import ObstacleMotion, settings_for
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.policies.deq_mpc import DeqMpc, Iterates, distance, imitation_loss
from deqmpc.policies.deq_mpc import Settings as Method
from deqmpc.policies.network_only import NetworkOnly
from deqmpc.tasks import Task

# name -> method of the policy (None: the network alone) and kind of its network
VARIANTS = {'deq_mpc_deq': ('deq_mpc', 'deq'), 'deq_mpc_nn': ('deq_mpc', 'nn'), 'diff_mpc_deq': ('diff_mpc', 'deq'),
            'diff_mpc_nn': ('diff_mpc', 'nn'), 'deq': (None, 'deq'), 'nn': (None, 'nn')}


@dataclass(frozen=True)
class Settings:
    """Numbers of a training run. Defaults are the authors', but for the decay of the learning rate."""

    steps: int = 20000  # of the optimiser
    batch: int = 200  # windows a step
    streaming: int = 2  # L, plans after the cold one
    learning_rate: float = 1e-3  # of Adam, at the start
    decay: float = 0.05  # share of it that is left at the end (cosine); 1: constant
    clip_norm: float = 2.0  # largest norm of a gradient
    network_share: float = 0.1  # weight of the network's own error in the loss
    seed: int = 0  # of weights, batches and the split
    split_seed: int = 0  # which trajectories validate

    def __post_init__(self):
        for name in ('steps', 'batch'):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or (
                    getattr(self, name) < 1):
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected an integer >= 1')
        if not isinstance(self.streaming, int) or self.streaming < 0:
            raise ValueError(f'streaming = {self.streaming!r}; expected an integer >= 0')
        for name in ('learning_rate', 'decay', 'clip_norm'):
            if not 0.0 < getattr(self, name) < float('inf'):
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number > 0')

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        return self.learning_rate * (self.decay + (1.0 - self.decay) * 0.5 * (
            1.0 + math.cos(math.pi * step / self.steps)))


def build_model(task: Task, variant: str, hidden: int, scale: tuple[float, ...] = (), motion: bool = False,
                **method) -> nn.Module:
    """An untrained model: `variant` of VARIANTS, `hidden` channels, states divided by `scale`, with a network for the
    spheres' `motion` or without; `method` changes the settings of DEQ-MPC. ValueError names what cannot be used."""
    if variant not in VARIANTS:
        raise ValueError(f'policy {variant!r}; expected one of {", ".join(VARIANTS)}')
    how, kind = VARIANTS[variant]
    network = TemporalNetwork(task.network(kind, hidden, state_scale=tuple(scale)))
    predictor = ObstacleMotion(settings_for(network.settings)) if motion else None
    if how is None:
        return NetworkOnly(task.problem(), network, predictor)
    return DeqMpc(task.problem(), network, Method(**{'method': how, 'softness': task.softness, **method}), predictor)


def state_scale(demonstrations: Demonstrations, task: Task, trajectories: np.ndarray) -> tuple[float, ...]:
    """Root mean square of every state, to three digits: what a network's inputs are divided by."""
    every = np.repeat(trajectories, demonstrations.lengths[trajectories])
    first = np.concatenate([np.arange(length) for length in demonstrations.lengths[trajectories]])
    x = datasets.windows(demonstrations, task, every, first, 1).x
    rms = x.square().mean(dim=(0, 1)).sqrt().clamp_min(1e-2)
    return tuple(float(f'{v:.3g}') for v in rms.tolist())


def parts(demonstrations: Demonstrations, settings: Settings, count: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Trajectories that train and that validate. With `count` only so many train: a larger count has those of a
    smaller one too, and the same ones validate. ValueError where there are fewer."""
    train, valid = datasets.split(demonstrations, settings.split_seed)
    if not 0 <= count <= len(train):
        raise ValueError(f'trajectories = {count}; expected 1 to {len(train)}, or 0 for all of them')
    if count:
        train = np.sort(np.random.default_rng(settings.split_seed).permutation(train)[:count])
    return train, valid


class Streaming:
    """Plans along windows: cold at the first state, warm-started at the L that follow."""

    def __init__(self, model: nn.Module, task: Task, windows: Windows, streaming: int):
        self.model, self.task, self.windows, self.streaming = model, task, windows, streaming

    def __iter__(self) -> Iterator[tuple[Iterates, Tensor, Tensor]]:
        """The plan at every state, the expert's states at its knots (NaN where not known), and where the spheres
        were."""
        w, T, warm = self.windows, self.task.horizon, None
        u_ref = self.task.u_ref.to(w.x).expand(len(w.x), T, -1)
        expert = torch.where(w.known.unsqueeze(2), w.x, float('nan'))
        for s in range(1 + self.streaming):
            seen = w.spheres(s)
            made = self.model(w.x[:, s], u_ref, seen.centers, seen.inflated(self.task.margin), warm_start=warm,
                              velocity=seen.velocity)
            warm = None if made.warm_start is None else made.warm_start.shifted()
            yield made, expert[:, s:s + T + 1], w.centers[:, s:s + T + 1]


@dataclass
class Report:
    """What one step, or one validation, found."""

    loss: float = 0.0
    cold: float = 0.0  # mean L1 of the last iterate of the cold plans
    streamed: float = 0.0  # of the warm-started ones
    gradient_norm: float = 0.0
    left_out: int = 0  # (sample, iterate) pairs without a usable gradient
    skipped: int = 0  # 1: the gradient was not finite and the step was not taken
    counts: dict[str, int] | None = None  # Iterates.counts, summed

    def add(self, made: Iterates, target: Tensor, streamed: bool, plans: int) -> None:
        """Count one plan of a batch."""
        error = distance(made.x[-1].detach(), target)
        error = float(error[torch.isfinite(error)].mean())
        if streamed:
            self.streamed += error / plans
        else:
            self.cold = error
        counts = made.counts()
        self.counts = {k: v + (self.counts or {}).get(k, 0) for k, v in counts.items()}


class Trainer:
    """A model, its optimiser and its data. `step` does one step; all randomness comes from the settings' seed."""

    def __init__(self, task: Task, model: nn.Module, demonstrations: Demonstrations, settings: Settings = Settings(),
                 device: str = 'cpu', trajectories: int = 0):
        self.task, self.model, self.demonstrations, self.settings = task, model, demonstrations, settings
        self.device = torch.device(device)
        model.to(self.device)
        self.train, self.valid = parts(demonstrations, settings, trajectories)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.done = 0  # steps

    @property
    def length(self) -> int:
        """States of a window."""
        return self.task.horizon + 1 + self.settings.streaming

    def draw(self, trajectories: np.ndarray, count: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` random windows of the training's length: (trajectory, first state). Where spheres move, windows end
        within their trajectory, beyond which they would stop; where episodes end by success, plans begin within it."""
        inside = self.length if self.demonstrations.moving else 1 + self.settings.streaming if self.task.hold else 1
        return datasets.draw(self.demonstrations, trajectories, count, generator, inside)

    def windows(self, trajectories: np.ndarray, first: np.ndarray) -> Windows:
        """Windows of the training's length, on its device."""
        w = datasets.windows(self.demonstrations, self.task, trajectories, first, self.length)
        return Windows(*(v.to(self.device) for v in (w.x, w.centers, w.velocity, w.radii, w.known)))

    def step(self, share: slice = slice(None), average=None) -> Report:
        """One step. `share` is this process's part of the batch and `average` what makes gradients equal across
        processes, where there are several."""
        s = self.settings
        w = self.windows(*(v[share] for v in self.draw(self.train, s.batch, self.generator)))
        report, loss = Report(), 0.0
        for made, target, centers in Streaming(self.model, self.task, w, s.streaming):
            part, left_out = imitation_loss(made, target, s.network_share, centers)
            loss = loss + part
            report.left_out += left_out
            report.add(made, target, streamed=report.counts is not None, plans=max(s.streaming, 1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if average is not None:
            average(self.model.parameters())
        report.loss = float(loss.detach())
        report.gradient_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm))
        for group in self.optimizer.param_groups:
            group['lr'] = s.rate(self.done)
        if math.isfinite(report.gradient_norm):
            self.optimizer.step()
        else:
            report.skipped = 1
        self.done += 1
        return report

    @torch.no_grad()
    def validate(self, count: int = 500) -> Report:
        """Errors over `count` windows of the validation trajectories, the same ones at every call."""
        trajectories, first = self.draw(self.valid, count, torch.Generator().manual_seed(0))
        report = Report()
        for made, target, _ in Streaming(self.model, self.task, self.windows(trajectories, first),
                                         self.settings.streaming):
            report.add(made, target, streamed=report.counts is not None, plans=max(self.settings.streaming, 1))
        return report
