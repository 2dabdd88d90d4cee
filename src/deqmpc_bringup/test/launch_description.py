"""One mode of the composition under launch_testing."""

import os
import tempfile
import unittest
from pathlib import Path

from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription, SetEnvironmentVariable
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_testing.actions import ReadyToTest

from deqmpc_bringup.composition import share_dir


def launched(mode, domain, **arguments):
    """LaunchDescription of `mode` on a DDS domain of its own, and `bag`, the path of what it records.

    SkipTest where the ament index does not know the packages: launch_ros starts nothing without it.
    """
    prefixes = os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)
    if not any((Path(p) / 'share' / 'deqmpc_bringup' / 'package.xml').is_file() for p in prefixes if p):
        raise unittest.SkipTest('deqmpc_bringup is not on AMENT_PREFIX_PATH: colcon build, then '
                                'source install/setup.bash')
    run_dir = Path(tempfile.mkdtemp(prefix='deqmpc_')) / 'run'
    file = share_dir() / 'launch' / f'{mode}.launch.py'
    return LaunchDescription([
        SetEnvironmentVariable('ROS_DOMAIN_ID', str(domain)),
        IncludeLaunchDescription(PythonLaunchDescriptionSource(str(file)),
                                 launch_arguments={**arguments, 'run_dir': str(run_dir)}.items()),
        ReadyToTest(),
    ]), {'bag': run_dir / 'bag'}
