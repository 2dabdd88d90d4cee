"""Numbers of an experiment: mean and standard deviation over seeds, table, plot, and whether a claim holds.

A claim is a list of checks, sentences that the numbers make true or false. It holds where all of them are true, holds
partly where at least half are, and does not hold otherwise. A check on a number that is NaN is false; where variants
that a claim compares are not there, it has no checks and is not judged.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MPC_VARIANTS = ('deq_mpc_deq', 'deq_mpc_nn', 'diff_mpc_deq', 'diff_mpc_nn')
LABELS = {'error': 'validation error\n(L1, sum over knots and states)', 'return': "return / expert's return",
          'failure_share': 'share of rollouts that fail'}
_STYLES = {'deq_mpc_deq': ('C0', '-'), 'deq_mpc_nn': ('C0', '--'), 'diff_mpc_deq': ('C1', '-'),
           'diff_mpc_nn': ('C1', '--'), 'deq': ('C2', '-'), 'nn': ('C2', '--'), 'mpc_only': ('C3', '-')}


class Stat(NamedTuple):
    """Over seeds; written - where nothing was measured."""

    mean: float
    sd: float  # NaN for one run
    runs: int

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return '-'
        return f'{self.mean:.3f}' + (f' +- {self.sd:.3f}' if self.runs > 1 else '')


class Column(NamedTuple):
    """A column of the table."""

    heading: str
    metric: str
    scale: float = 1.0


COLUMNS = (Column('validation error', 'error'), Column('streamed', 'streamed'), Column('normalised return', 'return'),
           Column('failures, %', 'failure_share', 100.0))


class Check(NamedTuple):
    """Part of a claim."""

    sentence: str
    true: bool


class Results:
    """Rows of numbers, one a run and test: each has task, variant, x, seed and its metrics."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    def unique(self, name: str) -> list[Any]:
        """Values of a column in order of appearance."""
        return list(dict.fromkeys(row[name] for row in self.rows))

    def select(self, **where) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[k] == v for k, v in where.items())]

    def stat(self, metric: str, scale: float = 1.0, **where) -> Stat:
        """Mean and standard deviation of a metric over the rows with these values; NaN without any."""
        found = [scale * row[metric] for row in self.select(**where)]
        return Stat(float(np.mean(found)) if found else np.nan,
                    float(np.std(found, ddof=1)) if len(found) > 1 else np.nan, len(found))

    def mean(self, metric: str, **where) -> float:
        """Mean over the rows with these values."""
        return self.stat(metric, **where).mean

    def gap(self, metric: str, ours: str, theirs: str, **where) -> float:
        """Mean of one variant minus that of another."""
        return self.mean(metric, variant=ours, **where) - self.mean(metric, variant=theirs, **where)

    def table(self, x_label: str, columns: Sequence[Column] = COLUMNS) -> str:
        """Markdown."""
        heads = ['task', 'variant', *([x_label] if x_label else []), 'runs', *(c.heading for c in columns)]
        lines = [_cells(heads), '|---' * len(heads) + '|']
        for task, variant, x in dict.fromkeys((r['task'], r['variant'], r['x']) for r in self.rows):
            stats = [self.stat(c.metric, c.scale, task=task, variant=variant, x=x) for c in columns]
            lines.append(_cells([task, variant, *([x] if x_label else []), stats[0].runs, *stats]))
        return '\n'.join(lines)

    def save(self, path: Path) -> None:
        """All rows as CSV."""
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in self.rows for k in row)))
            writer.writeheader()
            writer.writerows(self.rows)


def _cells(values: Sequence[Any]) -> str:
    return f'| {" | ".join(map(str, values))} |'


def verdict(checks: Sequence[Check]) -> str:
    """holds, holds partly, does not hold or not judged: see the top of the file."""
    true = sum(c.true for c in checks)
    if not checks:
        return 'not judged'
    return 'holds' if true == len(checks) else 'holds partly' if 2 * true >= len(checks) else 'does not hold'


def pairs(results: Results) -> list[tuple[str, str]]:
    """The DEQ-MPC and the Diff-MPC variant with the same kind of network, where there are both."""
    known = results.unique('variant')
    both = ((f'deq_mpc_{kind}', f'diff_mpc_{kind}') for kind in ('deq', 'nn'))
    return [pair for pair in both if set(pair) <= set(known)]


def gains(results: Results) -> list[Check]:
    """Whether DEQ-MPC gains from x where Diff-MPC saturates: its error falls from each x to the next, and in the last
    step by a larger share of itself than Diff-MPC's."""
    xs, made = sorted(results.unique('x')), []
    for task in results.unique('task'):
        for ours, theirs in pairs(results):
            a, b = ([results.mean('error', task=task, variant=v, x=x) for x in xs] for v in (ours, theirs))
            falls = all(after < before for before, after in zip(a, a[1:], strict=False))
            made.append(Check(f'{task}: error of {ours} falls throughout: {", ".join(f"{e:.3f}" for e in a)}', falls))
            last = [1.0 - e[-1] / e[-2] for e in (a, b)]
            made.append(Check(f'{task}: from {xs[-2]} to {xs[-1]} {ours} gains {100 * last[0]:.1f} % of its error, '
                              f'{theirs} {100 * last[1]:.1f} %', last[0] > last[1]))
    return made


def style(variant: str) -> dict[str, str]:
    """Colour and line of a variant in every plot."""
    color, line = _STYLES[variant]
    return {'color': color, 'linestyle': line, 'label': variant}


def lines(figure: Figure, results: Results, x_label: str, log: bool = False,
          metrics: Sequence[str] = ('error', 'return')) -> np.ndarray:
    """A row of axes for every task, a panel for every metric, a line for every variant; bars are one standard
    deviation over seeds. The metric '' leaves its panel to the caller. The axes, (tasks, metrics)."""
    def panel(axes, task, metric):
        for variant in results.unique('variant'):
            stats = [(x, results.stat(metric, task=task, variant=variant, x=x)) for x in results.unique('x')]
            axes.errorbar([x for x, _ in stats], [s.mean for _, s in stats],
                          yerr=[np.nan_to_num(s.sd) for _, s in stats], marker='o', markersize=4, capsize=3,
                          **style(variant))
        axes.set_xlabel(x_label)
        if log:
            axes.set_xscale('log')
            axes.set_xticks(results.unique('x'), [f'{x:g}' for x in results.unique('x')])
            axes.minorticks_off()
    return _panels(figure, results.unique('task'), metrics, panel)


def bars(figure: Figure, results: Results, metrics: Sequence[str] = ('error', 'return')) -> np.ndarray:
    """As `lines`, with a bar for every variant: where nothing but the variant changes."""
    def panel(axes, task, metric):
        for i, variant in enumerate(results.unique('variant')):
            stat = results.stat(metric, task=task, variant=variant)
            axes.bar(i, stat.mean, yerr=np.nan_to_num(stat.sd), capsize=3, label=variant, edgecolor='white',
                     color=_STYLES[variant][0], hatch='//' if _STYLES[variant][1] == '--' else '')
        axes.set_xticks([])
    return _panels(figure, results.unique('task'), metrics, panel)


def _panels(figure: Figure, tasks: list[str], metrics: Sequence[str], panel: Callable[[Axes, str, str], None]):
    figure.set_size_inches(4.8 * len(metrics), 3.4 * len(tasks) + 0.6)
    axes = figure.subplots(len(tasks), len(metrics), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for ax, metric in zip(row, metrics, strict=True):
            ax.set_title(task)
            ax.grid(alpha=0.3)
            if metric:
                panel(ax, task, metric)
                ax.set_ylabel(LABELS.get(metric, metric), fontsize=8)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside upper center', ncols=len(names), frameon=False, fontsize=8)
    return axes
