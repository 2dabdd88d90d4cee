"""Node `trial`: flies one trial on a running graph, through the drone's services. See protocol.py."""

from __future__ import annotations

import math
import time

from rclpy.node import Node

from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc_ros import node as ros
from deqmpc_ros.messages import TYPES, message_class
from flight_log.protocol import Call, Done, GoTo, Seen, TrialConductor, TrialSettings

STEP_HZ = 20.0
# Odometry of a stopped mocap, or a status, is told by its age on arrival: the sender's stamp may be late
# by its own transport, which is not this node's business.
_NEVER = -math.inf


class Trial(Node):
    """Messages into `Seen`, actions into calls. Exit status 0 when the trial succeeded, else 1."""

    def __init__(self):
        super().__init__('trial')
        self.robot = ros.robot_name(self)
        settings = ros.declare(self, TrialSettings)
        self.finished, self.exit_status = False, 1
        self.conductor = TrialConductor(settings)
        self.began = ros.now(self)
        self.came = dict.fromkeys(('status', 'odom', 'plan'), _NEVER)  # s, arrival
        self.flight: dict[str, str] = {}
        self.state = None
        self.tick: int | None = None
        self.obstacles = None
        self.callers = {name: self.create_client(message_class(kind), name)
                         for name, kind in interface.SERVICES.items()}
        self.go_to = ros.publisher(self, interface.GO_TO, self.robot)
        self.subscribers = [ros.subscription(self, topic, self.robot, callback) for topic, callback in (
            (interface.STATUS, self._on_status), (interface.ODOM, self._on_odometry),
            (interface.PLAN, self._on_plan), (interface.DIAGNOSTICS, self._on_diagnostics),
            (interface.OBSTACLES, self._on_obstacles))]
        self.diagnostics = ros.publisher(self, interface.DIAGNOSTICS, self.robot)
        ros.steady_timer(self, 1.0 / STEP_HZ, self._step)
        ros.steady_timer(self, 1.0, self._report)

    # --- messages in ---

    def _on_status(self, msg) -> None:
        for d in interface.read_diagnostics(msg):
            if d.name == f'{self.robot}/flight':
                self.flight, self.came['status'] = d.values, ros.now(self)

    def _on_odometry(self, msg) -> None:
        state = interface.read_odometry(msg)
        if state.is_finite():
            self.state, self.came['odom'] = state, ros.now(self)

    def _on_plan(self, _msg) -> None:
        self.came['plan'] = ros.now(self)

    def _on_diagnostics(self, msg) -> None:
        for d in interface.read_diagnostics(msg):
            if d.name == f'{self.robot}/policy' and d.values.get('tick', '').isdigit():
                self.tick = int(d.values['tick'])

    def _on_obstacles(self, msg) -> None:
        try:
            self.obstacles = interface.read_obstacles(msg, self.obstacles)
        except ValueError as error:
            self.get_logger().error(f'/obstacles ignored: {error}', throttle_duration_sec=1.0)

    # --- actions out ---

    def _step(self) -> None:
        now = ros.now(self)
        action = self.conductor.step(now, Seen.at(
            now, self.flight, self.came, self.state, self.tick, self.obstacles))
        self._print(now)
        if isinstance(action, Call):
            self._call(action)
        elif isinstance(action, GoTo):
            self.go_to.publish(interface.pose_message(
                TYPES, now, action.pose.position, rotation.from_yaw(action.pose.yaw)))
        elif isinstance(action, Done):
            self.finished, self.exit_status = True, 0 if action.success else 1

    def _report(self) -> None:
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, ros.now(self), f'{self.robot}/trial', interface.OK, self.conductor.stage,
            {'policy_tick': self.tick, 'phase': self.flight.get('phase')}, self.robot))

    def _print(self, now: float) -> None:
        for line in self.conductor.take_lines():
            print(f'[trial {now - self.began:6.1f} s] {line}', flush=True)

    def _call(self, action: Call) -> None:
        client = self.callers[action.name]
        if not client.service_is_ready():
            self.conductor.reply(action.name, False, f'service {client.srv_name} is not there')
            return
        request = client.srv_type.Request()
        if action.name == 'arm':
            request.data = action.value

        def answered(future) -> None:
            error = future.exception()
            if error is not None:
                self.conductor.reply(action.name, False, str(error))
            else:
                self.conductor.reply(action.name, future.result().success, future.result().message)
        client.call_async(request).add_done_callback(answered)

    def close(self) -> None:
        """Stopped before the end: a drone in the air is asked to land."""
        if self.conductor.done is not None:
            return
        phase = self.flight.get('phase', '')
        if phase in ('taking_off', 'holding', 'following'):
            print(f'[trial] stopped in phase {phase}: calling land', flush=True)
            self._call(Call('land'))
            time.sleep(0.5)  # the request leaves from another thread; the process must outlive it
        else:
            print(f'[trial] stopped in stage {self.conductor.stage}', flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the node."""
    return ros.run(Trial, argv)
