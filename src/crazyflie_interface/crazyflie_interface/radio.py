# SPDX-License-Identifier: GPL-3.0-or-later
"""What a flight needs of the drone's end of the link. `CflibRadio` is the real one; an in-process
simulation gives its own, and FlightManager cannot tell them apart.

None of the commands waits for the drone: each is a packet that may be lost, so FlightManager watches
the telemetry and the pose and repeats what had no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crazyflie_interface.setpoint import Setpoint

# Bits of the log variable supervisor.info (crazyflie-firmware supervisor.c)
CAN_ARM, ARMED, AUTO_ARM, CAN_FLY, FLYING, TUMBLED, LOCKED, CRASHED = (1 << i for i in range(8))


class RadioError(RuntimeError):
    """The drone cannot be reached or set up; the message says what to do."""


@dataclass(frozen=True)
class LinkStatistics:
    """What is measured of the link itself. None: not known yet, or not on this kind of link."""

    uplink_hz: float | None = None  # packets to the drone that it acknowledged, empty polls among them
    downlink_hz: float | None = None  # packets from the drone, empty ones among them
    uplink_use: float | None = None  # share (0 to 1) of uplink packets that carry data; near 1: no room left
    downlink_use: float | None = None  # the same of the downlink
    retries: float | None = None  # retransmissions a packet, mean of the last 100
    rssi_dbm: float | None = None  # signal strength at the drone
    latency: float | None = None  # s, round trip that 95 % of the last pings stayed below
    pings_lost: float | None = None  # share (0 to 1) of the last pings that were not answered in 1 s
    reconnects: int = 0  # times the link was opened again since the start


@dataclass(frozen=True)
class Telemetry:
    """What is known of the drone. None: not known yet. Numbers are as the drone sent them: they may be
    NaN."""

    link: str = 'connecting'  # connecting | up | lost
    fault: str = ''  # why the link is lost or not up yet, or what of ours could not be sent
    stamp: float | None = None  # s, when the newest telemetry arrived
    battery_v: float | None = None  # V, under whatever load it has
    supervisor: int | None = None  # bits, see above
    link_quality: float | None = None  # percent; None on links that do not measure it
    position: np.ndarray | None = None  # (3,) m, onboard estimate, world
    yaw: float | None = None  # rad, onboard estimate
    variance: np.ndarray | None = None  # (3,) m^2, of the onboard position
    parameter_faults: tuple[str, ...] | None = None  # parameters that did not read back as set
    link_statistics: LinkStatistics = LinkStatistics()


class Radio(Protocol):
    """A link to one Crazyflie. Positions m and velocities m/s in world, angles rad."""

    def connect(self) -> None:
        """Open the link; returns when the drone is ready for parameters. Called again after a loss, it
        waits for the drone as long as it takes; all that was known of the drone is forgotten. Raises
        RadioError."""

    def set_and_check_parameters(self) -> tuple[str, ...]:
        """Set controller, estimator and mocap trust, read all back, reset the estimator unless the drone
        flies: the faults."""

    def telemetry(self) -> Telemetry:
        """The newest telemetry."""

    def extpose(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """A mocap pose (m, unit xyzw) for the onboard estimator."""

    def full_state(self, setpoint: Setpoint) -> None:
        """A full-state setpoint; without another the firmware levels out after 0.5 s."""

    def notify_stop(self) -> None:
        """No more setpoints follow: the high-level commander takes over from the present state."""

    def takeoff(self, height: float, duration: float) -> None:
        """High level: rise to `height` (m, world) in `duration` (s) with the present heading."""

    def land(self, height: float, duration: float) -> None:
        """High level: sink to `height` (m, world) in `duration` (s) with the present heading."""

    def go_to(self, position: np.ndarray, yaw: float, duration: float) -> None:
        """High level: move to a pose in `duration` (s) and stay."""

    def stop(self) -> None:
        """High level: motors off."""

    def arm(self, on: bool) -> None:
        """Arm or disarm."""

    def emergency_stop(self) -> None:
        """Motors off now; the drone locks until it is restarted."""

    def emergency_watchdog(self) -> None:
        """Feed the firmware's emergency watchdog; after the first packet it wants one a second."""

    def reset_estimator(self) -> None:
        """Reset the onboard Kalman filter (on the ground only)."""

    def close(self) -> None:
        """Send what is queued and close the link."""
