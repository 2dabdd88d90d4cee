"""The arguments of every mode, and the parameters of every node, read from the dataclass that the node declares."""

import ast
import dataclasses
import importlib
import inspect
from importlib.metadata import entry_points
from typing import get_type_hints

import pytest

from deqmpc_bringup.composition import arguments, compose, read_table
from deqmpc_bringup.in_process import settings_of
from deqmpc_ros.settings import check_value

TABLE = read_table()
SCRIPTS = {e.name: e.value.split(':')[0] for e in entry_points(group='console_scripts')}


def settings_class(node):
    """The dataclass that `node` of the composition gives to declare()."""
    module = importlib.import_module(SCRIPTS[TABLE['nodes'][node]['executable']])
    names = {call.args[1].id for call in ast.walk(ast.parse(inspect.getsource(module)))
             if isinstance(call, ast.Call) and (getattr(call.func, 'id', '') == 'declare'
                                                or getattr(call.func, 'attr', '') == 'declare')}
    assert len(names) == 1, f'{module.__name__} declares {names}'
    return getattr(module, names.pop())


@pytest.mark.parametrize('node', sorted(TABLE['nodes']))
def test_every_parameter_has_a_description_and_a_default_within_its_limits(node):
    settings = settings_class(node)
    hints = get_type_hints(settings)
    values = settings()
    for field in dataclasses.fields(settings):
        words = field.metadata['description']
        assert len(words) > 3 and not words.isspace(), f'{node}.{field.name}'
        check_value(node, field, hints[field.name], getattr(values, field.name))


@pytest.mark.parametrize('mode', sorted(TABLE['modes']))
def test_the_parameter_files_and_arguments_of_a_mode_fit_its_nodes(mode):
    given = {'trial': 'true', 'visual': 'true'} if mode in ('sim', 'hardware') else {'visual': 'true'}
    for row in compose(mode, given):
        settings_of(row, settings_class(row.name))


@pytest.mark.parametrize('mode', sorted(TABLE['modes']))
def test_every_launch_argument_is_documented(mode):
    assert [a.name for a in arguments(mode) if len(a.help) < 5] == []
