"""Rounds of aggregation and fits: what the command leaves, and that it continues."""

import numpy as np
import pytest

from deqmpc import datasets, experts
from deqmpc.policies import model
from deqmpc.training import dagger

COMMAND = ['cartpole', '--rounds', '1', '--episodes', '2', '--steps', '6', '--direct', '16', '--fit', '20']


@pytest.fixture(scope='module')
def demonstrations(tmp_path_factory):
    """Ten short swing-ups."""
    path = tmp_path_factory.mktemp('experts') / 'cartpole.npz'
    experts.make(experts.Settings('cartpole', trajectories=10, restarts=0), path, 1, False, 'deqmpc experts cartpole')
    return path


def test_every_round_adds_answers_and_a_stopped_command_continues(demonstrations, tmp_path, capsys):
    command = [*COMMAND, '--demonstrations', str(demonstrations), '--out', str(tmp_path)]
    assert dagger.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)
    made = [datasets.load(p) for p in (demonstrations, tmp_path / 'round_0.npz', tmp_path / 'round_1.npz')]
    asked = [note['asked'] for note in made[2].about['aggregated']]
    assert asked == [4 * 6, 2 * 6]
    assert [len(m.lengths) - len(made[0].lengths) for m in made[1:]] == [
        made[1].about['aggregated'][0]['answered'], sum(note['answered'] for note in made[2].about['aggregated'])]
    before = (tmp_path / 'fit_0/model/settings.yaml').read_bytes()
    (tmp_path / 'round_1.npz').unlink()
    assert dagger.main(command) == 0
    again = datasets.load(tmp_path / 'round_1.npz')
    assert np.array_equal(again.states, made[2].states)
    assert (tmp_path / 'fit_0/model/settings.yaml').read_bytes() == before
    assert model.load(tmp_path / 'fit_1/model').network.settings.direct == 16


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert dagger.main([*COMMAND, '--demonstrations', str(tmp_path / 'none.npz'), '--out', str(tmp_path)]) == 1
    assert 'none.npz' in capsys.readouterr().err
    assert dagger.main([*COMMAND[:2], '-1', '--out', str(tmp_path)]) == 1
    assert 'rounds = -1; expected an integer >= 0' in capsys.readouterr().err
