"""`deqmpc import-flight CSV [BAG]`: a flight recorded by other means as a bag with this stack's topics.

Read is a CSV file with a header. Needed are `t` (s) and a pose: `px py pz` or `x y z` (m, world), `qx qy qz qw`.
Taken where they are there:
  vx vy vz                        m/s, world: odometry; without them the centred difference of the positions
  wx wy wz, or imu_gyro_x/y/z     rad/s, or deg/s as cflib logs it, body: rates; else zero
  sp_ctrltarget_x/y/z             m: the setpoints that the controller had
  pwr_pm_vbat, or vbat            V: /cf1/status at 10 Hz
That covers logs of cflib and Crazyswarm2 with mocap columns, and the NanoBench data set (Ullah and Baca 2026). What is
not in the file is not made up: there are no phases, plans or spheres, so the flight is judged open loop.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Plan, RigidBodyState
from flight_log.bag import TYPES, BagError, BagWriter

POSITIONS = (('px', 'py', 'pz'), ('x', 'y', 'z'))
QUATERNION = ('qx', 'qy', 'qz', 'qw')
VELOCITY = ('vx', 'vy', 'vz')
RATES = (('wx', 'wy', 'wz'), ('imu_gyro_x', 'imu_gyro_y', 'imu_gyro_z'))  # rad/s; deg/s
SETPOINT = ('sp_ctrltarget_x', 'sp_ctrltarget_y', 'sp_ctrltarget_z')
BATTERY = ('pwr_pm_vbat', 'vbat')
STATUS_PERIOD = 0.1  # s


@dataclass(frozen=True)
class Columns:
    """What a CSV file holds, N samples; None where it has no such columns."""

    t: np.ndarray  # (N,) s, increasing
    position: np.ndarray  # (N, 3) m
    quaternion: np.ndarray  # (N, 4) x y z w, unit
    velocity: np.ndarray  # (N, 3) m/s, world
    rates: np.ndarray  # (N, 3) rad/s, body
    setpoint: np.ndarray | None  # (N, 3) m
    battery: np.ndarray | None  # (N,) V


def read(path: Path) -> Columns:
    """The columns of a CSV file. BagError names the file, and the column or row that is missing or wrong."""
    try:
        with path.open(newline='') as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            body = [row for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BagError(f'{path}: cannot be read as CSV: {error}') from error

    def found(*choices):
        return next((names for names in choices if all(n in header for n in names)), None)
    position = found(*POSITIONS)
    if 't' not in header or position is None or found(QUATERNION) is None:
        raise BagError(f'{path}: columns {", ".join(header[:12])}...; expected t, px py pz (or x y z) and qx qy qz qw')

    def values(names):
        at = [header.index(n) for n in names]
        made = np.empty((len(body), len(at)))
        for line, row in enumerate(body, start=2):
            try:
                made[line - 2] = [float(row[i]) for i in at]
            except (ValueError, IndexError):
                raise BagError(f'{path}, line {line}: expected numbers in {", ".join(names)}') from None
        return made
    t, p, q = values(('t',))[:, 0], values(position), values(QUATERNION)
    norm = np.linalg.norm(q, axis=1)
    for bad, what in ((~np.isfinite(np.column_stack([t, p, q])).all(axis=1), 'time and pose must be finite'),
                      (np.abs(norm - 1.0) > 0.05, 'the quaternion must have norm 1'),
                      (np.diff(t, prepend=-np.inf) <= 0, 't must increase')):
        if bad.any():
            raise BagError(f'{path}, line {int(np.argmax(bad)) + 2}: {what}')
    if len(t) < 2:
        raise BagError(f'{path}: {len(t)} samples; expected at least 2')
    velocity = values(VELOCITY) if found(VELOCITY) else np.gradient(p, t, axis=0)
    rates, degrees = (found(names) for names in RATES)
    turning = (values(rates) if rates else np.deg2rad(values(degrees)) if degrees else np.zeros_like(p))
    battery = found(*((name,) for name in BATTERY))
    return Columns(t, p, q / norm[:, None], velocity, turning, values(SETPOINT) if found(SETPOINT) else None,
                   values(battery)[:, 0] if battery else None)


def convert(source: Path, bag: Path, robot: str = 'cf1') -> int:
    """Write the flight to a new bag; how many messages. BagError where the file or the bag cannot be used."""
    c = read(source)
    with BagWriter(bag, {'mode': 'imported', 'robot': robot, 'source': source.name}) as writer:
        told = -math.inf
        for i, t in enumerate(c.t):
            pose = interface.pose_message(TYPES, t, c.position[i], c.quaternion[i])
            writer.write_message(interface.POSE, robot, t, pose)
            state = RigidBodyState(t, c.position[i], c.quaternion[i], c.velocity[i], c.rates[i])
            if np.isfinite(c.velocity[i]).all() and np.isfinite(c.rates[i]).all():
                writer.write_message(interface.ODOM, robot, t, interface.odometry_message(TYPES, state, robot))
            if c.setpoint is not None and np.isfinite(c.setpoint[i]).all():
                writer.write_message(interface.SETPOINT, robot, t, interface.plan_message(
                    TYPES, _setpoint(t, c.setpoint[i], c.quaternion[i]), robot))
            if c.battery is not None and t - told >= STATUS_PERIOD - 1e-6:
                told = t
                writer.write_message(interface.STATUS, robot, t, interface.diagnostics_message(
                    TYPES, t, f'{robot}/flight', interface.OK, 'imported', {'battery_v': float(c.battery[i])},
                    hardware_id=robot))
        return writer.messages


def _setpoint(t: float, position: np.ndarray, quaternion: np.ndarray) -> Plan:
    """A position setpoint with the heading that was flown."""
    still = np.zeros((1, 3))
    level = rotation.from_yaw(rotation.yaw(quaternion))[None]
    return Plan(t, np.zeros(1), position[None], level, still, still, still)


def main(argv: list[str] | None = None) -> int:
    """Write a flight recorded by other means (CSV) as a bag."""
    parser = argparse.ArgumentParser(prog='deqmpc import-flight', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('csv', type=Path, metavar='CSV')
    parser.add_argument('bag', type=Path, nargs='?', metavar='BAG', help='new folder (default: the name of the CSV)')
    parser.add_argument('--robot', default='cf1')
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    bag = options.bag or Path(options.csv.stem)
    try:
        count = convert(options.csv, bag, options.robot)
    except BagError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{bag}: {count} messages')
    return 0


if __name__ == '__main__':
    sys.exit(main())
