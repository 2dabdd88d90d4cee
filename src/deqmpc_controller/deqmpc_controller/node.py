"""ROS node `policy`: odometry and obstacles in, a judged plan out at a fixed rate."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rclpy.node import Node

from deqmpc import interface, yaml_file
from deqmpc.neighbours import ColumnSettings, Neighbours
from deqmpc.policies.base import POLICIES, load_policy
from deqmpc_controller.plan_gate import ACCEPTED, GateSettings
from deqmpc_controller.policy_loop import LoopSettings, PolicyLoop
from deqmpc_ros.messages import TYPES
from deqmpc_ros.node import (
    SettingsError,
    declare,
    now,
    parameter,
    publisher,
    robot_name,
    run,
    steady_timer,
    subscription,
)

FILES = {'model', 'airframe'}  # settings of policies that name a file or folder


@dataclass(frozen=True)
class Settings:
    """Parameters of the policy node."""

    policy: str = parameter('mpc_only', 'name of the policy')
    policy_file: str = parameter('', 'YAML file with the settings of the policy, paths in it relative to it; empty: '
                                 'its defaults')
    goal: list[float] = parameter([0.0, 0.0, 1.0, 0.0], 'goal x, y, z (m, world), yaw (rad)', -100.0, 100.0)
    rate: float = parameter(10.0, 'ticks a second (Hz)', 1.0, 200.0)
    max_state_age: float = parameter(0.1, 'odometry older than this gives no plan (s)', 0.005, 2.0)
    max_obstacle_age: float = parameter(0.5, 'moving obstacles and neighbours older than this give no plan (s)', 0.01,
                                        10.0)
    neighbours: list[str] = parameter([], 'other robots to keep away from, by their odometry')
    neighbour_radius: float = parameter(0.25, 'least distance of two drones beside each other (m)', 0.05, 5.0)
    neighbour_spacing: float = parameter(0.35, 'as much more above each other, for the downwash (m)', 0.0, 5.0)
    neighbour_aside: float = parameter(0.15, 'how far to their left neighbours also appear to the policy, so that all '
                                       'give way to the right (m)', 0.0, 5.0)
    max_residual: float = parameter(0.02, 'largest constraint violation of a plan that is flown', 0.0, 10.0)
    fence_low: list[float] = parameter([-2.5, -2.5, 0.0], 'lower corner of the fence (m)', -100.0, 100.0)
    fence_high: list[float] = parameter([2.5, 2.5, 2.5], 'upper corner of the fence (m)', -100.0, 100.0)
    max_speed: float = parameter(2.0, 'fastest planned speed that is flown (m/s)', 0.1, 10.0)
    min_clearance: float = parameter(0.0, 'least planned distance to a sphere\'s surface (m)', -1.0, 1.0)
    threads: int = parameter(1, 'threads of the linear algebra library', 1, 64)
    priority: int = parameter(20, 'real-time priority (SCHED_FIFO) where the system permits it; 0: none', 0, 99)


def policy_from(settings: Settings, where: str):
    """The policy the parameters name. SettingsError when it cannot be made."""
    if len(settings.goal) != 4:
        raise SettingsError(f'{where}: parameter goal = {settings.goal}; expected x, y, z, yaw')
    if settings.policy not in POLICIES:
        raise SettingsError(f'{where}: unknown policy {settings.policy!r}; expected one of: '
                            f'{", ".join(sorted(POLICIES))}')
    options = {}
    if settings.policy_file:
        path = Path(settings.policy_file)
        try:
            options = yaml_file.load(path) or {}
        except (OSError, ValueError) as error:
            raise SettingsError(f'{where}: parameter policy_file = {str(path)!r}: {error}') from error
        if not isinstance(options, dict):
            raise SettingsError(f'{where}: {path} holds {type(options).__name__}; expected settings')
        for name in FILES & set(options):
            if isinstance(options[name], str) and options[name]:
                options[name] = str(path.parent / options[name])
    try:
        return load_policy(settings.policy, {**options, 'goal': tuple(settings.goal)})
    except (ValueError, OSError) as error:
        raise SettingsError(f'{where}: policy {settings.policy!r}: {error}') from error


def policy_loop(s: Settings, where: str) -> PolicyLoop:
    """The policy with its gate that the parameters ask for. SettingsError when it cannot be made."""
    for name in ('fence_low', 'fence_high'):
        if len(getattr(s, name)) != 3:
            raise SettingsError(f'{where}: parameter {name} = {getattr(s, name)}; expected x, y, z')
    return PolicyLoop(
        policy_from(s, where), LoopSettings(1.0 / s.rate, s.max_state_age, s.max_obstacle_age),
        GateSettings(max_residual=s.max_residual, fence_low=tuple(s.fence_low),
                     fence_high=tuple(s.fence_high), max_speed=s.max_speed, min_clearance=s.min_clearance),
        neighbours=_neighbours(s, where))


def _neighbours(s: Settings, where: str) -> Neighbours:
    try:
        return Neighbours(s.neighbours, ColumnSettings(s.neighbour_radius, s.neighbour_spacing, s.neighbour_aside))
    except ValueError as error:
        raise SettingsError(f'{where}: parameters neighbour_*: {error}') from error


class PolicyNode(Node):
    """Parameters and messages around a PolicyLoop."""

    def __init__(self):
        super().__init__('policy')
        self._robot = robot_name(self)
        s = declare(self, Settings)
        torch.set_num_threads(s.threads)
        self._loop = policy_loop(s, self.get_fully_qualified_name())
        self._name = self._loop.policy.name
        warm = self._loop.warm_up()
        self._plan = publisher(self, interface.PLAN, self._robot)
        self._message = interface.PlanMessage(TYPES, self._robot)
        self._diagnostics = publisher(self, interface.DIAGNOSTICS, self._robot)
        subscription(self, interface.ODOM, self._robot,
                     lambda msg: self._loop.on_odometry(interface.read_odometry(msg)))
        subscription(self, interface.OBSTACLES, self._robot, self._on_obstacles)
        for name in s.neighbours:
            subscription(self, interface.ODOM, name, lambda msg, name=name: self._loop.neighbours.on_odometry(
                name, interface.read_odometry(msg)))
        self._refusal = ''
        self.priority = s.priority  # read by run()
        steady_timer(self, 1.0 / s.rate, self._tick)
        self.get_logger().info(f'{self._name}: {1e3 * warm:.1f} ms a plan when warm, '
                               f'{s.rate:g} Hz, goal {s.goal}')

    def _on_obstacles(self, msg):
        try:
            self._loop.on_obstacles(interface.read_obstacles(msg, self._loop.obstacles))
        except ValueError as error:
            self.get_logger().error(f'/obstacles ignored: {error}', throttle_duration_sec=1.0)

    def _tick(self):
        tick = self._loop.tick(now(self))
        if tick.plan is not None:
            self._plan.publish(self._message.filled(tick.plan))
        stamp = now(self)
        latency = stamp - self._loop.state.stamp if self._loop.state is not None else float('nan')
        level = interface.OK if tick.gate == ACCEPTED else interface.WARN
        self._diagnostics.publish(interface.diagnostics_message(
            TYPES, stamp, f'{self._robot}/policy', level, tick.gate, tick.values(self._name, stamp, latency),
            hardware_id=self._robot))
        if tick.gate != self._refusal and tick.gate != ACCEPTED:
            self.get_logger().warning(f'no plan: {tick.gate}', throttle_duration_sec=1.0)
        self._refusal = tick.gate


def main() -> int:
    """Entry point of `policy_node`."""
    return run(PolicyNode)


if __name__ == '__main__':
    sys.exit(main())
