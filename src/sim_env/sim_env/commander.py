"""Setpoints of the Crazyflie firmware: what each carries, and which of several sources wins.

A source with a priority below the present one is ignored; a streamed setpoint stops the high-level
planner; `relax` (notify_setpoint_stop) lowers the priority so that the planner is heard again
(crazyflie-firmware, commander.c). The age of the present setpoint is judged by the supervisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

PRIORITY_DISABLE, PRIORITY_HIGH_LEVEL, PRIORITY_STREAM = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Setpoint:
    """One setpoint. The mode flags say which fields the controller may use."""

    stamp: int = 0  # ms, when it was accepted
    track_position: bool = False  # x, y and z are absolute
    track_height: bool = False  # z is absolute (thrust is computed, not taken from `thrust`)
    track_tilt: bool = False  # roll and pitch are absolute angles
    yaw_mode: str = 'none'  # none | angle | rate | quaternion
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, world
    velocity: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m/s, world
    acceleration: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m/s^2, world
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)  # rad/s, body
    roll: float = 0.0  # rad
    pitch: float = 0.0  # rad, positive nose down as in the body frame
    yaw: float = 0.0  # rad
    thrust: float = 0.0  # 0..65535, used when the height is not tracked


NULL = Setpoint()  # all modes off: the motors stop


def full_state(position, velocity, acceleration, quaternion, rates) -> Setpoint:
    """Full-state setpoint (CRTP generic type 6); Mellinger takes only the yaw of the quaternion."""
    x, y, z, w = quaternion
    yaw = math.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))
    return Setpoint(
        track_position=True, track_height=True, yaw_mode='quaternion', position=_floats(position),
        velocity=_floats(velocity), acceleration=_floats(acceleration), rates=_floats(rates), yaw=yaw)


def position(target, yaw: float) -> Setpoint:
    """Position setpoint (CRTP generic type 7): velocity and acceleration are zero."""
    return Setpoint(track_position=True, track_height=True, yaw_mode='angle', position=_floats(target),
                    yaw=_floats((yaw,))[0])


def attitude(roll: float, pitch: float, yaw_rate: float, thrust: float) -> Setpoint:
    """Roll, pitch (rad, body frame), yaw rate (rad/s) and raw thrust."""
    return Setpoint(track_tilt=True, yaw_mode='rate', roll=roll, pitch=pitch, rates=(0.0, 0.0, yaw_rate),
                    thrust=thrust)


def level_out(setpoint: Setpoint) -> Setpoint:
    """What the supervisor makes of a setpoint that is too old: level, no yaw rate, height as it was."""
    return replace(setpoint, track_position=False, track_tilt=True, yaw_mode='rate', roll=0.0, pitch=0.0,
                   rates=(setpoint.rates[0], setpoint.rates[1], 0.0))


def _floats(values):
    """As floats; an infinity becomes NaN, which the controller answers by stopping the motors."""
    return tuple(float(v) if math.isfinite(v) else math.nan for v in values)


class Commander:
    """Keeps the setpoint of the highest priority."""

    def __init__(self, stop_planner: Callable[[], None]):
        self.setpoint = NULL
        self.priority = PRIORITY_DISABLE
        self._stop_planner = stop_planner
        self._thrust_locked = False

    def set(self, setpoint: Setpoint, priority: int, tick: int) -> None:
        """Accept `setpoint` at time `tick` (ms) unless a higher priority is active."""
        if priority < self.priority:
            return
        self.setpoint = replace(setpoint, stamp=tick)
        self.priority = priority
        if priority > PRIORITY_HIGH_LEVEL:
            self._stop_planner()

    def relax(self) -> None:
        """Let the high-level planner be heard again."""
        self.priority = PRIORITY_HIGH_LEVEL

    def lock_thrust(self, thrust: float) -> float:
        """Raw thrust of an attitude setpoint: locked at zero until a zero was sent, and nothing below 1000
        (crtp_commander_rpyt.c)."""
        if self.priority == PRIORITY_DISABLE:
            self._thrust_locked = True
        if thrust == 0:
            self._thrust_locked = False
        return 0.0 if self._thrust_locked or thrust < 1000 else min(float(thrust), 60000.0)
