# SPDX-License-Identifier: GPL-3.0-or-later
"""The radio over Crazyswarm2's server, with stand-ins for its messages and for the graph: crazyflie_interfaces is C++
that has to be built, so what is tested is every field that is filled and every name that is used."""

import inspect
import sys
import threading
import types
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
from crazyflie_interface import radio  # noqa: E402
from crazyflie_interface.crazyswarm2 import Crazyswarm2Radio, Crazyswarm2Settings  # noqa: E402
from crazyflie_interface.flight import FlightManager  # noqa: E402
from crazyflie_interface.radio import Radio, RadioError  # noqa: E402
from crazyflie_interface.setpoint import Setpoint  # noqa: E402
from deqmpc import interface  # noqa: E402
from deqmpc_ros.messages import TYPES, message_class  # noqa: E402

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])


def message(name, *fields):
    """A class that takes these fields and no others, as a generated message does."""
    def init(self, **given):
        unknown = set(given) - set(fields)
        assert not unknown, f'{name} has no field {unknown}'
        self.__dict__.update(dict.fromkeys(fields), **given)
    return type(name, (), {'__init__': init})


def service(name, *fields):
    return type(name, (), {'Request': message(f'{name}_Request', *fields)})


@pytest.fixture
def crazyflie_interfaces(monkeypatch):
    """The definitions of Crazyswarm2 1.0.5."""
    package, msg, srv = (types.ModuleType(f'crazyflie_interfaces{p}') for p in ('', '.msg', '.srv'))
    msg.FullState = message('FullState', 'header', 'pose', 'twist', 'acc')
    msg.Status = message('Status', 'header', 'supervisor_info', 'battery_voltage', 'pm_state', 'rssi',
                         'latency_unicast')
    msg.LogDataGeneric = message('LogDataGeneric', 'header', 'timestamp', 'values')
    srv.Arm = service('Arm', 'arm')
    srv.Takeoff = service('Takeoff', 'group_mask', 'height', 'duration')
    srv.Land = service('Land', 'group_mask', 'height', 'duration')
    srv.GoTo = service('GoTo', 'group_mask', 'relative', 'goal', 'yaw', 'duration')
    srv.NotifySetpointsStop = service('NotifySetpointsStop', 'group_mask', 'remain_valid_millisecs')
    for module in (package, msg, srv):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    message_class.cache_clear()
    yield
    message_class.cache_clear()


class Client:
    def __init__(self, node, kind, name):
        self.node, self.srv_type, self.srv_name = node, kind, name

    def service_is_ready(self):
        return self.srv_name not in self.node.missing

    def call_async(self, request):
        self.node.calls.append((self.srv_name, request))
        result = SimpleNamespace(results=[SimpleNamespace(
            successful=not self.node.refuse, reason=self.node.refuse)])
        return SimpleNamespace(add_done_callback=lambda done: done(None), result=lambda: result)


class Graph:
    """Stands for the node: keeps what is created, called and published."""

    def __init__(self):
        self.calls, self.published, self.callbacks = [], [], {}
        self.missing, self.refuse, self.publishers = set(), '', 1

    def create_publisher(self, kind, name, _qos):
        return SimpleNamespace(publish=lambda m: self.published.append((name, m)))

    def create_client(self, kind, name):
        return Client(self, kind, name)

    def create_subscription(self, kind, name, callback, _qos):
        self.callbacks[name] = callback
        return SimpleNamespace(get_publisher_count=lambda: self.publishers)

    def get_clock(self):
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=12_500_000_000))

    def status(self, volts=4.0, bits=radio.CAN_ARM):
        self.callbacks['/cf231/status'](SimpleNamespace(
            supervisor_info=bits, battery_voltage=volts, rssi=48, latency_unicast=3))


@pytest.fixture
def made(crazyflie_interfaces):
    graph = Graph()
    time = [100.0]

    def clock():
        time[0] += 0.01
        return time[0]
    return graph, Crazyswarm2Radio(graph, Crazyswarm2Settings(crazyflie='cf231', connect_timeout=0.5), clock)


def setpoint(**given):
    values = dict(position=np.array([0.1, -0.2, 1.0]), velocity=np.array([0.3, 0.0, -0.1]),
                  acceleration=np.array([0.0, 0.5, 0.0]), quaternion=LEVEL, rates=np.array([0.1, 0.2, -0.3]))
    return Setpoint(**{**values, **given})


def test_it_is_a_radio_with_every_method_that_the_flight_manager_may_call():
    for name, method in inspect.getmembers(Radio, inspect.isfunction):
        if not name.startswith('_'):
            assert list(inspect.signature(getattr(Crazyswarm2Radio, name)).parameters) == list(
                inspect.signature(method).parameters), name


def test_a_setpoint_becomes_a_full_state_in_world_metres_and_body_radians(made):
    graph, link = made
    link.full_state(setpoint())
    (name, m), = graph.published
    assert name == '/cf231/cmd_full_state' and interface.seconds(m.header.stamp) == 12.5
    def xyz(v):
        return [v.x, v.y, v.z]
    # The servers truncate to thousandths: what is sent lies a tenth beyond, so that it comes out rounded.
    assert np.trunc(1e3 * np.array(xyz(m.pose.position))).tolist() == [100, -200, 1000]
    assert np.trunc(1e3 * np.array(xyz(m.twist.linear))).tolist() == [300, 0, -100]
    assert np.trunc(1e3 * np.array(xyz(m.twist.angular))).tolist() == [100, 200, -300]
    assert np.trunc(1e3 * np.array(xyz(m.acc))).tolist() == [0, 500, 0]
    assert [m.pose.orientation.x, m.pose.orientation.w] == [0.0, 1.0]


def test_a_velocity_beyond_what_the_radio_carries_does_not_reach_a_server_that_would_raise(made):
    graph, link = made
    link.full_state(setpoint(velocity=np.array([100.0, 0.0, 0.0])))
    assert int(graph.published[0][1].twist.linear.x * 1000) == 32767


def test_commands_become_calls_of_the_drones_services(made):
    graph, link = made
    link.takeoff(0.5, 2.0)
    link.go_to(np.array([1.0, 2.0, 0.5]), 1.5, 2.25)
    link.notify_stop()
    link.land(0.0, 1.0)
    link.arm(True)
    link.emergency_stop()
    assert [name for name, _ in graph.calls] == [f'/cf231/{s}' for s in (
        'takeoff', 'go_to', 'notify_setpoints_stop', 'land', 'arm', 'emergency')]
    takeoff, go_to, stop, _, arm, _ = (request for _, request in graph.calls)
    assert (takeoff.height, takeoff.duration.sec, takeoff.duration.nanosec) == (0.5, 2, 0)
    assert (go_to.goal.x, go_to.yaw, go_to.relative, go_to.duration.nanosec) == (1.0, 1.5, False, 250_000_000)
    assert stop.remain_valid_millisecs == 0 and arm.arm is True


def test_a_command_to_a_server_that_is_gone_is_not_kept_for_later(made):
    graph, link = made
    graph.missing = {'/cf231/takeoff'}
    link.takeoff(0.5, 2.0)
    assert graph.calls == []


def test_telemetry_comes_from_the_servers_topics(made):
    graph, link = made
    assert link.telemetry().stamp is None
    graph.status(volts=3.9, bits=radio.CAN_ARM | radio.ARMED)
    turned = [0.0, 0.0, np.sin(0.2), np.cos(0.2)]
    graph.callbacks['/cf231/pose'](interface.pose_message(TYPES, 1.0, [0.1, 0.2, 0.0], turned))
    graph.callbacks['/cf231/variance'](SimpleNamespace(values=[1e-5, 2e-5, 3e-5]))
    t = link.telemetry()
    assert (t.battery_v, t.supervisor, t.link_statistics.rssi_dbm) == (3.9, 3, -48.0)
    assert t.yaw == pytest.approx(0.4) and t.position == pytest.approx([0.1, 0.2, 0.0])
    assert t.variance.max() == pytest.approx(3e-5)


def test_connecting_waits_for_the_server_and_says_what_is_missing(made):
    graph, link = made
    graph.missing = {'/cf231/takeoff'}
    with pytest.raises(RadioError, match='no /cf231/takeoff, /cf231/status within connect_timeout = 0.5 s'):
        link.connect()
    graph.missing = set()
    threading.Timer(0.1, graph.status).start()
    link.connect()
    assert link.telemetry().link == 'up'


def test_the_link_is_lost_when_nobody_publishes_the_status_any_longer(made):
    graph, link = made
    graph.status()
    threading.Timer(0.1, graph.status).start()
    link.connect()
    graph.publishers = 0
    assert link.telemetry().link == 'lost' and '/cf231/status' in link.telemetry().fault


def test_parameters_are_set_through_the_server_and_a_refusal_is_a_fault(made):
    graph, link = made
    assert link.set_and_check_parameters() == ()
    names = {request.parameters[0].name: request.parameters[0].value for _, request in graph.calls}
    assert names['cf231.params.stabilizer.controller'].integer_value == 2
    assert names['cf231.params.locSrv.extPosStdDev'].double_value == pytest.approx(0.01)
    graph.refuse = 'unknown parameter'
    assert '/crazyflie_server refused stabilizer.estimator = 2: unknown parameter' in link.set_and_check_parameters()
    assert len(link.telemetry().parameter_faults) == 6


def test_the_guard_stands_in_front_of_it(made):
    graph, link = made
    graph.status(bits=radio.ARMED | radio.CAN_FLY)
    manager = FlightManager(link, Crazyswarm2Settings(crazyflie='cf231'), 'cf231_deqmpc')
    manager.emergency(0.0)
    assert graph.calls[-1][0] == '/cf231/emergency'
    assert not manager.arm(True, 0.1).success


def test_without_crazyflie_interfaces_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'crazyflie_interfaces', None)
    message_class.cache_clear()
    with pytest.raises(RadioError, match='needs the ROS package crazyflie_interfaces, which comes with Crazyswarm2'):
        Crazyswarm2Radio(Graph(), Crazyswarm2Settings(crazyflie='cf231'), lambda: 0.0)


@pytest.mark.parametrize('given', [{}, {'crazyflie': 'cf231', 'firmware_watchdog': True}])
def test_settings_that_cannot_work_with_crazyswarm2_are_refused(given):
    with pytest.raises(ValueError, match='expected'):
        Crazyswarm2Settings(**given)
