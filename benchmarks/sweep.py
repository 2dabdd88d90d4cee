"""How the cost of a solve grows with the horizon T, the number of spheres K and the batch.

The slope is that of a least-squares line through log(time) over log(size): 1 is linear growth, less where a part of
the time does not depend on the size. For T and K the line `fixed + each * size` is fitted to the time of one Newton
step as well, as the number of steps depends on the instance. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import table
import torch
from instances import instances, problem

from deqmpc.problem import Instances
from deqmpc.realtime import RealtimeSolver, Settings, WarmStart
from deqmpc.solvers import augmented_lagrangian as al

HORIZONS, SPHERES = (5, 10, 20, 50), (0, 10, 40, 160)
FIXED = al.Settings(iterations=2, gn_steps=2, optimality=0.0)  # as many steps in every sample
SECONDS = 20.0  # at most, for a line over batches


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Of log(time) over log(size); sizes of 0 are left out."""
    points = [(np.log(s), np.log(t)) for s, t in zip(sizes, times, strict=True) if s > 0]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float('nan')


def over_size(solves: int) -> list[dict]:
    """Solves to 1e-4 from warm starts: over T with 40 spheres, over K at T = 5."""
    rows = []
    for variable, cases in (('T', [(T, 40) for T in HORIZONS]), ('K', [(5, K) for K in SPHERES])):
        print(f'\ncompiled to 1e-4, warm, over {variable}')
        table.header('T', 'K', 'median ms', 'p99 ms', 'us a step')
        made = []
        for T, K in cases:
            made.append(dict(sweep=variable, T=T, K=K, **timed_solves(T, K, solves)))
            table.row(*(made[-1][name] for name in ('T', 'K', 'median_ms', 'p99_ms', 'us_per_step')))
        sizes, us = [r[variable] for r in made], [r['us_per_step'] for r in made]
        each, fixed = np.polyfit(sizes, us, 1)
        print(f'\nlog-log slope over {variable}: {slope(sizes, [r["median_ms"] for r in made]):.2f} of a solve, '
              f'{slope(sizes, us):.2f} of a step; a step takes {fixed:.1f} + {each:.3f} {variable} us, within '
              f'{max(abs(fixed + each * s - t) / t for s, t in zip(sizes, us, strict=True)):.0%}')
        rows += made
    return rows


def timed_solves(T: int, K: int, solves: int, count: int = 20) -> dict:
    """Median and p99 of `solves` solves of `count` instances, and the median time of one step."""
    given, solver = instances(T, K, count), RealtimeSolver(problem(T), K, Settings(tolerance=1e-4))
    seconds, steps = [], []
    for _ in range(max(1, solves // count)):
        for g in given:
            start = WarmStart(g['x'], g['u'])
            begin = time.perf_counter()
            s = solver.solve(g['x_init'], g['x_ref'], g['u_ref'], g['spheres'], g['radii'], start)
            seconds.append(time.perf_counter() - begin)
            steps.append(s.steps)
    return dict(median_ms=1e3 * float(np.median(seconds)), p99_ms=1e3 * float(np.percentile(seconds, 99)),
                us_per_step=1e6 * float(np.median(np.divide(seconds, steps))))


def over_batch(batches: Sequence[int], solves: int, T: int = 5, K: int = 40) -> list[dict]:
    """Two AL iterations of two Gauss-Newton steps for a batch, and the gradient by x_ref; torch and compiled."""
    p = problem(T)
    compiled = RealtimeSolver(p, K, FIXED)
    ways: dict[str, Callable] = {'torch (al.solve)': lambda data, start: al.solve(p, data, start, FIXED)}
    if compiled.compiled:
        ways['compiled (solve_batch)'] = compiled.solve_batch
    given, rows = instances(T, K, min(max(batches), 200)), []
    for name, solve in ways.items():
        print(f'\n{name}, 2 x 2 steps, T = {T}, {K} spheres')
        table.header('batch', 'calls', 'forward ms', 'with gradient ms', 'us a sample, forward')
        made = []
        for B in batches:
            made.append(dict(sweep='batch', solver=name, batch=B, **timed_batches(p, solve, given, B, solves)))
            r = made[-1]
            table.row(B, r['calls'], r['forward_ms'], r['gradient_ms'], 1e3 * r['forward_ms'] / B)
        print('\nlog-log slope over the batch: {:.2f} forward, {:.2f} with gradient'.format(
            *(slope(batches, [r[k] for r in made]) for k in ('forward_ms', 'gradient_ms'))))
        rows += made
    return rows


def timed_batches(p, solve, given: list[dict], B: int, solves: int) -> dict:
    """Median ms of a batch of B, forward alone and with the gradient."""
    data, start = batch(p, given, B, FIXED)
    forward, gradient, spent = [], [], 0.0
    while len(forward) < max(3, min(30, solves // B)) and (spent < SECONDS or len(forward) < 1):
        begin = time.perf_counter()
        with torch.no_grad():
            solve(data, start)
        middle = time.perf_counter()
        data.x_ref.requires_grad_(True)
        torch.autograd.grad(solve(data, start).x.square().sum(), data.x_ref)
        data.x_ref.requires_grad_(False)
        end = time.perf_counter()
        forward.append(middle - begin)
        gradient.append(end - middle)
        spent += end - begin
    return dict(calls=len(forward), forward_ms=1e3 * float(np.median(forward)),
                gradient_ms=1e3 * float(np.median(gradient)))


def batch(p, given: list[dict], B: int, settings: al.Settings) -> tuple[Instances, al.WarmStart]:
    """B of the instances, from the first again where there are not as many, with their warm starts."""
    taken = [given[i % len(given)] for i in range(B)]
    tensors = {name: torch.from_numpy(np.stack([g[name] for g in taken])) for name in given[0]}
    data = p.instances(*(tensors[name] for name in ('x_init', 'x_ref', 'u_ref', 'spheres', 'radii')))
    return data, al.guess(p, data, tensors['x'], tensors['u'], settings)
