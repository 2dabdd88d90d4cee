"""The stirred tank: its balances, its held inputs, its derivatives in torch and in compiled code, its set points."""

import dataclasses

import numpy as np
import pytest
import torch

from deqmpc.dynamics.cstr import INPUT_HIGH, INPUT_LOW, StirredTank
from deqmpc.dynamics.equations import exp
from deqmpc.dynamics.integrators import RK4
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver, build

torch.set_num_threads(1)
TANK = StirredTank()


def points(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states and input changes within the bounds."""
    g = torch.Generator().manual_seed(seed)
    low = torch.tensor([0.1, 0.1, 80.0, 80.0, 20.0, 20.0, -0.05, -0.3], dtype=torch.float64)
    high = torch.tensor([2.0, 2.0, 140.0, 140.0, 80.0, 80.0, 0.1, 0.1], dtype=torch.float64)
    x = low + (high - low) * torch.rand(count, 8, generator=g, dtype=torch.float64)
    return x, 40.0 * torch.rand(count, 2, generator=g, dtype=torch.float64) - 20.0


def test_what_flows_in_as_a_flows_out_or_reacts():
    """c_A' + c_B' + r_bc + 2 r_d = F (c_A0 - c_A - c_B), where r_d (2 A -> D) is counted in A."""
    x, u = points(1)
    x, u = x[0].tolist(), u[0].tolist()
    rate = TANK.derivative(x, u)
    flow = INPUT_LOW[0] + 0.01 * (INPUT_HIGH[0] - INPUT_LOW[0]) * (x[4] + u[0])
    kelvin = x[2] + 273.15
    r_bc = 1.287e12 * np.exp(-9758.3 / kelvin) * x[1]
    r_d = 9.043e9 * np.exp(-0.95 * (1 + x[6]) * 8560.0 / kelvin) * x[0] ** 2
    assert rate[0] + rate[1] + r_bc + r_d == pytest.approx(flow * (5.1 - x[0] - x[1]), rel=1e-12)


def test_heat_that_leaves_the_tank_arrives_in_the_jacket():
    """Without reactions, with inflow at the tank's temperature and no cooling: energy of both is constant."""
    cold = dataclasses.replace(TANK, k_ab=0.0, k_ad=0.0, inflow_temperature=95.0)
    rate = cold.derivative([1.0, 1.0, 95.0, 120.0, 50.0, 100.0, 0.0, 0.0], [0.0, 0.0])  # 100 %: Q = 0
    stored = 0.9342 * 3.01 * 10.01 * rate[2] + 5.0 * 2.0 * rate[3]
    assert rate[2] > 1.0 and stored == pytest.approx(0.0, abs=1e-9)


def test_an_input_holds_over_the_step_that_it_changes_in_and_is_remembered_after_it():
    x, u = points(5)
    changed = x.clone()
    changed[:, 4:6] += u
    after, held = RK4(TANK, 0.005).step(x, u), RK4(TANK, 0.005).step(changed, torch.zeros_like(u))
    assert torch.allclose(after, held, atol=1e-12) and torch.equal(after[:, 4:6], changed[:, 4:6])


def test_one_step_is_as_accurate_as_the_benchmark_needs():
    """0.02 degC next to a hundred small steps, where the tank is within 10 degC of its set points."""
    x, u = points(50)
    x[:, 2:4] = torch.tensor([126.0, 120.0], dtype=torch.float64) + 0.2 * (x[:, 2:4] - 110.0)
    fine = x.clone()
    fine[:, 4:6] += u
    for _ in range(100):
        fine = RK4(TANK, 0.00005).step(fine, torch.zeros_like(u))
    assert (RK4(TANK, 0.005).step(x, u) - fine).abs().max() < 0.02


@pytest.mark.parametrize('count', [3, 60], ids=['floats', 'arrays'])
def test_jacobian_and_curvature_of_a_step_are_those_of_autograd(count):
    phi, (x, u) = RK4(TANK, 0.005), points(count)
    g = torch.Generator().manual_seed(1)
    y = torch.randn(count, 8, generator=g, dtype=torch.float64)
    following, F = phi.linearize(x, u)
    assert torch.allclose(following, phi.step(x.clone().requires_grad_(), u).detach(), atol=1e-11)
    C = phi.curvature(x, u, y)

    def step(z):
        return phi.step(z[None, :8], z[None, 8:])[0]
    for i in range(3):
        z = torch.cat([x[i], u[i]])
        assert torch.allclose(F[i], torch.autograd.functional.jacobian(step, z), atol=1e-10)
        hessian = torch.autograd.functional.hessian(lambda z, i=i: step(z) @ y[i], z)
        assert torch.allclose(C[i], hessian, atol=1e-8 * float(hessian.abs().max()))


@pytest.mark.skipif(not build.available(), reason='no C compiler on this machine')
def test_compiled_steps_are_those_of_torch():
    problem = Problem(TANK, 0.005, 4, Q=[1.0] * 8, R=[1.0] * 2, position=(0,))
    solver = RealtimeSolver(problem, 0)
    x, u = points(5)
    following, F = solver.linearize(x.numpy(), u[:4].numpy())
    expected, jacobian = problem.phi.linearize(x[:4], u[:4])
    assert solver.compiled and np.allclose(following, expected, atol=1e-11) and np.allclose(F, jacobian, atol=1e-11)


def test_exp_of_a_float_never_raises():
    assert exp(0.0) == 1.0 and exp(1e4) == float('inf') and exp(-1e4) == 0.0 and exp(float('-inf')) == 0.0
    assert exp(float('nan')) != exp(float('nan'))
