"""The composition for `ros2 launch`: one LaunchDescription per mode, from the same rows as `deqmpc fly`."""

from __future__ import annotations

import os

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from deqmpc_bringup.composition import Row, arguments, compose, environment, read_table


def launch_description(mode: str) -> LaunchDescription:
    """Arguments of `mode`, the stack's environment, and one Node a row. A node's exit ends the launch, unless its row
    says that it is optional, or that it ends the flight and others of that kind still run."""
    table = read_table()
    declared = arguments(mode, table)

    def nodes(context):
        given = {a.name: LaunchConfiguration(a.name).perform(context) for a in declared}
        # An argument left at its default is not `given`: its default may refer to $(share).
        given = {a.name: given[a.name] for a in declared if given[a.name] != a.default}
        rows = compose(mode, given, table)
        running = [row for row in rows if row.ends]
        return [Node(package=row.package, executable=row.executable, name=row.name, namespace=row.namespace,
                     ros_arguments=list(row.ros_arguments), output='screen', on_exit=_on_exit(row, running))
                for row in rows]

    added = {k: v for k, v in environment(dict(os.environ)).items() if os.environ.get(k) != v}
    return LaunchDescription([
        *(DeclareLaunchArgument(a.name, default_value=a.default, description=a.help,
                                **({'choices': list(a.choices)} if a.choices else {})) for a in declared),
        *(SetEnvironmentVariable(k, v) for k, v in added.items()),
        OpaqueFunction(function=nodes),
    ])


def _on_exit(row: Row, running: list[Row]):
    """What follows on the exit of `row`; `running`: the rows that end the flight and have not yet exited."""
    if row.optional:
        return None
    if not row.ends:
        return Shutdown(reason=f'{row.name} exited')

    def finished(event, _context):
        running.remove(row)
        if event.returncode == 0 and running:
            return None
        return Shutdown(reason=f'{row.name} exited')
    return finished
