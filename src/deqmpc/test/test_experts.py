"""Demonstrations: exact, feasible, better than what flies without them, and the same after an interruption."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc import datasets, experts, tasks
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.integrators import rk4
from deqmpc.obstacles import ObstacleField
from deqmpc.policies.mpc_only import MpcOnly
from deqmpc.tasks.crazyflie import HIGH, LOW
from deqmpc.types import Obstacles, RigidBodyState


@pytest.fixture(scope='module')
def demonstrations(tmp_path_factory):
    made = {}
    for task in ('crazyflie_obs', 'crazyflie_dynobs'):
        path = tmp_path_factory.mktemp(task) / 'a.npz'
        made[task] = experts.make(experts.Settings(task, trajectories=3, restarts=1, seed=1), path)
    return made


def trajectories(d):
    """(is a restart, states, controls, spheres of its first state) of every trajectory."""
    for i, (first, length) in enumerate(zip(d.first, d.lengths, strict=True)):
        part = slice(first, first + length)
        yield d.restart[i], d.states[part].astype(float), d.controls[part].astype(float), d.starts([i])[1]


@pytest.mark.parametrize('name', ['crazyflie_obs', 'crazyflie_dynobs'])
def test_every_transition_is_the_plants(demonstrations, name):
    for _, x, u, _ in trajectories(demonstrations[name]):
        x, u = torch.from_numpy(x), torch.from_numpy(u)
        assert (tasks.make(name).step(x[:-1], u[:-1]) - x[1:]).abs().max() < 1e-5  # stored in single precision


@pytest.mark.parametrize('name', ['crazyflie_obs', 'crazyflie_dynobs'])
def test_bounds_hold(demonstrations, name):
    frame = Crazyflie().airframe
    low, high = frame.thrust_min / frame.hover_thrust, frame.thrust_max / frame.hover_thrust
    for restart, x, u, _ in trajectories(demonstrations[name]):
        assert low - 1e-6 < u.min() and u.max() < high + 1e-6
        settled = x[1 + restart * experts.GRACE:]
        assert np.abs(settled[:, 6:9]).max() < 0.75 + 2e-3 and settled[:, 2].min() > -0.85 - 2e-3


@pytest.mark.parametrize('name', ['crazyflie_obs', 'crazyflie_dynobs'])
def test_spheres_are_not_cut_between_the_knots(demonstrations, name):
    derivative = Crazyflie().derivative
    for restart, x, u, spheres in trajectories(demonstrations[name]):
        field = ObstacleField(*(v[0].numpy() for v in (spheres.centers, spheres.radii, spheres.velocity)),
                              np.array(LOW), np.array(HIGH))
        for s in np.arange(0.0, 1.0, 0.1):
            p = np.array(rk4(derivative, x.T, u.T, max(s, 1e-9) * 0.1)[0][:3]).T
            gap = np.array([field.at(0.1 * (t + s)).clearance(p[t])[0] for t in range(len(p))])
            assert gap.min() > 0.0
            assert gap[restart * experts.GRACE:].min() > 0.05 - 4e-3


@pytest.mark.parametrize('name', ['crazyflie_obs', 'crazyflie_dynobs'])
def test_crazyflie_plans_are_calm(demonstrations, name):
    for _, x, _, _ in trajectories(demonstrations[name]):
        assert np.hypot(x[1:, 3], x[1:, 4]).max() < np.tan(np.radians(45.0) / 4.0) and np.abs(x[1:, 9:]).max() < 8.0


def test_nominal_demonstrations_end_at_rest_and_restarts_do_too(demonstrations):
    d = demonstrations['crazyflie_obs']
    failures = d.about['failures']
    assert (~d.restart).sum() == 3 and d.restart.sum() + len(failures) == 3
    assert all(text.startswith('restart') for text in failures) and len(failures) <= 1  # each says which and why
    for _, x, _, _ in trajectories(d):
        assert np.abs(x[-1]).max() < 0.03


def test_a_start_without_a_plan_does_not_double_the_size_of_the_file(demonstrations):
    none = experts._together(tasks.make('crazyflie_dynobs'), [], ['nominal: no plan'])
    for name in ('states', 'controls', 'centers', 'velocity'):
        assert getattr(none, name).dtype == getattr(demonstrations['crazyflie_dynobs'], name).dtype == np.float32


def test_the_expert_earns_more_than_mpc_without_a_network(demonstrations):
    d, task = demonstrations['crazyflie_obs'], tasks.make('crazyflie_obs')
    for restart, x, u, spheres in trajectories(d):
        if not restart:
            expert = float(task.reward(torch.from_numpy(x), torch.from_numpy(u)).sum())
            hover = len(x) * float(task.reward(torch.from_numpy(x[:1]), torch.from_numpy(u[:1])))
            mpc = return_of_mpc(task, x[0], spheres, len(x))
            assert expert > mpc > hover


def return_of_mpc(task, start, spheres, steps):
    """Return of `mpc_only` on the task's plant."""
    policy, x, total, warm = MpcOnly(), torch.from_numpy(start)[None], 0.0, None
    for t in range(steps):
        p, m, v, w = x[0].numpy().reshape(4, 3)
        q = np.concatenate([2.0 * m, [1.0 - m @ m]]) / (1.0 + m @ m)
        up = np.array([0.0, 0.0, 1.0])
        field = Obstacles(0.1 * t, spheres.centers[0].numpy() + up, spheres.radii[0].numpy(),
                          spheres.velocity[0].numpy())
        _, warm, status = policy.plan(RigidBodyState(0.1 * t, p + up, q, v, w), field, warm)
        assert warm is not None, status.message
        u = torch.from_numpy(warm.solver.u[:1])
        total += float(task.reward(x, u))
        x = task.step(x, u)
    return total


def test_an_interrupted_run_continues_to_the_same_result(demonstrations, tmp_path, monkeypatch):
    settings, path = experts.Settings('crazyflie_obs', trajectories=3, restarts=1, seed=1), tmp_path / 'a.npz'
    make_part, made = experts._make_part, []

    def killed(index):
        if made:
            raise KeyboardInterrupt
        made.append(index)
        return make_part(index)
    monkeypatch.setattr(experts, '_make_part', killed)
    with pytest.raises(KeyboardInterrupt):
        experts.make(settings, path)
    assert not path.exists() and len(list(path.with_suffix('.parts').glob('*.npz'))) == 1
    monkeypatch.setattr(experts, '_make_part', make_part)
    first, now = datasets.load(next(path.with_suffix('.parts').glob('*.npz'))).about['commit'], 'another'
    monkeypatch.setattr(experts, 'commit', lambda: now)
    continued, whole = experts.make(settings, path), demonstrations['crazyflie_obs']
    assert_same(continued, whole)
    assert set(continued.about['commit'].split()) == {first, now}
    assert_same(datasets.load(path), whole)


def assert_same(one, other):
    for name in ('states', 'controls', 'lengths', 'centers', 'velocity', 'radii', 'restart'):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_two_processes_make_what_one_makes(demonstrations, tmp_path):
    settings = experts.Settings('crazyflie_obs', trajectories=3, restarts=1, seed=1)
    assert_same(experts.make(settings, tmp_path / 'a.npz', processes=2), demonstrations['crazyflie_obs'])


def test_restarts_are_behind_beside_at_another_pace_and_inside_margins_but_not_in_spheres():
    task = tasks.make('crazyflie_obs')
    planner = experts.Planner(task, experts.RECIPES[task.name])
    x, spheres = task.sample(1, torch.Generator().manual_seed(3))
    nominal, random = planner.plan(x, spheres, np.random.default_rng(0))[0], np.random.default_rng(1)
    made = [experts.perturbed(planner, nominal, random) for _ in range(400)]
    gaps = np.array([float(s.gap(y[:, :3])) for y, s in made])
    assert gaps.min() >= experts.START_GAP - 1e-9 and 0.02 < (gaps < task.margin).mean() < 0.12
    moved = np.array([y[0].numpy() for y, _ in made])
    away = np.linalg.norm(moved[:, None, :3] - nominal.x[None, :, :3], axis=2).min(axis=1)
    assert 0.02 < np.median(away) < 0.08
    speeds = np.linalg.norm(moved[:, 6:9], axis=1)
    assert speeds.max() > 1.1 * np.linalg.norm(nominal.x[:, 6:9], axis=1).max()


def test_behind_a_wall_lines_lead_to_no_plan_and_detours_do(tmp_path):
    settings = experts.Settings('crazyflie_wall', trajectories=1, restarts=0)
    with pytest.raises(ValueError, match='none of 1 starts led to a plan'):
        experts.make(replace(settings, detours=0), tmp_path / 'a.npz')
    d = experts.make(settings, tmp_path / 'b.npz')
    (_, x, _, spheres), = trajectories(d)
    gaps = [float(spheres.gap(torch.from_numpy(p[None, :3]))) for p in x]
    assert min(gaps) > 0.05 - 2e-3 and np.abs(x[-1]).max() < 0.03 and np.linalg.norm(x[0, :3]) > 1.2
    assert d.about['detours'] is None and d.about['recipe']['detours'] == 8


@pytest.mark.parametrize('solver, near', [('interior_point', 1e-6), ('augmented_lagrangian', 1e-4)])
def test_another_solver_finds_the_same_plan(solver, near):
    task = tasks.make('crazyflie_obs')
    recipe = replace(experts.RECIPES[task.name], horizon=12, length=12, rest=np.inf, guesses=first_line)
    x, spheres = task.sample(1, torch.Generator().manual_seed(2))
    plans = [experts.Planner(task, recipe, name).plan(x, spheres, np.random.default_rng(0)) for name in (
        'realtime', solver)]
    assert not plans[0][1] and not plans[1][1]
    assert np.abs(plans[0][0].x - plans[1][0].x).max() < near and plans[0][0].value == pytest.approx(
        plans[1][0].value, rel=near)
    with pytest.raises(ValueError, match="solver = 'simplex'; expected one of realtime, interior_point"):
        experts.Settings('crazyflie_obs', solver='simplex')


def first_line(task, x, T, random):
    yield next(experts.deflected_lines(task, x, T, random))


def test_parts_made_before_a_setting_existed_are_continued(tmp_path):
    settings, path = experts.Settings('crazyflie_obs', trajectories=1, restarts=0), tmp_path / 'a.npz'
    experts.make(settings, path)
    note = path.with_suffix('.parts') / 'settings.json'
    old = json.loads(note.read_text())
    for removed in (old, old['recipe']):
        removed.pop('detours')
    note.write_text(json.dumps(old))
    experts.make(settings, path)
    assert 'detours' in json.loads(note.read_text())


def test_parts_of_other_settings_are_not_mixed_in(tmp_path):
    path = tmp_path / 'a.npz'
    experts.make(experts.Settings('crazyflie_obs', trajectories=1, restarts=0), path)
    with pytest.raises(ValueError, match='Delete the folder'):
        experts.make(experts.Settings('crazyflie_obs', trajectories=1, restarts=0, seed=2), path)


def test_a_path_through_a_sphere_is_noticed():
    task = tasks.make('crazyflie_obs')
    planner = experts.Planner(task, experts.RECIPES[task.name])
    T = planner.recipe.horizon
    rest, hover = np.zeros((T + 1, 12)), np.ones((T, 4))
    far, near = np.full((T + 1, 1, 3), 9.0), np.tile([0.12, 0.0, 0.0], (T + 1, 1, 1))
    assert planner.check(rest, hover, far, np.array([0.1]))[0] == ''
    reason, cut = planner.check(rest, hover, near, np.array([0.1]))
    assert 'cut by 0.030 m' in reason and cut == pytest.approx([0.03])
    assert planner.check(rest, hover, near, np.array([0.1]), grace=T)[0] == ''
    assert 'transition' in planner.check(rest, 1.1 * hover, far, np.array([0.1]))[0]


def test_the_command_says_where_demonstrations_come_from(tmp_path, capsys):
    path = tmp_path / 'a.npz'
    arguments = ['crazyflie_obs', '--trajectories', '1', '--restarts', '0', '--output', str(path)]
    assert experts.main([*arguments, '--json']) == 0
    told, about = json.loads(capsys.readouterr().out), datasets.load(path).about
    assert told['demonstrations'] == 1 and told['output'] == str(path)
    assert about['command'].startswith('deqmpc experts crazyflie_obs') and about['seed'] == 0 and about['commit']
    assert experts.main(['juggling']) == 2 and "'juggling'" in capsys.readouterr().err


def test_quadrotor_demonstrations_flip_and_earn_more_than_the_released_ones_from_the_same_starts(tmp_path):
    file = released('quadrotor')
    made = experts.make(experts.Settings('quadrotor', 3, 0, starts=str(file)), tmp_path / 'a.npz')
    given = datasets.load(file)
    assert np.allclose(made.states[made.first], given.states[given.first[:3]])
    assert np.linalg.norm(made.states[made.first, 3:6], axis=1).min() > 1.0  # the shadow set
    assert np.abs(made.states[made.first + made.lengths - 1]).max() < 0.1
    assert made.about['nominal_return_mean'] > made.about['starts_return_mean'] + 20.0
    with pytest.raises(ValueError, match='expected at least 1 of 14'):
        experts.make(experts.Settings('qpole', 1, 0, starts=str(file)), tmp_path / 'b.npz')


def released(name):
    folder = os.environ.get('DEQMPC_DATA')
    file = Path(folder or '.') / 'experts' / f'{name}.npz'
    if not folder or not file.exists():
        pytest.skip('DEQMPC_DATA has no experts: the released demonstrations are not there')
    return file


@pytest.mark.parametrize('name', ['qpole', 'qpole_obs'])
def test_the_pole_is_swung_up_and_held_without_touching_a_sphere(name, tmp_path):
    task, d = tasks.make(name), experts.make(experts.Settings(name, 2, 0), tmp_path / 'a.npz')
    for _, x, u, spheres in trajectories(d):
        X = torch.from_numpy(x)
        assert (task.step(X[:-1], torch.from_numpy(u[:-1])) - X[1:]).abs().max() < 1e-4  # stored in single precision
        assert (task.wrapped(X[-1]) - task.goal).abs().max() < 0.1
        assert spheres.gap(X[:, :3]).min() > task.margin - 2e-3
        assert task.u_low - 1e-6 < u.min() and u.max() < task.u_high + 1e-6
    assert d.about['nominal_return_mean'] > 0.85 * task.steps * task.best_reward


def test_spheres_that_chase_follow_the_demonstration(tmp_path):
    task, d = tasks.make('qpole_dynobs'), experts.make(experts.Settings('qpole_dynobs', 1, 0), tmp_path / 'a.npz')
    assert d.moving
    spheres = d.starts([0])[1]
    for t, x in enumerate(torch.from_numpy(d.states.astype(float))):
        spheres = task.move(spheres, x[None]) if t else spheres
        assert np.abs(spheres.centers[0].numpy() - d.centers[t]).max() < 1e-4
        assert not task.failed(x[None], spheres)
