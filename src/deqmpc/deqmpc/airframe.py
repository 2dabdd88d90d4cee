"""One airframe's numbers, shared by the planner's model and the simulator's plant.

Motor layout (Crazyflie 2.x, X): 1 front right, 2 back right, 3 back left, 4 front left. With per-motor
thrusts F1..F4 (N) and the offset d of each motor along x and y:
  thrust = F1 + F2 + F3 + F4                     along body z
  torque_x = d (-F1 - F2 + F3 + F4)              torque_y = d (-F1 + F2 + F3 - F4)
  torque_z = c (-F1 + F2 - F3 + F4)              c: thrust-to-torque, m
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from deqmpc import yaml_file

GRAVITY = 9.81  # m/s^2


@dataclass(frozen=True)
class Airframe:
    """Crazyflie 2.1. Mass and inertia: crazyflow's identified cf2x_L250; geometry and thrust range:
    Bitcraze's datasheet figures."""

    mass: float = 0.0328  # kg, with battery and one marker deck
    inertia: tuple[float, float, float] = (16.8e-6, 16.8e-6, 29.8e-6)  # kg m^2, principal, body axes
    motor_offset: float = 0.0325  # m, d above (arm 0.046 m at 45 degrees)
    thrust_to_torque: float = 0.00594  # m, c above
    thrust_min: float = 0.0128  # N a motor, lowest that the firmware's idle leaves in flight
    thrust_max: float = 0.12  # N a motor at a fresh battery
    motor_time_constant: float = 0.05  # s, first-order lag of thrust
    drag: tuple[float, float, float] = (0.0150, 0.0150, 0.0139)  # N s/m, linear, body axes

    @property
    def hover_thrust(self) -> float:
        """Thrust of one motor at hover (N)."""
        return self.mass * GRAVITY / 4.0

    @classmethod
    def load(cls, path: str | Path) -> Airframe:
        """From YAML with exactly these field names; ValueError names the file, key and value that is wrong."""
        data = yaml_file.load(path) or {}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) - set(fields):
            raise ValueError(f'{path}: expected a mapping with keys among {sorted(fields)}, got {data!r}')
        values = {}
        for name, value in data.items():
            numbers = value if isinstance(value, list) else [value]
            wanted = len(fields[name].default) if isinstance(fields[name].default, tuple) else 1
            if len(numbers) != wanted or not all(
                    isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1e6 for v in numbers):
                raise ValueError(f'{path}: {name} = {value!r}; expected {wanted} number(s) >= 0')
            values[name] = tuple(map(float, numbers)) if wanted > 1 else float(numbers[0])
        frame = cls(**values)
        if frame.mass <= 0 or min(frame.inertia) <= 0 or not frame.thrust_min < frame.hover_thrust < frame.thrust_max:
            raise ValueError(f'{path}: mass and inertia must be > 0 and the hover thrust '
                             f'{frame.hover_thrust:.4f} N a motor within [thrust_min, thrust_max]')
        return frame
