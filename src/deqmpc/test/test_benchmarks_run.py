"""The benchmarks run, each with a tiny budget and without peers where those take long to build."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc.realtime import build

FOLDER = Path(__file__).resolve().parents[3] / 'benchmarks'
DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).resolve().parents[4] / 'shared' / 'data'))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f'{FOLDER} not found: not a checkout')
compiled = pytest.mark.skipif(not build.available(), reason='no C compiler on this machine')
experts = pytest.mark.skipif(not (DATA / 'experts/quadrotor.npz').exists(),
                             reason=f'{DATA}/experts/quadrotor.npz not found: not part of the repository')


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *arguments) -> what it printed, in this process: importing torch again would take longer."""
    threads, here = torch.get_num_threads(), set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv('DEQMPC_DATA', str(DATA))

    def call(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        try:
            runpy.run_path(str(FOLDER / script), run_name='__main__')
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out
    yield call
    torch.set_num_threads(threads)
    for name in set(sys.modules) - here:
        if getattr(sys.modules[name], '__file__', None) and Path(sys.modules[name].__file__).parent == FOLDER:
            del sys.modules[name]


def rows(text):
    """The lines of Markdown tables as lists of cells, each table checked to be rectangular."""
    lines = [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]
    width = None
    for before, line in zip([[], *lines], lines, strict=False):
        if set(''.join(line)) <= set('-:'):
            width = len(before)
            assert len(line) == width
    assert width
    return lines


@compiled
def test_solvers_are_compared_and_the_compiled_one_is_right(run, tmp_path):
    file = tmp_path / 'solver.json'
    rows(run('solver.py', '--horizons', 5, '--instances', 6, '--solves', 12, '--seconds', 0.2, '--no-peers', '--json',
             file))
    made = json.loads(file.read_text())
    assert {(r['T'], r['K']) for r in made} == {(5, 40), (5, 0)}
    to_tolerance = [r for r in made if r['solver'].startswith('compiled to')]
    assert len(to_tolerance) == 8
    for r in to_tolerance:
        assert r['success'] == 1.0 and r['solves'] >= 1 and 0 < r['median_ms'] <= r['p99_ms'] and r['steps'] > 0


@compiled
def test_the_sweep_goes_over_horizon_spheres_and_batch(run, tmp_path):
    file = tmp_path / 'sweep.json'
    text = run('solver.py', '--sweep', '--solves', 3, '--batches', 1, 8, '--json', file)
    made = json.loads(file.read_text())
    assert [r['sweep'] for r in made] == ['T'] * 4 + ['K'] * 4 + ['batch'] * 4
    assert text.count('log-log slope') == 4 and 'nan' not in text
    assert len(rows(text)) == 12 + 2 * 4


def test_the_slope_is_the_exponent_of_a_power(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    slope = runpy.run_path(str(FOLDER / 'sweep.py'))['slope']
    sizes = np.array([0.0, 1.0, 3.0, 20.0])
    assert abs(slope(sizes, 4.0 + 0 * sizes)) < 1e-12 and abs(slope(sizes, 4.0 * sizes ** 1.3) - 1.3) < 1e-12


@compiled
@pytest.mark.parametrize('make', ['casadi_peers', 'mpc_pytorch_peers'])
def test_peers_find_the_optimum_where_they_are_installed(run, monkeypatch, make):
    """Uncompiled, so that no compiler is waited for: two stages."""
    pytest.importorskip({'casadi_peers': 'casadi', 'mpc_pytorch_peers': 'mpc'}[make])
    monkeypatch.syspath_prepend(str(FOLDER))
    T, K = 2, 3 if make == 'casadi_peers' else 0
    peers = runpy.run_path(str(FOLDER / 'peers.py'))
    instances = runpy.run_path(str(FOLDER / 'instances.py'))
    peers['JIT'].clear()
    from deqmpc.realtime import RealtimeSolver, WarmStart
    g, p = instances['instances'](T, K, 1)[0], instances['problem'](T)
    best = RealtimeSolver(p, K).solve(g['x_init'], g['x_ref'], g['u_ref'], g['spheres'], g['radii'],
                                      WarmStart(g['x'], g['u'])).cost
    found = peers[make](*(T, K) if K else (T,))
    assert len(found) == (4 if K else 2)
    for name, solve in found.items():
        x, u, steps = solve(g)
        violation, cost = instances['judge'](p, g, x, u)
        if '1 iteration' not in name:
            assert violation < 1e-4 and abs(cost - best) < 1e-2 * best, name
        assert (steps() if callable(steps) else steps) >= 1


def test_the_riccati_recursions_are_compared(run):
    assert len(rows(run('riccati.py', '--largest', 15, '--samples', 1))) == 2 + 3


@experts
def test_networks_and_control_steps_are_timed(run):
    assert len(rows(run('network.py', '--hidden', 16, '--count', 4))) == 2 + 8
    assert len(rows(run('network.py', '--hidden', 16, '--count', 3, '--step'))) == 2 + 6


@experts
def test_a_training_step_is_timed(run):
    line = rows(run('training_step.py', '--hidden', 16, '--batch', 2, '--steps', 1))[-1]
    assert all(float(cell) > 0 for cell in line[3:])


def test_the_running_graph_has_a_benchmark_that_starts(run):
    assert '--seconds' in run('graph.py', '--help')
