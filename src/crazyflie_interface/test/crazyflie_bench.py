# SPDX-License-Identifier: GPL-3.0-or-later
"""A drone that does what it is told at once, behind the Radio protocol, and a bench that flies it."""

import dataclasses
import itertools
from unittest.mock import create_autospec

import numpy as np

from crazyflie_interface import radio
from crazyflie_interface.flight import TICK, FlightManager
from crazyflie_interface.radio import Radio, Telemetry
from crazyflie_interface.settings import FlightSettings
from deqmpc import interface
from deqmpc.types import Obstacles, Plan, RigidBodyState

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
# What the other nodes report when all is well.
REPORTS = {'mocap': {'body': 'cf1', 'tracked': 'True', 'clock_uncertainty_ms': '0.3'},
           'policy': {'policy': 'bench', 'tick': '7', 'gate': 'accepted', 'latency_ms': '25'},
           'recorder': {'messages': '100', 'disk_free_bytes': '1e+11'}}


def hover_plan(stamp, position=(0.0, 0.0, 0.5), velocity=(0.0, 0.0, 0.0), points=11, step=0.1):
    """A straight line with constant velocity from `position`."""
    t = step * np.arange(points)
    v = np.tile(np.asarray(velocity, float), (points, 1))
    return Plan(stamp, t, np.asarray(position, float) + t[:, None] * v, np.tile(LEVEL, (points, 1)), v,
                np.zeros((points, 3)), np.zeros((points, 3)))


class Bench:
    """Simulated time, a kinematic drone behind an autospecced Radio, mocap at 100 Hz, plans at 10 Hz.

    `log` holds (time, command, arguments) of every command; `loses(command)` drops what it returns
    True for, as a radio does.
    """

    def __init__(self, settings=FlightSettings(), start=(0.0, 0.0, 0.02), loses=lambda name: False):
        self.now, self.loses, self.log = 100.0, loses, []
        self.frames = 0
        self.mocap = self.policy = self.drone_alive = True
        self.position, self.target, self.arrival = np.array(start, float), None, 0.0
        self.velocity = np.zeros(3)
        self.plan_velocity = np.zeros(3)
        self.bits, self.volts, self.link, self.fault = radio.CAN_ARM, 4.1, 'up', ''
        self.parameter_faults = ()
        self.radio = create_autospec(Radio, instance=True)
        self.radio.telemetry.side_effect = self._telemetry
        for name in ('extpose', 'full_state', 'notify_stop', 'takeoff', 'land', 'go_to', 'stop', 'arm',
                     'emergency_stop', 'emergency_watchdog', 'reset_estimator', 'close'):
            getattr(self.radio, name).side_effect = self._command(name)
        self.manager = FlightManager(self.radio, settings)
        self.reports = dict(REPORTS)  # nodes that report
        self.manager.on_obstacles(Obstacles.none(self.now), self.now)
        self.manager.on_system_time(0.0)
        self.sent = []
        self._telemetry_stamp = self.now

    def _command(self, name):
        def call(*args):
            self.log.append((self.now, name, args))
            if self.drone_alive and not self.loses(name):
                getattr(self, f'_drone_{name}', lambda *a: None)(*args)
        return call

    def _telemetry(self):
        return Telemetry(link=self.link, fault=self.fault, stamp=self._telemetry_stamp, battery_v=self.volts,
                         supervisor=self.bits, position=self.position.copy(), yaw=0.0,
                         variance=np.full(3, 1e-5), parameter_faults=self.parameter_faults)

    def _move(self, target, duration):
        self.target, self.arrival = np.asarray(target, float), self.now + duration

    def _drone_arm(self, on):
        ready = radio.ARMED | radio.CAN_FLY
        self.bits = (self.bits | ready) if on else (self.bits & ~ready)

    def _drone_takeoff(self, height, duration):
        self._move([*self.position[:2], height], duration)

    def _drone_land(self, height, duration):
        self._move([*self.position[:2], height], duration)

    def _drone_go_to(self, position, yaw, duration):
        self._move(position, duration)

    def _drone_full_state(self, setpoint):
        self._move(setpoint.position, TICK)

    def _drone_emergency_stop(self):
        self.bits, self.target = radio.LOCKED, None

    def step(self, seconds=TICK):
        """Run for `seconds` in ticks of 20 ms with two poses each."""
        for _ in range(round(seconds / TICK)):
            for _ in range(2):
                self.now += TICK / 2
                before = self.position.copy()
                if self.target is not None:
                    left = max(self.arrival - self.now, TICK / 2)
                    self.position += (self.target - self.position) * min(1.0, TICK / 2 / left)
                self.velocity = (self.position - before) / (TICK / 2)
                if self.drone_alive:
                    self._telemetry_stamp = self.now
                if self.mocap:
                    self.frames += 1
                    noise = 1e-6 * (-1) ** self.frames  # cameras never give the same numbers twice
                    self.manager.on_pose(self.now - 0.005, self.position + noise, LEVEL, self.now)
                    self.manager.on_odometry(RigidBodyState(
                        self.now, self.position, LEVEL, self.velocity, np.zeros(3)), self.now)
            if round(self.now / TICK) % 5 == 0:
                self._report()
            if self.policy and round(self.now / TICK) % 5 == 0:
                self.manager.on_plan(hover_plan(self.now - 0.03, self.position, self.plan_velocity), self.now)
            self.sent.append(self.manager.tick(self.now))
        return self

    def _report(self):
        for node, values in self.reports.items():
            if node != 'policy' or self.policy:
                self.manager.on_diagnostic(node, interface.Diagnostic(
                    self.now, f'cf1/{node}', interface.OK, 'bench', values), self.now)

    def until(self, phase, limit=20.0):
        """Step until `phase`."""
        end = self.now + limit
        while self.manager.phase != phase:
            assert self.now < end, f'{phase} not reached: {self.manager.status(self.now)}'
            self.step()
        return self

    def holding(self):
        """Arm and take off."""
        self.step(1.2)
        self.ask('arm', True)
        self.until('armed')
        self.ask('takeoff')
        return self.until('holding')

    def following(self):
        """... and engage."""
        self.holding().ask('engage')
        return self.step(0.5)

    def ask(self, request, *args):
        """A request that must succeed."""
        result = getattr(self.manager, request)(*args, self.now)
        assert result.success, result.message
        return self

    def refused(self, request, *args):
        """The message of a request that must be refused."""
        result = getattr(self.manager, request)(*args, self.now)
        assert not result.success, result.message
        return result.message

    def commands(self, *but):
        """Names of the commands sent, without poses and repeats."""
        names = [n for _, n, _ in self.log if n not in ('extpose', 'emergency_watchdog', *but)]
        return [name for name, _ in itertools.groupby(names)]


def changed(settings=None, **values):
    """FlightSettings with other values."""
    return dataclasses.replace(settings or FlightSettings(), **values)
