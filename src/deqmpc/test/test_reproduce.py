"""deqmpc reproduce: grids say what the figures vary, equal runs happen once, verdicts follow their rule."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc import datasets, reproduce, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.reproduce import BUDGETS, MPC_VARIANTS, Check, Plan, Results, command, runs
from deqmpc.reproduce.results import verdict
from deqmpc.training.imitation import Settings, parts

FIGURES = [name for name in command.experiments() if name.startswith('fig')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with 40 short demonstrations of the quadrotor; what is trained in it stays for the module."""
    made = tmp_path_factory.mktemp('reproduce')
    task = tasks.make('quadrotor')
    x, _ = task.sample(40, torch.Generator().manual_seed(0))
    states = (0.05 * x).repeat_interleave(12, dim=0).numpy() * np.tile(0.9 ** np.arange(12), 40)[:, None]
    d = Demonstrations(states, np.tile(task.u_ref.numpy(), (480, 1)), np.full(40, 12), np.zeros((40, 0, 3)),
                       np.zeros((40, 0, 3)), np.zeros((40, 0)))
    datasets.save(made / 'quadrotor.npz', d)
    return made


def reproduced(folder: Path, name: str, *words: str) -> int:
    return reproduce.main([name, '--budget', 'smoke', '--demonstrations', str(folder), '--runs', str(folder / 'runs'),
                           '--out', str(folder / name), *words])


def cells(name: str, budget: str):
    return command.load(command.experiments()[name]).cells(Plan(BUDGETS[budget], BUDGETS[budget].seeds))


def row(variant: str, error: float, seed: int = 0, x=1) -> dict:
    return {'task': 'quadrotor', 'variant': variant, 'x': x, 'seed': seed, 'error': error, 'streamed': error,
            'return': 1.0 - error, 'failure_share': 0.0}


def test_there_is_an_experiment_for_table_1_and_each_of_figures_2_to_10_and_the_list_names_its_claim(capsys):
    assert list(command.experiments())[:10] == [*(f'fig{i}' for i in range(2, 11)), 'table1']
    assert reproduce.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    for number, line in zip(range(2, 11), said, strict=False):
        assert line.startswith(f'Figure {number}: ') and line.endswith('.')
    assert said[9].startswith('Table 1: ')


@pytest.mark.parametrize('budget', sorted(BUDGETS))
@pytest.mark.parametrize('name', FIGURES)
def test_a_grid_has_every_variant_at_every_value_with_every_seed_and_nothing_twice(name, budget):
    made = cells(name, budget)
    variants, seeds = {c.run.variant for c in made}, {c.run.training.seed for c in made}
    assert seeds == set(range(BUDGETS[budget].seeds)) and all(
        c.run.training.seed == c.run.training.split_seed for c in made)
    assert variants >= (set(MPC_VARIANTS) if budget != 'smoke' else {'deq_mpc_nn', 'diff_mpc_nn'})
    assert len(made) == len(variants) * len(seeds) * len({(c.run.task, c.x) for c in made})
    assert len({(c.run, c.test) for c in made}) == len(made)


def test_the_full_budget_is_the_papers():
    made = [c.run for c in cells('fig2', 'full')]
    assert {(r.training.steps, r.training.batch) for r in made} == {(20000, 200)}
    assert {r.hidden for r in made if r.task == 'quadrotor'} == {512}
    assert {r.hidden for r in made if r.task == 'pendulum'} == {256}


def test_a_policy_that_several_figures_need_is_one_run():
    base = {c.run for c in cells('fig2', 'small') if c.run.task == 'quadrotor' and c.run.variant in MPC_VARIANTS}
    for name in ('fig4', 'fig6', 'fig7', 'fig8', 'fig9'):
        assert base <= {c.run for c in cells(name, 'small')}, name


@pytest.mark.parametrize('name', FIGURES)
def test_every_run_is_a_command_that_deqmpc_train_takes(name):
    for cell in cells(name, 'small'):
        a = runs.train.parser().parse_args(cell.run.command(Path('d.npz'), Path('out')))
        assert (a.task, a.policy, a.hidden, a.seed) == (
            cell.run.task, cell.run.variant, cell.run.hidden, cell.run.training.seed)
        tasks.make(a.task, **runs.train._numbers(a.change, '--change'))
        runs.Method(**runs.train._numbers(a.method, '--method'))


def test_a_smoke_run_trains_tests_plots_and_judges_and_the_same_command_again_does_nothing_twice(folder, capsys):
    assert reproduced(folder, 'fig9') == 0
    said = capsys.readouterr().out
    assert 'Verdict: **' in said and (folder / 'fig9/fig9.png').read_bytes().startswith(b'\x89PNG')
    assert said.startswith((folder / 'fig9/table.md').read_text())
    with (folder / 'fig9/results.csv').open() as file:
        made = list(csv.DictReader(file))
    assert {(r['variant'], r['x']) for r in made} == {(v, T) for v in ('deq_mpc_nn', 'diff_mpc_nn')
                                                      for T in ('3', '4')}
    assert all(math.isfinite(float(r['error'])) and math.isfinite(float(r['return'])) for r in made)
    before = {p: p.stat().st_mtime_ns for p in (folder / 'runs').rglob('*')}
    assert reproduced(folder, 'fig9') == 0
    assert before == {p: p.stat().st_mtime_ns for p in (folder / 'runs').rglob('*')}


def test_the_number_of_iterations_is_changed_when_tested_and_not_trained_again(folder):
    assert reproduced(folder, 'fig8') == 0
    trained = [p for p in (folder / 'runs').glob('*/model') if len(list(p.parent.glob('test-*.json'))) == 2]
    assert len(trained) == 2
    found = [json.loads(p.read_text())['test']['method'] for p in trained[0].parent.glob('test-*.json')]
    assert sorted(v for [[_, v]] in found) in ([1, 6], [2, 12])


def test_figure_10_has_the_error_after_every_iterate_and_the_last_is_the_validation_error(folder):
    assert reproduced(folder, 'fig10') == 0
    with (folder / 'fig10/results.csv').open() as file:
        for r in csv.DictReader(file):
            by_iterate = json.loads(r['by_iterate'])
            assert len(by_iterate) == (int(r['x']) // 2 if r['variant'] == 'deq_mpc_nn' else 1)
            assert by_iterate[-1] == pytest.approx(float(r['error']), rel=1e-6)


def test_missing_demonstrations_and_wrong_names_are_one_clear_sentence(folder, capsys):
    assert reproduced(folder, 'fig2', '--tasks', 'cartpole') == 1
    assert '`deqmpc experts cartpole`' in capsys.readouterr().err
    for words, expected in ((['fig2', '--tasks', 'bicycle'], 'bicycle'), (['fig2', '--variants', 'mpc'], 'mpc'),
                            (['fig99'], 'fig99'), (['fig2', '--seeds', '0'], '--seeds 0')):
        assert reproduced(folder, *words) == 1
        assert expected in capsys.readouterr().err


def test_table_1_names_the_models_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(['table1', '--budget', 'small', '--out', str(tmp_path / 'out')]) == 1
    assert 'deq_mpc_deq, deq_mpc_nn, diff_mpc_deq, diff_mpc_nn' in capsys.readouterr().err


def test_fewer_demonstrations_are_among_more_and_the_same_ones_validate(folder):
    d = datasets.load(folder / 'quadrotor.npz')
    few, more = (parts(d, Settings(split_seed=1), count) for count in (10, 20))
    assert len(few[0]) == 10 and set(few[0]) < set(more[0]) < set(parts(d, Settings(split_seed=1))[0])
    assert np.array_equal(few[1], more[1]) and not set(few[1]) & set(more[0])
    with pytest.raises(ValueError, match='trajectories = 37; expected 1 to 36'):
        parts(d, Settings(), 37)


@pytest.mark.parametrize('budget', ['small', 'medium', 'full'])
def test_figure_3_asks_for_no_more_demonstrations_than_are_released_and_all_of_them_is_figure_2s_run(budget):
    path = Path(os.environ.get('DEQMPC_DATA', 'absent')) / 'experts/quadrotor.npz'
    if not path.exists():
        pytest.skip(f'needs the released demonstrations {path}')
    made, released = cells('fig3', budget), datasets.load(path)
    for cell in made:
        train, _ = parts(released, cell.run.training, cell.run.trajectories)
        assert len(train) == cell.x
    assert {cell.run for cell in made if cell.x == max(c.x for c in made)} <= {c.run for c in cells('fig2', budget)}


def test_a_statistic_is_mean_standard_deviation_and_number_of_runs():
    stat = Results([row('nn', e, seed) for seed, e in enumerate((1.0, 2.0, 4.0))]).stat('error', variant='nn')
    assert stat.mean == pytest.approx(7 / 3) and stat.sd == pytest.approx(math.sqrt(7 / 3)) and stat.runs == 3


def test_a_claim_holds_where_all_checks_are_true_partly_from_half_on_and_else_not():
    def judged(*truths):
        return verdict([Check('', t) for t in truths])
    assert judged(True, True) == 'holds'
    assert judged(True, False) == judged(True, True, False) == 'holds partly'
    assert judged(False, False) == judged(True, False, False) == 'does not hold'
    assert judged() == 'not judged'


def test_figure_2_counts_tasks_and_a_nan_never_helps_a_claim():
    fig2 = command.load(command.experiments()['fig2'])
    good = Results([row('deq_mpc_nn', 0.1), row('diff_mpc_nn', 0.2), row('nn', 0.3)])
    assert [c.true for c in fig2.checks(good)] == [True, True, True]
    broken = Results([row('deq_mpc_nn', math.nan), row('diff_mpc_nn', 0.2)])
    assert not any(c.true for c in fig2.checks(broken))


def test_gains_compare_the_last_step_of_each_method():
    rows = [row(v, e, x=x) for v, errors in (('deq_mpc_nn', (4.0, 2.0, 1.0)), ('diff_mpc_nn', (4.0, 2.0, 1.9)))
            for x, e in zip((10, 20, 40), errors, strict=True)]
    assert [c.true for c in reproduce.gains(Results(rows))] == [True, True]


def test_roughness_is_how_far_the_loss_rises_above_its_lowest_before(tmp_path):
    (tmp_path / 'metrics.csv').write_text('step,loss\n' + ''.join(f'{i},{v}\n' for i, v in enumerate(
        (9.0, 2.0, 1.0, 3.0, 0.5, 0.6))))
    fig6 = command.load(command.experiments()['fig6'])
    assert fig6.metrics({'folder': str(tmp_path)}) == {'roughness': pytest.approx(3.0)}
