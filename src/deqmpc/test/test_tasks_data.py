"""Tasks against the released demonstrations; windows of demonstrations."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc import datasets, tasks

EXPERTS = Path(os.environ.get('DEQMPC_DATA', 'absent')) / 'experts'


def released(name) -> datasets.Demonstrations:
    path = EXPERTS / f'{name}.npz'
    if not path.exists():
        pytest.skip(f'{path} is absent: set DEQMPC_DATA to the shared data')
    return datasets.load(path)


def consecutive(d):
    """States, controls and following states of all trajectories."""
    inside = np.setdiff1d(np.arange(len(d.states)), np.cumsum(d.lengths) - 1)
    x, u = (torch.from_numpy(v.astype(float)) for v in (d.states, d.controls))
    return x[inside], u[inside], x[inside + 1]


def test_quadrotor_steps_reproduce_the_released_transitions():
    d = released('quadrotor')
    x, u, following = consecutive(d)
    assert (tasks.make('quadrotor').step(x, u) - following).abs().max() < 1e-4


@pytest.mark.parametrize('name', ['pendulum', 'cartpole'])
def test_steps_reproduce_the_released_transitions_but_for_whole_turns(name):
    task = tasks.make(name)
    x, u, following = consecutive(released(name))
    error = task.step(x, u) - following
    assert (error - task.turns(error)).abs().max() < 1e-6


@pytest.mark.parametrize('name', ['pendulum', 'cartpole'])
def test_released_episodes_end_with_the_tenth_success_in_a_row_and_not_before(name):
    d, task = released(name), tasks.make(name)
    x, u = (torch.from_numpy(v.astype(float)) for v in (d.states, d.controls))
    reached = task.succeeded(task.step(x, u))  # after every step
    for episode in torch.split(reached, d.lengths.tolist()):
        assert episode[-task.hold:].all()
        assert not episode[:-1].unfold(0, task.hold, 1).all(dim=1).any() if len(episode) > task.hold else True


@pytest.mark.parametrize('name, mean', [('pendulum', -159.9), ('cartpole', -129.9)])
def test_return_of_the_released_expert_is_the_one_in_the_tasks_file(name, mean):
    d, task = released(name), tasks.make(name)
    x, u = (torch.from_numpy(v.astype(float)) for v in (d.states, d.controls))
    returns = torch.stack([r.sum() for r in torch.split(task.reward(x, u), d.lengths.tolist())])
    assert abs(float(returns.mean()) - mean) < 0.06
    assert d.lengths.max() <= task.steps and x.abs().max() < 10.0


@pytest.mark.parametrize('name', ['pendulum', 'cartpole'])
def test_reward_and_success_are_the_same_for_an_angle_of_any_turn(name):
    task = tasks.make(name)
    x, _ = task.sample(200, torch.Generator().manual_seed(0))
    u = torch.zeros(200, task.equations.m, dtype=torch.float64)
    turned = x + 2.0 * torch.tensor(task.period, dtype=torch.float64)
    assert torch.allclose(task.reward(x, u), task.reward(turned, u), atol=1e-12)
    assert torch.equal(task.succeeded(0.02 * x), task.succeeded(0.02 * x + turned - x))
    assert task.reward(x, u).max() <= task.best_reward == float(task.reward(0.0 * x, u)[0])


@pytest.mark.parametrize('name', ['pendulum', 'cartpole'])
def test_windows_are_continuous_and_start_within_half_a_turn_of_the_goal(name):
    d, task = released(name), tasks.make(name)
    who, first = datasets.draw(d, np.arange(270), 3000, torch.Generator().manual_seed(0))
    w = datasets.windows(d, task, who, first, 9)
    rows = torch.from_numpy(d.states[d.first[who] + first].astype(float))
    start = w.x[:, 0] - rows
    assert (start - task.turns(start)).abs().max() < 1e-9
    angles = torch.tensor(task.period) > 0
    assert (w.x[:, 0, angles] - task.goal[angles]).abs().max() <= np.pi + 1e-9
    assert w.x[..., angles].diff(dim=1).abs().max() < 0.5  # 20 steps a second: a turn would be 6.3


def test_quadrotor_return_of_the_released_expert_is_the_published_one():
    d = released('quadrotor')
    x, u = (torch.from_numpy(v.astype(float)) for v in (d.states, d.controls))
    returns = tasks.make('quadrotor').reward(x, u).reshape(270, 100).sum(1)
    assert abs(float(returns.mean()) - 631.9) < 1.0 and abs(float(returns.std()) - 25.7) < 1.0


def test_a_window_is_part_of_its_trajectory_and_ends_at_rest():
    d = released('quadrotor')
    task = tasks.make('quadrotor')
    w = datasets.windows(d, task, np.array([3, 269]), np.array([10, 97]), 8)
    rows = torch.from_numpy(d.states.astype(float)).reshape(270, 100, 12)
    assert torch.equal(w.x[0], rows[3, 10:18])
    assert torch.equal(w.x[1], rows[269, [97, 98, 99, 99, 99, 99, 99, 99]]) and w.known.all()


def test_known_states_of_a_window_follow_each_other_by_the_dynamics_also_at_a_success():
    # An expert that succeeded is still moving: a repeated last state would be no motion of a cart-pole.
    d, task = released('cartpole'), tasks.make('cartpole')
    who = np.repeat(np.arange(40), 2)
    first = d.lengths[who] - np.tile([5, 9], 40)
    w = datasets.windows(d, task, who, first, 8)
    assert w.known.sum(1).tolist() == [5, 8] * 40
    u = torch.from_numpy(d.controls[(d.first[who] + first)[:, None] + np.arange(4)].astype(float))
    for k in range(4):
        step = task.problem().phi.step(w.x[:, k], u[:, k])
        assert (step - w.x[:, k + 1]).abs().max() < 1e-4
    still = (w.x[::2, 5] - w.x[::2, 4]).abs().max()
    assert still == 0.0 and w.x[::2, 4, 2].abs().mean() > 0.5  # m/s, at the state that would be repeated


def test_a_file_reads_back_as_it_was_saved(tmp_path):
    generator = np.random.default_rng(0)
    saved = datasets.Demonstrations(generator.normal(size=(7, 2)), generator.normal(size=(7, 1)), np.array([3, 4]),
                                    generator.normal(size=(7, 5, 3)), generator.normal(size=(7, 5, 3)),
                                    np.ones((2, 5)), {'seed': 1})
    datasets.save(tmp_path / 'a.npz', saved)
    read = datasets.load(tmp_path / 'a.npz')
    assert read.moving and read.about == {'seed': 1}
    for name in ('states', 'controls', 'lengths', 'centers', 'velocity', 'radii'):
        assert np.array_equal(getattr(read, name), getattr(saved, name)), name


def test_a_split_uses_every_trajectory_once_and_depends_on_its_seed_only():
    d = datasets.Demonstrations(np.zeros((40, 1)), np.zeros((40, 1)), np.full(20, 2), np.zeros((20, 0, 3)),
                                np.zeros((20, 0, 3)), np.zeros((20, 0)))
    train, valid = datasets.split(d, 4)
    assert sorted([*train, *valid]) == list(range(20)) and len(valid) == 2
    assert np.array_equal(valid, datasets.split(d, 4)[1])
    assert not np.array_equal(valid, datasets.split(d, 5)[1])


def test_restarts_are_on_the_side_of_the_trajectory_they_began_from():
    restart = np.array([0, 1, 1, 0, 0, 1, 0, 1] * 5, dtype=bool)
    d = datasets.Demonstrations(np.zeros((80, 1)), np.zeros((80, 1)), np.full(40, 2), np.zeros((40, 0, 3)),
                                np.zeros((40, 0, 3)), np.zeros((40, 0)), restart=restart)
    family = np.cumsum(~restart)
    for seed in range(5):
        train, valid = datasets.split(d, seed)
        assert not set(family[train]) & set(family[valid]) and len(train) + len(valid) == 40
        assert len(set(family[valid])) == 2


def test_every_state_is_drawn_as_often_as_any_other():
    d = datasets.Demonstrations(np.zeros((10, 1)), np.zeros((10, 1)), np.array([2, 3, 5]), np.zeros((3, 0, 3)),
                                np.zeros((3, 0, 3)), np.zeros((3, 0)))
    trajectory, first = datasets.draw(d, np.array([0, 2]), 7000, torch.Generator().manual_seed(0))
    assert set(trajectory) == {0, 2} and (first < d.lengths[trajectory]).all()
    counts = np.unique(trajectory * 10 + first, return_counts=True)[1]
    assert len(counts) == 7 and counts.min() > 850


def test_windows_lie_within_their_trajectory_as_far_as_asked():
    d = datasets.Demonstrations(np.zeros((20, 1)), np.zeros((20, 1)), np.array([6, 14]), np.zeros((20, 1, 3)),
                                np.zeros((20, 1, 3)), np.zeros((2, 1)))
    trajectory, first = datasets.draw(d, np.array([0, 1]), 500, torch.Generator().manual_seed(0), 8)
    assert first[trajectory == 1].max() == 6 and set(first[trajectory == 0]) == {0}  # one is shorter than a window


def test_a_torn_file_is_an_error_that_names_it(tmp_path):
    np.savez(tmp_path / 'torn.npz', states=np.zeros((3, 2)), controls=np.zeros((2, 1)), lengths=np.array([3]))
    with pytest.raises(ValueError, match='torn.npz'):
        datasets.load(tmp_path / 'torn.npz')
