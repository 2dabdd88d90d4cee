"""From the controller's thrust and moments to four PWM values, as the Crazyflie firmware mixes them.

Legacy mixing (crazyflie-firmware, power_distribution_quadrotor.c), r = roll/2, p = pitch/2:
  m1 = thrust - r + p + yaw        m2 = thrust - r - p - yaw
  m3 = thrust + r - p + yaw        m4 = thrust + r + p - yaw
When the largest exceeds 65535 all four are lowered by the same amount, so that the moments survive and
the thrust gives way; then each is raised to the idle minimum.

Battery compensation (motors.c): the command is read as a thrust of command/65535 * THRUST_MAX newton,
the cubic of `plant` is inverted for the motor voltage, and PWM = 65535 v_motor / V.
"""

from __future__ import annotations

import math

PWM_MAX = 65535
THRUST_MIN = 0.012817578393224994  # N a motor, below it the cubic's inverse is not unique
THRUST_MAX = 0.12  # N a motor, firmware's full scale with the 2.1 and 2.1+ propellers


def mix(thrust: float, roll: int, pitch: int, yaw: int) -> tuple[int, int, int, int]:
    """Uncapped motor commands; `roll`, `pitch`, `yaw` are the firmware's 16-bit integers."""
    r, p = int(roll / 2.0), int(pitch / 2.0)
    return (int(thrust - r + p + yaw), int(thrust - r - p - yaw),
            int(thrust + r - p + yaw), int(thrust + r + p - yaw))


def cap(commands: tuple[int, int, int, int], idle: int = 0) -> tuple[int, int, int, int]:
    """PWM within [idle, 65535]: joint reduction, then the idle minimum."""
    excess = max(0, max(commands) - PWM_MAX)
    return tuple(max(idle, min(PWM_MAX, c - excess), 0) for c in commands)


def motor_voltage(thrust: float, curve: tuple[float, float, float, float]) -> float:
    """Motor voltage (V) at which `curve` (a0..a3) gives `thrust` (N); Cardano's real root."""
    a0, a1, a2, a3 = curve
    p = -a2 / (3.0 * a3)
    q = p ** 3 + (a2 * a1 - 3.0 * a3 * (a0 - thrust)) / (6.0 * a3 * a3)
    r = a1 / (3.0 * a3)
    root = math.sqrt(q * q + (r - p * p) ** 3)
    return math.cbrt(q + root) + math.cbrt(q - root) + p


def compensate(command: int, supply_voltage: float, curve: tuple[float, float, float, float]) -> int:
    """Motor command corrected for the battery: constant thrust while the voltage falls."""
    thrust = command / 65535.0 * THRUST_MAX
    if supply_voltage < 2.0 or thrust < THRUST_MIN:
        return 0
    return int(PWM_MAX * motor_voltage(thrust, curve) / supply_voltage)
