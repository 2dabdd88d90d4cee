"""For all tests: the stack's own environment, so that no test leaves the machine or files in /dev/shm."""

import os
from pathlib import Path

from deqmpc_bringup.composition import environment

os.environ.update(environment(dict(os.environ)))
os.environ.setdefault('ROS_DOMAIN_ID', '86')
os.environ.setdefault('DEQMPC_DATA', str(Path(__file__).resolve().parent.parent / 'shared' / 'data'))
