import time

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
from rclpy.experimental import EventsExecutor  # noqa: E402

from deqmpc import interface  # noqa: E402
from deqmpc.types import Plan  # noqa: E402
from deqmpc_ros.messages import TYPES  # noqa: E402
from deqmpc_ros.node import now, publisher, subscription  # noqa: E402
from flight_log.visual_node import COLORS, Trail, Visual, describe  # noqa: E402

DOMAIN = 93
LEVEL = np.array([0.0, 0.0, 0.0, 1.0])


def status(phase, guard='idle', reason='', level=interface.OK):
    return interface.Diagnostic(0.0, 'cf1/flight', level, '', {'phase': phase, 'guard': guard, 'reason': reason})


def test_a_trail_keeps_the_newest_seconds_at_its_own_rate():
    trail = Trail(duration=1.0, period=0.125)
    for k in range(500):
        trail.offer(k / 64, k)
    assert len(trail.items()) == 8
    assert np.diff(trail.items()).tolist() == [8] * 7 and trail.items()[-1] == 496


def test_a_stamp_that_steps_back_starts_the_trail_anew():
    trail = Trail(duration=10.0, period=0.1)
    for stamp in (100.0, 100.1, 3.0, 3.1):
        trail.offer(stamp, stamp)
    assert trail.items() == [3.0, 3.1]


@pytest.mark.parametrize(('flight', 'age', 'text', 'level'), [
    (None, np.inf, 'cf1: no status yet', interface.STALE),
    (status('following', 'follow'), 0.1, 'cf1: following (follow)', interface.OK),
    (status('holding', 'hold', 'pose is old', interface.WARN), 0.1, 'cf1: holding (hold)\npose is old', interface.WARN),
    (status('following', 'follow'), 3.2, 'cf1: no status for 3 s', interface.ERROR),
])
def test_the_text_says_phase_guard_and_reason_or_that_nobody_says_them(flight, age, text, level):
    assert describe('cf1', flight, age) == (text, COLORS[level])


class Graph:
    """The node and a client that plays mocap, policy and crazyflie_interface."""

    def __init__(self):
        self.node = Visual(namespace='cf1', use_global_arguments=False)
        self.client = rclpy.create_node('client', namespace='cf1')
        self.executor = EventsExecutor()
        self.executor.add_node(self.node)
        self.executor.add_node(self.client)
        self.got = {t.name: None for t in (*interface.VISUAL, interface.DIAGNOSTICS)}
        self.keep = [subscription(self.client, t, 'cf1', self.keeper(t.name))
                     for t in (*interface.VISUAL, interface.DIAGNOSTICS)]
        self.out = {t: publisher(self.client, t, 'cf1') for t in (interface.POSE, interface.PLAN, interface.STATUS)}

    def keeper(self, name):
        def keep(message):
            self.got[name] = message
        return keep

    def until(self, topic, say, condition):
        """`say` again and again until the message got on `topic` meets `condition`; that message."""
        end = time.monotonic() + 30.0
        while self.got[topic.name] is None or not condition(self.got[topic.name]):
            assert time.monotonic() < end, self.got[topic.name]
            say()
            self.executor.spin_once(timeout_sec=0.05)
        return self.got[topic.name]


@pytest.fixture
def graph(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(DOMAIN))
    rclpy.init(domain_id=DOMAIN)
    graph = Graph()
    yield graph
    graph.executor.shutdown()
    graph.node.destroy_node()
    graph.client.destroy_node()
    rclpy.shutdown()


def test_the_plan_and_the_flight_come_out_as_what_rviz_and_foxglove_draw(graph):
    k = np.arange(11)
    plan = Plan(100.0, 0.1 * k, np.stack([0.1 * k, 0.0 * k, 1.0 + 0.0 * k], 1), np.tile(LEVEL, (11, 1)),
                *np.zeros((3, 11, 3)))
    path = graph.until(
        interface.PLAN_PATH,
        lambda: graph.out[interface.PLAN].publish(interface.plan_message(TYPES, plan, 'cf1')), lambda m: True)
    assert path.header.frame_id == interface.WORLD
    drawn = [interface.read_pose(p) for p in path.poses]
    np.testing.assert_allclose([p for _, p, _ in drawn], plan.position, atol=0.0)
    np.testing.assert_allclose([t for t, _, _ in drawn], 100.0 + 0.1 * k, atol=1e-8)

    def fly():
        t = now(graph.client)
        graph.out[interface.POSE].publish(interface.pose_message(TYPES, t, (1.0, 2.0, 0.5), LEVEL))
        graph.out[interface.STATUS].publish(interface.diagnostics_message(
            TYPES, t, 'cf1/flight', interface.WARN, '', {'phase': 'holding', 'guard': 'hold', 'reason': 'gap'}, 'cf1'))
    flown = graph.until(interface.FLOWN_PATH, fly, lambda m: len(m.poses) >= 2)
    assert {tuple(interface.read_pose(p)[1]) for p in flown.poses} == {(1.0, 2.0, 0.5)}
    text = graph.until(interface.FLIGHT_MARKERS, fly, lambda m: 'holding' in m.markers[0].text).markers[0]
    assert text.text == 'cf1: holding (hold)\ngap' and text.pose.position.z > 0.5
    report = graph.until(interface.DIAGNOSTICS, lambda: None, lambda m: True).status[0]
    assert report.hardware_id == 'cf1' and report.name == 'cf1/visual'


def test_a_new_flight_starts_a_new_trail(graph):
    def say(phase, position):
        t = now(graph.client)
        graph.out[interface.POSE].publish(interface.pose_message(TYPES, t, position, LEVEL))
        graph.out[interface.STATUS].publish(interface.diagnostics_message(
            TYPES, t, 'cf1/flight', interface.OK, '', {'phase': phase}, 'cf1'))
    graph.until(interface.FLOWN_PATH, lambda: say('disarmed', (9.0, 9.0, 0.0)), lambda m: len(m.poses) >= 2)
    flown = graph.until(interface.FLOWN_PATH, lambda: say('armed', (0.0, 0.0, 0.0)),
                        lambda m: m.poses and m.poses[-1].pose.position.x == 0.0 and len(m.poses) >= 2)
    assert {p.pose.position.x for p in flown.poses} == {0.0}
