"""`deqmpc emergency-stop`: a key that cuts the motors of one robot or of all."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from typing import TextIO

from deqmpc import interface
from deqmpc_bringup.composition import CompositionError, environment

AGAIN = 0.2  # s after which a robot that has not answered is asked again
DISCOVERY = 1.0  # s in which the robots of a graph have found each other
POLL = 0.02  # s between two looks at the keyboard
EPILOG = '''\
Start it before the flight and keep its terminal in front: finding the robots takes up to some seconds, a key acts
at once. The motors stop and the drone falls; it is locked until it is switched off and on. To end a flight that is
under control, land instead (ros2 service call /cf1/land std_srvs/srv/Trigger).

exit status: 0 every robot confirmed, 1 one did not, 2 no robot found or wrong usage, 130 left without a stop
'''


def robots_in(services: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The robots that have the service `emergency`, from (name, types) of every service of the graph."""
    kind = interface.SERVICES['emergency']
    parts = [name.split('/') for name, types in services if kind in types]
    return sorted(p[1] for p in parts if len(p) == 3 and p[0] == '' and p[2] == 'emergency')


class EmergencyStop:
    """Clients of the emergency services. `robots`: those meant; empty means all, also those that come later."""

    def __init__(self, robots: Sequence[str] = ()):
        import rclpy  # not for --help
        from rclpy.node import Node

        from deqmpc_ros.messages import message_class
        self._rclpy, self._kind = rclpy, message_class(interface.SERVICES['emergency'])
        self._node = Node('emergency_stop')
        self._only, self._clients = tuple(robots), {}
        for name in robots:
            self._add(name)

    def _add(self, name):
        self._clients[name] = self._node.create_client(self._kind, f'/{name}/emergency')

    @property
    def ready(self) -> list[str]:
        """The robots that a key would stop now."""
        return [name for name, client in self._clients.items() if client.service_is_ready()]

    @property
    def missing(self) -> list[str]:
        """The robots that were named and are not there."""
        return [name for name in self._only if name not in self.ready]

    def look(self) -> None:
        """Let the graph be discovered for a moment."""
        self._rclpy.spin_once(self._node, timeout_sec=POLL)
        if not self._only:
            for name in robots_in(self._node.get_service_names_and_types()):
                if name not in self._clients:
                    self._add(name)

    def stop(self, timeout: float) -> dict[str, tuple[bool, str]]:
        """Ask every robot to cut its motors, again until it answers or `timeout` (s) is over: robot ->
        (confirmed, its words). Where all are meant, those that are found on the way too."""
        begin, asked, calls = time.monotonic(), -AGAIN, {}
        results: dict[str, tuple[bool, str]] = {}
        while (now := time.monotonic() - begin) < timeout:
            if now - asked >= AGAIN:
                asked = now
                for name in self._clients.keys() - results.keys():
                    calls.setdefault(name, []).append(self._clients[name].call_async(self._kind.Request()))
            self.look()
            for name, futures in calls.items():
                for answer in (f.result() for f in futures if f.done()):
                    took = 1e3 * (time.monotonic() - begin)
                    results.setdefault(name, (answer.success, f'{answer.message} (after {took:.0f} ms)'))
            if results and results.keys() == self._clients.keys() and (self._only or now > DISCOVERY):
                break
        silent = f'NO ANSWER within {timeout:g} s: TAKE THE DRONE OUT BY HAND'
        return {name: results.get(name, (False, silent)) for name in self._clients}

    def close(self) -> None:
        """End the node."""
        self._node.destroy_node()


@contextlib.contextmanager
def single_keys(stream: TextIO) -> Iterator[None]:
    """Deliver keys of a terminal one by one, without Enter; other streams stay as they are."""
    if not stream.isatty():
        yield
        return
    before = termios.tcgetattr(stream)
    try:
        tty.setcbreak(stream)
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSADRAIN, before)


def pressed(stream: TextIO) -> bool:
    """True once a key, or a line where `stream` is no terminal, has come. EOFError when none can come any more."""
    if not select.select([stream], [], [], 0.0)[0]:
        return False
    if not os.read(stream.fileno(), 1024):
        raise EOFError('standard input has ended, so no key can come; use --now')
    return True


def _say(line):
    print(line, flush=True)


def wait_for_key(stopper: EmergencyStop, stream: TextIO) -> None:
    """Return when a key is pressed; say which robots it would stop whenever that changes."""
    told = None
    while True:
        if pressed(stream):
            return
        stopper.look()
        state = (stopper.ready, stopper.missing)
        if state != told:
            told = state
            ready, missing = state
            _say((f'{", ".join(ready)}: press any key to CUT THE MOTORS' if ready else 'no robot found yet')
                 + (f' (not there: {", ".join(missing)})' if missing else '') + '; Ctrl-C leaves')


def main(argv: list[str]) -> int:
    """Cut the motors of one robot or of all when a key is pressed."""
    parser = argparse.ArgumentParser(prog='deqmpc emergency-stop', description=main.__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--robot', nargs='+', default=[], metavar='NAME', help='robots to stop (default all there are)')
    parser.add_argument('--now', action='store_true', help='do not wait for a key')
    parser.add_argument('--timeout', type=float, default=3.0, metavar='S',
                        help='find robots and wait for their answers so long after the key (default 3)')
    options = parser.parse_args(argv)
    if not options.timeout > 0.0:
        parser.error(f'--timeout {options.timeout}; expected s above 0')
    try:
        os.environ.update(environment(dict(os.environ)))
    except CompositionError as error:
        print(f'deqmpc emergency-stop: {error}', file=sys.stderr)
        return 2
    import rclpy
    rclpy.init()
    stopper = EmergencyStop(options.robot)
    try:
        return _run(stopper, options)
    except KeyboardInterrupt:
        _say('left; nothing was stopped')
        return 130
    finally:
        stopper.close()
        rclpy.try_shutdown()


def _run(stopper, options) -> int:
    if not options.now:
        try:
            with single_keys(sys.stdin):
                wait_for_key(stopper, sys.stdin)
        except EOFError as error:
            print(f'deqmpc emergency-stop: {error}', file=sys.stderr)
            return 2
    results = stopper.stop(options.timeout)
    for name, (_, words) in sorted(results.items()):
        _say(f'{name}: {words}')
    if not results:
        print('deqmpc emergency-stop: no robot found, nothing was stopped; is the flight on this ROS_DOMAIN_ID?',
              file=sys.stderr)
        return 2
    return 0 if all(confirmed for confirmed, _ in results.values()) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
