"""The virtual obstacles: what is published, and what a wrong file or parameter is answered with."""

import itertools
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import rclpy

from deqmpc import interface, obstacles
from deqmpc_ros.node import SettingsError, subscription
from sim_env.obstacle_node import Settings, make_field

WAIT = 30.0  # s
_domain = itertools.count(random.SystemRandom().randrange(100, 190))


def test_the_field_of_a_seed_is_the_librarys():
    field = make_field(Settings(seed=3))
    drawn = obstacles.draw(3)
    assert np.array_equal(field.start, drawn.start) and len(field.radius) == 40
    assert np.array_equal(field.at(5.0).position, field.start)


def test_moving_spheres_start_where_the_static_ones_of_their_seed_stand():
    static, moving = make_field(Settings(seed=3)), make_field(Settings(seed=3, mode='moving', speed=0.4))
    assert np.array_equal(static.start, moving.start)
    assert np.linalg.norm(moving.velocity, axis=1) == pytest.approx(np.full(40, 0.4))


def test_off_is_no_field():
    assert make_field(Settings(mode='off', file='/nowhere.yaml')) is None


@pytest.mark.parametrize('given, said', [
    ({'file': '/nowhere.yaml'}, "cannot read file '/nowhere.yaml': No such file"),
    ({'low': [0.0, 0.0]}, r'low = \[0.0, 0.0\]'), ({'low': [2.0, 0.0, 0.0]}, 'must be below'),
    ({'keep_clear': [1.0, 2.0]}, 'keep_clear has 2 numbers'), ({'gap': 2.0}, 'of 40 spheres'),
    ({'mode': 'moving', 'speed': 0.0}, 'speed = 0.0')])
def test_a_wrong_parameter_is_named(given, said):
    with pytest.raises(SettingsError, match=said):
        make_field(Settings(**given))


@pytest.mark.parametrize('text, said', [
    ('spheres: 3', 'list `spheres`'), ('balls: []', 'list `spheres`'), ('spheres: [', 'while parsing'),
    ('spheres: [{position: [0, 0, x], radius: 0.1}]', r'spheres\[0\].position'),
    ('spheres: [{position: [0, 0, 1], radius: 1}, {position: [0, 0, 1], radius: -1}]', r'\[1\].radius'),
    ('spheres: [{position: [0, 0, 1], radius: 0.1, size: 3}]', r'spheres\[0\]')])
def test_a_wrong_entry_of_a_file_is_named_with_the_file(tmp_path, text, said):
    path = tmp_path / 'field.yaml'
    path.write_text(text)
    with pytest.raises(SettingsError, match=said) as raised:
        make_field(Settings(file=str(path)))
    assert str(path) in str(raised.value)


def test_a_file_without_velocities_cannot_move(tmp_path):
    path = tmp_path / 'field.yaml'
    path.write_text('spheres: [{position: [0, 0, 1], radius: 0.1}]')
    assert make_field(Settings(file=str(path))).radius == [0.1]
    with pytest.raises(SettingsError, match='no sphere of .*has a velocity'):
        make_field(Settings(file=str(path), mode='moving'))


class Watched:
    """The obstacle node in its own process, and what it publishes, read by a late subscriber."""

    def __init__(self, *parameters):
        domain = str(next(_domain))
        environment = {**os.environ, 'ROS_DOMAIN_ID': domain, 'ROS_PYTHON_CHECK_FIELDS': '1'}
        arguments = [word for p in parameters for word in ('-p', p)]
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'sim_env.obstacle_node', '--ros-args', '-r', '__ns:=/cf1', *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.output = self.process.stdout.readline()  # it has published when it says what
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=int(domain))
        self.node = rclpy.create_node('watcher', namespace='/cf1', context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.received = []
        subscription(self.node, interface.OBSTACLES, 'cf1', self.received.append)

    def receive(self, count):
        end = time.monotonic() + WAIT
        while len(self.received) < count:
            assert time.monotonic() < end, self.process.poll()
            self.executor.spin_once(timeout_sec=0.1)
        return [interface.read_obstacles(m) for m in self.received[:count]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.output += self.process.communicate(timeout=WAIT)[0]
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def test_a_late_subscriber_gets_the_static_field_and_sigterm_ends_the_node_cleanly():
    with Watched('seed:=3') as watched:
        spheres, = watched.receive(1)
        assert spheres.position == pytest.approx(obstacles.draw(3).start)
        assert spheres.radius == pytest.approx(np.full(40, 0.10))
    assert watched.process.returncode == 0, watched.output


def test_moving_spheres_are_published_on_their_way():
    with Watched('mode:=moving', 'speed:=0.5', 'count:=5') as watched:
        first, second = watched.receive(2)
    moved = np.linalg.norm(second.position - first.position, axis=1)
    # The median, because a sphere that turned back at a wall in between is nearer to where it was.
    assert np.median(moved) == pytest.approx(0.5 * (second.stamp - first.stamp), rel=1e-3)


def test_off_publishes_an_empty_array():
    with Watched('mode:="off"') as watched:
        spheres, = watched.receive(1)
    assert len(spheres.radius) == 0


def test_a_node_that_cannot_start_says_why_in_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, '-m', 'sim_env.obstacle_node', '--ros-args', '-r', '__ns:=/cf1', '-p',
         'file:=/nowhere.yaml'], capture_output=True, text=True, timeout=WAIT,
        env={**os.environ, 'ROS_DOMAIN_ID': str(next(_domain))})
    assert done.returncode == 2
    assert done.stderr == "error: obstacles: cannot read file '/nowhere.yaml': No such file or directory\n"
