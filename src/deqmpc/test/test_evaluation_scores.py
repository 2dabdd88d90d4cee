"""Scores, baselines, validation and the command `deqmpc evaluate-policy`."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc import datasets, evaluation, tasks
from deqmpc.baselines import GoalPlanner, MpcOnlyPlanner
from deqmpc.datasets import Demonstrations
from deqmpc.networks.temporal import Prediction
from deqmpc.planners import ModelPlanner, load_model
from deqmpc.policies import model as model_folder
from deqmpc.policies.deq_mpc import Iterates
from deqmpc.rollouts import GoalChange, Rollouts, rollout
from deqmpc.training.imitation import build_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Maker of folders of untrained models of the quadrotor."""
    def make(variant='deq_mpc_nn', task='quadrotor', **card):
        torch.manual_seed(0)
        made = build_model(tasks.make(task), variant, 32)
        method = dataclasses.asdict(made.settings) if hasattr(made, 'settings') else {}
        path = tmp_path_factory.mktemp(variant)
        model_folder.save(path, model_folder.Model(made.network, method, {}, {'task': task, **card}))
        return path
    return make


def demonstrations(task, count=6, length=20, **about):
    """The goal planner's own episodes."""
    x, spheres = task.sample(count, torch.Generator().manual_seed(5))
    made = rollout(task, GoalPlanner(task), 0.2 * x, spheres, steps=length)
    fields = (np.zeros((count, 0, task.spatial)),) * 2
    return Demonstrations(made.x[:, :-1].reshape(-1, x.shape[1]).numpy(), made.u.flatten(0, 1).numpy(),
                          np.full(count, length), *fields, np.zeros((count, 0)), about)


def released(name):
    path = Path(os.environ.get('DEQMPC_DATA', 'absent')) / 'experts' / f'{name}.npz'
    if not path.exists():
        pytest.skip(f'{path} is absent: set DEQMPC_DATA to the shared data')
    return path


def report(capsys, *argv) -> dict:
    assert evaluation.main([*map(str, argv), '--json']) == 0
    return json.loads(capsys.readouterr().out)


def recorded(rewards, failed=(), violations=()) -> Rollouts:
    """Rollouts with these rewards (B, N)."""
    B, N = np.shape(rewards)
    r, none = torch.tensor(rewards, dtype=torch.float64), torch.zeros(B, N, dtype=torch.float64)
    fails = torch.tensor([i in failed for i in range(B)])
    plan = none.clone()
    for i, t, v in violations:
        plan[i, t] = v
    return Rollouts(torch.zeros(B, N + 1, 2), torch.zeros(B, N, 1), r, torch.full((B,), N), fails, ~fails,
                    torch.ones(B, N, dtype=torch.bool), plan, none, torch.zeros(B, dtype=torch.float64), 1.0)


# --- scores -------------------------------------------------------------------------------------

def test_gains_are_divided_by_the_experts_and_costs_the_other_way_round():
    gains, costs = tasks.make('quadrotor'), tasks.make('pendulum')
    assert evaluation.normalised(gains, 300.0, 600.0) == 0.5
    assert evaluation.normalised(costs, -300.0, -150.0) == 0.5
    made = evaluation.scores(costs, recorded([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]]), expert_return=-2.0)
    assert made.mean_return == -4.0 and made.normalised == 0.5
    assert math.isclose(made.standard_error, 2.0 / math.sqrt(3))
    assert math.isclose(made.normalised_error, 0.5 * made.standard_error / 4.0)


def test_plans_violate_from_a_millimetre_on():
    rollouts = recorded(np.ones((2, 3)), violations=[(0, 1, 2e-3), (1, 0, 9e-4)])
    made = evaluation.scores(tasks.make('quadrotor'), rollouts)
    assert (made.plans, made.violating_plans, made.largest_plan_violation) == (6, 1, 2e-3)


@pytest.mark.parametrize(('count', 'of', 'low', 'high'), [(0, 200, 0.0, 0.01885), (10, 100, 0.05523, 0.17437)])
def test_wilsons_interval_is_the_tabulated_one(count, of, low, high):
    assert np.allclose(evaluation.wilson(count, of), (low, high), atol=1e-5)
    assert np.allclose(evaluation.wilson(of - count, of), (1 - high, 1 - low), atol=1e-5)


def test_a_short_demonstration_rests_at_its_end_unless_it_ended_by_success():
    d = Demonstrations(np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [2.0, 0.0]]), np.zeros((4, 1)), np.array([3, 1]),
                       np.zeros((2, 0, 1)), np.zeros((2, 0, 1)), np.zeros((2, 0)))
    ends, goes_on = (tasks.make('pendulum', steps=5, hold=hold) for hold in (10, 0))
    assert evaluation.expert_returns(ends, d).tolist() == [-1.25, -4.0]
    assert evaluation.expert_returns(goes_on, d).tolist() == [-1.25, -20.0]


def test_the_released_quadrotor_experts_return_is_the_published_one():
    d = datasets.load(released('quadrotor'))
    assert abs(evaluation.expert_returns(tasks.make('quadrotor'), d).mean() - 631.9) < 0.5


def test_rollouts_start_with_the_validation_trajectories_and_never_at_a_restart():
    task = tasks.make('quadrotor')
    d = dataclasses.replace(demonstrations(task, 10), restart=np.array([False, True] * 5))
    _, valid = datasets.split(d, 3, 0.9)
    found = evaluation.episodes_of(d, 3)
    assert sorted(found) == [0, 2, 4, 6, 8]
    assert valid[0] % 2 or found[0] == valid[0]


# --- baselines ----------------------------------------------------------------------------------

def test_the_goal_planner_settles_a_quadrotor_at_the_goal():
    task = tasks.make('quadrotor')
    x, _ = task.sample(4, torch.Generator().manual_seed(0))
    made = rollout(task, GoalPlanner(task, 20), 0.1 * x, steps=60)
    assert made.x[:, -1].abs().max() < 0.02 and made.planned.all() and made.violation.max() == 0.0
    assert made.plan_violation.max() < 1e-3 and made.plan_defect.max() < 1e-3


def test_mpc_only_flies_to_the_goal_past_spheres():
    task = tasks.make('crazyflie_obs')
    x, spheres = task.sample(2, torch.Generator().manual_seed(0))
    made = rollout(task, MpcOnlyPlanner(task), x, spheres, steps=60)
    assert not made.failed.any() and made.planned.all() and made.plan_violation.max() < 1e-3
    assert made.x[:, -1, :3].norm(dim=1).max() < 0.2


def test_mpc_only_says_which_tasks_it_cannot_fly():
    with pytest.raises(ValueError, match='quadrotor'):
        MpcOnlyPlanner(tasks.make('quadrotor'))


def test_a_baseline_in_a_batch_does_what_it_does_alone():
    task = tasks.make('crazyflie_obs')
    x, spheres = task.sample(2, torch.Generator().manual_seed(0))
    for planner in (GoalPlanner(task), MpcOnlyPlanner(task)):
        both = rollout(task, planner, x, spheres, steps=5)
        alone = rollout(task, planner, x[1:], spheres[[1]], steps=5)
        assert torch.equal(both.x[1], alone.x[0])


def test_a_moved_goal_is_reached_and_scored():
    task = tasks.make('quadrotor')
    x = torch.zeros(1, 12, dtype=torch.float64)
    made = rollout(task, GoalPlanner(task, 20), x, steps=70, change=GoalChange((0.3, -0.2, 0.1), 10))
    assert made.x[0, :10].abs().max() < 1e-4
    assert (made.x[0, -1, :3] - torch.tensor([0.3, -0.2, 0.1])).abs().max() < 0.02
    assert made.reward[0, -1] > made.reward[0, 10] and made.reward[0, -1] > 0.999 * task.best_reward
    with pytest.raises(ValueError, match='offset'):
        rollout(task, GoalPlanner(task), x, change=GoalChange((0.0,) * 4))


# --- models -------------------------------------------------------------------------------------

@pytest.mark.parametrize('variant', ['deq_mpc_deq', 'nn'])
def test_a_loaded_model_plans_as_the_saved_one(folder, variant):
    task = tasks.make('quadrotor')
    torch.manual_seed(0)
    made = build_model(task, variant, 32)
    x, spheres = task.sample(3, torch.Generator().manual_seed(0))
    plans = [ModelPlanner(task, m).plan(0.1 * x, spheres) for m in (made, load_model(folder(variant), task))]
    assert torch.equal(plans[0].x, plans[1].x) and torch.equal(plans[0].u, plans[1].u)


def test_a_model_of_another_horizon_is_refused_by_name(folder):
    with pytest.raises(ValueError, match='horizon = 5.* 8'):
        load_model(folder(), tasks.make('quadrotor', horizon=8))


class Beside(torch.nn.Module):
    """A model whose plan stands half a unit beside x_init, in every state at knots 1..T."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # an optimiser wants one

    def forward(self, x, u_ref, centers=None, radii=None, warm_start=None, iterations=None, velocity=None):
        plan = x.unsqueeze(1).repeat(1, u_ref.shape[1] + 1, 1)
        plan[:, 1:] += 0.5
        ok = torch.ones(len(x), dtype=torch.bool)
        return Iterates([plan], [plan], [u_ref], [Prediction(plan, None, ok, ok, ok.long(), 0.0 * x[:, 0])])


def test_the_validation_error_is_the_sum_over_knots_and_states():
    task = tasks.make('pendulum')
    # long enough that hardly a window reaches beyond the experts' success, where knots do not count
    d = Demonstrations(np.ones((8000, 2)), np.zeros((8000, 1)), np.full(10, 800), np.zeros((10, 0, 3)),
                       np.zeros((10, 0, 3)), np.zeros((10, 0)))
    found = evaluation.validation_error(Beside(), task, d, windows=40)
    assert math.isclose(found['cold'], 0.5 * 5 * 2) and math.isclose(found['streamed'], 0.5 * 5 * 2)


@pytest.mark.parametrize('variant', ['deq_mpc_deq', 'diff_mpc_nn', 'nn'])
def test_every_variant_has_its_validation_error(variant):
    task = tasks.make('pendulum')
    d = datasets.load(released('pendulum'))
    found = evaluation.validation_error(build_model(task, variant, 16), task, d, windows=20)
    assert 0.0 < found['cold'] < 100.0 and 0.0 < found['streamed'] < 100.0 and found['not_finite'] == 0


# --- the command --------------------------------------------------------------------------------

def test_the_command_scores_a_folder_against_demonstrations(folder, tmp_path, capsys):
    task = tasks.make('quadrotor')
    d = demonstrations(task, 10)
    datasets.save(tmp_path / 'd.npz', d)
    found = report(capsys, folder(split_seed=2), '--demonstrations', tmp_path / 'd.npz', '--steps', 20, '--rollouts', 4)
    assert (found['rollouts'], found['starts'], found['steps']) == (4, 'demonstrations', 80)
    first = evaluation.episodes_of(d, 2)[:4]
    assert math.isclose(found['expert_return'], evaluation.expert_returns(task, d)[first].mean())
    assert math.isclose(found['normalised'], found['mean_return'] / found['expert_return'])
    assert set(found['validation_error']) == {'cold', 'streamed', 'windows', 'not_finite'}
    assert found['unplanned'] == 0 and found['plans'] == 80


def test_fresh_starts_may_be_asked_for_without_demonstrations(capsys):
    asked, silent = (report(capsys, 'goal', '--task', 'quadrotor', '--rollouts', 2, '--steps', 3, *words)
                     for words in (('--starts', 'fresh'), ()))
    assert asked['starts'] == silent['starts'] == 'fresh' and asked['mean_return'] == silent['mean_return']


def test_scores_on_a_card_stand_beside_their_command_once(folder, capsys):
    path = folder()
    for steps in (3, 3, 4):
        found = report(capsys, path, '--steps', steps, '--rollouts', 2, '--write-card')
    scores = model_folder.load(path).card['scores']
    assert [s['command'].split('--steps ')[1][0] for s in scores] == ['3', '4']
    assert scores[1]['mean_return'] == pytest.approx(found['mean_return'], rel=1e-4)


def test_the_command_repeats_itself_with_its_seed(folder, capsys):
    given = (folder(), '--steps', 5, '--rollouts', 3, '--noise', 0.01, '--process-noise', 0.01, '--dropout', 0.3)
    one, two, other = (report(capsys, *given, '--seed', seed) for seed in (4, 4, 5))
    assert one['mean_return'] == two['mean_return'] != other['mean_return']


def test_the_command_changes_the_task_at_run_time(folder, capsys):
    path = folder('deq_mpc_nn', 'crazyflie_obs')
    short = '--steps', 3, '--rollouts', 2, '--set'
    found = report(capsys, path, *short, 'spheres=12', 'radius=0.15', '--goal', 0.1, 0.1)
    assert found['set'] == ['spheres=12', 'radius=0.15'] and found['plans'] == 6
    assert report(capsys, path, *short, 'spheres=0')['plans'] == 6


def test_set_takes_numbers_of_the_task_only():
    task = tasks.make('quadrotor')
    assert evaluation.changed(task, ['u_high=16', 'steps=50']) == dataclasses.replace(task, u_high=16.0, steps=50)
    for text, said in (('u_hihg=16', "did you mean 'u_high'"), ('steps=1.5', 'type int'), ('steps', 'NAME=VALUE')):
        with pytest.raises(ValueError, match=said):
            evaluation.changed(task, [text])


@pytest.mark.parametrize(('argv', 'said'), [
    (['absent'], 'absent'), (['goal'], '--task'), (['mpc_only', '--task', 'pendulum'], 'mpc_only flies'),
    (['goal', '--task', 'quadrotor', '--rollouts', '0'], 'rollouts'),
    (['goal', '--task', 'quadrotor', '--dropout', '1.5'], 'dropout'),
    (['goal', '--task', 'quadrotor', '--write-card'], 'expected a model folder'),
    (['goal', '--task', 'quadrotor', '--starts', 'demonstrations'], '--demonstrations')])
def test_a_command_that_cannot_run_says_why(argv, said, capsys):
    assert evaluation.main(argv) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('name', ['pendulum', 'cartpole'])
def test_released_demonstrations_start_and_normalise_rollouts(name, capsys):
    found = report(capsys, 'goal', '--task', name, '--demonstrations', released(name), '--rollouts', 5, '--steps', 5)
    assert found['rollouts'] == 5 and found['expert_return'] < 0.0 and found['normalised'] > 0.0
