# SPDX-License-Identifier: GPL-3.0-or-later
"""The node over a real ROS graph, with a drone behind the Radio protocol that obeys at once."""

import time
from unittest.mock import create_autospec

import numpy as np
import pytest
from crazyflie_bench import REPORTS

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
from rclpy.clock import ClockType  # noqa: E402
from rclpy.experimental import EventsExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402

from crazyflie_interface import radio  # noqa: E402
from crazyflie_interface.node import CrazyflieInterface  # noqa: E402
from crazyflie_interface.radio import Radio, RadioError, Telemetry  # noqa: E402
from deqmpc import interface  # noqa: E402
from deqmpc.types import Obstacles, Plan, RigidBodyState  # noqa: E402
from deqmpc_ros.messages import TYPES, message_class  # noqa: E402
from deqmpc_ros.node import SettingsError, now, publisher, subscription  # noqa: E402

DOMAIN = 83
LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
# Slack for a busy machine: the thresholds themselves are tested in simulated time.
SLACK = dict(uri='udp://127.0.0.1:19850', takeoff_duration=0.5, land_duration_min=0.3, land_speed=2.0,
             preflight_time=0.2, preflight_rate_min=1.0, preflight_rate_max=1000.0, preflight_latency=0.5,
             preflight_message_age=5.0, plan_warn=0.4, plan_hold=0.45,
             pose_warn=0.25, pose_hold=0.5, pose_land=2.0, pose_cut=10.0, telemetry_land=10.0,
             jump_margin=2.0)


class Drone:
    """An autospecced Radio and the position it commands."""

    def __init__(self):
        self.position, self.bits = np.array([0.0, 0.0, 0.02]), radio.CAN_ARM
        self.link, self.volts = 'up', 4.1
        self.radio = create_autospec(Radio, instance=True)
        self.radio.set_and_check_parameters.return_value = ()
        self.radio.telemetry.side_effect = lambda: Telemetry(
            link=self.link, stamp=time.monotonic(), battery_v=self.volts, supervisor=self.bits,
            position=self.position.copy(), yaw=0.0, variance=np.zeros(3), parameter_faults=())
        self.radio.arm.side_effect = self.arm
        self.radio.takeoff.side_effect = lambda height, _: self.position.__setitem__(2, height)
        self.radio.land.side_effect = lambda height, _: self.position.__setitem__(2, height)

    def arm(self, on):
        self.bits = radio.ARMED | radio.CAN_FLY if on else radio.CAN_ARM


class Graph:
    """The node under test and a client node that plays mocap, policy and trial."""

    def __init__(self, drone, **parameters):
        self.drone = drone
        self.node = CrazyflieInterface(
            drone.radio, namespace='cf1', use_global_arguments=False,
            parameter_overrides=[Parameter(k, value=v) for k, v in {**SLACK, **parameters}.items()])
        self.client = rclpy.create_node('client', namespace='cf1')
        self.executor = EventsExecutor()
        self.executor.add_node(self.node)
        self.executor.add_node(self.client)
        self.status, self.setpoints = [], []
        self.keep = [
            subscription(self.client, interface.STATUS, 'cf1',
                         lambda m: self.status.extend(interface.read_diagnostics(m))),
            subscription(self.client, interface.SETPOINT, 'cf1',
                         lambda m: self.setpoints.append(interface.read_plan(m)))]
        self.pose = publisher(self.client, interface.POSE, 'cf1')
        self.odometry = publisher(self.client, interface.ODOM, 'cf1')
        self.plan = publisher(self.client, interface.PLAN, 'cf1')
        self.reports = publisher(self.client, interface.DIAGNOSTICS, 'cf1')
        self.obstacles = publisher(self.client, interface.OBSTACLES, 'cf1')
        self.obstacles.publish(interface.obstacles_message(TYPES, Obstacles.none(now(self.client))))
        self.clients = {name: self.client.create_client(message_class(kind), f'/cf1/{name}')
                        for name, kind in interface.SERVICES.items()}
        self.timer = self.client.create_timer(0.01, self.publish)
        self.count = 0

    def publish(self):
        t = now(self.client)
        self.count += 1
        position = self.drone.position + 1e-6 * (-1) ** self.count  # cameras never give the same numbers twice
        self.pose.publish(interface.pose_message(TYPES, t, position, LEVEL))
        self.odometry.publish(interface.odometry_message(
            TYPES, RigidBodyState(t, position, LEVEL, np.zeros(3), np.zeros(3)), 'cf1'))
        if self.count % 20 == 0:
            for node, values in REPORTS.items():
                self.reports.publish(interface.diagnostics_message(
                    TYPES, t, f'cf1/{node}', interface.OK, 'bench', values, 'bench'))
        if self.count % 5 == 0:
            p = np.tile(self.drone.position, (11, 1))
            plan = Plan(t, 0.1 * np.arange(11), p, np.tile(LEVEL, (11, 1)), *np.zeros((3, 11, 3)))
            self.plan.publish(interface.plan_message(TYPES, plan, 'cf1'))

    def until(self, condition, limit=30.0):
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, self.status[-1:]
            self.executor.spin_once(timeout_sec=0.05)

    def call(self, name, data=None):
        client = self.clients[name]
        self.until(client.service_is_ready)
        request = client.srv_type.Request()
        if data is not None:
            request.data = data
        future = client.call_async(request)
        self.until(future.done)
        return future.result()

    def request(self, name, phase, data=None):
        """Ask until granted, then wait for the phase."""
        self.until(lambda: self.call(name, data).success)
        self.until(lambda: self.status and self.status[-1].values['phase'] == phase)

    def end(self):
        # The executor holds what it serves: without this the nodes outlive their destruction, and beside them
        # the next graph's clients sometimes lose their service or never find it (3 of 120 graphs; 0 of 120 with it).
        self.executor.shutdown()
        self.node.destroy_node()
        self.client.destroy_node()


@pytest.fixture
def ros():
    rclpy.init(domain_id=DOMAIN)
    yield
    rclpy.try_shutdown()


@pytest.fixture
def graph(ros):
    g = Graph(Drone())
    yield g
    g.end()


def test_a_flight_over_ros_publishes_what_it_sends_and_lands_when_closed(graph):
    assert graph.call('takeoff').success is False
    graph.request('arm', 'armed', True)
    graph.request('takeoff', 'holding')
    graph.request('engage', 'following')
    graph.until(lambda: len(graph.setpoints) > 5)
    assert np.allclose(graph.setpoints[-1].position, graph.drone.position, atol=0.05)
    assert graph.drone.radio.full_state.called and graph.drone.radio.extpose.called
    status = graph.status[-1]
    assert status.name == 'cf1/flight' and tuple(status.values) == interface.FLIGHT_KEYS
    assert status.values['battery_v'] == '4.1'

    graph.node.close()  # as run() does after SIGTERM
    assert graph.node.manager.phase == 'disarmed'
    assert graph.drone.position[2] == 0.0 and graph.drone.bits == radio.CAN_ARM
    names = [name for name, _, _ in graph.drone.radio.mock_calls if name not in ('extpose', 'telemetry')]
    last = max(i for i, n in enumerate(names) if n == 'full_state')
    assert names[last + 1:last + 3] == ['land', 'notify_stop'] and names[-1] == 'close'


def test_setting_the_system_clock_in_flight_is_found_by_the_tick_which_runs_on_another(graph, monkeypatch):
    graph.request('arm', 'armed', True)
    graph.request('takeoff', 'holding')
    graph.request('engage', 'following')
    assert graph.node._timer.clock.clock_type == ClockType.STEADY_TIME
    monkeypatch.setattr('crazyflie_interface.node.now', lambda node: now(node) - 3600.0)
    graph.until(lambda: graph.node.manager.phase != 'following')
    assert graph.node.manager.reason.startswith('the system clock was set by -3600')
    graph.node.close()


def test_an_exception_in_a_tick_still_lands_the_drone_before_closing(graph):
    graph.request('arm', 'armed', True)
    graph.request('takeoff', 'holding')
    graph.node.manager.tick = None  # TypeError: whatever breaks, the radio works
    graph.node.close()
    calls = [name for name, _, _ in graph.drone.radio.mock_calls]
    assert graph.drone.position[2] == 0.0
    assert calls.index('land') < calls.index('close') and calls[-1] == 'close'
    assert graph.drone.radio.arm.call_args.args == (False,)


def test_the_preflight_service_names_what_failed_and_the_whole_table_is_on_diagnostics(graph):
    graph.until(lambda: graph.call('preflight').success)
    table, kept = {}, graph.keep
    kept.append(subscription(graph.client, interface.DIAGNOSTICS, 'cf1', lambda m: table.update(
        {d.name: d for d in interface.read_diagnostics(m) if d.name.startswith('cf1/preflight/')})))
    graph.drone.volts = 3.5
    answer = graph.call('preflight')
    assert not answer.success and 'battery: 3.50 V, needs > 3.8 V (change the battery)' in answer.message
    assert 'battery: 3.50 V' in graph.call('arm', True).message
    graph.until(lambda: table and table['cf1/preflight/battery'].level == interface.ERROR)
    assert [n.split('/')[2] for n in table] == list(interface.PREFLIGHT_CHECKS)
    assert all(tuple(d.values) == interface.PREFLIGHT_KEYS for d in table.values())
    assert table['cf1/preflight/battery'].values['passed'] == 'False'
    graph.drone.volts = 4.1
    graph.until(lambda: table['cf1/preflight/battery'].level == interface.OK)


def test_refusals_come_back_through_the_service_with_their_reason(graph):
    answer = graph.call('engage')
    assert not answer.success and 'refused in phase disarmed' in answer.message
    graph.drone.bits = radio.LOCKED
    graph.until(lambda: 'locked' in graph.call('arm', True).message)


def test_a_drone_lost_on_the_ground_is_looked_for_again_and_its_parameters_are_set_anew(graph):
    graph.until(lambda: graph.drone.radio.set_and_check_parameters.call_count == 1)
    def found_again():
        graph.drone.link = 'up'
    graph.drone.radio.connect.side_effect = found_again
    graph.drone.link = 'lost'
    graph.until(lambda: graph.drone.radio.set_and_check_parameters.call_count == 2)
    assert graph.drone.radio.connect.call_count == 2 and not graph.node.finished


def test_a_drone_lost_in_flight_is_not_looked_for_until_it_is_disarmed(graph):
    graph.request('arm', 'armed', True)
    graph.request('takeoff', 'holding')
    graph.drone.link = 'lost'
    graph.until(lambda: graph.status[-1].values['phase'] == 'emergency')
    end = time.monotonic() + 1.5  # the watch looks once a second
    graph.until(lambda: time.monotonic() > end)
    assert graph.drone.radio.connect.call_count == 1
    graph.request('arm', 'disarmed', False)
    graph.until(lambda: graph.drone.radio.connect.call_count == 2)


def test_a_drone_that_cannot_be_reached_ends_the_node_with_the_reason(ros, capfd):
    drone = Drone()
    drone.link = 'connecting'
    drone.radio.connect.side_effect = RadioError('udp://127.0.0.1:19850: nothing listens there')
    g = Graph(drone)
    g.until(lambda: g.node.finished)
    assert g.node.exit_status == 1 and 'nothing listens' in capfd.readouterr().err
    g.end()


@pytest.mark.parametrize('values,word', [
    (dict(uri='udp://nowhere'), 'expected radio://'), (dict(plan_hold='soon'), 'plan_hold'),
    (dict(plan_hold=0.1), 'plan_warn < plan_hold'), (dict(pose_hodl=0.2), 'pose_hodl'),
    (dict(fence_low=[1.0]), 'fence_low')])
def test_parameters_that_cannot_be_used_are_refused_by_name(ros, values, word):
    with pytest.raises(SettingsError, match=word):
        CrazyflieInterface(None, namespace='cf1', use_global_arguments=False,
                           parameter_overrides=[Parameter(k, value=v) for k, v in values.items()])
