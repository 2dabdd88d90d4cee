"""Replanning of recorded ticks, and flying a recorded start again."""

import csv
import io
import json

import numpy as np
import pytest

from deqmpc_bringup import replan
from deqmpc_bringup.composition import CompositionError, compose
from deqmpc_bringup.in_process import InProcessTrial, settings_of
from deqmpc_controller.node import Settings as PolicySettings
from deqmpc_controller.plan_gate import ACCEPTED
from flight_log.flight import load_flight

GIVEN = {'trial': 'true', 'seed': '4', 'max_steps': '12', 'start': '0.6 0.2 1.0 0.0'}


@pytest.fixture(scope='module')
def bag(tmp_path_factory):
    path = tmp_path_factory.mktemp('flown')
    InProcessTrial(compose('sim', {**GIVEN, 'policy': 'mpc_only', 'obstacles': 'moving', 'run_dir': str(path)})).run()
    return path / 'bag'


def replanned(bag, policy):
    row = next(r for r in compose('replay', {'bag': str(bag), 'policy': policy}) if r.name == 'policy')
    rows, plans = zip(*replan.replan(load_flight(bag), settings_of(row, PolicySettings)), strict=True)
    return replan.summarise(list(rows), list(plans)), rows, plans


def test_the_policy_that_flew_gives_the_flown_plans_and_the_same_refusals(bag):
    summary, rows, _ = replanned(bag, 'mpc_only')
    assert summary.planned == summary.planned_flown > 12
    assert [r.gate == ACCEPTED for r in rows] == [r.gate_flown == ACCEPTED for r in rows]
    # m; stamps are rounded to ns in messages, and a solve that starts otherwise ends within its tolerance elsewhere
    assert summary.distance_p50 < 1e-8 and summary.distance_max < 1e-4
    both = [r for r in rows if np.isfinite(r.distance)]
    assert len(both) == summary.planned
    np.testing.assert_allclose([r.clearance for r in both], [r.clearance_flown for r in both], atol=1e-4)


def test_the_same_bag_and_policy_give_the_same_plans_bit_for_bit_and_another_policy_does_not(bag):
    one, other = replanned(bag, 'deq_mpc_deq')[0], replanned(bag, 'deq_mpc_deq')[0]
    assert one.digest == other.digest and one.planned > 12
    assert one.digest != replanned(bag, 'mpc_only')[0].digest and one.distance_max > 1e-3


def test_clearance_of_a_plan_counts_where_spheres_will_be():
    from deqmpc.types import Obstacles
    field = Obstacles(5.0, np.array([[1.0, 0.0, 1.0]]), np.array([0.1]), np.array([[-1.0, 0.0, 0.0]]))
    times, still = 5.0 + np.array([0.0, 0.5, 1.0]), np.tile([0.0, 0.0, 1.0], (3, 1))
    assert replan.clearance(times, still, field, 5.0) == pytest.approx(-0.1)  # it arrives after 1 s
    assert replan.clearance(times[:2], still[:2], field, 5.0) == pytest.approx(0.4)
    assert replan.clearance(times, still, None, 5.0) == np.inf and np.isnan(replan.clearance(None, None, field, 5.0))


def test_the_command_prints_writes_and_steps(bag, tmp_path, capsys, monkeypatch):
    assert replan.main([str(bag), '--policy', 'mpc_only', '--json', '--csv', str(tmp_path / 'ticks.csv')]) == 0
    said = json.loads(capsys.readouterr().out)
    with (tmp_path / 'ticks.csv').open() as file:
        assert len(list(csv.DictReader(file))) == said['ticks']
    monkeypatch.setattr('sys.stdin', io.StringIO('\n\n'))
    assert replan.main([str(bag), '--policy', 'mpc_only', '--step']) == 0
    assert capsys.readouterr().out.count('from the flown plan, clearance') == 3
    assert replan.main([str(bag), '--policy', 'none_such']) == 2
    assert 'none_such' in capsys.readouterr().err
    assert replan.main([str(tmp_path / 'absent'), '--policy', 'mpc_only']) == 2
    assert 'no such file' in capsys.readouterr().err


def test_a_recorded_start_is_flown_again_in_simulation(tmp_path):
    flown = tmp_path / 'flown'
    InProcessTrial(compose('sim', {**GIVEN, 'policy': 'mpc_only', 'obstacles': 'static', 'run_dir': str(flown)})).run()
    flight = load_flight(flown / 'bag')
    again = load_flight(replan.refly(flight, {'policy': 'mpc_only', 'max_steps': '12'}, tmp_path / 'again'))
    def start(f):
        follows = next(s.t for s in f.status if s.phase == 'following')
        return f.odom.position[np.searchsorted(f.odom.t, follows)]
    assert np.linalg.norm(start(flight) - start(again)) < 0.1
    np.testing.assert_allclose(again.spheres.position[0], flight.spheres.position[0], atol=1e-9)
    with pytest.raises(CompositionError, match='never followed'):
        flight.status.clear()
        replan.refly(flight, {}, tmp_path / 'none')
