"""Aggregation: states that a policy visits, the expert's answers there, and where they join the demonstrations."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from deqmpc import datasets, tasks
from deqmpc.baselines import GoalPlanner
from deqmpc.datasets import Demonstrations
from deqmpc.experts import Trajectory
from deqmpc.rollouts import rollout
from deqmpc.tasks import QPoleDynObs, QPoleObs
from deqmpc.training import aggregate
from deqmpc.training.aggregate import Settings, answers, joined, visited

TASK = tasks.make('qpole')


def demonstrations(task=TASK, families=5, length=8) -> Demonstrations:
    """Nominal trajectories that stay at their starts, each with one restart."""
    x, spheres = task.sample(2 * families, torch.Generator().manual_seed(0))
    return Demonstrations(x.repeat_interleave(length, dim=0).numpy(), np.zeros((2 * families * length, 4)),
                          np.full(2 * families, length), spheres.centers.numpy(), spheres.velocity.numpy(),
                          spheres.radii.numpy(), {'task': task.name}, np.arange(2 * families) % 2 == 1)


def test_visited_states_lie_on_the_policys_own_episodes_and_more_of_them_early():
    settings = Settings(trajectories=12, steps=10)
    planner = GoalPlanner(TASK)
    x, _ = visited(TASK, planner, settings)
    start, spheres = TASK.sample(12, torch.Generator().manual_seed(settings.seed))
    flown = rollout(TASK, planner, start, spheres, steps=10)
    off = (flown.x - x.unsqueeze(1)).abs().amax(dim=2)
    assert off.amin(dim=1).max() == 0.0
    assert off.argmin(dim=1).double().mean() < 5.0


def test_spheres_that_chase_are_where_the_episode_led_them():
    task = QPoleDynObs(spheres=3)
    settings = Settings(trajectories=4, steps=6)
    planner = GoalPlanner(task)
    x, seen = visited(task, planner, settings)
    start, spheres = task.sample(4, torch.Generator().manual_seed(settings.seed))
    flown = rollout(task, planner, start, spheres, steps=6)
    for i in range(4):
        at, around = int((flown.x[i] - x[i]).abs().amax(dim=1).argmin()), spheres[i:i + 1]
        for t in range(1, at + 1):
            around = task.move(around, flown.x[i:i + 1, t])
        assert torch.equal(around.centers[0], seen.centers[i]) and torch.equal(around.velocity[0], seen.velocity[i])


def test_answers_begin_at_the_states_and_obey_the_plant():
    settings = Settings(trajectories=2, steps=0, horizon=40, length=20)
    x, spheres = visited(TASK, None, settings)
    made = [t for t in answers(TASK, x, spheres, settings) if t is not None]
    assert made
    for t in made:
        assert len(t.x) == 20 and (np.abs(TASK.wrapped(x).numpy() - t.x[0]).max(axis=1) < 1e-9).any()
        led = TASK.step(torch.from_numpy(t.x[:-1]), torch.from_numpy(t.u[:-1])).numpy()
        assert np.abs(led - t.x[1:]).max() < 1e-5


@pytest.mark.parametrize('task', [TASK, QPoleObs(spheres=2)])
def test_answers_join_as_restarts_that_train_and_leave_those_that_validate_untouched(task):
    d = demonstrations(task)
    K = task.spheres
    made = [Trajectory(np.full((4, 14), float(i)), np.zeros((4, 4)), np.full((4, K, 3), float(i)), np.zeros((4, K, 3)),
                       np.full(K, 0.5), 0.0) for i in range(7)]
    whole = joined(d, made, split_seed=0)
    assert len(whole.lengths) == 17 and int(whole.restart.sum()) == 5 + 7
    (_, before), (train, after) = datasets.split(d, 0), datasets.split(whole, 0)
    assert np.array_equal(d.states[d.first[before]], whole.states[whole.first[after]])
    added = [i for i in train if whole.lengths[i] == 4]
    assert sorted(whole.states[whole.first[added], 0]) == list(range(7))
    assert all((whole.centers[i] == whole.states[whole.first[i], 0]).all() for i in added)


def test_the_command_adds_to_a_file_and_says_what_it_did(tmp_path, capsys):
    datasets.save(tmp_path / 'd.npz', demonstrations())
    command = ['qpole', '--demonstrations', str(tmp_path / 'd.npz'), '--output', str(tmp_path / 'e.npz'),
               '--trajectories', '3', '--steps', '0', '--horizon', '40', '--length', '10']
    assert aggregate.main(command) == 0
    made = datasets.load(tmp_path / 'e.npz')
    note = made.about['aggregated'][0]
    assert len(made.lengths) == 10 + note['answered'] and note['seed'] == 1
    assert 'deqmpc.training.aggregate qpole' in note['command'] and json.dumps(made.about)
    assert aggregate.main([*command[:-1], '50']) == 1
    assert 'horizon = 40; expected an integer >= 50' in capsys.readouterr().err


def test_settings_name_a_number_that_cannot_be_used():
    with pytest.raises(ValueError, match='trajectories = 0'):
        replace(Settings(), trajectories=0)
