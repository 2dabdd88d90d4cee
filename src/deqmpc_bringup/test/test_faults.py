"""The short fault matrix: each fault in the phases where it tells most."""

import dataclasses
import json
import math

import pytest

from deqmpc_bringup import faults_matrix
from deqmpc_bringup.faults import FAULTS, PHASES, Fault, nothing
from deqmpc_bringup.faults_flight import fly
from deqmpc_bringup.faults_matrix import cases

SHORT = cases(FAULTS, short=True)


@pytest.mark.parametrize(('fault', 'phase'), SHORT, ids=[f'{f.name}-{p}' for f, p in SHORT])
def test_a_fault_gets_its_answer_in_time_and_the_drone_comes_down(fault, phase):
    outcome = fly(fault, phase)
    assert not outcome.problems, outcome


def test_the_matrix_has_at_least_25_faults_in_each_phase_of_flight():
    for phase in PHASES:
        assert len({f.name for f in FAULTS if f.answers(phase)}) >= 25
    assert len({f.name for f in FAULTS}) == len(FAULTS)


def test_every_fault_is_flown_in_the_short_matrix():
    assert {f.name for f, _ in SHORT} == {f.name for f in FAULTS}
    assert {p for _, p in SHORT} == set(PHASES)


def test_equal_seeds_give_equal_outcomes_to_the_bit():
    fault = next(f for f in FAULTS if f.name == 'mocap drop-outs 20 %')
    first, again = (repr(dataclasses.astuple(fly(fault, 'holding', seed=3))) for _ in range(2))
    assert first == again


def test_an_answer_that_is_not_expected_is_a_problem():
    quiet = Fault('nothing at all', lambda graph, rng: nothing, 'cut cut cut cut cut')
    outcome = fly(quiet, 'holding')
    assert outcome.answer == 'none' and outcome.end == 'landed' and math.isnan(outcome.reaction)
    assert outcome.problems == ('answer none, expected cut',)


def test_a_fault_without_an_answer_for_each_phase_is_refused():
    with pytest.raises(ValueError, match='one word for each of armed, taking_off'):
        Fault('half', lambda graph, rng: nothing, 'none none')


def test_the_command_writes_table_and_outcomes(tmp_path, capsys):
    status = faults_matrix.main(['--short', '--only', 'nan', '--jobs', '1', '--json', str(tmp_path / 'f.json'),
                                 '--markdown', str(tmp_path / 'f.md')])
    data = json.loads((tmp_path / 'f.json').read_text())
    assert status == 0 and data['summary']['undecided'] == 0
    assert {o['fault'] for o in data['outcomes']} == {'mocap NaN', 'policy plans NaN'}
    assert (tmp_path / 'f.md').read_text().count('\n') == 2 + len(data['outcomes'])
    assert 'hold>land' in capsys.readouterr().out


def test_an_unknown_fault_is_named(capsys):
    assert faults_matrix.main(['--only', 'meteorite']) == 2
    assert "--only 'meteorite'" in capsys.readouterr().err
