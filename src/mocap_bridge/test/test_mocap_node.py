"""The node as a process, on a DDS domain of its own, against the scripted server."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mocap_wire as wire
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402

from deqmpc import interface  # noqa: E402
from deqmpc_ros.node import subscription  # noqa: E402
from mocap_bridge.bridge import HealthSettings  # noqa: E402
from mocap_bridge.node import Settings  # noqa: E402
from mocap_bridge.odometry import OdometrySettings  # noqa: E402
from mocap_bridge.session import ClientSettings  # noqa: E402

DOMAIN = 77


def test_the_readme_lists_every_parameter_with_its_default():
    table = (Path(__file__).parents[1] / 'README.md').read_text().split('## Parameters')[1].split('\n## ')[0]
    listed = {}
    for row in table.splitlines():
        if row.startswith('| `'):
            names, defaults = (cell.strip() for cell in row.split('|')[1:3])
            listed.update(zip(names.replace('`', '').split(', '), defaults.split(', '), strict=True))
    listed['body_name'] = listed['body_name'].replace("the robot's name", 'empty')
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    assert set(listed) == set(defaults)
    for name, default in defaults.items():
        said = '' if listed[name] == 'empty' else listed[name]
        assert said == default if isinstance(default, str) else float(said) == default, name


@pytest.mark.parametrize('kind', [ClientSettings, OdometrySettings, HealthSettings])
def test_parameters_have_the_defaults_of_the_classes_they_fill(kind):
    assert Settings().part(kind) == kind()


def start(*parameters, namespace='/cf1'):
    environment = {**os.environ, 'ROS_DOMAIN_ID': str(DOMAIN),
                   'ROS_PYTHON_CHECK_FIELDS': '1'}
    arguments = [a for p in parameters for a in ('-p', p)]
    ns = ['-r', f'__ns:={namespace}'] if namespace else []
    return subprocess.Popen([sys.executable, '-m', 'mocap_bridge.node', '--ros-args', *ns, *arguments],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=30.0):
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out


class Listener:
    """Poses, odometry and diagnostics of cf1."""

    def __init__(self):
        self.context = Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        self.node = rclpy.create_node('listener', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.poses, self.odometry, self.reports = [], [], []
        subscription(self.node, interface.POSE, 'cf1', lambda m: self.poses.append(interface.read_pose(m)))
        subscription(self.node, interface.ODOM, 'cf1',
                     lambda m: self.odometry.append(interface.read_odometry(m)))
        subscription(self.node, interface.DIAGNOSTICS, 'cf1',
                     lambda m: self.reports.extend(interface.read_diagnostics(m)))

    def wait(self, condition, what, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f'{what}: {len(self.poses)} poses, {self.reports[-1:]}'
            self.executor.spin_once(timeout_sec=0.05)

    def close(self):
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def listener():
    made = Listener()
    yield made
    made.close()


class Streaming:
    """A server that answers and streams from a thread; `make(k, now)` gives the bodies."""

    def __init__(self, make, **server):
        self.server = wire.Server(clock=time.monotonic, **server)
        self.make, self.stop, self.silent = make, threading.Event(), False
        self.exposures = {}
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        k, due = 0, time.monotonic()
        while not self.stop.is_set():
            self.server.answer()
            now = time.monotonic()
            if now >= due and not self.silent:
                k, due = k + 1, max(due + 0.01, now - 0.1)
                exposure = now - 0.003
                self.exposures[k] = exposure + time.time() - time.monotonic()
                self.server.send(wire.frame(k, self.make(k, exposure), exposure=exposure, transmit=now))
            time.sleep(0.001)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.server.close()


def moving(k, t):
    """y-up: to and fro along x with up to 0.5 m/s, 1 m high."""
    return [wire.body(1, (0.25 * np.sin(2.0 * t), 1.0, 0.0))]


def test_the_node_publishes_pose_odometry_and_diagnostics_and_ends_cleanly(listener):
    with Streaming(moving, up=1) as s:
        node = start(f'command_port:={s.server.port}')
        try:
            listener.wait(lambda: len(listener.odometry) > 150 and len(listener.reports) > 1, 'stream')
        finally:
            node.terminate()
            status, said = finish(node)
    assert status == 0, said
    # y-up became z-up, and the stamp is the exposure's
    errors = []
    for stamp, position, _ in listener.poses[-50:]:
        assert position[2] == pytest.approx(1.0)
        k = min(s.exposures, key=lambda i: abs(s.exposures[i] - stamp))
        errors.append(stamp - s.exposures[k])
    assert abs(np.median(errors)) < 2e-3
    assert all(abs(o.velocity[0]) < 0.7 for o in listener.odometry[50:])
    report = listener.reports[-1]
    assert report.name == 'cf1/mocap' and report.values['tracked'] == 'True'
    assert report.values['server_up_axis'] == 'y' and float(report.values['clock_echoes']) > 0


def test_a_lost_body_is_silence_on_pose_and_an_error_in_the_diagnostics(listener):
    lost = threading.Event()
    with Streaming(lambda k, t: [wire.body(1, (1e-5 * k, 0.0, 1.0), flags=0 if lost.is_set() else 1)]) as s:
        node = start(f'command_port:={s.server.port}')
        try:
            listener.wait(lambda: len(listener.poses) > 20, 'stream')
            lost.set()
            listener.wait(lambda: any('not tracked' in r.message and r.level == interface.ERROR
                                      for r in listener.reports), 'loss')
            count = len(listener.poses)
            listener.wait(lambda: len(listener.reports) and listener.reports[-1].values['tracked'] == 'False'
                          and float(listener.reports[-1].values['rate_hz']) == 0.0, 'report')
            assert len(listener.poses) <= count + 2
            lost.clear()
            listener.wait(lambda: len(listener.poses) > count + 50, 'regain')
        finally:
            node.terminate()
            status, said = finish(node)
    assert status == 0, said


def test_an_unknown_body_ends_the_node_with_the_names_that_exist():
    with Streaming(moving, names={'cf7': 1, 'wand': 2}) as s:
        status, said = finish(start(f'command_port:={s.server.port}'))
    assert status == 2, said
    errors = [line for line in said.splitlines() if line.startswith('error:')]
    assert len(errors) == 1 and "'cf1'" in errors[0] and 'cf7, wand' in errors[0], said


def test_a_server_that_is_absent_past_connect_timeout_ends_the_node_with_one_error():
    with wire.Server() as silent:
        status, said = finish(start(f'command_port:={silent.port}', 'connect_timeout:=0.5'))
    assert status == 2, said
    errors = [line for line in said.splitlines() if line.startswith('error:')]
    assert len(errors) == 1 and 'connect_timeout = 0.5 s' in errors[0], said


@pytest.mark.parametrize('parameter, message', [
    ('client:=natnetclient', 'NatNet 3.0'), ('server_address:="no.such.host.invalid"', 'server_address'),
    ('max_sped:=3.0', 'max_sped')])
def test_a_wrong_parameter_ends_the_node_with_one_error_that_names_it(parameter, message):
    status, said = finish(start(parameter))
    assert status == 2 and 'Traceback' not in said, said
    errors = [line for line in said.splitlines() if line.startswith('error:')]
    assert len(errors) == 1 and message in errors[0], said


def test_the_node_waits_for_a_server_that_comes_later(listener):
    server = wire.Server()
    port = server.port
    server.close()
    node = start(f'command_port:={port}')
    try:
        listener.wait(lambda: any('no answer' in r.message for r in listener.reports), 'waiting')
        with Streaming(lambda k, t: [wire.body(1, (1e-5 * k, 0.0, 1.0))], port=port):
            listener.wait(lambda: len(listener.poses) > 20, 'late server')
    finally:
        node.terminate()
        status, said = finish(node)
    assert status == 0, said
