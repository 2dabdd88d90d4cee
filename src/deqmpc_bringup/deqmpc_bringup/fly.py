"""`deqmpc fly`: the rows of a mode as processes, where only pip is at hand."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TextIO

import yaml

from deqmpc_bringup.composition import (
    CompositionError,
    argument_values,
    arguments,
    compose,
    environment,
    parse_assignments,
    read_table,
)
from deqmpc_bringup.runner import Runner


def new_run_dir(mode: str, root: Path = Path('runs')) -> Path:
    """A folder that does not exist yet: runs/<date>_<time>_<mode>[_<n>]."""
    stem = root / f'{datetime.datetime.now():%Y%m%d_%H%M%S}_{mode}'
    path, n = stem, 1
    while path.exists():
        n += 1
        path = stem.with_name(f'{stem.name}_{n}')
    return path


def fly(mode: str, given: dict[str, str], time_limit: float | None = None,
        write: TextIO = sys.stdout) -> tuple[int, Path]:
    """Run `mode` with arguments `given`; returns the exit status and the run's folder. The nodes' lines
    go to `write`.

    SIGINT, SIGTERM and SIGHUP end the flight: nodes that hold a drone land it first. The folder gets
    arguments.json (all values, and which were given) and log/<node>.log; of a fleet, its file as fleet.yaml,
    log/<robot>.<node>.log, and <robot>/bag for each.
    """
    table = read_table()
    given = dict(given)
    run_dir = Path(given.setdefault('run_dir', str(new_run_dir(mode)))).resolve()
    given['run_dir'] = str(run_dir)
    rows = compose(mode, given, table)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / 'arguments.json').write_text(json.dumps(
        {'mode': mode, 'given': given, 'values': argument_values(mode, given, table)}, indent=2) + '\n')
    if given.get('fleet'):
        shutil.copyfile(given['fleet'], run_dir / 'fleet.yaml')
    runner = Runner(rows, run_dir / 'log', environment(dict(os.environ)),
                    write=lambda line: print(line, file=write, flush=True))
    previous = {n: signal.signal(n, runner.stop) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        status = runner.run(time_limit)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status, run_dir


def main(argv: list[str]) -> int:
    """Start a mode (sim, hardware, stream, replay) with name:=value arguments."""
    table = read_table()
    parser = argparse.ArgumentParser(
        prog='deqmpc fly', description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(f'  {name:<10} {mode["help"]}' for name, mode in table['modes'].items()))
    parser.add_argument('mode', choices=list(table['modes']))
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments')
    parser.add_argument('--show-args', action='store_true', help='list the arguments of the mode and exit')
    parser.add_argument('--time-limit', type=float, metavar='S', help='end after S seconds')
    options = parser.parse_intermixed_args(argv)
    try:
        if options.show_args:
            for a in arguments(options.mode, table):
                choices = f' (one of {", ".join(a.choices)})' if a.choices else ''
                print(f'  {a.name}:={a.default or chr(39) * 2}\n      {a.help}{choices}')
            return 0
        status, run_dir = fly(options.mode, parse_assignments(options.arguments), options.time_limit)
    except (CompositionError, yaml.YAMLError) as error:
        print(f'deqmpc fly: {error}', file=sys.stderr)
        return 2
    print(f'logs and bag: {run_dir}')
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
