"""The simulated Crazyflie 2.1: plant, sensors and firmware behind one object with simulated time.

Drive it with `step()`; feed it what the radio would deliver, already decoded to SI units. Time is
simulated seconds since start; nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deqmpc.airframe import Airframe
from deqmpc.types import RigidBodyState


@dataclass(frozen=True)
class SimSettings:
    """What can be chosen about one simulated Crazyflie."""

    airframe: Airframe = field(default_factory=Airframe)  # numbers of the body and motors


@dataclass
class Parameter:
    """One firmware parameter."""

    ctype: str  # struct format character: B, H, I, b, h, i, f
    value: float
    read_only: bool = False


class SimulatedCrazyflie:
    """A Crazyflie 2.1 with firmware behaviour in simulated time."""

    time: float  # s since start

    def __init__(self, settings: SimSettings = SimSettings(), seed: int = 0,  # noqa: B008
                 position=(0.0, 0.0, 0.0), yaw: float = 0.0):
        self.settings = settings
        self.time = 0.0
        self.parameters: dict[str, Parameter] = {}
        self.log_variables: dict[str, tuple[str, Callable[[], float]]] = {}
        self.console: list[str] = []

    def step(self, steps: int = 1) -> None:
        """Advance `steps` milliseconds."""
        raise NotImplementedError

    def truth(self) -> RigidBodyState:
        """Ground truth, stamped with `self.time`."""
        raise NotImplementedError

    def set_full_state(self, position, velocity, acceleration, quaternion_xyzw, rates) -> None:
        """Full-state setpoint: m, m/s, m/s^2 (world), body -> world, rad/s (body)."""
        raise NotImplementedError

    def set_position(self, position, yaw) -> None:
        """Position setpoint: m (world), rad."""
        raise NotImplementedError

    def set_rpyt(self, roll_deg, pitch_deg, yaw_rate_deg_s, thrust_u16) -> None:
        """Attitude setpoint as cflib's send_setpoint; close_link() sends zeros here."""
        raise NotImplementedError

    def stop_setpoint(self) -> None:
        """Stop the motors (generic setpoint type 0)."""
        raise NotImplementedError

    def notify_setpoint_stop(self, remain_valid_ms: int = 0) -> None:
        """Lower the streamed setpoints' priority so that the high-level commander takes over."""
        raise NotImplementedError

    def takeoff(self, height: float, duration: float, yaw: float | None = None) -> int:
        """High level: climb to `height` (m, absolute) in `duration` (s); 0 or an errno."""
        raise NotImplementedError

    def land(self, height: float, duration: float, yaw: float | None = None) -> int:
        """High level: descend to `height` (m, absolute) in `duration` (s), then stop; 0 or an errno."""
        raise NotImplementedError

    def go_to(self, position, yaw: float, duration: float, relative: bool = False) -> int:
        """High level: fly to `position` (m) and `yaw` (rad) in `duration` (s); 0 or an errno."""
        raise NotImplementedError

    def high_level_stop(self) -> int:
        """High level: stop the motors; 0 or an errno."""
        raise NotImplementedError

    def receive_extpos(self, position) -> None:
        """External position (m, world)."""
        raise NotImplementedError

    def receive_extpose(self, position, quaternion_xyzw) -> None:
        """External pose (m, world; body -> world)."""
        raise NotImplementedError

    def arm(self, on: bool) -> bool:
        """Arm or disarm; False when refused."""
        raise NotImplementedError

    def recover(self) -> bool:
        """Ask to leave the crashed state; False when refused."""
        raise NotImplementedError

    def emergency_stop(self) -> None:
        """Motors off and locked until reboot."""
        raise NotImplementedError

    def emergency_watchdog(self) -> None:
        """Feed the emergency-stop watchdog; the first call enables it."""
        raise NotImplementedError

    @property
    def supervisor_info(self) -> int:
        """Bits: 0 canArm, 1 armed, 2 autoArm, 3 canFly, 4 flying, 5 tumbled, 6 locked, 7 crashed,
        8 high-level trajectory active, 9 finished, 10 high-level disabled."""
        raise NotImplementedError

    def set_parameter(self, name: str, value: float) -> None:
        """Write a parameter. KeyError: unknown; ValueError: read only or does not fit its type."""
        raise NotImplementedError
