"""The firmware's supervisor: when the motors may run, and what overrides a setpoint.

The state machine, its conditions and times are those of crazyflie-firmware supervisor.c and
supervisor_state_machine.c, 25 Hz. Times are ticks of 1 ms since start. No crash detection by
acceleration (off by default in the firmware) and no rotor speed checks (the brushed 2.1 has none).
"""

from __future__ import annotations

from enum import IntEnum

from deqmpc.airframe import GRAVITY
from sim_env import commander
from sim_env.commander import NULL, Setpoint


class State(IntEnum):
    """Supervisor states, numbered as in the firmware."""

    NOT_INITIALIZED = 0
    CHECKS_NOT_PASSED = 1
    CHECKS_PASSED = 2
    ARMING = 3
    READY_TO_FLY = 4
    FLYING = 5
    LANDED = 6
    RESET = 7
    LEVEL_OUT = 8
    FREE_FALL = 9
    LOCKED = 10
    CRASHED = 11


CAN_FLY = frozenset((State.READY_TO_FLY, State.FLYING, State.LEVEL_OUT, State.LANDED))
MOTORS_MAY_RUN = CAN_FLY | {State.ARMING}

LEVEL_OUT_MS, SHUTDOWN_MS = 500, 2000  # age of the setpoint
EMERGENCY_WATCHDOG_MS = 1000
FLYING_HYSTERESIS_MS = 2000  # motors off this long before the drone counts as landed
TILT_G, TILT_MS = 0.5, 1000  # tumbled: accelerometer z below this, for longer than this
UPSIDE_DOWN_G, UPSIDE_DOWN_MS = -0.2, 100
FREE_FALL_G = 0.1  # all axes below: falling is a valid flight mode


class Supervisor:
    """State machine. `update` runs at 25 Hz; requests between updates are taken at once, as on the radio."""

    def __init__(self, auto_arm: bool, console: list[str]):
        self.auto_arm = auto_arm
        self.console = console
        self.state = State.NOT_INITIALIZED
        self.armed = False
        self.crashed = False
        self.tumbled = False
        self.tumble_check = True  # parameter supervisor.tmblChckEn
        self.stop_parameter = False  # parameter stabilizer.stop
        self.preflight_timeout = 30000  # ms, parameter supervisor.prefltTimeout
        self.landed_timeout = 3000  # ms, parameter supervisor.landedTimeout
        self._emergency = False
        self._watchdog: int | None = None  # tick of the last watchdog packet; None until the first one
        self._thrust: int | None = None  # tick when a motor last turned
        self._tumble_begin: int | None = None
        self._ready: int | None = None
        self._landed: int | None = None

    @property
    def can_arm(self) -> bool:
        """True in the one state that accepts arming."""
        return self.state == State.CHECKS_PASSED

    @property
    def can_fly(self) -> bool:
        """True when setpoints are obeyed."""
        return self.state in CAN_FLY

    @property
    def flying(self) -> bool:
        """True while the drone counts as flying."""
        return self.state in (State.FLYING, State.LEVEL_OUT)

    def request_arming(self, on: bool) -> bool:
        """Arm or disarm; False when arming is not possible now."""
        if on == self.armed:
            return True
        if on and not self.can_arm:
            return False
        self.armed = on
        return True

    def request_recovery(self) -> bool:
        """Leave the crashed state; False while still upside down."""
        if self.crashed and self.tumbled:
            return False
        self.crashed = False
        return True

    def emergency_stop(self) -> None:
        """Stop at the next update and lock."""
        self._emergency = True

    def lock(self) -> None:
        """Motors off at once, until reboot."""
        self.state, self.armed = State.LOCKED, False

    def feed_watchdog(self, tick: int) -> None:
        """The first call switches the watchdog on."""
        self._watchdog = tick

    def update(self, tick: int, acc, pwm, setpoint: Setpoint) -> None:
        """One 25 Hz round with accelerometer `acc` (m/s^2), motor `pwm` and the setpoint in use."""
        self.tumbled = self._is_tumbled(tick, acc) and self.tumble_check
        if max(pwm) > 0:
            self._thrust = tick
        spinning = self._thrust is not None and tick - self._thrust < FLYING_HYSTERESIS_MS
        watchdog_late = self._watchdog is not None and tick >= self._watchdog + EMERGENCY_WATCHDOG_MS
        stop = self._emergency or watchdog_late or self.stop_parameter
        new = self._next(tick, stop, spinning, tick - setpoint.stamp)
        if new != self.state:
            self.state = new
            self._entered(tick)

    def override(self, setpoint: Setpoint) -> Setpoint:
        """The setpoint the controller gets."""
        if self.state == State.LEVEL_OUT:
            return commander.level_out(setpoint)
        return setpoint if self.state in MOTORS_MAY_RUN else NULL

    def _next(self, tick, stop, spinning, age):
        """The state machine's transition; the order of the tests is the firmware's."""
        s, S = self.state, State
        if s == S.NOT_INITIALIZED or s == S.RESET:
            return S.CHECKS_NOT_PASSED
        if s == S.FREE_FALL:
            return S.LOCKED
        if s == S.LOCKED:
            return s
        if s == S.CRASHED:
            if not self.crashed and not self.tumbled:
                return S.CHECKS_NOT_PASSED
            return S.LOCKED if stop else s
        if s == S.LANDED:  # an emergency stop here acts by way of RESET or FLYING
            if not self.armed or tick - self._landed > self.landed_timeout:
                return S.RESET
            return S.FLYING if spinning else s
        if stop:
            return S.FREE_FALL
        if s == S.CHECKS_NOT_PASSED:
            return s if self.tumbled else S.CHECKS_PASSED
        if s == S.CHECKS_PASSED:
            if self.tumbled:
                return S.CHECKS_NOT_PASSED
            return S.ARMING if self.armed else s
        if s == S.ARMING:
            return S.CHECKS_NOT_PASSED if self.tumbled or not self.armed else S.READY_TO_FLY
        if s == S.READY_TO_FLY:
            if self.tumbled or not self.armed or tick - self._ready > self.preflight_timeout:
                return S.CHECKS_NOT_PASSED
            return S.FLYING if spinning else s
        if s == S.FLYING:
            if age > SHUTDOWN_MS:
                return S.FREE_FALL
            if self.tumbled:
                return S.CRASHED
            if not self.armed:
                return S.RESET
            if age > LEVEL_OUT_MS:
                return S.LEVEL_OUT
            return s if spinning else S.LANDED
        if age > SHUTDOWN_MS or self.tumbled:  # LEVEL_OUT
            return S.FREE_FALL
        return s if age > LEVEL_OUT_MS else S.FLYING

    def _entered(self, tick):
        """Actions on entering a state."""
        s, S = self.state, State
        if s == S.READY_TO_FLY:
            self._ready = tick
            if not self.auto_arm:
                self.console.append('SUP: Ready to fly')
        elif s == S.LANDED:
            self._landed = tick
        elif s == S.FREE_FALL:
            self.console.append('SUP: free falling!')
        elif s == S.LOCKED:
            self.console.append('SUP: Locked, reboot required')
        elif s == S.CRASHED:
            self.console.append('SUP: Crashed, recovery required')
            self.crashed = True
        if s not in MOTORS_MAY_RUN:
            if self.armed and not self.auto_arm:
                self.console.append('SUP: Disarming')
            self.armed = False
        if self.auto_arm and s == S.CHECKS_PASSED:
            self.armed = True

    def _is_tumbled(self, tick, acc):
        ax, ay, az = (a / GRAVITY for a in acc)
        if max(abs(ax), abs(ay), abs(az)) < FREE_FALL_G:
            self._tumble_begin = None
        if az >= TILT_G:
            self._tumble_begin = None
            return False
        if self._tumble_begin is None:
            self._tumble_begin = tick
        lasted = tick - self._tumble_begin
        return lasted > TILT_MS or (az < UPSIDE_DOWN_G and lasted > UPSIDE_DOWN_MS)
