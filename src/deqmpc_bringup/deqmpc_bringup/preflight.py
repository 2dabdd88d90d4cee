"""`deqmpc preflight`: the checks that arming and take-off ask for, as the running crazyflie_interface finds them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from dataclasses import dataclass

from deqmpc import interface
from deqmpc_bringup.composition import CompositionError, environment

TABLE_WAIT = 2.0  # s from a request to its table on /diagnostics
EPILOG = f'''\
The checks: {', '.join(interface.PREFLIGHT_CHECKS)}.
They are waived by name in the launch argument waive, as in: deqmpc fly hardware waive:=policy,plan

exit status: 0 ready for take-off, 1 a check failed, 2 no answer or wrong usage
'''


class NoAnswer(RuntimeError):
    """The robot's interface node did not answer in time."""


@dataclass(frozen=True)
class Row:
    """One check as /diagnostics carries it."""

    name: str
    passed: bool
    waived: bool
    value: str
    limit: str
    fix: str

    @property
    def result(self) -> str:
        """pass, FAIL or waived."""
        return 'pass' if self.passed else 'waived' if self.waived else 'FAIL'


def rows_of(statuses: list[interface.Diagnostic], robot: str) -> list[Row]:
    """The preflight table of `robot` among `statuses`; empty when it is not there."""
    prefix = f'{robot}/preflight/'
    return [Row(s.name.removeprefix(prefix), s.values['passed'] == 'True', s.values['waived'] == 'True',
                s.values['value'], s.values['limit'], s.values['fix'])
            for s in statuses if s.name.startswith(prefix)]


def ready(rows: list[Row]) -> bool:
    """True when no check stands against take-off."""
    return all(r.result != 'FAIL' for r in rows)


def ask(robot: str, timeout: float) -> list[Row]:
    """Have the preflight of `robot` run now; its table. NoAnswer after `timeout` (s)."""
    import rclpy  # not for --help
    from rclpy.node import Node

    from deqmpc_ros.messages import message_class
    from deqmpc_ros.node import subscription

    node = Node('preflight_command', namespace=robot)
    try:
        found: list[list[Row]] = []
        subscription(node, interface.DIAGNOSTICS, robot, lambda message: found.append(
            rows_of(interface.read_diagnostics(message), robot)))
        kind = message_class(interface.SERVICES['preflight'])
        client = node.create_client(kind, 'preflight')
        end, again = time.monotonic() + timeout, 0.0
        answer = None
        while time.monotonic() < end:
            if client.service_is_ready() and time.monotonic() >= again:
                found.clear()
                answer, again = client.call_async(kind.Request()), time.monotonic() + TABLE_WAIT
            rclpy.spin_once(node, timeout_sec=0.05)
            tables = [rows for rows in found if rows]
            if answer is not None and answer.done() and tables:
                return tables[-1]
    finally:
        node.destroy_node()
    raise NoAnswer(f'{robot}: no {"table from" if answer else "service"} /{robot}/preflight within {timeout:g} s; is '
                   f'the flight started (deqmpc fly), for this robot, on ROS_DOMAIN_ID='
                   f'{os.environ.get("ROS_DOMAIN_ID", "0")}?')


def table(robot: str, rows: list[Row]) -> str:
    """The table as text; under each check that did not pass, what to do."""
    failed = sum(r.result == 'FAIL' for r in rows)
    waived = sum(r.result == 'waived' for r in rows)
    lines = [f'{robot}: {"ready" if not failed else f"NOT READY, {failed} of {len(rows)} checks failed"}'
             + (f', {waived} waived by the operator' if waived else '')]
    width = [max(len(getattr(r, column)) for r in rows) for column in ('name', 'value')]
    for r in rows:
        lines.append(f'  {r.result:<6}  {r.name:<{width[0]}}  {r.value:<{width[1]}}  {r.limit}')
        if not r.passed:
            lines.append(f'          -> {r.fix}')
    return '\n'.join(lines)


def main(argv: list[str]) -> int:
    """Run the preflight of a started flight: one table of pass or fail with value, limit and what to do."""
    parser = argparse.ArgumentParser(prog='deqmpc preflight', description=main.__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--robot', nargs='+', default=['cf1'], metavar='NAME', help='robots to ask (default cf1)')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--timeout', type=float, default=10.0, metavar='S',
                        help='wait so long for the answer of a robot (default 10)')
    options = parser.parse_args(argv)
    for robot in options.robot:
        if not re.fullmatch(r'[A-Za-z_]\w*', robot):
            parser.error(f'--robot {robot!r}; expected a name such as cf1')
    try:
        os.environ.update(environment(dict(os.environ)))
    except CompositionError as error:
        print(f'deqmpc preflight: {error}', file=sys.stderr)
        return 2
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        tables = {robot: ask(robot, options.timeout) for robot in options.robot}
    except NoAnswer as error:
        print(f'deqmpc preflight: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()
    if options.json:
        print(json.dumps({robot: {'ready': ready(rows), 'checks': [dataclasses.asdict(r) for r in rows]}
                          for robot, rows in tables.items()}, indent=2))
    else:
        print('\n'.join(table(robot, rows) for robot, rows in tables.items()))
    return 0 if all(map(ready, tables.values())) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
