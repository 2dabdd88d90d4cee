"""The one table of nodes, read into rows that `ros2 launch` and `deqmpc fly` both start.

launch/composition.yaml is the table; its header says what a row may hold. `compose` resolves a mode
and its arguments into rows; a row's `ros_arguments` is exactly what either starter puts behind
`--ros-args`. With a fleet file (deqmpc_bringup.fleet) every node that is not shared has a row for each robot.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deqmpc import yaml_file
from deqmpc_bringup.fleet import FleetError, FleetRobot, read_fleet
from deqmpc_bringup.network import network_environment

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
    label: str = ''  # how the runner calls it; '': by its name


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
    used |= {'fleet'} if row.get('fleet') else set()
    for name in row['nodes']:
        node = table['nodes'][name]
        used |= set(_REFERENCE.findall(str(node.get('set', {})))) | set(node.get('when', {}))
    defaults = row.get('defaults', {})
    return [Argument(name, str(defaults.get(name, a['default'])), a['help'], tuple(a.get('choices', ())))
            for name, a in table['arguments'].items() if name in used]


def compose(mode: str, given: dict[str, str] | None = None, table: dict[str, Any] | None = None) -> list[Row]:
    """The rows of `mode` with the arguments `given` (name -> text), for one robot or for each of a fleet file.

    Raises CompositionError for an unknown mode or argument, a value outside an argument's choices, a parameter file
    that is not there, or a fleet file that cannot be used.
    """
    table = table or read_table()
    robots = _robots(mode, dict(given or {}), table)
    files = [_resolve(f, robots[0]) for f in table['modes'][mode].get('params', [])]
    if robots[0]['params']:
        files.append(robots[0]['params'])
    for f in files:
        _check_parameter_file(f, table)
    rows = []
    for key in table['modes'][mode]['nodes']:
        node = table['nodes'][key]
        if any(robots[0][a] not in allowed for a, allowed in node.get('when', {}).items()):
            continue
        parameters = {**node.get('set', {}), **table['modes'][mode].get('set', {}).get(key, {})}
        for values in robots[:1] if node.get('shared') else robots:
            rows.append(_row(node.get('name', key), node, files, parameters, values,
                             alone=len(robots) == 1 or bool(node.get('shared'))))
    return rows


def _row(name, node, files, parameters, values, alone):
    ros_arguments = []
    for f in files:
        ros_arguments += ['--params-file', f]
    for parameter, text in parameters.items():
        value = _value(text, values)
        if value not in ('', []):
            # Without a node name: `-p node:name` does not reach a node that has a namespace.
            ros_arguments += ['-p', f'{parameter}:={_as_parameter(value)}']
    return Row(name, '/' + values['robot'], node['package'], node['executable'], tuple(ros_arguments),
               bool(node.get('ends', False)), bool(node.get('optional', False)),
               name if alone else f'{values["robot"]}.{name}')


def _robots(mode, given, table):
    """The values of each robot: its arguments, and what follows from the fleet it is in."""
    common = argument_values(mode, given, table)
    if not common.get('fleet'):
        return [_single(common)]
    set_there = sorted({'robot', 'start', 'goal', 'body', *({'uri'} if mode == 'hardware' else ())} & set(given))
    if set_there:
        raise CompositionError(f'{set_there[0]}:={given[set_there[0]]} and fleet:={common["fleet"]}: expected one of '
                               'the two, for the fleet file says it of each robot')
    try:
        fleet = read_fleet(common['fleet'])
    except FleetError as error:
        raise CompositionError(str(error)) from error
    _check_fleet(fleet, common)
    points = [p[:3] for r in fleet for p in (r.goal, r.start) if p] or [(0.0, 0.0, 1.0)]
    shared = {'robots': _namespaces(fleet, common),
              'starts': [_text((*r.initial_position, 0.0)) for r in fleet],
              'keep_clear': [repr(c) for p in points for c in p]}
    return [{**_of_robot(mode, given, table, fleet, robot), **shared} for robot in fleet]


def _single(values):
    name = values['robot']
    crazyswarm2 = values.get('interface') == 'crazyswarm2'
    return {**values, 'robot': f'{name}_deqmpc' if crazyswarm2 else name, 'crazyflie': name,
            'goal': _goal(values.get('goal', '')), 'body': values.get('body', '') or (name if crazyswarm2 else ''),
            'robots': [], 'starts': [], 'keep_clear': [], 'neighbours': [], 'bag_dir': values['run_dir'],
            **dict.fromkeys(_INTERFACE_PARAMETERS, '')}


def _of_robot(mode, given, table, fleet, robot):
    own = {key: getattr(robot, key) for key in ('policy', 'policy_file') if getattr(robot, key) and key not in given}
    if mode == 'hardware':
        own['uri'] = robot.uri
    values = argument_values(mode, {**given, **own, 'robot': robot.name}, table)
    names = _namespaces(fleet, values)
    mine = names[fleet.index(robot)]
    return {**_single(values), 'robot': mine, 'uri': _uri(mode, values['uri'], fleet.index(robot)),
            'goal': [repr(c) for c in robot.goal or ()], 'start': _text(robot.start) or values['start'],
            'body': robot.body or robot.name, 'neighbours': [n for n in names if n != mine],
            'bag_dir': f'{values["run_dir"]}/{robot.name}',
            **{key: getattr(robot, key) for key in _INTERFACE_PARAMETERS}}


# Parameters of crazyflie_interface that a fleet file sets.
_INTERFACE_PARAMETERS = ('battery_warn', 'battery_land', 'ext_pos_std_dev', 'ext_quat_std_dev')


def _check_fleet(fleet: list[FleetRobot], values: dict[str, str]) -> None:
    for robot in fleet:
        where = f'fleet file {values["fleet"]}'
        if values['trial'] == 'true' and robot.start is None:
            raise CompositionError(f'{where}: robots.{robot.name} has no deqmpc.start; expected one, because random '
                                   'starts of several drones may meet')
        if robot.unset and values['interface'] == 'deqmpc':
            raise CompositionError(f'{where}: {robot.unset[0]} would not be set: crazyflie_interface sets controller, '
                                   'estimator and trust in mocap only (interface:=crazyswarm2 leaves parameters to '
                                   'Crazyswarm2)')


def _namespaces(fleet, values):
    """Crazyswarm2's server has topics and services of its own below /<name>: there ours stand beside them."""
    suffix = '_deqmpc' if values['interface'] == 'crazyswarm2' else ''
    return [robot.name + suffix for robot in fleet]


def _uri(mode, uri, index):
    """In simulation each robot has a port of its own, from that of `uri` upwards."""
    base, colon, port = uri.rpartition(':')
    return f'{base}{colon}{int(port) + index}' if mode == 'sim' and port.isdigit() else uri


def _goal(text):
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) not in (0, 4) or not all(map(math.isfinite, numbers)):
        raise CompositionError(f"goal:={text!r}; expected 'x y z yaw' (m, rad)")
    return [repr(n) for n in numbers]


def _text(numbers):
    return ' '.join(map(repr, numbers or ()))


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
    """`base` with what every process of the stack needs and the user has not set. CompositionError where the network
    that DEQMPC_NETWORK asks for cannot be had."""
    try:
        env = {**base, **network_environment(base, share_dir() / 'config')}
    except ValueError as error:
        raise CompositionError(str(error)) from error
    env.setdefault('ROS_PYTHON_CHECK_FIELDS', '1')
    env.setdefault('PYTHONUNBUFFERED', '1')
    env.setdefault('OMP_NUM_THREADS', '1')
    return env


def _check_mode(mode, table):
    if mode not in table['modes']:
        raise CompositionError(f'unknown mode {mode!r}; expected one of {", ".join(table["modes"])}')


def _check_parameter_file(path, table):
    # rcl ignores a section for a node that is not there; a misspelt one must not go unnoticed.
    try:
        data = yaml_file.load(path) or {}
    except (OSError, ValueError) as error:
        raise CompositionError(f'parameter file {path}: {error}') from error
    if not isinstance(data, dict) or not all(isinstance(s, dict) for s in data.values()):
        raise CompositionError(f'parameter file {path}: expected a mapping of namespaces to nodes')
    names = {node.get('name', key): None for key, node in table['nodes'].items()}
    for namespace, sections in data.items():
        if not re.fullmatch(r'(/(\*\*?|[A-Za-z]\w*))+', namespace):
            raise CompositionError(f'parameter file {path}: namespace {namespace!r}; expected one such as /** or /cf1')
        for node, section in sections.items():
            if (node not in names or not isinstance(section, dict)
                    or set(section) != {'ros__parameters'}):
                raise CompositionError(
                    f'parameter file {path}: {namespace}: {node}: expected one of '
                    f'{", ".join(names)} with `ros__parameters` below it')
            _check_parameters(section['ros__parameters'], f'parameter file {path}: {namespace}: {node}')


def _check_parameters(parameters, where):
    # What rcl's own reader cannot use ends every node with an error of rcl that names no parameter.
    if not isinstance(parameters, dict):
        raise CompositionError(f'{where}: ros__parameters = {parameters!r}; expected a mapping')
    for name, value in parameters.items():
        values = value if isinstance(value, list) else [value]
        if (not isinstance(name, str) or not name or len({type(v) for v in values}) > 1 or not all(
                isinstance(v, bool | int | float | str) for v in values)):
            raise CompositionError(f'{where}: parameter {name!r} = {value!r:.200}; expected a truth value, a number '
                                   'or a text, or a list of one of them')


def _value(text, values):
    """What a `set` entry stands for: a text, or a list of texts without those whose argument is empty."""
    if isinstance(text, list):
        return [t for t in (_resolve(t, values) for t in text) if not t.endswith('=')]
    whole = _REFERENCE.fullmatch(str(text))
    if whole and isinstance(values.get(whole[1]), list):
        return values[whole[1]]
    return _resolve(text, values)


def _resolve(text, values):
    def value(match):
        if match[1] not in values:
            raise CompositionError(f'{text!r} refers to {match[1]!r}, which is no argument of this mode')
        held = values[match[1]]
        return ' '.join(held) if isinstance(held, list) else held
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
