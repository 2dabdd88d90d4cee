"""The cone program against closed-form projections, finite differences and its own residual."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from deqmpc.realtime import build
from deqmpc.solvers import cone_program
from deqmpc.solvers.augmented_lagrangian import Status
from deqmpc.solvers.cone_program import Cones, ConeSolver, Settings

COMPILED = pytest.mark.skipif(not build.available(), reason='no C compiler')
WAYS = [pytest.param(True, marks=COMPILED), False]


@dataclass(frozen=True)
class ProjectionOnCone(cone_program.Program):
    """min |z - theta|^2/2 with z in the second-order cone of three dimensions."""

    variables = 3
    parameters = 3
    second_order = ((0, 1, 2),)

    def objective(self, z, theta):
        return sum((a - b) ** 2 for a, b in zip(z, theta, strict=True)) / 2


@dataclass(frozen=True)
class ProjectionOnSimplex(cone_program.Program):
    """min |z - theta|^2/2 with z >= 0 and sum z = total."""

    total: float = 1.0
    variables = 4
    parameters = 4
    nonnegative = (0, 1, 2, 3)

    def objective(self, z, theta):
        return sum((a - b) ** 2 for a, b in zip(z, theta, strict=True)) / 2

    def constraints(self, z, theta):
        return [sum(z) - self.total]


@dataclass(frozen=True)
class NoSolution:
    """a b = mu with a + b = -1, a, b > 0."""

    size = 2
    parameters = 1
    cones = Cones(nonnegative=((0, 1),))

    def equations(self, w, theta):
        return [w[0] + w[1] + 1 + theta[0]]

    def start(self, theta):
        return [1.0, 1.0]


def on_cone(theta):
    """Projection of theta (P, 3) on {|z_1:| <= z_0}, in closed form."""
    t, x = theta[:, :1], theta[:, 1:]
    length = x.norm(dim=1, keepdim=True)
    side = torch.cat([torch.ones_like(t), x / length], dim=1) * (t + length) / 2
    return torch.where(length <= t, theta, torch.where(length <= -t, torch.zeros_like(theta), side))


def on_simplex(theta, total):
    """Projection of theta (P, 4) on {z >= 0, sum z = total} by sorting (Held, Wolfe, Crowder 1974)."""
    ordered = theta.sort(dim=1, descending=True).values
    count = torch.arange(1, theta.shape[1] + 1, dtype=theta.dtype)
    level = (ordered.cumsum(dim=1) - total) / count
    last = (ordered > level).sum(dim=1, keepdim=True) - 1
    return (theta - level.gather(1, last)).clamp_min(0.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('compiled', WAYS)
def test_the_projection_on_a_second_order_cone_is_the_closed_form_and_inside(compiled):
    theta = 2.0 * random(200, 3)
    path = ConeSolver(ProjectionOnCone(), compiled=compiled).solve(theta, (1e-8, 1e-4))
    assert path.converged.all()
    for mu, error in ((1e-4, 2e-2), (1e-8, 2e-4)):  # sqrt(mu), where the cone's surface is touched weakly
        z = path.at(mu)[:, :3]
        assert (z - on_cone(theta)).abs().max() < error
        assert (z[:, 1:].norm(dim=1) < z[:, 0]).all()


@pytest.mark.parametrize('compiled', WAYS)
def test_the_projection_on_a_simplex_is_that_by_sorting(compiled):
    theta = random(200, 4)
    path = ConeSolver(ProjectionOnSimplex(total=0.7), compiled=compiled).solve(theta, (1e-9,))
    assert path.converged.all()
    assert (path.at(1e-9)[:, :4] - on_simplex(theta, 0.7)).abs().max() < 1e-4


@pytest.mark.parametrize('conditions', [ProjectionOnCone(), ProjectionOnSimplex()])
def test_every_point_of_the_path_solves_the_conditions_at_its_parameter(conditions):
    solver, theta = ConeSolver(conditions), random(50, conditions.parameters)
    path = solver.solve(theta, (1e-4,))
    assert path.mu == pytest.approx((1.0, 0.1, 0.01, 1e-3, 1e-4))
    for mu in path.mu:
        assert solver.residual(path.at(mu), theta, mu).norm(dim=1).max() < solver.settings.tolerance


@pytest.mark.parametrize('compiled', WAYS)
@pytest.mark.parametrize('conditions', [ProjectionOnCone(), ProjectionOnSimplex()])
def test_the_sensitivity_is_the_slope_of_the_path_at_its_own_parameter(conditions, compiled):
    solver = ConeSolver(conditions, Settings(tolerance=1e-11), compiled)  # differences need exact ends
    theta, step = random(20, 1, conditions.parameters), 1e-5
    change = step * torch.eye(conditions.parameters, dtype=torch.float64)
    for mu in (1e-2, 1e-4):
        s = solver.sensitivity(solver.solve(theta, (mu,)).at(mu), theta)[:, 0]
        ends = solver.solve(torch.stack([theta + change, theta - change]), (mu,)).at(mu)
        slope = ((ends[0] - ends[1]) / (2.0 * step)).transpose(1, 2)
        assert ((slope - s).flatten(1).norm(dim=1) < 1e-5 * s.flatten(1).norm(dim=1)).all()


@COMPILED
def test_compiled_code_and_torch_take_the_same_steps():
    theta = random(100, 3)
    theta[7] = math.nan
    native, plain = (ConeSolver(ProjectionOnCone(), compiled=c).solve(theta, (1e-4, 1e-3)) for c in (True, False))
    assert torch.equal(native.status, plain.status) and torch.equal(native.steps, plain.steps)
    assert torch.allclose(native.w, plain.w, atol=1e-12, rtol=0.0, equal_nan=True)


@pytest.mark.parametrize('compiled', WAYS)
def test_a_sample_that_is_not_finite_leaves_the_others_as_they_are_alone(compiled):
    solver, theta = ConeSolver(ProjectionOnCone(), compiled=compiled), random(5, 3)
    theta[2, 1] = math.inf
    path = solver.solve(theta, (1e-4,))
    assert cone_program.STATUS[path.status[2]] is Status.NOT_FINITE and path.w[2].isnan().all()
    for k in (0, 1, 3, 4):
        alone = solver.solve(theta[k], (1e-4,))
        assert torch.equal(alone.w, path.w[k]) and alone.converged and alone.steps == path.steps[k]


@pytest.mark.parametrize('compiled', WAYS)
def test_conditions_without_a_solution_end_with_a_status_and_nan(compiled):
    path = ConeSolver(NoSolution(), compiled=compiled).solve(torch.zeros(2, 1, dtype=torch.float64), (1e-4,))
    assert [cone_program.STATUS[s] for s in path.status] == [Status.SINGULAR] * 2
    assert path.w.isnan().all() and (path.residual > 1.0).all()


@pytest.mark.parametrize('compiled', WAYS)
def test_no_more_steps_are_taken_than_allowed(compiled):
    solver = ConeSolver(ProjectionOnCone(), Settings(max_steps=7), compiled)
    path = solver.solve(random(4, 3), (1e-4,))
    assert (path.steps == 7).all()
    assert {cone_program.STATUS[s] for s in path.status} == {Status.ITERATION_LIMIT}
    assert path.w[:, 0].isfinite().all() and path.w[:, -1].isnan().all()


@pytest.mark.parametrize('compiled', WAYS)
def test_a_start_on_the_path_leads_to_the_same_point_in_fewer_steps(compiled):
    solver, theta = ConeSolver(ProjectionOnCone(), Settings(tolerance=1e-12), compiled), random(20, 3)
    cold = solver.solve(theta, (1e-4,))
    close = ConeSolver(ProjectionOnCone(), Settings(mu_0=1e-4, tolerance=1e-12), compiled)
    warm = close.solve(theta + 1e-5, (1e-4,), start=cold.at(1e-4))
    assert warm.converged.all() and warm.steps.max() <= 3 < cold.steps.min()
    assert (warm.at(1e-4) - solver.solve(theta + 1e-5, (1e-4,)).at(1e-4)).abs().max() < 1e-10


@COMPILED
def test_one_sample_after_another_gives_what_a_batch_gives():
    conditions, theta = ProjectionOnCone(), random(30, 3)
    expected = ConeSolver(conditions).solve(theta, (1e-4,)).at(1e-4)
    single = ConeSolver(conditions).single(1e-4)
    for k in range(len(theta)):
        assert single.solve(theta[k].tolist()) == pytest.approx(expected[k].tolist(), abs=1e-6)
    assert single.solve([math.nan, 0.0, 0.0]) is None
    assert single.solve(theta[0].tolist()) == pytest.approx(expected[0].tolist(), abs=1e-6)


@pytest.mark.parametrize('shape', [(), (2,), (2, 0, 3)])
def test_leading_dimensions_pass_through(shape):
    path = ConeSolver(ProjectionOnCone()).solve(random(*shape, 3), (1e-3, 1e-4))
    assert path.w.shape == (*shape, 5, 6) and path.status.shape == shape


def test_the_path_holds_every_parameter_asked_for_once_and_falls():
    settings = Settings()
    assert settings.path(1e-4, 1e-3) == pytest.approx([1.0, 0.1, 0.01, 1e-3, 1e-4])
    assert settings.path(1e-4, 3e-3) == pytest.approx([1.0, 0.1, 0.01, 3e-3, 1e-3, 1e-4])
    assert settings.path(1.0) == [1.0]
    assert 1e-6 in settings.path(1e-6) and 1e-4 in settings.path(1e-6, 1e-4)
    path = ConeSolver(ProjectionOnCone()).solve(random(3), (1e-4,))
    assert torch.equal(path.at(1e-2), path.w[2])
    with pytest.raises(ValueError, match='mu = 0.002; expected one of the path'):
        path.at(2e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'mu = 2.0; expected a number > 0, at most mu_0 = 1.0'):
        Settings().path(2.0)
    with pytest.raises(ValueError, match=r'gamma = 1.0'):
        Settings(gamma=1.0)
    with pytest.raises(ValueError, match=r'max_steps = 0'):
        Settings(max_steps=0)
    with pytest.raises(ValueError, match=r'theta has shape \(4, 2\), expected \(\.\.\., 3\)'):
        ConeSolver(ProjectionOnCone()).solve(random(4, 2), (1e-4,))
    with pytest.raises(ValueError, match='second-order cones'):
        Cones(second_order=(((0,), (1,)),))

    @dataclasses.dataclass(frozen=True)
    class Short(NoSolution):
        size = 3
    with pytest.raises(ValueError, match='1 equations and 1 of cones; expected 3 in all'):
        ConeSolver(Short())
