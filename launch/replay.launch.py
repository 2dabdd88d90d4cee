"""ros2 launch deqmpc_bringup replay.launch.py [name:=value ...]: mode `replay` of composition.yaml."""

from deqmpc_bringup.ros_launch import launch_description


def generate_launch_description():
    return launch_description('replay')
