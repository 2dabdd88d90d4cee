"""`deqmpc faults`: fly every fault in every phase of flight, in simulated time, and judge what the stack did."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from deqmpc_bringup.faults import FAULTS, PHASES, Fault
from deqmpc_bringup.faults_flight import Outcome, fly

COLUMNS = ('fault', 'phase', 'answer', 'after s', 'end', 'floor m/s', 'drift m', 'silent s', 'verdict')


def cases(faults: Iterable[Fault], short: bool) -> list[tuple[Fault, str]]:
    """Every fault with every phase in which it begins, or in the short form only with its `short` phases."""
    return [(fault, phase) for fault in faults for phase in PHASES
            if fault.answers(phase) and (not short or phase in fault.short)]


def selected(text: str) -> list[Fault]:
    """The faults whose name contains `text`. ValueError when there is none."""
    found = [f for f in FAULTS if text.lower() in f.name.lower()]
    if not found:
        raise ValueError(f'--only {text!r}; expected a part of one of: {", ".join(f.name for f in FAULTS)}')
    return found


def _number(value: float) -> str:
    return '' if math.isnan(value) else f'{value:.2f}'


def row(o: Outcome) -> tuple[str, ...]:
    """An outcome under COLUMNS."""
    return (o.fault, o.phase, o.answer, _number(o.reaction), o.end, _number(o.touchdown), _number(o.drift),
            f'{o.silence:.2f}' if o.silence else '', '; '.join(o.problems) or 'as expected')


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under COLUMNS, in columns."""
    widths = [max(len(r[i]) for r in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    return '\n'.join('  '.join(word.ljust(w) for word, w in zip(r, widths, strict=True)).rstrip()
                     for r in [COLUMNS, *rows])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under COLUMNS, as a Markdown table."""
    lines = [COLUMNS, ['---'] * len(COLUMNS), *[[word.replace('|', '\\|') for word in r] for r in rows]]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Counts over a matrix, and the hardest touchdown of a flight that was not cut (m/s)."""
    soft = [o.touchdown for o in outcomes if o.end == 'landed' and not math.isnan(o.touchdown)]
    return {'faults': len({o.fault for o in outcomes}), 'flights': len(outcomes),
            'undecided': sum(o.end == 'undecided' for o in outcomes),
            'unexpected': sum(bool(o.problems) for o in outcomes),
            'cut': sum(o.end == 'cut' for o in outcomes), 'hardest_landing': max(soft, default=0.0)}


def finite(value: object) -> object:
    """`value` for JSON, which knows neither NaN nor infinity: those become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fly_named(name: str, phase: str, seed: int) -> Outcome:
    # Faults hold functions that do not travel between processes; names do.
    return fly(next(f for f in FAULTS if f.name == name), phase, seed)


def fly_all(todo: Sequence[tuple[Fault, str]], seed: int, jobs: int) -> list[Outcome]:
    """All cases, in their order."""
    shown = {'total': len(todo), 'unit': 'flight', 'disable': not sys.stderr.isatty()}
    if jobs == 1:
        return [fly(fault, phase, seed) for fault, phase in tqdm(todo, **shown)]
    # spawn: torch's threads do not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        flights = [pool.submit(_fly_named, fault.name, phase, seed) for fault, phase in todo]
        return [f.result() for f in tqdm(flights, **shown)]


def main(argv: list[str]) -> int:
    """Fly the fault matrix in simulation; exit status 1 when an answer is not the expected one."""
    parser = argparse.ArgumentParser(prog='deqmpc faults', description=main.__doc__)
    parser.add_argument('--short', action='store_true', help='one or two phases for each fault, as CI flies it')
    parser.add_argument('--only', default='', metavar='NAME', help='faults whose name contains NAME')
    parser.add_argument('--seed', type=int, default=0, help='of noise, losses and motor spread (default 0)')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='flights at once')
    parser.add_argument('--json', metavar='FILE', help='write summary and outcomes')
    parser.add_argument('--markdown', metavar='FILE', help='write the table')
    parser.add_argument('--list', action='store_true', help='print what is expected, and fly nothing')
    options = parser.parse_args(argv)
    try:
        faults = selected(options.only)
        if options.seed < 0 or options.jobs < 1:
            raise ValueError(f'--seed {options.seed} --jobs {options.jobs}; expected a seed >= 0 and jobs >= 1')
    except ValueError as error:
        print(f'deqmpc faults: {error}', file=sys.stderr)
        return 2
    todo = cases(faults, options.short)
    if options.list:
        for fault, phase in todo:
            print(f'{fault.name:<32} {phase:<10} {" or ".join(fault.answers(phase))}')
        return 0
    outcomes = fly_all(todo, options.seed, options.jobs)
    rows, counts = [row(o) for o in outcomes], summary(outcomes)
    print(text_table(rows))
    print(', '.join(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in counts.items()))
    if options.markdown:
        Path(options.markdown).write_text(markdown_table(rows))
    if options.json:
        data = {'seed': options.seed, 'summary': counts, 'outcomes': [dataclasses.asdict(o) for o in outcomes]}
        Path(options.json).write_text(json.dumps(finite(data), indent=1) + '\n')
    return int(counts['unexpected'] > 0)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
