"""Comparisons of policies, and their export."""

import csv
import math

import numpy as np
import pytest
from flight_log_synthetic import SyntheticTrial, settle, static_field, write_trial

from deqmpc.statistics import bootstrap_mean, mcnemar
from flight_log import comparison, evaluate, export
from flight_log.evaluation import Evaluation, Failure


def trial(policy, seed, total, failed='', **more):
    start = {} if seed is None else {'seed': str(seed)}
    return Evaluation(bag=f'{policy}/{seed}', robot='cf1', mode='trial', torn=False, goal=[0.0, 0.0, 1.0],
                      duration=20.0, total_return=total, max_steps=200, metadata={'policy': policy, **start},
                      failure=Failure(failed, 'x', 1.0) if failed else None, **more)


def test_the_bootstrap_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for k in range(200):
        low, high = bootstrap_mean(rng.exponential(2.0, 60), resamples=1000, seed=k)
        inside += low <= 2.0 <= high
    assert 180 <= inside <= 200  # 95 % of 200 is 190; the percentile interval of a skewed mean is slightly narrow


def test_the_bootstrap_agrees_with_the_normal_interval_and_repeats_itself():
    values = np.random.default_rng(1).normal(5.0, 1.0, 400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.01), pytest.approx(values.mean() + half, abs=0.01))
    assert bootstrap_mean(values) == (low, high)
    assert all(math.isnan(v) for v in bootstrap_mean(np.array([1.0])))
    assert bootstrap_mean(np.full(10**6, 3.0), resamples=3) == (3.0, 3.0)


def test_mcnemar_is_the_exact_binomial_test():
    # 10 against 2 discordant pairs: 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096) == mcnemar(2, 10)
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0


def test_pairs_take_the_difference_between_starts_out():
    rng = np.random.default_rng(2)
    hard = rng.normal(1000.0, 200.0, 12)  # what the start is worth
    trials = [trial('a', k, hard[k] + 5.0 + rng.normal(0, 1)) for k in range(12)] + [
        trial('b', k, hard[k]) for k in reversed(range(12))] + [trial('b', 99, 0.0)]
    found = comparison.compare(trials)
    [pair] = found.pairs
    assert pair.pairs == 12 and 4.0 < pair.low < 5.0 < pair.high < 6.5 and pair.verdict == 'a better'
    assert found.groups[0].return_high - found.groups[0].return_low > 100.0
    assert comparison.compare(trials[:3] + trials[12:]).pairs[0].verdict == 'too few pairs'


def test_failures_are_paired_and_a_trial_that_never_engaged_earned_nothing():
    trials = [trial('a', k, 100.0) for k in range(8)] + [
        trial('b', k, math.nan if k < 6 else 100.0, 'never_engaged' if k < 6 else '') for k in range(8)]
    found = comparison.compare(trials)
    [pair] = found.pairs
    assert (pair.only_first_failed, pair.only_second_failed) == (0, 6) and pair.p == pytest.approx(2 / 64)
    assert found.groups[1].return_mean == pytest.approx(25.0) and found.groups[1].failures == 6


def test_trials_that_do_not_say_their_start_are_not_paired():
    found = comparison.compare([trial('a', None, 1.0), trial('b', None, 2.0)])
    assert found.pairs[0].pairs == 0 and math.isnan(found.pairs[0].difference)


def test_a_table_of_every_kind_has_the_same_rows(tmp_path):
    trials = [trial('a', 1, 10.0), trial('b', 2, math.nan, 'collision')]
    trials[1].metadata['extra'] = '5'
    export.write_table(tmp_path / 't.csv', trials)
    with (tmp_path / 't.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]['total_return'] == '10.0' and rows[1]['total_return'] == '' and rows[1]['failure'] == 'collision'
    assert rows[0]['meta_extra'] == '' and rows[1]['meta_extra'] == '5'
    pytest.importorskip('pyarrow', reason='Parquet and Arrow need pyarrow (the extra `table`)')
    import pyarrow.feather
    import pyarrow.parquet
    parquet = pyarrow.parquet.read_table(export.write_table(tmp_path / 't.parquet', trials))
    arrow = pyarrow.feather.read_table(export.write_table(tmp_path / 't.arrow', trials))
    assert parquet.column_names == list(rows[0]) and parquet.schema.equals(arrow.schema)
    assert str(parquet.to_pylist()) == str(arrow.to_pylist()) and parquet.schema.field('success').type == 'bool'
    assert parquet.to_pylist()[1]['meta_extra'] == '5' and parquet.to_pylist()[0]['meta_extra'] is None
    with pytest.raises(ValueError, match='expected a name that ends in .csv'):
        export.write_table(tmp_path / 't.xlsx', trials)


def test_latex_and_markdown_carry_names_as_text():
    found = comparison.compare([trial('deq_mpc & co', k, 10.0 + k) for k in range(3)])
    assert r'deq\_mpc \& co & 3 & 11.0' in export.latex(found)
    table = export.markdown(found)
    assert '| deq_mpc & co | 3 | 0 |' in table and table.count('|---') == len(export.GROUP_COLUMNS)


def test_the_command_compares_policies_and_writes_the_tables(tmp_path, capsys):
    bags = []
    for policy, tau in (('fast', 0.4), ('slow', 2.0)):
        for seed in range(2):
            bags.append(str(write_trial(tmp_path / f'{policy}{seed}', SyntheticTrial(
                seconds=3.0, lead=0.3, path=settle(tau=tau), obstacles=static_field([[1.0, -1.0, 1.0]]),
                metadata={'policy': policy, 'seed': str(seed), 'max_steps': '30'}))))
    assert evaluate.main([*bags, '--table', str(tmp_path / 'all.csv'), '--latex', str(tmp_path / 'paper/t.tex')]) == 0
    out = capsys.readouterr().out
    assert 'first - second' in out and 'too few pairs' in out
    assert (tmp_path / 'all.csv').read_text().count('\n') == 5 and 'toprule' in (tmp_path / 'paper/t.tex').read_text()
    assert evaluate.main([*bags, '--jobs', '2', '--json']) == 0
    assert '"pairs": 2' in capsys.readouterr().out
    assert evaluate.main([*bags, '--table', str(tmp_path / 'all.xls')]) == 1
    assert 'expected a name' in capsys.readouterr().err
