"""The experiment's problems in closed form, against published figures and autograd; a learned action-value; a run."""

import math

import pytest
import torch

from deqmpc import reproduce
from deqmpc.reproduce import command
from deqmpc.training import action_value
from deqmpc.training.policy_gradient import Episodes

torch.set_num_threads(1)
EXPERIMENT = command.load(command.experiments()['gauss_newton_rl'])
SCALAR, LINEAR = EXPERIMENT.Scalar(), EXPERIMENT.Linear()
TABLE = {0.4: (-23.97, 4.58, -6.19), 0.5: (-14.40, -1.08, -5.95), 0.6: (-9.410, -3.829, -5.953),
         0.7: (-7.180, -5.627, -6.288), 0.8: (-6.816, -7.339, -7.060), 0.9: (-8.352, -9.577, -8.508)}


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_scalar_optimum_is_the_regulators_gain_with_its_return_and_curvature():
    best = math.sqrt((math.sqrt(4.0 * 0.9 ** 2 + 1.0) - 1.0) / 1.8)
    theta = vector(best)
    assert best == pytest.approx(SCALAR.best[0], abs=1e-10) and best ** 2 == pytest.approx(0.5884033490, abs=1e-9)
    assert float(SCALAR.value(theta)) == pytest.approx(-0.7942016745, abs=1e-9)
    assert float(SCALAR.gradient(theta)) == pytest.approx(0.0, abs=1e-9)
    for of in (SCALAR.newton, SCALAR.gauss_newton, EXPERIMENT.curvature_of(SCALAR, 'exact')):
        assert float(of(theta)) == pytest.approx(-6.746966194, abs=1e-8)


@pytest.mark.parametrize('theta', TABLE)
def test_the_scalar_hessians_are_the_papers_and_gauss_newtons_alone_is_negative_throughout(theta):
    found = [float(EXPERIMENT.curvature_of(SCALAR, v)(vector(theta))) for v in ('exact', 'newton', 'gauss_newton')]
    assert found == pytest.approx(TABLE[theta], rel=1e-3, abs=0.006) and found[2] < 0.0
    exact = torch.autograd.functional.jacobian(SCALAR.value, vector(theta))
    assert torch.allclose(SCALAR.gradient(vector(theta)), exact, atol=1e-12)


@pytest.mark.parametrize('variant', EXPERIMENT.SCALAR_ERRORS)
def test_scalar_errors_fall_as_published(variant):
    expected = EXPERIMENT.SCALAR_ERRORS[variant]
    made = EXPERIMENT.closed_form(SCALAR, variant, 20)
    assert [abs(float(t) - SCALAR.best[0]) for t in made[:len(expected)]] == pytest.approx(expected, rel=0.05)
    if variant == 'gauss_newton':
        assert abs(float(made[5]) - SCALAR.best[0]) < 1e-11


def test_the_linear_examples_gradient_is_autograds_and_at_the_optimum_all_hessians_are_one():
    assert float(LINEAR.value(vector(0.0, 0.0))) == pytest.approx(-13.498925, abs=1e-6)
    assert float(LINEAR.value(vector(0.3, 60.0))) == pytest.approx(-13.481924, abs=1e-6)
    theta = vector(0.1, 10.0)
    exact = torch.autograd.functional.jacobian(LINEAR.value, theta)
    assert torch.allclose(LINEAR.gradient(theta), exact, rtol=1e-10, atol=0.0)
    best = vector(0.3, 60.0)
    H = LINEAR.gauss_newton(best)
    assert (LINEAR.newton(best) - H).norm() < 1e-9 * H.norm() and LINEAR.gradient(best).abs().max() < 1e-12
    assert (EXPERIMENT.curvature_of(LINEAR, 'exact')(best) - H).norm() < 1e-9 * H.norm()
    assert torch.allclose(torch.linalg.eigvalsh(H), vector(-0.661, -2.4e-6), rtol=0.02)


def test_on_the_badly_scaled_linear_example_gauss_newton_needs_four_updates_and_adam_more_than_a_hundred():
    best = float(LINEAR.value(vector(0.3, 60.0)))
    loss = [best - float(LINEAR.value(t)) for t in EXPERIMENT.closed_form(LINEAR, 'gauss_newton', 4)]
    assert loss[4] <= 1e-6 and loss[1:4] == pytest.approx([7.8e-3, 1.6e-4, 5.5e-8], rel=0.05)
    assert best - float(LINEAR.value(EXPERIMENT.closed_form(LINEAR, 'adam 0.01', 100)[-1])) > 1e-3


def test_a_learned_action_value_has_the_slope_and_the_curvature_of_the_true_one():
    """One-step episodes with r = -(u_0 - x)^2 - 2 u_1^2 under u = (0.5 x, 0.2): Q_u = (x, -0.8), Q_uu = -(2, 4)."""
    g = torch.Generator().manual_seed(0)
    x = 2.0 * torch.rand(400, 1, 1, generator=g, dtype=torch.float64) - 1.0
    u = torch.cat([0.5 * x, torch.full_like(x, 0.2)], dim=2)

    def reward(u):
        return -(u[..., 0] - x[..., 0]) ** 2 - 2.0 * u[..., 1] ** 2
    tried = u + 0.3 * torch.randn(u.shape, generator=g, dtype=torch.float64)
    one = torch.ones(400, 1, dtype=torch.bool)
    zero = x.new_zeros
    episodes = Episodes(x, u, reward(u), one, zero(400, 1, 2, 1), zero(400, 1, 2, 1))
    exploration = EXPERIMENT.reactor.Exploration(tried, reward(tried), x, one)
    settings = action_value.Settings(hidden=(32, 16), rate=3e-3, batch=100, epochs=150)
    Q_u, Q_uu = action_value.Critic(settings, 1, 2, seed=0).action_values(episodes, exploration)
    assert (Q_u[..., 0] - x[..., 0]).abs().mean() < 0.15 and (Q_u[..., 1] + 0.8).abs().mean() < 0.15
    assert 1.0 < -float(Q_uu[..., 0, 0].mean()) < 4.0 and 2.0 < -float(Q_uu[..., 1, 1].mean()) < 8.0
    assert not Q_uu[..., 0, 1].any()  # diagonal by construction


def test_a_smoke_run_trains_the_tank_and_a_second_one_reads_what_is_there(tmp_path, capsys):
    words = ['gauss_newton_rl', '--budget', 'smoke', '--out', str(tmp_path), '--tasks', 'scalar', 'tank', 'momentum']
    assert reproduce.main(words) == 0
    said = capsys.readouterr().out
    assert 'best of grid' in said and (tmp_path / 'gauss_newton_rl.png').exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('tank-*.csv')}
    assert len(before) == 2 and reproduce.main(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_an_unknown_task_and_a_setting_that_cannot_be_used_are_named(tmp_path, capsys):
    assert reproduce.main(['gauss_newton_rl', '--budget', 'smoke', '--out', str(tmp_path), '--tasks', 'cstr']) == 1
    assert '--tasks cstr' in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'hidden\[1\] = 0'):
        action_value.Settings(hidden=(4, 0))
    with pytest.raises(ValueError, match='rate = nan'):
        action_value.Settings(rate=float('nan'))
