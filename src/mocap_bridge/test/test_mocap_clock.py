"""The clock map against simulated clocks and networks whose true offset is known."""

import math

import numpy as np
import pytest

from mocap_bridge.clock import ClockMap, ClockSettings

EPOCH = 1.7e9  # s; as large as a ROS clock is


class Simulation:
    """A server clock that drifts against the ROS clock, frames at 100 Hz, echoes at 2 Hz."""

    def __init__(self, seed, drift=5e-5, least=2e-4, jitter=1e-3, echoes=True):
        self.rng, self.drift, self.least, self.jitter = np.random.default_rng(seed), drift, least, jitter
        self.echoes, self.map, self.t = echoes, ClockMap(), 0.0
        self.shift = 0.0  # s, of a ROS clock that was set

    def server(self, t):
        return 1000.0 + t * (1.0 + self.drift)

    def ros(self, t):
        return EPOCH + t + self.shift

    def delay(self):
        return self.least + self.rng.exponential(self.jitter)

    def run(self, seconds):
        """Errors (s) of the map after each frame: mapped minus true ROS time of an exposure 4 ms ago."""
        errors = []
        for k in range(round(seconds * 100)):
            t = self.t = self.t + 0.01
            if self.echoes and k % 50 == 0:
                out, back = self.delay(), self.delay()
                self.map.observe_echo(self.ros(t), self.server(t + out), self.ros(t + out + back))
            self.map.observe_frame(self.server(t), self.ros(t + self.delay()))
            errors.append(self.map.to_ros(self.server(t - 0.004)) - self.ros(t - 0.004))
        return np.array(errors)


@pytest.mark.parametrize('echoes', [True, False])
@pytest.mark.parametrize('drift', [-1e-4, 0.0, 1e-4])
def test_the_map_follows_drift_through_jitter_to_within_half_a_millisecond(echoes, drift):
    simulation = Simulation(1, drift=drift, echoes=echoes)
    simulation.run(5.0)
    assert np.abs(simulation.run(60.0)).max() < 5e-4


def test_the_true_offset_never_leaves_the_interval():
    simulation = Simulation(2, drift=1e-4)
    for _ in range(2000):
        simulation.run(0.01)
        true = simulation.ros(simulation.t) - simulation.server(simulation.t)
        assert simulation.map.lower - 1e-6 <= true <= simulation.map.upper + 1e-6


def test_a_server_that_is_slow_to_answer_echoes_does_not_shift_the_map():
    simulation = Simulation(3, drift=0.0, jitter=2e-4)
    rng = np.random.default_rng(3)
    for k in range(3000):
        t = simulation.t = simulation.t + 0.01
        if k % 50 == 0:
            wait = rng.uniform(0.003, 0.010)  # it polls its command port once a frame
            answered = t + wait
            simulation.map.observe_echo(simulation.ros(t), simulation.server(answered),
                                        simulation.ros(answered))
        simulation.map.observe_frame(simulation.server(t), simulation.ros(t + simulation.delay()))
    error = simulation.map.to_ros(simulation.server(t)) - simulation.ros(t)
    assert abs(error) < 6e-4


@pytest.mark.parametrize('echoes', [True, False])
@pytest.mark.parametrize('step', [-3600.0, -0.5, -0.02, 0.02, 0.5, 3600.0])
def test_a_clock_that_is_set_is_followed_within_four_seconds(echoes, step):
    simulation = Simulation(4, echoes=echoes)
    simulation.run(10.0)
    assert simulation.map.steps == 0
    simulation.shift = step
    simulation.run(4.0)
    assert np.abs(simulation.run(10.0)).max() < 1e-3
    assert simulation.map.steps >= 1


def test_a_stall_of_the_network_is_not_taken_for_a_set_clock():
    simulation = Simulation(5, echoes=False)
    simulation.run(10.0)
    for _ in range(50):  # half a second of frames that all come 80 ms late
        t = simulation.t = simulation.t + 0.01
        simulation.map.observe_frame(simulation.server(t), simulation.ros(t + 0.08))
    assert np.abs(simulation.run(1.0)).max() < 1e-3
    assert simulation.map.steps == 0


def test_one_wrong_observation_does_not_move_the_map():
    simulation = Simulation(6)
    simulation.run(10.0)
    server = simulation.server(simulation.t)
    simulation.map.observe_frame(server + 100.0, simulation.ros(simulation.t))
    simulation.map.observe_echo(EPOCH, server, EPOCH + 1e-3)
    assert np.abs(simulation.run(1.0)).max() < 1e-3
    assert simulation.map.steps == 0


def test_an_empty_map_says_that_it_knows_nothing():
    empty = ClockMap(ClockSettings())
    assert not empty.ready and not empty.settled
    assert math.isnan(empty.offset) and math.isinf(empty.uncertainty) and math.isnan(empty.age(3.0))
