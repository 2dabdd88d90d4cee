"""The simulator against real flights (NanoBench)."""

import json
import os
from pathlib import Path

import pytest

from sim_env.flight_comparison import RecordedFlight, compare, main

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get('DEQMPC_DATA', ROOT.parent / 'shared' / 'data')) / 'flights'
SLOW = DATA / 'mell_trefoil_slow_rep1.csv'
needs_data = pytest.mark.skipif(not SLOW.exists(), reason=f'no recorded flights at {DATA} (set DEQMPC_DATA)')


@needs_data
def test_the_simulated_slow_trefoil_stays_within_a_tenth_of_a_metre_of_the_flown_one():
    result = compare(RecordedFlight.load(SLOW))
    assert result.duration > 15.0
    assert result.difference < 0.10
    assert result.tracking_simulated == pytest.approx(result.tracking_recorded, rel=0.1)


@needs_data
def test_the_flight_was_commanded_by_positions_not_by_full_states():
    flight = RecordedFlight.load(SLOW)
    assert compare(flight, setpoints='full_state').difference > 2.0 * compare(flight).difference


@needs_data
def test_the_command_prints_one_json_object_a_flight(capsys):
    assert main([str(SLOW), '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['name'] == SLOW.name and result['setpoints'] == 'position' and result['difference'] < 0.10


@pytest.mark.parametrize('text, message', [
    ('a,b\n1,2\n', 'no column t, px'), ('', 'no column t, px')])
def test_a_file_that_is_no_flight_is_named_with_what_is_missing(tmp_path, capsys, text, message):
    path = tmp_path / 'x.csv'
    path.write_text(text)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error


def test_a_missing_file_is_named(capsys):
    assert main(['/no/such/flight.csv']) == 2
    assert '/no/such/flight.csv' in capsys.readouterr().err
