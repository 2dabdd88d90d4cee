"""The instances that the solvers are compared on.

12-state quadrotor (MRP attitude), 4 motors, RK4 with dt = 0.05 s, thrust bounds, quadratic tracking of a line towards
the origin, K spheres of radius 0.15 m of which two stand beside the line. Each instance is the second step of a loop:
the first one is solved, the plant moves with noise, the plan shifted by one knot is the warm start.
"""

from __future__ import annotations

import numpy as np

from deqmpc.airframe import Airframe
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.integrators import rk4
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver, Settings
from deqmpc.solvers import augmented_lagrangian as al

DT, RADIUS, LOW, HIGH = 0.05, 0.15, 0.1, 1.75
FRAME = Airframe(mass=0.034, inertia=(1.657e-5, 1.666e-5, 2.926e-5), motor_offset=0.046 / 2 ** 0.5,
                 thrust_to_torque=0.006, drag=(0.0, 0.0, 0.0))
Q, R = np.array([20.0] * 3 + [1.0] * 6 + [0.05] * 3), np.array([0.05] * 4)


def problem(T: int) -> Problem:
    return Problem(Crazyflie(FRAME), DT, T, Q.tolist(), R.tolist(), u_low=[LOW] * 4, u_high=[HIGH] * 4)


def instances(T: int, K: int, count: int, seed: int = 0) -> list[dict]:
    """`count` instances: x_init, x_ref, u_ref, spheres, radii, and the warm start x, u."""
    rng, p = np.random.default_rng(seed), problem(T)
    solver = RealtimeSolver(p, K, Settings())
    radii, u_ref, made = np.full(K, RADIUS), np.ones((T, 4)), []
    while len(made) < count:
        start = rng.uniform(-1.2, 1.2, 3)
        length = np.linalg.norm(start)
        if length < 0.8:
            continue
        direction, speed = -start / length, rng.uniform(0.5, 1.5)
        spheres = rng.uniform(-1.3, 1.3, (K, 3))
        for j, (near, far) in zip(range(K), ((0.2, 0.45), (0.3, 0.9)), strict=False):
            beside = rng.normal(size=3)
            beside -= direction * (beside @ direction)
            spheres[j] = (start + direction * rng.uniform(near, far)
                          + beside / np.linalg.norm(beside) * rng.uniform(0.02, 0.2))
        x = np.concatenate([start + 0.03 * rng.normal(size=3), 0.05 * rng.normal(size=3),
                            direction * speed * rng.uniform(0.3, 1.0) + 0.1 * rng.normal(size=3),
                            0.3 * rng.normal(size=3)])
        way = np.minimum(speed * DT * np.arange(T + 2), length)
        ref = np.zeros((T + 2, 12))
        ref[:, :3] = start + way[:, None] * direction
        ref[:, 6:9] = np.where(way < length, speed, 0.0)[:, None] * direction
        if K and (np.linalg.norm(spheres - x[:3], axis=1) < RADIUS + 0.04).any():
            continue
        first = solver.solve(x, ref[:-1], u_ref, spheres, radii)
        noise = np.repeat([0.004, 0.01, 0.03, 0.1], 3) * rng.normal(size=12)
        x = np.array(rk4(p.equations.derivative, x.tolist(), first.u[0].tolist(), DT)[0]) + noise
        if first.status is not al.Status.CONVERGED or (K and (np.linalg.norm(spheres - x[:3], axis=1) < RADIUS).any()):
            continue
        guess = first.warm_start.shifted()
        guess.x[0] = x
        made.append(dict(x_init=x, x_ref=ref[1:], u_ref=u_ref, spheres=spheres, radii=radii, x=guess.x, u=guess.u))
    return made


def judge(p: Problem, given: dict, x, u) -> tuple[float, float]:
    """Largest violation of dynamics, bounds and |p - o|^2 >= r^2, and the cost."""
    following = np.stack(rk4(p.equations.derivative, list(x[:-1].T), list(u.T), DT)[0], axis=1)
    e, v = x - given['x_ref'], u - given['u_ref']
    worst = [np.abs(following - x[1:]).max(), np.abs(x[0] - given['x_init']).max(), (u - HIGH).max(), (LOW - u).max()]
    if len(given['radii']):
        squared = ((x[1:, None, :3] - given['spheres']) ** 2).sum(-1)
        worst.append((RADIUS ** 2 - squared).max())
    return max(worst), 0.5 * float((e ** 2 * Q).sum() + (v ** 2 * R).sum())
