# SPDX-License-Identifier: GPL-3.0-or-later
"""Node `crazyflie_interface`: poses, plans and services in, radio out. The flight itself is
`FlightManager`; this file only carries messages to and from it, and sees that the node never leaves a
flying drone alone."""

from __future__ import annotations

import re
import sys
import threading
import time
import traceback

from rclpy.node import Node

from crazyflie_interface.cflib_radio import CflibRadio
from crazyflie_interface.flight import TICK, FlightManager
from crazyflie_interface.preflight import REPORTERS
from crazyflie_interface.radio import Radio, RadioError
from crazyflie_interface.settings import Settings
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles
from deqmpc_ros.messages import TYPES, message_class
from deqmpc_ros.node import SettingsError, declare, now, publisher, robot_name, run, steady_timer, subscription

STATUS_TICKS = 5  # 10 Hz
DIAGNOSTICS_TICKS = 50  # 1 Hz
CLOSE_TIMEOUT = 15.0  # s that closing waits for the ground
READING = 0.002  # s; two clocks read further apart than this say nothing about each other


class CrazyflieInterface(Node):
    """Ends with exit status 1 when the drone cannot be reached. One that is lost later is looked for again
    once disarmed."""

    SETTINGS = Settings  # the dataclass of its parameters

    def __init__(self, radio: Radio | None = None, **node_options):
        super().__init__('crazyflie_interface', **node_options)
        self.finished, self.exit_status = False, 0
        self.robot = robot_name(self)
        self.settings = declare(self, self.SETTINGS)
        self.priority = self.settings.priority  # read by run()
        try:
            self.radio = radio or self.make_radio()
        except RadioError as error:
            raise SettingsError(f'{self.get_fully_qualified_name()}: {error}') from error
        self.manager = FlightManager(self.radio, self.settings, self.robot)
        self._ticks, self._late, self._last_tick = 0, 0.0, None
        self._last_phase, self._last_refusal = '', ''
        self._poses = 0
        self._obstacles: Obstacles | None = None
        self._connect_error = ''
        for name in sorted(self.settings.waived):
            self.get_logger().warning(f'preflight check {name} is waived by the operator')
        self._setpoint = publisher(self, interface.SETPOINT, self.robot)
        self._status = publisher(self, interface.STATUS, self.robot)
        self._diagnostics = publisher(self, interface.DIAGNOSTICS, self.robot)
        self._inputs = [subscription(self, topic, self.robot, callback) for topic, callback in (
            (interface.POSE, self._on_pose), (interface.ODOM, self._on_odometry),
            (interface.PLAN, self._on_plan), (interface.GO_TO, self._on_go_to),
            (interface.OBSTACLES, self._on_obstacles), (interface.DIAGNOSTICS, self._on_diagnostics))]
        self._inputs += [subscription(self, interface.ODOM, name, lambda msg, name=name: self.manager.on_neighbour(
            name, interface.read_odometry(msg), self._now())) for name in self.settings.neighbours]
        self._requests = [
            self.create_service(message_class(kind), name, getattr(self, f'_on_{name}'))
            for name, kind in interface.SERVICES.items()]
        self._timer = steady_timer(self, TICK, self._tick)
        # Connecting takes seconds and may fail, so it has a thread; the executor is free to stop meanwhile.
        self._start_connecting()

    # --- radio ------------------------------------------------------------------------------------

    def make_radio(self) -> Radio:
        """The link to the drone. RadioError where it cannot be had."""
        return CflibRadio(self.settings, time.monotonic)

    def _start_connecting(self):
        self._connecting = threading.Thread(target=self._connect, name='radio_connect', daemon=True)
        self._connecting.start()

    def _connect(self):
        begin = time.monotonic()
        try:
            self.radio.connect()
            faults = self.radio.set_and_check_parameters()
        except RadioError as error:
            self._connect_error = str(error)
            return
        self.get_logger().info(f'{self.settings.uri}: connected in {time.monotonic() - begin:.1f} s')
        for fault in faults:
            self.get_logger().error(fault)

    def _watch_radio(self):
        """A drone that cannot be reached ends the node. One that is lost is final for its flight; once
        disarmed it is looked for again, and its parameters are set anew, for it may have been restarted."""
        telemetry = self.radio.telemetry()
        if self.finished or self.manager.ending:
            return
        if self._connect_error:
            self.finished, self.exit_status = True, 1
            print(f'error: {self.get_fully_qualified_name()}: {self._connect_error}', file=sys.stderr, flush=True)
        elif telemetry.link == 'lost' and self.manager.phase == 'disarmed' and not self._connecting.is_alive():
            self.get_logger().warning(f'radio link lost: {telemetry.fault}; looking for the drone again')
            self._start_connecting()

    # --- messages in ------------------------------------------------------------------------------

    def _now(self) -> float:
        """The flight's clock (s): steady. The ROS clock is compared with it on the way."""
        before, ros, after = time.monotonic(), now(self), time.monotonic()
        if after - before < READING:
            self.manager.on_ros_time(ros, after)
        return after

    def _on_pose(self, msg):
        self._poses += 1
        self._refused('pose', self.manager.on_pose(*interface.read_pose(msg), self._now()))

    def _on_odometry(self, msg):
        self.manager.on_odometry(interface.read_odometry(msg), self._now())

    def _on_plan(self, msg):
        try:
            plan = interface.read_plan(msg)
        except ValueError as error:
            self.manager.refuse_plan(str(error))
            self._refused('plan', str(error))
            return
        self._refused('plan', self.manager.on_plan(plan, self._now()))

    def _on_go_to(self, msg):
        _, position, quaternion = interface.read_pose(msg)
        try:
            yaw = float(rotation.yaw(rotation.normalize(quaternion)))
        except ValueError as error:
            self.get_logger().warning(f'go_to: {error}')
            return
        self._report('go_to', self.manager.go_to(position, yaw, self._now()))

    def _on_obstacles(self, msg):
        try:
            self._obstacles = interface.read_obstacles(msg, self._obstacles)
        except ValueError as error:
            self._refused('obstacles', str(error))
            return
        self._refused('obstacles', '')
        self.manager.on_obstacles(self._obstacles, self._now())

    def _on_diagnostics(self, msg):
        for status in interface.read_diagnostics(msg):
            robot, _, name = status.name.partition('/')
            if robot == self.robot and name in REPORTERS:
                self.manager.on_diagnostic(name, status, self._now())

    def _refused(self, what: str, reason: str):
        """Log a refused input once a change of reason, not once a message."""
        reason = reason and f'{what}: {reason}'
        kind = re.sub(r'[-+.\d]+', '#', reason)
        if kind and kind != self._last_refusal:
            self.get_logger().warning(reason)
        if kind or self._last_refusal.startswith(what):
            self._last_refusal = kind

    # --- services ---------------------------------------------------------------------------------

    def _on_arm(self, request, response):
        return self._answer(response, 'arm' if request.data else 'disarm',
                            self.manager.arm(bool(request.data), self._now()))

    def _on_takeoff(self, _, response):
        return self._answer(response, 'takeoff', self.manager.takeoff(self._now()))

    def _on_land(self, _, response):
        return self._answer(response, 'land', self.manager.land(self._now()))

    def _on_engage(self, _, response):
        return self._answer(response, 'engage', self.manager.engage(self._now()))

    def _on_disengage(self, _, response):
        return self._answer(response, 'disengage', self.manager.disengage(self._now()))

    def _on_emergency(self, _, response):
        return self._answer(response, 'emergency', self.manager.emergency(self._now()))

    def _on_preflight(self, _, response):
        answer = self._answer(response, 'preflight', self.manager.try_preflight(self._now()))
        self._publish_preflight(self._now())
        return answer

    def _answer(self, response, what, result):
        response.success, response.message = result.success, result.message
        self._report(what, result)
        return response

    def _report(self, what, result):
        if result.success:
            self.get_logger().info(f'{what}: {result.message}')
        else:  # a call of its own: rclpy allows one severity a line of code
            self.get_logger().warning(f'{what} refused: {result.message}')
        self._publish_status(self._now())

    # --- tick and messages out --------------------------------------------------------------------

    def _tick(self):
        t = self._now()
        if self._last_tick is not None:
            self._late = max(self._late, t - self._last_tick - TICK)
        self._last_tick = t
        setpoint = self.manager.tick(t)
        if setpoint is not None:
            self._setpoint.publish(interface.plan_message(TYPES, setpoint.as_plan(now(self)), self.robot))
        if self.manager.phase != self._last_phase:
            self.get_logger().info(f'{self._last_phase or "start"} -> {self.manager.phase}'
                                   + (f': {self.manager.reason}' if self.manager.reason else ''))
            self._publish_status(t)
        elif self._ticks % STATUS_TICKS == 0:
            self._publish_status(t)
        if self._ticks % DIAGNOSTICS_TICKS == 0:
            self._publish_diagnostics(t)
            self._watch_radio()
            self.manager.on_system_time(self._clock_difference())
            if self.manager.grounded:
                self._publish_preflight(t)
        self._ticks += 1

    def _publish_status(self, t):
        self._last_phase = self.manager.phase
        level, message = self.manager.health(t)
        self._status.publish(interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/flight', level, message, self.manager.status(t), self.settings.uri))

    def _publish_diagnostics(self, t):
        telemetry = self.radio.telemetry()
        level, message = self.manager.health(t)
        values = {'link': telemetry.link, 'link_fault': telemetry.fault,
                  'telemetry_age_ms': None if telemetry.stamp is None else 1000.0 * (t - telemetry.stamp),
                  'poses_per_second': self._poses, 'setpoints_sent': self.manager.setpoints_sent,
                  'tick_late_max_ms': 1000.0 * self._late, 'clock_steps': self.manager.stamps.steps,
                  'clock_step_s': self.manager.stamps.last_step}
        self._poses, self._late = 0, 0.0
        self._diagnostics.publish(interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/crazyflie_interface', level, message, values, self.settings.uri))

    def _publish_preflight(self, t):
        arrays = [interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/preflight/{check.name}', check.level, check.sentence,
            {key: getattr(check, key) for key in interface.PREFLIGHT_KEYS}, self.settings.uri)
            for check in self.manager.preflight(t)]
        arrays[0].status = [status for array in arrays for status in array.status]
        self._diagnostics.publish(arrays[0])

    def _clock_difference(self) -> float:
        """ROS time minus system time (s); 0 where it lies between two readings of the system clock."""
        before, ros, after = time.time(), now(self), time.time()
        return min(ros - before, 0.0) + max(ros - after, 0.0)

    # --- the end ----------------------------------------------------------------------------------

    def may_stop(self) -> bool:
        """Asked to stop: lands if flying; True once the drone is on the ground."""
        self.manager.shutdown(self._now())
        return self.manager.grounded

    def close(self) -> None:
        """Land whatever still flies, wait for the ground (at most CLOSE_TIMEOUT), close the radio.

        Poses keep coming while it lands, because the executor goes on spinning. Where that raises (it may
        be why the node ends), the drone lands on commands alone.
        """
        try:
            until = time.monotonic() + CLOSE_TIMEOUT
            try:
                while not self.may_stop() and time.monotonic() < until:
                    self.executor.spin_once(timeout_sec=TICK)
                for _ in range(3):  # the repeats of the last command
                    self.manager.tick(self._now())
                    time.sleep(TICK)
            except Exception:
                traceback.print_exc()
                if not self.manager.grounded:
                    self._land_blind()
        finally:
            self.radio.close()
            self._connecting.join(1.0)

    def _land_blind(self):
        duration = self.settings.land_duration_min + 1.0
        for _ in range(3):
            self.radio.land(self.settings.land_height, duration)
            self.radio.notify_stop()
            time.sleep(TICK)
        time.sleep(duration)
        for _ in range(3):
            self.radio.stop()
            self.radio.arm(False)
            time.sleep(TICK)


def main(argv: list[str] | None = None) -> int:
    """Console script."""
    return run(CrazyflieInterface, argv)


if __name__ == '__main__':
    sys.exit(main())
