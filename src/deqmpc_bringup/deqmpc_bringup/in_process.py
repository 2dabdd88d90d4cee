"""A whole trial in one process in simulated time, faster than real time.

The wires are left out; the logic of the nodes is not: the same simulator, mocap filter, policy loop with
plan gate, flight manager with guard, and trial conductor run here, with the settings that the
composition gives their nodes, and write the same messages into the same kind of bag. What is not
exercised: sockets, cflib, DDS, process scheduling. The policy's plan arrives SOLVE_DELAY after its
tick, a constant, so that equal seeds give equal flights whatever the machine is doing.

Order within one millisecond t: physics, mocap frames that arrive, flight manager (50 Hz), policy
(at its rate), conductor (10 Hz).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from crazyflie_interface.flight import TICK, FlightManager
from crazyflie_interface.node import Settings as InterfaceSettings
from crazyflie_interface.radio import Telemetry
from crazyflie_interface.setpoint import Setpoint, int16_milli_to_cflib_si, si_to_int16_milli
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles
from deqmpc_bringup.composition import Row
from deqmpc_controller.node import Settings as PolicySettings
from deqmpc_controller.node import policy_loop
from deqmpc_controller.plan_gate import ACCEPTED
from deqmpc_ros.settings import from_values
from flight_log.bag import BagTypes, BagWriter
from flight_log.protocol import Call, Done, GoTo, Seen, TrialConductor, TrialSettings
from flight_log.recorder_node import RecorderSettings, read_metadata
from mocap_bridge.node import Settings as MocapSettings
from mocap_bridge.odometry import OdometryFilter, OdometrySettings
from sim_env.obstacle_node import Settings as ObstacleSettings
from sim_env.obstacle_node import make_field
from sim_env.sim_node import Settings as SimSettings
from sim_env.sim_node import make_crazyflie, make_sensor

S = TypeVar('S')

SOLVE_DELAY = 0.02  # s from a tick to its plan's arrival at the flight manager
CONDUCTOR_PERIOD = 0.1  # s, as the trial node steps
STATUS_PERIOD = 0.1  # s
EPOCH = 1000.0  # s, the simulated ROS clock at the start; 0 would look like an unset stamp
LIMIT = 600.0  # s of simulated time after which a trial that does not end is a fault of the protocol


def settings_of(row: Row, settings: type[S]) -> S:
    """The settings that the node of `row` would read from its parameter files and arguments."""
    given: dict[str, Any] = {}
    for flag, text in zip(row.ros_arguments[::2], row.ros_arguments[1::2], strict=True):
        if flag == '--params-file':
            for sections in (yaml.safe_load(Path(text).read_text()) or {}).values():
                given |= (sections or {}).get(row.name, {}).get('ros__parameters', {})
        else:
            name, _, value = text.partition(':=')
            given[name] = yaml.safe_load(value)
    return from_values(settings, f'{row.namespace}/{row.name}', given)


class InProcessRadio:
    """The drone's end of the link without a link; numbers are rounded as the radio packets round them."""

    def __init__(self, crazyflie, clock: Callable[[], float]):
        self._cf = crazyflie
        self._clock = clock
        self.faults: tuple[str, ...] | None = None

    def connect(self) -> None:
        """Nothing to open."""

    def set_and_check_parameters(self) -> tuple[str, ...]:
        """Controller, estimator and high-level commander as crazyflie_interface sets them."""
        wanted = {'stabilizer.controller': 2, 'stabilizer.estimator': 2, 'commander.enHighLevel': 1}
        for name, value in wanted.items():
            self._cf.set_parameter(name, value)
        self.reset_estimator()
        self.faults = tuple(f'{n} reads {self._cf.parameters[n].value}' for n, v in wanted.items()
                            if self._cf.parameters[n].value != v)
        return self.faults

    def telemetry(self) -> Telemetry:
        """The log variables that CflibRadio reads, without delay."""
        read = {name: self._cf.log_variables[name][1]() for name in (
            'pm.vbat', 'stateEstimate.x', 'stateEstimate.y', 'stateEstimate.z', 'stateEstimate.yaw',
            'kalman.varPX', 'kalman.varPY', 'kalman.varPZ')}
        return Telemetry(
            link='up', stamp=self._clock(), battery_v=read['pm.vbat'], supervisor=self._cf.supervisor_info,
            link_quality=100.0,
            position=np.array([read[f'stateEstimate.{a}'] for a in 'xyz']),
            yaw=np.deg2rad(read['stateEstimate.yaw']),
            variance=np.array([read[f'kalman.varP{a}'] for a in 'XYZ']), parameter_faults=self.faults)

    def extpose(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Mocap pose to the onboard estimator."""
        self._cf.receive_extpose(position, quaternion)

    def full_state(self, setpoint: Setpoint) -> None:
        """Full-state setpoint."""
        def rounded(values):
            return int16_milli_to_cflib_si(si_to_int16_milli(values))
        self._cf.set_full_state(rounded(setpoint.position), rounded(setpoint.velocity),
                                rounded(setpoint.acceleration), setpoint.quaternion, rounded(setpoint.rates))

    def notify_stop(self) -> None:
        """End of the setpoint stream."""
        self._cf.notify_setpoint_stop(0)

    def takeoff(self, height: float, duration: float) -> None:
        """High-level take-off."""
        self._cf.takeoff(height, duration)

    def land(self, height: float, duration: float) -> None:
        """High-level landing."""
        self._cf.land(height, duration)

    def go_to(self, position: np.ndarray, yaw: float, duration: float) -> None:
        """High-level motion."""
        self._cf.go_to(position, yaw, duration)

    def stop(self) -> None:
        """High-level stop: motors off."""
        self._cf.high_level_stop()

    def arm(self, on: bool) -> None:
        """Arm or disarm."""
        self._cf.arm(on)

    def emergency_stop(self) -> None:
        """Motors off, locked."""
        self._cf.emergency_stop()

    def emergency_watchdog(self) -> None:
        """Feed the firmware's watchdog."""
        self._cf.emergency_watchdog()

    def reset_estimator(self) -> None:
        """Reset the Kalman filter."""
        self._cf.set_parameter('kalman.resetEstimation', 1)

    def close(self) -> None:
        """Nothing to close."""


class InProcessTrial:
    """One trial from the rows of mode `sim` with trial:=true."""

    def __init__(self, rows: Sequence[Row]):
        by_name = {row.name: row for row in rows}
        self.robot = rows[0].namespace.strip('/')

        def read(name: str, settings: type[S]) -> S:
            return settings_of(by_name[name], settings)
        sim, policy = read('sim', SimSettings), read('policy', PolicySettings)
        torch.set_num_threads(policy.threads)
        self.crazyflie = make_crazyflie(sim)
        self._sensor = make_sensor(sim)
        self._filter = OdometryFilter(read('mocap_bridge', MocapSettings).part(OdometrySettings))
        self._field = make_field(read('obstacles', ObstacleSettings))
        self._obstacle_period = 0.1 if self._field is not None and self._field.velocity.any() else np.inf
        self._loop = policy_loop(policy, f'/{self.robot}/policy')
        self._policy_period = 1.0 / policy.rate
        self._radio = InProcessRadio(self.crazyflie, lambda: self.now)
        self._flight = FlightManager(self._radio, read('crazyflie_interface', InterfaceSettings))
        self.conductor = TrialConductor(read('trial', TrialSettings))
        self._types = BagTypes()
        self._bag: BagWriter | None = None
        if 'recorder' in by_name:
            recorder = read('recorder', RecorderSettings)
            self._bag = BagWriter(recorder.bag_path, {
                'robot': self.robot, 'clock': 'simulated', **read_metadata('recorder', recorder.metadata)})
        self._obstacles: Obstacles | None = None
        self._came: dict[str, float] = {'odom': -np.inf, 'plan': -np.inf, 'status': -np.inf}
        self._status: dict[str, Any] = {}
        self._state = None
        self._tick = None
        self._last_phase = ''
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    @property
    def now(self) -> float:
        """The simulated ROS clock (s)."""
        return EPOCH + self.crazyflie.time

    def run(self, say: Callable[[str], None] = lambda line: None) -> Done:
        """Fly the trial; the bag is closed whatever happens. RuntimeError when it does not end."""
        self._radio.connect()
        self._radio.set_and_check_parameters()
        for period, action in ((TICK, self._tick_flight), (STATUS_PERIOD, self._publish_status),
                               (self._policy_period, self._tick_policy),
                               (CONDUCTOR_PERIOD, lambda: self._step_conductor(say))):
            self._every(period, action)
        self._at(self.now, self._publish_obstacles)
        try:
            while self.conductor.done is None:
                self.crazyflie.step()
                if self.crazyflie.time >= self._sensor.next_exposure - 1e-9:
                    self._expose()
                while self._queue and self._queue[0][0] <= self.now + 1e-9:
                    heapq.heappop(self._queue)[2]()
                if self.crazyflie.time > LIMIT:
                    raise RuntimeError(f'trial in stage {self.conductor.stage} after {LIMIT:g} s')
        finally:
            if self._bag is not None:
                self._bag.close()
        return self.conductor.done

    # --- schedule ---------------------------------------------------------------------------------

    def _at(self, instant: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (instant, self._order, action))

    def _every(self, period: float, action: Callable[[], None]) -> None:
        begin = self.now

        def again(count: int) -> None:
            action()
            self._at(begin + (count + 1) * period, lambda: again(count + 1))
        self._at(begin, lambda: again(0))

    def _write(self, topic: interface.Topic, message: Any) -> None:
        if self._bag is not None:
            self._bag.write_message(topic, self.robot, self.now, message)

    # --- the nodes' callbacks ---------------------------------------------------------------------

    def _expose(self) -> None:
        truth = self.crazyflie.truth()
        truth = dataclasses.replace(truth, stamp=EPOCH + truth.stamp)
        self._write(interface.TRUTH, interface.odometry_message(self._types, truth, self.robot))
        frame = self._sensor.sample(self.crazyflie.truth())
        if frame is not None and frame.position is not None:
            self._at(EPOCH + frame.delivery, lambda: self._on_frame(frame))

    def _on_frame(self, frame) -> None:
        stamp = EPOCH + frame.exposure
        result = self._filter.update(stamp, frame.position, frame.quaternion)
        if not result.accepted:
            return
        self._write(interface.POSE, interface.pose_message(self._types, stamp, frame.position, frame.quaternion))
        self._flight.on_pose(stamp, frame.position, frame.quaternion, self.now)
        if result.state is not None:
            self._state, self._came['odom'] = result.state, self.now
            self._write(interface.ODOM, interface.odometry_message(self._types, result.state, self.robot))
            self._flight.on_odometry(result.state, self.now)
            self._loop.on_odometry(result.state)

    def _publish_obstacles(self) -> None:
        field = Obstacles.none(self.now) if self._field is None else self._field.at(self.now - EPOCH, self.now)
        message = interface.obstacles_message(self._types, field)
        self._write(interface.OBSTACLES, message)
        # Read back, as the nodes do: markers carry no velocity.
        self._obstacles = interface.read_obstacles(message, self._obstacles)
        self._loop.on_obstacles(self._obstacles)
        if self._obstacle_period < np.inf:
            self._at(self.now + self._obstacle_period, self._publish_obstacles)

    def _tick_policy(self) -> None:
        tick = self._loop.tick(self.now)

        def arrive() -> None:
            if tick.plan is not None:
                self._write(interface.PLAN, interface.plan_message(self._types, tick.plan, self.robot))
                self._flight.on_plan(tick.plan, self.now)
                self._came['plan'] = self.now
            latency = self.now - self._loop.state.stamp if self._loop.state is not None else float('nan')
            self._write(interface.DIAGNOSTICS, interface.diagnostics_message(
                self._types, self.now, f'{self.robot}/policy',
                interface.OK if tick.gate == ACCEPTED else interface.WARN, tick.gate,
                tick.values(self._loop.policy.name, self.now, latency), self.robot))
            self._tick = tick.number
        self._at(self.now + SOLVE_DELAY, arrive)

    def _tick_flight(self) -> None:
        setpoint = self._flight.tick(self.now)
        if setpoint is not None:
            self._write(interface.SETPOINT, interface.plan_message(
                self._types, setpoint.as_plan(self.now), self.robot))
        if self._flight.phase != self._last_phase:
            self._publish_status()

    def _publish_status(self) -> None:
        self._last_phase = self._flight.phase
        self._status, self._came['status'] = self._flight.status(self.now), self.now
        level, words = self._flight.health(self.now)
        self._write(interface.STATUS, interface.diagnostics_message(
            self._types, self.now, f'{self.robot}/flight', level, words, self._status, 'in process'))

    def _step_conductor(self, say: Callable[[str], None]) -> None:
        now = self.now
        seen = Seen.at(now, self._status, self._came, self._state, self._tick, self._obstacles)
        action = self.conductor.step(now, seen)
        for line in self.conductor.take_lines():
            say(f'[trial {now - EPOCH:6.1f} s] {line}')
        if isinstance(action, Call):
            request = getattr(self._flight, action.name)
            result = request(action.value, now) if action.name == 'arm' else request(now)
            self.conductor.reply(action.name, result.success, result.message)
            self._publish_status()
        elif isinstance(action, GoTo):
            pose = action.pose
            self._write(interface.GO_TO, interface.pose_message(
                self._types, now, pose.position, rotation.from_yaw(pose.yaw)))
            self._flight.go_to(pose.position, pose.yaw, now)
