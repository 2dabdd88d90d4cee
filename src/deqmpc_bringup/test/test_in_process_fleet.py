"""Two drones swap places: each policy knows the other by its odometry alone."""

import dataclasses

import numpy as np
import pytest

from deqmpc import interface
from deqmpc_bringup.composition import compose, share_dir
from deqmpc_bringup.in_process_fleet import InProcessFleet
from flight_log.bag import read_bag
from flight_log.evaluation import evaluate
from flight_log.flight import load_flight

TOUCH = 0.14  # m between the centres of two Crazyflies whose propellers touch: 2 (0.046 + 0.023)


def rows(path, **given):
    return compose('sim', {'fleet': str(share_dir() / 'config' / 'fleet' / 'two.yaml'), 'trial': 'true', 'seed': '3',
                           'obstacles': 'off', 'max_steps': '60', 'run_dir': str(path), **given})


def fleet(path, **given):
    return InProcessFleet(rows(path, **given))


@pytest.fixture(scope='module')
def swapped(tmp_path_factory):
    path = tmp_path_factory.mktemp('fleet')
    flown = fleet(path, policy='mpc_only')
    return flown, flown.run(), path


def test_two_drones_swap_places_without_coming_near_each_other(swapped):
    flown, done, _ = swapped
    assert done.success and done.distance < 0.1, done  # of its goal, where the other one began
    assert flown.distance > 0.25  # neighbour_radius of the policy


def test_the_learned_policy_swaps_them_without_a_touch_too(tmp_path):
    flown = fleet(tmp_path, record='false', policy='deq_mpc_deq')
    done = flown.run()
    assert done.success and done.distance < 0.1, done
    assert flown.distance > TOUCH + 0.05


def test_the_bag_of_each_drone_is_its_own_flight_and_holds_what_its_policy_heard_of_the_other(swapped):
    flown, _, path = swapped
    for name, other in (('cf1', 'cf2'), ('cf2', 'cf1')):
        bag = path / name / 'bag'
        evaluated = evaluate(load_flight(bag))
        assert evaluated.robot == name and evaluated.success, evaluated.failure
        assert evaluated.goal == flown.trials[name].conductor.settings.goal[:3]
        heard = [interface.read_odometry(m).position for _, _, _, m in read_bag(bag, [f'/{other}/odom'])]
        assert heard[-1] == pytest.approx(flown.trials[other].state.position)


def test_drones_that_do_not_hear_each_other_would_have_met(tmp_path):
    deaf = []
    for row in rows(tmp_path, record='false', policy='mpc_only'):
        words = list(row.ros_arguments)
        for k in [k for k, word in enumerate(words) if word.startswith('neighbours:=')]:
            del words[k - 1:k + 1]  # with its -p
        deaf.append(dataclasses.replace(row, ros_arguments=tuple(words)))
    flown = InProcessFleet(deaf)
    for trial in flown.trials.values():
        trial.on_neighbour = lambda name, state: None
    flown.run()
    assert flown.distance < TOUCH


def test_a_drone_whose_neighbour_falls_silent_gets_no_plan_and_comes_down(tmp_path):
    flown = fleet(tmp_path, record='false', policy='mpc_only')
    first, second = flown.trials.values()
    heard = first.on_neighbour
    first.on_neighbour = lambda name, state: heard(name, state) if first.conductor.stage != 'following' else None
    done = flown.run()
    assert not first.conductor.done.success and second.conductor.done.success
    assert 'cf1: ' in done.reason and 'no plan for' in done.reason
    assert np.abs(first.crazyflie.truth().velocity).max() < 0.05 and first.crazyflie.truth().position[2] < 0.05
