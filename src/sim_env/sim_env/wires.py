"""The simulated lab on its wires: Crazyflie, radio peer, cameras and NatNet server in one loop."""

from __future__ import annotations

from collections import Counter, deque

from sim_env.crtp_peer import CrtpPeer
from sim_env.mocap_noise import MocapFrame, MocapSensor
from sim_env.natnet_server import NatNetServer
from sim_env.pacing import Pacer
from sim_env.simulated_crazyflie import SimulatedCrazyflie


class WiredLab:
    """Advances the physics in real time and serves both protocols.

    Drive it with `advance(now)`, `now` a monotonic clock in s, which is also the NatNet server's.
    """

    def __init__(self, crazyflie: SimulatedCrazyflie, peer: CrtpPeer, server: NatNetServer,
                 sensor: MocapSensor, pacer: Pacer, body: str):
        self.crazyflie, self.peer, self.server = crazyflie, peer, server
        self.sensor, self.pacer, self.body = sensor, pacer, body
        self.counts: Counter[str] = Counter()  # frames exposed and delivered, untracked
        self._on_the_way: deque[MocapFrame] = deque()

    def advance(self, now: float) -> None:
        """Make the steps that are due, take exposures at their instants, deliver, answer."""
        for _ in range(self.pacer.due(now)):
            self.crazyflie.step()
            if self.crazyflie.time >= self.sensor.next_exposure - 1e-9:
                self.counts['exposed'] += 1
                frame = self.sensor.sample(self.crazyflie.truth())
                if frame is not None:
                    self._on_the_way.append(frame)
        self.peer.poll()
        self.server.poll(now)
        while self._on_the_way and self.pacer.clock(self._on_the_way[0].delivery) <= now:
            frame = self._on_the_way.popleft()
            pose = None if frame.position is None else (frame.position, frame.quaternion)
            self.counts['delivered'] += 1
            self.counts['untracked'] += pose is None
            self.server.send_frame(frame.number, self.pacer.clock(frame.exposure), {self.body: pose}, now)

    def close(self) -> None:
        """Release both ports."""
        self.peer.close()
        self.server.close()
