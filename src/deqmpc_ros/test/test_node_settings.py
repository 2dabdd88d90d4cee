import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deqmpc_ros.node import describe
from deqmpc_ros.settings import parameter

NODE = textwrap.dedent('''
    import sys
    from dataclasses import dataclass
    from rclpy.node import Node
    from deqmpc_ros.node import declare, parameter, robot_name, run

    @dataclass(frozen=True)
    class Settings:
        rate: float = parameter(10.0, 'Hz', 1.0, 200.0)
        count: int = parameter(3, 'how many', 0, 9)
        on: bool = parameter(True, 'switch')
        mode: str = parameter('off', 'mode', choices=('off', 'static'))
        goal: list[float] = parameter([0.0, 1.0], 'goal', -5.0, 5.0)

    class Probe(Node):
        finished = True
        def __init__(self):
            super().__init__('probe')
            robot_name(self)
            print(declare(self, Settings), flush=True)

    sys.exit(run(Probe))
''')


def start(tmp_path, *ros_arguments, namespace='/cf1'):
    script = tmp_path / 'probe.py'
    script.write_text(NODE)
    env = {**os.environ, 'ROS_DOMAIN_ID': '41', 'ROS_PYTHON_CHECK_FIELDS': '1'}
    return subprocess.run([sys.executable, str(script), '--ros-args', '-r', f'__ns:={namespace}',
                           *ros_arguments], env=env, capture_output=True, text=True, timeout=60)


def parameters(tmp_path, text):
    path = tmp_path / 'p.yaml'
    path.write_text(text)
    return ('--params-file', str(path))


def test_the_command_line_wins_over_a_parameter_file_under_a_wildcard_namespace(tmp_path):
    given = parameters(tmp_path, '/**:\n  probe:\n    ros__parameters: {rate: 20, count: 5}\n')
    done = start(tmp_path, *given, '-p', 'rate:=50', '-p', 'mode:="off"')
    assert done.returncode == 0, done.stderr
    assert 'rate=50.0, count=5' in done.stdout and "mode='off'" in done.stdout


@pytest.mark.parametrize(('given', 'message'), [
    ('rat: 3.0', 'unknown parameter rat; expected some of: count, goal, mode, on, rate'),
    ('rate: fast', "parameter rate = 'fast'; expected float"),
    ('rate: 0.5', 'parameter rate = 0.5; expected a number in [1.0, 200.0]'),
    ('rate: .nan', 'parameter rate = nan'),
    ('count: 2.5', 'parameter count = 2.5; expected int'),
    ('"on": 1', 'parameter on = 1; expected bool'),
    ('mode: moving', "parameter mode = 'moving'; expected one of off, static"),
    ('goal: [1.0, 9.0]', 'expected a number in [-5.0, 5.0]'),
])
def test_a_wrong_parameter_gives_one_clear_message_and_exit_status_2(tmp_path, given, message):
    done = start(tmp_path, *parameters(tmp_path, '/**:\n  probe:\n    ros__parameters: {' + given + '}\n'))
    assert done.returncode == 2
    assert message in done.stderr and '/cf1/probe' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(('hint', 'field', 'said'), [
    (float, parameter(1.0, 'speed (m/s)', 0.0, 5.0), ('speed (m/s)', '', [(0.0, 5.0)], [])),
    (int, parameter(3, 'how many', 0, 9), ('how many', '', [], [(0, 9)])),
    (str, parameter('off', 'mode', choices=('off', 'static')), ('mode', 'one of off, static', [], [])),
    (list[float], parameter([0.0], 'corner (m)', -5.0, 5.0), ('corner (m)', 'a list of float in [-5.0, 5.0]', [], [])),
    (list[str], parameter([], 'names'), ('names', 'a list of str', [], [])),
])
def test_a_parameter_is_described_with_its_limits_and_is_read_only(hint, field, said):
    got = describe(field, hint)
    ranges = [[(r.from_value, r.to_value) for r in rs] for rs in (got.floating_point_range, got.integer_range)]
    assert (got.description, got.additional_constraints, *ranges) == said
    assert got.read_only


def test_a_number_without_a_range_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match='a number needs a range'):
        parameter(1.0, 'speed (m/s)', low=0.0)


def test_a_node_outside_a_robot_namespace_refuses_to_start(tmp_path):
    done = start(tmp_path, namespace='/')
    assert done.returncode == 2 and "robot's namespace" in done.stderr


def test_the_library_imports_no_ros():
    code = ("import sys, pathlib, pkgutil, importlib, deqmpc\n"
            "[importlib.import_module(m.name) for m in pkgutil.walk_packages(deqmpc.__path__, 'deqmpc.')"
            " if not m.name.endswith('__main__')]\n"
            "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('rclpy', 'deqmpc_ros', 'std_msgs'))\n"
            "assert not bad, bad")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
