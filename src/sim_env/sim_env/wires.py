"""The simulated lab on its wires: Crazyflies, radio peers, cameras and NatNet server in one loop."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from sim_env.crtp_peer import CrtpPeer
from sim_env.mocap_noise import MocapFrame, MocapSensor
from sim_env.natnet_server import NatNetServer, Pose
from sim_env.pacing import Pacer
from sim_env.simulated_crazyflie import SimulatedCrazyflie


@dataclass(frozen=True)
class WiredDrone:
    """One drone of the lab."""

    crazyflie: SimulatedCrazyflie
    peer: CrtpPeer  # its end of the radio
    sensor: MocapSensor  # the cameras, as far as its own body is concerned


class WiredLab:
    """Advances the physics in real time and serves both protocols.

    `drones`: name of the rigid body -> drone. One camera system sees them all: whether and when a frame arrives is
    drawn by the sensor of the first, what it shows of each body by that body's own. The drones do not feel each other.
    Drive it with `advance(now)`, `now` a monotonic clock in s, which is also the NatNet server's.
    """

    def __init__(self, drones: Mapping[str, WiredDrone], server: NatNetServer, pacer: Pacer):
        self.drones, self.server, self.pacer = dict(drones), server, pacer
        self.first = next(iter(self.drones.values()))
        self.counts: Counter[str] = Counter()  # frames exposed and delivered, bodies untracked
        self._on_the_way: deque[tuple[MocapFrame, dict[str, Pose | None]]] = deque()

    def advance(self, now: float) -> None:
        """Make the steps that are due, take exposures at their instants, deliver, answer."""
        for _ in range(self.pacer.due(now)):
            for drone in self.drones.values():
                drone.crazyflie.step()
            if self.first.crazyflie.time >= self.first.sensor.next_exposure - 1e-9:
                self._expose()
        for drone in self.drones.values():
            drone.peer.poll()
        self.server.poll(now)
        while self._on_the_way and self.pacer.clock(self._on_the_way[0][0].delivery) <= now:
            frame, poses = self._on_the_way.popleft()
            self.counts['delivered'] += 1
            self.counts['untracked'] += sum(pose is None for pose in poses.values())
            self.server.send_frame(frame.number, self.pacer.clock(frame.exposure), poses, now)

    def _expose(self) -> None:
        self.counts['exposed'] += 1
        frames = {body: drone.sensor.sample(drone.crazyflie.truth()) for body, drone in self.drones.items()}
        first = next(iter(frames.values()))
        if first is not None:
            poses = {body: None if frame is None or frame.position is None else (frame.position, frame.quaternion)
                     for body, frame in frames.items()}
            self._on_the_way.append((first, poses))

    def close(self) -> None:
        """Release all ports."""
        for drone in self.drones.values():
            drone.peer.close()
        self.server.close()
