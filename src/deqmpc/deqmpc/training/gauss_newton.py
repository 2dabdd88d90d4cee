"""Gauss-Newton ascent with momentum, for the few parameters of a policy whose return is known by noisy estimates.

Brandner, Gros and Lucia, Computationally efficient Gauss-Newton reinforcement learning for model predictive control,
equations 39 to 44. From estimates g_k (p,) of the gradient of the return J(theta), which is to be large, and B_k (p, p)
of its Hessian (deqmpc.training.policy_gradient), for k = 1, 2, ..

  m_k = beta m_{k-1} + (1 - beta) g_k,      m_0 = 0               mhat_k = m_k / (1 - beta^k)
  D_k = eta D_{k-1} + (1 - eta) N(B_k),     D_0 = -1/omega I      Dhat_k = D_k / (1 - eta^(k+1))
  theta_{k+1} = theta_k + d,                d = -alpha Dhat_k^-1 mhat_k

N makes an estimate negative definite: its eigenvalues become -|lambda|, between two limits. D_0 counts as an estimate
of its own, (1 - eta) B_0; hence the exponent k+1, with which Dhat_k is the weighted mean of B_0 .. B_k exactly. omega
acts as the first learning rate, 1/omega should be near the largest curvature of J.

Limits. d is the maximiser of the same model, mhat'd + d' Dhat d / (2 alpha), over the box in which no parameter leaves
[low, high] or moves further than `step` in one update. The step above is the maximiser without limits. A box, because
each parameter has its own unit and its own distance that is known to be safe: unlike a sphere it does not depend on how
parameters are scaled, and a parameter that its limit stops leaves the best step to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INF = float('inf')


@dataclass(frozen=True)
class Settings:
    """Numbers of the method; defaults are the paper's for the stirred tank, where J is about -100."""

    rate: float = 0.1  # alpha, share of the Newton step
    momentum: float = 0.75  # beta, memory of gradients; 0: none
    memory: float = 0.9  # eta, of Hessians; 0: none, the first curvature is then without effect
    curvature_0: float | None = 100.0  # 1/omega; None: -B_0 = diag(|g_1| / step), from the limits on the steps
    curvature_min: float = 1e-3  # least |eigenvalue| of an estimate
    curvature_max: float = 1e8  # largest

    def __post_init__(self):
        for name, low, high in (('rate', 0.0, INF), ('curvature_min', 0.0, INF)):
            if not low < getattr(self, name) < high:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a finite number > 0')
        for name in ('momentum', 'memory'):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number in [0, 1)')
        if self.curvature_0 is not None and not 0.0 < self.curvature_0 < INF:
            raise ValueError(f'curvature_0 = {self.curvature_0!r}; expected a finite number > 0, or None')
        if not self.curvature_min <= self.curvature_max:
            raise ValueError(f'curvature_max = {self.curvature_max!r}; expected at least curvature_min = '
                             f'{self.curvature_min!r}')


@dataclass(frozen=True)
class Limits:
    """Where each of p parameters may be, and how far it may move in one update. In the parameters' units."""

    low: Tensor  # (p,), -inf where there is none
    high: Tensor  # (p,), inf where there is none
    step: Tensor  # (p,) > 0, inf where there is none

    def __post_init__(self):
        shapes = {tuple(v.shape) for v in (self.low, self.high, self.step)}
        if len(shapes) != 1 or self.low.dim() != 1:
            raise ValueError(f'low, high and step have shapes {sorted(shapes)}; expected one vector length')
        if not ((self.low < self.high) & (self.step > 0)).all():  # False for NaN
            raise ValueError(f'low = {self.low.tolist()}, high = {self.high.tolist()}, step = {self.step.tolist()}; '
                             f'expected low < high and step > 0 for every parameter')

    @classmethod
    def none(cls, count: int) -> Limits:
        """No limits for `count` parameters."""
        infinite = torch.full((count,), INF, dtype=torch.float64)
        return cls(-infinite, infinite, infinite)

    @classmethod
    def of(cls, low: Sequence[float], high: Sequence[float], step: Sequence[float]) -> Limits:
        """From numbers, one of each for every parameter."""
        return cls(*(torch.tensor(list(v), dtype=torch.float64) for v in (low, high, step)))


@dataclass(frozen=True)
class State:
    """What the method remembers: save these three and it goes on as if never stopped."""

    count: int  # k, updates so far
    momentum: Tensor  # (p,) m_k
    hessian: Tensor  # (p, p) D_k


@dataclass(frozen=True)
class Update:
    """One step of the parameters."""

    theta: Tensor  # (p,) the new ones
    state: State
    gradient: Tensor  # (p,) mhat
    hessian: Tensor  # (p, p) Dhat, negative definite
    curvature: Tensor  # (p,) -diag Dhat: moving parameter i alone by d costs curvature_i d^2 / 2 at the optimum
    gain: float  # of the return that the model expects, mhat'd + d' Dhat d / 2
    limited: Tensor  # (p,) bool: stopped by a limit


def start(count: int) -> State:
    """The state before the first update of `count` parameters."""
    return State(0, torch.zeros(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64))


def update(theta: Tensor, gradient: Tensor, hessian: Tensor, state: State, settings: Settings = Settings(),
           limits: Limits | None = None) -> Update:
    """The next parameters from theta (p,), g (p,) and B (p, p), all float64.

    ValueError where shapes do not fit, a number is not finite or theta is outside of the limits.
    """
    limits = Limits.none(len(theta)) if limits is None else limits
    _check(theta, gradient, hessian, state, limits)
    k, beta, eta = state.count + 1, settings.momentum, settings.memory
    before = state.hessian if state.count else -torch.diag(_first_curvature(gradient, settings, limits))  # D_0
    m = beta * state.momentum + (1.0 - beta) * gradient
    D = eta * before + (1.0 - eta) * negative_definite(hessian, settings.curvature_min, settings.curvature_max)
    mhat, Dhat = m / (1.0 - beta ** k), D / (1.0 - eta ** (k + 1))
    low, high = (torch.maximum(limits.low - theta, -limits.step), torch.minimum(limits.high - theta, limits.step))
    d = maximum_in_box(mhat, Dhat / settings.rate, low, high)
    # theta + (high - theta) may be a last digit above high
    moved = torch.minimum(torch.maximum(theta + d, limits.low), limits.high)
    return Update(moved, State(k, m, D), mhat, Dhat, -Dhat.diagonal(), float(mhat @ d + 0.5 * d @ Dhat @ d),
                  (d <= low) | (d >= high))


def negative_definite(B: Tensor, least: float, largest: float) -> Tensor:
    """B (p, p) with its eigenvalues lambda replaced by -|lambda|, between -largest and -least."""
    values, vectors = torch.linalg.eigh(0.5 * (B + B.T))
    return -(vectors * values.abs().clamp(least, largest)) @ vectors.T


def maximum_in_box(g: Tensor, H: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """argmax of g'd + d'Hd/2 over low <= d <= high, for H (p, p) negative definite and low <= 0 <= high (p,).

    Projected Newton (Bertsekas 1982): bounds that the slope pushes against are held, a Newton step of the rest is
    projected onto the box.
    """
    d = torch.zeros_like(g)
    for _ in range(20 * len(g) + 20):  # it takes a few, each finds the free set or one more bound
        slope = g + H @ d
        free = ~(((d <= low) & (slope <= 0)) | ((d >= high) & (slope >= 0)))
        if not free.any():
            return d
        newton = torch.zeros_like(d)
        newton[free] = -torch.linalg.solve(H[free][:, free], slope[free])
        after = _best_on_path(d, newton, slope, H, low, high)
        if after is None:  # no step gains: at the maximum, to rounding
            return d
        d = after
    return d


def _best_on_path(d, newton, slope, H, low, high):
    """The longest of the projected steps 1, 1/2, .. that gains; None where none does."""
    for halving in range(40):
        e = torch.minimum(torch.maximum(d + 0.5 ** halving * newton, low), high) - d
        gain = slope @ e + 0.5 * e @ H @ e
        if gain > 0 and gain >= 1e-4 * (slope @ e):
            return d + e
    return None


def _first_curvature(gradient, settings, limits):
    """The diagonal of -D_0, (p,)."""
    if settings.curvature_0 is not None:
        return torch.full_like(gradient, settings.curvature_0)
    if not torch.isfinite(limits.step).all():
        raise ValueError(f'curvature_0 = None with limits.step = {limits.step.tolist()}; expected a finite step for '
                         f'every parameter')
    by_step = (gradient.abs() / limits.step).clamp(settings.curvature_min, settings.curvature_max)
    return (1.0 - settings.memory) * by_step


def _check(theta, gradient, hessian, state, limits):
    p = len(theta)
    for name, value, shape in (('theta', theta, (p,)), ('gradient', gradient, (p,)), ('hessian', hessian, (p, p)),
                               ('state.momentum', state.momentum, (p,)), ('limits.low', limits.low, (p,))):
        if tuple(value.shape) != shape or value.dtype != torch.float64:
            raise ValueError(f'{name} is {value.dtype} of shape {tuple(value.shape)}; expected torch.float64 of shape '
                             f'{shape}')
    for name, value in (('theta', theta), ('gradient', gradient), ('hessian', hessian)):
        if not torch.isfinite(value).all():
            raise ValueError(f'{name} = {value.tolist()}; expected finite numbers')
    if not ((limits.low <= theta) & (theta <= limits.high)).all():
        raise ValueError(f'theta = {theta.tolist()} is outside of [{limits.low.tolist()}, {limits.high.tolist()}]')
