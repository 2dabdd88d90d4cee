"""`deqmpc trial`: fly the trial protocol once a seed, evaluate the bags, write the report."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
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
    """One trial in this process, in simulated time; '' or why it failed."""
    from deqmpc_bringup.in_process import InProcessTrial  # torch and the simulator: not for --help
    trial = InProcessTrial(compose('sim', given))
    run_dir = Path(given['run_dir'])
    (run_dir / 'arguments.json').write_text(json.dumps(
        {'mode': 'sim', 'in_process': True, 'values': argument_values('sim', given, read_table())},
        indent=2) + '\n')
    with (run_dir / 'trial.log').open('w') as log:
        done = trial.run(lambda line: print(line, file=log))
    return done.reason


def _fly_all_in_process(todo: list[dict[str, str]], jobs: int) -> list[str]:
    # spawn: torch's threads do not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        futures = {pool.submit(fly_in_process, given): given['seed'] for given in todo}
        reasons = {}
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit='trial',
                           disable=not sys.stderr.isatty()):
            reasons[futures[future]] = future.result()
    return [reasons[given['seed']] for given in todo]


def main(argv: list[str]) -> int:
    """Fly trials (preflight, arm, take off, start pose, engage, 200 ticks, land) and evaluate them."""
    parser = argparse.ArgumentParser(prog='deqmpc trial', description=main.__doc__)
    parser.add_argument('mode', choices=('sim', 'hardware'))
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments of the mode')
    parser.add_argument('--seeds', default='0', help='N, N:M (M not included) or N,M,... (default 0)')
    parser.add_argument('--in-process', action='store_true',
                        help="the nodes' logic in one process and simulated time, without ROS and wires")
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trials at once, with --in-process')
    parser.add_argument('--time-limit', type=float, default=180.0, metavar='S',
                        help='end a trial that flies in real time after S seconds (default 180)')
    parser.add_argument('--json', action='store_true', help='print the evaluation as JSON')
    options = parser.parse_intermixed_args(argv)
    try:
        seeds = parse_seeds(options.seeds)
        given = {**parse_assignments(options.arguments), 'trial': 'true', 'record': 'true'}
        if options.in_process and options.mode != 'sim':
            raise CompositionError('--in-process flies the simulator; expected mode sim')
        compose(options.mode, given)  # says now what is wrong with the arguments
        root = Path(given.pop('run_dir', '') or new_run_dir(options.mode)).resolve()
        todo = [{**given, 'seed': str(s), 'run_dir': str(root / f'seed_{s:03d}')} for s in seeds]
        for g in todo:
            Path(g['run_dir']).mkdir(parents=True)
        if options.in_process:
            reasons = _fly_all_in_process(todo, max(1, options.jobs))
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
    bags = [str(Path(g['run_dir']) / 'bag') for g in todo if (Path(g['run_dir']) / 'bag').exists()]
    extra = ['--json'] if options.json else []
    status = evaluate([*bags, '--report', str(root / 'report'), *extra]) if bags else 1
    for g, reason in zip(todo, reasons, strict=False):
        if reason:
            print(f'seed {g["seed"]}: {reason}', file=sys.stderr)
    print(f'bags, logs and report: {root}', file=sys.stderr)
    return status or int(any(reasons) or len(reasons) < len(todo))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
