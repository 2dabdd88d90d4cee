"""`deqmpc trial`: fly the trial protocol once a seed, evaluate the bags, write the report."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

from deqmpc_bringup.composition import (
    CompositionError,
    argument_values,
    compose,
    parse_assignments,
    read_table,
)
from deqmpc_bringup.fly import fly, new_run_dir
from flight_log.evaluate import main as evaluate

OUTCOME = 'outcome.json'  # left by a trial in one process that ended
WARM = 10  # trials after which a process has loaded and cached what it will


def parse_seeds(text: str) -> list[int]:
    """'3', '0:20' (20 not included) or '1,4,7' -> seeds; ValueError on anything else."""
    try:
        if ':' in text:
            first, last = (int(t) for t in text.split(':'))
            seeds = list(range(first, last))
        else:
            seeds = [int(t) for t in text.split(',')]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise ValueError(f'--seeds {text!r}; expected N, N:M or N,M,... with N >= 0')
    return seeds


def fly_in_process(given: dict[str, str]) -> str:
    """One trial, or those of a fleet at once, in this process and simulated time; '' or why it failed. Leaves OUTCOME
    in its folder; of a fleet also the least distance (m) between two of its drones."""
    from deqmpc_bringup.in_process import InProcessTrial  # torch and the simulator: not for --help
    from deqmpc_bringup.in_process_fleet import InProcessFleet
    begin = time.process_time()
    run_dir = Path(given['run_dir'])
    (run_dir / 'arguments.json').write_text(json.dumps(
        {'mode': 'sim', 'in_process': True, 'values': argument_values('sim', given, read_table())},
        indent=2) + '\n')
    trial = (InProcessFleet if given.get('fleet') else InProcessTrial)(compose('sim', given))
    with (run_dir / 'trial.log').open('w') as log:
        done = trial.run(lambda line: print(line, file=log))
    apart = {'least_distance': trial.distance} if given.get('fleet') else {}
    (run_dir / OUTCOME).write_text(json.dumps(
        {'reason': done.reason, 'steps': done.steps, 'process': os.getpid(), 'resident_mb': resident_mb(),
         'cpu_s': time.process_time() - begin, **apart}) + '\n')
    return done.reason


def resident_mb() -> float:
    """Memory of this process that is in RAM (MB, 10^6 bytes)."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return 1e-6 * pages * resource.getpagesize()


def processes(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    """`jobs` processes to fly in. Spawned: torch's threads do not survive a fork."""
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'))


def fly_all(todo: list[tuple[str, dict[str, str]]], pool: concurrent.futures.Executor) -> Iterator[tuple[str, str]]:
    """Fly the trials (name, arguments) in the twin; (name, '' or why it failed) of each as it ends. One that raises
    says so; the others fly on."""
    futures = {pool.submit(fly_in_process, given): name for name, given in todo}
    for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit='trial',
                       disable=not sys.stderr.isatty()):
        error = future.exception()
        yield futures[future], f'{type(error).__name__}: {error}' if error else future.result()


def flown(given: dict[str, str]) -> str | None:
    """Why the trial that a run before left in its folder failed ('' if it did not); None where it did not end,
    and is cleared away."""
    run_dir = Path(given['run_dir'])
    try:
        return json.loads((run_dir / OUTCOME).read_text())['reason']
    except (OSError, ValueError, KeyError):
        shutil.rmtree(run_dir, ignore_errors=True)
        return None


def memory_growth(run_dirs: list[Path]) -> str:
    """What the processes of in-process trials took, in words: after their first WARM trials and at the end."""
    sizes: dict[int, list[float]] = {}
    for run_dir in sorted((d for d in run_dirs if (d / OUTCOME).exists()), key=lambda d: (d / OUTCOME).stat().st_mtime):
        outcome = json.loads((run_dir / OUTCOME).read_text())
        sizes.setdefault(outcome['process'], []).append(outcome['resident_mb'])
    return '; '.join(f'process {pid}: {mb[min(WARM, len(mb)) - 1]:.1f} MB after {min(WARM, len(mb))} trials, '
                     f'{mb[-1]:.1f} MB after {len(mb)}' for pid, mb in sizes.items())


def main(argv: list[str]) -> int:
    """Fly trials (preflight, arm, take off, start pose, engage, 200 ticks, land) and evaluate them."""
    if argv and argv[0].endswith(('.yaml', '.yml')):
        from deqmpc_bringup.campaign import main as campaign  # imports this module
        return campaign(argv)
    parser = argparse.ArgumentParser(prog='deqmpc trial', description=main.__doc__)
    parser.add_argument('mode', choices=('sim', 'hardware'), help='or the file of a campaign, such as '
                        'config/trials/table1.yaml: see deqmpc trial FILE.yaml --help')
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments of the mode')
    parser.add_argument('--seeds', default='0', help='N, N:M (M not included) or N,M,... (default 0)')
    parser.add_argument('--in-process', action='store_true',
                        help="the nodes' logic in one process and simulated time, without ROS and wires")
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trials at once, with --in-process')
    parser.add_argument('--resume', action='store_true',
                        help='with --in-process and run_dir:=, fly only the seeds that did not end there')
    parser.add_argument('--time-limit', type=float, default=180.0, metavar='S',
                        help='end a trial that flies in real time after S seconds (default 180)')
    parser.add_argument('--json', action='store_true', help='print the evaluation as JSON')
    options = parser.parse_intermixed_args(argv)
    try:
        seeds = parse_seeds(options.seeds)
        given = {**parse_assignments(options.arguments), 'trial': 'true', 'record': 'true'}
        if options.in_process and options.mode != 'sim':
            raise CompositionError('--in-process flies the simulator; expected mode sim')
        if options.resume and not (options.in_process and 'run_dir' in given):
            raise CompositionError('--resume goes on with --in-process trials in run_dir:=FOLDER; give both')
        compose(options.mode, given)  # says now what is wrong with the arguments
        root = Path(given.pop('run_dir', '') or new_run_dir(options.mode)).resolve()
        todo = [{**given, 'seed': str(s), 'run_dir': str(root / f'seed_{s:03d}')} for s in seeds]
        before = {g['seed']: flown(g) for g in todo} if options.resume else {}
        left = [g for g in todo if before.get(g['seed']) is None]
        for g in left:
            Path(g['run_dir']).mkdir(parents=True)
        if options.in_process:
            with processes(max(1, options.jobs)) as pool:
                now = dict(fly_all([(g['seed'], g) for g in left], pool))
            reasons = [now[g['seed']] if g['seed'] in now else before[g['seed']] for g in todo]
        else:
            reasons = []
            for g in todo:
                print(f'== trial with seed {g["seed"]}', file=sys.stderr)
                status, _ = fly(options.mode, g, options.time_limit, sys.stderr)
                reasons.append('' if status == 0 else f'exit status {status}')
                if status in (2, 130):
                    break
    except (CompositionError, ValueError, OSError, yaml.YAMLError) as error:
        print(f'deqmpc trial: {error}', file=sys.stderr)
        return 2
    # A fleet has a bag for each robot, one folder further down.
    bags = [str(bag) for g in todo for pattern in ('bag', '*/bag') for bag in sorted(Path(g['run_dir']).glob(pattern))]
    extra = ['--json'] if options.json else []
    status = evaluate([*bags, '--report', str(root / 'report'), *extra]) if bags else 1
    for g, reason in zip(todo, reasons, strict=False):
        if reason:
            print(f'seed {g["seed"]}: {reason}', file=sys.stderr)
    if options.in_process:
        print(f'memory: {memory_growth([Path(g["run_dir"]) for g in todo])}', file=sys.stderr)
    print(f'bags, logs and report: {root}', file=sys.stderr)
    return status or int(any(reasons) or len(reasons) < len(todo))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
