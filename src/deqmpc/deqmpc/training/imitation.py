"""Imitation of an expert, streaming: what one step of training is.

For a window x_0..x_{T+L} of an expert's trajectory the policy plans from x_0 cold (N iterations), then from
x_1..x_L, each time warm-started from the plan before, as in flight (DEQ-MPC, section on streaming):

  loss = mean over windows of  sum_{s=0..L} sum_i |x^i - x_{s..s+T}|_1 + network_share |theta^i - x_{s..s+T}|_1

over the iterates i of every plan. Iterates that are not finite or have no gradient are left out and counted. Where an
expert's episode ended by success, the knots beyond its end are left out of the sums: nothing says what comes next. The
gradient is clipped to a norm; a step whose gradient is not finite changes nothing and is counted.

In closed loop a policy leaves the expert's states, and what it learned there does not tell it the way back. Two
settings, off as in the paper, bring such states into the windows; what is to be tracked stays the expert's trajectory:

  noise       the first state is x_0 + noise * RMS of every state * a standard normal number
  own_states  this share of the windows goes on, after a plan from x_s, at phi(x_s, u_s) with the plan's first input:
              where the policy itself leads (as in DAgger, Ross et al. 2011, but without asking the expert again)

A state that has failed (inside a sphere, not finite) is replaced by the expert's. deqmpc.training.aggregate asks the
expert at such states instead, which needs one, and works far better. Experts rest at the goal for most of an episode;
`early` > 1 draws windows nearer to their trajectories' beginnings, at the share v^early, v uniform.

The validation error is the mean of |x^N - x_{s..s+T}|_1 of the last iterates over random windows of the
validation trajectories: of the cold plan (s = 0), and of the streamed ones (s = 1..L).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

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

    steps: int = 20000  # of the optimiser; 0: the fit of a direct part alone
    batch: int = 200  # windows a step
    streaming: int = 2  # L, plans after the cold one
    learning_rate: float = 1e-3  # of Adam, at the start
    decay: float = 0.05  # share of it that is left at the end (cosine); 1: constant
    clip_norm: float = 2.0  # largest norm of a gradient
    network_share: float = 0.1  # weight of the network's own error in the loss
    noise: float = 0.0  # standard deviation of the windows' first states, as a share of every state's RMS
    own_states: float = 0.0  # share of the windows that go on where the policy leads, see the top of the file
    early: float = 1.0  # power by which windows are nearer to the beginning of their trajectory, see there
    seed: int = 0  # of weights, batches and the split
    split_seed: int = 0  # which trajectories validate

    def __post_init__(self):
        for name, least in (('steps', 0), ('batch', 1), ('streaming', 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f'{name} = {value!r}; expected an integer >= {least}')
        for name in ('learning_rate', 'decay', 'clip_norm', 'early'):
            if not 0.0 < getattr(self, name) < float('inf'):
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number > 0')
        if not 0.0 <= self.noise < float('inf') or not 0.0 <= self.own_states <= 1.0:
            raise ValueError(f'noise = {self.noise!r}, own_states = {self.own_states!r}; expected a number >= 0 and a '
                             f'share between 0 and 1')

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps-1."""
        return self.learning_rate * (self.decay + (1.0 - self.decay) * 0.5 * (
            1.0 + math.cos(math.pi * step / self.steps)))


def begin_with(model: nn.Module, given: TemporalNetwork, where: str) -> None:
    """Begin with the weights of a trained network of the same kind and size, which may have been without spheres: what
    encodes or sees them then starts as if there were none. Of a network of another kind or size only the direct part
    is taken, and the head begins with zero. ValueError, naming `where` it is from, for a network with nothing to take.
    """
    own, s, theirs = model.network, model.network.settings, given.settings
    alike = replace(s, spheres=theirs.spheres, sight=theirs.sight) if theirs.sight in (0, s.sight) else s
    if s.direct and replace(alike, kind=theirs.kind, hidden=theirs.hidden) == theirs and (
            (s.kind, s.hidden) != (theirs.kind, theirs.hidden)):
        _take(own, {k: v for k, v in given.state_dict().items() if k.startswith(('direct', 'sight'))})
        _silence_head(own)
        return
    if replace(alike, spatial=theirs.spatial) != theirs or theirs.spheres > s.spheres:
        raise ValueError(f'{where}: its network has {theirs}; expected {s}, with or without spheres and sight')
    _take(own, given.state_dict())
    if s.spheres > theirs.spheres:
        with torch.no_grad():
            own.sphere_out.weight.zero_()
            own.sphere_out.bias.zero_()


def _take(network: TemporalNetwork, weights: dict[str, Tensor]) -> None:
    """Load `weights`. Those of a network without spheres say nothing of what the direct part sees of them: zero."""
    first = 'direct.0.weight'
    if first in weights and weights[first].shape != network.direct[0].weight.shape:
        whole = torch.zeros_like(network.direct[0].weight)
        whole[:, :network.settings.n] = weights[first]
        weights = {**weights, first: whole}
    network.load_state_dict(weights, strict=False)


def build_model(task: Task, variant: str, hidden: int, scale: tuple[float, ...] = (), motion: bool = False,
                output: str = 'velocity', direct: int = 0, sight: int = 0, **method) -> nn.Module:
    """An untrained model: `variant` of VARIANTS, `hidden` channels, states divided by `scale`, with a network for the
    spheres' `motion` or without, `output`, `direct` and `sight` as in deqmpc.networks.temporal; `method` changes the
    settings of DEQ-MPC. ValueError names what cannot be used."""
    if variant not in VARIANTS:
        raise ValueError(f'policy {variant!r}; expected one of {", ".join(VARIANTS)}')
    how, kind = VARIANTS[variant]
    network = TemporalNetwork(task.network(kind, hidden, state_scale=tuple(scale), output=output, direct=direct,
                                           sight=sight, goal=tuple(task.goal.tolist()) if direct else ()))
    _center(network, task)
    predictor = ObstacleMotion(settings_for(network.settings)) if motion else None
    if how is None:
        return NetworkOnly(task.problem(), network, predictor)
    given = {'method': how, 'softness': task.softness, 'give': task.give, **method}
    return DeqMpc(task.problem(), network, Method(**given), predictor)


@torch.no_grad()
def _center(network: TemporalNetwork, task: Task) -> None:
    """Begin with encoders to which the goal is zero, where that is not the zero state: a pole's angle differs from
    upright by less than from hanging."""
    goal = task.goal.to(network.scale) / network.scale
    for encoder in (network.node, network.start):
        encoder.linear.bias -= encoder.linear.weight @ goal


def state_scale(demonstrations: Demonstrations, task: Task, trajectories: np.ndarray) -> tuple[float, ...]:
    """Root mean square of every state's distance from the goal, to three digits: what a network's inputs are divided
    by."""
    every = np.repeat(trajectories, demonstrations.lengths[trajectories])
    first = np.concatenate([np.arange(length) for length in demonstrations.lengths[trajectories]])
    x, _ = datasets.states(demonstrations, task, every, first, 1)
    rms = (x - task.goal).square().mean(dim=(0, 1)).sqrt().clamp_min(1e-2)
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
    """Plans along windows: cold at the first state, warm-started at the L that follow. These are the expert's, or where
    the plan before leads, for the windows `own` (B,) bool."""

    def __init__(self, model: nn.Module, task: Task, windows: Windows, streaming: int, own: Tensor | None = None):
        self.model, self.task, self.windows, self.streaming, self.own = model, task, windows, streaming, own

    def __iter__(self) -> Iterator[tuple[Iterates, Tensor, Tensor]]:
        """The plan at every state, the expert's states at its knots (NaN where not known), and where the spheres
        were."""
        w, T, warm, x = self.windows, self.task.horizon, None, self.windows.x[:, 0]
        u_ref = self.task.u_ref.to(w.x).expand(len(w.x), T, -1)
        expert = torch.where(w.known.unsqueeze(2), w.x, float('nan'))
        for s in range(1 + self.streaming):
            seen = w.spheres(s)
            made = self.model(x, u_ref, seen.centers, seen.inflated(self.task.margin), warm_start=warm,
                              velocity=seen.velocity)
            warm = None if made.warm_start is None else made.warm_start.shifted()
            yield made, expert[:, s:s + T + 1], w.centers[:, s:s + T + 1]
            if s < self.streaming:
                x = self._following(x, made, s + 1)

    @torch.no_grad()
    def _following(self, x: Tensor, made: Iterates, s: int) -> Tensor:
        """State s of every window."""
        expert = self.windows.x[:, s]
        if self.own is None:
            return expert
        led = self.task.step(x, made.u[-1][:, 0])
        going = self.own & ~self.task.failed(led, self.windows.spheres(s))
        return torch.where(going.unsqueeze(1), led, expert)


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
        if settings.own_states and isinstance(model, NetworkOnly):
            raise ValueError(f'own_states = {settings.own_states}; expected 0 for a network alone, whose plans have no '
                             f'inputs')
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
        within their trajectory, beyond which they would stop, and so they do among answers that are cut off before
        they rest (deqmpc.training.aggregate); where episodes end by success, plans begin within it."""
        d = self.demonstrations
        whole = d.moving or 'aggregated' in d.about
        inside = self.length if whole else 1 + self.settings.streaming if self.task.hold else 1
        return datasets.draw(d, trajectories, count, generator, inside)

    def _draw_early(self) -> tuple[np.ndarray, np.ndarray]:
        """As `draw`, of the batch's size, the first states by `early`. Only where episodes end by success do windows
        leave their trajectory: others may be cut off before they rest."""
        s = self.settings
        which, _ = self.draw(self.train, s.batch, self.generator)
        inside = 1 + s.streaming if self.task.hold else self.length
        usable = np.maximum(self.demonstrations.lengths[which] - inside + 1, 1)
        share = torch.rand(s.batch, generator=self.generator, dtype=torch.float64).numpy() ** s.early
        return which, (usable * share).astype(np.int64)

    def windows(self, trajectories: np.ndarray, first: np.ndarray) -> Windows:
        """Windows of the training's length, on its device."""
        w = datasets.windows(self.demonstrations, self.task, trajectories, first, self.length)
        return Windows(*(v.to(self.device) for v in (w.x, w.centers, w.velocity, w.radii, w.known)))

    def _disturbed(self, w: Windows, share: slice) -> tuple[Windows, Tensor | None]:
        """The windows with noise on their first states, and which of them go on where the policy leads."""
        s, own = self.settings, None
        if s.noise:
            normal = torch.randn(s.batch, w.x.shape[2], generator=self.generator, dtype=w.x.dtype)[share].to(w.x)
            first = w.x[:, 0] + s.noise * self.model.network.scale.to(w.x) * normal
            failed = self.task.failed(first, w.spheres(0)).unsqueeze(1)
            w = replace(w, x=torch.cat([torch.where(failed, w.x[:, 0], first).unsqueeze(1), w.x[:, 1:]], dim=1))
        if s.own_states:
            own = (torch.rand(s.batch, generator=self.generator)[share] < s.own_states).to(self.device)
        return w, own

    def step(self, share: slice = slice(None), average=None) -> Report:
        """One step. `share` is this process's part of the batch and `average` what makes gradients equal across
        processes, where there are several."""
        s = self.settings
        drawn = self.draw(self.train, s.batch, self.generator) if s.early == 1.0 else self._draw_early()
        w, own = self._disturbed(self.windows(*(v[share] for v in drawn)), share)
        report, loss = Report(), 0.0
        for made, target, centers in Streaming(self.model, self.task, w, s.streaming, own):
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


def fit_direct(trainer: Trainer, steps: int, batch: int = 256, learning_rate: float = 2e-3,
               count: int = 200000) -> float:
    """Fit the direct part of the trainer's network to what the expert does next, alone: `steps` of Adam on batches of
    `count` windows (learning rate up, then down to zero), with every state's error over the RMS of its change within a
    window, or over a tenth of its scale where that is more. The head begins with zero, so that it adds nothing at
    first. Returns the mean of that error in the last tenth of the steps. ValueError where there is no direct part."""
    network, generator = trainer.model.network, torch.Generator().manual_seed(trainer.settings.seed)
    s = network.settings
    if not s.direct:
        raise ValueError('this network has no direct part to fit; expected one with direct > 0')
    drawn = trainer.draw(trainer.train, count, generator)
    x, known = datasets.states(trainer.demonstrations, trainer.task, *drawn, s.horizon + 1)
    x, known = x.float().to(trainer.device), known[:, 1:].to(trainer.device)
    change = (x[:, 1:] - x[:, :1])[known].square().mean(dim=0).sqrt()
    change = torch.maximum(change, 0.1 * network.scale)
    parameters = [*network.direct.parameters(), *(network.sight.parameters() if s.sight else [])]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    errors = []
    for _ in tqdm(range(steps), desc=f'{trainer.task.name}: direct part', disable=None, mininterval=2.0):
        rows = torch.randint(len(x), (batch,), generator=generator)
        theta = network.predict(x[rows, 0], network.of_state(x[rows, 0], *_ahead(trainer, drawn, rows)))[:, 1:]
        error = ((theta - x[rows, 1:]).abs() / change)[known[rows]].mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach()))
    _silence_head(network)
    return float(np.mean(errors[-max(steps // 10, 1):]))


def _ahead(trainer: Trainer, drawn: tuple[np.ndarray, np.ndarray], rows: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
    """Centres now and at the last knot, and radii, of the spheres of some windows as a policy is given them. Nothing
    for a direct part that does not see them."""
    s = trainer.model.network.settings
    if not s.sight:
        return ()
    seen = trainer.demonstrations.spheres(*(v[rows.numpy()] for v in drawn))
    centers = seen.ahead(torch.tensor([0.0, s.horizon * s.dt], dtype=torch.float64))
    return centers.float().to(trainer.device), seen.inflated(trainer.task.margin).float().to(trainer.device)


@torch.no_grad()
def _silence_head(network: TemporalNetwork) -> None:
    """Have the convolutions add nothing to the direct part, until they learn to."""
    network.head_out.weight.zero_()
    network.head_out.bias.zero_()
