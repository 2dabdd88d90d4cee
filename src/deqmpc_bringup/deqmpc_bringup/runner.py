"""Starts rows of the composition as processes, watches them, and ends them without leaving any behind.

Each process has a session of its own, so that a Ctrl-C reaches it through the runner alone, and the
kernel's parent-death signal, so that it gets SIGTERM even when the runner is killed. Its output goes to
a file, not a pipe: a node that lands the drone must not fail on a broken pipe. The runner copies the
files to its own output, each line with the node's name before it.

Ending is SIGTERM to all, again after `patience` (landing takes its time; a second one cuts it short), then
SIGKILL. Not SIGINT: a Python that is still importing answers that with a traceback.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from deqmpc_bringup.composition import CompositionError, Row

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def command(row: Row) -> list[str]:
    """The argument vector of a row: the executable beside this Python (pip), or in the ament prefix
    (colcon). CompositionError when neither has it."""
    places = [Path(sys.executable).parent / row.executable]
    places += [Path(p) / 'lib' / row.package / row.executable
               for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    for place in places:
        if place.is_file():
            return [str(place), '--ros-args', '-r', f'__node:={row.name}', '-r', f'__ns:={row.namespace}',
                    *row.ros_arguments]
    raise CompositionError(f'{row.package}/{row.executable} is not installed; looked in '
                           f'{", ".join(str(p.parent) for p in places)}')


@dataclass
class _Process:
    name: str
    ends: bool
    optional: bool
    popen: subprocess.Popen
    log: BinaryIO  # the file its output goes to, opened for reading
    partial: bytes = b''
    reported: bool = field(default=False)


class Runner:
    """Runs rows until all that end the flight are done, a stop is asked for, or one that is not optional fails."""

    def __init__(self, rows: Sequence[Row], log_dir: Path, environment: dict[str, str],
                 patience: float = 20.0, write: Callable[[str], None] = lambda line: print(line, flush=True)):
        self._rows = rows
        self._log_dir = log_dir
        self._environment = environment
        self._patience = patience
        self._output: Callable[[str], None] | None = write
        self._processes: list[_Process] = []
        self._ended: list[_Process] = []  # those that the runner ended
        self._stops: list[int] = []

    def stop(self, number: int = signal.SIGINT, _frame: object = None) -> None:
        """Ask for the end; usable as a signal handler. A second call cuts the patience short."""
        self._stops.append(number)

    def run(self, time_limit: float | None = None) -> int:
        """Start all, wait, end all. Returns 0 when all `ends` rows ended with 0 or a stop was asked for
        and all stopped cleanly; the failing exit status otherwise; 124 when `time_limit` (s) passed."""
        commands = [command(row) for row in self._rows]  # before anything is started
        self._log_dir.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        try:
            for row, argv in zip(self._rows, commands, strict=True):
                self._start(row, argv)
            status = self._watch(begin, time_limit)
        finally:
            self._end()
        # A process that SIGTERM met before it had a handler ended as asked.
        failed = [p for p in self._ended if not p.optional and p.popen.returncode not in (0, -signal.SIGTERM)]
        if status == 0 and failed:
            return _shell_status(failed[0].popen.returncode)
        return status

    def _start(self, row, argv):
        label = row.label or row.name
        path = self._log_dir / f'{label}.log'
        runner = os.getpid()

        def in_child():
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != runner:  # the runner died before the line above
                os._exit(1)
        with path.open('wb') as log:
            popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                     env=self._environment, start_new_session=True, preexec_fn=in_child)
        self._processes.append(_Process(label, row.ends, row.optional, popen, path.open('rb')))

    def _watch(self, begin, time_limit):
        while not self._stops:
            self._copy_output()
            for p in self._processes:
                if p.reported or p.popen.poll() is None:
                    continue
                status = _shell_status(p.popen.returncode)
                p.reported = True
                if p.ends:
                    self._write(f'[{p.name}] finished with exit status {status}')
                    if status or all(q.reported for q in self._processes if q.ends):
                        return status
                    continue
                if p.optional:
                    self._write(f'[{p.name}] exited with status {status}; the flight goes on without it')
                    continue
                self._write(f'[{p.name}] exited with status {status}; it is required, so the flight ends')
                return status or 1
            if time_limit is not None and time.monotonic() - begin > time_limit:
                self._write(f'time limit of {time_limit:g} s reached')
                return 124
            time.sleep(0.05)
        return 0

    def _end(self):
        asked = len(self._stops)
        self._ended = [p for p in self._processes if p.popen.poll() is None]
        for number, seconds, again in ((signal.SIGTERM, self._patience, False), (signal.SIGTERM, 3.0, True),
                                       (signal.SIGKILL, 5.0, True)):
            for p in [p for p in self._processes if p.popen.poll() is None]:
                if again:
                    self._write(f'[{p.name}] still runs; sending {signal.Signals(number).name}')
                p.popen.send_signal(number)
            until = time.monotonic() + seconds
            while time.monotonic() < until and any(p.popen.poll() is None for p in self._processes):
                self._copy_output()
                if len(self._stops) > asked + 1:
                    asked = len(self._stops)
                    break
                time.sleep(0.05)
        self._copy_output()
        for p in self._processes:
            p.log.close()
            if p.popen.returncode not in (0, None, -signal.SIGTERM) and not p.reported:
                self._write(f'[{p.name}] exited with status {_shell_status(p.popen.returncode)}')

    def _copy_output(self):
        for p in self._processes:
            *lines, p.partial = (p.partial + p.log.read()).split(b'\n')
            for line in lines:
                self._write(f'[{p.name}] {line.decode(errors="replace")}')

    def _write(self, line):
        # A closed terminal or pipe must not keep the processes from being ended; their files go on.
        if self._output is None:
            return
        try:
            self._output(line)
        except OSError:
            self._output = None


def _shell_status(returncode):
    return returncode if returncode >= 0 else 128 - returncode
