"""Settings of a node as a frozen dataclass: each field is one parameter with description and range.

No ROS in this file, so that a settings dataclass also serves where there is no node.
"""

from __future__ import annotations

import dataclasses
import types as pytypes
from typing import Any, TypeVar, get_args, get_type_hints

S = TypeVar('S')


class SettingsError(ValueError):
    """A parameter, file or address the node was given cannot be used."""


def parameter(default: Any, description: str, low: float | None = None, high: float | None = None,
              choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that is a ROS parameter. `low`, `high`: inclusive range of a number (or of
    each element of a list); `choices`: the allowed strings. TypeError for a number without a range."""
    first = default[0] if isinstance(default, list) and default else default
    if isinstance(first, (int, float)) and not isinstance(first, bool) and (low is None or high is None):
        raise TypeError(f'parameter {description!r}: a number needs a range')
    meta = {'description': description, 'low': low, 'high': high, 'choices': choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def constraints(field: dataclasses.Field, hint: Any) -> str:
    """What a descriptor's range cannot say: the choices of a string, what each element of a list must be."""
    meta = field.metadata
    if meta['choices']:
        return f'one of {", ".join(meta["choices"])}'
    kind = get_args(hint)
    if not kind:
        return ''
    limits = f' in [{meta["low"]}, {meta["high"]}]' if meta['low'] is not None else ''
    return f'a list of {kind[0].__name__}{limits}'


def check_value(where: str, field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """`value` converted to the field's type, or SettingsError. An int is taken for a float, never the
    other way, and a bool is no number."""
    def fail(expected):
        raise SettingsError(f'{where}: parameter {field.name} = {value!r}; expected {expected}')
    def scalar(kind, v):
        if kind is float and isinstance(v, (int, float)) and not isinstance(v, bool):
            v = float(v)
        elif not (isinstance(v, kind) and (kind is bool or not isinstance(v, bool))):
            fail(kind.__name__ if v is value else f'a list of {kind.__name__}')
        low, high, choices = (field.metadata.get(k) for k in ('low', 'high', 'choices'))
        out = kind in (int, float) and (
            v != v or (low is not None and v < low) or (high is not None and v > high))
        if out:
            fail(f'a number in [{low}, {high}]')
        if choices and v not in choices:
            fail('one of ' + ', '.join(choices))
        return v
    if isinstance(hint, pytypes.GenericAlias):  # list[float], list[str]
        kind = hint.__args__[0]
        if isinstance(value, (str, bytes)) or not hasattr(value, '__iter__'):
            fail(f'a list of {kind.__name__}')
        return [scalar(kind, v) for v in value]
    return scalar(hint, value)


def from_values(settings: type[S], where: str, given: dict[str, Any]) -> S:
    """The dataclass `settings` with the values `given`, defaults for the rest.

    Raises SettingsError on a name the dataclass does not have, a wrong type or a value out of range;
    `where` says in the message who was given it.
    """
    fields = {f.name: f for f in dataclasses.fields(settings)}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise SettingsError(f'{where}: unknown parameter {", ".join(unknown)}; '
                            f'expected some of: {", ".join(sorted(fields))}')
    hints = get_type_hints(settings)
    try:
        return settings(**{name: check_value(where, fields[name], hints[name], value)
                           for name, value in given.items()})
    except SettingsError:
        raise
    except ValueError as error:  # the dataclass's own check of values against each other
        raise SettingsError(f'{where}: {error}') from error
