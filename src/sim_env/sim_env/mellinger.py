"""The Mellinger controller as the Crazyflie firmware flies it (controller_mellinger.c, 500 Hz).

D. Mellinger and V. Kumar, "Minimum snap trajectory generation and control for quadrotors", ICRA 2011,
with the firmware's integral terms and its derivative of the rate error. Notation: e_p, e_v position and
velocity error (setpoint minus state), R = [bx by bz] attitude, R_d = [dx dy dz] desired attitude.

  F   = m (a_d + g e3) + kp e_p + kd e_v + ki int(e_p)          thrust = massThrust (F . bz)
  dz  = F / |F|,  dy = dz x (cos yaw, sin yaw, 0) / |.|,  dx = dy x dz
  e_R = vee(R_d^T R - R^T R_d)                                  (no factor 1/2)
  M   = -kR e_R + kw (w_d - w) + ki_m int(-e_R) + kd_omega d/dt(w_d - w)

The firmware's own frame turns pitch around (x forward, y right as far as pitch is concerned): `pitch`
of the output raises the nose when positive, `yaw` is the negated moment about body z. Gyroscope rates
are measured, not estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deqmpc.airframe import GRAVITY
from sim_env.commander import Setpoint

DT = 1.0 / 500.0  # s


@dataclass(slots=True)
class MellingerGains:
    """The firmware's parameters `ctrlMel.*`, by the same names and with its defaults."""

    mass: float = 0.029  # kg
    massThrust: float = 132000.0  # PWM counts per N
    kp_xy: float = 0.4
    kd_xy: float = 0.2
    ki_xy: float = 0.05
    i_range_xy: float = 2.0
    kp_z: float = 1.25
    kd_z: float = 0.4
    ki_z: float = 0.05
    i_range_z: float = 0.4
    kR_xy: float = 70000.0
    kw_xy: float = 20000.0
    ki_m_xy: float = 0.0
    i_range_m_xy: float = 1.0
    kR_z: float = 60000.0
    kw_z: float = 12000.0
    ki_m_z: float = 500.0
    i_range_m_z: float = 1500.0
    kd_omega_rp: float = 200.0


def _clamp(x, low, high):
    return low if x < low else high if x > high else x


class Mellinger:
    """Controller state: integrals and the last rate error."""

    def __init__(self, gains: MellingerGains | None = None):
        self.gains = gains or MellingerGains()
        self._last = (0.0, 0.0, 0.0, 0.0)  # w_x, w_y measured and desired at the last call
        self.reset()

    def reset(self) -> None:
        """Clear the integrals, as the firmware does whenever the thrust is zero."""
        self.ix = self.iy = self.iz = 0.0
        self.imx = self.imy = self.imz = 0.0

    def update(self, setpoint: Setpoint, state, gyro) -> tuple[float, int, int, int]:
        """(thrust, roll, pitch, yaw) for the mixer.

        `state` has x y z vx vy vz (m, m/s, world), qx qy qz qw (body -> world) and yaw (rad);
        `gyro` is (wx, wy, wz) in rad/s, body.
        """
        g = self.gains
        (px, py, pz), (vx, vy, vz) = setpoint.position, setpoint.velocity
        ex, ey, ez = px - state.x, py - state.y, pz - state.z
        ux, uy, uz = vx - state.vx, vy - state.vy, vz - state.vz
        self.ix = _clamp(self.ix + ex * DT, -g.i_range_xy, g.i_range_xy)
        self.iy = _clamp(self.iy + ey * DT, -g.i_range_xy, g.i_range_xy)
        self.iz = _clamp(self.iz + ez * DT, -g.i_range_z, g.i_range_z)

        qx, qy, qz, qw = state.qx, state.qy, state.qz, state.qw
        bx0, by0, bz0 = 1.0 - 2.0 * (qy * qy + qz * qz), 2.0 * (qx * qy - qw * qz), 2.0 * (qx * qz + qw * qy)
        bx1, by1, bz1 = 2.0 * (qx * qy + qw * qz), 1.0 - 2.0 * (qx * qx + qz * qz), 2.0 * (qy * qz - qw * qx)
        bx2, by2, bz2 = 2.0 * (qx * qz - qw * qy), 2.0 * (qy * qz + qw * qx), 1.0 - 2.0 * (qx * qx + qy * qy)

        if setpoint.yaw_mode == 'rate':
            yaw = state.yaw + setpoint.rates[2] * DT
        elif setpoint.yaw_mode == 'none':
            yaw = 0.0
        else:
            yaw = setpoint.yaw

        lift = 0.0
        if setpoint.track_tilt and not setpoint.track_height:
            dx, dy, dz = _axes_of_angles(setpoint.roll, setpoint.pitch, yaw)
        else:
            if setpoint.track_position:
                ax, ay, az = setpoint.acceleration
                fx = g.mass * ax + g.kp_xy * ex + g.kd_xy * ux + g.ki_xy * self.ix
                fy = g.mass * ay + g.kp_xy * ey + g.kd_xy * uy + g.ki_xy * self.iy
            else:  # height only: stay level, keep the heading
                fx = fy = az = 0.0
                yaw = state.yaw
            fz = g.mass * (az + GRAVITY) + g.kp_z * ez + g.kd_z * uz + g.ki_z * self.iz
            lift = fx * bz0 + fy * bz1 + fz * bz2
            dx, dy, dz = _axes_of_thrust(fx, fy, fz, yaw)

        erx = (dz[0] * by0 + dz[1] * by1 + dz[2] * by2) - (bz0 * dy[0] + bz1 * dy[1] + bz2 * dy[2])
        # Negated: pitch is inverted in the firmware's frame.
        ery = (bx0 * dz[0] + bx1 * dz[1] + bx2 * dz[2]) - (dx[0] * bz0 + dx[1] * bz1 + dx[2] * bz2)
        erz = (dy[0] * bx0 + dy[1] * bx1 + dy[2] * bx2) - (by0 * dx[0] + by1 * dx[1] + by2 * dx[2])

        wx, wy, wz = gyro
        sx, sy, sz = setpoint.rates
        last_wx, last_wy, last_sx, last_sy = self._last
        drx = ((sx - last_sx) - (wx - last_wx)) / DT
        dry = (-(sy - last_sy) + (wy - last_wy)) / DT
        self._last = (wx, wy, sx, sy)

        self.imx = _clamp(self.imx - erx * DT, -g.i_range_m_xy, g.i_range_m_xy)
        self.imy = _clamp(self.imy - ery * DT, -g.i_range_m_xy, g.i_range_m_xy)
        self.imz = _clamp(self.imz - erz * DT, -g.i_range_m_z, g.i_range_m_z)
        mx = -g.kR_xy * erx + g.kw_xy * (sx - wx) + g.ki_m_xy * self.imx + g.kd_omega_rp * drx
        my = -g.kR_xy * ery + g.kw_xy * (wy - sy) + g.ki_m_xy * self.imy + g.kd_omega_rp * dry
        mz = -g.kR_z * erz + g.kw_z * (sz - wz) + g.ki_m_z * self.imz

        thrust = g.massThrust * lift if setpoint.track_height else setpoint.thrust
        # Not `thrust <= 0`: a NaN anywhere in the state or setpoint must stop the motors too.
        if not (thrust > 0.0 and mx == mx and my == my and mz == mz):
            self.reset()
            return 0.0, 0, 0, 0
        return (thrust, int(_clamp(mx, -32000, 32000)), int(_clamp(my, -32000, 32000)),
                int(_clamp(-mz, -32000, 32000)))


def _axes_of_thrust(fx, fy, fz, yaw):
    """Desired axes (dx, dy, dz) from the force and the heading."""
    n = math.sqrt(fx * fx + fy * fy + fz * fz) or 1.0
    zx, zy, zz = fx / n, fy / n, fz / n
    c, s = math.cos(yaw), math.sin(yaw)
    yx, yy, yz = -zz * s, zz * c, zx * s - zy * c
    n = math.sqrt(yx * yx + yy * yy + yz * yz) or 1.0
    yx, yy, yz = yx / n, yy / n, yz / n
    return (yy * zz - yz * zy, yz * zx - yx * zz, yx * zy - yy * zx), (yx, yy, yz), (zx, zy, zz)


def _axes_of_angles(roll, pitch, yaw):
    """Desired axes of the rotation Rz(yaw) Ry(pitch) Rx(roll)."""
    cr, sr, cp, sp, cy, sy = (math.cos(roll), math.sin(roll), math.cos(pitch), math.sin(pitch), math.cos(yaw),
                              math.sin(yaw))
    return ((cy * cp, sy * cp, -sp), (cy * sp * sr - sy * cr, sy * sp * sr + cy * cr, cp * sr),
            (cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr))
