"""The simulated graph, running: is it what docs/ros_interface.md and the topic table say?"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import flying
import pytest

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.parameter_client import AsyncParameterClient  # noqa: E402
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy  # noqa: E402

from crazyflie_interface.phases import TRANSITIONS  # noqa: E402
from deqmpc import interface  # noqa: E402
from deqmpc_ros.node import subscription  # noqa: E402

PAGE = Path(__file__).resolve().parents[3] / 'docs' / 'ros_interface.md'
DOMAIN = 95
NODES = {'sim', 'mocap_bridge', 'obstacles', 'policy', 'crazyflie_interface', 'recorder', 'visual', 'trial'}
TOPICS = {t.resolve('cf1'): t for t in (*interface.RECORDED, *interface.VISUAL)}


def documented():
    """Rows of the page's topic table: topic -> type, QoS, publishers, subscribers."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in PAGE.read_text().splitlines()
            if line.startswith('| `/') and line.count('|') == 7]
    return {row[0].strip('`'): (row[1], row[2], names(row[4]), names(row[5])) for row in rows}


def names(cell):
    return NODES if cell == 'every node' else set(cell.split(', ')) - {'RViz', 'Foxglove'}


def words(topic):
    """A topic's QoS as the page writes it."""
    return ', '.join(['reliable' if topic.reliable else 'best effort', *['latched'] * topic.latched, str(topic.depth)])


def test_the_page_lists_every_topic_with_its_type_and_qos():
    assert {name: row[:2] for name, row in documented().items()} == {
        name: (topic.type.replace('/msg/', '/'), words(topic)) for name, topic in TOPICS.items()}


def test_the_page_lists_every_service_with_its_type_and_phases():
    rows = {row[0]: row[1:] for row in re.findall(r'^\| `/cf1/(\w+)` \| (\S+) \| ([^|]*) \|$', PAGE.read_text(), re.M)}
    assert {name: kind for name, (kind, _) in rows.items()} == {
        name: kind.replace('/srv/', '/') for name, kind in interface.SERVICES.items()}
    for name, (_, phases) in rows.items():
        events = {'arm': ('arm', 'disarm')}.get(name, (name,))
        allowed = [phase for event in events for phase in TRANSITIONS.get(event, ((), ''))[0]]
        assert re.findall(r'`(\w+)`', phases) == allowed, name


class Observer:
    """A node beside the graph."""

    def __init__(self):
        self.node = rclpy.create_node('observer')
        self.reports = {}
        self.keep = subscription(self.node, interface.DIAGNOSTICS, 'cf1', self.hear)

    def hear(self, message):
        for status in message.status:
            self.reports.setdefault(status.name, status)

    def until(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, 'the graph did not come up'
            rclpy.spin_once(self.node, timeout_sec=0.1)

    def ask(self, future):
        rclpy.spin_until_future_complete(self.node, future, timeout_sec=20.0)
        assert future.done()
        return future.result()

    def ends(self, find, topic):
        """Nodes at the publishing or subscribing ends of `topic`, with their endpoints."""
        return {e.node_name: e for e in find(topic) if e.node_name != 'observer'}


@pytest.fixture(scope='module')
def graph(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp('graph') / 'run'
    run = subprocess.Popen(
        [sys.executable, '-m', 'deqmpc.cli', 'fly', 'sim', 'trial:=true', 'visual:=true', f'run_dir:={run_dir}',
         *flying.sim_arguments()], env={**os.environ, 'ROS_DOMAIN_ID': str(DOMAIN)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: run.communicate(timeout=60))
        stack.callback(run.send_signal, signal.SIGINT)
        rclpy.init(domain_id=DOMAIN)
        stack.callback(rclpy.shutdown)
        observer = Observer()
        observer.until(lambda: {f'cf1/{n}' for n in NODES - {'mocap_bridge'}} | {'cf1/mocap'} <= set(observer.reports))
        yield observer


def test_every_node_reports_on_diagnostics_what_it_is_about(graph):
    for name, status in graph.reports.items():
        assert status.hardware_id and status.message, name
        assert status.level in (b'\0', b'\1', b'\2'), name


def test_types_qos_publishers_and_subscribers_are_those_of_the_page(graph):
    for name, (kind, _, publishers, subscribers) in documented().items():
        sending = graph.ends(graph.node.get_publishers_info_by_topic, name)
        hearing = graph.ends(graph.node.get_subscriptions_info_by_topic, name)
        assert (set(sending), set(hearing)) == (publishers, subscribers), name
        for end in (*sending.values(), *hearing.values()):
            assert end.topic_type.replace('/msg/', '/') == kind
            reliable = end.qos_profile.reliability == ReliabilityPolicy.RELIABLE
            latched = end.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
            assert (reliable, latched) == (TOPICS[name].reliable, TOPICS[name].latched), (name, end.node_name)


def test_the_graph_has_no_topic_and_no_service_that_the_page_does_not_have(graph):
    ros = ('/rosout', '/parameter_events')
    assert {name for name, _ in graph.node.get_topic_names_and_types()} - set(ros) == set(TOPICS)
    own = {name: kinds for name, kinds in graph.node.get_service_names_and_types()
           if name.count('/') == 2 and not name.startswith('/observer')}
    assert own == {f'/cf1/{name}': [kind] for name, kind in interface.SERVICES.items()}


@pytest.mark.parametrize('name', sorted(NODES))
def test_every_parameter_of_a_running_node_is_described_and_cannot_be_changed(graph, name):
    client = AsyncParameterClient(graph.node, f'/cf1/{name}')
    assert client.wait_for_services(timeout_sec=20.0)
    listed = [n for n in graph.ask(client.list_parameters()).result.names
              if n not in ('use_sim_time', 'start_type_description_service')]
    assert listed
    for parameter in graph.ask(client.describe_parameters(listed)).descriptors:
        assert parameter.description and parameter.read_only, parameter.name
        assert parameter.floating_point_range or parameter.type != Parameter.Type.DOUBLE.value, parameter.name
        assert parameter.integer_range or parameter.type != Parameter.Type.INTEGER.value, parameter.name
    (answer,) = graph.ask(client.set_parameters([Parameter(listed[0], value='other')])).results
    assert not answer.successful and 'read-only' in answer.reason
