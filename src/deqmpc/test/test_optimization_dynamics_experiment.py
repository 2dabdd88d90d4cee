"""The experiment on optimization-based dynamics runs as a whole, and its problems are the paper's."""

import csv

import pytest
import torch

from deqmpc import reproduce
from deqmpc.reproduce import command
from deqmpc.solvers import ilqr


@pytest.fixture(scope='module')
def experiment():
    return command.load(command.experiments()['optimization_dynamics'])


def test_a_smoke_run_has_a_row_for_every_problem_and_a_picture(tmp_path, capsys):
    assert reproduce.main(['optimization_dynamics', '--budget', 'smoke', '--out', str(tmp_path)]) == 0
    with (tmp_path / 'results.csv').open() as file:
        made = list(csv.DictReader(file))
    experiment = command.load(command.experiments()['optimization_dynamics'])
    assert {r['task'] for r in made} == set(experiment.TASKS)
    for task, (_, xs, variants) in experiment.BUILDERS.items():
        assert {(r['variant'], r['x']) for r in made if r['task'] == task} == {
            (v, str(x)) for v in variants for x in (xs if v != 'unsmoothed' else xs[-1:])}
    assert (tmp_path / 'optimization_dynamics.png').read_bytes().startswith(b'\x89PNG')
    assert 'not judged' in capsys.readouterr().out


def test_an_unknown_task_is_one_clear_error(capsys):
    assert reproduce.main(['optimization_dynamics', '--tasks', 'bicycle']) == 1
    assert 'bicycle' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['acrobot', 'hopper', 'push'])
def test_the_derivatives_of_states_with_velocity_and_of_gaits_are_those_of_differences(experiment, name):
    build, xs, variants = experiment.BUILDERS[name]
    case = build(variants[0], xs[-1], experiment.SIZES['smoke'], 0)
    dynamics = case.problem.equations
    core = dynamics.dynamics
    core.mu = core.mu_grad
    start = ilqr.guess(case.problem, case.data, case.u)
    x = ilqr.rollout(case.problem, case.data.x_init, start.u)[0, :-1]
    _, A, B = dynamics.linearize(x, start.u[0])
    for direction in torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        if name == 'hopper':
            direction[:, -1] = 0.0  # its last state is given
        ahead, behind = (dynamics.step(x + s * direction, start.u[0]) for s in (1e-5, -1e-5))
        change = (A @ direction.unsqueeze(2)).squeeze(2)
        assert (change - (ahead - behind) / 2e-5).abs().max() < 1e-3 * (1.0 + change.abs().max())
    for i in range(dynamics.m):
        by = 1e-5 * torch.eye(dynamics.m, dtype=torch.float64)[i]
        change = (dynamics.step(x, start.u[0] + by) - dynamics.step(x, start.u[0] - by)) / 2e-5
        assert (B[..., i] - change).abs().max() < 1e-3 * (1.0 + B.abs().max())


def test_a_bundle_s_derivative_is_near_that_of_the_conditions(experiment):
    case = experiment.push('implicit', 'rotate', experiment.SIZES['smoke'], 0)
    exact = case.problem.equations.dynamics
    exact.mu = exact.mu_grad
    fitted = experiment.Bundle(exact, 48, 0)
    x, u = case.data.x_init[:, :10], torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    for a, b in zip(exact.linearize(x, u), fitted.linearize(x, u), strict=True):
        assert (a - b).abs().max() < 0.02 * a.abs().max()


def test_the_second_gait_is_that_of_the_paper(experiment):
    case = experiment.hopper('published', 2, experiment.SIZES['small'], 0)
    s = ilqr.solve(case.problem, case.data, ilqr.guess(case.problem, case.data, case.u, case.settings), case.settings,
                   case.constraints)
    assert s.converged.all() and s.violation[0] <= 1e-3
    assert float(s.cost[0]) + case.offset == pytest.approx(19.8, rel=0.02)
