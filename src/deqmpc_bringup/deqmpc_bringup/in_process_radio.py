"""The drone's end of the radio link without a link, for flights in one process and simulated time.

Numbers are rounded as the radio packets round them and telemetry comes at the rate of CflibRadio's log
blocks. `up` and `down` are asked once a packet and say whether it arrives; after LOST_AFTER without a
packet down, the link counts as lost, and, as with cflib, that is final.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from crazyflie_interface.cflib_radio import LOG_BLOCKS
from crazyflie_interface.radio import Telemetry
from crazyflie_interface.setpoint import Setpoint, int16_milli_to_cflib_si, si_to_int16_milli
from sim_env.simulated_crazyflie import SimulatedCrazyflie

# s of silence on the air after which CflibRadio's link counts as lost (cflib_link.LOST_PACKETS)
LOST_AFTER = 2.0
_LOG_PERIOD = 1e-3 * LOG_BLOCKS['state'][0]  # s


class InProcessRadio:
    """`crazyflie_interface.radio.Radio` over a SimulatedCrazyflie; `clock` stamps the telemetry (s). A packet is lost
    with probability `loss`, each way; the seed is that of the flight."""

    def __init__(self, crazyflie: SimulatedCrazyflie, clock: Callable[[], float], loss: float = 0.0, seed: int = 0):
        self._cf = crazyflie
        self._clock = clock
        rng = np.random.default_rng([seed, 0x7AD10])
        self.up: Callable[[], bool] = lambda: rng.random() >= loss  # does this command reach the drone?
        self.down: Callable[[], bool] = lambda: rng.random() >= loss  # does this log packet reach the ground?
        self.link_down = False  # nothing at all on the air
        self.faults: tuple[str, ...] | None = None
        self._telemetry = Telemetry(link='up')
        self._next_log = self._last_contact = crazyflie.time

    def advance(self) -> None:
        """Log what is due; call it once a simulated millisecond."""
        now = self._cf.time
        if not self.link_down:
            self._last_contact = now
        elif now - self._last_contact > LOST_AFTER and self._telemetry.link == 'up':
            self._telemetry = self._changed(link='lost', fault='too many packets lost')
        if now < self._next_log - 1e-9:
            return
        self._next_log += _LOG_PERIOD
        if not self.link_down and self._telemetry.link == 'up' and self.down():
            self._telemetry = self._read()

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
        self._telemetry = self._read()
        return self.faults

    def telemetry(self) -> Telemetry:
        """The newest log packets."""
        return self._telemetry

    def _changed(self, **values) -> Telemetry:
        return dataclasses.replace(self._telemetry, **values)

    def _read(self) -> Telemetry:
        """The log variables that CflibRadio reads."""
        read = {name: self._cf.log_variables[name][1]() for name in (
            'pm.vbat', 'stateEstimate.x', 'stateEstimate.y', 'stateEstimate.z', 'stateEstimate.yaw',
            'kalman.varPX', 'kalman.varPY', 'kalman.varPZ')}
        return self._changed(
            stamp=self._clock(), battery_v=read['pm.vbat'], supervisor=self._cf.supervisor_info, link_quality=100.0,
            position=np.array([read[f'stateEstimate.{a}'] for a in 'xyz']),
            yaw=np.deg2rad(read['stateEstimate.yaw']),
            variance=np.array([read[f'kalman.varP{a}'] for a in 'XYZ']), parameter_faults=self.faults)

    def _send(self, command: Callable[[], object]) -> None:
        if not self.link_down and self.up():
            command()

    def extpose(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Mocap pose to the onboard estimator."""
        self._send(lambda: self._cf.receive_extpose(position, quaternion))

    def full_state(self, setpoint: Setpoint) -> None:
        """Full-state setpoint."""
        def rounded(values):
            return int16_milli_to_cflib_si(si_to_int16_milli(values))
        self._send(lambda: self._cf.set_full_state(
            rounded(setpoint.position), rounded(setpoint.velocity), rounded(setpoint.acceleration),
            setpoint.quaternion, rounded(setpoint.rates)))

    def notify_stop(self) -> None:
        """End of the setpoint stream."""
        self._send(lambda: self._cf.notify_setpoint_stop(0))

    def takeoff(self, height: float, duration: float) -> None:
        """High-level take-off."""
        self._send(lambda: self._cf.takeoff(height, duration))

    def land(self, height: float, duration: float) -> None:
        """High-level landing."""
        self._send(lambda: self._cf.land(height, duration))

    def go_to(self, position: np.ndarray, yaw: float, duration: float) -> None:
        """High-level motion."""
        self._send(lambda: self._cf.go_to(position, yaw, duration))

    def stop(self) -> None:
        """High-level stop: motors off."""
        self._send(self._cf.high_level_stop)

    def arm(self, on: bool) -> None:
        """Arm or disarm."""
        self._send(lambda: self._cf.arm(on))

    def emergency_stop(self) -> None:
        """Motors off, locked."""
        self._send(self._cf.emergency_stop)

    def emergency_watchdog(self) -> None:
        """Feed the firmware's watchdog."""
        self._send(self._cf.emergency_watchdog)

    def reset_estimator(self) -> None:
        """Reset the Kalman filter."""
        self._send(lambda: self._cf.set_parameter('kalman.resetEstimation', 1))

    def close(self) -> None:
        """Nothing to close."""
