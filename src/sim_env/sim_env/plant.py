"""The physics of one Crazyflie: rigid body, four motors, battery, ground.

Notation (SI): p, v position and velocity in the world (z up); q = (x, y, z, w) body -> world with rotation
matrix R; w body rates; F1..F4 rotor thrusts, laid out as in `deqmpc.airframe`; V battery voltage at the
motors' supply; u_i = PWM / 65535.

  v_motor = u_i V                     F_i* = s_i (a0 + a1 v_motor + a2 v_motor^2 + a3 v_motor^3), >= 0
  dF_i/dt = (F_i* - F_i) / tau                                                   (first-order motor lag)
  f_drag = -D (R^T v + w x h e3)                         (linear, body axes, acting at height h)
  m dv/dt = -m g e3 + R (sum F_i e3 + f_drag) + push + contact
  J dw/dt = -w x J w + (torque_x, torque_y, torque_z)(F) + h e3 x f_drag + contact torque
  V = E(charge) - R_b I,  I = P / V + I_0,  P = k_p sum F_i^1.5                  (momentum theory)
  near the ground a rotor at height h_i gives F_i (1 + k_g (r / (4 h_i))^2)      (r its radius)

push is a force at the centre of mass that a test applies, else zero. h is an effective height: in forward
flight the rotors flap and tilt the body back, as if the drag pulled
well above them. Taken as a lever of the drag it can only take energy out. The cubic is Bitcraze's
identification of thrust against motor voltage (crazyflie-firmware, platform_defaults_cf2.h; bitcraze.io
blog, "Keeping thrust consistent as the battery drains").

The last line is Cheeseman and Bennett's (1955) to first order in (r / 4 h)^2, with a factor k_g for four rotors and a
body between them (Shi et al., Neural lander, 2019). The NanoBench flight helix_fast_mell rises from the floor with
1.21, 1.14, 1.07, 1.01 of its thrust in the air at 3, 15, 41, 78 mm; k_g = 7 gives 1.21, 1.12, 1.05, 1.02. The other
three recordings begin and end in the air.

The ground is one of two. `springs`: damped springs under the corners that only push, with friction that is viscous at
low speed. They give way (1.7 mm when hit at 1 m/s, 9 mm at 4.4 m/s, then 17 mm of rebound) and creep (5 mm/s under a
side force of a tenth of the friction). `cones`: rigid, inelastic, with friction that sticks, by the contact conditions
of deqmpc.dynamics.optimization_based.ground_contact; 7 us more a step.

One step is 1 ms: thrust lag in closed form, position by the second-order Taylor step (exact in free
fall), rates by the midpoint rule, attitude by the exact rotation of the midpoint rate. Plain floats
throughout: at this size an array costs more than the arithmetic in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deqmpc.airframe import GRAVITY, Airframe

MOTOR_LEGACY = (-0.014830744918356092, 0.04724465241828281, -0.01847364358025878, 0.005960923942142)
MOTOR_21PLUS = (-0.02476537915958403, 0.06523793527519485, -0.026792504967750107, 0.006776789303971145)

# Open-circuit voltage of a LiPo cell at 0, 10, ... 100 % charge (crazyflie-firmware, pm_stm32f4.c).
_OPEN_CIRCUIT = (3.00, 3.78, 3.83, 3.87, 3.89, 3.92, 3.96, 4.00, 4.04, 4.10, 4.20)

# Corners of the body (m, body axes) that can touch the ground: the feet below the motors, at the level
# that makes `floor` the height of the origin at rest, and the rotor tips above them.
_FOOT_DEPTH = 0.015
_TOP_HEIGHT = 0.020
_ROTOR_HEIGHT = 0.015  # m over the origin: the rotors of a standing drone are 30 mm over the ground
_ROTOR_RADIUS = 0.0231  # m
_FRICTION = 0.6  # coefficient of plastic feet on the floor
_NEAR = 1e-4  # m of predicted gap below which `cones` are solved


@dataclass(frozen=True)
class PlantSettings:
    """The body's numbers that are not in `Airframe`."""

    motor_curve: tuple[float, float, float, float] = MOTOR_21PLUS  # a0..a3 above, N and V
    thrust_scale: float = 1.0  # s above, common to all motors: propeller wear, air density
    motor_spread: float = 0.02  # standard deviation of s from motor to motor, drawn by the seed
    drag_height: float = 0.043  # m, h above; the moment (4.6-6.4)e-4 N m per m/s that the motors balance in
    # the four NanoBench flights (R^2 0.81-0.95), over their drag of 0.0125 N s/m
    battery_capacity: float = 0.25  # Ah (the 2.1's standard 250 mAh cell)
    battery_resistance: float = 0.20  # ohm; 4.11 V at rest falls to 3.68 V at hover, 3.53 V rises to
    # 3.97 V on landing (NanoBench, helix flight), at about 2.1 A
    battery_charge: float = 1.0  # fraction at start
    power_coefficient: float = 85.0  # W / N^1.5; 7.8 W at hover, Bitcraze's 7 minutes of flight
    idle_current: float = 0.12  # A, electronics and radio
    floor: float = 0.0  # m, height of the body's origin when it stands on the ground
    contact: str = 'springs'  # what the ground is: springs, or cones (needs a C compiler)
    ground_effect: float = 0.0  # k_g above; 7 fits the recorded take-off, 0: none

    def __post_init__(self):
        if self.contact not in ('springs', 'cones'):
            raise ValueError(f'PlantSettings.contact = {self.contact!r}; expected springs or cones')
        if not 0.0 <= self.ground_effect < 20.0:
            raise ValueError(f'PlantSettings.ground_effect = {self.ground_effect!r}; expected 0 to 20')
        positive = ('thrust_scale', 'battery_capacity', 'power_coefficient')
        for name in positive:
            if not getattr(self, name) > 0.0:
                raise ValueError(f'PlantSettings.{name} = {getattr(self, name)!r}; expected a number > 0')
        if not 0.0 <= self.battery_charge <= 1.0:
            raise ValueError(f'PlantSettings.battery_charge = {self.battery_charge!r}; expected 0 to 1')


def open_circuit_voltage(charge: float) -> float:
    """E(charge) in V, `charge` in 0..1."""
    s = min(max(charge, 0.0), 1.0) * 10.0
    i = min(int(s), 9)
    return _OPEN_CIRCUIT[i] + (s - i) * (_OPEN_CIRCUIT[i + 1] - _OPEN_CIRCUIT[i])


def _contact_step(airframe):
    """The contact conditions of `airframe`. ValueError where they cannot be compiled."""
    from deqmpc.dynamics.optimization_based.ground_contact import ContactStep  # a second; most do without
    from deqmpc.realtime.build import NoCompiler
    try:
        return ContactStep(airframe.mass, airframe.inertia, _FRICTION)
    except NoCompiler as error:
        raise ValueError(f"PlantSettings.contact = 'cones': {error}; expected springs without a C compiler") from error


class Plant:
    """State and step of the physics. All attributes are floats in the units above."""

    __slots__ = (
        'airframe', 'settings', 'x', 'y', 'z', 'vx', 'vy', 'vz', 'qx', 'qy', 'qz', 'qw', 'wx', 'wy', 'wz',
        'f1', 'f2', 'f3', 'f4', 'voltage', 'charge', 'fixed_voltage', 'push', 'on_ground',
        'ax_body', 'ay_body', 'az_body', '_scale', '_stiffness', '_damping', '_corners', '_contact_step')

    def __init__(self, airframe: Airframe, settings: PlantSettings, position=(0.0, 0.0, 0.0),
                 yaw: float = 0.0, motor_scales=(1.0, 1.0, 1.0, 1.0)):
        self.airframe, self.settings = airframe, settings
        self.x, self.y, self.z = map(float, position)
        self.vx = self.vy = self.vz = 0.0
        self.qx = self.qy = 0.0
        self.qz, self.qw = math.sin(yaw / 2.0), math.cos(yaw / 2.0)
        self.wx = self.wy = self.wz = 0.0
        self.f1 = self.f2 = self.f3 = self.f4 = 0.0
        self.charge = settings.battery_charge
        self.voltage = open_circuit_voltage(self.charge) - settings.battery_resistance * settings.idle_current
        self.fixed_voltage: float | None = None  # V, when a recording or a test supplies the voltage
        self.push: tuple[float, float, float] | None = None  # N, world
        self.on_ground = False
        self.ax_body, self.ay_body, self.az_body = 0.0, 0.0, GRAVITY  # specific force
        self._scale = tuple(settings.thrust_scale * s for s in motor_scales)
        # Each foot carries a quarter of the weight at 0.2 mm; critically damped, stable at 1 ms.
        self._stiffness = airframe.mass * GRAVITY / 4.0 / 2e-4
        self._damping = math.sqrt(self._stiffness * airframe.mass)
        d = airframe.motor_offset
        self._corners = tuple((sx * d, sy * d, h) for h in (-_FOOT_DEPTH, _TOP_HEIGHT)
                              for sx in (1.0, -1.0) for sy in (1.0, -1.0))
        self._contact_step = None
        if settings.contact == 'cones':
            self._contact_step = _contact_step(airframe)

    def weaken(self, motor: int, factor: float) -> None:
        """Let `motor` (0..3) give `factor` times the thrust it gave."""
        self._scale = tuple(factor * s if i == motor else s for i, s in enumerate(self._scale))

    def rotation(self) -> tuple[float, ...]:
        """R, row by row (9 floats)."""
        x, y, z, w = self.qx, self.qy, self.qz, self.qw
        return (1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
                2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
                2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y))

    def motor_thrust(self, pwm: float, motor: int) -> float:
        """Steady thrust (N) of `motor` (0..3) at `pwm` (0..65535) and the present voltage."""
        a0, a1, a2, a3 = self.settings.motor_curve
        v = self.voltage * pwm / 65535.0
        return max(0.0, self._scale[motor] * (a0 + v * (a1 + v * (a2 + v * a3))))

    def step(self, dt: float, pwm) -> None:
        """Advance by `dt` (s) with `pwm`, four values 0..65535."""
        frame = self.airframe
        self._step_battery(dt)
        blend = 1.0 - math.exp(-dt / frame.motor_time_constant) if frame.motor_time_constant > 0.0 else 1.0
        self.f1 += blend * (self.motor_thrust(pwm[0], 0) - self.f1)
        self.f2 += blend * (self.motor_thrust(pwm[1], 1) - self.f2)
        self.f3 += blend * (self.motor_thrust(pwm[2], 2) - self.f3)
        self.f4 += blend * (self.motor_thrust(pwm[3], 3) - self.f4)
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = R = self.rotation()
        f1, f2, f3, f4 = thrusts = self.f1, self.f2, self.f3, self.f4
        above = self.z - self.settings.floor
        if above < 0.5 and self.settings.ground_effect:
            f1, f2, f3, f4 = self._near_ground(thrusts, R)
        d, c = frame.motor_offset, frame.thrust_to_torque
        tx, ty, tz = d * (-f1 - f2 + f3 + f4), d * (-f1 + f2 + f3 - f4), c * (-f1 + f2 - f3 + f4)

        vx, vy, vz = self.vx, self.vy, self.vz
        dx, dy, dz = frame.drag
        h = self.settings.drag_height
        fx = -dx * (r00 * vx + r10 * vy + r20 * vz + h * self.wy)  # force in body axes, without weight
        fy = -dy * (r01 * vx + r11 * vy + r21 * vz - h * self.wx)
        tx, ty = tx - h * fy, ty + h * fx
        fz = f1 + f2 + f3 + f4 - dz * (r02 * vx + r12 * vy + r22 * vz)
        if self.push is not None:
            px, py, pz = self.push
            fx, fy, fz = (fx + r00 * px + r10 * py + r20 * pz, fy + r01 * px + r11 * py + r21 * pz,
                          fz + r02 * px + r12 * py + r22 * pz)
        self.on_ground = False
        if above < 0.05 and self._contact_step is None:
            cx, cy, cz, ctx, cty, ctz = self._contact(R)
            fx, fy, fz, tx, ty, tz = fx + cx, fy + cy, fz + cz, tx + ctx, ty + cty, tz + ctz

        m = frame.mass
        self.ax_body, self.ay_body, self.az_body = ax, ay, az = fx / m, fy / m, fz / m
        gx = r00 * ax + r01 * ay + r02 * az
        gy = r10 * ax + r11 * ay + r12 * az
        gz = r20 * ax + r21 * ay + r22 * az - GRAVITY
        self.vx, self.vy, self.vz = vx + dt * gx, vy + dt * gy, vz + dt * gz
        mx, my, mz = self._turn(dt, tx, ty, tz)
        if above < 0.05 and self._contact_step is not None and self._land(dt, R, vx, vy, vz):
            self.x, self.y, self.z = self.x + dt * self.vx, self.y + dt * self.vy, self.z + dt * self.vz
            self._rotate(dt, self.wx, self.wy, self.wz)
            return
        self.x += dt * (vx + 0.5 * dt * gx)
        self.y += dt * (vy + 0.5 * dt * gy)
        self.z += dt * (vz + 0.5 * dt * gz)
        self._rotate(dt, mx, my, mz)

    def _near_ground(self, thrusts, R):
        """`thrusts` (4) with the ground effect, rotor by rotor."""
        d, r20, r21 = self.airframe.motor_offset, R[6], R[7]
        hub = self.z - self.settings.floor + _FOOT_DEPTH + _ROTOR_HEIGHT * R[8]
        k = self.settings.ground_effect * (0.25 * _ROTOR_RADIUS) ** 2
        places = ((1.0, -1.0), (-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
        heights = (max(hub + d * (r20 * sx + r21 * sy), _ROTOR_RADIUS) for sx, sy in places)
        return [f * (1.0 + k / (h * h)) for f, h in zip(thrusts, heights, strict=True)]

    def _land(self, dt, R, vx, vy, vz):
        """Let the ground act on the velocities after a step, which were `vx, vy, vz` before it. Whether it did."""
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = R
        ground, wx, wy, wz = self.settings.floor - _FOOT_DEPTH, self.wx, self.wy, self.wz
        near = []
        for px, py, pz in self._corners:
            gap = self.z + r20 * px + r21 * py + r22 * pz - ground
            rate = self.vz + r20 * (wy * pz - wz * py) + r21 * (wz * px - wx * pz) + r22 * (wx * py - wy * px)
            near.append((gap + dt * rate, gap, (px, py, pz)))
        near.sort()
        if near[0][0] > _NEAR:
            return False
        free = self.vx, self.vy, self.vz
        gaps, corners = [gap for _, gap, _ in near[:4]], [a for _, _, p in near[:4] for a in p]
        *v, self.wx, self.wy, self.wz = self._contact_step.velocities(free, (wx, wy, wz), R, gaps, corners, dt)
        self.vx, self.vy, self.vz = v
        self.on_ground = v[2] - free[2] > 1e-6
        gx, gy, gz = (v[0] - vx) / dt, (v[1] - vy) / dt, (v[2] - vz) / dt + GRAVITY
        self.ax_body, self.ay_body = r00 * gx + r10 * gy + r20 * gz, r01 * gx + r11 * gy + r21 * gz
        self.az_body = r02 * gx + r12 * gy + r22 * gz
        return True

    def _turn(self, dt, tx, ty, tz):
        """Euler's equations by the midpoint rule. Returns the midpoint's rates."""
        jx, jy, jz = self.airframe.inertia
        wx, wy, wz = self.wx, self.wy, self.wz
        h = 0.5 * dt
        mx = wx + h * (tx + (jy - jz) * wy * wz) / jx
        my = wy + h * (ty + (jz - jx) * wz * wx) / jy
        mz = wz + h * (tz + (jx - jy) * wx * wy) / jz
        self.wx = wx + dt * (tx + (jy - jz) * my * mz) / jx
        self.wy = wy + dt * (ty + (jz - jx) * mz * mx) / jy
        self.wz = wz + dt * (tz + (jx - jy) * mx * my) / jz
        return mx, my, mz

    def _rotate(self, dt, mx, my, mz):
        """The exact rotation by constant rates."""
        h = 0.5 * dt
        rate = math.sqrt(mx * mx + my * my + mz * mz)
        if rate < 1e-12:
            return
        s, c = math.sin(h * rate) / rate, math.cos(h * rate)
        ex, ey, ez = s * mx, s * my, s * mz
        x, y, z, w = self.qx, self.qy, self.qz, self.qw
        nx = w * ex + c * x + y * ez - z * ey
        ny = w * ey + c * y + z * ex - x * ez
        nz = w * ez + c * z + x * ey - y * ex
        nw = w * c - x * ex - y * ey - z * ez
        n = 1.0 / math.sqrt(nx * nx + ny * ny + nz * nz + nw * nw)
        self.qx, self.qy, self.qz, self.qw = n * nx, n * ny, n * nz, n * nw

    def _contact(self, R):
        """Force and torque of the ground in body axes: damped springs that only push, with friction."""
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = R
        ground = self.settings.floor - _FOOT_DEPTH
        k, b, mu, slip = self._stiffness, self._damping, _FRICTION, 0.05
        wx, wy, wz = self.wx, self.wy, self.wz
        sx = sy = sz = tx = ty = tz = 0.0
        for px, py, pz in self._corners:
            depth = ground - (self.z + r20 * px + r21 * py + r22 * pz)
            if depth <= 0.0:
                continue
            ux, uy, uz = wy * pz - wz * py, wz * px - wx * pz, wx * py - wy * px
            cx = self.vx + r00 * ux + r01 * uy + r02 * uz
            cy = self.vy + r10 * ux + r11 * uy + r12 * uz
            cz = self.vz + r20 * ux + r21 * uy + r22 * uz
            normal = k * depth - b * cz
            if normal <= 0.0:
                continue
            self.on_ground = True
            # Coulomb friction, viscous below the slip speed so that a body at rest stays at rest.
            grip = -mu * normal / max(math.hypot(cx, cy), slip)
            gx, gy = grip * cx, grip * cy
            bx = r00 * gx + r10 * gy + r20 * normal
            by = r01 * gx + r11 * gy + r21 * normal
            bz = r02 * gx + r12 * gy + r22 * normal
            sx, sy, sz = sx + bx, sy + by, sz + bz
            tx, ty, tz = tx + py * bz - pz * by, ty + pz * bx - px * bz, tz + px * by - py * bx
        return sx, sy, sz, tx, ty, tz

    def _step_battery(self, dt):
        """Discharge and sag; a `fixed_voltage` replaces both."""
        if self.fixed_voltage is not None:
            self.voltage = self.fixed_voltage
            return
        s = self.settings
        power = s.power_coefficient * (self.f1 * math.sqrt(self.f1) + self.f2 * math.sqrt(self.f2)
                                       + self.f3 * math.sqrt(self.f3) + self.f4 * math.sqrt(self.f4))
        current = power / max(self.voltage, 1.0) + s.idle_current
        self.charge = max(0.0, self.charge - current * dt / (3600.0 * s.battery_capacity))
        target = max(0.0, open_circuit_voltage(self.charge) - s.battery_resistance * current)
        self.voltage += (target - self.voltage) * min(1.0, dt / 0.02)  # the pack's own short memory

    def energy(self) -> float:
        """Kinetic and potential energy (J), potential zero at the origin's height z = 0."""
        jx, jy, jz = self.airframe.inertia
        m = self.airframe.mass
        return (0.5 * m * (self.vx ** 2 + self.vy ** 2 + self.vz ** 2) + m * GRAVITY * self.z
                + 0.5 * (jx * self.wx ** 2 + jy * self.wy ** 2 + jz * self.wz ** 2))
