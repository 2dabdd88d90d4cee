import os
import pty
import threading
import time

import pytest

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
from rclpy.context import Context  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from deqmpc_bringup import emergency_stop  # noqa: E402
from deqmpc_bringup.emergency_stop import pressed, robots_in, single_keys  # noqa: E402

DOMAIN = '84'


class Robot:
    """A service `emergency` in a graph of its own context; `deaf` answers are refusals."""

    def __init__(self, name, success=True):
        self.context, self.calls = Context(), 0
        rclpy.init(context=self.context, domain_id=int(DOMAIN))
        self.node = Node('crazyflie_interface', namespace=name, context=self.context)
        def on_emergency(_, response):
            self.calls += 1
            response.success, response.message = success, 'motors cut'
            return response
        self.node.create_service(Trigger, 'emergency', on_emergency)
        self.node.create_service(SetBool, 'arm', lambda request, response: response)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.ended = threading.Event()
        self.thread.start()

    def _spin(self):
        while not self.ended.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def end(self):
        self.ended.set()
        self.thread.join()
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)


@pytest.fixture
def robots(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', DOMAIN)
    made = [Robot('cf1'), Robot('cf2')]
    yield made
    for robot in made:
        robot.end()


@pytest.fixture
def terminal(monkeypatch):
    """A terminal's end to write keys to; the command reads the other one."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, 'r') as stream:
        monkeypatch.setattr('sys.stdin', stream)
        yield ours
    os.close(ours)


def test_robots_are_those_with_an_emergency_service_of_the_right_type_in_their_namespace():
    trigger = ['std_srvs/srv/Trigger']
    assert robots_in([('/cf2/emergency', trigger), ('/cf1/emergency', trigger), ('/emergency', trigger),
                      ('/a/b/emergency', trigger), ('/cf3/emergency', ['std_srvs/srv/Empty']),
                      ('/cf4/land', trigger)]) == ['cf1', 'cf2']


def test_one_key_without_enter_stops_every_robot_there_is(robots, terminal, capsys):
    def press():
        while 'cf1, cf2' not in said():
            time.sleep(0.05)
        os.write(terminal, b' ')
    lines = []
    def said():
        lines.append(capsys.readouterr().out)
        return ''.join(lines)
    thread = threading.Thread(target=press)
    thread.start()
    assert emergency_stop.main([]) == 0
    thread.join()
    assert [r.calls > 0 for r in robots] == [True, True]
    assert 'cf1: motors cut' in said() and 'cf2: motors cut' in said()


def test_without_a_name_all_are_stopped_at_once_also_those_found_on_the_way(robots):
    assert emergency_stop.main(['--now', '--timeout', '10']) == 0
    assert [r.calls > 0 for r in robots] == [True, True]


def test_a_named_robot_is_stopped_alone(robots):
    assert emergency_stop.main(['--now', '--timeout', '10', '--robot', 'cf2']) == 0
    assert robots[0].calls == 0 and robots[1].calls > 0


def test_a_robot_that_is_not_there_is_not_said_to_be_stopped(robots, capsys):
    assert emergency_stop.main(['--now', '--timeout', '1.5', '--robot', 'cf1', 'cf9']) == 1
    out = capsys.readouterr().out
    assert 'cf1: motors cut' in out and 'cf9: NO ANSWER' in out and robots[0].calls > 0


def test_a_refusal_and_an_empty_graph_have_their_own_exit_status(monkeypatch, capsys):
    monkeypatch.setenv('ROS_DOMAIN_ID', DOMAIN)
    assert emergency_stop.main(['--now', '--timeout', '0.5']) == 2
    assert 'nothing was stopped' in capsys.readouterr().err
    robot = Robot('cf1', success=False)
    try:
        assert emergency_stop.main(['--now', '--timeout', '5', '--robot', 'cf1']) == 1
    finally:
        robot.end()


def test_an_ended_standard_input_stops_nothing(monkeypatch, capsys):
    monkeypatch.setenv('ROS_DOMAIN_ID', DOMAIN)
    with open(os.devnull) as nothing:
        monkeypatch.setattr('sys.stdin', nothing)
        assert emergency_stop.main([]) == 2
    assert '--now' in capsys.readouterr().err


def test_the_terminal_is_as_before_afterwards(terminal):
    import sys
    import termios
    before = termios.tcgetattr(sys.stdin)
    with single_keys(sys.stdin):
        assert not pressed(sys.stdin)
        os.write(terminal, b'x')
        end = time.monotonic() + 10.0
        while not pressed(sys.stdin):
            assert time.monotonic() < end
    assert termios.tcgetattr(sys.stdin) == before
