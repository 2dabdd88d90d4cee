"""A bag as a timed sequence of messages, with new stamps if wanted. ROS-free.

Restamping: a live node drops a pose that is older than a fraction of a second, and a recorded one is
days old. Every stamp is therefore moved by one offset plus, at another rate than 1, the stretch of
time: stamp' = due + (stamp - log_time), where `due` is the moment of publishing. So each message keeps
the age it had when it was recorded, and latencies measured on a replay contain the recorded transport.
At a rate other than 1 velocities no longer agree with the spacing of positions.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from deqmpc import interface
from flight_log.bag import TYPES, BagError, bag_info, deserialize, read_raw, serialize

# Message types whose first field is a std_msgs/Header: sec and nanosec stand at bytes 4 to 12.
_HEADER_FIRST = ('geometry_msgs/msg/PoseStamped', 'nav_msgs/msg/Odometry',
                 'trajectory_msgs/msg/MultiDOFJointTrajectory', 'diagnostic_msgs/msg/DiagnosticArray')
DEFAULT_TOPICS = (interface.POSE.name, interface.ODOM.name, interface.OBSTACLES.name)


def _shifted(sec: int, nanosec: int, shift: int) -> tuple[int, int]:
    return divmod(sec * 1_000_000_000 + nanosec + shift, 1_000_000_000)


def restamp(data: bytes, type_name: str, shift: int) -> bytes:
    """CDR bytes with every header stamp moved by `shift` ns. BagError on a type without known header,
    or where the moved stamp does not fit (before 1970, after 2038)."""
    try:
        if type_name in _HEADER_FIRST:
            order = '<' if data[1] else '>'
            stamp = _shifted(*struct.unpack_from(f'{order}iI', data, 4), shift)
            return data[:4] + struct.pack(f'{order}iI', *stamp) + data[12:]
        if type_name == interface.OBSTACLES.type:
            message = deserialize(data, type_name)
            for marker in message.markers:
                stamp = marker.header.stamp
                sec, nanosec = _shifted(stamp.sec, stamp.nanosec, shift)
                marker.header.stamp = TYPES.make('builtin_interfaces/msg/Time', sec=sec, nanosec=nanosec)
            return serialize(message, type_name)
    except struct.error as error:
        raise BagError(f'a {type_name} of {len(data)} bytes cannot be restamped by {shift} ns: '
                       f'{error}') from error
    raise BagError(f'cannot restamp {type_name}; expected one of '
                   f'{", ".join((*_HEADER_FIRST, interface.OBSTACLES.type))}')


def robot_in(path: str | Path, topics: Collection[str]) -> str:
    """The one robot whose topics a bag holds; of the others of a fleet it holds the odometry alone. BagError when there
    is none, or more than one."""
    known = {t.name for t in interface.RECORDED if not t.name.startswith('/')}
    of_robots = [name.split('/')[1:] for name in topics if name.count('/') == 2 and name.split('/')[2] in known]
    robots = sorted({robot for robot, topic in of_robots if topic != interface.ODOM.name}
                    or {robot for robot, _ in of_robots})
    if len(robots) != 1:
        raise BagError(f'{path}: expected the topics of one robot (/cf1/pose ...), found robots {robots} '
                       f'in topics {sorted(topics)}')
    return robots[0]


@dataclass(frozen=True)
class Track:
    """One topic of the bag that will be replayed."""

    source: str  # its name in the bag
    topic: interface.Topic


def select(path: str | Path, names: Collection[str], robot: str = '') -> list[Track]:
    """The rows of the topic table called `names` that the bag holds. `robot` in the bag, found when ''.

    BagError on a name that is not in the table, or when the bag has none of them.
    """
    rows = {t.name.lstrip('/'): t for t in interface.RECORDED}
    unknown = [n for n in names if n.lstrip('/') not in rows]
    if unknown:
        raise BagError(f'topic {unknown[0]!r} cannot be replayed; '
                       f'expected some of: {", ".join(sorted(rows))}')
    held = bag_info(path).topics
    robot = robot or robot_in(path, held)
    wanted = [rows[n.lstrip('/')] for n in names]
    tracks = [Track(t.resolve(robot), t) for t in wanted if held.get(t.resolve(robot)) == t.type]
    if not tracks:
        raise BagError(f'{path}: none of the topics {[t.resolve(robot) for t in wanted]}; '
                       f'it has {sorted(held)}')
    return tracks


def schedule(path: str | Path, tracks: Collection[Track],
             rate: float = 1.0) -> Iterator[tuple[float, interface.Topic, int, bytes]]:
    """(seconds after the start at which to publish, topic, log time in ns, bytes), in order."""
    topics = {t.source: t.topic for t in tracks}
    first: int | None = None
    for source, _, log_time, data in read_raw(path, topics):
        if first is None:
            first = log_time
        yield max(0.0, 1e-9 * (log_time - first) / rate), topics[source], log_time, data
