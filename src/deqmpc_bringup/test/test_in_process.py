import json

import pytest

from deqmpc import interface
from deqmpc_bringup import trial
from deqmpc_bringup.composition import compose
from deqmpc_bringup.in_process import InProcessTrial, settings_of
from deqmpc_controller.node import Settings as PolicySettings
from deqmpc_ros.settings import SettingsError
from flight_log.bag import read_raw
from flight_log.evaluation import evaluate
from flight_log.flight import load_flight


def flown(path, **given):
    rows = compose('sim', {'trial': 'true', 'seed': '4', 'max_steps': '12', 'start': '0.6 0.2 1.0 0.0',
                           'run_dir': str(path), **given})
    done = InProcessTrial(rows).run()
    return done, path / 'bag'


def data(bag, *topics):
    """Everything on `topics`, as bytes: times, numbers, order."""
    return list(read_raw(bag, [t.resolve('cf1') for t in topics]))


MOTION = (interface.TRUTH, interface.ODOM, interface.PLAN, interface.SETPOINT, interface.GO_TO)


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    return flown(tmp_path_factory.mktemp('first'))


def test_a_trial_in_process_runs_the_whole_protocol_and_lands(first):
    done, bag = first
    assert done.success and done.steps == 12
    flight = load_flight(bag)
    phases = [s.phase for s in flight.status]
    assert [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p] == [
        'disarmed', 'armed', 'taking_off', 'holding', 'following', 'holding', 'landing', 'disarmed']
    assert evaluate(flight).min_clearance > 0.0


def test_equal_seeds_give_equal_flights_to_the_bit(first, tmp_path):
    _, again = flown(tmp_path)
    assert data(first[1], *MOTION) == data(again, *MOTION)


def test_another_seed_gives_another_flight(first, tmp_path):
    _, other = flown(tmp_path, seed='5')
    assert data(first[1], interface.OBSTACLES) != data(other, interface.OBSTACLES)
    assert data(first[1], interface.TRUTH) != data(other, interface.TRUTH)


def test_settings_in_process_are_those_of_the_nodes(tmp_path):
    path = tmp_path / 'p.yaml'
    path.write_text('/**:\n  policy:\n    ros__parameters: {rate: 20, goal: [0.5, 0.0, 1.2, 0.1]}\n')
    row = next(r for r in compose('sim', {'params': str(path)}) if r.name == 'policy')
    s = settings_of(row, PolicySettings)
    assert (s.rate, s.goal, s.policy) == (20.0, [0.5, 0.0, 1.2, 0.1], 'deq_mpc_deq')
    path.write_text('/**:\n  policy:\n    ros__parameters: {rat: 20}\n')
    with pytest.raises(SettingsError, match='/cf1/policy: unknown parameter rat'):
        settings_of(row, PolicySettings)


@pytest.mark.parametrize(('text', 'seeds'), [('3', [3]), ('0:3', [0, 1, 2]), ('1,4', [1, 4])])
def test_seeds_are_read(text, seeds):
    assert trial.parse_seeds(text) == seeds


@pytest.mark.parametrize('text', ['', 'x', '3:1', '-1', '1:2:3'])
def test_wrong_seeds_are_named(text):
    with pytest.raises(ValueError, match='--seeds'):
        trial.parse_seeds(text)


def test_several_seeded_trials_are_flown_and_evaluated_by_one_command(tmp_path, capsys):
    status = trial.main(['sim', '--in-process', '--seeds', '0:2', '--jobs', '1', '--json', 'max_steps:=3',
                         f'run_dir:={tmp_path / "run"}'])
    output = json.loads(capsys.readouterr().out)
    assert [t['steps'] for t in output['trials']] == [3, 3]
    assert status in (0, 1)
    assert (tmp_path / 'run' / 'seed_001' / 'arguments.json').is_file()
