"""Tables in Markdown, a line at a time, so that a run that is cut leaves what it has."""

from __future__ import annotations


def header(*names: str) -> None:
    """Names of the columns; the first one holds text, the others numbers."""
    print('\n| ' + ' | '.join(names) + ' |')
    print('|---|' + '---:|' * (len(names) - 1), flush=True)


def row(*cells) -> None:
    """One line. Floats are printed to three digits, None as a dash."""
    print('| ' + ' | '.join(map(_cell, cells)) + ' |', flush=True)


def _cell(value) -> str:
    if value is None:
        return '-'
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 999.5 else f'{value:.0f}'
    return str(value)
