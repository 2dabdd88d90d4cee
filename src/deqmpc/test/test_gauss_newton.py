"""Gauss-Newton ascent: its averages are weighted means, its step is the best one within the limits, and it resumes."""

from dataclasses import replace

import pytest
import torch

from deqmpc.training import gauss_newton
from deqmpc.training.gauss_newton import Limits, Settings

torch.set_num_threads(1)
PAPER = Settings(rate=0.1, momentum=0.75, memory=0.9, curvature_0=100.0)
NEWTON = Settings(rate=1.0, momentum=0.0, memory=0.0)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_negative(p: int, generator: torch.Generator) -> torch.Tensor:
    """A negative definite matrix (p, p)."""
    A = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return -A @ A.T - 0.1 * torch.eye(p, dtype=torch.float64)


def test_the_averages_are_weighted_means_of_all_estimates_with_the_first_curvature_as_one_of_them():
    random, p, K = torch.Generator().manual_seed(0), 3, 7
    g = torch.randn(K, p, generator=random, dtype=torch.float64)
    B = torch.stack([random_negative(p, random) for _ in range(K)])
    theta, state = torch.zeros(p, dtype=torch.float64), gauss_newton.start(p)
    for k in range(K):
        u = gauss_newton.update(theta, g[k], B[k], state, PAPER)
        state = u.state
        beta = 0.25 * 0.75 ** torch.arange(k, -1, -1, dtype=torch.float64) / (1.0 - 0.75 ** (k + 1))
        eta = 0.1 * 0.9 ** torch.arange(k + 1, -1, -1, dtype=torch.float64) / (1.0 - 0.9 ** (k + 2))
        assert float(beta.sum()) == pytest.approx(1.0, abs=1e-12) and float(eta.sum()) == pytest.approx(1.0, abs=1e-12)
        first = -100.0 / 0.1 * torch.eye(p, dtype=torch.float64).unsqueeze(0)  # B_0 = D_0 / (1 - eta)
        assert (u.gradient - beta @ g[:k + 1]).abs().max() < 1e-12
        assert (u.hessian - torch.tensordot(eta, torch.cat([first, B[:k + 1]]), 1)).abs().max() < 1e-11
        assert torch.allclose(u.theta, -0.1 * torch.linalg.solve(u.hessian, u.gradient), atol=1e-13)


def test_a_constant_curvature_is_what_the_average_tends_to():
    B, theta, state = torch.diag(vector(-2.0, -30.0)), vector(0.0, 0.0), gauss_newton.start(2)
    for _ in range(300):
        made = gauss_newton.update(theta, vector(1.0, 1.0), B, state, PAPER)
        state = made.state
    assert (made.hessian - B).abs().max() < 1e-9 and torch.allclose(made.curvature, vector(2.0, 30.0))


def test_without_averages_the_step_on_a_concave_quadratic_ends_at_its_maximum():
    random = torch.Generator().manual_seed(1)
    H, best = random_negative(5, random), torch.randn(5, generator=random, dtype=torch.float64)
    made = gauss_newton.update(torch.zeros_like(best), -H @ best, H, gauss_newton.start(5), NEWTON)
    assert torch.allclose(made.theta, best, atol=1e-10) and not made.limited.any()
    assert made.gain == pytest.approx(float(-0.5 * best @ H @ best), rel=1e-12)


def test_an_estimate_that_is_not_negative_definite_still_gives_an_ascent():
    saddle = torch.tensor([[3.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    fixed = gauss_newton.negative_definite(saddle, 1e-3, 2.0)
    assert sorted(torch.linalg.eigvalsh(fixed).tolist()) == pytest.approx(
        sorted(-min(max(abs(v), 1e-3), 2.0) for v in torch.linalg.eigvalsh(saddle).tolist()))
    g = vector(0.3, -0.7)
    assert gauss_newton.update(vector(0.0, 0.0), g, saddle, gauss_newton.start(2), NEWTON).theta @ g > 0.0


@pytest.mark.parametrize('seed', range(20))
def test_within_limits_the_step_satisfies_the_conditions_of_the_maximum_in_the_box(seed):
    random, p = torch.Generator().manual_seed(seed), 6
    H = random_negative(p, random) * 10.0 ** torch.randn(p, generator=random, dtype=torch.float64)
    H = 0.5 * (H + H.T) - 20.0 * torch.eye(p, dtype=torch.float64)
    H = gauss_newton.negative_definite(H, 1e-4, 1e6)
    g = 10.0 * torch.randn(p, generator=random, dtype=torch.float64)
    low, high = (sign * torch.rand(p, generator=random, dtype=torch.float64) for sign in (-1.0, 1.0))
    low[0] = 0.0  # already at a limit
    d = gauss_newton.maximum_in_box(g, H, low, high)
    slope = g + H @ d
    inside = (d > low) & (d < high)
    assert ((low <= d) & (d <= high)).all() and slope[inside].abs().max() < 1e-8 if inside.any() else True
    assert (slope[d <= low] <= 1e-9).all() and (slope[d >= high] >= -1e-9).all()


def test_a_parameter_that_its_limit_stops_leaves_the_best_step_to_the_other():
    H, best = -torch.tensor([[2.0, 1.5], [1.5, 2.0]], dtype=torch.float64), vector(1.0, 1.0)
    limits = Limits.of([-1.0, -5.0], [5.0, 5.0], [0.2, 10.0])
    made = gauss_newton.update(vector(0.0, 0.0), -H @ best, H, gauss_newton.start(2), NEWTON, limits)
    assert made.limited.tolist() == [True, False]
    assert torch.allclose(made.theta, vector(0.2, 1.6))  # not (0.2, 1): the rest makes up for the first


def test_parameters_never_leave_their_limits_and_never_move_further_than_their_step():
    random, limits = torch.Generator().manual_seed(3), Limits.of([-0.3, 0.1], [0.2, 0.4], [0.05, 0.07])
    theta, state = vector(0.2, 0.1), gauss_newton.start(2)
    for _ in range(50):
        g = 100.0 * torch.randn(2, generator=random, dtype=torch.float64)
        made = gauss_newton.update(theta, g, random_negative(2, random), state, replace(PAPER, rate=1.0), limits)
        assert ((limits.low <= made.theta) & (made.theta <= limits.high)).all()
        assert ((made.theta - theta).abs() <= limits.step + 1e-15).all()
        theta, state = made.theta, made.state


def test_without_a_given_first_curvature_its_model_alone_moves_every_parameter_by_its_step():
    limits, g = Limits.of([-9.0, -9.0], [9.0, 9.0], [0.1, 4.0]), vector(5.0, -0.02)
    settings = Settings(rate=1.0, curvature_0=None)
    same = -torch.diag(g.abs() / limits.step)  # an estimate that says what the first curvature says
    made = gauss_newton.update(vector(0.0, 0.0), g, same, gauss_newton.start(2), settings, limits)
    assert torch.allclose(made.theta, vector(0.1, -4.0)) and torch.allclose(made.hessian, same)
    with pytest.raises(ValueError, match='finite step for every parameter'):
        gauss_newton.update(vector(0.0, 0.0), g, same, gauss_newton.start(2), settings)


def test_it_goes_on_from_a_saved_state_as_if_never_stopped():
    random = torch.Generator().manual_seed(5)
    given = [(torch.randn(2, generator=random, dtype=torch.float64), random_negative(2, random)) for _ in range(6)]

    def run(theta, state, pairs):
        for g, B in pairs:
            made = gauss_newton.update(theta, g, B, state, PAPER)
            theta, state = made.theta, made.state
        return theta, state
    whole, _ = run(vector(0.0, 0.0), gauss_newton.start(2), given)
    theta, state = run(vector(0.0, 0.0), gauss_newton.start(2), given[:3])
    saved = gauss_newton.State(state.count, vector(*state.momentum.tolist()), torch.tensor(state.hessian.tolist(),
                                                                                            dtype=torch.float64))
    assert torch.equal(run(theta, saved, given[3:])[0], whole)


@pytest.mark.parametrize('words, change', [
    ('rate = 0', {'rate': 0.0}), ('momentum = 1.0', {'momentum': 1.0}), ('memory = -0.1', {'memory': -0.1}),
    ('curvature_0 = nan', {'curvature_0': float('nan')}), ('curvature_max = 0.0001', {'curvature_max': 1e-4})])
def test_a_setting_that_cannot_be_used_is_named(words, change):
    with pytest.raises(ValueError, match=words):
        Settings(**change)


def test_a_number_that_is_not_finite_a_wrong_shape_and_a_start_outside_of_the_limits_are_named():
    g, B, state = vector(1.0, 2.0), -torch.eye(2, dtype=torch.float64), gauss_newton.start(2)
    for theta, gradient, hessian, limits, words in (
            (vector(0.0, 0.0), vector(1.0, float('nan')), B, None, 'gradient = .*nan'),
            (vector(0.0, 0.0), vector(1.0), B, None, r'gradient is torch.float64 of shape \(1,\)'),
            (vector(0.0, 0.0), g, B[:1], None, 'hessian is'), (vector(0.0, 0.0).float(), g, B, None, 'theta is'),
            (vector(2.0, 0.0), g, B, Limits.of([-1, -1], [1, 1], [1, 1]), 'outside of')):
        with pytest.raises(ValueError, match=words):
            gauss_newton.update(theta, gradient, hessian, state, PAPER, limits)
    with pytest.raises(ValueError, match='low < high and step > 0'):
        Limits.of([0.0], [1.0], [0.0])
