"""The action-value of a policy, learned from its episodes and from one explored input beside each of its own.

Brandner, Gros and Lucia, Computationally efficient Gauss-Newton reinforcement learning for model predictive control.
Where the plant is not known, Q = V + A is fitted with

  V(x)      a network of two hidden layers
  A(x, u)   for every input u_i a stack of two hidden layers on (x, u_i), their outputs together linear in A

so that Q_uu = A_uu is diagonal. States and inputs are scaled to [0, 1] by their ranges in the data. From a visited x
with the policy's input u, its return R = sum of rewards to the end, and an explored input u~ with reward r~, following
state x~ and adv = r~ + V(x~) - R (without V where the episode ends),

  loss = mean of (V(x) - R)^2, A(x, u)^2, (A(x, u~) - adv)^2 and (A_u(x, u)'(u~ - u) - adv)^2

The last one makes A_u, which the policy gradient needs, a fit of its own. The networks keep what they have learned from
one set of episodes to the next. gamma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deqmpc.training.policy_gradient import Episodes


@dataclass(frozen=True)
class Settings:
    """Numbers of the fit; defaults are the paper's."""

    hidden: tuple[int, int] = (64, 32)
    rate: float = 1e-3  # of Adam
    batch: int = 128
    epochs: int = 500  # at most, for each set of episodes
    patience: int = 30  # epochs without a better loss until the rate falls to a tenth
    stop: int = 50  # epochs without a better loss that end the fit, ...
    stop_from: int = 100  # ... from this epoch on

    def __post_init__(self):
        for name in ('batch', 'epochs', 'patience', 'stop', 'stop_from', *(f'hidden[{i}]' for i in (0, 1))):
            value = self.hidden[int(name[7])] if name.startswith('hidden') else getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 1')
        if not 0.0 < self.rate < float('inf'):
            raise ValueError(f'rate = {self.rate!r}; expected a finite number > 0')


class Exploration(Protocol):
    """One step with another input from every visited state, in the shapes of the episodes."""

    u: Tensor  # (B, N, m)
    reward: Tensor  # (B, N)
    following: Tensor  # (B, N, n)
    last: Tensor  # (B, N) bool: the episode ended with this step


@dataclass(frozen=True)
class _Data:
    """P visited states, scaled."""

    x: Tensor  # (P, n)
    u: Tensor  # (P, m)
    tried: Tensor  # (P, m)
    reward: Tensor  # (P,) of what was tried
    following: Tensor  # (P, n)
    last: Tensor  # (P,)
    value: Tensor  # (P,) R

    def __getitem__(self, samples) -> _Data:
        return _Data(*(v[samples] for v in vars(self).values()))


class Critic:
    """V and A over the first `states` numbers of the state and all inputs."""

    def __init__(self, settings: Settings, states: int, inputs: int, seed: int):
        self.settings, self.states = settings, states
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.V = nn.Sequential(*_stack(states, settings.hidden), nn.Linear(settings.hidden[1], 1)).double()
            self.stacks = nn.ModuleList(nn.Sequential(*_stack(states + 1, settings.hidden))
                                        for _ in range(inputs)).double()
            self.A = nn.Linear(inputs * settings.hidden[1], 1).double()
        self._parameters = [*self.V.parameters(), *self.stacks.parameters(), *self.A.parameters()]

    def action_values(self, episodes: Episodes, exploration: Exploration) -> tuple[Tensor, Tensor]:
        """Q_u (B, N, m) and Q_uu (B, N, m, m) in the units of the inputs, after a fit to these episodes; 0 after the
        end of an episode."""
        alive = episodes.alive
        data, u_range, unit = self._scaled(episodes, exploration)
        self.fit(data)
        once, twice = self._derivatives(data.x, data.u)
        Q_u, Q_uu = torch.zeros_like(episodes.u), torch.zeros_like(torch.diag_embed(episodes.u))
        Q_u[alive] = unit * once / u_range
        Q_uu[alive] = torch.diag_embed(unit * twice / u_range.square())
        return Q_u, Q_uu

    def fit(self, data: _Data) -> float:
        """The last epoch's mean loss."""
        s, best, since, P = self.settings, float('inf'), 0, len(data.x)
        adam = torch.optim.Adam(self._parameters, lr=s.rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.1, patience=s.patience)
        for epoch in range(s.epochs):
            total = 0.0
            for rows in torch.randperm(P, generator=self._generator).split(s.batch):
                loss = self.loss(data[rows])
                adam.zero_grad()
                loss.backward()
                adam.step()
                total += float(loss.detach()) * len(rows) / P
            plateau.step(total)
            best, since = (total, 0) if total < best else (best, since + 1)
            if epoch >= s.stop_from and since >= s.stop:
                break
        return total

    def loss(self, d: _Data) -> Tensor:
        """The mean of the four squares."""
        u = d.u.clone().requires_grad_()
        A = self.advantage(d.x, u)
        slope, = torch.autograd.grad(A.sum(), u, create_graph=True)
        with torch.no_grad():
            ahead = torch.where(d.last, 0.0, self.V(d.following).squeeze(1))
        adv = d.reward + ahead - d.value
        parts = (self.V(d.x).squeeze(1) - d.value, A, self.advantage(d.x, d.tried) - adv,
                 (slope * (d.tried - d.u)).sum(1) - adv)
        return torch.stack(parts).square().mean()

    def advantage(self, x: Tensor, u: Tensor) -> Tensor:
        """A (P,) at scaled x (P, n), u (P, m)."""
        parts = [stack(torch.cat([x, u[:, i:i + 1]], dim=1)) for i, stack in enumerate(self.stacks)]
        return self.A(torch.cat(parts, dim=1)).squeeze(1)

    def _derivatives(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """A_u (P, m), and the diagonal of A_uu (P, m), which is all of it."""
        u = u.clone().requires_grad_()
        once, = torch.autograd.grad(self.advantage(x, u).sum(), u, create_graph=True)
        twice, = torch.autograd.grad(once.sum(), u)
        return once.detach(), twice

    def _scaled(self, episodes: Episodes, exploration: Exploration) -> tuple[_Data, Tensor, Tensor]:
        """The data, the range of the inputs (m,) and the unit of the returns."""
        alive, n = episodes.alive, self.states
        reward = torch.where(alive, episodes.reward, 0.0)
        value = reward.flip(1).cumsum(1).flip(1)[alive]
        x, following = episodes.x[alive][:, :n], exploration.following[alive][:, :n]
        u, tried = episodes.u[alive], exploration.u[alive]
        (x_low, x_range), (u_low, u_range) = _range(torch.cat([x, following])), _range(torch.cat([u, tried]))
        unit = value.std().clamp_min(1e-12)
        return _Data((x - x_low) / x_range, (u - u_low) / u_range, (tried - u_low) / u_range,
                     exploration.reward[alive] / unit, (following - x_low) / x_range, exploration.last[alive],
                     value / unit), u_range, unit


def _stack(width: int, hidden: tuple[int, int]) -> list[nn.Module]:
    return [nn.Linear(width, hidden[0]), nn.GELU(), nn.Linear(hidden[0], hidden[1]), nn.GELU()]


def _range(v: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest value and width of the columns of v."""
    low, high = v.amin(0), v.amax(0)
    return low, (high - low).clamp_min(1e-9)
