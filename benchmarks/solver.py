"""Solvers of one MPC instance against each other: time, iterations, accuracy.

  OMP_NUM_THREADS=1 python benchmarks/solver.py [--horizons 5 20 50] [--solves 1000] [--json solver.json]

The problem: 12-state quadrotor (MRP attitude), 4 motors, RK4 with dt = 0.05 s, thrust bounds, quadratic tracking of a
line towards the origin, 40 spheres of radius 0.15 m of which two stand beside the line. Each instance is the second
step of a loop: the first one is solved, the plant moves with noise, the plan shifted by one knot is the warm start.
All solvers get the same instances and start; the optimum is Ipopt's with tol 1e-8 from the same start.

accurate: all violations <= 1e-4 and cost within 1 % of that optimum. exact: 1e-6 and 1e-4 (or a lower cost).
Peers come from CasADi (pip install casadi). Their expressions are compiled by the C compiler at T <= 5 and interpreted
beyond, where compiling takes minutes: compare times there with care. Without CasADi only this project's own rows are
printed and the optimum is the compiled solver's. Times are medians and 99th percentiles of whole Python calls; the
solvers take turns, a pass over all instances each, so that all meet the same load; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

import numpy as np
import torch

from deqmpc.airframe import Airframe
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.integrators import rk4
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver, Settings, WarmStart
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


class Ours:
    """The compiled solver."""

    def __init__(self, T, K, settings, cold=False):
        self.solver, self.cold = RealtimeSolver(problem(T), K, settings), cold

    def __call__(self, g):
        start = None if self.cold else WarmStart(g['x'], g['u'])
        s = self.solver.solve(g['x_init'], g['x_ref'], g['u_ref'], g['spheres'], g['radii'], start)
        return s.x, s.u, s.steps


class Torch:
    """The batched torch solver with one sample."""

    def __init__(self, T, settings):
        self.problem, self.settings = problem(T), settings

    def __call__(self, g):
        def t(name):
            return torch.from_numpy(g[name])[None]
        with torch.inference_mode():
            data = self.problem.instances(*map(t, ('x_init', 'x_ref', 'u_ref', 'spheres', 'radii')))
            s = al.solve(self.problem, data, al.guess(self.problem, data, t('x'), t('u'), self.settings), self.settings)
            return s.x[0].numpy(), s.u[0].numpy(), int(s.steps)


class Casadi:
    """A solver of CasADi. Variables x_0, u_0, x_1, ... and constraints stage by stage, as fatrop wants them."""

    def __init__(self, T, K, name, options, cold=False):
        import casadi as ca
        equations = Crazyflie(FRAME)
        z, u = ca.SX.sym('x', 12), ca.SX.sym('u', 4)
        following, _ = rk4(equations.derivative, ca.vertsplit(z), ca.vertsplit(u), DT)
        step = ca.Function('step', [z, u], [ca.vertcat(*following)])
        X, U = [ca.SX.sym(f'x{t}', 12) for t in range(T + 1)], [ca.SX.sym(f'u{t}', 4) for t in range(T)]
        x0, ref, spheres = ca.SX.sym('i', 12), ca.SX.sym('r', 12, T + 1), ca.SX.sym('o', 3, K)
        cost, rows, low, high, equality, lows, highs, w = 0, [], [], [], [], [], [], []
        for t in range(T + 1):
            e = X[t] - ref[:, t]
            cost += 0.5 * ca.dot(e * e, ca.DM(Q))
            w.append(X[t])
            lows += [-np.inf] * 12
            highs += [np.inf] * 12
            if t < T:
                cost += 0.5 * ca.dot((U[t] - 1) ** 2, ca.DM(R))
                w.append(U[t])
                lows += [LOW] * 4
                highs += [HIGH] * 4
                rows.append(X[t + 1] - step(X[t], U[t]))
                low += [0.0] * 12
                high += [0.0] * 12
                equality += [True] * 12
            if t == 0:
                rows.append(X[0] - x0)
                low += [0.0] * 12
                high += [0.0] * 12
                equality += [True] * 12
            else:
                rows += [ca.sumsqr(X[t][:3] - spheres[:, k]) for k in range(K)]
                low += [RADIUS ** 2] * K
                high += [np.inf] * K
                equality += [False] * K
        nlp = dict(x=ca.vertcat(*w), f=cost, g=ca.vertcat(*rows), p=ca.veccat(x0, ref, spheres))
        if name == 'fatrop':
            options = {**options, 'structure_detection': 'auto', 'equality': equality}
        self.solver = ca.nlpsol('solver', name, nlp, options)
        self.limits = {name: ca.DM(v) for name, v in (('lbx', lows), ('ubx', highs), ('lbg', low), ('ubg', high))}
        self.cold, self.T, self.name = cold, T, name

    def __call__(self, g):
        T = self.T
        x, u = (np.repeat(g['x_init'][None], T + 1, axis=0), g['u_ref']) if self.cold else (g['x'], g['u'])
        guess = np.concatenate([np.hstack([x[:-1], u]).ravel(), x[-1]])
        p = np.concatenate([g['x_init'], g['x_ref'].ravel(), g['spheres'].ravel()])
        w = np.asarray(self.solver(x0=guess, p=p, **self.limits)['x']).ravel()
        stages = w[:-12].reshape(T, 16)
        return np.vstack([stages[:, :12], w[-12:]]), stages[:, 12:], lambda: self.solver.stats()['iter_count']


QUIET = {'print_time': False, 'error_on_fail': False}
JIT = {'jit': True, 'compiler': 'shell', 'jit_options': {'flags': ['-O1'], 'verbose': False}}
IPOPT = {'print_level': 0, 'sb': 'yes', 'max_iter': 300}
WARM = {'tol': 1e-4, 'mu_init': 1e-3, 'warm_start_init_point': 'yes', 'bound_push': 1e-6, 'bound_frac': 1e-6}


def solvers(T: int, K: int, peers: bool) -> dict:
    """Name -> solver."""
    made = {
        'compiled AL, 2 x 2 steps': Ours(T, K, al.Settings(iterations=2, gn_steps=2, optimality=0.0)),
        'compiled to 1e-4, warm': Ours(T, K, Settings(tolerance=1e-4)),
        'compiled to 1e-6, warm': Ours(T, K, Settings()),
        'compiled to 1e-6, cold': Ours(T, K, Settings(), cold=True),
        'torch AL to 1e-4, warm': Torch(T, al.Settings()),
    }
    if peers:
        jit = JIT if T <= 5 else {}  # compiling the whole horizon's Hessian takes minutes
        made |= {
            'Ipopt, cold': Casadi(T, K, 'ipopt', {**QUIET, **jit, 'ipopt': IPOPT}, cold=True),
            'Ipopt to 1e-4, warm': Casadi(T, K, 'ipopt', {**QUIET, **jit, 'ipopt': {**IPOPT, **WARM}}),
            'fatrop to 1e-4, warm': Casadi(T, K, 'fatrop', {**QUIET, **jit, 'fatrop': {
                'print_level': 0, 'tol': 1e-4, 'mu_init': 1e-2}}),
        }
    return made


def compare(T: int, K: int, count: int, solves: int, peers: bool) -> list[dict]:
    """One row for each solver."""
    p, given = problem(T), instances(T, K, count)
    oracle = Casadi(T, K, 'ipopt', {**QUIET, 'ipopt': {**IPOPT, 'tol': 1e-8}}) if peers else Ours(T, K, Settings())
    optimum = [judge(p, g, *oracle(g)[:2])[1] for g in given]
    rows = []
    named = solvers(T, K, peers)
    times: dict[str, list] = {name: [] for name in named}
    steps: dict[str, list] = {name: [] for name in named}
    quality = {name: [] for name in named}
    slow = {name: 'compiled' not in name and T > 5 for name in named}
    for repeat in range(max(1, -(-solves // count))):
        for name, solve in named.items():
            if slow[name] and repeat:
                continue
            for g, best in zip(given, optimum, strict=True):
                begin = time.perf_counter()
                x, u, taken = solve(g)
                times[name].append(time.perf_counter() - begin)
                if repeat == 0:
                    violation, cost = judge(p, g, x, u)
                    quality[name].append((violation <= 1e-4 and cost <= 1.01 * best,
                                          violation <= 1e-6 and cost <= (1 + 1e-4) * best))
                    steps[name].append(taken() if callable(taken) else taken)  # CasADi's take long to collect
    base = np.median(times['compiled to 1e-4, warm'])
    for name in named:
        accurate, exact = np.mean(quality[name], axis=0)
        rows.append(dict(solver=name, T=T, K=K, solves=len(times[name]), median_ms=1e3 * float(np.median(times[name])),
                         p99_ms=1e3 * float(np.percentile(times[name], 99)), steps=float(np.median(steps[name])),
                         accurate=float(accurate), exact=float(exact), ratio=float(np.median(times[name]) / base)))
    return rows


def sweep(solves: int) -> list[dict]:
    """Median time of a solve to 1e-4 over the number of spheres and over the horizon, and of one step of it."""
    rows = []
    for T, K in [(5, k) for k in (0, 10, 20, 40, 80, 160)] + [(t, 40) for t in (10, 20, 50, 100)]:
        given, solve = instances(T, K, 20), Ours(T, K, Settings(tolerance=1e-4))
        times, steps = [], []
        for _ in range(max(1, solves // 20)):
            for g in given:
                begin = time.perf_counter()
                _, _, taken = solve(g)
                times.append(time.perf_counter() - begin)
                steps.append(taken)
        rows.append(dict(solver='compiled to 1e-4, warm', T=T, K=K, median_ms=1e3 * float(np.median(times)),
                         p99_ms=1e3 * float(np.percentile(times, 99)),
                         us_per_step=1e6 * float(np.sum(times) / np.sum(steps))))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--horizons', type=int, nargs='+', default=[5, 20, 50])
    parser.add_argument('--spheres', type=int, default=40)
    parser.add_argument('--instances', type=int, default=100)
    parser.add_argument('--solves', type=int, default=1000, help='of each solver; at T > 5 peers solve once')
    parser.add_argument('--no-peers', action='store_true')
    parser.add_argument('--json', help='write the rows to this file')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if os.environ.get('OMP_NUM_THREADS') != '1':
        print('set OMP_NUM_THREADS=1 for figures of one core', file=sys.stderr)
    try:
        import casadi  # noqa: F401
        peers = not options.no_peers
    except ImportError:
        peers = False
    if not peers:
        print('no peers (pip install casadi); optimum by the compiled solver')
    rows = []
    for T in options.horizons:
        table = compare(T, options.spheres, options.instances, options.solves, peers)
        rows += table
        print(f'\nT = {T}, {options.spheres} spheres, {options.instances} instances, load {os.getloadavg()[0]:.1f}\n'
              f'{"solver":28}{"solves":>8}{"median ms":>11}{"p99 ms":>9}{"steps":>7}{"accurate":>10}{"exact":>8}'
              f'{"ratio":>8}')
        for r in table:
            print(f'{r["solver"]:28}{r["solves"]:8d}{r["median_ms"]:11.3f}{r["p99_ms"]:9.3f}{r["steps"]:7.0f}'
                  f'{r["accurate"]:10.1%}{r["exact"]:8.1%}{r["ratio"]:8.1f}', flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = sweep(options.solves)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print('\ncompiled to 1e-4, warm:  T    K   median ms   p99 ms   us a step')
    for r in more:
        print(f'{r["T"]:26d}{r["K"]:5d}{r["median_ms"]:12.3f}{r["p99_ms"]:9.3f}{r["us_per_step"]:12.1f}')
    print(f'memory grew by {grown} kB over {len(more)} solvers and {len(more) * options.solves} solves')
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(rows + more, file, indent=1)
    return 0


if __name__ == '__main__':
    sys.exit(main())
