"""ros2 launch deqmpc_bringup stream.launch.py [name:=value ...]: mode `stream` of composition.yaml."""

from deqmpc_bringup.ros_launch import launch_description


def generate_launch_description():
    return launch_description('stream')
