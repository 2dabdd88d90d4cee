"""A scripted drone for the trial protocol; as a program it stands in for interface and policy nodes."""

import math
import sys

import numpy as np

from deqmpc import interface, obstacles
from deqmpc.types import Plan, RigidBodyState
from flight_log.protocol import Seen

FIELD = obstacles.draw(1).at(0.0)
GOAL = np.array([0.0, 0.0, 1.0])


class FakeFlight:
    """A drone that does what it is told: phases as in the interface node, straight flight at 1 m/s.

    `broken` names what does not work: services that are refused, services without any effect, or
    events by their time. Time goes in steps of 0.05 s.
    """

    def __init__(self, refuses=(), ignores=(), events=(), spheres=FIELD, policy_rate=10.0, mute=()):
        self.t, self.phase, self.reason, self.go_to = 0.0, 'disarmed', '', 'idle'
        self.position, self.velocity = np.array([0.2, 0.1, 0.0]), np.zeros(3)
        self.target = self.position
        self.refuses, self.ignores, self.mute = dict(refuses), set(ignores), set(mute)
        self.events = sorted(events, key=lambda e: e[0])  # (time, attribute, value)
        self.spheres, self.policy_rate = spheres, policy_rate
        self.status_lost_at = math.inf
        self.calls = []

    def seen(self):
        age = {k: math.inf if k in self.mute else 0.02 for k in ('status', 'pose', 'plan')}
        if self.t > self.status_lost_at:
            age['status'] = self.t - self.status_lost_at
        return Seen(phase=self.phase, reason=self.reason, go_to=self.go_to, status_age=age['status'],
                    pose_age=age['pose'], plan_age=age['plan'], position=self.position,
                    speed=float(np.linalg.norm(self.velocity)), tick=int(self.t * self.policy_rate),
                    obstacles=None if 'obstacles' in self.mute else self.spheres)

    def call(self, name, value):
        self.calls.append((name, value) if name == 'arm' else name)
        if name in self.refuses and self.t < self.refuses[name]:
            return False, f'{name} is not allowed'
        if name not in self.ignores:
            self.phase, self.target = {
                'arm': ('armed' if value else 'disarmed', self.position),
                'takeoff': ('taking_off', self.position + [0, 0, 0.8]),
                'land': ('landing', np.array([*self.position[:2], 0.0])),
                'engage': ('following', GOAL), 'disengage': ('holding', self.position),
                'emergency': ('emergency', self.position)}[name]
        return True, ''

    def advance(self, dt=0.05):
        self.t += dt
        while self.events and self.events[0][0] <= self.t:
            _, name, value = self.events.pop(0)
            setattr(self, name, value)
        away = self.target - self.position
        far = np.linalg.norm(away)
        self.velocity = away / max(far, 1e-9) * min(1.0, far / dt)
        self.position = self.position + dt * self.velocity
        if far < 0.01:
            if self.phase == 'taking_off':
                self.phase = 'holding'
            if self.phase == 'landing' and 'landed' not in self.ignores:
                self.phase = 'disarmed'
            if self.go_to == 'active':
                self.go_to = 'done'


def main():
    """Publish the fake flight at 20 Hz and answer its services, in real time, as robot `cf1`."""
    from rclpy.node import Node

    from deqmpc_ros import node as ros
    from deqmpc_ros.messages import TYPES, message_class

    class Fake(Node):
        def __init__(self):
            super().__init__('crazyflie_interface')
            self.flight = FakeFlight()
            self.out = {t: ros.publisher(self, t, 'cf1') for t in (
                interface.STATUS, interface.ODOM, interface.PLAN, interface.DIAGNOSTICS, interface.OBSTACLES)}
            self.out[interface.OBSTACLES].publish(interface.obstacles_message(TYPES, FIELD))
            self.kept = [self.create_service(message_class(kind), name, self.answer(name))
                         for name, kind in interface.SERVICES.items()]
            ros.subscription(self, interface.GO_TO, 'cf1', self.on_go_to)
            self.create_timer(0.05, self.tick)

        def answer(self, name):
            def callback(request, response):
                response.success, response.message = self.flight.call(name, getattr(request, 'data', True))
                print(name, flush=True)
                return response
            return callback

        def on_go_to(self, msg):
            self.flight.target, self.flight.go_to = interface.read_pose(msg)[1], 'active'

        def tick(self):
            f, now, level = self.flight, ros.now(self), np.array([0.0, 0.0, 0.0, 1.0])
            f.advance()
            state = RigidBodyState(now, f.position, level, f.velocity, np.zeros(3))
            zero = np.zeros((1, 3))
            plan = Plan(now, np.zeros(1), f.position[None], level[None], zero, zero, zero)
            for topic, message in (
                    (interface.ODOM, interface.odometry_message(TYPES, state, 'cf1')),
                    (interface.PLAN, interface.plan_message(TYPES, plan, 'cf1')),
                    (interface.STATUS, interface.diagnostics_message(
                        TYPES, now, 'cf1/flight', interface.OK, '',
                        {'phase': f.phase, 'guard': '', 'reason': f.reason, 'go_to': f.go_to}, 'cf1')),
                    (interface.DIAGNOSTICS, interface.diagnostics_message(
                        TYPES, now, 'cf1/policy', interface.OK, '', {'tick': int(10 * f.t)}, 'cf1'))):
                self.out[topic].publish(message)
    return ros.run(Fake, sys.argv)


if __name__ == '__main__':
    sys.exit(main())
