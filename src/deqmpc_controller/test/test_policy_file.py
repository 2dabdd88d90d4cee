"""The policy file of the policy node."""

from dataclasses import asdict

import pytest
import torch
import yaml

from deqmpc import tasks
from deqmpc.policies import model
from deqmpc.training.imitation import build_model
from deqmpc_controller.node import Settings, policy_from
from deqmpc_ros.node import SettingsError


@pytest.fixture
def folder(tmp_path):
    """A model folder and policy file side by side, as config/ and models/ are."""
    task = tasks.make('crazyflie_obs')
    torch.manual_seed(0)
    made = build_model(task, 'deq_mpc_nn', 16)
    model.save(tmp_path / 'models/m', model.Model(made.network, asdict(made.settings), task.flight_problem, {}))
    (tmp_path / 'config').mkdir()
    return tmp_path


def test_a_path_in_the_policy_file_is_relative_to_the_file_wherever_the_flight_is_started(folder, monkeypatch):
    file = folder / 'config/p.yaml'
    file.write_text(yaml.safe_dump({'model': '../models/m'}))
    monkeypatch.chdir('/')
    assert policy_from(Settings(policy='deq_mpc_nn', policy_file=str(file)), 'test').horizon == 5


def test_a_missing_model_is_an_error_that_names_its_folder(folder):
    file = folder / 'config/p.yaml'
    file.write_text(yaml.safe_dump({'model': '../models/none'}))
    with pytest.raises(SettingsError, match='models/none'):
        policy_from(Settings(policy='deq_mpc_nn', policy_file=str(file)), 'test')
