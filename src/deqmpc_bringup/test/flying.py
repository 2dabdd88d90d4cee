"""For tests of whole graphs, started by `deqmpc fly` or by `ros2 launch`: ports, a bag to replay, and what a
flight's bag must hold whoever started the nodes."""

import contextlib
import socket

import numpy as np

from deqmpc import interface
from deqmpc.types import Obstacles, RigidBodyState
from flight_log.bag import TYPES, BagWriter, read_bag
from flight_log.evaluation import evaluate
from flight_log.flight import load_flight

STEPS = 40  # policy ticks of a trial


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
        for s in sockets:
            s.bind(('127.0.0.1', 0))
        return [s.getsockname()[1] for s in sockets]


def sim_ports():
    """Arguments of mode sim: ports that nobody else uses."""
    crazyflie, command, data = free_ports(3)
    return {'uri': f'udp://127.0.0.1:{crazyflie}', 'natnet_command_port': str(command), 'natnet_data_port': str(data)}


def sim_arguments():
    """`sim_ports` as words of a command line."""
    return [f'{name}:={value}' for name, value in sim_ports().items()]


def read(bag, topic, robot='cf1'):
    return [message for _, _, _, message in read_bag(bag, [topic.resolve(robot)])]


def phases(bag):
    values = [d.values['phase'] for m in read(bag, interface.STATUS) for d in interface.read_diagnostics(m)]
    return [p for i, p in enumerate(values) if i == 0 or values[i - 1] != p]


def assert_a_trial_was_flown(bag, steps):
    """Every phase in order, `steps` policy ticks without a collision, and on the floor at the end."""
    assert phases(bag) == ['disarmed', 'armed', 'taking_off', 'holding', 'following', 'holding', 'landing',
                           'disarmed']
    trial = evaluate(load_flight(bag))
    assert trial.failure is None and trial.min_clearance > 0.0
    assert trial.steps == steps
    assert interface.read_odometry(read(bag, interface.TRUTH)[-1]).position[2] < 0.05


def write_hover(path, seconds):
    """A bag of a drone at rest 1 m away from the goal, with an empty field; its odometry comes at 100 Hz."""
    writer = BagWriter(path, {'robot': 'cf1'})
    rest = (np.array([0.0, 0.0, 0.0, 1.0]), np.zeros(3), np.zeros(3))
    writer.write_message(interface.OBSTACLES, 'cf1', 100.0, interface.obstacles_message(TYPES, Obstacles.none(100.0)))
    for k in range(int(100 * seconds)):
        state = RigidBodyState(100.0 + 0.01 * k, np.array([1.0, 0.0, 1.0]), *rest)
        writer.write_message(interface.POSE, 'cf1', state.stamp, interface.pose_message(
            TYPES, state.stamp, state.position, state.quaternion))
        writer.write_message(interface.ODOM, 'cf1', state.stamp, interface.odometry_message(TYPES, state, 'cf1'))
    writer.close()
    return path


def assert_a_bag_was_replayed(source, bag):
    """Odometry again with stamps of now, and a plan from it at every tick, all towards the goal."""
    was, again = ([interface.read_odometry(m) for m in read(b, interface.ODOM)] for b in (source, bag))
    assert len(again) >= 0.95 * len(was)  # best effort: a busy machine may lose some
    assert again[0].stamp > was[-1].stamp + 1e6
    np.testing.assert_array_equal([s.position for s in again], [was[0].position] * len(again))
    ticks = [d.values for m in read(bag, interface.DIAGNOSTICS) for d in interface.read_diagnostics(m)
             if d.name == 'cf1/policy']
    accepted = [t for t in ticks if t['gate'] == 'accepted']
    plans = [interface.read_plan(m) for m in read(bag, interface.PLAN)]
    assert len(plans) == len(accepted) > 0.5 * 10.0 * (was[-1].stamp - was[0].stamp)
    for plan in plans:
        np.testing.assert_allclose(plan.position[0], was[0].position, atol=1e-6)
        assert plan.position[-1][0] < plan.position[0][0]
