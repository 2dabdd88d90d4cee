# SPDX-License-Identifier: GPL-3.0-or-later
"""Node `crazyflie_interface` in front of Crazyswarm2's server instead of a Crazyradio (interface:=crazyswarm2).

Phases, guard, preflight, topics and services are those of CrazyflieInterface; only the Radio behind them differs:

  full_state                    /<cf>/cmd_full_state     crazyflie_interfaces/msg/FullState
  notify_stop                   /<cf>/notify_setpoints_stop
  takeoff, land, go_to, arm     /<cf>/takeoff, land, go_to, arm
  emergency_stop                /<cf>/emergency          std_srvs/srv/Empty
  parameters, reset_estimator   /<server>/set_parameters, <cf>.params.<group>.<name>
  telemetry                     /<cf>/status, /<cf>/pose (onboard estimate), /<cf>/variance (LogDataGeneric of
                                kalman.varPX, varPY, varPZ)

What is lost: Crazyswarm2 feeds the drone its mocap poses itself, so what our bridge rejects it may still forward; what
a service did is not answered, parameters are not read back from the drone, link loss shows only as silence, there is
no firmware watchdog, and a take-off turns to heading 0 where the server's library does.

Message definitions: Crazyswarm2 1.0.5, crazyflie_interfaces. GoTo.srv says that its yaw is in degrees; both servers
hand it on as the radians that the firmware takes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rclpy.node import Node

from crazyflie_interface.node import CrazyflieInterface
from crazyflie_interface.radio import LinkStatistics, RadioError, Telemetry
from crazyflie_interface.setpoint import Setpoint, int16_milli_to_cflib_si, si_to_int16_milli
from crazyflie_interface.settings import Settings
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc_ros.messages import TYPES, message_class
from deqmpc_ros.node import run
from deqmpc_ros.settings import parameter

_SERVICES = {'arm': 'crazyflie_interfaces/srv/Arm', 'takeoff': 'crazyflie_interfaces/srv/Takeoff',
             'land': 'crazyflie_interfaces/srv/Land', 'go_to': 'crazyflie_interfaces/srv/GoTo',
             'notify_setpoints_stop': 'crazyflie_interfaces/srv/NotifySetpointsStop',
             'emergency': 'std_srvs/srv/Empty'}
_INTEGER, _DOUBLE = 2, 3  # rcl_interfaces/msg/ParameterType


@dataclass(frozen=True)
class Crazyswarm2Settings(Settings):
    """Parameters of the node; those of the radio itself are in Crazyswarm2's files."""

    uri: str = parameter('crazyswarm2', "Shown as the drone's hardware; the link is in crazyflies.yaml.")
    crazyflie: str = parameter('', 'Name of the drone in crazyflies.yaml.')
    server: str = parameter('/crazyflie_server', "Name of Crazyswarm2's server node.")

    def __post_init__(self):
        super().__post_init__()
        if not self.crazyflie:
            raise ValueError("crazyflie = ''; expected the name of the drone in crazyflies.yaml")
        if self.firmware_watchdog:
            raise ValueError("firmware_watchdog = True, but Crazyswarm2's server does not feed it; expected False")


class Crazyswarm2Radio:
    """A crazyflie_interface.radio.Radio over the topics and services of Crazyswarm2's server.

    `clock` gives the flight's time in s. Commands return at once; nobody hears whether they were carried out but by
    telemetry and pose, as with a radio. RadioError where crazyflie_interfaces is not installed.
    """

    def __init__(self, node: Node, settings: Crazyswarm2Settings, clock: Callable[[], float]):
        self._node, self._settings, self._clock = node, settings, clock
        self._telemetry, self._lock = Telemetry(), threading.Lock()  # connecting has a thread of its own
        name = f'/{settings.crazyflie}'
        try:
            kinds = {topic: message_class(f'crazyflie_interfaces/msg/{kind}') for topic, kind in (
                ('cmd_full_state', 'FullState'), ('status', 'Status'), ('variance', 'LogDataGeneric'))}
            services = {service: message_class(kind) for service, kind in _SERVICES.items()}
        except ImportError as error:
            raise RadioError(f'interface crazyswarm2 needs the ROS package crazyflie_interfaces, which comes with '
                             f'Crazyswarm2 (source its workspace before this one): {error}') from error
        self._full_state = node.create_publisher(kinds['cmd_full_state'], f'{name}/cmd_full_state', 10)
        self._services = {service: node.create_client(kind, f'{name}/{service}') for service, kind in services.items()}
        self._parameters = node.create_client(message_class('rcl_interfaces/srv/SetParameters'),
                                              f'{settings.server}/set_parameters')
        self._status = node.create_subscription(kinds['status'], f'{name}/status', self._on_status, 10)
        node.create_subscription(message_class('geometry_msgs/msg/PoseStamped'), f'{name}/pose', self._on_pose, 10)
        node.create_subscription(kinds['variance'], f'{name}/variance', self._on_variance, 10)

    # --- link -------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Wait for the server's services and the drone's first status."""
        s, begin = self._settings, self._clock()
        with self._lock:
            self._telemetry = Telemetry()
        while True:
            missing = [c.srv_name for c in self._services.values() if not c.service_is_ready()]
            missing += [] if self._telemetry.stamp is not None else [f'/{s.crazyflie}/status']
            if not missing:
                break
            if self._clock() - begin > s.connect_timeout:
                raise RadioError(
                    f'no {", ".join(missing)} within connect_timeout = {s.connect_timeout:g} s: is {s.crazyflie} '
                    'enabled in crazyflies.yaml, with firmware_logging of `status`, and does its server run?')
            time.sleep(0.05)
        self._learn(link='up')

    def set_and_check_parameters(self) -> tuple[str, ...]:
        """Have the server set what a full-state setpoint needs: the faults. It does not read back."""
        wanted: dict[str, int | float] = {
            'stabilizer.estimator': 2, 'stabilizer.controller': 2, 'commander.enHighLevel': 1,
            'locSrv.extPosStdDev': self._settings.ext_pos_std_dev,
            'locSrv.extQuatStdDev': self._settings.ext_quat_std_dev, 'kalman.resetEstimation': 1}
        faults = tuple(fault for name, value in wanted.items() if (fault := self._set_and_wait(name, value)))
        self._learn(parameter_faults=faults)
        return faults

    def telemetry(self) -> Telemetry:
        """The newest telemetry; lost when the server that published it is gone."""
        if self._telemetry.link == 'up' and self._status.get_publisher_count() == 0:
            return replace(self._telemetry, link='lost',
                           fault=f'nobody publishes /{self._settings.crazyflie}/status any longer')
        return self._telemetry

    def close(self) -> None:
        """Nothing: the node owns what was made of it."""

    # --- commands ---------------------------------------------------------------------------------

    def full_state(self, setpoint: Setpoint) -> None:
        """Full-state setpoint, in the numbers that the radio can carry."""
        def vector(values, kind='Vector3'):
            x, y, z = int16_milli_to_cflib_si(si_to_int16_milli(values))
            return TYPES.make(f'geometry_msgs/msg/{kind}', x=x, y=y, z=z)
        x, y, z, w = map(float, setpoint.quaternion)
        self._full_state.publish(TYPES.make(
            'crazyflie_interfaces/msg/FullState', header=interface.header(TYPES, self._ros_time()),
            pose=TYPES.make('geometry_msgs/msg/Pose', position=vector(setpoint.position, 'Point'),
                            orientation=TYPES.make('geometry_msgs/msg/Quaternion', x=x, y=y, z=z, w=w)),
            twist=TYPES.make('geometry_msgs/msg/Twist', linear=vector(setpoint.velocity),
                             angular=vector(setpoint.rates)),
            acc=vector(setpoint.acceleration)))

    def extpose(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Nothing: Crazyswarm2's server sends the drone the poses of its own mocap node."""

    def notify_stop(self) -> None:
        """End of the setpoint stream."""
        self._call('notify_setpoints_stop', group_mask=0, remain_valid_millisecs=0)

    def takeoff(self, height: float, duration: float) -> None:
        """High-level take-off."""
        self._call('takeoff', group_mask=0, height=float(height), duration=_duration(duration))

    def land(self, height: float, duration: float) -> None:
        """High-level landing."""
        self._call('land', group_mask=0, height=float(height), duration=_duration(duration))

    def go_to(self, position: np.ndarray, yaw: float, duration: float) -> None:
        """High-level motion."""
        x, y, z = map(float, position)
        self._call('go_to', group_mask=0, relative=False, goal=TYPES.make('geometry_msgs/msg/Point', x=x, y=y, z=z),
                   yaw=float(yaw), duration=_duration(duration))

    def stop(self) -> None:
        """Nothing: the servers have no such service; the disarming that follows stops the motors."""

    def arm(self, on: bool) -> None:
        """Arm or disarm."""
        self._call('arm', arm=bool(on))

    def emergency_stop(self) -> None:
        """Motors off, locked."""
        self._call('emergency')

    def emergency_watchdog(self) -> None:
        """Nothing: Crazyswarm2Settings refuses firmware_watchdog."""

    def reset_estimator(self) -> None:
        """Reset the Kalman filter."""
        self._parameters.call_async(self._request('kalman.resetEstimation', 1))

    def _call(self, service: str, **fields: Any) -> None:
        client = self._services[service]
        if client.service_is_ready():  # a request to nobody would wait for somebody, and be carried out then
            client.call_async(client.srv_type.Request(**fields))

    # --- parameters -------------------------------------------------------------------------------

    def _request(self, name: str, value: int | float) -> Any:
        held = (TYPES.make('rcl_interfaces/msg/ParameterValue', type=_DOUBLE, double_value=value)
                if isinstance(value, float) else
                TYPES.make('rcl_interfaces/msg/ParameterValue', type=_INTEGER, integer_value=value))
        return self._parameters.srv_type.Request(parameters=[TYPES.make(
            'rcl_interfaces/msg/Parameter', name=f'{self._settings.crazyflie}.params.{name}', value=held)])

    def _set_and_wait(self, name: str, value: int | float) -> str:
        """Called from the connecting thread, while the executor spins: why `name` was not set, '' when it was."""
        answered, s = threading.Event(), self._settings
        future = self._parameters.call_async(self._request(name, value))
        future.add_done_callback(lambda _: answered.set())
        if not answered.wait(s.connect_timeout):
            return f'{s.server} did not set {name} within {s.connect_timeout:g} s'
        result = future.result().results[0]
        return '' if result.successful else f'{s.server} refused {name} = {value}: {result.reason}'

    # --- what the server says ---------------------------------------------------------------------

    def _ros_time(self) -> float:
        return self._node.get_clock().now().nanoseconds * 1e-9

    def _learn(self, **values: Any) -> None:
        with self._lock:
            self._telemetry = replace(self._telemetry, **values)

    def _on_status(self, msg: Any) -> None:
        self._learn(stamp=self._clock(), battery_v=float(msg.battery_voltage), supervisor=int(msg.supervisor_info),
                    link_statistics=LinkStatistics(rssi_dbm=-float(msg.rssi), latency=1e-3 * msg.latency_unicast))

    def _on_pose(self, msg: Any) -> None:
        _, position, quaternion = interface.read_pose(msg)
        self._learn(position=position, yaw=float(rotation.yaw(quaternion)))

    def _on_variance(self, msg: Any) -> None:
        self._learn(variance=np.array(msg.values, dtype=float))


def _duration(seconds: float) -> Any:
    whole = int(seconds)
    return TYPES.make('builtin_interfaces/msg/Duration', sec=whole, nanosec=round(1e9 * (seconds - whole)))


class Crazyswarm2Interface(CrazyflieInterface):
    """CrazyflieInterface whose radio is Crazyswarm2's server."""

    SETTINGS = Crazyswarm2Settings

    def make_radio(self) -> Crazyswarm2Radio:
        """RadioError where crazyflie_interfaces is not installed, or the names of both stacks would collide."""
        if self.settings.crazyflie == self.robot:
            raise RadioError(f'namespace /{self.robot} is that of the drone in Crazyswarm2, which has other types on '
                             f'the same topics and services; expected another, such as /{self.robot}_deqmpc')
        return Crazyswarm2Radio(self, self.settings, time.monotonic)


def main(argv: list[str] | None = None) -> int:
    """Console script."""
    return run(Crazyswarm2Interface, argv)


if __name__ == '__main__':
    sys.exit(main())
