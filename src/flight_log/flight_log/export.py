"""Evaluations for other programs: CSV, Parquet and Arrow with one row a trial; LaTeX and Markdown of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

from flight_log.comparison import Comparison, Group
from flight_log.evaluation import Evaluation
from flight_log.table import aligned, number

GOAL = ('goal_x', 'goal_y', 'goal_z')
_NESTED = ('failure', 'goal', 'rejections', 'metadata', 'notes')


def flat(evaluation: Evaluation) -> dict[str, Any]:
    """One row: the fields of Evaluation, with failure, goal and the metadata (`meta_NAME`) spread over columns."""
    e = evaluation
    row = {f.name: getattr(e, f.name) for f in dataclasses.fields(e) if f.name not in _NESTED}
    row |= dict(zip(GOAL, e.goal, strict=True))
    row |= {'failure': e.failure.cause if e.failure else None, 'failure_t': e.failure.t if e.failure else math.nan,
            'failure_detail': e.failure.detail if e.failure else None, 'notes': '; '.join(e.notes)}
    return row | {f'meta_{k}': v for k, v in sorted(e.metadata.items())}


def _table(evaluations: list[Evaluation]) -> tuple[list[str], list[dict[str, Any]]]:
    rows = [flat(e) for e in evaluations]
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def write_table(path: Path, evaluations: list[Evaluation]) -> Path:
    """One row a trial to `path`, whose suffix says how: .csv, .parquet, or .arrow (also .feather: Arrow IPC file).
    ValueError for another suffix, or where pyarrow is needed and missing."""
    columns, rows = _table(evaluations)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.csv':
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, columns, restval='')
            writer.writeheader()
            writer.writerows({k: '' if v is None or v != v else v for k, v in row.items()} for row in rows)
        return path
    if path.suffix not in ('.parquet', '.arrow', '.feather'):
        raise ValueError(f'{path}: expected a name that ends in .csv, .parquet, .arrow or .feather')
    try:
        import pyarrow as pa
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow: pip install 'flight-log[table]'") from error
    # Columns that may be empty throughout have their type all the same, so that tables can be put together.
    kinds = {'success': pa.bool_(), 'reached_goal': pa.bool_(), 'failure': pa.string(), 'failure_detail': pa.string()}
    table = pa.table({c: pa.array([row.get(c) for row in rows], kinds.get(c)) for c in columns})
    if path.suffix == '.parquet':
        pa.parquet.write_table(table, path)
    else:
        pa.feather.write_feather(table, path, compression='uncompressed')
    return path


# --- a comparison as text -----------------------------------------------------------------------

def _between(low: float, high: float, digits: int, scale: float = 1.0) -> str:
    return f'[{number(scale * low, digits)}, {number(scale * high, digits)}]'


GROUP_COLUMNS = (
    ('policy', lambda g: g.name or '(none)'),
    ('trials', lambda g: str(g.trials)),
    ('failures', lambda g: str(g.failures)),
    ('% [95 %]', lambda g: f'{number(100 * g.failure_share, 1)} {_between(g.failure_low, g.failure_high, 1, 100.0)}'),
    ('return [95 %]', lambda g: f'{number(g.return_mean, 2)} {_between(g.return_low, g.return_high, 2)}'),
    ('sd', lambda g: number(g.return_sd, 2)),
    ('of max', lambda g: number(g.normalised_mean, 4)),
    ('clearance m', lambda g: number(g.clearance_min, 3)),
    ('last s m', lambda g: number(g.final_mean, 3)),
    ('track m', lambda g: number(g.tracking_rms, 3)),
    ('solve ms p50/p99', lambda g: f'{number(g.solve_ms_p50, 1)}/{number(g.solve_ms_p99, 1)}'),
)
PAIR_COLUMNS = (
    ('first', lambda p: p.first or '(none)'),
    ('second', lambda p: p.second or '(none)'),
    ('pairs', lambda p: str(p.pairs)),
    ('return, first - second [95 %]', lambda p: f'{number(p.difference, 2)} {_between(p.low, p.high, 2)}'),
    ('failed alone', lambda p: f'{p.only_first_failed} / {p.only_second_failed}'),
    ('McNemar p', lambda p: number(p.p, 3)),
    ('', lambda p: p.verdict),
)


def cells(columns, items) -> list[list[str]]:
    """A heading row and a row an item."""
    return [[name for name, _ in columns], *([f(item) for _, f in columns] for item in items)]


def text(comparison: Comparison) -> str:
    """Groups and pairs for a terminal."""
    tables = (cells(GROUP_COLUMNS, comparison.groups), cells(PAIR_COLUMNS, comparison.pairs))
    return '\n\n'.join('\n'.join(aligned(table, 1, len(table[0]))) for table in tables)


def markdown(comparison: Comparison) -> str:
    """Groups and pairs as two Markdown tables."""
    def one(table):
        head, *body = (f'| {" | ".join(row)} |' for row in table)
        return '\n'.join([head, '|---' * len(table[0]) + '|', *body])
    tables = [cells(GROUP_COLUMNS, comparison.groups)]
    if comparison.pairs:
        tables.append(cells(PAIR_COLUMNS, comparison.pairs))
    return '\n\n'.join(one(t) for t in tables) + '\n'


_SPECIAL = {'\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '$': r'\$', '#': r'\#', '_': r'\_', '{': r'\{',
            '}': r'\}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}


def escaped(value: str) -> str:
    """`value` as LaTeX text."""
    return ''.join(_SPECIAL.get(c, c) for c in value)


def latex(comparison: Comparison) -> str:
    """The groups as a tabular for a paper (booktabs)."""
    def row(g: Group) -> str:
        return (f'{escaped(g.name)} & {g.trials} & {number(g.return_mean, 1)} '
                f'{{\\scriptsize {_between(g.return_low, g.return_high, 1)}}} & {g.failures} '
                f'{{\\scriptsize {_between(g.failure_low, g.failure_high, 1, 100.0)}\\,\\%}} & '
                f'{number(g.clearance_min, 3)} & {number(g.solve_ms_p50, 1)} \\\\')
    head = (r'Policy & Trials & Return {\scriptsize [95\,\%]} & Failures {\scriptsize [95\,\%]} & '
            r'Clearance (m) & Solve (ms) \\')
    return '\n'.join([r'\begin{tabular}{lrrrrr}', r'\toprule', head, r'\midrule',
                      *(row(g) for g in comparison.groups), r'\bottomrule', r'\end{tabular}', ''])
