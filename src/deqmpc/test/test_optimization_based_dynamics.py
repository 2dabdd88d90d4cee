"""Contact, stops and friction against closed forms, invariants, a Runge-Kutta reference and finite differences."""

import math

import pytest
import sympy
import torch

from deqmpc.dynamics.integrators import rk4
from deqmpc.dynamics.optimization_based.acrobot import Acrobot
from deqmpc.dynamics.optimization_based.cartpole import CartPole
from deqmpc.dynamics.optimization_based.ground_contact import GroundContact
from deqmpc.dynamics.optimization_based.hopper import Hopper
from deqmpc.dynamics.optimization_based.layer import OptimizationBasedDynamics
from deqmpc.dynamics.optimization_based.planar_push import PlanarPush
from deqmpc.solvers.cone_program import ConeSolver, Settings

torch_double = {'dtype': torch.float64}
FREE_ACROBOT = dict(stop=None, b=0.0)


def tensor(*values):
    return torch.tensor(values, **torch_double)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **torch_double)


def rolled(dynamics, x, steps, u=None):
    """States (steps+1, n) from x under constant inputs."""
    u = torch.zeros(dynamics.m, **torch_double) if u is None else u
    states = [x]
    for _ in range(steps):
        states.append(dynamics.step(states[-1], u))
    return torch.stack(states)


def cart_poles(count, seed=0):
    """States of a cart-pole at any angle with velocities of order 1, and inputs."""
    q = torch.cat([random(count, 1, seed=seed), math.pi * random(count, 1, seed=seed + 1)], dim=1)
    return torch.cat([q - 0.05 * random(count, 2, seed=seed + 2), q], dim=1), 0.5 * random(count, 1, seed=seed + 3)


def hoppers(count):
    """Hoppers near and on the ground, moving, with inputs."""
    a, r = 0.2 * random(count), 0.5 + 0.05 * random(count, seed=1)
    z = r * a.cos() + 0.05 + 0.05 * random(count, seed=2).abs()
    q = torch.stack([random(count, seed=3), z, a, r], dim=1)
    return torch.cat([q - 0.05 * random(count, 4, seed=4), q], dim=1), 0.3 * random(count, 2, seed=5)


def pushers(count):
    """Pushers near the middle of a side of the block, with inputs."""
    q = torch.zeros(count, 5, **torch_double)
    q[:, :3] = 0.1 * random(count, 3)
    c, s, dx, dy = q[:, 2].cos(), q[:, 2].sin(), -0.11, 0.05 * torch.tanh(random(count, seed=1))
    q[:, 3], q[:, 4] = q[:, 0] + c * dx - s * dy, q[:, 1] + s * dx + c * dy
    return torch.cat([q, q], dim=1), random(count, 2, seed=2)


def acrobots(count):
    """Acrobots near the stop, moving, with inputs."""
    q = torch.stack([random(count), 1.4 * torch.tanh(3.0 * random(count, seed=1))], dim=1)
    return torch.cat([q - 0.05 * random(count, 2, seed=2), q], dim=1), random(count, 1, seed=3)


EVERY_SYSTEM = [(Acrobot(), acrobots), (CartPole(), cart_poles), (Hopper(), hoppers), (PlanarPush(), pushers)]
NAMES = [type(system).__name__ for system, _ in EVERY_SYSTEM]


# --- the integrator ---------------------------------------------------------------------------------

def acrobot_acceleration(q1, q2, v1, v2):
    """The textbook's M^-1 (tau_gravity - C v) of the frictionless acrobot."""
    p = Acrobot()
    s, c = math.sin(q2), math.cos(q2)
    k = p.m2 * p.l1 * p.lc2
    M11, M12, M22 = p.J1 + p.J2 + p.m2 * p.l1 ** 2 + 2 * k * c, p.J2 + k * c, p.J2
    t2 = -p.m2 * p.g * p.lc2 * math.sin(q1 + q2)
    f1 = -(p.m1 * p.lc1 + p.m2 * p.l1) * p.g * math.sin(q1) + t2 + 2 * k * s * v1 * v2 + k * s * v2 ** 2
    f2 = t2 - k * s * v1 ** 2
    return (M22 * f1 - M12 * f2) / (M11 * M22 - M12 ** 2), (M11 * f2 - M12 * f1) / (M11 * M22 - M12 ** 2)


def reference_acrobot(duration, step=1.25e-3):
    """Angles (2,) of the free acrobot, `duration` s after a start at rest at (1.5, 0.5), by RK4 (error 1e-9)."""
    def slope(q1, q2, v1, v2):
        return [v1, v2, *acrobot_acceleration(q1, q2, v1, v2)]
    y = [1.5, 0.5, 0.0, 0.0]
    for _ in range(round(duration / step)):
        y = rk4(lambda x, u: slope(*x), y, None, step)[0]
    return tensor(*y[:2])


def free_acrobot_after_1_s(h, published):
    q = reference_acrobot(h)  # at rest at t = 0, hence the same at -h
    return rolled(OptimizationBasedDynamics(Acrobot(h=h, published=published, **FREE_ACROBOT)),
                  torch.cat([tensor(1.5, 0.5), q]), round(1.0 / h) - 1)[-1, 2:]


def test_free_motion_converges_to_the_continuous_acrobot_by_second_order():
    exact = reference_acrobot(1.0)
    errors = [(free_acrobot_after_1_s(h, published=False) - exact).abs().max().item() for h in (0.05, 0.01, 0.0025)]
    assert errors[0] < 3e-2 and errors[1] < 1.2e-3 and errors[2] < 8e-5


def test_the_published_discretisation_does_not_converge():
    exact = reference_acrobot(1.0)
    errors = [(free_acrobot_after_1_s(h, published=True) - exact).abs().max().item() for h in (0.05, 0.0025)]
    assert min(errors) > 5e-2


def test_the_bias_of_the_lagrangian_is_that_of_the_textbook():
    acrobot, q, v = Acrobot(), sympy.symbols('q:2', real=True), sympy.symbols('v:2', real=True)
    numbers = dict(zip((*q, *v), (0.7, -1.1, 2.0, -3.0), strict=True))
    M = sympy.hessian(acrobot.lagrangian(q, v), v)
    acceleration = (M.LUsolve(-sympy.Matrix(acrobot.bias(q, v)))).subs(numbers)
    assert [float(a) for a in acceleration] == pytest.approx(acrobot_acceleration(0.7, -1.1, 2.0, -3.0), rel=1e-12)


def test_a_hopper_in_flight_falls_on_a_parabola_and_keeps_its_momentum():
    hopper = OptimizationBasedDynamics(Hopper(c=0.0), mu=1e-9)
    x = tensor(0.0, 5.0, 0.2, 0.5, 0.02, 5.01, 0.25, 0.51)
    states = rolled(hopper, x, 10)
    q = torch.cat([states[:1, :4], states[:, 4:]])
    centre = torch.stack([q[:, 0] + 0.1 / 1.1 * q[:, 3] * q[:, 2].sin(), q[:, 1] - 0.1 / 1.1 * q[:, 3] * q[:, 2].cos()])
    second = (centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]) / 0.05 ** 2
    assert second[0].abs().max() < 0.02 and (second[1] + 9.81).abs().max() < 0.02  # O(h^2): the midpoint rule


# --- cones ------------------------------------------------------------------------------------------

def test_random_cart_poles_are_solved_in_35_newton_steps_and_friction_opposes_the_motion():
    dynamics = OptimizationBasedDynamics(CartPole(friction=0.35))
    path = dynamics.solve(*cart_poles(500))
    assert path.converged.double().mean() >= 0.999
    assert path.steps.max() <= 35 and path.residual.max() < 1e-8
    w = path.at(1e-4)
    psi, b, v = w[:, 2:4], w[:, 4:6], w[:, 8:10]
    assert (b.abs() < psi).all()
    assert (b * v).max() < 1e-4


@pytest.mark.parametrize('system, states', EVERY_SYSTEM, ids=NAMES)
def test_the_derivative_is_that_of_the_step_at_the_same_parameter(system, states):
    exact = Settings(tolerance=1e-11)
    dynamics = OptimizationBasedDynamics(system, mu=1e-3, mu_grad=1e-3, settings=exact)
    x, u = states(20)
    value, A, B = dynamics.linearize(x, u)
    step = 1e-6 * torch.eye(dynamics.n + dynamics.m, **torch_double).unsqueeze(1)
    dx, du = step[..., :dynamics.n], step[..., dynamics.n:]
    slope = ((dynamics.step(x + dx, u + du) - dynamics.step(x - dx, u - du)) / 2e-6).permute(1, 2, 0)
    F = torch.cat([A, B], dim=-1)
    assert torch.equal(value, dynamics.step(x, u))
    assert ((slope - F).flatten(1).norm(dim=1) < 1e-5 * F.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize('mu_grad, expected', [(1e-1, 3.48e-2), (1e-2, 9.4e-3), (1e-3, 1.15e-3), (1e-4, 1.18e-4)])
def test_the_gradient_of_a_cart_that_sticks_grows_with_the_smoothing(mu_grad, expected):
    dynamics = OptimizationBasedDynamics(CartPole(friction=0.35), mu_grad=mu_grad)
    _, _, B = dynamics.linearize(torch.zeros(4, **torch_double), torch.zeros(1, **torch_double))
    assert B[2, 0].item() == pytest.approx(expected, rel=1e-2)


def test_autograd_gives_the_derivatives_of_linearize():
    dynamics = OptimizationBasedDynamics(CartPole(), mu_grad=1e-2)
    x, u = (v.requires_grad_() for v in cart_poles(3))
    weights = random(3, 4, seed=9)
    (dynamics.step(x, u) * weights).sum().backward()
    _, A, B = dynamics.linearize(x, u)
    assert torch.allclose(x.grad, torch.einsum('pi,pij->pj', weights, A))
    assert torch.allclose(u.grad, torch.einsum('pi,pij->pj', weights, B))


@pytest.mark.parametrize('system, states', EVERY_SYSTEM, ids=NAMES)
def test_a_batch_is_its_samples_one_by_one_and_one_bad_sample_is_nan_alone(system, states):
    dynamics = OptimizationBasedDynamics(system)
    x, u = states(4)
    x[1, 0] = math.nan
    following = dynamics.step(x, u)
    assert following[1].isnan().any()
    for k in (0, 2, 3):
        assert torch.equal(following[k], dynamics.step(x[k], u[k]))


# --- what bodies do ---------------------------------------------------------------------------------

@pytest.mark.parametrize('published', [False, True])
def test_the_elbow_never_passes_its_stop_and_hitting_it_makes_no_energy(published):
    acrobot = Acrobot(b=0.0, published=published)
    states = rolled(OptimizationBasedDynamics(acrobot), tensor(2.5, 1.0, 2.5, 1.02), 100)
    elbow = states[:, 3]
    assert elbow.abs().max() < math.pi / 2 and elbow.abs().max() > math.pi / 2 - 0.05
    if not published:
        energy = energy_of(acrobot, states)
        assert energy.max() < energy[0] + 0.15  # the free rule's own bounded error at h = 0.05; from -2.0 to 24.5 J


def energy_of(system, states):
    """p v - L at the midpoints of the steps, J."""
    q, v = sympy.symbols(f'q:{system.nq}', real=True), sympy.symbols(f'v:{system.nq}', real=True)
    L = system.lagrangian(q, v)
    energy = sympy.lambdify((*q, *v), sum(e * sympy.diff(L, e) for e in v) - L, modules=[torch, 'math'])
    q0, q1 = states[:, :system.nq], states[:, system.nq:]
    return energy(*((q0 + q1) / 2).unbind(1), *((q1 - q0) / system.h).unbind(1))


@pytest.mark.parametrize('friction', [0.1, 0.35])
def test_coulomb_friction_only_takes_energy_and_brings_the_cart_pole_to_rest(friction):
    system = CartPole(friction=friction)
    states = rolled(OptimizationBasedDynamics(system, mu=1e-6), tensor(0.0, 1.0, 0.03, 1.0), 120)
    energy = energy_of(system, states)
    assert energy.diff().max() < 0.02 * (energy[0] - energy.min())
    assert (states[-1, 2:] - states[-1, :2]).abs().max() < 1e-4


def test_a_push_below_the_friction_limit_does_not_move_the_cart():
    dynamics = OptimizationBasedDynamics(CartPole(friction=0.35), mu=1e-6)
    limit = 0.35 * 1.2 * 9.81 * 0.05  # N s
    still = rolled(dynamics, torch.zeros(4, **torch_double), 20, tensor(0.8 * limit))
    moved = rolled(dynamics, torch.zeros(4, **torch_double), 20, tensor(1.2 * limit))
    assert still[-1, 2].abs() < 1e-3 and moved[-1, 2] > 0.05


def test_a_dropped_hopper_lands_on_its_foot_and_nothing_enters_the_ground():
    hopper = Hopper()
    dynamics = OptimizationBasedDynamics(hopper, mu=1e-6)
    hold = tensor(0.0, hopper.m_b * hopper.g * hopper.h / 2)  # impulse on the leg that carries the body
    states = rolled(dynamics, tensor(0.0, 0.58, 0.0, 0.5, 0.0, 0.58, 0.0, 0.5), 150, hold)
    distances = torch.stack(hopper.distances(states[:, 4:].unbind(1)))
    assert distances.min() > 0.0
    assert distances[1, -1] < 1e-3  # the foot
    assert (states[-1, 4:] - states[-1, :4]).abs().max() < 1e-3
    assert dynamics.solve(states[-1], hold).at(1e-6)[5] == pytest.approx(0.6 * 9.81 * 0.05, rel=1e-2)  # its load


def test_a_block_that_nobody_touches_slides_with_the_deceleration_of_its_friction():
    dynamics = OptimizationBasedDynamics(PlanarPush(), mu=1e-8)
    speed = 1.5  # m/s
    start = tensor(0.0, 0.0, 0.0, -5.0, 0.0)
    end = start + 0.1 * tensor(speed, 0.0, 0.0, 0.0, 0.0)
    states = rolled(dynamics, torch.cat([start, end]), 8)
    speeds = (states[:, 5] - states[:, 0]) / 0.1
    expected = (speed - 0.5 * 9.81 * 0.1 * torch.arange(9, **torch_double)).clamp_min(0.0)
    assert (speeds - expected).abs().max() < 1e-3
    assert states[:, 7].abs().max() < 1e-6


def test_a_pushed_block_moves_with_the_pusher_which_never_enters_it():
    system = PlanarPush()
    dynamics = OptimizationBasedDynamics(system)
    still = tensor(0.0, 0.0, 0.0, -0.1 - 1e-8, 0.0)
    path = dynamics.solve(torch.cat([still, still]), tensor(2.0, 0.0))
    q2, phi, gamma, b = (path.at(1e-4)[i] for i in (slice(0, 5), 5, 6, slice(12, 20, 2)))
    assert phi > 0.0 and phi * gamma == pytest.approx(1e-4)
    v = (q2 - still) / 0.1
    assert v[0] == pytest.approx(v[3].item(), abs=2e-2)
    assert 10.0 * v[3] == pytest.approx(2.0 - gamma.item())  # momentum of the pusher
    assert v[0] == pytest.approx(gamma.item() + b.sum().item(), abs=1e-6)  # and of the block


def landing_bodies(count):
    """theta of a body with four feet at various heights, attitudes and velocities."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.eye(3, **torch_double)
                               + 0.2 * torch.randn(count, 3, 3, generator=generator, **torch_double)).Q
    rotation = rotation * torch.sign(rotation.diagonal(dim1=1, dim2=2)).unsqueeze(1)  # a proper one, nearly upright
    feet = tensor(*([x, y, -0.015] for x in (0.03, -0.03) for y in (0.03, -0.03)))
    velocity = torch.cat([random(count, 3, seed=1), 5.0 * random(count, 3, seed=2)], dim=1)
    velocity[:, 2] = -velocity[:, 2].abs()
    gaps = (rotation @ feet.T)[:, 2]
    gaps = (gaps - gaps.min(dim=1, keepdim=True).values) / 1e-3  # the lowest foot touches
    return torch.cat([velocity, rotation.flatten(1), gaps, feet.flatten().expand(count, 12)], dim=1)


def test_feet_stay_over_the_ground_and_their_friction_is_in_its_cone_and_takes_energy():
    mass, inertia, mu = 0.033, (17e-6, 17e-6, 30e-6), 1e-8
    theta = landing_bodies(200)
    solver = ConeSolver(GroundContact(mass, inertia, 0.6), Settings(mu_0=1e-2, tolerance=1e-10))
    path = solver.solve(theta, (mu,))
    assert path.converged.double().mean() >= 0.99
    w = path.at(mu)[path.converged]
    gap, g, b, c = w[:, 6:10], w[:, 10:14], w[:, 18:26].unflatten(1, (4, 2)), w[:, 30:38].unflatten(1, (4, 2))
    assert gap.min() > 0.0 and torch.allclose(gap * g, torch.full_like(g, mu), atol=1e-9)
    assert (b.norm(dim=2) < 0.6 * g).all()
    assert (b * c).sum(2).max() < mu
    weights = tensor(mass, mass, mass, *inertia)
    before, after = (0.5 * (weights * v ** 2).sum(1) for v in (theta[path.converged, :6], w[:, :6]))
    assert (after < before + 1e-9).all() and (after < 0.9 * before).any()


def test_pushers_all_around_the_block_are_solved():
    generator = torch.Generator().manual_seed(0)
    angle, gap = torch.rand(2, 500, generator=generator, **torch_double)
    d = torch.stack([(2.0 * math.pi * angle).cos(), (2.0 * math.pi * angle).sin()], dim=1)
    d = d * (0.1 + 0.05 * gap.unsqueeze(1)) / (d ** 10).sum(1, keepdim=True) ** 0.1
    q = torch.cat([torch.zeros(500, 3, **torch_double), d], dim=1)
    dynamics = OptimizationBasedDynamics(PlanarPush(), settings=Settings(mu_0=1e-3))
    assert dynamics.solve(torch.cat([q, q], dim=1), random(500, 2)).converged.all()


def test_bad_input_is_named():
    dynamics = OptimizationBasedDynamics(CartPole())
    with pytest.raises(ValueError, match=r'x has shape \(3,\), expected \(\.\.\., 4\)'):
        dynamics.step(torch.zeros(3, **torch_double), torch.zeros(1, **torch_double))
    with pytest.raises(ValueError, match='friction = -0.1'):
        CartPole(friction=-0.1)
    with pytest.raises(ValueError, match='h = 0.0; expected a number of seconds > 0'):
        Acrobot(h=0.0)
