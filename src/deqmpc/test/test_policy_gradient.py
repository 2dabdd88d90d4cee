"""The gradient of sampled returns, the action-values and their Hessians, against autograd and a closed form."""

from dataclasses import replace

import pytest
import torch

from deqmpc.reproduce import command
from deqmpc.training.policy_gradient import Episodes, Functions, action_values, policy_gradient

torch.set_num_threads(1)
GAMMA = 0.9
PLANT = Functions(
    lambda x, u: torch.stack([x[0] + 0.2 * x[1] + 0.05 * u[1] ** 2,
                              x[1] + 0.2 * (torch.sin(x[0]) + u[0] - 0.3 * x[1] * u[1])]),
    lambda x, u: -(x ** 2).sum() - 0.1 * (x[0] * u[0]) ** 2 - 0.5 * (u ** 2).sum())


def policy(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Not linear in x nor in theta (3,)."""
    return torch.stack([theta[0] * torch.tanh(x[0]) + theta[1] * x[1], theta[2] ** 2 * x[0] * x[1]])


def linear(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([theta[0] * x[0] + theta[1] ** 2 * x[1], theta[2] * x[1]])


def episodes(pi, theta: torch.Tensor, starts: torch.Tensor, lengths: list[int]) -> Episodes:
    """Of PLANT under pi, each of its own length, NaN after its end."""
    N, rows = max(lengths), []
    by_x, by_theta, twice = (torch.func.jacrev(pi, 1), torch.func.jacrev(pi, 0),
                             torch.func.jacrev(torch.func.jacrev(pi, 0), 0))
    for x, length in zip(starts, lengths, strict=True):
        steps = []
        for k in range(N):
            u = pi(theta, x)
            step = [x, u, PLANT.reward(x, u), by_x(theta, x), by_theta(theta, x), twice(theta, x)]
            steps.append([v if k < length else torch.full_like(v, float('nan')) for v in step])
            x = PLANT.step(x, u)
        rows.append([torch.stack(v) for v in zip(*steps, strict=True)])
    x, u, r, p_x, p_theta, p_two = (torch.stack(v) for v in zip(*rows, strict=True))
    alive = torch.arange(N) < torch.tensor(lengths).unsqueeze(1)
    return Episodes(x, u, r, alive, p_x, p_theta, p_two)


def value(pi, theta: torch.Tensor, x: torch.Tensor, length: int, first: torch.Tensor | None = None) -> torch.Tensor:
    """Return of `length` steps from x, the first of them with another input."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(length):
        u = first if k == 0 and first is not None else pi(theta, x)
        total = total + GAMMA ** k * PLANT.reward(x, u)
        x = PLANT.step(x, u)
    return total


THETA = torch.tensor([-0.6, -0.4, 0.5], dtype=torch.float64)
STARTS = torch.tensor([[0.5, -0.2], [-0.3, 0.6], [0.2, 0.1]], dtype=torch.float64)
LENGTHS = [6, 4, 1]


def test_the_gradient_is_the_exact_gradient_of_the_sampled_return():
    found = policy_gradient(episodes(policy, THETA, STARTS, LENGTHS), PLANT, GAMMA)
    exact = torch.autograd.functional.jacobian(
        lambda t: torch.stack([value(policy, t, x, n) for x, n in zip(STARTS, LENGTHS, strict=True)]), THETA)
    assert torch.allclose(found.gradients, exact, atol=1e-12) and torch.allclose(found.gradient, exact.mean(0))
    assert found.value == pytest.approx(float(torch.stack(
        [value(policy, THETA, x, n) for x, n in zip(STARTS, LENGTHS, strict=True)]).mean()), abs=1e-12)
    assert found.finite.all()


def test_action_values_have_the_derivatives_of_the_return_with_respect_to_the_first_input():
    """Of a policy that is linear in the state: then nothing is left out."""
    made = episodes(linear, THETA, STARTS, LENGTHS)
    Q_u, Q_uu = action_values(made, PLANT, GAMMA)
    for b, k in ((0, 0), (0, 3), (1, 1), (2, 0)):
        left = LENGTHS[b] - k

        def q(u, b=b, k=k, left=left):
            return value(linear, THETA, made.x[b, k], left, u)
        assert torch.allclose(Q_u[b, k], torch.autograd.functional.jacobian(q, made.u[b, k]), atol=1e-12)
        assert torch.allclose(Q_uu[b, k], torch.autograd.functional.hessian(q, made.u[b, k]), atol=1e-11)
    assert not Q_u[~made.alive].any() and not Q_uu[~made.alive].any()


def test_of_one_step_both_matrices_together_are_the_exact_hessian():
    found = policy_gradient(episodes(policy, THETA, STARTS, [1, 1, 1]), PLANT, GAMMA)
    exact = torch.autograd.functional.hessian(
        lambda t: torch.stack([value(policy, t, x, 1) for x in STARTS]).mean(), THETA)
    assert torch.allclose(found.newton, exact, atol=1e-12) and not torch.allclose(found.gauss_newton, exact, atol=1e-3)


def test_an_episode_that_is_not_finite_is_left_out_and_none_at_all_is_an_error():
    good = episodes(policy, THETA, STARTS, [5, 5, 5])
    broken = replace(good, x=good.x.clone())
    broken.x[1, 2] = float('nan')
    found = policy_gradient(broken, PLANT, GAMMA)
    part = Episodes(*(v[[0, 2]] for v in vars(good).values()))
    alone = policy_gradient(part, PLANT, GAMMA)
    assert found.finite.tolist() == [True, False, True]
    assert torch.allclose(found.gradient, alone.gradient) and torch.allclose(found.gauss_newton, alone.gauss_newton)
    with pytest.raises(ValueError, match='none of 1 episodes'):
        policy_gradient(Episodes(*(v[[1]] for v in vars(broken).values())), PLANT, GAMMA)


def test_sampled_episodes_of_the_scalar_example_give_its_closed_form():
    """s+ = s + a + w under a = -theta^2 s; 4000 episodes of 100 steps, within five standard errors."""
    example = command.load(command.experiments()['gauss_newton_rl']).Scalar()
    theta, g = torch.tensor([0.6], dtype=torch.float64), torch.Generator().manual_seed(0)
    s, steps = 0.1 ** 0.5 * torch.randn(4000, 1, generator=g, dtype=torch.float64), []
    for _ in range(100):
        a = -theta ** 2 * s
        steps.append((s, a, -0.5 * (s ** 2 + a ** 2)[:, 0]))
        s = s + a + 0.1 ** 0.5 * torch.randn(4000, 1, generator=g, dtype=torch.float64)
    x, u, r = (torch.stack(v, dim=1) for v in zip(*steps, strict=True))
    made = Episodes(x, u, r, torch.ones_like(r, dtype=torch.bool), (-theta ** 2).expand(4000, 100, 1, 1),
                    (-2.0 * theta * x).unsqueeze(3), (-2.0 * x)[..., None, None])
    found = policy_gradient(made, Functions(lambda x, u: x + u, lambda x, u: -0.5 * (x @ x + u @ u)), 0.9)
    error = 5.0 * float(found.gradients.std()) / 4000 ** 0.5
    assert float(found.gradient) == pytest.approx(float(example.gradient(theta)), abs=error)
    assert float(found.gauss_newton) == pytest.approx(float(example.gauss_newton(theta)), rel=0.05)
    assert float(found.newton) == pytest.approx(float(example.newton(theta)), rel=0.1)
    assert found.value == pytest.approx(float(example.value(theta)), rel=0.03)
