"""The quadrotor's equations against released transitions and against physics."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc.dynamics.integrators import RK4
from deqmpc.dynamics.quadrotor import U_HIGH, U_HOVER, U_LOW, Quadrotor

DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).parents[4] / 'shared/data'))


def test_a_step_reproduces_the_released_transitions():
    path = DATA / 'experts/quadrotor.npz'
    if not path.exists():
        pytest.skip(f'{path} is absent: no released trajectories to compare with')
    data = np.load(path)
    start = np.concatenate([[0], np.cumsum(data['lengths'])])
    last = np.zeros(len(data['states']), dtype=bool)
    last[start[1:] - 1] = True
    x = torch.tensor(data['states'], dtype=torch.float64)
    u = torch.tensor(data['controls'], dtype=torch.float64)
    assert float(u.min()) >= U_LOW and float(u.max()) <= U_HIGH + 1e-6
    following = RK4(Quadrotor(), 0.05).step(x, u)[:-1][~last[:-1]]
    error = (following - x[1:][~last[:-1]]).abs() / x[1:][~last[:-1]].abs().clamp_min(1.0)
    assert float(error.max()) < 1e-4  # relative above 1: float32 data, MRPs up to 12


def test_level_hover_stands_still():
    rate = Quadrotor().derivative([0.0] * 12, [U_HOVER] * 4)
    assert np.abs(rate).max() < 1e-4


def test_energy_changes_by_the_motors_power_alone():
    rng = np.random.default_rng(0)
    quad = Quadrotor()
    jxx, jxy, jyy, jzz = quad.inertia
    J = np.array([[jxx, jxy, 0.0], [jxy, jyy, 0.0], [0.0, 0.0, jzz]])
    for _ in range(20):
        x, u = rng.normal(size=12), rng.uniform(U_LOW, U_HIGH, size=4)
        rate = np.array(quad.derivative(x, u))
        v, w = x[6:9], x[9:12]
        power = quad.mass * (v @ rate[6:9] + quad.gravity * rate[2]) + w @ J @ rate[9:12]
        thrust = quad.thrust_slope * u + quad.thrust_offset
        arm = quad.arm / np.sqrt(2.0)
        torque = np.array([arm * (thrust @ [1, -1, -1, 1]), -arm * (thrust @ [1, 1, -1, -1]),
                           quad.torque_slope * (u @ [1, -1, 1, -1])])
        assert power == pytest.approx(thrust.sum() * v[2] + torque @ w, abs=1e-9)


def test_both_sets_of_mrps_move_alike():
    rng = np.random.default_rng(1)
    quad = Quadrotor()
    for _ in range(20):
        x, u = rng.normal(size=12), rng.uniform(U_LOW, U_HIGH, size=4)
        m = x[3:6]
        shadow = x.copy()
        shadow[3:6] = -m / (m @ m)
        a, b = np.array(quad.derivative(x, u)), np.array(quad.derivative(shadow, u))
        assert np.delete(a, [3, 4, 5]) == pytest.approx(np.delete(b, [3, 4, 5]), abs=1e-9)
        turned = -a[3:6] / (m @ m) + 2.0 * m * (m @ a[3:6]) / (m @ m) ** 2  # d/dt of the shadow
        assert turned == pytest.approx(b[3:6], abs=1e-9)
