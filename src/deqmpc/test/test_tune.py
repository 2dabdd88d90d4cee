"""deqmpc tune: the policy's derivatives, the gradient of the return, and what a run may and may not do."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from deqmpc import datasets, reproduce, tasks
from deqmpc.airframe import Airframe
from deqmpc.datasets import Demonstrations
from deqmpc.training import tune
from deqmpc.training.tunable import PARAMETERS, Tunable, TunedPlanner, flight_planner, heading

TRUE = Airframe()
WRONG = replace(TRUE, mass=1.1 * TRUE.mass, drag=tuple(0.5 * d for d in TRUE.drag))


@pytest.fixture(scope='module')
def tunable() -> Tunable:
    """Every parameter, from a model that is too heavy and too slippery. A wide margin and a reference faster than the
    speed limit, so that plans lie at their bounds."""
    settings = {'margin': 0.1, 'cruise_speed': 1.0, 'max_speed': 0.8}
    return Tunable(tasks.make('crazyflie_obs', spheres=60, radius=0.15), settings, WRONG, PARAMETERS)


@pytest.fixture(scope='module')
def theta(tunable) -> torch.Tensor:
    """Not where tuning starts."""
    return tunable.first * torch.linspace(0.9, 1.2, len(tunable.first), dtype=torch.float64)


@pytest.fixture(scope='module')
def calls(tunable, theta):
    """Of six episodes after 8 and 24 steps: at the speed limit, beside spheres, near the goal."""
    starts = tune.Starts(*tunable.task.sample(6, torch.Generator().manual_seed(4)))
    flown = tune.fly(tunable, theta, starts, tune.Settings(steps=25))
    return flown.calls[(flown.alive.cumsum(1) % 16 == 9)[flown.alive]]


def test_the_twin_plans_what_the_policy_of_the_written_files_plans(tunable, theta, tmp_path):
    tunable.write(tmp_path, theta)
    x, spheres = tunable.task.sample(5, torch.Generator().manual_seed(1))
    twin, flies = TunedPlanner(tunable, theta), flight_planner(tunable.task, tmp_path)
    ours = theirs = None
    for _ in range(3):
        ours, theirs = (p.plan(x, spheres, m.memory if m else None) for p, m in ((twin, ours), (flies, theirs)))
        assert (ours.u - theirs.u).abs().max() < 2e-3  # both solve to 1e-4
        assert (ours.x - theirs.x)[..., :3].abs().max() < 1e-3
        x = tunable.task.step(x, ours.u)


def test_the_differentiable_reference_is_that_of_the_policy(tunable, theta, calls, tmp_path):
    tunable.write(tmp_path, theta)
    policy, count = flight_planner(tunable.task, tmp_path).policy, len(calls.x)
    data = tunable.instances(calls.x, theta.expand(count, -1), calls.spheres, calls.ray)
    for i, yaw in enumerate(heading(calls.x[:, 3:6]).tolist()):
        expected = policy.reference(calls.x[i].numpy(), yaw, data.centers[i].numpy(), data.radii[i].numpy())
        assert np.abs(data.x_ref[i, :, :12].numpy() - expected).max() < 1e-8


def test_derivatives_of_the_policy_are_those_of_finite_differences_with_active_and_inactive_bounds(
        tunable, theta, calls):
    B, found = len(calls.x), tunable.derivatives(theta, calls)
    plan = tunable.exact(calls.x, theta.expand(B, -1), calls)
    assert found.ok.all() and (plan.warm_start.lam > 1e-3).flatten(1).any(dim=1).any()  # some bound is active

    def u(x, numbers):
        return tunable.to_plant * tunable.exact(x, numbers.expand(B, -1), calls).u[:, 0]
    for j, name in enumerate(tunable.names):
        h = 1e-4 * theta[j] * torch.eye(len(theta), dtype=torch.float64)[j]
        expected = (u(calls.x, theta + h) - u(calls.x, theta - h)) / (2.0 * h[j])
        error = theta[j] * (found.by_theta[:, :, j] - expected).abs().max()
        assert error < 1e-4 * (1.0 + theta[j] * expected.abs().max()), name
    for i in range(12):
        h = 1e-4 * torch.eye(12, dtype=torch.float64)[i]
        expected = (u(calls.x + h, theta) - u(calls.x - h, theta)) / 2e-4
        assert (found.by_x[:, :, i] - expected).abs().max() < 1e-4 * (1.0 + expected.abs().max()), i


def test_the_gradient_of_the_return_is_that_of_finite_differences_over_whole_episodes_with_noise():
    task = tasks.make('crazyflie_obs', spheres=3)
    tunable = Tunable(task, {}, WRONG, ('mass', 'drag', 'cruise_speed', 'velocity_weight'))
    settings = tune.Settings(steps=6, episodes=3, noise=1e-3)
    tuner = tune.Tuner(tunable, tune.drawn(task, 3, 0, ()), settings, [2.0] * 4)
    theta = tunable.first
    flown = tune.fly(tunable, theta, tuner.starts, settings)
    found, share = tuner.estimate(theta, flown)
    assert share == 1.0 and torch.linalg.eigvalsh(found.gauss_newton)[0] < 0.0

    def objective(numbers):
        return tuner.estimate(numbers, tune.fly(tunable, numbers, tuner.starts, settings))[0].value
    for j in range(4):
        h = 3e-3 * theta[j] * torch.eye(4, dtype=torch.float64)[j]
        expected = (objective(theta + h) - objective(theta - h)) / (2.0 * h[j])
        scale = abs(theta[j] * expected)
        # plans are solved to 1e-4: differences of returns carry that
        assert abs(theta[j] * (found.gradient[j] - expected)) < 0.05 * scale + 2e-4, tunable.names[j]


def command(folder, *words) -> int:
    return tune.main(['crazyflie_obs', '--parameters', 'cruise_speed', 'slow_down', '--policy-file',
                      str(folder / 'mine.yaml'), '--out', str(folder / 'run'), '--episodes', '2', '--steps', '12',
                      '--judge', '2', '--set', 'spheres=3', *words])


@pytest.fixture
def folder(tmp_path):
    """With a policy file that sets one number."""
    (tmp_path / 'mine.yaml').write_text('cruise_speed: 0.4\n')
    return tmp_path


def test_a_run_raises_the_objective_within_its_limits_and_leaves_a_policy_that_can_be_flown(folder, capsys):
    assert command(folder, '--updates', '3', '--limit', 'cruise_speed=1.3', '--json') == 0
    result = json.loads(capsys.readouterr().out)
    with (folder / 'run/log.csv').open() as file:
        rows = [(float(row['objective']), float(row['cruise_speed'])) for row in csv.DictReader(file)]
    assert len(rows) == 3 and rows[0] < max(rows)
    assert result['after']['cruise_speed'] == max(rows)[1]  # the best of those flown
    assert 0.4 < result['after']['cruise_speed'] <= 0.4 * 1.3 + 1e-12
    assert result['return_after'] > result['return_before']
    settings = yaml.safe_load((folder / 'run/policy.yaml').read_text())
    assert settings['cruise_speed'] == result['after']['cruise_speed']
    assert flight_planner(tasks.make('crazyflie_obs'), folder / 'run').policy.settings.cruise_speed > 0.4
    assert (folder / 'mine.yaml').read_text() == 'cruise_speed: 0.4\n'


def test_a_stopped_run_goes_on_to_the_same_numbers(folder):
    assert command(folder, '--updates', '1') == 0 and command(folder, '--updates', '2') == 0
    (folder / 'once').mkdir()
    (folder / 'once/mine.yaml').write_text('cruise_speed: 0.4\n')
    assert command(folder / 'once', '--updates', '2') == 0
    twice, once = (json.loads((f / 'run/state.json').read_text()) for f in (folder, folder / 'once'))
    assert twice['z'] == once['z'] and twice['hessian'] == once['hessian']


def test_a_folder_of_another_run_is_refused(folder, capsys):
    assert command(folder, '--updates', '1') == 0
    assert command(folder, '--updates', '1', '--seed', '3') == 1
    assert 'other seed' in capsys.readouterr().err


@pytest.mark.parametrize('words, said', [
    (['--limit', 'mass=2'], 'cruise_speed'), (['--limit', 'slow_down=0.5'], 'slow_down = 0.5'),
    (['--updates', '0'], 'updates = 0'), (['--policy-file', 'none.yaml'], 'none.yaml'),
    (['--parameters', 'softness'], "'softness'"), (['--out', 'config/policies'], 'config/policies'),
    (['--recorded', 'none.npz'], 'none.npz')])
def test_what_cannot_be_used_is_named(folder, capsys, words, said):
    assert command(folder, *words) == 1
    assert said in capsys.readouterr().err


def test_recorded_starts_are_states_of_the_recording_on_the_way_to_the_goal(tmp_path):
    task, rng = tasks.make('crazyflie_obs'), np.random.default_rng(0)
    states = 0.1 * rng.normal(size=(30, 12))
    states[:10, 2] = -2.0  # below the ground
    states[10:20, :3] = 0.01
    d = Demonstrations(states, np.full((30, 4), math.nan), np.array([12, 18]), np.full((2, 3, 3), 5.0),
                       np.zeros((2, 3, 3)), np.full((2, 3), 0.1))
    datasets.save(tmp_path / 'a.npz', d)
    starts = tune.drawn(task, 8, 0, [tmp_path / 'a.npz'])
    assert 0 < len(starts.x) <= 8 and all(any(np.array_equal(x, s) for s in states[20:]) for x in starts.x.numpy())
    assert starts.spheres.radii.shape == (len(starts.x), 3)


def test_the_tuning_experiment_runs_and_continues_from_what_it_has_judged(tmp_path):
    words = ['mpc_tuning', '--budget', 'smoke', '--tasks', 'flight', '--variants', 'model', '--out', str(tmp_path)]
    assert reproduce.main(words) == 0
    table = (tmp_path / 'results.csv').read_text()
    judged = (tmp_path / 'flight-model-s0/judged.json').stat().st_mtime_ns
    assert reproduce.main(words) == 0
    assert (tmp_path / 'flight-model-s0/judged.json').stat().st_mtime_ns == judged
    assert [line.split(',')[:3] for line in table.splitlines()][1:] == [
        ['flight', 'right', '0'], ['flight', 'wrong', '0'], ['flight', 'model', '1']]
