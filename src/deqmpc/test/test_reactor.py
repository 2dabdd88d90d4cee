"""The stirred tank's benchmark: the authors' episodes, the best set points, and the right derivatives of its policy."""

import numpy as np
import pytest
import torch

from deqmpc import reactor
from deqmpc.dynamics.cstr import StirredTank
from deqmpc.realtime import Settings as RealtimeSettings
from deqmpc.realtime import build
from deqmpc.solvers.augmented_lagrangian import STATUS, Status
from deqmpc.training import gauss_newton
from deqmpc.training.gauss_newton import Limits, Settings
from deqmpc.training.policy_gradient import policy_gradient

torch.set_num_threads(1)
needs_compiler = pytest.mark.skipif(not build.available(), reason='no C compiler on this machine; 100 times slower')


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope='module')
def policy() -> reactor.Policy:
    return reactor.Policy()


@needs_compiler
@pytest.mark.parametrize('theta, value', [((0.0, 0.0), -99.8), ((0.055, -0.25), -54.4)])
def test_the_return_over_the_authors_100_training_seeds_is_that_of_their_code(policy, theta, value):
    """Their Radau collocation, Ipopt and IDAS; Brandner's v1 code was run for the figures."""
    found = reactor.rollout(policy, vector(*theta), reactor.starts(range(100)), derivatives=False)
    assert float(found.episodes.returns().mean()) == pytest.approx(value, rel=0.01) and found.solved > 0.97


@needs_compiler
def test_derivatives_of_the_policy_are_those_of_finite_differences_with_and_without_active_bounds():
    """In most states: in some a bound is about to change between active and not, where there is no derivative. Changes
    of inputs cost so little that multipliers of 1e-5 are common."""
    policy = reactor.Policy(RealtimeSettings(tolerance=1e-10, elastic=reactor.PRICE))
    x, theta, h = reactor.starts(range(60)), vector(0.02, -0.1), vector(1e-5, 1e-5, *[1e-3] * 4, 1e-5, 1e-5)
    x[30:, :4] = vector(1.2, 0.9, 126.0, 120.0) + 0.03 * (x[30:, :4] - vector(1.0, 1.0, 110.0, 110.0))
    x[30:, 4:6] = vector(40.0, 60.0) + 0.1 * (x[30:, 4:6] - 50.0)
    d, columns = policy.decide(x, theta), []
    for i in range(8):  # six states, two parameters
        step = h[i] * torch.eye(8, dtype=torch.float64)[i]
        ahead, behind = (policy.decide(x + sign * torch.cat([step[:6], torch.zeros(2)]), theta + sign * step[6:],
                                       derivatives=False).u for sign in (1.0, -1.0))
        columns.append((ahead - behind) / 2.0)
    measured = torch.stack(columns, dim=2)
    found = torch.cat([d.by_x[..., :6], d.by_theta], dim=2) * h
    error = (measured - found).abs().amax(dim=(1, 2)) / measured.abs().amax(dim=(1, 2))
    solved, held = d.status != STATUS.index(Status.ITERATION_LIMIT), x[:, 4:6] + d.u
    at_bound = ((held < 1e-6) | (held > 100.0 - 1e-6)).any(1)
    right = solved & (error < 1e-4)
    assert right.sum() > 0.75 * solved.sum() and float(error[solved].median()) < 1e-5
    assert (right & at_bound).sum() >= 20 and (right & ~at_bound).sum() >= 2
    assert not d.by_x[..., 6:].any() and found[right & ~at_bound][..., 6:].abs().amax(dim=(1, 2)).min() > 0.0


@needs_compiler
def test_five_updates_from_ten_episodes_raise_the_return(policy):
    x, theta, state = reactor.starts(range(10)), vector(0.0, 0.0), gauss_newton.start(2)
    limits, values = Limits.of([-0.05, -0.75], [0.10, 0.10], [0.05, 0.2]), []
    for _ in range(5):
        found = policy_gradient(reactor.rollout(policy, theta, x).episodes, reactor.Tank())
        values.append(found.value)
        made = gauss_newton.update(theta, found.gradient, found.gauss_newton, state, Settings(), limits)
        theta, state = made.theta, made.state
    assert values[-1] > values[0] + 5.0


def test_the_rewards_derivatives_are_those_of_its_values():
    x, u = reactor.starts(range(20)), vector(3.0, -7.0).repeat(20, 1)
    x[:4, 0], x[4:8, 2] = -0.3, 143.0  # beyond their bounds
    z = torch.cat([x, u], dim=1).requires_grad_()
    tank = reactor.Tank()
    exact, = torch.autograd.grad(tank.reward(z[:, :8], z[:, 8:]).sum(), z)
    gradient, hessian = tank.reward_derivatives(x, u)
    assert torch.allclose(gradient, exact, atol=1e-12)
    assert torch.allclose(hessian.diagonal(dim1=1, dim2=2)[:, [2, 3]], vector(-0.02, -0.02).expand(20, 2))


def test_an_episode_ends_after_five_samples_in_the_band():
    inside = reactor.starts([0])
    inside[:, :4] = vector(1.0, 1.0, 126.5, 119.2)
    assert reactor.in_band(inside).all()
    for i, off in ((2, 127.1), (3, 118.9), (0, 2.1), (1, 0.05)):
        out = inside.clone()
        out[:, i] = off
        assert not reactor.in_band(out).any()


@needs_compiler
def test_rollouts_explore_from_what_they_visit_and_the_same_seed_tries_the_same(policy):
    x = reactor.starts(range(4))
    a, b = (reactor.rollout(policy, vector(0.05, -0.2), x, False, noise=1.0, seed=3) for _ in range(2))
    e = a.exploration
    assert torch.equal(e.u, b.exploration.u) and torch.equal(e.following, b.exploration.following)
    alive = a.episodes.alive
    held = (a.episodes.x[..., 4:6] + e.u)[alive]
    assert ((held >= 0.0) & (held <= 100.0)).all()
    tried = (e.u - a.episodes.u)[alive]
    assert 0.7 < float(tried.std()) < 1.3
    assert torch.equal(e.last.sum(1), torch.ones(4, dtype=torch.long))
    assert torch.equal(alive.sum(1) - 1, e.last.to(torch.int8).argmax(1))


def steady_profit(t_r: float, t_k: float, alpha: np.ndarray, beta: np.ndarray) -> float:
    """Mean of 100 c_B F - 10 k2 c_B - 5 k3 c_A^2 over samples (S,) in steady state at these temperatures; -inf where a
    sample has none within the bounds. c_B, F and Q follow from c_A, and one equation, T_R' = 0, is left for it."""
    tank = StirredTank()
    inverse = 1.0 / (t_r + 273.15)
    k2 = tank.k_ab * np.exp(-tank.e_ab * inverse)
    k1, k3 = (beta * k2)[:, None], (tank.k_ad * np.exp(-alpha * tank.e_ad * inverse))[:, None]
    c_a = np.linspace(0.1, 2.0, 200)[None]
    capacity, cooling = tank.density * tank.heat_capacity, tank.exchange * (t_r - t_k)
    F = (k1 * c_a + k3 * c_a ** 2) / (tank.inflow_concentration - c_a)
    c_b = k1 * c_a / (F + k2)
    heat = (F * (tank.inflow_temperature - t_r) - cooling / (capacity * tank.volume)
            - (k1 * c_a * tank.h_ab + k2 * c_b * tank.h_bc + k3 * c_a ** 2 * tank.h_ad) / capacity)
    crossing = heat[:, :-1] * heat[:, 1:] <= 0.0
    share = np.where(crossing, heat[:, :-1] / (heat[:, :-1] - heat[:, 1:] + 1e-300), 0.0)
    F, c_b, c_a = (v[:, :-1] + share * (v[:, 1:] - v[:, :-1]) for v in (F, c_b, np.broadcast_to(c_a, heat.shape)))
    fits = crossing & (F >= 5.0) & (F <= 40.0) & (c_b >= 0.1) & (c_b <= 2.0)
    profit = np.where(fits, 100.0 * c_b * F - 10.0 * k2 * c_b - 5.0 * k3 * c_a ** 2, -np.inf).max(axis=1)
    return float(profit.mean()) if -8500.0 <= -cooling <= 0.0 else -np.inf


def test_the_set_points_are_the_best_common_temperatures_for_uncertain_coefficients():
    random = np.random.default_rng(11)
    drawn = np.clip(random.normal(1.0, 0.05, size=(25, 2)), 0.85, 1.15)
    alpha, beta = (v.ravel() for v in np.meshgrid(drawn[:, 0], drawn[:, 1]))
    grid = [(t_r, t_k) for t_r in np.arange(125.0, 127.01, 0.25) for t_k in np.arange(119.0, 121.01, 0.25)]
    best = max(grid, key=lambda t: steady_profit(*t, alpha, beta))
    assert abs(best[0] - 126.0) <= 0.3 and abs(best[1] - 120.0) <= 0.3
