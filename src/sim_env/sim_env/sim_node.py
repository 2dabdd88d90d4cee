"""Node `sim`: simulated Crazyflies on cflib's UDP links and a simulated OptiTrack on NatNet.

The other nodes connect to it as to the real ones; over ROS it publishes only the truth. One process simulates all
drones of a fleet: a step of one costs 0.03 ms a simulated millisecond.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rclpy.node import Node

from deqmpc import interface
from deqmpc.airframe import Airframe
from deqmpc_ros.messages import TYPES
from deqmpc_ros.node import (
    FlightWatch,
    SettingsError,
    declare,
    now,
    parameter,
    publisher,
    robot_name,
    run,
    steady_timer,
)
from sim_env.crtp_peer import CrtpPeer, LinkDirection
from sim_env.mocap_noise import MocapSensor, MocapSettings
from sim_env.natnet_packets import VERSIONS, Body
from sim_env.natnet_server import NatNetServer, NatNetSettings
from sim_env.pacing import Pacer
from sim_env.plant import PlantSettings
from sim_env.simulated_crazyflie import SimSettings, SimulatedCrazyflie
from sim_env.wires import WiredDrone, WiredLab

_LOOP = 0.002  # s: steps are 1 ms, so 2 a round; a round trip of a radio packet takes at most this
_TRUTH = 0.010  # s


@dataclass(frozen=True)
class Settings:
    """Parameters of the node."""

    seed: int = parameter(0, 'seed of start pose, sensor noise, losses and motor spread', 0, 2**31 - 1)
    start: str = parameter('random', "'x y z yaw' (m, rad), or random: on the floor, drawn from the seed")
    robots: list[str] = parameter([], 'names of the drones of a fleet; empty: one, the robot of the namespace')
    starts: list[str] = parameter([], "start of each of `robots`, 'x y z yaw' (m, rad) or random; empty: as start")
    crazyflie_uris: list[str] = parameter([], 'where cflib finds each of `robots`; empty: ports from the one of'
                                          ' crazyflie_uri upwards')
    start_range: float = parameter(1.0, 'a random start lies within this of the origin in x and in y (m)',
                                   0.0, 50.0)
    airframe: str = parameter('', 'YAML of the simulated airframe; empty: the built-in Crazyflie 2.1')
    battery: float = parameter(1.0, 'charge of the battery at start (fraction)', 0.05, 1.0)
    contact: str = parameter('springs', 'what the floor is: springs, or rigid with friction that sticks (cones; needs a'
                             ' C compiler)', choices=('springs', 'cones'))
    ground_effect: float = parameter(0.0, 'gain of the rotors over the floor, k_g of plant.py; 7 as recorded, 0: none',
                                     0.0, 19.0)
    real_time_factor: float = parameter(1.0, 'simulated seconds a second', 0.01, 20.0)
    crazyflie_uri: str = parameter('udp://127.0.0.1:19850', 'where cflib finds the Crazyflie')
    radio_loss: float = parameter(0.0, 'probability that a radio packet is lost, each way', 0.0, 1.0)
    radio_latency: float = parameter(0.0, 'delay of a radio packet, each way (s)', 0.0, 2.0)
    radio_jitter: float = parameter(0.0, 'uniform delay from 0 to this on top, each way (s)', 0.0, 2.0)
    natnet_address: str = parameter('127.0.0.1', 'interface of the NatNet server')
    natnet_command_port: int = parameter(1510, 'NatNet command port', 0, 65535)
    natnet_data_port: int = parameter(1511, 'NatNet data port (multicast)', 0, 65535)
    natnet_version: str = parameter('4.1', 'NatNet version', choices=tuple(f'{a}.{b}' for a, b in VERSIONS))
    natnet_multicast: bool = parameter(False, 'stream to the multicast group instead of to each client')
    natnet_y_up: bool = parameter(False, "stream in Motive's y-up axes")
    body: str = parameter('', "name of the Crazyflie's rigid body; empty: the robot's name")
    mocap_rate: float = parameter(100.0, 'camera frames a second', 1.0, 360.0)
    position_noise: float = parameter(0.0003, 'standard deviation of a measured position, each axis (m)',
                                      0.0, 1.0)
    orientation_noise: float = parameter(0.003, 'standard deviation of a measured attitude, each axis (rad)',
                                         0.0, 1.0)
    mocap_latency: float = parameter(0.006, 'from exposure to arrival (s)', 0.0, 2.0)
    mocap_jitter: float = parameter(0.001, 'uniform delay from 0 to this on top (s)', 0.0, 2.0)
    drop_probability: float = parameter(0.0, 'that a mocap frame is lost', 0.0, 1.0)
    burst_rate: float = parameter(0.0, 'bursts of lost mocap frames (1/s)', 0.0, 100.0)
    burst_duration: float = parameter(0.2, 'mean length of such a burst (s)', 0.0, 60.0)
    occlusion_rate: float = parameter(0.0, 'occlusions, which leave the body untracked (1/s)', 0.0, 100.0)
    occlusion_duration: float = parameter(0.2, 'mean length of an occlusion (s)', 0.0, 60.0)
    false_pose_probability: float = parameter(0.0, 'that a mocap frame shows the body somewhere else',
                                              0.0, 1.0)
    false_pose_distance: float = parameter(0.3, 'how far away (m)', 0.0, 10.0)


def start_pose(text: str, seed: int, reach: float) -> tuple[np.ndarray, float]:
    """'x y z yaw' or 'random' -> position (3,) m and yaw (rad). SettingsError on anything else."""
    if text == 'random':
        rng = np.random.default_rng([seed, 0x57A27])
        x, y, yaw = rng.uniform([-reach, -reach, -np.pi], [reach, reach, np.pi])
        return np.array([x, y, 0.0]), float(yaw)
    try:
        *position, yaw = (float(word) for word in text.replace(',', ' ').split())
    except ValueError:
        position, yaw = [], 0.0
    if len(position) != 3 or not np.isfinite([*position, yaw]).all() or position[2] < 0.0:
        raise SettingsError(f"start = {text!r}; expected 'x y z yaw' (m, m, m >= 0, rad) or random")
    return np.array(position), yaw


def udp_address(uri: str) -> tuple[str, int]:
    """'udp://127.0.0.1:19850' -> ('127.0.0.1', 19850). SettingsError on another link."""
    match = re.fullmatch(r'udp://([\w.-]+):(\d{1,5})', uri)
    if not match or int(match[2]) > 65535:
        raise SettingsError(f'crazyflie_uri = {uri!r}; the simulated Crazyflie is found at udp://HOST:PORT')
    return match[1], int(match[2])


def _airframe(path: str) -> Airframe:
    if not path:
        return Airframe()
    try:
        return Airframe.load(Path(path))
    except (OSError, ValueError) as error:
        raise SettingsError(f'airframe: {error}') from None


def _seeds(seed: int) -> list[int]:
    """Seeds of the Crazyflie, the cameras and the radio."""
    return [int(n) for n in np.random.SeedSequence(seed).generate_state(3)]


def of_robot(s: Settings, robot: str) -> Settings:
    """`s` for one drone: of a fleet, its start, link and seed in the place of the common ones. SettingsError where the
    lists of the fleet do not fit each other, or `robot` is not in it."""
    if not s.robots:
        return s
    for name in ('starts', 'crazyflie_uris'):
        if len(getattr(s, name)) not in (0, len(s.robots)):
            raise SettingsError(f'{name} has {len(getattr(s, name))} entries for {len(s.robots)} robots {s.robots}')
    if robot not in s.robots or len(set(s.robots)) < len(s.robots):
        raise SettingsError(f'robots = {s.robots}; expected {robot!r} among different names')
    k = s.robots.index(robot)
    host, port = udp_address(s.crazyflie_uri)
    # The first has the seed of a lone drone; the others' are drawn from it.
    seed = s.seed if k == 0 else int(np.random.SeedSequence([s.seed, k]).generate_state(1)[0])
    return replace(s, seed=seed, start=s.starts[k] if s.starts else s.start, robots=[], starts=[], crazyflie_uris=[],
                   crazyflie_uri=s.crazyflie_uris[k] if s.crazyflie_uris else f'udp://{host}:{port + k if port else 0}')


def make_crazyflie(s: Settings) -> SimulatedCrazyflie:
    """The drone that `s` (of one robot) asks for, at its start pose."""
    position, yaw = start_pose(s.start, s.seed, s.start_range)
    plant = PlantSettings(battery_charge=s.battery, contact=s.contact, ground_effect=s.ground_effect)
    settings = SimSettings(airframe=_airframe(s.airframe), plant=plant)
    try:
        return SimulatedCrazyflie(settings, _seeds(s.seed)[0], position, yaw)
    except ValueError as error:
        raise SettingsError(f'contact: {error}') from None


def make_sensor(s: Settings) -> MocapSensor:
    """The cameras that `s` (of one robot) asks for."""
    return MocapSensor(MocapSettings(
        rate=s.mocap_rate, position_noise=s.position_noise, orientation_noise=s.orientation_noise,
        latency=s.mocap_latency, jitter=s.mocap_jitter, drop_probability=s.drop_probability,
        burst_rate=s.burst_rate, burst_duration=s.burst_duration, occlusion_rate=s.occlusion_rate,
        occlusion_duration=s.occlusion_duration, false_pose_probability=s.false_pose_probability,
        false_pose_distance=s.false_pose_distance), _seeds(s.seed)[1])


def make_drone(s: Settings, warn) -> WiredDrone:
    """The drone, peer and cameras of one robot. OSError when its port cannot be opened."""
    crazyflie, link = make_crazyflie(s), LinkDirection(s.radio_loss, s.radio_latency, s.radio_jitter)
    peer = CrtpPeer(crazyflie, udp_address(s.crazyflie_uri), link, link, _seeds(s.seed)[2], warn)
    return WiredDrone(crazyflie, peer, make_sensor(s))


def make_lab(s: Settings, robot: str, clock: float, warn) -> WiredLab:
    """The lab that `s` asks for, its clock starting at `clock` (s). SettingsError says what cannot be."""
    robots = s.robots or [robot]
    if s.body and s.robots:
        raise SettingsError(f'body = {s.body!r}; the bodies of a fleet are named as its robots {s.robots}')
    version = tuple(int(n) for n in s.natnet_version.split('.'))
    drones: dict[str, WiredDrone] = {}
    try:
        for name in robots:
            own = of_robot(s, name)
            if drones:  # what becomes of a frame is drawn once, for the first
                own = replace(own, drop_probability=0.0, burst_rate=0.0)
            drones[s.body or name] = make_drone(own, warn)
        server = NatNetServer([Body(body, k) for k, body in enumerate(drones, 1)], NatNetSettings(
            address=s.natnet_address, command_port=s.natnet_command_port, data_port=s.natnet_data_port,
            multicast=s.natnet_multicast, version=version, y_up=s.natnet_y_up, frame_rate=s.mocap_rate), warn)
    except (OSError, ValueError) as error:
        for drone in drones.values():
            drone.peer.close()
        raise SettingsError(error.strerror if isinstance(error, OSError) else str(error)) from None
    return WiredLab(drones, server, Pacer(clock, s.real_time_factor))


class SimNode(Node):
    """Runs the lab in a timer and publishes the truth and diagnostics."""

    def __init__(self):
        super().__init__('sim')
        self.robot = robot_name(self)
        settings = declare(self, Settings)
        self.robots = settings.robots or [self.robot]
        self.lab = make_lab(settings, self.robot, time.monotonic(), self.get_logger().warning)
        self.truths = [publisher(self, interface.TRUTH, name) for name in self.robots]
        self.diagnostics = publisher(self, interface.DIAGNOSTICS, self.robot)
        self.watches = [FlightWatch(self, name) for name in self.robots]
        self._next_truth = 0.0
        self._slips = 0
        steady_timer(self, _LOOP, self._advance)
        steady_timer(self, 1.0, self._report)
        for name, drone in zip(self.robots, self.lab.drones.values(), strict=True):
            p = drone.crazyflie.truth().position
            self.get_logger().info(
                f'{name} at udp://{drone.peer.address[0]}:{drone.peer.address[1]}, NatNet {settings.natnet_version} '
                f'at {self.lab.server.address[0]}:{self.lab.server.address[1]}, '
                f'start {p[0]:.2f} {p[1]:.2f} {p[2]:.2f}')

    def _advance(self):
        self.lab.advance(time.monotonic())
        simulated = self.lab.first.crazyflie.time
        if simulated < self._next_truth - 1e-9:
            return
        self._next_truth = max(self._next_truth + _TRUTH, simulated)
        # The ROS time at which this instant was due, not the time this callback got round to it.
        stamp = now(self) - (time.monotonic() - self.lab.pacer.clock(simulated))
        for name, drone, truth in zip(self.robots, self.lab.drones.values(), self.truths, strict=True):
            state = replace(drone.crazyflie.truth(), stamp=stamp)
            truth.publish(interface.odometry_message(TYPES, state, name))

    def _report(self):
        lab, pacer = self.lab, self.lab.pacer
        late = pacer.slips > self._slips
        self._slips = pacer.slips
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/sim', interface.WARN if late else interface.OK,
            'slower than real time' if late else 'in real time', {
                'time': lab.first.crazyflie.time, 'lag_ms': 1e3 * pacer.lag, 'slips': pacer.slips,
                'slipped_s': pacer.slipped, 'mocap_exposed': lab.counts['exposed'],
                'mocap_delivered': lab.counts['delivered'], 'mocap_untracked': lab.counts['untracked'],
                'natnet_clients': len(lab.server.clients), 'natnet_malformed': lab.server.counts['malformed'],
                **{f'radio_{name}': sum(d.peer.counts[name] for d in lab.drones.values()) for name in (
                    'received', 'sent', 'malformed', 'unsupported', 'lost_up', 'lost_down')}}, self.robot))

    def may_stop(self) -> bool:
        """Not while a drone is being landed: it needs its physics until it stands."""
        return not any(watch.in_air() for watch in self.watches)

    def close(self):
        """Release the ports."""
        self.lab.close()


def main(argv: list[str] | None = None) -> int:
    """Entry point; see deqmpc_ros.node.run for the exit status."""
    return run(SimNode, argv)


if __name__ == '__main__':
    sys.exit(main())
