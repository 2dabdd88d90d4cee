"""A whole trial in one process in simulated time, faster than real time.

The wires are left out; the logic of the nodes is not: the same simulator, mocap bridge with its clock map,
policy loop with plan gate, flight manager with guard, and trial conductor run here, with the settings
that the composition gives their nodes, and write the same messages into the same kind of bag. What is not
exercised: sockets, cflib, DDS, process scheduling. The policy's plan arrives SOLVE_DELAY after its
tick, a constant, so that equal seeds give equal flights whatever the machine is doing.

Order within one millisecond: physics, telemetry, exposure of the cameras, then what is due in the order in
which it was scheduled (mocap frames that arrive, flight manager at 50 Hz, policy at its rate, conductor at
10 Hz). The schedule runs on simulated time, which no step of the system clock moves; stamps and ages are told
in ROS time, which `clock_step` does move.
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
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles, Plan, RigidBodyState
from deqmpc_bringup.composition import Row
from deqmpc_bringup.in_process_radio import InProcessRadio
from deqmpc_controller.node import Settings as PolicySettings
from deqmpc_controller.node import policy_loop
from deqmpc_controller.plan_gate import ACCEPTED
from deqmpc_ros.settings import from_values
from flight_log.bag import BagTypes, BagWriter
from flight_log.protocol import Call, Done, GoTo, Seen, TrialConductor, TrialSettings
from flight_log.recorder_node import RecorderSettings, read_metadata
from mocap_bridge import session
from mocap_bridge.bridge import Bridge, HealthSettings
from mocap_bridge.node import Settings as MocapSettings
from mocap_bridge.odometry import OdometrySettings
from sim_env.mocap_noise import MocapFrame
from sim_env.obstacle_node import Settings as ObstacleSettings
from sim_env.obstacle_node import make_field
from sim_env.sim_node import Settings as SimSettings
from sim_env.sim_node import make_crazyflie, make_sensor, of_robot

S = TypeVar('S')

SOLVE_DELAY = 0.02  # s from a tick to its plan's arrival at the flight manager
CONDUCTOR_PERIOD = 0.1  # s, as the trial node steps
STATUS_PERIOD = 0.1  # s
REPORT_PERIOD = 1.0  # s, of the mocap bridge and the recorder
OBSTACLE_PERIOD = 0.1  # s, of moving spheres
DISK_FREE = 100_000_000_000  # bytes, of the simulated computer
NETWORK_DELAY = 2e-4  # s, of a datagram from the mocap system
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


class InProcessGraph:
    """The nodes of mode `sim` but the trial node, driven by `advance()` one millisecond at a time.

    Attributes that stand for what can fail between the nodes, to be replaced from outside:
      mocap     MocapFrame of the cameras -> the frames that leave them
      plan      what the policy publishes, or None -> what arrives
      body      name under which the cameras' rigid body is streamed
      policy_alive, obstacles_alive, recorder_alive    the process still runs
      clock_step  s added to the system clock, and so to the ROS clock
    and `radio.up`, `radio.down`, `radio.link_down`, `crazyflie` and its `plant`.
    """

    def __init__(self, rows: Sequence[Row]):
        by_name = {row.name: row for row in rows}
        self.robot = rows[0].namespace.strip('/')

        def read(name: str, settings: type[S]) -> S:
            return settings_of(by_name[name], settings)
        sim, policy = of_robot(read('sim', SimSettings), self.robot), read('policy', PolicySettings)
        mocap = read('mocap_bridge', MocapSettings)
        torch.set_num_threads(policy.threads)
        self.crazyflie = make_crazyflie(sim)
        self.clock_step = 0.0
        self.body = sim.body or self.robot
        self.mocap: Callable[[MocapFrame], Sequence[MocapFrame]] = lambda frame: (frame,)
        self.plan: Callable[[Plan | None], Plan | None] = lambda plan: plan
        self.policy_alive = self.obstacles_alive = True
        self.recorder_alive = 'recorder' in by_name
        self.obstacles: Obstacles | None = None  # as last published
        self.sensor = make_sensor(sim)
        self._mocap_session = session.Session()
        self._mocap_session.connected = True
        self.bridge = Bridge(mocap.body_name or self.robot, 'z', mocap.part(OdometrySettings),
                             mocap.part(HealthSettings), self.now)
        self.field = make_field(read('obstacles', ObstacleSettings))
        self._loop = policy_loop(policy, f'/{self.robot}/policy')
        self._policy_period = 1.0 / policy.rate
        self.radio = InProcessRadio(self.crazyflie, lambda: self.steady, sim.radio_loss, sim.seed)
        self.flight = FlightManager(self.radio, read('crazyflie_interface', InterfaceSettings), self.robot)
        self.flight.on_system_time(0.0)  # the simulated ROS clock is the system's
        self._types = BagTypes()
        self._bag: BagWriter | None = None
        if 'recorder' in by_name:
            recorder = read('recorder', RecorderSettings)
            self._bag = BagWriter(recorder.bag_path, {
                'robot': self.robot, 'clock': 'simulated', **read_metadata('recorder', recorder.metadata)})
        self.came: dict[str, float] = {'odom': -np.inf, 'plan': -np.inf, 'status': -np.inf}
        self.status: dict[str, Any] = {}
        self.state: RigidBodyState | None = None  # newest odometry
        self.policy_tick: int | None = None
        self._last_phase = ''
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.radio.connect()
        self.radio.set_and_check_parameters()
        self._echo()
        for period, action in ((TICK, self._tick_flight), (STATUS_PERIOD, self._publish_status),
                               (self._policy_period, self._tick_policy), (REPORT_PERIOD, self._report)):
            self.every(period, action)
        self.publish_obstacles()
        if self.field is not None and self.field.velocity.any():
            self.every(OBSTACLE_PERIOD, self.publish_obstacles)

    @property
    def now(self) -> float:
        """The simulated ROS clock (s)."""
        return self.steady + self.clock_step

    @property
    def steady(self) -> float:
        """The simulated steady clock (s), which nobody sets."""
        return EPOCH + self.crazyflie.time

    def advance(self) -> None:
        """One millisecond."""
        self.crazyflie.step()
        self.radio.advance()
        if self.crazyflie.time >= self.sensor.next_exposure - 1e-9:
            self._expose()
        while self._queue and self._queue[0][0] <= self.crazyflie.time + 1e-9:
            heapq.heappop(self._queue)[2]()

    def on_neighbour(self, name: str, state: RigidBodyState) -> None:
        """Odometry of another drone of a fleet, as policy, guard and recorder hear it."""
        if self._bag is not None:
            message = interface.odometry_message(self._types, state, name)
            self._bag.write_message(interface.ODOM, name, self.now, message)
        self._loop.neighbours.on_odometry(name, state)
        self.flight.on_neighbour(name, state, self.steady)

    def close(self) -> None:
        """Close the bag."""
        if self._bag is not None:
            self._bag.close()

    # --- schedule ---------------------------------------------------------------------------------

    def at(self, instant: float, action: Callable[[], None]) -> None:
        """Do `action` when the simulated time (s since start) is `instant`."""
        self._order += 1
        heapq.heappush(self._queue, (instant, self._order, action))

    def every(self, period: float, action: Callable[[], None]) -> None:
        """Do `action` every `period` (s) from now on."""
        begin = self.crazyflie.time

        def again(count: int) -> None:
            action()
            self.at(begin + (count + 1) * period, lambda: again(count + 1))
        self.at(begin, lambda: again(0))

    def _write(self, topic: interface.Topic, message: Callable[[], Any]) -> None:
        if self._bag is not None:
            self._bag.write_message(topic, self.robot, self.now, message())

    # --- the nodes' callbacks ---------------------------------------------------------------------

    def _expose(self) -> None:
        truth = self.crazyflie.truth()
        self._write(interface.TRUTH, lambda: interface.odometry_message(
            self._types, dataclasses.replace(truth, stamp=self.now), self.robot))
        taken = self.sensor.sample(truth)
        if taken is not None:
            for frame in self.mocap(taken):
                self.at(frame.delivery + NETWORK_DELAY, lambda frame=frame: self._on_frame(frame))

    def _echo(self) -> None:
        """NatNet's echo: the server's clock asked for, there and back."""
        now, server = self.now, self.crazyflie.time
        self._mocap_session.clock.observe_echo(now - NETWORK_DELAY, server, now + NETWORK_DELAY)
        self._mocap_session.counters.echoes += 1
        asks = self._mocap_session.settings
        pause = asks.echo_period if self._mocap_session.clock.settled else asks.first_echo_period
        self.at(server + pause, self._echo)

    def _on_frame(self, frame: MocapFrame) -> None:
        clock = self._mocap_session.clock
        clock.observe_frame(frame.delivery, self.now)
        self._mocap_session.counters.frames += 1
        sample = self.bridge.frame(session.MocapFrame(
            frame.number, frame.exposure, self.now, clock.to_ros(frame.exposure), self._bodies(frame), 'z'))
        if sample is None:
            return
        self.bridge.published(sample, self.now)
        self._write(interface.POSE, lambda: interface.pose_message(
            self._types, sample.stamp, sample.position, sample.quaternion))
        self.flight.on_ros_time(self.now, self.steady)
        self.flight.on_pose(sample.stamp, sample.position, sample.quaternion, self.steady)
        state = sample.state
        if state is not None:
            self.state, self.came['odom'] = state, self.now
            self._write(interface.ODOM, lambda: interface.odometry_message(self._types, state, self.robot))
            self.flight.on_odometry(state, self.steady)
            self._loop.on_odometry(state)

    def _bodies(self, frame: MocapFrame) -> dict[str, session.BodyPose]:
        error = self.sensor.settings.position_noise
        if frame.position is None:
            return {self.body: session.BodyPose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]), False, error)}
        return {self.body: session.BodyPose(frame.position, frame.quaternion, True, error)}

    def publish_obstacles(self) -> None:
        """What the obstacle node publishes of `field`."""
        if not self.obstacles_alive:
            return
        field = Obstacles.none(self.now) if self.field is None else self.field.at(self.crazyflie.time, self.now)
        message = interface.obstacles_message(self._types, field)
        self._write(interface.OBSTACLES, lambda: message)
        # Read back, as the nodes do: markers carry no velocity.
        self.obstacles = interface.read_obstacles(message, self.obstacles)
        self._loop.on_obstacles(self.obstacles)
        self.flight.on_obstacles(self.obstacles, self.steady)

    def _tick_policy(self) -> None:
        if not self.policy_alive:
            return
        tick = self._loop.tick(self.now)

        def arrive() -> None:
            plan = self.plan(tick.plan)
            if plan is not None:
                self._write(interface.PLAN, lambda: interface.plan_message(self._types, plan, self.robot))
                self.flight.on_plan(plan, self.steady)
                self.came['plan'] = self.now
            latency = self.now - self._loop.state.stamp if self._loop.state is not None else float('nan')
            self._diagnose('policy', interface.OK if tick.gate == ACCEPTED else interface.WARN, tick.gate,
                           tick.values(self._loop.policy.name, self.now, latency))
            self.policy_tick = tick.number
        self.at(self.crazyflie.time + SOLVE_DELAY, arrive)

    def _report(self) -> None:
        self._diagnose('mocap', *self.bridge.report(self._mocap_session, self.now))
        if self.recorder_alive:
            self._diagnose('recorder', interface.OK, 'recording', {
                'messages': 0 if self._bag is None else self._bag.messages, 'disk_free_bytes': DISK_FREE})

    def _diagnose(self, node: str, level: int, message: str, values: dict[str, Any]) -> None:
        """One status of `node` on /diagnostics."""
        diagnostics = interface.diagnostics_message(
            self._types, self.now, f'{self.robot}/{node}', level, message, values, self.robot)
        self._write(interface.DIAGNOSTICS, lambda: diagnostics)
        for status in interface.read_diagnostics(diagnostics):
            self.flight.on_diagnostic(node, status, self.steady)

    def _tick_flight(self) -> None:
        self.flight.on_ros_time(self.now, self.steady)
        setpoint = self.flight.tick(self.steady)
        if setpoint is not None:
            self._write(interface.SETPOINT, lambda: interface.plan_message(
                self._types, setpoint.as_plan(self.now), self.robot))
        if self.flight.phase != self._last_phase:
            self._publish_status()

    def _publish_status(self) -> None:
        self._last_phase = self.flight.phase
        self.status, self.came['status'] = self.flight.status(self.steady), self.now
        level, words = self.flight.health(self.steady)
        self._write(interface.STATUS, lambda: interface.diagnostics_message(
            self._types, self.now, f'{self.robot}/flight', level, words, self.status, 'in process'))


class InProcessTrial(InProcessGraph):
    """One trial from the rows of mode `sim` with trial:=true."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__(rows)
        self.conductor = TrialConductor(settings_of(next(r for r in rows if r.name == 'trial'), TrialSettings))

    def begin(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Start the conductor; `advance` flies the trial from here."""
        self.every(CONDUCTOR_PERIOD, lambda: self._step_conductor(say))

    def run(self, say: Callable[[str], None] = lambda line: None) -> Done:
        """Fly the trial; the bag is closed whatever happens. RuntimeError when it does not end."""
        self.begin(say)
        try:
            while self.conductor.done is None:
                self.advance()
                if self.crazyflie.time > LIMIT:
                    raise RuntimeError(f'trial in stage {self.conductor.stage} after {LIMIT:g} s')
        finally:
            self.close()
        return self.conductor.done

    def _step_conductor(self, say: Callable[[str], None]) -> None:
        now = self.now
        seen = Seen.at(now, self.status, self.came, self.state, self.policy_tick, self.obstacles)
        action = self.conductor.step(now, seen)
        for line in self.conductor.take_lines():
            say(f'[trial {now - EPOCH:6.1f} s] {line}')
        if isinstance(action, Call):
            request = getattr(self.flight, action.name)
            result = request(action.value, self.steady) if action.name == 'arm' else request(self.steady)
            self.conductor.reply(action.name, result.success, result.message)
            self._publish_status()
        elif isinstance(action, GoTo):
            pose = action.pose
            self._write(interface.GO_TO, lambda: interface.pose_message(
                self._types, now, pose.position, rotation.from_yaw(pose.yaw)))
            self.flight.go_to(pose.position, pose.yaw, self.steady)
