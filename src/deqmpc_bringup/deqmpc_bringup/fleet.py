"""A fleet file: the robots of one flight, in the conventions of Crazyswarm2's crazyflies.yaml (file versions 1 to 3).

  robots:       name -> enabled, uri, initial_position [x, y, z] (m), type; the most particular
  robot_types:  name -> motion_capture, battery {voltage_warning, voltage_critical} (V), ...
  all:          for every robot

What this stack adds stands under the key `deqmpc`, in any of the three; Crazyswarm2 does not look at it, so that one
file serves both:

  policy, policy_file   as the launch arguments; a relative policy_file is taken from the fleet file's folder
  goal                  [x, y, z, yaw] (m, rad, world)
  start                 'x y z yaw' (m, rad, world) at which a trial hands over to the policy
  body                  rigid body in Motive; the robot's name where it is left out

Keys that only Crazyswarm2 has a use for (firmware_logging, broadcasts, marker, dynamics) are left to it. Anything else
is refused with the file and the entry, because a misspelt or unheeded setting is found out in the air.

Before anything flies, robots must be able to take off, reach their starts in straight lines, and stand on their goals
without meeting: nobody but the operator looks after that, as the policies keep clear of each other only once they fly.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deqmpc import yaml_file

SEPARATION = 0.5  # m that initial positions, ways to the starts, and goals keep from each other, seen from above

_ANY = {'firmware_params', 'firmware_logging', 'reference_frame', 'deqmpc'}
_ROBOT = _ANY | {'enabled', 'uri', 'initial_position', 'type'}
_TYPE = _ANY | {'motion_capture', 'big_quad', 'battery'}
_ALL = _ANY | {'broadcasts'}
_MOTION_CAPTURE = {'enabled', 'tracking', 'marker', 'dynamics'}
_OURS = {'policy', 'policy_file', 'goal', 'start', 'body'}
# Firmware parameters that crazyflie_interface sets and reads back itself, to these values.
_FIXED = {'stabilizer.estimator': 2.0, 'stabilizer.controller': 2.0, 'commander.enHighLevel': 1.0}
_TRUST = {'locSrv.extPosStdDev': 'ext_pos_std_dev', 'locSrv.extQuatStdDev': 'ext_quat_std_dev'}


class FleetError(ValueError):
    """A fleet file cannot be used; the message names file and entry."""


@dataclass(frozen=True)
class FleetRobot:
    """One enabled robot. Texts are launch arguments or node parameters; '' where the file does not say."""

    name: str
    uri: str
    initial_position: tuple[float, float, float]  # m, world
    goal: tuple[float, float, float, float] | None = None  # m, rad, world
    start: tuple[float, float, float, float] | None = None  # m, rad, world
    policy: str = ''
    policy_file: str = ''
    body: str = ''
    battery_warn: str = ''  # V
    battery_land: str = ''  # V
    ext_pos_std_dev: str = ''  # m
    ext_quat_std_dev: str = ''  # rad
    unset: tuple[str, ...] = ()  # firmware parameters that only Crazyswarm2's server would set


def read_fleet(path: str | Path) -> list[FleetRobot]:
    """The enabled robots of the file, in its order. FleetError says what is wrong with it."""
    try:
        data = yaml_file.load(path)
        return _Reader(path).fleet(data)
    except OSError as error:
        raise FleetError(f'fleet file {path}: {error.strerror}') from error
    except FleetError:
        raise
    except ValueError as error:
        raise FleetError(f'fleet file {error}') from error


class _Reader:
    """Plain data -> robots; knows the file's name for its messages."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def fleet(self, data: Any) -> list[FleetRobot]:
        self._keys('', data, {'fileversion', 'robots', 'robot_types', 'all'}, {'robots', 'robot_types'})
        if data.get('fileversion', 1) not in (1, 2, 3):
            self._fail('fileversion', data['fileversion'], '1, 2 or 3')
        self._keys('all', data.get('all') or {}, _ALL)
        robots = []
        for name, robot in self._mapping('robots', data['robots']).items():
            where = f'robots.{name}'
            if not isinstance(name, str) or not re.fullmatch(r'[A-Za-z][A-Za-z0-9_]*', name):
                self._fail('robots', name, 'names of letters, digits and _ that begin with a letter')
            self._keys(where, robot, _ROBOT, {'enabled', 'uri', 'initial_position', 'type'})
            if not isinstance(robot['enabled'], bool):
                self._fail(f'{where}.enabled', robot['enabled'], 'true or false')
            if robot['enabled']:
                robots.append(self._robot(name, robot, data))
        if not robots:
            self._fail('robots', sorted(data['robots']), 'at least one with enabled: true')
        self._check_apart(robots)
        return robots

    def _robot(self, name: str, robot: dict[str, Any], data: dict[str, Any]) -> FleetRobot:
        where = f'robots.{name}'
        kinds = self._mapping('robot_types', data['robot_types'])
        if not isinstance(robot['type'], str) or robot['type'] not in kinds:
            self._fail(f'{where}.type', robot['type'], f'one of robot_types: {", ".join(map(str, kinds))}')
        kind_at = f'robot_types.{robot["type"]}'
        kind = kinds[robot['type']]
        self._keys(kind_at, kind, _TYPE)
        layers = [('all', data.get('all') or {}), (kind_at, kind), (where, robot)]
        self._check_kind(kind_at, kind)
        self._check_frame(layers)
        if not isinstance(robot['uri'], str) or not re.fullmatch(r'(radio|usb|udp)://.+', robot['uri']):
            self._fail(f'{where}.uri', robot['uri'], 'radio://, usb:// or udp://')
        return FleetRobot(name, robot['uri'],
                          self._numbers(f'{where}.initial_position', robot['initial_position'], 3),
                          **self._ours(layers), **self._battery(kind_at, kind), **self._firmware(layers))

    # --- parts ------------------------------------------------------------------------------------

    def _check_kind(self, where, kind):
        capture = kind.get('motion_capture') or {}
        self._keys(f'{where}.motion_capture', capture, _MOTION_CAPTURE)
        if capture.get('enabled', True) is not True:
            self._fail(f'{where}.motion_capture.enabled', capture['enabled'], 'true: this stack flies by mocap')
        if capture.get('tracking', 'vendor') != 'vendor':
            self._fail(f'{where}.motion_capture.tracking', capture['tracking'],
                       'vendor: mocap_bridge follows rigid bodies that Motive tracks')
        if kind.get('big_quad', False) is not False:
            self._fail(f'{where}.big_quad', kind['big_quad'], 'false')

    def _check_frame(self, layers):
        for where, part in layers:
            if part.get('reference_frame', 'world') != 'world':
                self._fail(f'{where}.reference_frame', part['reference_frame'], 'world')

    def _battery(self, where, kind):
        battery = kind.get('battery') or {}
        self._keys(f'{where}.battery', battery, {'voltage_warning', 'voltage_critical'})
        given = {ours: self._number(f'{where}.battery.{theirs}', battery[theirs]) for ours, theirs in (
            ('battery_warn', 'voltage_warning'), ('battery_land', 'voltage_critical')) if theirs in battery}
        if len(given) == 2 and not given['battery_land'] < given['battery_warn']:
            self._fail(f'{where}.battery', battery, 'voltage_critical below voltage_warning')
        return {name: repr(value) for name, value in given.items()}

    def _firmware(self, layers):
        """Later layers win, parameter by parameter."""
        values: dict[str, Any] = {}
        for where, part in layers:
            at = f'{where}.firmware_params'
            for group, parameters in self._mapping(at, part.get('firmware_params') or {}).items():
                for name, value in self._mapping(f'{at}.{group}', parameters).items():
                    values[f'{group}.{name}'] = (f'{at}.{group}.{name}', value)
        given, unset = {}, []
        for name, (where, value) in values.items():
            if name in _FIXED:
                if self._number(where, value) != _FIXED[name]:
                    self._fail(where, value, f'{_FIXED[name]:g}, without which a full-state setpoint is not followed')
            elif name in _TRUST:
                given[_TRUST[name]] = repr(self._number(where, value))
            elif name != 'kalman.resetEstimation':  # crazyflie_interface resets it in any case
                unset.append(f'{where} = {value}')
        return {**given, 'unset': tuple(unset)}

    def _ours(self, layers):
        values: dict[str, Any] = {}
        for where, part in layers:
            ours = part.get('deqmpc') or {}
            self._keys(f'{where}.deqmpc', ours, _OURS)
            values |= {key: (f'{where}.deqmpc.{key}', value) for key, value in ours.items()}
        given: dict[str, Any] = {}
        for key, (where, value) in values.items():
            if key == 'goal':
                given[key] = self._numbers(where, value, 4)
            elif not isinstance(value, str) or not value:
                self._fail(where, value, 'a text')
            elif key == 'start':
                given[key] = self._numbers(where, value.split(), 4)
            else:
                given[key] = str(self._path.parent / value) if key == 'policy_file' else value
        return given

    def _check_apart(self, robots):
        for a, b in itertools.combinations(robots, 2):
            for what in ('uri', 'body'):
                if getattr(a, what) and getattr(a, what) == getattr(b, what):
                    self._fail(f'robots.{b.name}', getattr(b, what), f'another {what} than that of {a.name}')
            for what, distance in _distances(a, b):
                if distance < SEPARATION:
                    raise FleetError(f'fleet file {self._path}: {what} of {a.name} and {b.name} come within '
                                     f'{distance:.2f} m of each other; expected at least {SEPARATION:g} m')

    # --- checks of values -------------------------------------------------------------------------

    def _fail(self, where, value, expected):
        raise FleetError(f'fleet file {self._path}: {where} = {value!r}; expected {expected}')

    def _mapping(self, where, value):
        if not isinstance(value, dict):
            self._fail(where, value, 'a mapping')
        return value

    def _keys(self, where, value, allowed, needed=frozenset()):
        unknown, missing = set(self._mapping(where or 'its content', value)) - allowed, needed - set(value)
        if unknown or missing:
            what = f'unknown key {sorted(map(str, unknown))}' if unknown else f'no key {sorted(missing)}'
            raise FleetError(f'fleet file {self._path}: {where + ": " if where else ""}{what}; expected '
                             f'{", ".join(sorted(allowed))}')

    def _number(self, where, value):
        try:
            # YAML 1.1 reads 1e-3 as a text; Crazyswarm2's own file has it.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self._fail(where, value, 'a number')
        return number

    def _numbers(self, where, value, count):
        if not isinstance(value, list) or len(value) != count:
            self._fail(where, value, f'{count} numbers')
        return tuple(self._number(where, v) for v in value)


def _distances(a: FleetRobot, b: FleetRobot):
    """What of two robots must not meet, and how near (m, seen from above) it comes."""
    def way(robot):
        begin = np.array(robot.initial_position[:2])
        end = np.array(robot.start[:2]) if robot.start else begin
        return begin + np.linspace(0.0, 1.0, 101)[:, None] * (end - begin)  # (101, 2)
    ways = np.linalg.norm(way(a)[:, None] - way(b)[None], axis=2)
    yield 'initial positions', float(ways[0, 0])
    yield 'ways to the starts', float(ways.min())
    if a.goal and b.goal:
        yield 'goals', float(np.linalg.norm(np.array(a.goal[:2]) - np.array(b.goal[:2])))
