"""Crazyflie 2.x as a rigid body with four thrusts.

State x (12): position p (m, world), attitude m (MRP, body -> world), velocity v (m/s, world), rates w
(rad/s, body). Input u (4): motor thrusts divided by the hover thrust, so hover is u = (1, 1, 1, 1).

  p' = v
  m' = 1/4 ((1 - s) w + 2 m x w + 2 (m.w) m)                       s = m.m
  v' = (R e_z F - R diag(d) R' v) / mass - g e_z                   F = hover thrust * sum(u)
  J w' = torque - w x J w
  R = I + (4 (1 - s) [m]x + 8 [m]x [m]x) / (1 + s)^2

MRP kinematics and R: Schaub and Junkins, Analytical Mechanics of Space Systems, section 3.5. Motor layout,
torques and the linear drag d: deqmpc.airframe. Keep |m| <= 1 where a state enters (rotation.mrp_from_quaternion).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deqmpc.airframe import GRAVITY, Airframe
from deqmpc.dynamics.equations import Scalars


@dataclass(frozen=True)
class Crazyflie:
    """The equations above with one airframe's constants."""

    airframe: Airframe = field(default_factory=Airframe)
    n = 12
    m = 4

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (12 scalars) at state x and input u. Scalars are floats, arrays, tensors or symbols."""
        mx, my, mz, vx, vy, vz, wx, wy, wz = x[3:12]
        u1, u2, u3, u4 = u
        frame = self.airframe
        hover, jx, jy, jz = frame.hover_thrust, *frame.inertia

        s = mx * mx + my * my + mz * mz
        c = 1.0 - s
        k = 1.0 / ((1.0 + s) * (1.0 + s))
        zx, zy, zz = k * (8.0 * mx * mz + 4.0 * c * my), k * (8.0 * my * mz - 4.0 * c * mx), 1.0 - 8.0 * k * (
            mx * mx + my * my)  # R e_z
        # R diag(d) R' v = dy v + (dz - dy) (z.v) z + (dx - dy) (x.v) x with z = R e_z, x = R e_x: one column of R
        # where the drag is the same along body x and y
        dx, dy, dz = (d / frame.mass for d in frame.drag)
        along_z = (u1 + u2 + u3 + u4) * (hover / frame.mass)
        if dz != dy:
            along_z = along_z - (dz - dy) * (zx * vx + zy * vy + zz * vz)
        ax, ay, az = along_z * zx, along_z * zy, along_z * zz - GRAVITY
        if dy:
            ax, ay, az = ax - dy * vx, ay - dy * vy, az - dy * vz
        if dx != dy:
            xx, xy, xz = 1.0 - 8.0 * k * (my * my + mz * mz), k * (8.0 * mx * my + 4.0 * c * mz), k * (
                8.0 * mx * mz - 4.0 * c * my)  # R e_x
            along_x = -(dx - dy) * (xx * vx + xy * vy + xz * vz)
            ax, ay, az = ax + along_x * xx, ay + along_x * xy, az + along_x * xz

        arm, turn = frame.motor_offset * hover, frame.thrust_to_torque * hover
        tx = arm * (-u1 - u2 + u3 + u4)
        ty = arm * (-u1 + u2 + u3 - u4)
        tz = turn * (-u1 + u2 - u3 + u4)
        mw = mx * wx + my * wy + mz * wz
        return [
            vx, vy, vz,
            0.25 * (c * wx + 2.0 * (my * wz - mz * wy) + 2.0 * mw * mx),
            0.25 * (c * wy + 2.0 * (mz * wx - mx * wz) + 2.0 * mw * my),
            0.25 * (c * wz + 2.0 * (mx * wy - my * wx) + 2.0 * mw * mz),
            ax, ay, az,
            (tx - (jz - jy) * wy * wz) * (1.0 / jx),
            (ty - (jx - jz) * wz * wx) * (1.0 / jy),
            (tz - (jy - jx) * wx * wy) * (1.0 / jz),
        ]
