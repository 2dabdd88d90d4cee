"""Recorded Crazyflie flights against the simulated Crazyflie: `deqmpc compare-flights FILE...`.

A flight of the NanoBench data set (Ullah and Baca, 2026; arXiv 2603.09908) is cut to the part in which
position setpoints were streamed. The simulated Crazyflie starts there from the recorded state, with the
controller's integrals summed from the recording, gets the recorded setpoints (100 Hz), battery voltage
and an external position that is as late as the recorded one, and flies on its own to the end of the part.

What the recordings say about how they were flown:
- The path lags its setpoint by 0.53-0.60 s in x and y. Mellinger lags by kd/kp = 0.5 s when the velocity
  setpoint is zero and by almost nothing when it is given: position setpoints were streamed (type 7).
- `sp_ctrltarget_yaw` is the yaw rate setpoint in deg/s (its bump integrates to the turn made at take-off),
  zero for a position setpoint; the heading setpoint itself is not recorded and is taken from the flight.
- Take-off and landing were the high-level commander's, whose velocity setpoints are not recorded.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.types import RigidBodyState
from sim_env.plant import PlantSettings
from sim_env.simulated_crazyflie import SimSettings, SimulatedCrazyflie

# What the four flights identify beyond Bitcraze's numbers (regressions over the streamed part):
# - thrust_scale: PWM x voltage is the same in every flight (2.87-2.95 V at the motors), so the firmware
#   compensates the battery; Bitcraze's cubic at that voltage gives 0.413-0.436 N where weight needs
#   m |a|, ratio 0.0416-0.0443 kg. With Airframe's 0.0328 kg that is a scale of 0.74-0.79. Only the
#   ratio is observable: a heavier drone with better rotors would fly the same.
# - drag: body-axis accelerometer against body-axis velocity, correlation -0.95 to -0.98,
#   D/m = 0.35-0.42 1/s in x and y.
# - motor_time_constant: 0.03-0.05 s fits vertical acceleration against PWM best.
NANOBENCH = SimSettings(
    airframe=Airframe(drag=(0.38 * 0.0328, 0.38 * 0.0328, 0.38 * 0.0328), motor_time_constant=0.05),
    plant=PlantSettings(thrust_scale=0.76))

_COLUMNS = ('t', 'px', 'py', 'pz', 'qx', 'qy', 'qz', 'qw', 'vx', 'vy', 'vz',
            'est_stateEstimate_x', 'est_stateEstimate_y', 'est_stateEstimate_z', 'sp_ctrltarget_x',
            'sp_ctrltarget_y', 'sp_ctrltarget_z', 'motor_motor_m1', 'motor_motor_m2', 'motor_motor_m3',
            'motor_motor_m4', 'pwr_pm_vbat')
_AIRBORNE = 0.3  # m above the lowest recorded height


@dataclass(frozen=True)
class RecordedFlight:
    """One recording, N samples, times from its first sample."""

    name: str
    time: np.ndarray  # (N,) s
    position: np.ndarray  # (N, 3) m, Vicon
    quaternion: np.ndarray  # (N, 4) xyzw, Vicon
    velocity: np.ndarray  # (N, 3) m/s, world
    estimate: np.ndarray  # (N, 3) m, onboard
    setpoint: np.ndarray  # (N, 3) m
    pwm: np.ndarray  # (N, 4) 0..65535
    voltage: np.ndarray  # (N,) V

    @classmethod
    def load(cls, path: str | Path) -> RecordedFlight:
        """From a NanoBench CSV. ValueError names the file and what is missing or wrong in it."""
        path = Path(path)
        with path.open(newline='') as file:
            rows = csv.reader(file)
            header = next(rows, [])
            missing = [c for c in _COLUMNS if c not in header]
            if missing:
                raise ValueError(f'{path}: no column {", ".join(missing)}; expected a NanoBench flight CSV')
            index = [header.index(c) for c in _COLUMNS]
            try:
                data = np.array([[float(row[i]) for i in index] for row in rows])
            except (ValueError, IndexError) as error:
                raise ValueError(f'{path}: a row is not numeric or too short ({error})') from error
        if len(data) < 100 or not np.isfinite(data).all() or not (np.diff(data[:, 0]) > 0).all():
            raise ValueError(f'{path}: {len(data)} samples; expected at least 100, finite, with increasing t')
        return cls(path.name, data[:, 0] - data[0, 0], data[:, 1:4], rotation.normalize(data[:, 4:8]),
                   data[:, 8:11], data[:, 11:14], data[:, 14:17], data[:, 17:21], data[:, 21])

    def streamed_part(self) -> slice:
        """From the end of take-off (the height setpoint has come to rest) to the last streamed setpoint
        (the last change of x or y in the air is the high-level commander's jump at landing).
        ValueError when the recording has no such part of at least 2 s."""
        airborne = np.flatnonzero(self.position[:, 2] > self.position[:, 2].min() + _AIRBORNE)
        if len(airborne):
            first, last = airborne[0], airborne[-1]
            z = self.setpoint[first:last + 1, 2]
            still = np.abs(z[10:] - z[:-10]) < 1e-4
            moved = np.flatnonzero((np.diff(self.setpoint[first:last + 1, :2], axis=0) != 0.0).any(axis=1))
            if still.any() and len(moved):
                begin, end = first + int(np.argmax(still)), first + int(moved[-1])
                if self.time[end] - self.time[begin] >= 2.0:
                    return slice(begin, end + 1)
        raise ValueError(f'{self.name}: found no 2 s of streamed setpoints between take-off and landing')


@dataclass(frozen=True)
class Comparison:
    """One flight, recorded and simulated, over the streamed part. Root mean squares of 3-D distances, m."""

    name: str
    setpoints: str  # how the setpoints were sent: position | full_state
    duration: float  # s
    difference: float  # simulated against recorded position
    tracking_recorded: float  # recorded position against setpoint
    tracking_simulated: float  # simulated position against setpoint
    mean_offset: tuple[float, float, float]  # mean of simulated minus recorded, per axis
    difference_axis: tuple[float, float, float]  # RMS per axis
    time: np.ndarray = dataclasses.field(repr=False)  # (N,) s
    recorded: np.ndarray = dataclasses.field(repr=False)  # (N, 3)
    simulated: np.ndarray = dataclasses.field(repr=False)  # (N, 3)

    def summary(self) -> dict:
        """The numbers without the paths."""
        skip = ('time', 'recorded', 'simulated')
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sum(error ** 2, axis=1))))


def compare(flight: RecordedFlight, settings: SimSettings = NANOBENCH, setpoints: str = 'position',
            pose_latency: float = 0.035, seed: int = 0) -> Comparison:
    """Fly the streamed part of `flight` in simulation.

    `pose_latency` (s): age of the external pose when it arrives; the recorded onboard estimate is 25-40 ms
    behind Vicon. `setpoints`: 'position' as the flights were flown, or 'full_state' with velocity and
    acceleration differentiated from the recorded positions (0.1 s window).
    """
    if setpoints not in ('position', 'full_state'):
        raise ValueError(f'setpoints = {setpoints!r}; expected position or full_state')
    part = flight.streamed_part()
    time, target, recorded = flight.time[part], flight.setpoint[part], flight.position[part]
    velocity = _derivative(target, time)
    acceleration = _derivative(velocity, time)
    headings = rotation.yaw(flight.quaternion[part])
    heading = math.atan2(np.sin(headings).mean(), np.cos(headings).mean())
    crazyflie = _start(flight, part.start, settings, seed)

    poses: deque = deque()
    simulated = np.empty_like(recorded)
    start = crazyflie.time
    for k in range(len(time)):
        while crazyflie.time - start < time[k] - time[0] - 5e-4:
            crazyflie.step()
        truth = crazyflie.truth()
        simulated[k] = truth.position
        poses.append(truth)
        while poses and truth.stamp - poses[0].stamp >= pose_latency - 5e-4:
            late = poses.popleft()
            crazyflie.receive_extpos(late.position)
        crazyflie.plant.fixed_voltage = float(flight.voltage[part][k])
        if setpoints == 'position':
            crazyflie.set_position(target[k], heading)
        else:
            crazyflie.set_full_state(target[k], velocity[k], acceleration[k], rotation.from_yaw(heading),
                                     (0.0, 0.0, 0.0))
    error = simulated - recorded
    return Comparison(flight.name, setpoints, float(time[-1] - time[0]), _rms(error), _rms(recorded - target),
                      _rms(simulated - target), tuple(error.mean(axis=0).tolist()),
                      tuple(np.sqrt((error ** 2).mean(axis=0)).tolist()), time, recorded, simulated)


def _derivative(values: np.ndarray, time: np.ndarray, half: int = 5) -> np.ndarray:
    """Central difference over 2 * half samples, shorter at the ends."""
    i = np.arange(len(time))
    a, b = np.maximum(i - half, 0), np.minimum(i + half, len(time) - 1)
    return (values[b] - values[a]) / (time[b] - time[a])[:, None]


def _start(flight: RecordedFlight, k: int, settings: SimSettings, seed: int) -> SimulatedCrazyflie:
    """A simulated Crazyflie in mid-air in the recorded state of sample `k`."""
    floor = float(flight.position[:, 2].min())
    settings = dataclasses.replace(settings, plant=dataclasses.replace(settings.plant, floor=floor))
    crazyflie = SimulatedCrazyflie(settings, seed, (0.0, 0.0, floor))
    crazyflie.set_parameter('stabilizer.estimator', 2)
    plant, controller = crazyflie.plant, crazyflie.controller
    plant.fixed_voltage = float(flight.voltage[k])
    crazyflie.step(500)  # on the ground: checks, arming
    crazyflie.place(RigidBodyState(crazyflie.time, flight.position[k], flight.quaternion[k],
                                   flight.velocity[k], np.zeros(3)))
    plant.f1, plant.f2, plant.f3, plant.f4 = (plant.motor_thrust(flight.pwm[k, i], i) for i in range(4))
    # Integrals as the firmware sums them from take-off on, clamped at every sample.
    gains = controller.gains
    limit = np.array([gains.i_range_xy, gains.i_range_xy, gains.i_range_z])
    flying = np.flatnonzero(flight.pwm.mean(axis=1) > 10000.0)
    integral = np.zeros(3)
    for i in range(int(flying[0]) if len(flying) else k, k):
        step = (flight.setpoint[i] - flight.estimate[i]) * (flight.time[i + 1] - flight.time[i])
        integral = np.clip(integral + step, -limit, limit)
    controller.ix, controller.iy, controller.iz = integral.tolist()
    return crazyflie


def main(argv: list[str]) -> int:
    """Fly recorded setpoints in the simulator and compare the paths."""
    parser = argparse.ArgumentParser(prog='deqmpc compare-flights', description=main.__doc__)
    parser.add_argument('files', nargs='+', metavar='FILE', help='NanoBench flight CSV')
    parser.add_argument('--setpoints', choices=('position', 'full_state'), default='position',
                        help='how the setpoints are sent (default: position, as the flights were flown)')
    parser.add_argument('--pose-latency', type=float, default=0.035, metavar='S',
                        help='age of the external pose on arrival (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', action='store_true', help='print one JSON object a flight')
    args = parser.parse_args(argv)
    if not args.json:
        print('RMS in m: simulated against recorded path; each path against its setpoint.')
        print(f'{"flight":<30} {"s":>6} {"difference":>11} {"per axis x y z":>20} '
              f'{"recorded":>9} {"simulated":>10}')
    for path in args.files:
        try:
            result = compare(RecordedFlight.load(path), setpoints=args.setpoints,
                             pose_latency=args.pose_latency, seed=args.seed)
        except (OSError, ValueError) as error:
            print(f'compare-flights: {error}', file=sys.stderr)
            return 2
        if args.json:
            print(json.dumps(result.summary()))
        else:
            axes = ' '.join(f'{a:.3f}' for a in result.difference_axis)
            print(f'{result.name:<30} {result.duration:6.1f} {result.difference:11.3f} {axes:>20} '
                  f'{result.tracking_recorded:9.3f} {result.tracking_simulated:10.3f}')
    return 0
