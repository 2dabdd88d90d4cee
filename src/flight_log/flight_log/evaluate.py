"""The commands `deqmpc evaluate` and `deqmpc recover`."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flight_log.bag import BagError, recover
from flight_log.comparison import Comparison, compare
from flight_log.evaluation import Evaluation, EvaluationSettings, evaluate
from flight_log.export import latex, markdown, text, write_table
from flight_log.flight import load_flight
from flight_log.table import as_json, label, text_report

MAX_SCENES = 60  # flights that a web page can show; of more, the failed ones and the first


@dataclass(frozen=True)
class Wanted:
    """What is to be made of each bag."""

    settings: EvaluationSettings
    robot: str
    picture: bool  # a PNG
    scene: bool  # the numbers of the web page


@dataclass(frozen=True)
class Judged:
    """What became of a bag."""

    evaluation: Evaluation | None
    error: str = ''
    picture: bytes = b''
    scene: dict[str, Any] | None = None


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='deqmpc evaluate', description=main.__doc__)
    parser.add_argument('bags', nargs='+', metavar='BAG', help='bag folder, .mcap or .db3; torn ones too')
    parser.add_argument('--json', action='store_true', help='print JSON instead of the table')
    parser.add_argument('--report', metavar='DIR', help='write one PNG a bag and report.html there')
    parser.add_argument('--html', metavar='FILE', help='write one web page: tables, and the flights in 3-D')
    parser.add_argument('--table', metavar='FILE', help='one row a bag: FILE.csv, .parquet or .arrow')
    parser.add_argument('--latex', metavar='FILE', help='the comparison as a LaTeX tabular')
    parser.add_argument('--markdown', metavar='FILE', help='the comparison as Markdown tables')
    parser.add_argument('--animation', metavar='FILE', help='the first bag as FILE.gif, or as .mp4 with ffmpeg')
    parser.add_argument('--by', default='policy', metavar='KEY', help='metadata by which trials are compared (policy)')
    parser.add_argument('--jobs', type=int, default=1, help='processes (default 1)')
    parser.add_argument('--goal', nargs=3, type=float, metavar=('X', 'Y', 'Z'),
                        help="m, world (default: the bag's metadata, else 0 0 1)")
    parser.add_argument('--max-steps', type=int, help="policy ticks of a trial (default: metadata, else 200)")
    parser.add_argument('--robot', default='', help='whose topics, when a bag holds several robots')
    return parser.parse_args(argv)


def judge(path: str, wanted: Wanted) -> Judged:
    """One bag. A bag that cannot be read is an error in words."""
    try:
        flight = load_flight(path, wanted.robot)
        evaluation = evaluate(flight, wanted.settings)
    except BagError as error:
        return Judged(None, str(error))
    picture, numbers = b'', None
    if wanted.picture:
        from flight_log.report import picture as draw  # matplotlib takes a second to import
        picture = draw(flight, evaluation)
    if wanted.scene:
        from flight_log.scene import scene
        numbers = scene(flight, evaluation)
    return Judged(evaluation, '', picture, numbers)


def judged(paths: list[str], wanted: Wanted, jobs: int) -> Iterator[Judged]:
    """All bags in order, one in memory for each process."""
    if jobs == 1 or len(paths) == 1:
        yield from (judge(path, wanted) for path in paths)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        yield from pool.map(judge, paths, [wanted] * len(paths), chunksize=4)


def main(argv: list[str] | None = None) -> int:
    """Judge recorded trials: return, failure, clearance, tracking, latency; compare policies."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    if options.jobs < 1:
        print(f'error: --jobs {options.jobs}; expected an integer >= 1', file=sys.stderr)
        return 2
    settings = EvaluationSettings(goal=tuple(options.goal) if options.goal else None, max_steps=options.max_steps)
    wanted = Wanted(settings, options.robot, bool(options.report), bool(options.report or options.html))
    evaluations: list[Evaluation] = []
    scenes: dict[str, dict[str, Any]] = {}
    status, taken = 0, set()
    quiet = not sys.stderr.isatty() or len(options.bags) < 3
    for found in tqdm(judged(options.bags, wanted, options.jobs), total=len(options.bags), unit='bag', disable=quiet,
                      leave=False):
        if found.evaluation is None:
            print(f'error: {found.error}', file=sys.stderr)
            status = 1
            continue
        evaluations.append(found.evaluation)
        if found.scene is not None:
            _keep(scenes, found)
        if found.picture:
            _write_picture(Path(options.report), found, taken)
    if not evaluations:
        return status
    comparison = compare(evaluations, options.by)
    try:
        _write(options, evaluations, scenes, comparison)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        status = 1
    if options.json:
        print(as_json(evaluations, comparison))
        return status
    print(text_report(evaluations))
    if len(comparison.groups) > 1:
        print(f'\n{text(comparison)}')
    return status


def _keep(scenes: dict[str, dict[str, Any]], found: Judged) -> None:
    """Keep the scene; when there are too many, a failure takes the place of the last one that did not fail."""
    if len(scenes) >= MAX_SCENES:
        fine = [bag for bag, s in scenes.items() if not s['failed']]
        if not found.scene['failed'] or not fine:
            return
        del scenes[fine[-1]]
    scenes[found.evaluation.bag] = found.scene


def _write_picture(folder: Path, found: Judged, taken: set[str]) -> None:
    name = label(found.evaluation).replace('/', '_')
    while name in taken:
        name += '_'
    taken.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.png').write_bytes(found.picture)


def _write(options, evaluations: list[Evaluation], scenes: dict[str, dict[str, Any]], comparison: Comparison) -> None:
    """The files that were asked for."""
    pages = [Path(options.report) / 'report.html'] if options.report else []
    pages += [Path(options.html)] if options.html else []
    for path in pages:
        from flight_log.page import write_page
        print(f'report: {write_page(path, evaluations, scenes, comparison)}', file=sys.stderr)
    if options.table:
        print(f'table: {write_table(Path(options.table), evaluations)}', file=sys.stderr)
    for path, made in ((options.latex, latex), (options.markdown, markdown)):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(made(comparison))
    if options.animation:
        from flight_log.report import animate
        first = evaluations[0]
        flight = load_flight(first.bag, options.robot)
        print(f'animation: {animate(flight, first, Path(options.animation))}', file=sys.stderr)


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
