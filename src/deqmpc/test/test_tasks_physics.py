"""The tasks' dynamics: one definition for scalars, tensors, derivatives and C; energies and equilibria."""

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from deqmpc.dynamics import equations
from deqmpc.dynamics.cartpole import Cartpole
from deqmpc.dynamics.integrators import RK4, kind_of
from deqmpc.dynamics.pendulum import Pendulum
from deqmpc.dynamics.quadrotor_pole import QuadrotorPole
from deqmpc.dynamics.rotation import quaternion_from_mrp, rotate
from deqmpc.problem import Problem
from deqmpc.realtime import build, codegen
from deqmpc.realtime.solver import RealtimeSolver, Settings
from deqmpc.solvers import augmented_lagrangian as al

DT = 0.05
needs_compiler = pytest.mark.skipif(not build.available(), reason='no C compiler on this machine')
MODELS = [Pendulum(), Cartpole(), QuadrotorPole()]


def points(model, count, seed=0):
    """States, inputs and weights, float64."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.normal(size=(count, size))) for size in (model.n, model.m, model.n))


@pytest.mark.parametrize('model', MODELS, ids=lambda m: type(m).__name__)
def test_floats_arrays_and_tensors_take_the_same_step(model):
    x, u, _ = points(model, 40)
    phi = kind_of(model)(model, DT)
    arrays = phi.step(x, u)
    floats = torch.cat([phi.step(x[i:i + 1], u[i:i + 1]) for i in range(40)])
    tensors = phi.step(x.requires_grad_(), u).detach()
    assert torch.allclose(arrays, floats, atol=1e-13) and torch.allclose(arrays, tensors, atol=1e-13)


@pytest.mark.parametrize('count', [3, 60])  # floats, arrays
@pytest.mark.parametrize('model', MODELS, ids=lambda m: type(m).__name__)
def test_jacobian_and_curvature_are_those_of_differences(model, count):
    x, u, y = points(model, count)
    phi, n, step = kind_of(model)(model, DT), model.n, 1e-5
    following, F = phi.linearize(x, u)
    C = phi.curvature(x, u, y)
    assert torch.allclose(following, phi.step(x, u), atol=1e-13)
    for j in range(n + model.m):
        d = step * torch.eye(n + model.m, dtype=torch.float64)[j]
        ahead, behind = (phi.linearize(x + s * d[:n], u + s * d[n:]) for s in (1.0, -1.0))
        slope, bend = (ahead[0] - behind[0]) / (2 * step), (ahead[1] - behind[1]) / (2 * step)
        assert torch.allclose(F[..., j], slope, atol=1e-8, rtol=1e-7)
        assert torch.allclose(C[..., j], torch.einsum('bi,bij->bj', y, bend), atol=1e-8, rtol=1e-7)


HARNESS = '''
static void spread(const double *from, int count, vec *to) {
  for (int i = 0; i < count; i++) for (int l = 0; l < LANES; l++) to[i][l] = from[i * LANES + l];
}
void run(const double *x, const double *u, const double *y, double h, double *next, double *F, double *C) {
  vec a[N], b[M], w[N], to[N], f[F_COUNT], c[C_COUNT + 1];
  spread(x, N, a); spread(u, M, b); spread(y, N, w);
  step_linearize(a, b, h, to, f);
  step_curvature(a, b, h, w, c);
  for (int l = 0; l < LANES; l++) {
    for (int i = 0; i < N; i++) next[l * N + i] = to[i][l];
    for (int e = 0; e < F_COUNT; e++) F[(l * N + F_ROW[e]) * (N + M) + F_COLUMN[e]] = f[e][l];
    for (int e = 0; e < C_COUNT; e++) C[(l * (N + M) + C_ROW[e]) * (N + M) + C_COLUMN[e]] = c[e][l];
  }
}
'''


@needs_compiler
@pytest.mark.parametrize('model', MODELS, ids=lambda m: type(m).__name__)
def test_compiled_step_jacobian_and_curvature_are_those_of_torch(model):
    lanes, n, m = codegen.LANES, model.n, model.m
    x, u, y = points(model, lanes, seed=1)
    library = build.load(codegen.c_source(model, [0]) + HARNESS)
    out = [np.zeros((lanes, n)), np.zeros((lanes, n, n + m)), np.zeros((lanes, n + m, n + m))]
    given = [np.ascontiguousarray(v.numpy().T) for v in (x, u, y)]
    address = [ctypes.c_void_p(v.ctypes.data) for v in (*given, *out)]
    library.run(*address[:3], ctypes.c_double(DT), *address[3:])
    phi = kind_of(model)(model, DT)
    following, F = phi.linearize(x, u)
    C = torch.triu(phi.curvature(x, u, y))
    for mine, exact in zip(out, (following, F, C), strict=True):
        assert np.abs(mine - exact.numpy()).max() < 1e-10


def test_a_function_that_no_vector_of_knots_has_is_refused_by_name():
    class Rough(Pendulum):
        def derivative(self, x, u):
            theta, omega = x
            return omega, u[0] - abs(omega) * omega - theta

    with pytest.raises(ValueError, match=r'cannot write Abs\(x1\) in C; expected sums, products'):
        codegen.c_source(Rough(), [0])


@needs_compiler
def test_the_compiled_solver_swings_the_pendulum_as_the_torch_solver_does():
    problem = Problem(Pendulum(), DT, 20, Q=[10.0, 1.0], R=[0.01], u_low=[-3.0], u_high=[3.0], position=[0])
    given = np.array([0.4, -0.2]), np.zeros((21, 2)), np.zeros((20, 1))
    solver = RealtimeSolver(problem, 0, Settings(tolerance=1e-9))
    fast = solver.solve(*given)
    slow = al.solve(problem, problem.instances(*(torch.from_numpy(v)[None] for v in given)), settings=al.Settings(
        feasibility=1e-10, optimality=1e-18, newton_below=1e-2, gn_steps=60, iterations=30))
    assert solver.compiled and fast.status is al.Status.CONVERGED
    assert np.abs(fast.x - slow.x[0].numpy()).max() < 1e-5 and np.abs(fast.u).max() > 2.99


def energy(model, x):
    """Joule. The cart-pole: a cart of 10 kg and a pole of 1 kg and 1 kg m^2 whose centre is 1 m up. The quadrotor's
    pole: a point of 1 kg."""
    if isinstance(model, QuadrotorPole):
        return 0.5 * (model.length * x[..., 13]) ** 2 - 9.81 * model.length * torch.cos(x[..., 6])
    if isinstance(model, Pendulum):
        return 0.5 * x[..., 1] ** 2 + model.gravity * torch.cos(x[..., 0])
    _, theta, v, w = x.unbind(-1)
    centre = torch.stack([v - torch.cos(theta) * w, -torch.sin(theta) * w])  # velocity of the pole's centre, 1 m up
    return 0.5 * 10.0 * v ** 2 + 0.5 * centre.square().sum(0) + 0.5 * 1.0 * w ** 2 + 9.81 * torch.cos(theta)


@pytest.mark.parametrize('model, dt, drift', [(Pendulum(dt=1e-4), 1e-4, 5e-3), (Cartpole(), 1e-3, 1e-9),
                                             (QuadrotorPole(), 1e-3, 1e-9)], ids=['pendulum', 'cartpole', 'pole'])
def test_energy_stays_without_input(model, dt, drift):
    """A second of motion: the pendulum's first-order step errs with dt, RK4 with dt^4. The quadrotor hovers."""
    x, _, _ = points(model, 50)
    if isinstance(model, QuadrotorPole):
        x[:, 3:6], x[:, 10:13] = 0.0, 0.0
    start = energy(model, x)
    phi = kind_of(model)(model, dt)
    for _ in range(round(1.0 / dt)):
        x = phi.step(x, torch.zeros(50, model.m, dtype=torch.float64))
    assert (energy(model, x) - start).abs().max() < drift


def test_force_on_the_cart_does_work_at_the_carts_speed():
    model = Cartpole()
    x, u, _ = points(model, 50)
    x.requires_grad_()
    slope, = torch.autograd.grad(energy(model, x).sum(), x)
    rate = torch.stack(model.derivative(x.unbind(-1), u.unbind(-1)), dim=-1)
    assert torch.allclose((slope * rate).sum(-1), u[:, 0] * x[:, 2], atol=1e-10)


def test_hovering_with_the_pole_up_or_down_is_an_equilibrium():
    model = QuadrotorPole()
    for theta in (0.0, math.pi):
        rate = model.derivative([0.0] * 6 + [theta] + [0.0] * 7, [0.0] * 4)
        assert np.abs(rate).max() < 1e-13
    upright, up = (torch.tensor([0.0] * 6 + [math.pi + tip] + [0.0] * 7) for tip in (0.0, 0.01))
    assert model.derivative(up, [0.0] * 4)[13] > 0.19 > model.derivative(upright, [0.0] * 4)[13]  # it falls


def test_the_pole_follows_a_point_on_a_rod_whose_hinge_moves_with_the_quadrotor():
    """Along the swing the rod's end has gravity's acceleration alone."""
    model = QuadrotorPole()
    x, u, _ = points(model, 30)
    rate = torch.stack(model.derivative(x.unbind(-1), (0.1 * u).unbind(-1)), dim=-1)
    inertial = rate[:, 7:10] + torch.linalg.cross(x[:, 10:13], x[:, 7:10])  # of the hinge, in body axes
    q = quaternion_from_mrp(x[:, 3:6].numpy())
    hinge, moving = (torch.from_numpy(rotate(q, v.numpy())) for v in (inertial, x[:, 7:10]))
    assert torch.allclose(moving, rate[:, :3], atol=1e-12)
    # theta grows where the hinge accelerates to +x: the rod's end is at -l (sin theta, cos theta) in x and z
    along = -hinge[:, 0] * torch.cos(x[:, 6]) + model.length * rate[:, 13]
    assert torch.allclose(along, -9.81 * torch.sin(x[:, 6]), atol=1e-12)


# --- scalars and integrators ----------------------------------------------------------------------

def test_sin_and_cos_of_what_is_not_finite_are_nan_for_every_scalar():
    for name in ('sin', 'cos'):
        function = getattr(equations, name)
        for value in (math.inf, -math.inf, math.nan):
            with np.errstate(invalid='ignore'):
                array = function(np.array([value]))
            assert math.isnan(function(value)) and np.isnan(array).all()
            assert torch.isnan(function(torch.tensor([value]))).all()


def test_equations_made_for_one_step_refuse_another():
    with pytest.raises(ValueError, match=r'dt = 0.1; Pendulum is made for steps of 0.05 s'):
        Problem(Pendulum(), 0.1, 3, [1.0, 1.0], [1.0], position=[0])


@dataclass(frozen=True)
class Odd:
    """Equations that name an integrator nobody has."""

    integrator = 'leapfrog'
    n = m = 1


def test_an_unknown_integrator_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="Odd.integrator = 'leapfrog'; expected one of rk4, euler"):
        Problem(Odd(), 0.1, 3, [1.0], [1.0], position=[0])


def test_equations_that_name_no_integrator_get_runge_kutta():
    assert kind_of(Cartpole()) is RK4
