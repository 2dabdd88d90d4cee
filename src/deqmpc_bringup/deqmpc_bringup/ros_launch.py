"""The composition for `ros2 launch`: one LaunchDescription per mode, from the same rows as `deqmpc fly`."""

from __future__ import annotations

import os

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from deqmpc_bringup.composition import arguments, compose, environment, read_table


def launch_description(mode: str) -> LaunchDescription:
    """Arguments of `mode`, the stack's environment, and one Node a row. A node's exit ends the launch, unless its row
    says that it is optional."""
    table = read_table()
    declared = arguments(mode, table)

    def nodes(context):
        given = {a.name: LaunchConfiguration(a.name).perform(context) for a in declared}
        # An argument left at its default is not `given`: its default may refer to $(share).
        given = {a.name: given[a.name] for a in declared if given[a.name] != a.default}
        return [Node(package=row.package, executable=row.executable, name=row.name, namespace=row.namespace,
                     ros_arguments=list(row.ros_arguments), output='screen',
                     on_exit=None if row.optional else Shutdown(reason=f'{row.name} exited'))
                for row in compose(mode, given, table)]

    added = {k: v for k, v in environment(dict(os.environ)).items() if os.environ.get(k) != v}
    return LaunchDescription([
        *(DeclareLaunchArgument(a.name, default_value=a.default, description=a.help,
                                **({'choices': list(a.choices)} if a.choices else {})) for a in declared),
        *(SetEnvironmentVariable(k, v) for k, v in added.items()),
        OpaqueFunction(function=nodes),
    ])
