"""The command `deqmpc view`: a recorded bag or a running graph in a rerun viewer, on this machine only.

rerun's SDK (`spawn`, `serve_grpc`) listens on 0.0.0.0, where the whole laboratory's network could read and write
the recording. Here the viewer's program is started with `--bind 127.0.0.1`, and what it listens on is then read
from the kernel (/proc/net): a viewer that is heard on another address is stopped with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

LOOPBACK = '127.0.0.1'
PORT, WEB_PORT = 9876, 9090  # rerun's own; another free one where they are taken
START = 30.0  # s that the viewer may take to listen
LIVE_PATH = 60.0  # s of flown path of a running flight; of a bag all is shown
NICE = 10  # a viewer on the flying machine takes what the flight leaves
INSTALL = "pip install 'rerun-sdk~=0.41.0'"
_LISTEN = '0A'  # TCP state in /proc/net/tcp


class ViewError(RuntimeError):
    """The viewer cannot be started; the message says why."""


# --- the viewer's process -----------------------------------------------------------------------

def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which the process `pid` listens, from /proc."""
    inodes = set()
    for descriptor in Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(descriptor))
    rows = [line.split() for name in ('tcp', 'tcp6') for line in Path('/proc/net', name).read_text().splitlines()[1:]]
    return {_endpoint(row[1]) for row in rows if row[3] == _LISTEN and f'socket:[{row[9]}]' in inodes}


def _endpoint(text: str) -> tuple[str, int]:
    """'0100007F:2694' -> ('127.0.0.1', 9876). The kernel prints addresses as words of the machine's byte order."""
    address, port = text.split(':')
    words = [address[i:i + 8] for i in range(0, len(address), 8)]
    packed = b''.join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed)), int(port, 16)


def free_port(wanted: int) -> int:
    """`wanted`, or another port of the loopback where that one is taken."""
    for port in (wanted, 0):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind((LOOPBACK, port))
            return s.getsockname()[1]
    raise ViewError(f'no free port on {LOOPBACK}')


class Viewer:
    """rerun's program, listening on loopback alone.

    web: serve the web viewer instead of opening a window. A context manager, whose end stops the program. Raises
    ViewError when it ends or is not heard within `START` s, or is heard on another address than loopback's.
    """

    def __init__(self, web: bool):
        import rerun_cli
        self.port = free_port(PORT)
        self.web_port = free_port(WEB_PORT) if web else None
        command = [str(Path(rerun_cli.__file__).parent / 'rerun'), '--bind', LOOPBACK, '--port', str(self.port)]
        command += ['--serve-web', '--web-viewer-port', str(self.web_port)] if web else [
            '--expect-data-soon', '--hide-welcome-screen']
        # A session of its own: Ctrl-C comes here, and the viewer is stopped when what it shows is complete.
        self.process = subprocess.Popen(command, env={'RUST_LOG': 'warn', **os.environ}, start_new_session=True)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        """Until it listens on all its ports."""
        ports = {self.port, self.web_port} - {None}
        until = time.monotonic() + START
        while True:
            if self.process.poll() is not None:
                raise ViewError(f'the viewer ended at once with exit status {self.process.returncode}')
            heard = set()
            with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):  # it ends just now
                heard = listening(self.process.pid)
            exposed = sorted(f'{a}:{p}' for a, p in heard if not ipaddress.ip_address(a).is_loopback)
            if exposed:
                raise ViewError(f'the viewer listens on {exposed[0]}; expected {LOOPBACK} alone')
            if ports <= {p for _, p in heard}:
                return
            if time.monotonic() > until:
                raise ViewError(f'the viewer does not listen on {LOOPBACK}, ports {sorted(ports)}, after {START:g} s')
            time.sleep(0.05)

    @property
    def uri(self) -> str:
        """Where recordings are sent."""
        return f'rerun+http://{LOOPBACK}:{self.port}/proxy'

    @property
    def page(self) -> str:
        """The address for a browser."""
        return f'http://{LOOPBACK}:{self.web_port}?url={quote(self.uri, safe="")}'

    def closed(self) -> bool:
        """True when its window was closed."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """End the program."""
        self.process.terminate()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


# --- the command --------------------------------------------------------------------------------

def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='deqmpc view', description=main.__doc__)
    parser.add_argument('bag', nargs='?', metavar='BAG',
                        help='bag folder, .mcap or .db3, torn ones too; without it the running ROS graph is shown')
    parser.add_argument('--robot', nargs='+', default=[], metavar='NAME',
                        help='robots to show (default: all in the bag, or all that appear in the graph)')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--save', metavar='FILE.rrd', help='write a rerun recording instead of opening a viewer')
    where.add_argument('--serve', action='store_true',
                       help=f'serve the web viewer on {LOOPBACK} and print its address; no browser is started')
    options = parser.parse_args(argv)
    for robot in options.robot:
        if not re.fullmatch(r'[A-Za-z_]\w*', robot):
            parser.error(f'--robot {robot!r}; expected a name such as cf1')
    if options.save and (not options.save.endswith('.rrd') or Path(options.save).exists()):
        parser.error(f'--save {options.save}; expected a new file that ends in .rrd (nothing is overwritten)')
    return options


def main(argv: list[str] | None = None) -> int:
    """Show a bag, or the running flight, in a 3-D viewer: path, plan, obstacles, guard, battery, solver."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        import rerun  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'error: the viewer needs rerun ({error}): {INSTALL}', file=sys.stderr)
        return 2
    try:
        return _view(options)
    except (ViewError, ValueError, OSError) as error:  # BagError and CompositionError are ValueErrors
        print(f'error: {error}', file=sys.stderr)
        return 1


def _view(options: argparse.Namespace) -> int:
    import rerun as rr

    from flight_log.viewing import Scene
    show = _bag if options.bag else _live
    recording = rr.RecordingStream('deqmpc_view', recording_id=f'{Path(options.bag or "live").name}-{time.time_ns()}')
    scene = Scene(recording, *(() if options.bag else (LIVE_PATH, True)))
    if options.save:
        recording.save(options.save)
        with _disconnecting(recording):
            return show(options, scene, None)
    with _viewer(options.serve) as viewer, _disconnecting(recording):
        recording.connect_grpc(viewer.uri)
        status = show(options, scene, viewer)
        if viewer.process.poll():
            raise ViewError(f'the viewer ended with exit status {viewer.process.returncode}')
        return status


@contextlib.contextmanager
def _disconnecting(recording):
    """At the end everything is written, while the viewer can still take it."""
    try:
        yield
    finally:
        recording.disconnect()


def _viewer(serve: bool) -> Viewer:
    """The window where there is a display, else the web viewer."""
    display = os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')
    if not serve and not display:
        print('no display (DISPLAY and WAYLAND_DISPLAY are not set): serving the web viewer', file=sys.stderr)
    viewer = Viewer(web=serve or not display)
    if viewer.web_port:
        print(f'viewer: {viewer.page}\n(this machine only; from another: ssh -L {viewer.web_port}:{LOOPBACK}:'
              f'{viewer.web_port} -L {viewer.port}:{LOOPBACK}:{viewer.port} HOST; Ctrl-C ends it)', flush=True)
    return viewer


def _flush(recording, viewer: Viewer | None) -> None:
    """Everything written so far arrives, or a ViewError; a window that was closed takes nothing any more."""
    while viewer is None or not viewer.closed():
        try:
            return recording.flush(timeout_sec=1.0)
        except RuntimeError as error:  # not within that second, or never
            if viewer is None:
                raise ViewError(f'the recording cannot be written: {error}') from error
            time.sleep(0.1)


def _bag(options: argparse.Namespace, scene, viewer: Viewer | None) -> int:
    from flight_log.viewing import show_bag
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    shown = show_bag(scene, options.bag, options.robot)
    _flush(scene.recording, viewer)
    print(f'{options.bag}: {", ".join(shown.robots)}; {shown.messages} messages, {shown.seconds:.1f} s'
          + (', torn: shown up to the tear' if shown.torn else '')
          + (f', {shown.unreadable} unreadable messages left out' if shown.unreadable else ''), flush=True)
    while viewer and not viewer.closed() and not stopped.wait(0.2):
        continue
    return 0


def _live(options: argparse.Namespace, scene, viewer: Viewer | None) -> int:
    _join_network()
    try:
        from deqmpc_ros import node as ros
        from flight_log.view_node import LiveView
    except ModuleNotFoundError as error:
        print(f'error: without a BAG the running ROS graph is shown, and that needs ROS 2 ({error})', file=sys.stderr)
        return 2
    os.nice(NICE)
    closed = viewer.closed if viewer else lambda: False
    status = ros.run(lambda: LiveView(scene, options.robot, closed), [])
    _flush(scene.recording, viewer)
    return status


def _join_network() -> None:
    """Hear and be heard where the flight is (DEQMPC_NETWORK), which deqmpc_bringup knows where it is installed;
    without it the environment stays the user's."""
    try:
        from deqmpc_bringup.composition import environment
    except ModuleNotFoundError:
        return
    os.environ.update(environment(dict(os.environ)))


if __name__ == '__main__':
    sys.exit(main())
