"""Anderson acceleration: convergence, and samples that do not know of each other."""

import pytest
import torch

from deqmpc.solvers import anderson


def linear(size=40, radius=0.9, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, dtype=torch.float64, generator=g)
    A = A + A.T
    A = radius * A / torch.linalg.eigvalsh(A).abs().max()
    b = torch.randn(6, size, dtype=torch.float64, generator=g)
    return A, b, torch.linalg.solve(torch.eye(size, dtype=torch.float64) - A, b.T).T


def test_it_finds_the_fixed_point_faster_than_plain_iteration():
    A, b, exact = linear()
    tight = anderson.Settings(tolerance=1e-8, evaluations=400, regularization=1e-12)
    found = anderson.solve(lambda z, s: z @ A + b[s], torch.zeros_like(b), tight)
    plain = anderson.solve(lambda z, s: z @ A + b[s], torch.zeros_like(b),
                           anderson.Settings(tolerance=1e-8, evaluations=400, memory=1, damping=1.0))
    assert found.converged.all()
    assert (found.z - exact).abs().max() < 1e-6
    assert (found.evaluations < plain.evaluations).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_batch_equals_its_samples_alone(dtype):
    A, b, _ = linear()
    A, b = A.to(dtype), b.to(dtype) * torch.logspace(-3, 3, 6, dtype=dtype).unsqueeze(1)
    settings = anderson.Settings(tolerance=1e-3, evaluations=50)
    together = anderson.solve(lambda z, s: torch.tanh(z @ A) + b[s], torch.zeros_like(b), settings)
    assert len(set(together.evaluations.tolist())) > 1  # else nobody left early
    for i in range(len(b)):
        alone = anderson.solve(lambda z, s, i=i: torch.tanh(z @ A) + b[i:i + 1], torch.zeros_like(b[:1]), settings)
        assert int(alone.evaluations) == int(together.evaluations[i])
        assert torch.allclose(alone.z[0], together.z[i], rtol=1e-4 if dtype == torch.float32 else 1e-10)


def test_a_sample_that_is_not_finite_is_flagged_and_disturbs_nobody():
    A, b, _ = linear()
    bad = b.clone()
    bad[2, 5], bad[4, 0] = float('nan'), float('inf')
    settings = anderson.Settings(tolerance=1e-6, evaluations=200)
    clean = anderson.solve(lambda z, s: z @ A + b[s], torch.zeros_like(b), settings)
    mixed = anderson.solve(lambda z, s: z @ A + bad[s], torch.zeros_like(b), settings)
    good = torch.tensor([0, 1, 3, 5])
    assert mixed.finite.tolist() == [True, True, False, True, False, True]
    assert torch.allclose(mixed.z[good], clean.z[good], rtol=0.0, atol=1e-10)  # products of other shapes round apart
    assert torch.isfinite(mixed.z).all() and mixed.evaluations[2] == 1 and not mixed.converged[2]


def test_the_residual_is_that_of_the_iterate_before_z():
    A, b, _ = linear()
    found = anderson.solve(lambda z, s: z @ A + b[s], torch.zeros_like(b), anderson.Settings(evaluations=7))
    again = found.z @ A + b
    assert ((again - found.z).norm(dim=1) / again.norm(dim=1) <= found.residual + 1e-12).all()


def test_a_start_at_the_fixed_point_takes_one_evaluation():
    A, b, exact = linear()
    found = anderson.solve(lambda z, s: z @ A + b[s], exact, anderson.Settings())
    assert found.evaluations.tolist() == [1] * 6


def test_the_argument_is_left_alone():
    A, b, _ = linear()
    z = torch.zeros_like(b)
    anderson.solve(lambda z, s: z @ A + b[s], z, anderson.Settings())
    assert not z.any()


@pytest.mark.parametrize('wrong', [dict(memory=0), dict(damping=0.0), dict(tolerance=2.0), dict(evaluations=1.5)])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        anderson.Settings(**wrong)
