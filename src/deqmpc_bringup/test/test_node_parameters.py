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
    """The dataclass that `node` of the composition gives to declare(): by name, or as SETTINGS of its class."""
    module = importlib.import_module(SCRIPTS[TABLE['nodes'][node]['executable']])
    own = [c.SETTINGS for c in vars(module).values()
           if inspect.isclass(c) and c.__module__ == module.__name__ and hasattr(c, 'SETTINGS')]
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    named = [getattr(module, call.args[1].id) for call in calls
             if (getattr(call.func, 'id', '') == 'declare' or getattr(call.func, 'attr', '') == 'declare')
             and isinstance(call.args[1], ast.Name)]
    (settings,) = own + named
    return settings


@pytest.mark.parametrize('node', sorted(TABLE['nodes']))
def test_every_parameter_has_a_description_and_a_default_within_its_limits(node):
    settings = settings_class(node)
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        words = field.metadata['description']
        assert len(words) > 3 and not words.isspace(), f'{node}.{field.name}'
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        check_value(node, field, hints[field.name], default)


@pytest.mark.parametrize('mode', sorted(TABLE['modes']))
def test_the_parameter_files_and_arguments_of_a_mode_fit_its_nodes(mode):
    given = {'trial': 'true', 'visual': 'true'} if mode in ('sim', 'hardware') else {'visual': 'true'}
    for row in compose(mode, given):
        settings_of(row, settings_class(row.name))


@pytest.mark.parametrize('mode', sorted(TABLE['modes']))
def test_every_launch_argument_is_documented(mode):
    assert [a.name for a in arguments(mode) if len(a.help) < 5] == []
