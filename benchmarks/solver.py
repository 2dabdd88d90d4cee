"""Solvers of one MPC instance against each other: time, iterations, accuracy, memory. Markdown tables.

  OMP_NUM_THREADS=1 python benchmarks/solver.py [--horizons 5 20 50] [--solves 1000] [--json solver.json]
  OMP_NUM_THREADS=1 python benchmarks/solver.py --sweep      growth over horizon, spheres and batch (sweep.py)

instances.py has the problem, peers.py the other solvers. All get the same instances and warm start; the optimum is
Ipopt's with tol 1e-8 from that start, or the compiled solver's where CasADi is not installed.

Columns: solves timed; ms of whole Python calls, median and 99th percentile; Newton, SQP or Gauss-Newton steps, median;
success, the share of instances with all violations <= 1e-4 and cost within 1 % of the optimum; exact, the same with
1e-6 and 1e-4; growth of the peak memory of the process over the solves after the tenth; ratio of medians to the
compiled solver to 1e-4. A lower cost than the optimum's is a success. The solvers take turns, a pass over all
instances each, so that all meet the same load; one whose solves have taken --seconds in this table is not run on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import peers
import sweep
import table
import torch
from instances import instances, judge, problem

from deqmpc.realtime import RealtimeSolver, Settings, WarmStart
from deqmpc.solvers import augmented_lagrangian as al

WARM_UP = 10  # solves before memory is watched


class Ours:
    """The compiled solver: from the warm start, `single` from x_init at every knot, `cold` by solve_cold."""

    def __init__(self, T, K, settings, start='warm'):
        self.solver, self.start = RealtimeSolver(problem(T), K, settings), start

    def __call__(self, g):
        given = g['x_init'], g['x_ref'], g['u_ref'], g['spheres'], g['radii']
        if self.start == 'cold':
            s = self.solver.solve_cold(*given)
        else:
            s = self.solver.solve(*given, WarmStart(g['x'], g['u']) if self.start == 'warm' else None)
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


def own(T: int, K: int) -> dict:
    """Name -> solver of this project."""
    return {
        'compiled AL, 2 x 2 steps': Ours(T, K, al.Settings(iterations=2, gn_steps=2, optimality=0.0)),
        BASE: Ours(T, K, Settings(tolerance=1e-4)),
        'compiled to 1e-6, warm': Ours(T, K, Settings()),
        'compiled to 1e-6, cold, one start': Ours(T, K, Settings(), 'single'),
        'compiled to 1e-6, cold, best of two': Ours(T, K, Settings(), 'cold'),
        'torch AL to 1e-4, warm': Torch(T, al.Settings()),
    }


BASE = 'compiled to 1e-4, warm'


@dataclass
class Record:
    """What a solver did."""

    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # one an instance, as the next two
    success: list[bool] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    grown_kb: int | None = None  # peak memory of the process, after the first WARM_UP solves


def peak_memory() -> int:
    """kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def a_pass(record: Record, solve, p, given, optimum, budget: float):
    """Solve all instances once, up to `budget` seconds."""
    before = peak_memory() if len(record.seconds) >= WARM_UP else None
    for g, best in zip(given, optimum, strict=True):
        begin = time.perf_counter()
        x, u, steps = solve(g)
        record.seconds.append(time.perf_counter() - begin)
        if len(record.exact) < len(given):
            violation, cost = judge(p, g, x, u)
            record.success.append(bool(violation <= 1e-4 and cost <= 1.01 * best))
            record.exact.append(bool(violation <= 1e-6 and cost <= (1 + 1e-4) * best))
            record.steps.append(steps() if callable(steps) else steps)  # CasADi's take long to collect
        if before is None and len(record.seconds) == WARM_UP:
            before = peak_memory()
        budget -= record.seconds[-1]
        if budget < 0:
            break
    if before is not None:
        record.grown_kb = (record.grown_kb or 0) + peak_memory() - before


@dataclass
class Row:
    """A line of the table."""

    solver: str
    T: int
    K: int
    solves: int
    median_ms: float
    p99_ms: float
    steps: float
    success: float
    exact: float
    grown_kb: int | None
    ratio: float | None = None

    def print(self):
        table.row(self.solver, self.solves, self.median_ms, self.p99_ms, self.steps, f'{self.success:.1%}',
                  f'{self.exact:.1%}', self.grown_kb, self.ratio)


def compare(T: int, K: int, count: int, solves: int, seconds: float, with_peers: bool) -> list[Row]:
    """Print the table of one horizon and number of spheres."""
    named = own(T, K)
    if with_peers:
        named |= peers.casadi_peers(T, K)
        named |= peers.mpc_pytorch_peers(T) if K == 0 else {}
    p, given = problem(T), instances(T, K, count)
    oracle = peers.ipopt(T, K, 1e-8) if 'Ipopt, cold' in named else Ours(T, K, Settings())
    optimum = [judge(p, g, *oracle(g)[:2])[1] for g in given]
    records = {name: Record() for name in named}
    for solve in named.values():
        solve(given[0])
    for _ in range(max(1, -(-solves // count))):
        for name, solve in named.items():
            left = seconds - sum(records[name].seconds)
            if left > 0:
                a_pass(records[name], solve, p, given, optimum, left)
    rows = [summary(name, T, K, record) for name, record in records.items()]
    base = next(r.median_ms for r in rows if r.solver == BASE)
    print(f'\nT = {T}, {K} spheres, {count} instances, load {os.getloadavg()[0]:.1f}')
    table.header('solver', 'solves', 'median ms', 'p99 ms', 'steps', 'success', 'exact', 'growth kB', 'ratio')
    for r in rows:
        r.ratio = r.median_ms / base
        r.print()
    if with_peers and K == 40:
        for name, median, p99, steps, success in peers.ELSEWHERE.get(T, []):
            table.row(f'{name} (not measured here)', None, median, p99, steps, success, None, None, None)
    return rows


def summary(name, T, K, r: Record) -> Row:
    ms = 1e3 * np.array(r.seconds)
    return Row(name, T, K, len(ms), float(np.median(ms)), float(np.percentile(ms, 99)), float(np.median(r.steps)),
               float(np.mean(r.success)), float(np.mean(r.exact)), r.grown_kb)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--horizons', type=int, nargs='+', default=[5, 20, 50])
    parser.add_argument('--spheres', type=int, default=40)
    parser.add_argument('--instances', type=int, default=100)
    parser.add_argument('--solves', type=int, default=1000, help='of each solver')
    parser.add_argument('--seconds', type=float, default=30.0, help='at most, of each solver in each table')
    parser.add_argument('--no-peers', action='store_true')
    parser.add_argument('--sweep', action='store_true', help='growth over horizon, spheres and batch instead')
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 20, 200, 1000], help='of the sweep')
    parser.add_argument('--json', help='write the rows to this file')
    options = parser.parse_args()
    torch.set_num_threads(1)
    if os.environ.get('OMP_NUM_THREADS') != '1':
        print('set OMP_NUM_THREADS=1 for figures of one core', file=sys.stderr)
    if options.sweep:
        rows = sweep.over_size(options.solves) + sweep.over_batch(options.batches, options.solves)
    else:
        rows = []
        for T in options.horizons:
            rows += compare(T, options.spheres, options.instances, options.solves, options.seconds,
                            not options.no_peers)
        rows += compare(options.horizons[0], 0, options.instances, options.solves, options.seconds,
                        not options.no_peers)
        rows = [asdict(r) for r in rows]
        if not options.no_peers:
            print(f'\n{peers.NOTE}')
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == '__main__':
    sys.exit(main())
