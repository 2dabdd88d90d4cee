"""The fixed benchmark of the solvers: a small quadrotor among 40 spheres, with Ipopt's optimum (tolerance 1e-10)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc.airframe import Airframe
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.problem import Instances, Problem

DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).resolve().parents[4] / 'shared' / 'data'))
FRAME = Airframe(mass=0.034, inertia=(1.657e-5, 1.666e-5, 2.926e-5), motor_offset=0.046 / 2 ** 0.5,
                 thrust_to_torque=0.006, drag=(0.0, 0.0, 0.0))
RADII = np.full(40, 0.15)


def problem(T=5, equations=Crazyflie(FRAME), **bounds) -> Problem:
    """The benchmark's, or with other dynamics or bounds."""
    Q = [20.0] * 3 + [1.0] * 6 + [0.05] * 3
    return Problem(equations, 0.05, T, Q, [0.05] * 4, **{'u_low': [0.1] * 4, 'u_high': [1.75] * 4, **bounds})


def recorded(T) -> dict[str, np.ndarray]:
    """x0 (N, 12), xr (N, T+1, 12), obs (N, 40, 3), the warm start xw, uw, Ipopt's xs, us and its cost (N,)."""
    path = DATA / 'solver' / f'quadrotor_T{T}.npz'
    if not path.exists():
        pytest.skip(f'{path} not found: solver benchmark data are not part of the repository')
    with np.load(path) as file:
        return dict(file)


def instances(d: dict[str, np.ndarray], T: int) -> tuple[Problem, Instances]:
    """Those of `d`, which `recorded` gave, or some of them."""
    p = problem(T)
    given = d['x0'], d['xr'], np.ones_like(d['uw']), d['obs'], RADII
    return p, p.instances(*map(torch.from_numpy, given))
