"""Gauss-Newton reinforcement learning (Brandner, Gros, Lucia): an MPC tuned from episodes in fewer updates than Adam.

Steps of the parameters of a policy, from the gradient of its return and

  gauss_newton   M2, which needs first derivatives of the policy alone     newton   M1 + M2, with second derivatives
  exact          the Hessian of the return, where it is known              adam     nothing; also plain gradient ascent

on three problems (deqmpc.training.gauss_newton and policy_gradient):

  scalar    s+ = s + a + w under a = -theta^2 s, in closed form: error |theta - theta*| after each update
  linear    mass and drag of a model whose regulator drives the true plant, badly scaled on purpose: loss J* - J
  tank      the stirred tank's MPC (deqmpc.reactor), two coefficients of its model, from theta = 0: return of the
            training episodes after each update, alpha 0.1, beta 0.75, eta 0.9, 1/omega 100, Adam 1e-3, both within the
            grid of the paper's Figure 6; `learned`: gauss_newton with the paper's learned action-value, the others
            take it from the model of the plant; newton's second derivatives are differences
  momentum  the same from gradients and Hessians remembered differently (Figure 7), `beta/eta`

Checks: the scalar errors are those of the closed form's recursion; linear: Gauss-Newton is within 1e-6 of the optimum
after 4 updates, Adam not within 1e-3 after 100 at any of three rates; tank: Gauss-Newton gains at least 80 % of what
(0.055, -0.25), the best of the authors' grid, gains, in at most 65 updates, and stays there; Adam's last return is
below, and Gauss-Newton stays above that from an earlier update on; momentum: with eta = 0.9 and 0.99 the last return is
not below the first. The first updates may fall: steps are large while the first curvature has most of the weight.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deqmpc import reactor
from deqmpc.provenance import commit
from deqmpc.reproduce import Check, Column, Plan, Results
from deqmpc.training import action_value, gauss_newton
from deqmpc.training.gauss_newton import Limits, Settings
from deqmpc.training.policy_gradient import Estimate, estimate, policy_gradient

X_LABEL = 'update'
TASKS = ('scalar', 'linear', 'tank', 'momentum')
VARIANTS = ('exact', 'newton', 'gauss_newton', 'learned', 'ascent', 'adam', 'adam 0.01', 'adam 0.1')
COLUMNS = (Column('log10 of error or loss', 'log_error'), Column('return', 'return'))
SEEDS = {name: 1 for name in ('smoke', 'small', 'medium', 'full')}  # the training episodes are the same each update
MILESTONES = (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50, 65, 80, 100)
FULL_STEP = Settings(rate=1.0, momentum=0.0, memory=0.0, curvature_min=1e-12)
PAPER = Settings(rate=0.1, momentum=0.75, memory=0.9, curvature_0=100.0)
GRID = Limits.of([-0.05, -0.75], [0.10, 0.10], [math.inf, math.inf])
BEST = (0.055, -0.25)
SCALAR_ERRORS = {'exact': (1.67e-1, 3.16e-2, 3.16e-4), 'newton': (1.67e-1, 1.66e-1, 4.70e-2, 5.03e-3, 6.5e-5),
                 'gauss_newton': (1.67e-1, 4.70e-2, 2.75e-3, 9.96e-6), 'ascent': (1.67e-1, 4.0e-2, 1.3e-2)}


@dataclass(frozen=True)
class Size:
    """What a budget means here."""

    episodes: int
    updates: int  # of the tank
    momentum_updates: int
    pairs: tuple[tuple[float, float], ...]  # (beta, eta)
    tank: tuple[str, ...]  # variants
    critic: action_value.Settings  # of the learned action-value
    limit: int = reactor.TIME_LIMIT  # samples of an episode


_PAIRS = tuple((beta, eta) for beta in (0.75, 0.9, 0.99) for eta in (0.0, 0.5, 0.9, 0.99))
SIZES = {
    'smoke': Size(2, 1, 1, ((0.75, 0.9),), ('gauss_newton', 'learned'), action_value.Settings(epochs=2, batch=64),
                  limit=2),
    'small': Size(25, 40, 20, _PAIRS[:4], ('gauss_newton', 'adam', 'learned'),
                  action_value.Settings(epochs=60, batch=256)),
    'medium': Size(100, 65, 30, _PAIRS[:4], ('gauss_newton', 'newton', 'adam', 'learned'),
                   action_value.Settings(epochs=100, batch=256)),
    'full': Size(100, 100, 30, _PAIRS, ('gauss_newton', 'newton', 'adam', 'adam 0.01', 'learned'),
                 action_value.Settings())}


# --- in closed form ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Scalar:
    """s+ = s + a + w, r = -(s^2 + a^2)/2, a = -theta^2 s; theta is (1,)."""

    gamma: float = 0.9
    noise: float = 0.1  # variance of w
    spread: float = 0.1  # variance of s_0
    start = (0.6,)
    best = (0.7670745394,)  # theta*^2 is the regulator's gain

    def _p(self, theta):
        return -0.5 * (1.0 + theta ** 4) / (1.0 - self.gamma * (1.0 - theta ** 2) ** 2)

    def _square(self, theta):
        """Discounted sum of E s^2."""
        return (self.spread + self.gamma * self.noise / (1.0 - self.gamma)) / (
            1.0 - self.gamma * (1.0 - theta ** 2) ** 2)

    def value(self, theta: Tensor) -> Tensor:
        """J, a number."""
        return (self._p(theta) * (self.spread + self.gamma / (1.0 - self.gamma) * self.noise)).sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """g (1,)."""
        p = self.gamma * self._p(theta)
        return (2.0 * theta ** 3 * (2.0 * p - 1.0) - 4.0 * p * theta) * self._square(theta)

    def gauss_newton(self, theta: Tensor) -> Tensor:
        """M2 (1, 1)."""
        return (4.0 * theta ** 2 * (2.0 * self.gamma * self._p(theta) - 1.0) * self._square(theta)).reshape(1, 1)

    def newton(self, theta: Tensor) -> Tensor:
        """M1 + M2 (1, 1)."""
        p = self.gamma * self._p(theta)
        M1 = (2.0 * theta ** 2 * (2.0 * p - 1.0) - 4.0 * p) * self._square(theta)
        return M1.reshape(1, 1) + self.gauss_newton(theta)


@dataclass(frozen=True)
class Linear:
    """A cart x = (position, speed) of true mass 1.3 and drag 1.1 under the discounted regulator of a model of mass
    1 + theta_1 and drag 0.5 + 0.01 theta_2; reward -(x'Qx + u'Ru), theta is (2,)."""

    gamma: float = 0.95
    dt: float = 0.1
    start = (0.0, 0.0)
    best = (0.3, 60.0)

    def plant(self, mass, drag) -> tuple[Tensor, Tensor]:
        """A (2, 2), B (2, 1)."""
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        A = torch.stack([one, self.dt * one, zero, 1.0 - self.dt * drag / mass]).view(2, 2)
        return A, torch.stack([zero, self.dt / mass]).view(2, 1)

    def gain(self, theta: Tensor) -> Tensor:
        """K (1, 2) of u = -K x: policy iteration, quadratic convergence from K = 0."""
        A, B = self.plant(1.0 + theta[0], 0.5 + 0.01 * theta[1])
        K = A.new_zeros(1, 2)
        for _ in range(10):
            P = self._cost_to_go(A, B, K)
            K = torch.linalg.solve(_R + self.gamma * B.T @ P @ B, self.gamma * B.T @ P @ A)
        return K

    def _cost_to_go(self, A, B, K):
        closed = A - B @ K
        system = torch.eye(4, dtype=A.dtype) - self.gamma * torch.kron(closed.T, closed.T)
        return torch.linalg.solve(system, (_Q + K.T @ _R @ K).flatten()).view(2, 2)

    def value(self, theta: Tensor) -> Tensor:
        """J, a number."""
        P = self._cost_to_go(*self._truth(), self.gain(theta))
        return -torch.trace(P @ self._sources())

    def gradient(self, theta: Tensor) -> Tensor:
        """g (2,)."""
        by_theta, visits, Q_u, _ = self._at(theta)
        return torch.einsum('uxp,xy,uy->p', by_theta, visits, Q_u)

    def gauss_newton(self, theta: Tensor) -> Tensor:
        """M2 (2, 2)."""
        by_theta, visits, _, Q_uu = self._at(theta)
        return torch.einsum('uxp,xy,uv,vyq->pq', by_theta, visits, Q_uu, by_theta)

    def newton(self, theta: Tensor) -> Tensor:
        """M1 + M2 (2, 2)."""
        twice, (_, visits, Q_u, _) = -torch.func.jacrev(torch.func.jacrev(self.gain))(theta), self._at(theta)
        return torch.einsum('uxpq,xy,uy->pq', twice, visits, Q_u) + self.gauss_newton(theta)

    def _truth(self):
        return self.plant(*(torch.tensor(v, dtype=torch.float64) for v in (1.3, 1.1)))

    def _sources(self):
        """Discounted sum of the covariances of x_0 and of the noise."""
        return (1.0 + 0.01 * self.gamma / (1.0 - self.gamma)) * torch.eye(2, dtype=torch.float64)

    def _at(self, theta):
        """d(-K)/dtheta (1, 2, p), discounted sum of E x x' (2, 2), G (1, 2) of Q_u = G x, and Q_uu (1, 1)."""
        by_theta, K = torch.func.jacrev(lambda theta: (self.gain(theta),) * 2, has_aux=True)(theta)
        A, B = self._truth()
        closed, P = A - B @ K, self._cost_to_go(A, B, K)
        system = torch.eye(4, dtype=A.dtype) - self.gamma * torch.kron(closed, closed)
        visits = torch.linalg.solve(system, self._sources().flatten()).view(2, 2)
        G = 2.0 * (_R @ K - self.gamma * B.T @ P @ closed)
        return -by_theta, visits, G, -2.0 * (_R + self.gamma * B.T @ P @ B)


_Q, _R = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), torch.tensor([[0.1]], dtype=torch.float64)


def closed_form(example: Scalar | Linear, variant: str, updates: int) -> list[Tensor]:
    """theta before and after each update."""
    theta, made = torch.tensor(example.start, dtype=torch.float64), []
    state, adam = gauss_newton.start(len(theta)), None
    if variant.startswith('adam'):
        adam = Adam(theta, _rate(variant))
    for _ in range(updates):
        made.append(theta)
        g = example.gradient(theta)
        if adam is not None:
            theta = adam.step(g)
        elif variant == 'ascent':
            theta = theta + 0.1 * g
        else:
            theta = gauss_newton.update(theta, g, curvature_of(example, variant)(theta), state, FULL_STEP).theta
    return [*made, theta]


def curvature_of(example: Scalar | Linear, variant: str) -> Callable[[Tensor], Tensor]:
    """The Hessian that a variant takes."""
    if variant == 'exact':
        return lambda theta: torch.autograd.functional.hessian(example.value, theta)
    return getattr(example, variant)


class Adam:
    """torch's, upwards, within limits."""

    def __init__(self, theta: Tensor, rate: float, limits: Limits | None = None):
        self.theta, self.limits = theta.clone().requires_grad_(), limits
        self._adam = torch.optim.Adam([self.theta], lr=rate, maximize=True)

    def step(self, gradient: Tensor) -> Tensor:
        """The next theta."""
        self.theta.grad = gradient.clone()
        self._adam.step()
        if self.limits is not None:
            with torch.no_grad():
                self.theta.copy_(torch.minimum(torch.maximum(self.theta, self.limits.low), self.limits.high))
        return self.theta.detach().clone()


def _rate(variant: str) -> float:
    """Of adam: 0.001 where it names none."""
    return float((variant.split() + ['0.001'])[1])


# --- the tank ---------------------------------------------------------------------------------------

class Source:
    """Estimates of the tank's gradient and Hessian, for a variant."""

    def __init__(self, variant: str, size: Size):
        self.variant, self.limit, self.policy, self.plant = variant, size.limit, reactor.Policy(), reactor.Tank()
        self.starts = reactor.starts(range(size.episodes))
        self.critic = action_value.Critic(size.critic, 6, 2, seed=0) if variant == 'learned' else None

    def estimate(self, theta: Tensor) -> Estimate:
        """Of the training episodes under theta."""
        noise = 1.0 if self.critic is not None else 0.0  # 1 % of the inputs' ranges
        made = reactor.rollout(self.policy, theta, self.starts, second=self.variant == 'newton', noise=noise,
                               limit=self.limit)
        if self.critic is None:
            return policy_gradient(made.episodes, self.plant)
        return estimate(made.episodes, *self.critic.action_values(made.episodes, made.exploration))

    def value(self, theta: Tensor) -> float:
        """J."""
        made = reactor.rollout(self.policy, theta, self.starts, derivatives=False, limit=self.limit)
        return float(made.episodes.returns().mean())


def train(variant: str, size: Size, updates: int, settings: Settings, path: Path) -> list[list[float]]:
    """A line (update, return, theta_a, theta_b) for every update from theta = 0, kept in `path`: what is whole there is
    not done again."""
    if path.exists():
        with path.open() as file:
            known = [[float(v) for v in line] for line in list(csv.reader(file))[1:]]
        if len(known) > updates:
            return known[:updates + 1]
    source, theta, state = Source(variant, size), torch.zeros(2, dtype=torch.float64), gauss_newton.start(2)
    adam, lines = Adam(theta, _rate(variant), GRID) if variant.startswith('adam') else None, []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['update', 'return', 'theta_a', 'theta_b'])
        for k in range(updates + 1):
            found = source.estimate(theta) if k < updates else None
            lines.append([k, found.value if found else source.value(theta), *theta.tolist()])
            writer.writerow(lines[-1])
            file.flush()
            if adam is not None and found:
                theta = adam.step(found.gradient)
            elif found:
                hessian = found.newton if variant == 'newton' else found.gauss_newton
                made = gauss_newton.update(theta, found.gradient, hessian, state, settings, GRID)
                theta, state = made.theta, made.state
    return lines


# --- the experiment ---------------------------------------------------------------------------------

def rows(plan: Plan, out: Path) -> list[dict]:
    """A row for every problem, method and milestone. ValueError for an unknown task."""
    size, made = SIZES[plan.budget.name], []
    for task in plan.tasks:
        if task not in TASKS:
            raise ValueError(f'--tasks {task}; expected some of {", ".join(TASKS)}')
    for task in plan.tasks or TASKS:
        made += {'scalar': scalar_rows, 'linear': linear_rows}[task]() if task in ('scalar', 'linear') else (
            tank_rows(plan, size, out) if task == 'tank' else momentum_rows(size, out))
    empty = {'seed': 0, 'log_error': math.nan, 'return': math.nan, 'theta_a': math.nan, 'theta_b': math.nan}
    return [{**empty, **row, 'commit': commit()} for row in made]


def scalar_rows() -> list[dict]:
    """Errors of four methods."""
    example = Scalar()
    return [{'task': 'scalar', 'variant': v, 'x': k, 'log_error': _log(abs(float(theta) - example.best[0]))}
            for v in ('exact', 'newton', 'gauss_newton', 'ascent')
            for k, theta in enumerate(closed_form(example, v, 20)) if k in MILESTONES]


def linear_rows() -> list[dict]:
    """Losses of five methods."""
    example, made = Linear(), []
    best = float(example.value(torch.tensor(example.best, dtype=torch.float64)))
    for v, updates in (('newton', 7), ('gauss_newton', 7), ('adam', 100), ('adam 0.01', 100), ('adam 0.1', 100)):
        for k, theta in enumerate(closed_form(example, v, updates)):
            if k in MILESTONES:
                made.append({'task': 'linear', 'variant': v, 'x': k,
                             'log_error': _log(best - float(example.value(theta)))})
    return made


def tank_rows(plan: Plan, size: Size, out: Path) -> list[dict]:
    """Returns of the methods, and of the best parameters known."""
    source = Source('gauss_newton', size)
    best = torch.tensor(BEST, dtype=torch.float64)
    made = [{'task': 'tank', 'variant': 'best of grid', 'x': 0, 'return': source.value(best), 'theta_a': BEST[0],
             'theta_b': BEST[1]}]
    for v in plan.variants or size.tank:
        made += _chosen('tank', v, train(v, size, size.updates, PAPER, _kept(out, v, PAPER)))
    return made


def momentum_rows(size: Size, out: Path) -> list[dict]:
    """Returns of Gauss-Newton with other memories."""
    made = []
    for beta, eta in size.pairs:
        settings = Settings(rate=PAPER.rate, momentum=beta, memory=eta, curvature_0=PAPER.curvature_0)
        lines = train('gauss_newton', size, size.momentum_updates, settings, _kept(out, 'gauss_newton', settings))
        made += _chosen('momentum', f'{beta:g}/{eta:g}', lines)
    return made


def _kept(out: Path, variant: str, settings: Settings) -> Path:
    """Where a run's lines are kept; runs of different tasks that are the same share them."""
    memories = '' if variant.startswith('adam') else f'-{settings.momentum:g}-{settings.memory:g}'
    return out / f'tank-{variant.replace(" ", "-")}{memories}.csv'


def _chosen(task, variant, lines):
    last = int(lines[-1][0])
    return [{'task': task, 'variant': variant, 'x': int(k), 'return': value, 'theta_a': a, 'theta_b': b}
            for k, value, a, b in lines if int(k) in MILESTONES or int(k) == last]


def _log(error: float) -> float:
    return math.log10(max(error, 1e-16))


def draw(figure, results: Results):
    """Errors and returns over updates."""
    figure.set_size_inches(13.0, 3.6)
    axes = dict(zip(TASKS, figure.subplots(1, 4), strict=True))
    for task in results.unique('task'):
        for i, v in enumerate(dict.fromkeys(r['variant'] for r in results.select(task=task))):
            found = results.select(task=task, variant=v)
            metric = 'return' if task in ('tank', 'momentum') else 'log_error'
            if v == 'best of grid':
                axes[task].axhline(found[0][metric], color='0.5', linestyle=':', label=v)
            else:
                axes[task].plot([r['x'] for r in found], [r[metric] for r in found], marker='.', color=f'C{i}', label=v)
        axes[task].legend(frameon=False, fontsize=7)
    for task, label in zip(TASKS, ('log10 |theta - theta*|', 'log10 (J* - J)', 'return', 'return'), strict=True):
        axes[task].set(title=task, xlabel='update', ylabel=label)
        axes[task].grid(alpha=0.3)


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    known, made = results.unique('task'), []
    if 'scalar' in known:
        made += [_scalar_check(results, v) for v in SCALAR_ERRORS]
    if 'linear' in known:
        loss = 10.0 ** results.mean('log_error', task='linear', variant='gauss_newton', x=4)
        made.append(Check(f'linear: Gauss-Newton is within {loss:.1e} of the optimum after 4 updates, <= 1e-6',
                          loss <= 1e-6))
        others = [10.0 ** results.mean('log_error', task='linear', variant=v, x=100)
                  for v in ('adam', 'adam 0.01', 'adam 0.1')]
        made.append(Check(f'Adam after 100: {", ".join(f"{v:.1e}" for v in others)}, all > 1e-3', min(others) > 1e-3))
    if 'tank' in known:
        made += _tank_checks(results)
    if 'momentum' in known:
        for v in [v for v in results.unique('variant') if v.endswith(('/0.9', '/0.99'))]:
            found = results.select(task='momentum', variant=v)
            first, last = found[0]['return'], found[-1]['return']
            made.append(Check(f'momentum {v}: return from {first:.1f} to {last:.1f}', last >= first))
    return made


def _scalar_check(results, variant):
    expected = SCALAR_ERRORS[variant]
    found = [10.0 ** results.mean('log_error', task='scalar', variant=variant, x=k) for k in range(len(expected))]
    return Check(f'scalar: errors of {variant} {", ".join(f"{v:.2e}" for v in found)}',
                 bool(np.allclose(found, expected, rtol=0.05)))


def _tank_checks(results):
    best = results.mean('return', task='tank', variant='best of grid')
    ours = results.select(task='tank', variant='gauss_newton')
    if not ours:
        return []
    goal = ours[0]['return'] + 0.8 * (best - ours[0]['return'])
    reached = _stays_above(ours, goal)
    made = [Check(f'tank: from {ours[0]["return"]:.1f}, with {best:.1f} the best of the grid, Gauss-Newton stays above '
                  f'{goal:.1f} from update {reached:g} on, <= 65', reached <= 65)]
    for other in ('adam', 'newton', 'learned'):
        theirs = results.select(task='tank', variant=other)
        if theirs and other == 'adam':
            last, above = theirs[-1]['return'], _stays_above(ours, theirs[-1]['return'])
            made.append(Check(f'after {ours[-1]["x"]} updates {ours[-1]["return"]:.1f}, Adam after {theirs[-1]["x"]} '
                              f'{last:.1f}, above which it stays from update {above:g} on', above < theirs[-1]['x']))
        elif theirs:
            made.append(Check(f'{other} ends at {theirs[-1]["return"]:.1f}, above its start',
                              theirs[-1]['return'] > theirs[0]['return']))
    return made


def _stays_above(found, value) -> float:
    """The first milestone from which on no return is below; inf where there is none."""
    below = [i for i, r in enumerate(found) if r['return'] < value]
    first = below[-1] + 1 if below else 0
    return found[first]['x'] if first < len(found) else math.inf
