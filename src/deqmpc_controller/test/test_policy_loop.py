import dataclasses

import numpy as np
import pytest

from deqmpc.interface import POLICY_KEYS
from deqmpc.neighbours import Neighbours
from deqmpc.policies.base import PolicyStatus, load_policy
from deqmpc.types import Obstacles, Plan, RigidBodyState
from deqmpc_controller.plan_gate import ACCEPTED
from deqmpc_controller.policy_loop import PolicyLoop

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])


class Clock:
    def __init__(self):
        self.t = 0.0

    def __call__(self):
        return self.t


class StandStill:
    """Plans to stay; its warm start counts the calls since a cold start."""

    name, dt, horizon = 'stand_still', 0.1, 5

    def __init__(self, clock, cost=0.01):
        self.clock, self.cost, self.residual, self.warm_starts = clock, cost, 0.0, []

    def plan(self, state, obstacles, warm_start):
        self.clock.t += self.cost
        self.warm_starts.append(warm_start)
        n = self.horizon + 1
        plan = Plan(state.stamp, self.dt * np.arange(n), np.tile(state.position, (n, 1)),
                    np.tile(state.quaternion, (n, 1)), np.zeros((n, 3)), np.zeros((n, 3)), np.zeros((n, 3)))
        return plan, (warm_start or 0) + 1, PolicyStatus(True, 'ok', 3, self.residual)


def state(stamp, position=(1.0, 0.0, 1.0)):
    return RigidBodyState(stamp, np.array(position), LEVEL, np.zeros(3), np.zeros(3))


@pytest.fixture
def loop():
    clock = Clock()
    return PolicyLoop(StandStill(clock), clock=clock)


def test_no_plan_is_made_before_odometry_and_obstacles_came(loop):
    assert loop.tick(0.0).gate == 'no odometry yet'
    loop.on_odometry(state(0.1))
    assert 'no obstacles yet' in loop.tick(0.1).gate
    loop.on_obstacles(Obstacles.none())
    assert loop.tick(0.15).gate == ACCEPTED


def test_stale_or_broken_odometry_gives_no_plan_and_drops_the_warm_start(loop):
    loop.on_obstacles(Obstacles.none())
    loop.on_odometry(state(0.0))
    assert loop.tick(0.0).plan is not None
    assert loop.tick(0.1).plan is not None
    stale = loop.tick(0.25)
    assert stale.plan is None and 'odometry is 0.25 s old' in stale.gate
    loop.on_odometry(state(0.3, position=(np.nan, 0.0, 1.0)))
    assert 'not finite' in loop.tick(0.3).gate
    loop.on_odometry(state(0.4))
    assert loop.tick(0.4).plan is not None
    assert loop.policy.warm_starts == [None, 1, None]


def test_a_refused_plan_is_not_flown_and_does_not_seed_the_next(loop):
    loop.on_obstacles(Obstacles.none())
    loop.policy.residual = 1.0
    for k in range(2):
        loop.on_odometry(state(0.1 * k))
        tick = loop.tick(0.1 * k)
        assert tick.plan is None and 'residual' in tick.gate
    assert loop.policy.warm_starts == [None, None]


@pytest.mark.parametrize('step', [-3600.0, -1.5, 1.5, 3600.0])
def test_a_clock_that_is_set_stops_the_plans_until_odometry_carries_the_new_time_and_no_longer(loop, step):
    loop.on_obstacles(Obstacles.none())
    loop.on_odometry(state(5000.0))
    assert loop.tick(5000.0).plan is not None
    assert loop.tick(5000.1 + step).plan is None
    loop.on_odometry(state(5000.2 + step))
    assert loop.tick(5000.2 + step).gate == ACCEPTED


def test_older_odometry_never_replaces_newer(loop):
    loop.on_odometry(state(1.0))
    loop.on_odometry(state(0.5))
    assert loop.state.stamp == 1.0


def test_deadline_misses_count_late_ticks_and_slow_solves(loop):
    loop.on_obstacles(Obstacles.none())
    for now in (0.0, 0.1, 0.2, 0.52):  # two ticks were swallowed before the last
        loop.on_odometry(state(now))
        tick = loop.tick(now)
    assert tick.misses == 2
    loop.policy.cost = 0.15
    loop.on_odometry(state(0.6))
    assert loop.tick(0.6).misses == 3


def test_moving_obstacles_must_be_fresh_and_static_ones_need_not(loop):
    field = Obstacles(0.0, np.array([[9.0, 9.0, 1.0]]), np.array([0.1]), np.zeros((1, 3)))
    loop.on_obstacles(field)
    loop.on_odometry(state(5.0))
    assert loop.tick(5.0).gate == ACCEPTED
    loop.on_obstacles(dataclasses.replace(field, velocity=np.array([[0.1, 0.0, 0.0]])))
    assert 'moving obstacles are 5.05 s old' in loop.tick(5.05).gate


def test_a_neighbour_must_be_heard_before_a_plan_is_made_and_is_a_moving_obstacle_of_it():
    loop = PolicyLoop(load_policy('mpc_only', {}), neighbours=Neighbours(['cf2']))
    loop.on_obstacles(Obstacles.none())
    loop.on_odometry(state(0.0))
    assert loop.tick(0.0).gate == 'no odometry of cf2 yet'
    loop.neighbours.on_odometry('cf2', state(0.0, position=(0.6, 0.02, 1.0)))
    plan = loop.tick(0.0).plan
    assert np.linalg.norm(plan.position - [0.6, 0.02, 1.0], axis=1).min() > 0.25
    assert 'odometry of cf2 is 0.60 s old' in _after(loop, 0.6).gate


def _after(loop, now):
    loop.on_odometry(state(now))
    return loop.tick(now)


def test_a_late_tick_is_measured_from_when_it_was_due(loop):
    for now in (0.0, 0.1, 0.23):
        tick = loop.tick(now)
    assert tick.values('p', 0.25, 0.0)['tick_ms'] == pytest.approx(50.0)
    assert loop.tick(0.3).values('p', 0.301, 0.0)['tick_ms'] == pytest.approx(1.0)
    assert loop.tick(0.8).values('p', 0.801, 0.0)['tick_ms'] == pytest.approx(1.0)  # missed ticks: a new schedule


def test_a_tick_reports_every_key_of_the_interface(loop):
    assert set(loop.tick(0.0).values('p', 0.002, 0.01)) == set(POLICY_KEYS)


def test_mpc_only_plans_ticks_in_closed_loop_through_the_gate():
    loop = PolicyLoop(load_policy('mpc_only', {}))
    loop.on_obstacles(Obstacles(0.0, np.array([[0.5, 0.02, 1.0]]), np.array([0.1]), np.zeros((1, 3))))
    now, current = 0.0, state(0.0)
    for _ in range(60):
        loop.on_odometry(current)
        tick = loop.tick(now)
        assert tick.gate == ACCEPTED, tick.gate
        p = tick.plan
        now += 0.1
        current = RigidBodyState(now, p.position[1], p.quaternion[1], p.velocity[1], p.rates[1])
        assert np.linalg.norm(current.position - [0.5, 0.02, 1.0]) > 0.1
    assert np.linalg.norm(current.position - [0.0, 0.0, 1.0]) < 0.05
