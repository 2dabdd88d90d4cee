"""The simulated Crazyflie 2.1: plant, sensors and firmware behind one object with simulated time.

Drive it with `step()`; feed it what the radio would deliver, already decoded to SI units. Time is
simulated seconds since start; nothing here reads a clock, and equal seeds and calls give equal flights.

The order within one millisecond is that of the firmware's stabilizer loop (stabilizer.c): sensors,
estimator, high-level commander (100 Hz), commander, supervisor (25 Hz), controller (500 Hz), motors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np

from deqmpc.airframe import GRAVITY, Airframe
from deqmpc.types import RigidBodyState
from sim_env import commander, power_distribution
from sim_env.commander import PRIORITY_HIGH_LEVEL, PRIORITY_STREAM, Commander
from sim_env.estimator import Imu, ImuSettings, KalmanEstimator
from sim_env.high_level import DISABLED, FLYING, HighLevelCommander
from sim_env.mellinger import Mellinger, MellingerGains
from sim_env.plant import Plant, PlantSettings
from sim_env.supervisor import MOTORS_MAY_RUN, State, Supervisor

_CONTROLLER_MS, _HIGH_LEVEL_MS, _SUPERVISOR_MS, _BATTERY_MS = 2, 10, 40, 100
_STOPPED = (0, 0, 0, 0)
_DEGREES = 180.0 / math.pi


@dataclass(frozen=True)
class SimSettings:
    """What can be chosen about one simulated Crazyflie."""

    airframe: Airframe = field(default_factory=Airframe)  # numbers of the body and rotors
    plant: PlantSettings = field(default_factory=PlantSettings)  # motors' curve, battery, ground
    imu: ImuSettings = field(default_factory=ImuSettings)  # sensor noise and biases
    gains: MellingerGains = field(default_factory=MellingerGains)  # start values of the parameters ctrlMel.*
    battery_compensation: bool = True  # thrust held while the voltage falls: the default build for the
    # Crazyflie 2.1 (Kconfig ENABLE_THRUST_BAT_COMPENSATED, default y), and what the recorded flights show;
    # older firmware sends the command as PWM
    auto_arm: bool = True  # arms by itself, the default build for the Crazyflie 2.1


@dataclass
class Parameter:
    """One firmware parameter."""

    ctype: str  # struct format character: B, H, I, b, h, i, f
    value: float
    read_only: bool = False


class SimulatedCrazyflie:
    """A Crazyflie 2.1 with firmware behaviour in simulated time."""

    def __init__(self, settings: SimSettings = SimSettings(), seed: int = 0,
                 position=(0.0, 0.0, 0.0), yaw: float = 0.0):
        self.settings = settings
        self.time = 0.0  # s since start
        self.console: list[str] = []
        rng = np.random.default_rng(seed)
        spread = 1.0 + settings.plant.motor_spread * rng.standard_normal(4)
        self.plant = Plant(settings.airframe, settings.plant, position, yaw, spread.tolist())
        self.imu = Imu(settings.imu, rng)
        self.estimator = KalmanEstimator()
        self._kalman = False  # whether it is chosen: the default build boots with the complementary filter
        self.controller = Mellinger(MellingerGains(**{f.name: getattr(settings.gains, f.name)
                                                      for f in fields(MellingerGains)}))
        self.high_level = HighLevelCommander()
        self.commander = Commander(self.high_level.stop)
        self.supervisor = Supervisor(settings.auto_arm, self.console)
        self.pwm = _STOPPED
        self.target = commander.NULL  # the setpoint the controller last used
        self._info = 0
        self._tick = 0  # ms
        self._commands = (0.0, 0, 0, 0)  # thrust, roll, pitch, yaw of the controller
        self._measurements: list = []
        self._compensation_voltage = 4.2  # V, low-passed supply the motors' commands are corrected with
        self._vbat = self.plant.voltage  # V, as the power management reports it
        self.parameters = self._declare_parameters()
        self.log_variables = self._declare_log_variables()
        self.console += ['SYS: ----------------------------',
                         'SYS: Crazyflie 2.1 (simulated) is up and running!',
                         'ESTIMATOR: Using Complementary (1) estimator', 'CONTROLLER: using Mellinger controller']

    # --- time -----------------------------------------------------------------------------------

    def step(self, steps: int = 1) -> None:
        """Advance `steps` milliseconds."""
        for _ in range(steps):
            self._step()

    def _step(self):
        self._tick = tick = self._tick + 1
        self.time = now = tick * 1e-3
        plant, supervisor, estimator, imu = self.plant, self.supervisor, self.estimator, self.imu
        plant.step(1e-3, self.pwm)
        imu.sample(plant, max(self.pwm) / 65535.0)
        estimator.step(tick, imu.gyro, imu.acc, self._measurements, supervisor.flying)
        self._measurements.clear()

        can_fly = supervisor.can_fly
        self.high_level.block(not can_fly)
        if can_fly and tick % _HIGH_LEVEL_MS == 0 and self.high_level.state != DISABLED:
            goal = self.high_level.setpoint(now, estimator)
            if goal is not None:
                self.commander.set(goal, PRIORITY_HIGH_LEVEL, tick)
        if tick % _SUPERVISOR_MS == 0:
            setpoint = self.commander.setpoint if can_fly else commander.Setpoint(stamp=tick)
            supervisor.update(tick, imu.acc, self.pwm, setpoint)
            self._info = self._bits()
        if tick % _CONTROLLER_MS == 0:
            self._control(can_fly)
        if tick % _BATTERY_MS == 0:
            self._vbat = round(plant.voltage, 3)

    def _control(self, can_fly):
        """One 500 Hz round: setpoint, controller, mixer, battery compensation, joint saturation."""
        self.target = self.supervisor.override(self.commander.setpoint if can_fly else commander.NULL)
        self._commands = command = self.controller.update(self.target, self.estimator, self.imu.gyro)
        # 0.01 a millisecond in the firmware, two milliseconds here.
        self._compensation_voltage += 0.0199 * (self._vbat - self._compensation_voltage)
        if self.supervisor.state not in MOTORS_MAY_RUN:
            self.pwm = _STOPPED
            return
        motors = power_distribution.mix(*command)
        if self.settings.battery_compensation:
            curve, supply = self.settings.plant.motor_curve, self._compensation_voltage
            motors = tuple(power_distribution.compensate(m, supply, curve) for m in motors)
        # The idle thrust parameter acts only on builds that require arming.
        idle = 0 if self.settings.auto_arm else int(self.parameters['powerDist.idleThrust'].value)
        self.pwm = power_distribution.cap(motors, idle)

    def truth(self) -> RigidBodyState:
        """Ground truth, stamped with `self.time`."""
        p = self.plant
        return RigidBodyState(self.time, np.array([p.x, p.y, p.z]), np.array([p.qx, p.qy, p.qz, p.qw]),
                              np.array([p.vx, p.vy, p.vz]), np.array([p.wx, p.wy, p.wz]))

    def place(self, state: RigidBodyState) -> None:
        """Put the body where `state` says and let the estimator know it, as a start in mid-air needs."""
        p, e = self.plant, self.estimator
        p.x, p.y, p.z = map(float, state.position)
        p.vx, p.vy, p.vz = map(float, state.velocity)
        p.qx, p.qy, p.qz, p.qw = map(float, state.quaternion)
        p.wx, p.wy, p.wz = map(float, state.rates)
        e.place((p.x, p.y, p.z), (p.vx, p.vy, p.vz), (p.qx, p.qy, p.qz, p.qw))

    def estimate(self) -> RigidBodyState:
        """What the drone believes; rates are the gyroscope's."""
        e = self.estimator
        return RigidBodyState(self.time, np.array([e.x, e.y, e.z]), np.array([e.qx, e.qy, e.qz, e.qw]),
                              np.array([e.vx, e.vy, e.vz]), np.array(self.imu.gyro))

    # --- setpoints ------------------------------------------------------------------------------

    def _stream(self, setpoint):
        self.commander.set(setpoint, PRIORITY_STREAM, self._tick)

    def set_full_state(self, position, velocity, acceleration, quaternion_xyzw, rates) -> None:
        """Full-state setpoint: m, m/s, m/s^2 (world), body -> world, rad/s (body)."""
        self._stream(commander.full_state(position, velocity, acceleration, quaternion_xyzw, rates))

    def set_position(self, position, yaw) -> None:
        """Position setpoint: m (world), rad."""
        self._stream(commander.position(position, yaw))

    def set_rpyt(self, roll_deg, pitch_deg, yaw_rate_deg_s, thrust_u16) -> None:
        """Attitude setpoint as cflib's send_setpoint; close_link() sends zeros here.

        The legacy packet's pitch is positive nose up and its yaw rate positive clockwise.
        """
        thrust = self.commander.lock_thrust(thrust_u16)
        self._stream(commander.attitude(roll_deg / _DEGREES, -pitch_deg / _DEGREES,
                                        -yaw_rate_deg_s / _DEGREES, thrust))

    def stop_setpoint(self) -> None:
        """Stop the motors (generic setpoint type 0)."""
        self._stream(commander.NULL)

    def notify_setpoint_stop(self, remain_valid_ms: int = 0) -> None:
        """Let the high-level commander take over from the streamed setpoints.

        As in the firmware, `remain_valid_ms` has no effect, and a planner without a trajectory stops the
        motors: a go_to or land sent just before this call keeps the drone in the air.
        """
        self.high_level.tell_state(self.estimator)
        self.commander.relax()

    # --- high-level commander -------------------------------------------------------------------

    def takeoff(self, height: float, duration: float, yaw: float | None = None) -> int:
        """Climb to `height` (m, absolute) in `duration` (s); 0 or an errno."""
        return self.high_level.takeoff(self.time, height, duration, yaw)

    def land(self, height: float, duration: float, yaw: float | None = None) -> int:
        """Descend to `height` (m, absolute) in `duration` (s), then stop; 0 or an errno."""
        return self.high_level.land(self.time, height, duration, yaw)

    def go_to(self, position, yaw: float, duration: float, relative: bool = False) -> int:
        """Fly to `position` (m) and `yaw` (rad) in `duration` (s); 0 or an errno."""
        return self.high_level.go_to(self.time, position, yaw, duration, relative)

    def high_level_stop(self) -> int:
        """Stop the planner, and with it the motors unless setpoints are streamed; 0."""
        return self.high_level.stop()

    # --- localisation ---------------------------------------------------------------------------

    def receive_extpos(self, position) -> None:
        """External position (m, world)."""
        self._measure(position, None, 0.0)

    def receive_extpose(self, position, quaternion_xyzw) -> None:
        """External pose (m, world; body -> world)."""
        self._measure(position, tuple(map(float, quaternion_xyzw)), self._std('extQuatStdDev'))

    def _measure(self, position, quaternion, attitude_std):
        if self._kalman:  # the complementary filter has no use for them
            self._measurements.append((tuple(map(float, position)), quaternion, self._std('extPosStdDev'),
                                       attitude_std))

    def _std(self, name):
        return self.parameters['locSrv.' + name].value

    # --- supervisor -----------------------------------------------------------------------------

    def arm(self, on: bool) -> bool:
        """Arm or disarm; False when refused."""
        return self.supervisor.request_arming(bool(on))

    def recover(self) -> bool:
        """Ask to leave the crashed state; False when refused."""
        return self.supervisor.request_recovery()

    def emergency_stop(self) -> None:
        """Motors off and locked until reboot."""
        self.supervisor.emergency_stop()

    def fail_assertion(self) -> None:
        """What a failed assertion of the firmware does: it restarts, fails its self test for that reason and stays off
        until the next restart."""
        self.console.append('SYS: Assert failed')
        self.supervisor.lock()

    def emergency_watchdog(self) -> None:
        """Feed the emergency-stop watchdog; the first call enables it."""
        self.supervisor.feed_watchdog(self._tick)

    @property
    def armed(self) -> bool:
        """At this instant, as the answer to an arming request says it."""
        return self.supervisor.armed

    @property
    def crashed(self) -> bool:
        """At this instant, as the answer to a recovery request says it."""
        return self.supervisor.crashed

    @property
    def supervisor_info(self) -> int:
        """Bits, as of the supervisor's last round (25 Hz): 0 canArm, 1 armed, 2 autoArm, 3 canFly, 4 flying, 5 tumbled,
        6 locked, 7 crashed, 8 high-level trajectory active, 9 trajectory finished, 10 high-level disabled."""
        return self._info

    def _bits(self) -> int:
        s, h = self.supervisor, self.high_level
        bits = (s.can_arm, s.armed, s.auto_arm, s.can_fly, s.flying, s.tumbled,
                s.state == State.LOCKED, s.crashed,
                h.state & FLYING == FLYING, h.finished(self.time), h.state == DISABLED)
        return sum(1 << i for i, bit in enumerate(bits) if bit)

    # --- parameters -----------------------------------------------------------------------------

    def set_parameter(self, name: str, value: float) -> None:
        """Write a parameter. KeyError: unknown; ValueError: read only or does not fit its type."""
        if name not in self.parameters:
            raise KeyError(f'unknown parameter {name!r}; the simulated Crazyflie has {len(self.parameters)}')
        p = self.parameters[name]
        if p.read_only:
            raise ValueError(f'parameter {name} is read only')
        try:
            number = float(value) if p.ctype == 'f' else int(value)
            p.value, = struct.unpack('<' + p.ctype, struct.pack('<' + p.ctype, number))
        except (struct.error, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f'parameter {name} = {value!r}; expected a number that fits the C type '
                             f'{p.ctype!r}') from error
        self._apply(name, p)

    def _apply(self, name, p):
        """Let a written parameter act."""
        group, _, leaf = name.partition('.')
        if group == 'ctrlMel':
            setattr(self.controller.gains, leaf, p.value)
        elif name == 'stabilizer.controller' and p.value != 2:
            self.console.append(f'CONTROLLER: {int(p.value)} is not simulated, flying Mellinger (2)')
        elif name == 'stabilizer.estimator':
            self._choose_estimator(int(p.value))
        elif name == 'stabilizer.stop':
            self.supervisor.stop_parameter = bool(p.value)
        elif name == 'kalman.resetEstimation' and p.value:
            p.value = 0
            self.estimator = self._fresh_estimator()
        elif name == 'supervisor.tmblChckEn':
            self.supervisor.tumble_check = bool(p.value)
        elif name == 'supervisor.prefltTimeout':
            self.supervisor.preflight_timeout = p.value
        elif name == 'supervisor.landedTimeout':
            self.supervisor.landed_timeout = p.value

    def _fresh_estimator(self):
        return KalmanEstimator([self.parameters['kalman.initial' + a].value for a in 'XYZ'],
                               self.parameters['kalman.initialYaw'].value)

    def _choose_estimator(self, number):
        """2 starts the Kalman filter, unless it runs; with every other one external poses are not heard."""
        if number == 2 and not self._kalman:
            self.estimator = self._fresh_estimator()
            self.console.append('ESTIMATOR: Using Kalman (2) estimator')
        elif number != 2:
            self.console.append(f'ESTIMATOR: {number} is not simulated: no external poses, no position')
        self._kalman = number == 2

    def _declare_parameters(self):
        parameters = {
            'stabilizer.estimator': Parameter('B', 1), 'stabilizer.controller': Parameter('B', 1),
            'stabilizer.stop': Parameter('B', 0), 'commander.enHighLevel': Parameter('B', 0),
            'locSrv.extPosStdDev': Parameter('f', 0.01), 'locSrv.extQuatStdDev': Parameter('f', 4.5e-3),
            'kalman.resetEstimation': Parameter('B', 0), 'kalman.initialX': Parameter('f', 0.0),
            'kalman.initialY': Parameter('f', 0.0), 'kalman.initialZ': Parameter('f', 0.0),
            'kalman.initialYaw': Parameter('f', 0.0),
            'supervisor.tmblChckEn': Parameter('B', 1), 'supervisor.prefltTimeout': Parameter('H', 30000),
            'supervisor.landedTimeout': Parameter('H', 3000), 'powerDist.idleThrust': Parameter('I', 0),
            'pm.lowVoltage': Parameter('f', 3.2), 'pm.criticalLowVoltage': Parameter('f', 3.0),
            'system.taskDump': Parameter('B', 0), 'system.selftestPassed': Parameter('b', 1, read_only=True),
            'firmware.revision0': Parameter('I', 0x2A18FC29, read_only=True),
            'firmware.revision1': Parameter('H', 0, read_only=True),
            'firmware.modified': Parameter('B', 0, read_only=True),
            'deck.bcFlow2': Parameter('B', 0, read_only=True),
        }
        for f in fields(MellingerGains):
            parameters['ctrlMel.' + f.name] = Parameter('f', getattr(self.controller.gains, f.name))
        return parameters

    # --- log variables --------------------------------------------------------------------------

    def _battery_state(self):
        """PM state: 0 on battery, 3 low power."""
        return 3.0 if self._vbat < self.parameters['pm.lowVoltage'].value else 0.0

    def _declare_log_variables(self) -> dict[str, tuple[str, Callable[[], float]]]:
        def bit(k):
            return lambda: float(self.supervisor_info >> k & 1)
        def estimate(name, scale=1.0):
            return lambda: scale * getattr(self.estimator, name)
        def variance(k):
            return lambda: float(self.estimator.P[k, k])
        log = {'supervisor.info': ('H', lambda: float(self.supervisor_info)),
               'sys.canfly': ('B', bit(3)), 'sys.isFlying': ('B', bit(4)), 'sys.isTumbled': ('B', bit(5)),
               'pm.vbat': ('f', lambda: self._vbat), 'pm.vbatMV': ('H', lambda: round(1000.0 * self._vbat)),
               'pm.batteryLevel': ('B', lambda: round(100.0 * self.plant.charge)),
               'pm.state': ('b', self._battery_state),
               'ctrltarget.yaw': ('f', lambda: _DEGREES * self.target.yaw),
               'controller.cmd_thrust': ('f', lambda: self._commands[0])}
        for i, axis in enumerate('xyz'):
            log['stateEstimate.' + axis] = ('f', estimate(axis))
            log['stateEstimate.v' + axis] = ('f', estimate('v' + axis))
            log['kalman.var' + axis.upper()] = ('f', variance(i))
            log['kalman.varP' + axis.upper()] = ('f', variance(3 + i))
            log[f'kalman.varD{i}'] = ('f', variance(6 + i))
            log['ctrltarget.' + axis] = ('f', lambda i=i: self.target.position[i])
            log['ctrltarget.v' + axis] = ('f', lambda i=i: self.target.velocity[i])
            log['gyro.' + axis] = ('f', lambda i=i: _DEGREES * self.imu.gyro[i])
            log['acc.' + axis] = ('f', lambda i=i: self.imu.acc[i] / GRAVITY)
        # The firmware's legacy pitch is positive nose up.
        for name, scale in (('roll', _DEGREES), ('pitch', -_DEGREES), ('yaw', _DEGREES)):
            log['stateEstimate.' + name] = log['stabilizer.' + name] = ('f', estimate(name, scale))
        for name in ('qx', 'qy', 'qz', 'qw'):
            log['stateEstimate.' + name] = ('f', estimate(name))
        for i in range(4):
            log[f'motor.m{i + 1}'] = ('H', lambda i=i: float(self.pwm[i]))
        return log
