"""Aggregation: episodes flown in turns, the expert's answers there, and where they join the demonstrations."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from deqmpc import datasets, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.experts import Trajectory
from deqmpc.planners import Planned
from deqmpc.tasks import QPoleDynObs, QPoleObs
from deqmpc.training import aggregate
from deqmpc.training.aggregate import Expert, Settings, answers, better, joined

TASK = tasks.make('qpole')


def demonstrations(task=TASK, families=5, length=8) -> Demonstrations:
    """Nominal trajectories that stay at their starts, each with one restart."""
    x, spheres = task.sample(2 * families, torch.Generator().manual_seed(0))
    return Demonstrations(x.repeat_interleave(length, dim=0).numpy(), np.zeros((2 * families * length, 4)),
                          np.full(2 * families, length), spheres.centers.numpy(), spheres.velocity.numpy(),
                          spheres.radii.numpy(), {'task': task.name}, np.arange(2 * families) % 2 == 1)


class Falling:
    """A planner that lets go, and keeps what it was shown."""

    def __init__(self):
        self.seen = []

    def plan(self, x, spheres, memory=None):
        self.seen.append(x)
        return Planned(torch.full((len(x), 4), -0.05, dtype=torch.float64), x, torch.ones(len(x), dtype=torch.bool),
                       torch.zeros(len(x)), torch.zeros(len(x)), None)


SETTINGS = Settings(episodes=3, steps=12, turn=4, share=0.5, horizon=30, length=8)


def test_answers_begin_at_the_states_that_the_episodes_pass_and_obey_the_plant():
    planner = Falling()
    made, asked = answers(TASK, planner, SETTINGS)
    passed = torch.cat(planner.seen).numpy()
    assert asked == len(passed) == 36 and len(made) > 30
    for t in made:
        assert len(t.x) == 8 and np.abs(passed - t.x[0]).max(axis=1).min() < 1e-9
        led = TASK.step(torch.from_numpy(t.x[:-1]), torch.from_numpy(t.u[:-1])).numpy()
        assert np.abs(led - t.x[1:]).max() < 1e-5


@pytest.mark.parametrize(('share', 'noise', 'expected'), [(0.0, 0.1, -0.05), (1.0, 0.0, None)])
def test_the_policy_and_the_expert_fly_in_turns(share, noise, expected):
    planner = Falling()
    made, _ = answers(TASK, planner, replace(SETTINGS, share=share, noise=noise))
    for before, after in zip(planner.seen[:-1], planner.seen[1:], strict=True):
        if expected is not None:
            u = torch.full((len(before), 4), expected, dtype=torch.float64)
        else:
            u = torch.stack([next(torch.from_numpy(t.u[0]) for t in made if np.abs(t.x[0] - x.numpy()).max() < 1e-9)
                             for x in before])
        assert torch.allclose(TASK.wrapped(TASK.step(before, u)), after, atol=1e-9)


def test_without_a_policy_the_expert_balances_the_pole():
    x, _ = TASK.sample(1, torch.Generator().manual_seed(SETTINGS.seed))
    made, asked = answers(TASK, None, replace(SETTINGS, episodes=1, steps=120, noise=0.0, horizon=40))
    end = made[-1].x[0] - TASK.goal.numpy()
    assert asked == len(made) == 120 and np.abs(end[6]) < 0.05 < abs(float(x[0, 6]) - np.pi)
    assert np.linalg.norm(end[:3]) < 0.3


def test_of_two_answers_the_exact_and_cheaper_one_is_taken():
    x, spheres = TASK.sample(4, torch.Generator().manual_seed(0))
    found = Expert(TASK, SETTINGS).fresh(x, spheres)
    worse = replace(found, cost=found.cost + torch.tensor([1.0, -1.0, 0.0, -1.0]), x=found.x + 1.0,
                    defect=torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    chosen = better(found, worse)
    assert [bool((chosen.x[i] == worse.x[i]).all()) for i in range(4)] == [False, True, False, False]
    assert torch.equal(chosen.warm_start.x, found.warm_start.x)


def test_answers_past_spheres_that_chase_keep_out_of_them():
    task = QPoleDynObs(spheres=4)
    made, asked = answers(task, None, replace(SETTINGS, episodes=2, steps=6))
    assert made and asked == 12
    for t in made:
        assert t.centers.shape == t.velocity.shape == (8, 4, 3)
        assert np.allclose(t.centers[:-1] + task.dt * t.velocity[:-1], t.centers[1:])
        assert (np.linalg.norm(t.centers - t.x[:, None, :3], axis=-1) >= t.radii).all()


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
               '--episodes', '2', '--steps', '3', '--horizon', '30', '--length', '10']
    assert aggregate.main(command) == 0
    made = datasets.load(tmp_path / 'e.npz')
    note = made.about['aggregated'][0]
    assert len(made.lengths) == 10 + note['answered'] and note['seed'] == 1
    assert 'deqmpc.training.aggregate qpole' in note['command'] and json.dumps(made.about)
    assert aggregate.main([*command[:-1], '50']) == 1
    assert 'horizon = 30; expected an integer >= 50' in capsys.readouterr().err


def test_settings_name_a_number_that_cannot_be_used():
    with pytest.raises(ValueError, match='episodes = 0'):
        replace(Settings(), episodes=0)
    with pytest.raises(ValueError, match='share = 1.5'):
        replace(Settings(), share=1.5)
