"""YAML files as plain data, with one kind of error.

yaml.safe_load runs no code, but that is not all that a settings file can do: with aliases a kilobyte stands for
gigabytes as soon as it is printed, deep nesting ends in RecursionError, scalars such as 2021-13-45 end in other
exceptions, and of a key that is there twice the first silently loses. So a file is read here with limits that no
settings file of this project comes near, and whatever is wrong with it is a ValueError that begins with its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20  # nested lists and mappings


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, deep nesting, keys twice or not of text, and integers that nobody else can hold."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, f'alias *{event.anchor}; expected its content written out',
                                              event.start_mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f'nested deeper than {MAX_DEPTH} levels', event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f'key {key!r} is {type(key).__name__}; expected a '
                                                        'text (in quotes where YAML reads it as something else)',
                                                        node.start_mark)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(k for i, k in enumerate(keys) if k in keys[:i])
            raise yaml.constructor.ConstructorError(None, None, f'key {twice!r} is there twice', node.start_mark)
        return mapping

    def construct_yaml_int(self, node):
        number = super().construct_yaml_int(node)
        if not -2**63 <= number < 2**63:
            raise yaml.constructor.ConstructorError(None, None, 'integer beyond 64 bits', node.start_mark)
        return number


_Loader.add_constructor('tag:yaml.org,2002:int', _Loader.construct_yaml_int)


def parse(text: str, where: str) -> Any:
    """The data of one YAML document, None where it is empty. ValueError beginning with `where`."""
    if len(text) > MAX_BYTES:
        raise ValueError(f'{where}: {len(text)} characters; expected at most {MAX_BYTES}')
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    # PyYAML's constructors raise what Python's int(), datetime() and match() raise on a scalar that is none.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f'{where}: not YAML that can be used: {" ".join(str(error).split())}') from error


def load(path: str | Path) -> Any:
    """The data of a file. OSError where it cannot be read; ValueError with its name where it cannot be used."""
    path = Path(path)
    with path.open('rb') as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        return parse(raw.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8: {error}') from error
