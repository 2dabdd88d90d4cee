"""The commands `deqmpc evaluate` and `deqmpc recover`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from flight_log.bag import BagError, recover
from flight_log.evaluation import EvaluationSettings, evaluate
from flight_log.flight import load_flight
from flight_log.table import as_json, text_report


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='deqmpc evaluate', description=main.__doc__)
    parser.add_argument('bags', nargs='+', metavar='BAG', help='bag folder, .mcap or .db3; torn ones too')
    parser.add_argument('--json', action='store_true', help='print JSON instead of the table')
    parser.add_argument('--report', metavar='DIR', help='write one PNG a bag and report.html there')
    parser.add_argument('--html', metavar='FILE', help='write one web page with table and pictures in it')
    parser.add_argument('--goal', nargs=3, type=float, metavar=('X', 'Y', 'Z'),
                        help="m, world (default: the bag's metadata, else 0 0 1)")
    parser.add_argument('--max-steps', type=int, help="policy ticks of a trial (default: metadata, else 200)")
    parser.add_argument('--robot', default='', help='whose topics, when a bag holds several robots')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Judge recorded trials: return, failure, clearance, tracking, latency."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    goal = tuple(options.goal) if options.goal else None
    settings = EvaluationSettings(goal=goal, max_steps=options.max_steps)
    evaluations, pictures, status = [], {}, 0
    quiet = not sys.stderr.isatty() or len(options.bags) < 3
    for path in tqdm(options.bags, unit='bag', disable=quiet, leave=False):
        try:
            flight = load_flight(path, options.robot)
            evaluation = evaluate(flight, settings)
        except BagError as error:
            print(f'error: {error}', file=sys.stderr)
            status = 1
            continue
        evaluations.append(evaluation)
        if options.report or options.html:
            from flight_log.report import picture  # matplotlib takes a second to import
            pictures[evaluation.bag] = picture(flight, evaluation)
    if evaluations:
        if pictures:
            from flight_log.report import write_html, write_report
            if options.report:
                print(f'report: {write_report(Path(options.report), evaluations, pictures)}', file=sys.stderr)
            if options.html:
                print(f'report: {write_html(Path(options.html), evaluations, pictures)}', file=sys.stderr)
        print(as_json(evaluations) if options.json else text_report(evaluations))
    return status


def recover_main(argv: list[str] | None = None) -> int:
    """Write a whole copy of a torn bag."""
    parser = argparse.ArgumentParser(prog='deqmpc recover', description=recover_main.__doc__)
    parser.add_argument('bag', metavar='BAG', help='torn bag folder or .mcap file; it is not changed')
    parser.add_argument('output', nargs='?', help='new bag folder (default: BAG_recovered)')
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        saved = recover(options.bag, options.output)
    except BagError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{saved.path}: {saved.messages} messages, {saved.seconds:.1f} s recovered')
    return 0


if __name__ == '__main__':
    sys.exit(main())
