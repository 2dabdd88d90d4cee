"""What every node of the stack shares: settings from parameters, QoS from the topic table, and a
main() that spins, stops once on SIGINT or SIGTERM, and says in one line why it could not start.

Settings are a frozen dataclass; each field is one parameter, its metadata made by `parameter()`
(deqmpc_ros.settings).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar, get_type_hints

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.clock import Clock, ClockType
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.timer import Timer

from deqmpc.interface import STATUS, Topic, read_diagnostics
from deqmpc_ros.messages import message_class
from deqmpc_ros.settings import SettingsError, constraints, from_values, parameter

__all__ = ['FlightWatch', 'SettingsError', 'declare', 'now', 'parameter', 'publisher', 'qos', 'robot_name',
           'run', 'steady_timer', 'subscription']

S = TypeVar('S')

LINGER = 15.0  # s that a node may spin on after the first stop signal

# Names that ROS itself declares on every node.
_ROS_OWN = ('use_sim_time', 'start_type_description_service', 'qos_overrides')


def declare(node: Node, settings: type[S]) -> S:
    """Declare every field of `settings` (a dataclass) as a read-only parameter and return its values.

    Raises SettingsError on a parameter the dataclass does not have, a wrong type or range.
    """
    given = {k: p.value for k, p in node._parameter_overrides.items() if k.split('.')[0] not in _ROS_OWN}
    values = from_values(settings, node.get_fully_qualified_name(), given)
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        node.declare_parameter(field.name, getattr(values, field.name), describe(field, hints[field.name]),
                               ignore_override=True)
    return values


def describe(field: dataclasses.Field, hint: type) -> ParameterDescriptor:
    """What `ros2 param describe` says of one setting: description, range or choices, read only.

    Read only, all of them: each is checked against the others once, at the start, and a limit of the
    guard that changes in flight would have been checked by nobody.
    """
    descriptor = ParameterDescriptor(description=field.metadata['description'], read_only=True, dynamic_typing=True,
                                     additional_constraints=constraints(field, hint))
    low, high = field.metadata['low'], field.metadata['high']
    if hint is float:
        descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    if hint is int:
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high))]
    return descriptor


def qos(topic: Topic) -> QoSProfile:
    """The QoS profile the topic table asks for."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST, depth=topic.depth,
        reliability=ReliabilityPolicy.RELIABLE if topic.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE)


def robot_name(node: Node) -> str:
    """The robot a node serves: its namespace without slashes. SettingsError when it has none."""
    name = node.get_namespace().strip('/')
    if not name or '/' in name:
        raise SettingsError(f'{node.get_fully_qualified_name()}: start it in the robot\'s namespace '
                            f'(-r __ns:=/cf1), got {node.get_namespace()!r}')
    return name


def publisher(node: Node, topic: Topic, robot: str):
    """Publisher of `topic` for `robot` with the table's type and QoS."""
    return node.create_publisher(message_class(topic.type), topic.resolve(robot), qos(topic))


def subscription(node: Node, topic: Topic, robot: str, callback: Callable, raw: bool = False):
    """Subscription to `topic` for `robot` with the table's type and QoS."""
    return node.create_subscription(message_class(topic.type), topic.resolve(robot), callback, qos(topic),
                                    raw=raw)


class FlightWatch:
    """Whether the robot is in the air, from its status topic: what `may_stop` needs."""

    IN_AIR = ('taking_off', 'holding', 'following', 'landing')

    def __init__(self, node: Node, robot: str, silence: float = 5.0):
        """Subscribe to the status of `robot`; after `silence` s without one nobody holds the drone. That is longer than
        a landing takes: on a stalled machine statuses come late, and who leaves early leaves a drone in the air."""
        self._name = f'{robot}/flight'
        self._silence = silence
        self._in_air = False
        self._heard = 0.0
        self._subscription = subscription(node, STATUS, robot, self._on_status)

    def _on_status(self, msg):
        for status in read_diagnostics(msg):
            if status.name == self._name:
                self._in_air = status.values.get('phase') in self.IN_AIR
                self._heard = time.monotonic()

    def in_air(self) -> bool:
        """True while the last status is fresh and its phase is one of `IN_AIR`."""
        return self._in_air and time.monotonic() - self._heard < self._silence


def steady_timer(node: Node, period: float, callback: Callable) -> Timer:
    """A timer every `period` (s) of a clock that nobody sets. One of the ROS clock stands still for as long as the
    system's clock is set back."""
    return node.create_timer(period, callback, clock=Clock(clock_type=ClockType.STEADY_TIME))


def now(node: Node) -> float:
    """The node's ROS clock in s."""
    return node.get_clock().now().nanoseconds * 1e-9


def run(factory: Callable[[], Node], argv: list[str] | None = None) -> int:
    """Make the node, spin it until SIGINT, SIGTERM or `node.finished` is True, then close it.

    The node may have `close()` (called once, with ROS still up), `exit_status` (default 0) and
    `may_stop() -> bool`: after the first signal the node spins on until that is True, at most
    `LINGER` s, so that what a landing drone needs outlives the request to stop; a second signal ends it;
    `priority` (1 to 99; default 0: none), the real-time priority of the process where the system permits it.
    Exit status 2 when the node cannot start (SettingsError), 1 when a callback raised: `close()` is
    still called, so that nothing leaves the drone without a decision.
    """
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _frame: stop.append(n))
    rclpy.init(args=argv, signal_handler_options=SignalHandlerOptions.NO)
    node, status = None, 0
    try:
        node = factory()
        # What start-up left (torch: 180,000 objects) lives on: out of the collector, which would take 100 ms.
        gc.collect()
        gc.freeze()
        executor = EventsExecutor()
        executor.add_node(node)
        executor.spin_once(timeout_sec=0.0)  # starts the thread of its timers
        _schedule(node, getattr(node, 'priority', 0))
        while not stop and not getattr(node, 'finished', False):
            executor.spin_once(timeout_sec=0.1)
        until = time.monotonic() + LINGER
        while (len(stop) == 1 and time.monotonic() < until and hasattr(node, 'may_stop')
               and not node.may_stop()):
            executor.spin_once(timeout_sec=0.1)
    except SettingsError as error:
        print(f'error: {error}', file=sys.stderr, flush=True)
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        if node is not None:
            try:
                if hasattr(node, 'close'):
                    node.close()
                status = status or getattr(node, 'exit_status', 0)
            finally:
                node.destroy_node()
        rclpy.try_shutdown()
    return status


def _schedule(node: Node, priority: int) -> None:
    """SCHED_FIFO for every thread there is (DDS receives, and timers wake, in threads of their own), so that no
    ordinary process delays a tick."""
    if priority == 0:
        return
    try:
        for thread in os.listdir('/proc/self/task'):
            with contextlib.suppress(ProcessLookupError):  # it ended since the list was made: nothing to schedule
                os.sched_setscheduler(int(thread), os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except PermissionError:
        node.get_logger().info(f'real-time priority {priority} is not permitted: other processes may delay this one '
                               '(to permit it, set rtprio in /etc/security/limits.conf)')
