"""Node `obstacles`: virtual spheres, drawn from a seed or read from YAML, static or moving."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import yaml
from rclpy.node import Node

from deqmpc import interface, obstacles
from deqmpc.obstacles import FieldSettings, ObstacleField
from deqmpc.types import Obstacles
from deqmpc_ros.messages import TYPES
from deqmpc_ros.node import SettingsError, declare, now, parameter, publisher, robot_name, run, steady_timer

_PERIOD = 0.1  # s between two arrays of moving spheres
_DRAWN = FieldSettings()


@dataclass(frozen=True)
class Settings:
    """Parameters of the node. Those after `file` shape a drawn field only."""

    mode: str = parameter('static', 'off: no spheres; static: at their start; moving',
                          choices=('off', 'static', 'moving'))
    seed: int = parameter(0, 'seed that the field is drawn from', 0, 2**31 - 1)
    file: str = parameter('', 'YAML field (deqmpc.obstacles.load); empty: draw from the seed')
    count: int = parameter(_DRAWN.count, 'number of spheres', 0, 200)
    radius: float = parameter(_DRAWN.radius, 'of each sphere (m)', 0.001, 10.0)
    low: list[float] = parameter(list(_DRAWN.low), 'corner of the volume, world (m)', -100.0, 100.0)
    high: list[float] = parameter(list(_DRAWN.high), 'opposite corner (m)', -100.0, 100.0)
    keep_clear: list[float] = parameter(
        [c for point in _DRAWN.keep_clear for c in point],
        'points x y z, one after the other, that stay free at the start, world (m)', -100.0, 100.0)
    clear_radius: float = parameter(_DRAWN.clear_radius, "from such a point to a sphere's surface (m)",
                                    0.0, 10.0)
    gap: float = parameter(_DRAWN.gap, 'at least between two surfaces at the start (m)', 0.0, 10.0)
    speed: float = parameter(0.3, 'of each sphere in mode moving (m/s)', 0.0, 5.0)


def make_field(s: Settings) -> ObstacleField | None:
    """The field that `s` asks for, None when off. SettingsError names file and entry, or the parameter."""
    if s.mode == 'off':
        return None
    if s.file:
        try:
            field = obstacles.load(s.file)
        except OSError as error:
            raise SettingsError(f'obstacles: cannot read file {s.file!r}: {error.strerror}') from None
        except yaml.YAMLError as error:
            raise SettingsError(f'obstacles: {s.file}: {" ".join(str(error).split())}') from None
        except ValueError as error:
            raise SettingsError(f'obstacles: {error}') from None
    else:
        field = _draw(s)
    if s.mode == 'static':
        return ObstacleField(field.start, field.radius, 0.0 * field.velocity)
    if not field.velocity.any():
        raise SettingsError(f'obstacles: mode = moving, but no sphere of {s.file!r} has a velocity' if s.file
                            else 'obstacles: mode = moving, but speed = 0.0; expected a speed > 0')
    return field


def _draw(s: Settings) -> ObstacleField:
    for name in ('low', 'high'):
        if len(getattr(s, name)) != 3:
            raise SettingsError(f'obstacles: {name} = {getattr(s, name)!r}; expected three numbers (m)')
    if any(not a < b for a, b in zip(s.low, s.high, strict=True)):
        raise SettingsError(f'obstacles: low = {s.low} must be below high = {s.high} in each axis')
    if len(s.keep_clear) % 3:
        raise SettingsError(f'obstacles: keep_clear has {len(s.keep_clear)} numbers; expected x y z a point')
    points = tuple(tuple(s.keep_clear[i:i + 3]) for i in range(0, len(s.keep_clear), 3))
    try:
        return obstacles.draw(s.seed, FieldSettings(
            count=s.count, radius=s.radius, low=tuple(s.low), high=tuple(s.high), keep_clear=points,
            clear_radius=s.clear_radius, gap=s.gap, speed=s.speed if s.mode == 'moving' else 0.0))
    except ValueError as error:
        raise SettingsError(f'obstacles: {error}') from None


class ObstacleNode(Node):
    """Publishes the field: once where it stands still, else at 10 Hz."""

    def __init__(self):
        super().__init__('obstacles')
        settings = declare(self, Settings)
        self.field = make_field(settings)
        self.robot = robot_name(self)
        self.mode = settings.mode
        self.publisher = publisher(self, interface.OBSTACLES, self.robot)
        self.diagnostics = publisher(self, interface.DIAGNOSTICS, self.robot)
        self.start = now(self)
        if settings.mode == 'moving':
            steady_timer(self, _PERIOD, self._publish)
        self._publish()
        steady_timer(self, 1.0, self._report)
        count = self._count()
        source = settings.file or f'seed {settings.seed}'
        self.get_logger().info(f'{count} spheres, {settings.mode}' + (f', from {source}' if count else ''))

    def _count(self):
        return 0 if self.field is None else len(self.field.radius)

    def _report(self):
        self.diagnostics.publish(interface.diagnostics_message(
            TYPES, now(self), f'{self.robot}/obstacles', interface.OK, self.mode,
            {'spheres': self._count(), 'subscribers': self.publisher.get_subscription_count()}, self.robot))

    def _publish(self):
        stamp = now(self)
        spheres = Obstacles.none(stamp) if self.field is None else self.field.at(stamp - self.start, stamp)
        self.publisher.publish(interface.obstacles_message(TYPES, spheres))


def main(argv: list[str] | None = None) -> int:
    """Entry point; see deqmpc_ros.node.run for the exit status."""
    return run(ObstacleNode, argv)


if __name__ == '__main__':
    sys.exit(main())
