"""Rocket and projected inputs: nearest allowed thrusts, order and invariants of the midpoint rule, a landing."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.optimization_based.layer import OptimizationBasedDynamics
from deqmpc.dynamics.optimization_based.projection import Box, ConeProjection, ProjectedInputs, ThrustCone
from deqmpc.dynamics.optimization_based.rocket import Rocket
from deqmpc.problem import Problem
from deqmpc.solvers import ilqr
from deqmpc.solvers.cone_program import ConeSolver, Program, Settings

EXACT = Settings(tolerance=1e-11)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest_in_cone(u, slope, highest):
    """By Dykstra's alternating projections onto the cone and the half-space below `highest`, u (3,)."""
    def onto_cone(p):
        side, axis = np.linalg.norm(p[:2]), p[2]
        if side <= slope * axis:
            return p
        along = (slope * side + axis) / (1.0 + slope ** 2)
        return np.zeros(3) if along <= 0 else np.array([*(p[:2] * slope * along / side), along])
    p, a, b = u, np.zeros(3), np.zeros(3)
    for _ in range(300):
        q = onto_cone(p + a)
        a, r = p + a - q, q + b
        p = np.array([r[0], r[1], min(r[2], highest)])
        b = r - p
    return p


@pytest.mark.parametrize('slope', [1.0, 0.4])
def test_the_projected_thrust_is_the_nearest_one_in_the_cone_and_strictly_inside(slope):
    u = random(60, 3) * 8.0 + torch.tensor([0.0, 0.0, 6.0], dtype=torch.float64)
    made = ConeProjection(ThrustCone(slope=slope))(u)
    exact = torch.from_numpy(np.stack([nearest_in_cone(v, slope, 12.5) for v in u.numpy()]))
    error = (made - exact).norm(dim=1)
    assert error.max() <= 2.0 * math.sqrt(1e-4)  # half its square is at most the duality gap, mu a cone
    assert error.quantile(0.9) < 1e-3 and error.median() < 1e-4
    assert (made[:, :2].norm(dim=1) < slope * made[:, 2]).all() and (made[:, 2] < 12.5).all()


@dataclass(frozen=True)
class Interval(Program):
    """min 1/2 (z_0 - theta)^2 with 1 - z_0 = z_1 >= 0 and z_0 + 1 = z_2 >= 0."""

    variables = 3
    parameters = 1
    nonnegative = (1, 2)

    def objective(self, z, theta):
        return (z[0] - theta[0]) ** 2 / 2

    def constraints(self, z, theta):
        return [z[0] + z[1] - 1, z[0] - z[2] + 1]


@pytest.mark.parametrize('mu', [1e-1, 1e-3])
def test_the_closed_form_of_a_box_is_the_central_path_of_its_program(mu):
    u = torch.tensor([-40.0, -3.0, -1.02, -0.4, 0.0, 0.7, 1.0, 1.9, 2.1, 6.0, 300.0], dtype=torch.float64)
    path = ConeSolver(Interval(), EXACT).solve(u.unsqueeze(1), (mu,))
    assert path.converged.all()
    assert (Box(-1.0, 1.0, mu)(u) - path.at(mu)[:, 0]).abs().max() < 1e-10


def test_a_projected_input_is_the_clipped_one_as_mu_falls():
    low, high = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, -1.0, 2.0, 0.0], [2.0, 1.0, 2.5, 7.0]))
    u = torch.linspace(-30.0, 50.0, 40, dtype=torch.float64).view(10, 4)
    for mu in (1e-2, 1e-4, 1e-6):
        made = Box(low, high, mu)(u)
        assert ((made - torch.clamp(u, low, high)).abs() <= 0.5 * (high - low) * math.sqrt(2.0 * mu)).all()
        assert (made > low).all() and (made < high).all()
    assert Box(0.0, 1.0)(torch.full((4,), math.nan, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize('projection, u', [
    (ConeProjection(ThrustCone(), 1e-3, settings=EXACT), [3.0, 1.0, 2.0]),
    (ConeProjection(ThrustCone(0.5, 4.0), 1e-3, settings=EXACT), [1.0, -1.0, 9.0]),
    (Box(0.1, 1.7, 1e-3), [0.0, 1.8, 0.9]), (Box(0.1, 1.7, 1e-3), [-5.0, 30.0, 1.7])])
def test_the_derivative_of_a_projection_is_that_of_its_central_path(projection, u):
    u = torch.tensor(u, dtype=torch.float64)
    _, by_u = projection.linearize(u)
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    differences = ((projection(u + step) - projection(u - step)) / 2e-5).T
    assert (by_u - differences).abs().max() < 1e-5 * by_u.abs().max()
    asked = u.clone().requires_grad_()
    weight = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    (projection(asked) * weight).sum().backward()
    assert torch.allclose(asked.grad, weight @ by_u)


def test_beyond_a_limit_the_derivative_grows_with_mu_grad():
    u = torch.tensor([2.5], dtype=torch.float64)
    slopes = [Box(0.0, 2.0, 1e-4, g).linearize(u)[1].item() for g in (1e-4, 1e-3, 1e-2)]
    assert 0.0 < slopes[0] < slopes[1] < slopes[2] < 1.0


def flight(h, steps, x, u):
    """The state after `steps` of the midpoint rule."""
    dynamics = OptimizationBasedDynamics(Rocket(h=h), settings=Settings(tolerance=1e-12))
    for _ in range(steps):
        x = dynamics.step(x, u)
    return x


def test_the_midpoint_rule_is_of_second_order():
    x = torch.tensor([0.0, 0.0, 5.0, 0.1, -0.2, 0.05, 1.0, 0.0, -1.0, 0.5, -0.3, 0.4], dtype=torch.float64)
    u = torch.tensor([0.02, -0.03, 9.0], dtype=torch.float64)
    exact = x.tolist()
    for _ in range(800):  # Runge-Kutta, 0.5 ms
        exact = runge_kutta(Rocket(), exact, u.tolist(), 0.4 / 800)
    errors = [(flight(h, round(0.4 / h), x, u) - torch.tensor(exact, dtype=torch.float64)).abs().max().item()
              for h in (0.04, 0.02, 0.01)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.8 < coarse / fine < 4.2


def runge_kutta(equations, x, u, h):
    def moved(k, step):
        return [a + step * b for a, b in zip(x, k, strict=True)]
    k1 = equations.derivative(x, u)
    k2 = equations.derivative(moved(k1, h / 2), u)
    k3 = equations.derivative(moved(k2, h / 2), u)
    k4 = equations.derivative(moved(k3, h), u)
    return [a + h / 6 * (p + 2 * q + 2 * r + s) for a, p, q, r, s in zip(x, k1, k2, k3, k4, strict=True)]


def test_a_free_rotation_keeps_its_energy_and_momentum():
    x = torch.zeros(12, dtype=torch.float64)
    x[9:] = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    dynamics = OptimizationBasedDynamics(Rocket(inertia=(0.08, 0.05, 0.02)), settings=Settings(tolerance=1e-12))
    J = torch.tensor([0.08, 0.05, 0.02], dtype=torch.float64)
    y = x
    for _ in range(40):
        y = dynamics.step(y, torch.zeros(3, dtype=torch.float64))
    for power in (1, 2):
        before, after = ((J ** power * w.square()).sum() for w in (x[9:], y[9:]))
        assert abs(float(after / before) - 1.0) < 1e-9
    assert (y[9:] - x[9:]).abs().max() > 0.5


def test_the_thrust_of_its_weight_keeps_an_upright_rocket_where_it_is():
    x = torch.zeros(2, 12, dtype=torch.float64)
    x[1, 5] = 0.3  # turned about its axis
    u = torch.tensor([0.0, 0.0, 9.81], dtype=torch.float64)
    assert (OptimizationBasedDynamics(Rocket()).step(x, u) - x).abs().max() < 1e-12


def test_the_derivatives_of_dynamics_with_projected_inputs_are_those_of_differences():
    rocket = OptimizationBasedDynamics(Rocket(), settings=EXACT)
    for dynamics, u in (
            (ProjectedInputs(rocket, 0.05, ConeProjection(settings=EXACT)), [3.0, 1.0, 2.0]),
            (ProjectedInputs(Crazyflie(), 0.05, Box(0.2, 1.8, 1e-3)),
             [1.0, 1.9, 0.1, 1.2])):
        x, u = 0.1 * random(12), torch.tensor(u, dtype=torch.float64)
        following, A, B = dynamics.linearize(x, u)
        assert torch.allclose(following, dynamics.step(x, u), atol=1e-9)
        z, F = torch.cat([x, u]), torch.cat([A, B], dim=1)
        steps = 1e-5 * torch.eye(len(z), dtype=torch.float64)
        ahead, behind = (dynamics.step((z + s * steps)[:, :12], (z + s * steps)[:, 12:]) for s in (1, -1))
        assert (F - ((ahead - behind) / 2e-5).T).abs().max() < 1e-5 * F.abs().max()


def test_a_rocket_lands_within_its_thrust_cone_where_bounds_on_the_inputs_leave_it():
    x_init = torch.zeros(1, 12, dtype=torch.float64)
    x_init[0, :3], x_init[0, 6] = torch.tensor([0.5, 0.0, 2.0]), 1.0
    goal = torch.zeros(12, dtype=torch.float64)
    goal[2] = 1.0
    projection, rocket = ConeProjection(ThrustCone(slope=0.05)), OptimizationBasedDynamics(Rocket())
    share = {}
    for name, dynamics, limits in (('cone', ProjectedInputs(rocket, 0.05, projection), {}),
                                   ('bounds', rocket, dict(u_low=[-1.0, -1.0, 0.0], u_high=[1.0, 1.0, 12.5]))):
        problem = Problem(dynamics, 0.05, 20, [0.1] * 9 + [1.0] * 3, [0.1, 0.1, 0.01], [5.0] * 12, **limits)
        hover = torch.tensor([0.0, 0.0, 9.81], dtype=torch.float64).expand(1, 20, -1)
        data = problem.instances(x_init, goal.expand(1, 21, -1), hover)
        s = ilqr.solve(problem, data, settings=ilqr.Settings(change=1e-2, feasibility=1e-2, max_steps=40))
        assert s.converged.all() and s.x[0, -1, 2] < 1.6
        u = projection(s.u) if name == 'cone' else s.u
        share[name] = (u[..., :2].norm(dim=2) > 0.05 * u[..., 2]).double().mean()
    assert share['cone'] == 0.0 and share['bounds'] > 0.0


def test_bad_limits_and_shapes_are_one_clear_error():
    with pytest.raises(ValueError, match='low = 2.0'):
        Box(2.0, 1.0)
    with pytest.raises(ValueError, match='expected .*3'):
        ConeProjection()(torch.zeros(4, dtype=torch.float64))
    for projection in (ConeProjection(), Box(torch.zeros(3), torch.ones(3))):
        with pytest.raises(ValueError, match='4 inputs'):
            ProjectedInputs(Crazyflie(), 0.05, projection)
