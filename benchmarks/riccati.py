"""Time of the Riccati recursion against that of the associative scan, over horizon and batch. One thread.

  python benchmarks/riccati.py [--device cuda] [--float32] [--samples 30] [--json FILE]

A Markdown table; every line: median ms of a factorisation with one solve, of a solve alone (one more right-hand
side), how many times faster the scan's factorisation with one solve is, and which one `linear_solver: auto` takes. Both
are timed in turns, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import table
import torch

from deqmpc.solvers import riccati, riccati_scan

STATES, INPUTS = 12, 4
CASES = [(1, 5), (1, 10), (1, 15), *((batch, stages) for batch in (1, 4, 64, 200) for stages in (20, 100, 500))]


def problem(batch: int, stages: int, n: int, m: int, **where):
    """A stable system with random cost, D = 1e-4, and a right-hand side, seeded."""
    torch.manual_seed(0)

    def spd(*shape):
        a = torch.randn(*shape, shape[-1])
        return a @ a.mT / shape[-1] + 0.1 * torch.eye(shape[-1])
    H, F = spd(batch, stages, n + m), torch.randn(batch, stages, n, n + m) / (n + m) ** 0.5
    data = (H, spd(batch, n), F, torch.full((batch, stages + 1, n), 1e-4), torch.randn(batch, stages, n + m, 1),
            torch.randn(batch, n, 1), torch.randn(batch, stages + 1, n, 1))
    return [v.to(**where) for v in data]


def timed(call, device) -> float:
    """ms."""
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(batch, stages, samples, **where):
    """Median ms of factor + solve and of solve alone, by name."""
    data = problem(batch, stages, STATES, INPUTS, **where)
    solvers = {'sequential': riccati, 'parallel': riccati_scan}
    factors = {name: s.factor(*data[:4]) for name, s in solvers.items()}
    taken = {name: [] for name in solvers}
    for _ in range(samples + 2):
        for name, s in solvers.items():
            factoring = timed(lambda s=s: s.factor(*data[:4]), where['device'])
            taken[name].append((factoring, timed(lambda s=s, name=name: s.solve(factors[name], *data[4:]),
                                                 where['device'])))
    return {name: (median(f + s for f, s in v[2:]), median(s for _, s in v[2:])) for name, v in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', type=torch.device)
    parser.add_argument('--float32', action='store_true')
    parser.add_argument('--samples', default=30, type=int, help='timings of every case')
    parser.add_argument('--largest', default=10 ** 6, type=int, help='batch times N, of the cases that are run')
    parser.add_argument('--json', type=Path, help='write the table there, too')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = dict(device=arguments.device, dtype=torch.float32 if arguments.float32 else torch.float64)
    print(f'n = {STATES}, m = {INPUTS}, {where["dtype"]}, {arguments.device}; ms')
    table.header('batch', 'N', 'sequential', 'its solve', 'parallel', 'its solve', 'ratio', 'auto')
    rows = []
    for batch, stages in (case for case in CASES if case[0] * case[1] <= arguments.largest):
        samples = max(3, min(arguments.samples, 60_000 // (batch * stages)))
        ms = measure(batch, stages, samples, **where)
        (sequential, seq_solve), (parallel, par_solve) = ms['sequential'], ms['parallel']
        auto = 'parallel' if riccati_scan.is_faster(batch, stages, arguments.device) else 'sequential'
        table.row(batch, stages, sequential, seq_solve, parallel, par_solve, sequential / parallel, auto)
        rows.append(dict(batch=batch, stages=stages, samples=samples, auto=auto, **ms))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
