"""Tick to published plan in the running ROS graph: latency, missed ticks, memory, file handles.

  python benchmarks/graph.py [--seconds 60] [--rate 10] [--json graph.json] [name:=value ...]

Starts `deqmpc fly sim` (simulator, mocap bridge, obstacles, policy, interface, recorder) with the policy at `rate`,
and reads the bag: every tick reports itself on /diagnostics (deqmpc.interface.POLICY_KEYS). Counted are all ticks
from the first accepted plan on. Tick to plan runs from the instant the tick was due to the return of publish().
Memory, file handles and CPU time are those of the processes, from /proc; for a soak (--seconds 3600) compare start and
end, and the ticks of the first and the last tenth. The drone stands on the floor, unless trial:=true
(and max_steps:=N, obstacles:=moving, ...) is among the launch arguments.

How much of that is the machine's? Beside the graph a bare process on each core, at the highest real-time priority,
sleeps for 1 ms over and over and notes every time that it is woken late: no program on this machine could have run
then, only its kernel or the host of a virtual one. `machine` in the JSON: those stalls, and how many of the missed
ticks have one (longer than 4 ms) within the 2 periods before them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import yaml

from deqmpc import interface
from deqmpc_bringup.composition import parse_assignments
from deqmpc_bringup.fly import fly
from flight_log.bag import read_bag

STALL = 4e-3  # s late
HIGHEST = 99  # real-time priority (SCHED_FIFO); the nodes have at most 25
START_UP = 5.0  # s that the nodes may take until the first tick
TICKS_A_SECOND = os.sysconf('SC_CLK_TCK')
PAGE = os.sysconf('SC_PAGE_SIZE')


class Processes(threading.Thread):
    """Samples resident memory (bytes), CPU time (s) and open files of this process's children once a second."""

    def __init__(self):
        super().__init__(daemon=True)
        # executable: (Unix time, memory, CPU time, open files)
        self.samples: dict[str, list[tuple[float, int, float, int]]] = {}
        self._stop_asked = threading.Event()

    def run(self):
        while not self._stop_asked.wait(1.0):
            for folder in Path('/proc').glob('[0-9]*'):
                try:
                    fields = (folder / 'stat').read_text().rsplit(')', 1)[1].split()
                    if int(fields[1]) == os.getpid():
                        words = (folder / 'cmdline').read_bytes().split(b'\0')
                        name = next(Path(w.decode()).name for w in words if w.endswith(b'_node'))
                        self.samples.setdefault(name, []).append((
                            time.time(), int(fields[21]) * PAGE, (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND,
                            len(os.listdir(folder / 'fd'))))
                except (FileNotFoundError, ProcessLookupError, StopIteration):
                    continue  # it ended meanwhile, or has not become a node yet

    def stop(self):
        self._stop_asked.set()
        self.join()


def watch_core(core: int, report) -> None:
    """Process: (Unix time, lateness in s) of every wake-up on `core` later than STALL, until the pipe is closed."""
    os.sched_setaffinity(0, {core})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(HIGHEST))
    except PermissionError:
        report.send(None)
        return
    while not report.poll():
        asleep = time.monotonic()
        time.sleep(1e-3)
        late = time.monotonic() - asleep - 1e-3
        if late > STALL:
            report.send((time.time(), late))
    report.send(None)


class Stalls:
    """Stalls of the machine itself while the block runs: `seen`, a list of (Unix time, s), or None where real-time
    priority is refused: then nothing can be said of it."""

    def __enter__(self) -> Stalls:
        context = multiprocessing.get_context('spawn')
        self.seen: list[tuple[float, float]] | None = []
        self._watchers = []
        for core in sorted(os.sched_getaffinity(0)):
            ours, theirs = context.Pipe()
            process = context.Process(target=watch_core, args=(core, theirs), daemon=True)
            process.start()
            self._watchers.append((process, ours))
        return self

    def __exit__(self, *_) -> None:
        for process, pipe in self._watchers:
            with contextlib.suppress(BrokenPipeError):  # it was refused, and has ended
                pipe.send('stop')
            refused = not process.is_alive()
            while (stall := pipe.recv()) is not None:
                self.seen.append(stall)
            process.join()
            if refused:
                self.seen = None
                return
        self.seen.sort()


def measure(seconds: float, rate: float, given: dict[str, str]) -> dict:
    """Fly the graph for `seconds` after start-up; what the policy's ticks say. RuntimeError when it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / 'rate.yaml'
        params.write_text(yaml.safe_dump({'/**': {'policy': {'ros__parameters': {'rate': rate}}}}))
        processes = Processes()
        stolen = steal()
        processes.start()
        with Stalls() as stalls:
            status, run_dir = fly('sim', {'run_dir': f'{folder}/run', 'params': str(params), **given},
                                  seconds + START_UP, sys.stderr)
        processes.stop()
        stolen = steal() - stolen
        if status != 124 and given.get('trial') != 'true':
            raise RuntimeError(f'the graph ended by itself with exit status {status}')
        reports = [d for _, _, _, m in read_bag(run_dir / 'bag', [interface.DIAGNOSTICS.name])
                   for d in interface.read_diagnostics(m)]
    ticks = [d for d in reports if d.name.endswith('/policy') and '/preflight/' not in d.name]
    simulator = [d.values for d in reports if d.name.endswith('/sim')]
    first = next((i for i, d in enumerate(ticks) if d.values['gate'] == 'accepted'), None)
    if first is None:
        raise RuntimeError(f'no plan was accepted in {len(ticks)} ticks; the last said: '
                           f'{ticks[-1].values["gate"] if ticks else "nothing"}')
    return {**summary(ticks[first:], rate, processes.samples), 'machine': blame(ticks[first:], rate, stalls.seen),
            'simulator_lag_ms': max(float(v['lag_ms']) for v in simulator),
            'simulator_slips': int(simulator[-1]['slips']), 'stolen_s': stolen}


def blame(ticks: list[interface.Diagnostic], rate: float, stalls: list[tuple[float, float]] | None) -> dict | None:
    """What the machine did meanwhile: stalls, the longest (ms), and how many missed ticks have one just before."""
    if stalls is None:
        return None
    during = [(at, late) for at, late in stalls if ticks[0].stamp <= at <= ticks[-1].stamp]
    missed = [b for a, b in itertools.pairwise(ticks)
              if int(b.values['deadline_misses']) > int(a.values['deadline_misses'])]
    with_stall = sum(any(tick.stamp - 2 / rate <= at <= tick.stamp + 1 / rate for at, _ in during) for tick in missed)
    return dict(stalls=len(during), longest_ms=max((1e3 * late for _, late in during), default=0.0),
                late_ticks=len(missed), late_ticks_with_stall=with_stall)


def steal() -> float:
    """Seconds that this machine, if virtual, wanted to run and its host did not let it; all processors, since boot."""
    return int(Path('/proc/stat').read_text().split()[8]) / TICKS_A_SECOND


def summary(ticks: list[interface.Diagnostic], rate: float, samples: dict) -> dict:
    """Figures of the ticks between the first and the last of `ticks`."""
    span = ticks[-1].stamp - ticks[0].stamp
    numbers = [int(d.values['tick']) for d in ticks]
    row = dict(rate_hz=rate, seconds=span, ticks=numbers[-1] - numbers[0] + 1, due=round(span * rate) + 1,
               recorded=len(ticks), load=os.getloadavg()[0],
               missed=int(ticks[-1].values['deadline_misses']) - int(ticks[0].values['deadline_misses']),
               refused=sum(d.values['gate'] != 'accepted' for d in ticks))
    for key in ('tick_ms', 'solve_ms', 'latency_ms'):
        values = np.array([float(d.values[key]) for d in ticks])
        row[key] = dict(median=float(np.median(values)), p99=float(np.percentile(values, 99)),
                        p999=float(np.percentile(values, 99.9)), max=float(values.max()),
                        first=float(np.percentile(values[:len(values) // 10 + 1], 99)),
                        last=float(np.percentile(values[-(len(values) // 10 + 1):], 99)))
    row['processes'] = {}
    for name, series in sorted(samples.items()):
        series = [s for s in series if ticks[0].stamp <= s[0] <= ticks[-1].stamp]
        if len(series) > 1:
            (t0, memory_0, cpu_0, files_0), (t1, memory_1, cpu_1, files_1) = series[0], series[-1]
            row['processes'][name] = dict(start_mb=1e-6 * memory_0, end_mb=1e-6 * memory_1, start_files=files_0,
                                          end_files=files_1, cpu=(cpu_1 - cpu_0) / (t1 - t0))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments of mode sim')
    parser.add_argument('--seconds', type=float, default=60.0)
    parser.add_argument('--rate', type=float, default=10.0, help='ticks a second')
    parser.add_argument('--json', help='write the figures to this file')
    options = parser.parse_intermixed_args()
    row = measure(options.seconds, options.rate, parse_assignments(options.arguments))
    print(f'\n{row["rate_hz"]:g} Hz for {row["seconds"]:.1f} s: {row["ticks"]} ticks of {row["due"]} due, '
          f'{row["missed"]} missed, {row["refused"]} without a plan, {row["recorded"]} recorded; '
          f'simulator at most {row["simulator_lag_ms"]:.1f} ms late, {row["simulator_slips"]} slips; '
          f'load {row["load"]:.1f}, {row["stolen_s"]:.2f} s of processor time stolen by the host')
    if machine := row['machine']:
        print(f'machine: {machine["stalls"]} stalls of more than {1e3 * STALL:g} ms, longest '
              f'{machine["longest_ms"]:.1f} ms; {machine["late_ticks_with_stall"]} of {machine["late_ticks"]} '
              'late ticks have one just before')
    print(f'{"ms":24}{"median":>9}{"99 %":>9}{"99.9 %":>9}{"max":>9}   99 % of the first and last tenth')
    for key, name in (('tick_ms', 'tick to plan'), ('solve_ms', 'policy call'), ('latency_ms', 'odometry to plan')):
        print(f'{name:24}' + ''.join(f'{row[key][k]:9.2f}' for k in ('median', 'p99', 'p999', 'max', 'first', 'last')))
    print(f'{"process":24}{"CPU":>9}{"MB start":>9}{"MB end":>9}{"files":>9}{"end":>6}')
    for name, p in row['processes'].items():
        print(f'{name:24}{p["cpu"]:9.1%}{p["start_mb"]:9.1f}{p["end_mb"]:9.1f}{p["start_files"]:9}{p["end_files"]:6}')
    if options.json:
        Path(options.json).write_text(json.dumps(row, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
