# SPDX-License-Identifier: GPL-3.0-or-later
import dataclasses

import numpy as np
import pytest

from crazyflie_interface.collision import Encounter, encounter, instants
from crazyflie_interface.guard import Inputs, decide
from crazyflie_interface.settings import GuardSettings
from deqmpc.types import Obstacles

S = GuardSettings()
CLEAR = Encounter(0.4, 0.1, 0, 0.5)
HIT = Encounter(-0.08, 0.3, 2, 0.25)
DEEPER = Encounter(-0.09, 0.3, 2, 0.25)
LEADS_OUT = Encounter(-0.08, 0.0, 2, -0.08)
FOLLOWING = Inputs('following', pose_age=0.01)


def spheres(*rows):
    """Rows of x y z radius vx vy vz."""
    rows = np.array(rows, float).reshape(-1, 7)
    return Obstacles(0.0, rows[:, :3], rows[:, 3], rows[:, 4:])


def test_the_nearest_approach_of_a_straight_flight_is_where_geometry_says():
    ahead = np.linspace(0.0, 2.0, 201)
    path = ahead[:, None] * [1.0, 0.0, 0.0]
    met = encounter(path, ahead, spheres([1.0, 0.3, 0.0, 0.1, 0, 0, 0], [0, 0, 2, 0.1, 0, 0, 0]))
    assert met.clearance == pytest.approx(0.2) and met.after == pytest.approx(1.0) and met.sphere == 0
    assert met.present == pytest.approx(np.hypot(1.0, 0.3) - 0.1)


def test_a_moving_sphere_is_met_where_it_will_be_and_not_where_it_is():
    ahead = np.linspace(0.0, 1.0, 101)
    rest = np.zeros((101, 3))
    met = encounter(rest, ahead, spheres([1.0, 0, 0, 0.1, -1.0, 0, 0]))
    assert met.clearance == pytest.approx(-0.1) and met.after == pytest.approx(1.0)
    passing = encounter(rest, ahead, spheres([0.0, 0.2, 0, 0.1, 0, 1.0, 0]))
    assert passing.clearance == passing.present == pytest.approx(0.1)


def test_an_empty_room_is_never_met():
    met = encounter(np.zeros((2, 3)), np.array([0.0, 1.0]), Obstacles.none())
    assert met.clearance == np.inf and not met.worse_than(S.collision_margin)


def test_a_path_that_only_leads_out_of_a_sphere_is_no_collision():
    assert HIT.worse_than(S.collision_margin)
    assert not LEADS_OUT.worse_than(S.collision_margin) and not CLEAR.worse_than(S.collision_margin)


def test_instants_reach_the_horizon_in_steps_below_five_centimetres_at_one_metre_a_second():
    for horizon in (0.01, 0.3, 0.5, 2.0):
        t = instants(horizon)
        assert t[0] == 0.0 and t[-1] == horizon and np.diff(t).max() <= 0.05


@pytest.mark.parametrize('which', ['planned', 'measured'])
def test_a_predicted_collision_that_lasts_is_held_and_one_that_passes_is_not(which):
    inputs = dataclasses.replace(FOLLOWING, **{which: HIT}, held=CLEAR, landed=CLEAR)
    assert decide(dataclasses.replace(inputs, meeting_for=S.collision_time), S).answer == 'follow'
    answer = decide(dataclasses.replace(inputs, meeting_for=S.collision_time + 0.02), S)
    assert answer.answer == 'hold' and 'sphere 2 in 0.30 s' in answer.reason and '-0.08 m' in answer.reason


def test_a_hold_that_would_be_hit_harder_than_a_landing_is_no_way_out():
    inputs = dataclasses.replace(FOLLOWING, planned=HIT, meeting_for=1.0)
    assert decide(dataclasses.replace(inputs, held=DEEPER, landed=HIT), S).answer == 'land'
    assert decide(dataclasses.replace(inputs, held=HIT, landed=DEEPER), S).answer == 'hold'
    assert decide(dataclasses.replace(inputs, held=CLEAR, landed=HIT), S).answer == 'hold'


def test_only_the_guards_own_hold_gives_way_to_a_sphere():
    hold = Inputs('holding', pose_age=0.01, held=HIT, landed=CLEAR)
    assert decide(hold, S).answer == 'hold'
    answer = decide(dataclasses.replace(hold, guard_held_for=0.1), S)
    assert answer.answer == 'land' and 'the hold would be hit' in answer.reason


@pytest.mark.parametrize('phase', ['armed', 'taking_off', 'landing'])
def test_spheres_do_not_matter_where_no_plan_is_followed(phase):
    inputs = Inputs(phase, pose_age=0.01, planned=HIT, measured=HIT, meeting_for=9.0, held=HIT, landed=CLEAR)
    assert decide(inputs, S).reason == ''
