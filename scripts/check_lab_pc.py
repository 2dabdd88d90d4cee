"""python scripts/check_lab_pc.py /opt/ros/jazzy: whether Python finds ROS 2 from apt, and what flies beside it.

Prints one line a check; exit status 0 when all hold, 1 when one does not, 2 on wrong usage.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

FROM_ROS = ('rclpy', 'geometry_msgs', 'nav_msgs', 'trajectory_msgs', 'visualization_msgs', 'diagnostic_msgs',
            'std_srvs')
FROM_PIP = ('torch', 'safetensors', 'yaml', 'cflib', 'natnet', 'rosbags.rosbag2', 'mcap', 'usb')
OURS = ('deqmpc', 'deqmpc_ros', 'mocap_bridge', 'crazyflie_interface', 'deqmpc_controller', 'sim_env', 'flight_log',
        'deqmpc_bringup')


def location(name: str) -> tuple[str, str]:
    """(file of the module, '') or ('', why it cannot be imported)."""
    try:
        file = importlib.import_module(name).__file__
        return (file, '') if file else ('', 'only a folder without code is found')
    except Exception as error:  # an extension built for another NumPy raises what it likes
        return '', f'{type(error).__name__}: {error}'


def checks(ros: Path) -> list[tuple[str, bool, str]]:
    """(what, whether it holds, how it is)."""
    made = []
    for name in FROM_ROS:
        file, error = location(name)
        made.append((f'{name} comes from {ros}', bool(file) and Path(file).is_relative_to(ros), file or error))
    for name in (*FROM_PIP, *OURS):
        file, error = location(name)
        made.append((f'{name} can be imported', bool(file), file or error))
    wheels = sorted({d.metadata['Name'] for d in importlib.metadata.distributions()
                     if (d.metadata['Name'] or '').startswith('ros-')})
    made.append(('no ros-* wheel from PyPI', not wheels, ', '.join(wheels) or 'none'))
    numpy = importlib.metadata.version('numpy')
    made.append(('NumPy 1, as apt built ROS 2 with', numpy.startswith('1.'), numpy))
    return [*made, _message()]


def _message() -> tuple[str, bool, str]:
    """A message with a NumPy array survives its serialisation."""
    try:
        from nav_msgs.msg import Odometry
        from rclpy.serialization import deserialize_message, serialize_message
        sent = Odometry()
        sent.pose.covariance[7] = 1.5
        got = deserialize_message(serialize_message(sent), Odometry).pose.covariance[7]
    except Exception as error:  # as above
        return 'Odometry survives serialisation', False, f'{type(error).__name__}: {error}'
    return 'Odometry survives serialisation', bool(got == 1.5), f'{got}'


def main(argv: list[str]) -> int:
    """Check and print."""
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    results = checks(Path(argv[0]))
    for what, holds, how in results:
        print(f'{"ok  " if holds else "FAIL"} {what}: {how}')
    return 0 if all(holds for _, holds, _ in results) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
