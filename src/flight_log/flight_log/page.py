"""Several flights as one web page that needs no other file and no network: table, comparison, the scene in 3-D.

The page is flight_log/web/report.html with the style sheet, the script, plotly.js and the flights (flight_log.scene)
written into it. It is drawn by the browser; nothing in a bag becomes markup.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from flight_log.comparison import Comparison
from flight_log.evaluation import Evaluation, summarise
from flight_log.export import GROUP_COLUMNS, PAIR_COLUMNS, cells
from flight_log.table import by_mode, rows, summary_text


def page(evaluations: list[Evaluation], scenes: dict[str, dict[str, Any]], comparison: Comparison | None = None) -> str:
    """The page. `scenes`: by Evaluation.bag, of those flights that can be looked at."""
    order = [e.bag for e in evaluations if e.bag in scenes]
    parts = []
    if sum(e.mode == 'trial' for e in evaluations) > 1:
        parts.append(f'<p>{html.escape(summary_text(summarise(evaluations)))}</p>')
    if comparison and len(comparison.groups) > 1:
        parts += [_table(cells(GROUP_COLUMNS, comparison.groups)), _table(cells(PAIR_COLUMNS, comparison.pairs))]
    tables = ['<h2>Flights</h2>' + _flights(chosen, columns, order) for chosen, columns in by_mode(evaluations)]
    web = importlib.resources.files('flight_log') / 'web'
    flights = json.dumps([scenes[bag] for bag in order], allow_nan=False).replace('<', '\\u003c')
    given = {'css': (web / 'report.css').read_text(), 'script': (web / 'report.js').read_text(),
             'summary': '\n'.join(parts), 'tables': '\n'.join(tables), 'flights': flights, 'plotly': get_plotlyjs()}
    return re.sub(r'\{\{(\w+)\}\}', lambda m: given[m[1]], (web / 'report.html').read_text())


def write_page(path: Path, *given) -> Path:
    """Write `page` of the other arguments to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(*given), encoding='utf-8')
    return path


def _table(table: list[list[str]]) -> str:
    head, *body = table
    lines = [''.join(f'<th>{html.escape(v)}</th>' for v in head),
             *(''.join(f'<td>{html.escape(v)}</td>' for v in row) for row in body)]
    return '<div class="scroll"><table>' + ''.join(f'<tr>{line}</tr>\n' for line in lines) + '</table></div>'


def _flights(evaluations: list[Evaluation], columns, order: list[str]) -> str:
    head, units, *body = rows(evaluations, columns)
    lines = ['<tr>' + ''.join(f'<th>{html.escape(h)}<br><small>{html.escape(u)}</small></th>'
                              for h, u in zip(head, units, strict=True)) + '</tr>']
    for e, row in zip(evaluations, body, strict=True):
        pick = f' class="pick" data-flight="{order.index(e.bag)}"' if e.bag in order else ''
        style = [' class="failed"' if i == 1 and e.failure else '' for i in range(len(row))]
        lines.append(f'<tr{pick}>' + ''.join(f'<td{s}>{html.escape(v)}</td>' for s, v in zip(style, row, strict=True))
                     + '</tr>')
    return '<div class="scroll"><table>' + '\n'.join(lines) + '</table></div>'
