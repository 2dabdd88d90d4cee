"""Recorded poses: CSV files of motion-capture systems and flights, and rosbag2 bags, checked on reading."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.typesys import Stores, get_typestore

from deqmpc import interface

# Accepted names of the position columns; time is `t` (s), the quaternion qx, qy, qz, qw.
_POSITIONS = (('x', 'y', 'z'), ('px', 'py', 'pz'))
_QUATERNION = ('qx', 'qy', 'qz', 'qw')
_MAX_SKIPPED = 0.10  # share of rows: with more, the file is refused rather than repaired
_NORM_TOLERANCE = 0.05  # of a quaternion


class RecordingError(ValueError):
    """A recording that cannot be used; names the file, the place in it and what was expected."""


@dataclass(frozen=True)
class Recording:
    """Poses of one body in the order they were recorded, z-up."""

    name: str  # where from
    time: np.ndarray  # (N,) s, strictly increasing, as recorded
    position: np.ndarray  # (N, 3) m
    quaternion: np.ndarray  # (N, 4) x y z w, unit norm
    notes: tuple[str, ...] = ()  # what was left out, in words

    @property
    def duration(self) -> float:
        """From the first pose to the last (s)."""
        return float(self.time[-1] - self.time[0])

    def cut(self, start: float, duration: float) -> Recording:
        """The poses from `start` s after the first on, for `duration` s (0: to the end).

        RecordingError when fewer than two are left.
        """
        elapsed = self.time - self.time[0]
        edge = 1e-6  # s, more than the rounding of Unix times
        keep = elapsed >= start - edge
        if duration > 0.0:
            keep &= elapsed <= start + duration + edge
        if np.count_nonzero(keep) < 2:
            raise RecordingError(f'{self.name}: nothing to play from {start} s on' + (
                f' for {duration} s' if duration else '') + f'; it is {self.duration:.2f} s long')
        return Recording(self.name, self.time[keep], self.position[keep], self.quaternion[keep], self.notes)


def read_recording(path: str | Path, robot: str = 'cf1') -> Recording:
    """A CSV file, an .mcap or .db3 file or a bag folder with /<robot>/pose. RecordingError when unusable."""
    path = Path(path)
    if not path.exists():
        raise RecordingError(f'{path}: no such file or folder')
    if path.suffix == '.csv':
        return read_csv(path)
    if path.is_dir() or path.suffix in ('.mcap', '.db3'):
        return read_bag(path, robot)
    raise RecordingError(f'{path}: expected a .csv, .mcap or .db3 file, or a rosbag2 folder')


def read_csv(path: str | Path) -> Recording:
    """CSV with a header: t (s), x y z or px py pz (m), qx qy qz qw; other columns are not read."""
    path = Path(path)
    try:
        with path.open(newline='') as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(path, header)
            rows, places = [], []
            for row in reader:
                if row:
                    rows.append([_number(row, i) for i in columns])
                    places.append(f'line {reader.line_num}')
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordingError(f'{path}: cannot be read as CSV: {error}') from None
    return _checked(str(path), np.array(rows, dtype=float).reshape(-1, 8), places)


def read_bag(path: str | Path, robot: str) -> Recording:
    """/<robot>/pose of a rosbag2 bag, at its header stamps (the exposure times)."""
    path = Path(path)
    topic = interface.POSE.resolve(robot)
    rows, places = [], []
    try:
        with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
            poses = [c for c in reader.connections if c.msgtype == interface.POSE.type]
            connections = [c for c in poses if c.topic == topic]
            if not connections:
                raise RecordingError(f'{path}: no {interface.POSE.type} on {topic}; poses are on: '
                                     f'{", ".join(sorted(c.topic for c in poses)) or "no topic"}')
            for connection, _, raw in reader.messages(connections):
                stamp, position, quaternion = interface.read_pose(reader.deserialize(raw, connection.msgtype))
                rows.append([stamp, *position, *quaternion])
                places.append(f'message {len(rows)}')
    except (AnyReaderError, OSError) as error:
        raise RecordingError(f'{path}: cannot be read as a bag: {error}') from None
    return _checked(str(path), np.array(rows, dtype=float).reshape(-1, 8), places)


def _columns(path: Path, header: list[str]) -> list[int]:
    position = next((names for names in _POSITIONS if set(names) <= set(header)), _POSITIONS[0])
    wanted = ('t', *position, *_QUATERNION)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise RecordingError(f'{path}: no column {", ".join(missing)}; expected t, x y z or px py pz, and '
                             f'qx qy qz qw, got {", ".join(header[:12]) or "an empty file"}')
    return [header.index(name) for name in wanted]


def _number(row: list[str], column: int) -> float:
    """The number in the cell, NaN where there is none."""
    try:
        return float(row[column])
    except (ValueError, IndexError):
        return float('nan')


def _checked(name: str, rows: np.ndarray, places: list[str]) -> Recording:
    """rows (N, 8): t, position, quaternion -> Recording without the rows that are no poses."""
    finite = np.isfinite(rows).all(axis=1)
    norm = np.linalg.norm(np.where(finite[:, None], rows[:, 4:], 1.0), axis=1)
    unit = finite & (np.abs(norm - 1.0) < _NORM_TOLERANCE)
    time = np.where(finite, rows[:, 0], -np.inf)
    latest = np.concatenate([[-np.inf], np.maximum.accumulate(np.where(unit, time, -np.inf))[:-1]])
    later = unit & (time > latest)
    notes = []
    for bad, why in ((~finite, 'not a number'), (finite & ~unit, 'a quaternion that is not of unit norm'),
                     (unit & ~later, 'a time that is not later than before')):
        if bad.any():
            first = places[int(np.argmax(bad))]
            notes.append(f'{np.count_nonzero(bad)} of {len(rows)} rows skipped: {why}, first at {first}')
    kept = np.count_nonzero(later)
    if kept < 2:
        raise RecordingError(f'{name}: {kept} usable poses of {len(rows)}' + ''.join(f'; {n}' for n in notes))
    if kept < (1.0 - _MAX_SKIPPED) * len(rows):
        raise RecordingError(f'{name}: too much of it is no recording: ' + '; '.join(notes))
    rows = rows[later]
    quaternion = rows[:, 4:] / norm[later, None]
    return Recording(name, rows[:, 0], rows[:, 1:4], quaternion, tuple(notes))
