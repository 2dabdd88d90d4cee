"""Evaluations as a table for terminals and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from flight_log.comparison import Comparison
from flight_log.evaluation import Evaluation, Summary, summarise


def number(value: float | None, digits: int) -> str:
    """`value` with so many digits; a dash where there is none, or it is not finite."""
    return '-' if value is None or not math.isfinite(value) else f'{value:.{digits}f}'


def label(evaluation: Evaluation) -> str:
    """Short name of a bag: its folder, with the folder above where that says more (`run7/bag`)."""
    path = Path(evaluation.bag)
    return f'{path.parent.name}/{path.name}' if path.name == 'bag' and path.parent.name else path.name


# (heading, unit, cell); shown for trials
TRIAL_COLUMNS = (
    ('bag', '', label),
    ('outcome', '', lambda e: e.failure.cause if e.failure else 'success' if e.reached_goal else 'off goal'),
    ('steps', '', lambda e: str(e.steps)),
    ('return', '', lambda e: number(e.total_return, 1)),
    ('norm.', 'of max', lambda e: number(e.normalised_return, 3)),
    ('clear', 'min m', lambda e: number(e.min_clearance, 3)),
    ('sphere', '', lambda e: str(e.min_clearance_sphere) if e.min_clearance_sphere >= 0 else '-'),
    ('to goal', 'max m', lambda e: number(e.final_max, 3)),
    ('last 1 s', 'mean m', lambda e: number(e.final_mean, 3)),
    ('track', 'rms m', lambda e: number(e.tracking_rms, 3)),
    ('', 'max m', lambda e: number(e.tracking_max, 3)),
    ('solve ms', 'p50/p99', lambda e: f'{number(e.solve_ms_p50, 1)}/{number(e.solve_ms_p99, 1)}'),
    ('tick', 'p50/p99', lambda e: f'{number(e.tick_ms_p50, 1)}/{number(e.tick_ms_p99, 1)}'),
    ('latency', 'p50/p99', lambda e: f'{number(e.latency_ms_p50, 1)}/{number(e.latency_ms_p99, 1)}'),
    ('misses', '', lambda e: str(e.deadline_misses)),
    ('missed', 'ticks', lambda e: str(e.missed_ticks)),
    ('gaps', 'mocap', lambda e: str(e.mocap_gaps)),
)
OPEN_LOOP_COLUMNS = (
    ('bag', '', label),
    ('seconds', '', lambda e: number(e.duration, 1)),
    ('ticks', '', lambda e: str(e.ticks)),
    ('without', 'plan', lambda e: str(e.ticks_without_plan)),
    ('rejected', 'plans', lambda e: str(e.rejected_plans)),
    ('missed', 'ticks', lambda e: str(e.missed_ticks)),
    ('misses', '', lambda e: str(e.deadline_misses)),
    ('solve ms', 'p50/p99', lambda e: f'{number(e.solve_ms_p50, 1)}/{number(e.solve_ms_p99, 1)}'),
    ('tick', 'p50/p99', lambda e: f'{number(e.tick_ms_p50, 1)}/{number(e.tick_ms_p99, 1)}'),
    ('latency', 'p50/p99', lambda e: f'{number(e.latency_ms_p50, 1)}/{number(e.latency_ms_p99, 1)}'),
    ('mocap', 'Hz', lambda e: number(e.mocap_rate, 1)),
    ('gaps', '', lambda e: str(e.mocap_gaps)),
    ('longest', 'gap s', lambda e: number(e.mocap_longest_gap, 3)),
    ('track', 'rms m', lambda e: number(e.tracking_rms, 3)),
    ('clear', 'min m', lambda e: number(e.min_clearance, 3)),
)


POLICY_COLUMN = ('policy', '', lambda e: e.metadata.get('policy', '-'))


def by_mode(evaluations: list[Evaluation]) -> list[tuple[list[Evaluation], tuple]]:
    """Trials and open-loop bags, each with its columns; the policy has one where there are several."""
    several = len({e.metadata.get('policy') for e in evaluations}) > 1
    columns = {'trial': TRIAL_COLUMNS, 'open_loop': OPEN_LOOP_COLUMNS}
    chosen = {mode: [e for e in evaluations if e.mode == mode] for mode in columns}
    return [(chosen[mode], (*columns[mode], *([POLICY_COLUMN] * several))) for mode in columns if chosen[mode]]


def rows(evaluations: list[Evaluation], columns) -> list[list[str]]:
    """Two heading rows and one row a bag."""
    return [[c[0] for c in columns], [c[1] for c in columns],
            *([c[2](e) for c in columns] for e in evaluations)]


def aligned(table: list[list[str]], headings: int, left: int) -> list[str]:
    """Lines of `table` for a terminal, a rule under its `headings` rows; the first `left` columns left-aligned."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    def line(row):
        return '  '.join(v.ljust(w) if i < left else v.rjust(w)
                         for i, (v, w) in enumerate(zip(row, widths, strict=True))).rstrip()
    lines = [line(row) for row in table]
    return [*lines[:headings], '-' * max(map(len, lines)), *lines[headings:]]


def remarks(evaluation: Evaluation) -> list[str]:
    """What the table has no column for: the failure in words, refused plans, notes on the data."""
    said = []
    if evaluation.failure:
        when = f' {evaluation.failure.t:.2f} s after engage' if math.isfinite(evaluation.failure.t) else ''
        said.append(f'{evaluation.failure.cause}{when}: {evaluation.failure.detail}')
    if evaluation.mode == 'trial' and evaluation.ticks_without_plan:
        said.append(f'{evaluation.ticks_without_plan} of {evaluation.ticks} ticks without a plan')
    if evaluation.rejections:
        said.append('plans refused: ' + ', '.join(f'{n} x {why}' for why, n in evaluation.rejections.items()))
    if evaluation.mode == 'open_loop' and evaluation.ticks and not evaluation.ticks_without_plan:
        said.append('a plan at every tick')
    return said + evaluation.notes


def summary_text(s: Summary) -> str:
    """One or two lines on several trials."""
    causes = ', '.join(f'{n} {cause}' for cause, n in s.causes.items()) or 'none'
    return (f'{s.successes} of {s.trials} trials succeeded: {100 * s.success_share:.0f} % '
            f'(95 % interval {100 * s.success_low:.0f} to {100 * s.success_high:.0f} %), '
            f'{s.reached_goal} ended at the goal; failures: {causes}\n'
            f'return {number(s.return_mean, 1)} +- {number(s.return_sd, 1)} '
            f'({number(s.return_min, 1)} to {number(s.return_max, 1)}), '
            f'of the maximum {number(s.normalised_mean, 3)} +- {number(s.normalised_sd, 3)}')


def text_report(evaluations: list[Evaluation]) -> str:
    """The table for a terminal."""
    lines: list[str] = []
    for chosen, columns in by_mode(evaluations):
        lines += [*aligned(rows(chosen, columns), 2, 2), '']
        lines += [f'{label(e)}: {remark}' for e in chosen for remark in remarks(e)]
    trials = sum(e.mode == 'trial' for e in evaluations)
    if trials > 1:
        lines += ['', summary_text(summarise(evaluations))]
    return '\n'.join(lines).rstrip()


def as_json(evaluations: list[Evaluation], comparison: Comparison | None = None) -> str:
    """{"trials": [...], "summary": {...}, "comparison": {...}}; numbers that the bag cannot tell are null."""
    def clean(v):
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        if isinstance(v, list):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(clean({'trials': [dataclasses.asdict(e) for e in evaluations],
                             'summary': dataclasses.asdict(summarise(evaluations)),
                             'comparison': dataclasses.asdict(comparison) if comparison else None}), indent=2)
