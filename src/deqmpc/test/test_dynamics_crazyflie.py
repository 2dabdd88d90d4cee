"""The Crazyflie's equations and their generated derivatives."""

import numpy as np
import pytest
import torch
from solver_benchmark import FRAME, recorded

from deqmpc.airframe import GRAVITY, Airframe
from deqmpc.dynamics import rotation
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.equations import jacobian_program, python_source
from deqmpc.dynamics.integrators import RK4

torch.set_num_threads(1)
AIRFRAMES = {
    'cf21': Airframe(),
    'no drag': Airframe(drag=(0.0, 0.0, 0.0)),
    'unequal drag and inertia': Airframe(drag=(0.02, 0.01, 0.03), inertia=(1.6e-5, 1.7e-5, 2.9e-5)),
}


def random_points(count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=g, dtype=dtype) * torch.tensor(
        [1.0] * 3 + [0.4] * 3 + [1.0] * 3 + [2.0] * 3, dtype=dtype)
    return x, 1.0 + 0.3 * torch.randn(count, 4, generator=g, dtype=dtype)


@pytest.fixture(params=AIRFRAMES, ids=list(AIRFRAMES))
def model(request):
    return Crazyflie(AIRFRAMES[request.param])


def test_hover_is_an_equilibrium(model):
    assert np.allclose(model.derivative([0.0] * 12, [1.0] * 4), 0.0, atol=1e-12)


def test_forces_agree_with_the_quaternion_form_of_the_equations(model):
    frame = model.airframe
    for xs, us in zip(*(a.numpy() for a in random_points(20)), strict=True):
        q = rotation.quaternion_from_mrp(xs[3:6])
        v_body = rotation.rotate(rotation.conjugate(q), xs[6:9])
        force = np.array([0.0, 0.0, us.sum() * frame.hover_thrust]) - np.array(frame.drag) * v_body
        expected = rotation.rotate(q, force) / frame.mass - [0.0, 0.0, GRAVITY]
        assert np.allclose(model.derivative(list(xs), list(us))[6:9], expected, atol=1e-10)


def test_attitude_follows_the_quaternion_kinematics(model):
    xs, us = (a[0].numpy() for a in random_points(1, seed=3))
    q = rotation.quaternion_from_mrp(xs[3:6])
    q_dot = 0.5 * rotation.multiply(q, np.array([*xs[9:12], 0.0]))
    h = 1e-6
    m_dot = (rotation.mrp_from_quaternion(q + h * q_dot) - rotation.mrp_from_quaternion(q - h * q_dot)) / (2 * h)
    assert np.allclose(model.derivative(list(xs), list(us))[3:6], m_dot, atol=1e-8)


def test_gyroscopic_torque_does_no_work(model):
    xs, _ = (a[0].numpy() for a in random_points(1, seed=4))
    w_dot = np.array(model.derivative(list(xs), [1.0] * 4)[9:12])
    assert abs(xs[9:12] @ (np.array(model.airframe.inertia) * w_dot)) < 1e-15


def test_generated_jacobian_of_the_step_equals_autograd(model):
    x, u = random_points(13)
    phi = RK4(model, 0.1)
    following, f = phi.linearize(x, u)
    auto = torch.stack([torch.cat(torch.autograd.functional.jacobian(phi.step, (a, b)), dim=-1)
                        for a, b in zip(x, u, strict=True)])
    assert torch.allclose(f, auto, atol=1e-11)
    assert torch.allclose(following, phi.step(x, u), atol=1e-13)


def test_few_points_and_many_points_give_the_same_step_and_jacobian(model):
    x, u = random_points(40)
    phi = RK4(model, 0.05)
    following, f = phi.linearize(x.reshape(4, 10, 12), u.reshape(4, 10, 4))
    one = [phi.linearize(x[i], u[i]) for i in range(40)]
    assert torch.allclose(following.reshape(40, 12), torch.stack([o[0] for o in one]), atol=1e-13)
    assert torch.allclose(f.reshape(40, 12, 16), torch.stack([o[1] for o in one]), atol=1e-11)


def test_step_is_differentiable_by_torch():
    x, u = random_points(2)
    assert torch.autograd.gradcheck(RK4(Crazyflie(), 0.05).step, (x.requires_grad_(), u.requires_grad_()))


def test_curvature_of_the_step_equals_autograd():
    x, u = random_points(3)
    y = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi = RK4(Crazyflie(), 0.1)
    c = phi.curvature(x, u, y)
    for i in range(3):
        auto = torch.autograd.functional.hessian(
            lambda z, i=i: (phi.step(z[:12], z[12:]) * y[i]).sum(), torch.cat([x[i], u[i]]))
        assert torch.allclose(c[i], auto, atol=1e-10)


def test_generated_source_is_straight_line_code():
    lines = python_source(jacobian_program(Crazyflie()), 'jacobian').splitlines()
    assert all(' = ' in line and 'if' not in line for line in lines[1:])


def test_model_reproduces_the_benchmark_dynamics():
    data = recorded(20)
    xs, us = torch.from_numpy(data['xs']), torch.from_numpy(data['us'])
    defect = RK4(Crazyflie(FRAME), 0.05).step(xs[:, :-1], us) - xs[:, 1:]
    assert defect.abs().max() < 1e-8  # Ipopt's own tolerance
