"""The check of numbers that the dataclasses of settings share."""

from __future__ import annotations

from dataclasses import fields


def check_numbers(settings, *, zero: bool = False, finite: bool = False) -> None:
    """ValueError where a field annotated `int` is not an integer >= 1, or one annotated `float` not a number > 0; with
    `zero` a number may be 0, with `finite` not infinite. The module of `settings` has postponed annotations."""
    expected = f'a {"finite " if finite else ""}number {">=" if zero else ">"} 0'
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.type == 'int' and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f'{f.name} = {value!r}; expected an integer >= 1')
        if f.type == 'float' and not (isinstance(value, (int, float)) and (value > 0 or zero and value == 0)
                                      and not (finite and value == float('inf'))):
            raise ValueError(f'{f.name} = {value!r}; expected {expected}')
