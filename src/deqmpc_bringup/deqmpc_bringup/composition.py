"""The one table of nodes, read into rows that `ros2 launch` and `deqmpc fly` both start.

launch/composition.yaml is the table; its header says what a row may hold. `compose` resolves a mode
and its arguments into rows; a row's `ros_arguments` is exactly what either starter puts behind
`--ros-args`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r'\$\((\w+)\)')


class CompositionError(ValueError):
    """A mode, an argument or the table itself is wrong."""


@dataclass(frozen=True)
class Argument:
    """One launch argument."""

    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One process to start."""

    name: str  # node name
    namespace: str  # '/cf1'
    package: str
    executable: str
    ros_arguments: tuple[str, ...]  # parameter files and parameters, without name and namespace
    ends: bool  # its exit ends the flight with its exit status
    optional: bool = False  # its exit ends nothing


def share_dir() -> Path:
    """The folder that holds launch/ and config/: the source tree, or the installed share folder."""
    source = Path(__file__).resolve().parents[3]
    if (source / 'launch' / 'composition.yaml').is_file():
        return source
    for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep):
        share = Path(prefix) / 'share' / 'deqmpc_bringup'
        if (share / 'launch' / 'composition.yaml').is_file():
            return share
    raise CompositionError(f'launch/composition.yaml is neither in {source} nor in the share folder of '
                           'deqmpc_bringup on AMENT_PREFIX_PATH')


def read_table(path: Path | None = None) -> dict[str, Any]:
    """The table as plain data; CompositionError when a part is missing."""
    path = path or share_dir() / 'launch' / 'composition.yaml'
    table = yaml.safe_load(path.read_text())
    missing = {'arguments', 'nodes', 'modes'} - set(table or {})
    if missing:
        raise CompositionError(f'{path}: lacks {sorted(missing)}')
    return table


def arguments(mode: str, table: dict[str, Any] | None = None) -> list[Argument]:
    """The arguments of `mode`: those that one of its nodes, its parameter files or itself refers to."""
    table = table or read_table()
    _check_mode(mode, table)
    row = table['modes'][mode]
    used = {'robot', 'params', 'run_dir', *_REFERENCE.findall(str(row.get('set', {})))}
    for name in row['nodes']:
        node = table['nodes'][name]
        used |= set(_REFERENCE.findall(str(node.get('set', {})))) | set(node.get('when', {}))
    defaults = row.get('defaults', {})
    return [Argument(name, str(defaults.get(name, a['default'])), a['help'], tuple(a.get('choices', ())))
            for name, a in table['arguments'].items() if name in used]


def compose(mode: str, given: dict[str, str] | None = None, table: dict[str, Any] | None = None) -> list[Row]:
    """The rows of `mode` with the arguments `given` (name -> text).

    Raises CompositionError for an unknown mode or argument, a value outside an argument's choices, or
    a parameter file that is not there.
    """
    table = table or read_table()
    values = argument_values(mode, given or {}, table)
    files = [_resolve(f, values) for f in table['modes'][mode].get('params', [])]
    if values['params']:
        files.append(values['params'])
    for f in files:
        _check_parameter_file(f, table)
    namespace = '/' + values['robot']
    rows = []
    for name in table['modes'][mode]['nodes']:
        node = table['nodes'][name]
        parameters = {**node.get('set', {}), **table['modes'][mode].get('set', {}).get(name, {})}
        if any(values[a] not in allowed for a, allowed in node.get('when', {}).items()):
            continue
        ros_arguments = []
        for f in files:
            ros_arguments += ['--params-file', f]
        for parameter, text in parameters.items():
            value = ([_resolve(t, values) for t in text] if isinstance(text, list)
                     else _resolve(text, values))
            if value != '':
                # Without a node name: `-p node:name` does not reach a node that has a namespace.
                ros_arguments += ['-p', f'{parameter}:={_as_parameter(value)}']
        rows.append(Row(name, namespace, node['package'], node['executable'], tuple(ros_arguments),
                        bool(node.get('ends', False)), bool(node.get('optional', False))))
    return rows


def argument_values(mode: str, given: dict[str, str], table: dict[str, Any]) -> dict[str, str]:
    """Every argument of `mode` with its value, `share` and `mode` included."""
    known = arguments(mode, table)
    unknown = sorted(set(given) - {a.name for a in known})
    if unknown:
        raise CompositionError(f'mode {mode} has no argument {", ".join(unknown)}; it has: '
                               f'{", ".join(a.name for a in known)}')
    values = {'share': str(share_dir()), 'mode': mode}
    for a in known:
        value = given.get(a.name, _resolve(a.default, values))
        if a.choices and value not in a.choices:
            raise CompositionError(f'{a.name}:={value!r}; expected one of {", ".join(a.choices)}')
        values[a.name] = value
    return values


def parse_assignments(words: list[str]) -> dict[str, str]:
    """['seed:=3', ...] -> {'seed': '3'}; CompositionError on a word of another form."""
    given = {}
    for word in words:
        name, sign, value = word.partition(':=')
        if not sign or not name:
            raise CompositionError(f'argument {word!r}; expected name:=value')
        given[name] = value
    return given


def environment(base: dict[str, str]) -> dict[str, str]:
    """`base` with what every process of the stack needs and the user has not set."""
    env = dict(base)
    # The profile binds DDS to loopback; rmw_fastrtps's own LOCALHOST adds shared memory and a socket on
    # 0.0.0.0 to it, so discovery is left to the profile.
    env.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'SYSTEM_DEFAULT')
    env.setdefault('ROS_PYTHON_CHECK_FIELDS', '1')
    env.setdefault('RMW_IMPLEMENTATION', 'rmw_fastrtps_cpp')
    env.setdefault('FASTDDS_DEFAULT_PROFILES_FILE', str(share_dir() / 'config' / 'fastdds.xml'))
    env.setdefault('PYTHONUNBUFFERED', '1')
    env.setdefault('OMP_NUM_THREADS', '1')
    return env


def _check_mode(mode, table):
    if mode not in table['modes']:
        raise CompositionError(f'unknown mode {mode!r}; expected one of {", ".join(table["modes"])}')


def _check_parameter_file(path, table):
    # rcl ignores a section for a node that is not there; a misspelt one must not go unnoticed.
    try:
        data = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise CompositionError(f'parameter file {path}: {error}') from error
    if not isinstance(data, dict):
        raise CompositionError(f'parameter file {path}: expected a mapping, got {type(data).__name__}')
    for namespace, sections in data.items():
        for node, section in (sections or {}).items():
            if (node not in table['nodes'] or not isinstance(section, dict)
                    or set(section) != {'ros__parameters'}):
                raise CompositionError(
                    f'parameter file {path}: {namespace}: {node}: expected one of '
                    f'{", ".join(table["nodes"])} with `ros__parameters` below it')


def _resolve(text, values):
    def value(match):
        if match[1] not in values:
            raise CompositionError(f'{text!r} refers to {match[1]!r}, which is no argument of this mode')
        return values[match[1]]
    return _REFERENCE.sub(value, str(text))


def _as_parameter(value):
    if isinstance(value, list):
        return '[' + ', '.join(_as_parameter(v) for v in value) + ']'
    # rcl reads a parameter's value as YAML: a text that YAML would read as something else is quoted.
    parsed = yaml.safe_load(value)
    if isinstance(parsed, (bool, int, float)) and not _ambiguous(value):
        return value
    return yaml.safe_dump(value, default_style='"').strip()


def _ambiguous(value):
    return value.lower() in ('on', 'off', 'yes', 'no', 'y', 'n')  # YAML 1.1 booleans that are words here
