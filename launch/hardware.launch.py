"""ros2 launch deqmpc_bringup hardware.launch.py [name:=value ...]: mode `hardware` of composition.yaml."""

from deqmpc_bringup.ros_launch import launch_description


def generate_launch_description():
    return launch_description('hardware')
