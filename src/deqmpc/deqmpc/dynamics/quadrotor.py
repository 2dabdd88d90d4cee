"""The quadrotor of the DEQ-MPC experiments: a rigid body with body-frame velocities and four motor commands.

State x (12): position r (m, world), attitude m (MRP, body -> world), velocity v (m/s, body), rates w (rad/s, body).
Input u (4): motor commands; motor i sits at l (s_i, t_i) / sqrt 2 with (s, t) = (1, 1), (1, -1), (-1, -1), (-1, 1).

  F_i = k u_i + b                                          thrust of a motor along body z
  r' = R v
  m' = 1/4 ((1 - s) w + 2 m x w + 2 (m.w) m)               s = m.m
  v' = (0, 0, sum F) / mass - g R' e_z - w x v
  J w' = torque - w x J w
  torque = l / sqrt 2 (sum t_i F_i, -sum s_i F_i, 0) + c (0, 0, u_1 - u_2 + u_3 - u_4)
  R = I + (4 (1 - s) [m]x + 8 [m]x [m]x) / (1 + s)^2

Constants: the released environment of the DEQ-MPC authors; its trajectories are reproduced by RK4 with dt = 0.05 s.
MRPs: the released trajectories start in the shadow set, |m| > 1, turn through 180 degrees and end at |m| < 1 without
ever switching sets. The equations hold in both sets, so a plan does not switch either; where a state enters from
outside, choose the set (|m| <= 1 is the shorter way to m = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars

U_LOW, U_HIGH, U_HOVER = 11.5, 18.3, 14.4984  # motor commands; the last one hovers


@dataclass(frozen=True)
class Quadrotor:
    """The equations above."""

    mass: float = 2.0  # kg
    inertia: tuple[float, ...] = (0.01566089, 3.18037e-6, 0.01562078, 0.02226868)  # kg m^2: xx, xy, yy, zz
    arm: float = 0.28  # m from the centre to a motor
    thrust_slope: float = 2.44101  # N per command and motor
    thrust_offset: float = -30.48576  # N a motor
    torque_slope: float = 0.029958  # N m of yaw torque per command
    gravity: float = 9.81  # m/s^2
    n = 12
    m = 4

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (12 scalars) at state x and input u. Scalars are floats, arrays, tensors or symbols."""
        mx, my, mz, vx, vy, vz, wx, wy, wz = x[3:12]
        u1, u2, u3, u4 = u
        jxx, jxy, jyy, jzz = self.inertia

        s = mx * mx + my * my + mz * mz
        c = 1.0 - s
        k = 1.0 / ((1.0 + s) * (1.0 + s))
        # R v = v + k (4 c (m x v) + 8 m x (m x v))
        ax, ay, az = my * vz - mz * vy, mz * vx - mx * vz, mx * vy - my * vx
        bx, by, bz = my * az - mz * ay, mz * ax - mx * az, mx * ay - my * ax
        zx, zy, zz = k * (8.0 * mx * mz - 4.0 * c * my), k * (8.0 * my * mz + 4.0 * c * mx), 1.0 - 8.0 * k * (
            mx * mx + my * my)  # R' e_z

        lift = (self.thrust_slope * (u1 + u2 + u3 + u4) + 4.0 * self.thrust_offset) * (1.0 / self.mass)
        arm = self.arm * self.thrust_slope / 2.0 ** 0.5  # the offsets of the four motors cancel
        hx, hy, hz = jxx * wx + jxy * wy, jxy * wx + jyy * wy, jzz * wz  # J w
        tx = arm * (u1 - u2 - u3 + u4) - (wy * hz - wz * hy)
        ty = -arm * (u1 + u2 - u3 - u4) - (wz * hx - wx * hz)
        tz = self.torque_slope * (u1 - u2 + u3 - u4) - (wx * hy - wy * hx)
        inverse = 1.0 / (jxx * jyy - jxy * jxy)
        mw = mx * wx + my * wy + mz * wz
        return [
            vx + k * (4.0 * c * ax + 8.0 * bx),
            vy + k * (4.0 * c * ay + 8.0 * by),
            vz + k * (4.0 * c * az + 8.0 * bz),
            0.25 * (c * wx + 2.0 * (my * wz - mz * wy) + 2.0 * mw * mx),
            0.25 * (c * wy + 2.0 * (mz * wx - mx * wz) + 2.0 * mw * my),
            0.25 * (c * wz + 2.0 * (mx * wy - my * wx) + 2.0 * mw * mz),
            -self.gravity * zx - (wy * vz - wz * vy),
            -self.gravity * zy - (wz * vx - wx * vz),
            lift - self.gravity * zz - (wx * vy - wy * vx),
            inverse * (jyy * tx - jxy * ty),
            inverse * (jxx * ty - jxy * tx),
            tz * (1.0 / jzz),
        ]
