"""What the simulated Crazyflie knows about itself: IMU model and the firmware's Kalman filter.

The filter sees only gyroscope, accelerometer and external poses, never the ground truth.

State (M. W. Mueller, M. Hamer, R. D'Andrea, ICRA 2015; crazyflie-firmware kalman_core.c): position x (world),
velocity p (body), attitude q with its error d (body, three small angles); covariance P over (x, p, d).

  dx/dt = R p        dp/dt = a - w x p - g R^T e3        dq/dt = q (0, w/2)

In flight only the z component of the accelerometer is used: rotors push along body z, and the drag that
the other two would show is what the real filter ignores too. IMU samples are averaged over 10 ms and
predicted at 100 Hz; each external pose is six scalar updates. P is a 9x9 array, touched at 100 Hz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deqmpc.airframe import GRAVITY

_P_MIN, _P_MAX = 1e-6, 100.0
_PREDICT_MS = 10


@dataclass(frozen=True)
class ImuSettings:
    """BMI088 as mounted on a flying Crazyflie. Biases are drawn by the seed."""

    gyro_noise: float = 0.02  # rad/s, standard deviation of one 1 kHz sample, propellers turning
    gyro_bias: float = 0.001  # rad/s, standard deviation of what is left after the start-up calibration
    accelerometer_noise: float = 0.5  # m/s^2, standard deviation of one 1 kHz sample, propellers turning
    accelerometer_bias: float = 0.05  # m/s^2, standard deviation of a constant offset
    mounting_tilt: float = 0.003  # rad, standard deviation of the sensor's tilt against the thrust axis
    gyro_cutoff: float = 80.0  # Hz, firmware's second-order low pass (sensors_bmi088_bmp3xx.c)
    accelerometer_cutoff: float = 30.0  # Hz, the same


class LowPass:
    """Second-order Butterworth low pass at 1 kHz (firmware filter.c, lpf2p), started at `value`."""

    __slots__ = ('b', 'a1', 'a2', 'd1', 'd2')

    def __init__(self, cutoff: float, value: float = 0.0, rate: float = 1000.0):
        t = math.tan(math.pi * cutoff / rate)
        c = 1.0 + math.sqrt(2.0) * t + t * t
        self.b = t * t / c
        self.a1 = 2.0 * (t * t - 1.0) / c
        self.a2 = (1.0 - math.sqrt(2.0) * t + t * t) / c
        self.d1 = self.d2 = value / (1.0 + self.a1 + self.a2)

    def __call__(self, sample: float) -> float:
        d0 = sample - self.a1 * self.d1 - self.a2 * self.d2
        out = self.b * (d0 + 2.0 * self.d1 + self.d2)
        self.d2, self.d1 = self.d1, d0
        return out


class Imu:
    """Gyroscope (rad/s) and accelerometer (m/s^2), body axes, filtered as the firmware filters them."""

    _BLOCK = 1000  # samples of noise drawn at once

    def __init__(self, settings: ImuSettings, rng: np.random.Generator):
        self._rng = rng
        self._settings = settings
        self._gyro_bias = (settings.gyro_bias * rng.standard_normal(3)).tolist()
        self._acc_bias = (settings.accelerometer_bias * rng.standard_normal(3)).tolist()
        self._tilt = (settings.mounting_tilt * rng.standard_normal(2)).tolist()
        self._gyro_filter = [LowPass(settings.gyro_cutoff) for _ in range(3)]
        self._acc_filter = [LowPass(settings.accelerometer_cutoff, v) for v in (0.0, 0.0, GRAVITY)]
        self._noise = iter(())
        self.gyro = (0.0, 0.0, 0.0)
        self.acc = (0.0, 0.0, GRAVITY)

    def sample(self, plant, vibration: float) -> None:
        """One 1 kHz sample; `vibration` (0..1) scales the noise that the propellers cause."""
        noise = next(self._noise, None)
        if noise is None:
            s = self._settings
            scale = [s.gyro_noise] * 3 + [s.accelerometer_noise] * 3
            self._noise = iter((self._rng.standard_normal((self._BLOCK, 6)) * scale).tolist())
            noise = next(self._noise)
        level = 0.1 + 0.9 * vibration
        bg, ba, (roll, pitch) = self._gyro_bias, self._acc_bias, self._tilt
        fx, fy, fz = self._gyro_filter
        self.gyro = (fx(plant.wx + bg[0] + level * noise[0]), fy(plant.wy + bg[1] + level * noise[1]),
                     fz(plant.wz + bg[2] + level * noise[2]))
        ax, ay, az = plant.ax_body, plant.ay_body, plant.az_body
        fx, fy, fz = self._acc_filter
        self.acc = (fx(ax - pitch * az + ba[0] + level * noise[3]),
                    fy(ay + roll * az + ba[1] + level * noise[4]),
                    fz(az + ba[2] + level * noise[5]))


class KalmanEstimator:
    """The filter. x y z, vx vy vz (world) and qx qy qz qw, yaw are its published estimate."""

    def __init__(self, initial=(0.0, 0.0, 0.0), initial_yaw: float = 0.0):
        self._initial = (*map(float, initial), float(initial_yaw))
        self.reset()

    def reset(self) -> None:
        """Forget everything (a write of 1 to kalman.resetEstimation)."""
        self.x, self.y, self.z, yaw = self._initial
        self._p = [0.0, 0.0, 0.0]  # velocity, body
        self.qx = self.qy = 0.0
        self.qz, self.qw = math.sin(yaw / 2.0), math.cos(yaw / 2.0)
        self._home = (self.qx, self.qy, self.qz, self.qw)
        # Standard deviations: 100 m in x and y, 1 m in z, 0.01 m/s, 0.01 rad (kalman_core_params_defaults.h).
        self.P = np.diag([1e4, 1e4, 1.0, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4])
        np.clip(self.P, 0.0, _P_MAX, out=self.P)
        self._A = np.eye(9)
        self._sum = [0.0] * 6
        self._samples = 0
        self._externalize()

    def place(self, position, velocity, quaternion) -> None:
        """Start from a known state (m, m/s in the world, xyzw) with the variances of settled flight."""
        self.x, self.y, self.z = position
        self.qx, self.qy, self.qz, self.qw = quaternion
        self._externalize()
        R, (vx, vy, vz) = self._R, velocity
        self._p = [R[i] * vx + R[3 + i] * vy + R[6 + i] * vz for i in range(3)]
        self.P = np.diag([1e-5] * 3 + [1e-4] * 3 + [1e-5] * 3)
        self._externalize()

    def step(self, tick: int, gyro, acc, measurements: list, flying: bool) -> None:
        """One 1 ms round: gather the IMU, predict every 10 ms, take in `measurements`.

        Each measurement is (position (3,), quaternion (4,) or None, position std, attitude std).
        """
        s = self._sum
        for i in range(3):
            s[i] += gyro[i]
            s[i + 3] += acc[i]
        self._samples += 1
        if tick % _PREDICT_MS == 0:
            n = self._samples
            self._predict([v / n for v in s], flying)
            self._sum, self._samples = [0.0] * 6, 0
        elif not measurements:
            return
        for position, quaternion, position_std, attitude_std in measurements:
            self._update(position, quaternion, position_std, attitude_std)
        self._externalize()
        # The firmware resets a filter that left these bounds (kalman_supervisor.c).
        if max(map(abs, (self.x, self.y, self.z))) > 100.0 or max(map(abs, self._p)) > 10.0:
            self.reset()

    def _predict(self, imu, flying):
        """State and covariance over 10 ms."""
        dt = 1e-3 * _PREDICT_MS
        wx, wy, wz, ax, ay, az = imu
        if flying:
            ax = ay = 0.0
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = self._R
        px, py, pz = self._p

        A = self._A
        A[0, 3:6] = r00 * dt, r01 * dt, r02 * dt
        A[1, 3:6] = r10 * dt, r11 * dt, r12 * dt
        A[2, 3:6] = r20 * dt, r21 * dt, r22 * dt
        A[0, 6:9] = (py * r02 - pz * r01) * dt, (pz * r00 - px * r02) * dt, (px * r01 - py * r00) * dt
        A[1, 6:9] = (py * r12 - pz * r11) * dt, (pz * r10 - px * r12) * dt, (px * r11 - py * r10) * dt
        A[2, 6:9] = (py * r22 - pz * r21) * dt, (pz * r20 - px * r22) * dt, (px * r21 - py * r20) * dt
        A[3, 3:9] = 1.0, wz * dt, -wy * dt, 0.0, GRAVITY * r22 * dt, -GRAVITY * r21 * dt
        A[4, 3:9] = -wz * dt, 1.0, wx * dt, -GRAVITY * r22 * dt, 0.0, GRAVITY * r20 * dt
        A[5, 3:9] = wy * dt, -wx * dt, 1.0, GRAVITY * r21 * dt, -GRAVITY * r20 * dt, 0.0
        d0, d1, d2 = 0.5 * wx * dt, 0.5 * wy * dt, 0.5 * wz * dt  # covariance rotates with the body
        A[6, 6:9] = 1.0 - 0.5 * (d1 * d1 + d2 * d2), d2 + 0.5 * d0 * d1, -d1 + 0.5 * d0 * d2
        A[7, 6:9] = -d2 + 0.5 * d0 * d1, 1.0 - 0.5 * (d0 * d0 + d2 * d2), d0 + 0.5 * d1 * d2
        A[8, 6:9] = d1 + 0.5 * d0 * d2, -d0 + 0.5 * d1 * d2, 1.0 - 0.5 * (d0 * d0 + d1 * d1)
        P = A @ self.P @ A.T
        # Process noise as the firmware adds it, once a millisecond: ten small additions.
        diagonal = P.reshape(-1)[::10]
        diagonal += _PROCESS_NOISE
        np.clip(diagonal, _P_MIN, _P_MAX, out=diagonal)
        self.P = P

        bx, by, bz = px * dt + 0.5 * dt * dt * ax, py * dt + 0.5 * dt * dt * ay, pz * dt + 0.5 * dt * dt * az
        self.x += r00 * bx + r01 * by + r02 * bz
        self.y += r10 * bx + r11 * by + r12 * bz
        self.z += r20 * bx + r21 * by + r22 * bz - 0.5 * GRAVITY * dt * dt
        self._p = [px + dt * (ax + wz * py - wy * pz - GRAVITY * r20),
                   py + dt * (ay - wz * px + wx * pz - GRAVITY * r21),
                   pz + dt * (az + wy * px - wx * py - GRAVITY * r22)]
        self._turn(wx * dt, wy * dt, wz * dt)
        if not flying:  # on the ground the attitude creeps back to level (attitudeReversion)
            q = (self.qx, self.qy, self.qz, self.qw)
            q = [0.999 * a + 0.001 * b for a, b in zip(q, self._home, strict=True)]
            n = 1.0 / math.sqrt(sum(v * v for v in q))
            self.qx, self.qy, self.qz, self.qw = (n * v for v in q)

    def _update(self, position, quaternion, position_std, attitude_std):
        """Scalar updates with an external position and, where given, attitude; covariance symmetric."""
        self._delta = [0.0] * 9
        for i, (measured, predicted) in enumerate(zip(position, (self.x, self.y, self.z), strict=True)):
            self._scalar(i, measured - predicted, position_std)
        if quaternion is not None:
            # Body-frame error q^-1 q_measured; 2 v / w for a small one (Trawny and Roumeliotis, eq. 141).
            mx, my, mz, mw = quaternion
            x, y, z, w = self.qx, self.qy, self.qz, self.qw
            ew = w * mw + x * mx + y * my + z * mz
            scale = 2.0 / (ew if abs(ew) > 1e-3 else math.copysign(1e-3, ew))
            for i, e in enumerate((w * mx - x * mw - y * mz + z * my, w * my - y * mw - z * mx + x * mz,
                                   w * mz - z * mw - x * my + y * mx)):
                self._scalar(6 + i, scale * e, attitude_std)
        d = self._delta
        self.x, self.y, self.z = self.x + d[0], self.y + d[1], self.z + d[2]
        self._p = [p + e for p, e in zip(self._p, d[3:6], strict=True)]
        self._turn(d[6], d[7], d[8])

    def _scalar(self, i, residual, std):
        """Measure state i: `residual` is measured minus the estimate before this round of updates."""
        column = self.P[:, i].copy()
        gain = column / (column[i] + std * std)
        # The firmware takes each attitude residual from the estimate at the start of the round, and each
        # position residual from the present one; positions are uncoupled enough that both agree.
        error = residual - (self._delta[i] if i < 3 else 0.0)
        self._delta = [d + k * error for d, k in zip(self._delta, gain.tolist(), strict=True)]
        self.P -= np.outer(gain, column)
        diagonal = self.P.reshape(-1)[::10]
        np.clip(diagonal, _P_MIN, _P_MAX, out=diagonal)

    def _turn(self, ex, ey, ez):
        """Rotate the attitude by the body-frame vector (ex, ey, ez), rad."""
        angle = math.sqrt(ex * ex + ey * ey + ez * ez)
        s = math.sin(0.5 * angle) / angle if angle > 1e-9 else 0.5
        c = math.cos(0.5 * angle) if angle == angle and angle < 1e9 else math.nan
        dx, dy, dz = s * ex, s * ey, s * ez
        x, y, z, w = self.qx, self.qy, self.qz, self.qw
        nx, ny = w * dx + c * x + y * dz - z * dy, w * dy + c * y + z * dx - x * dz
        nz, nw = w * dz + c * z + x * dy - y * dx, w * c - x * dx - y * dy - z * dz
        n = 1.0 / math.sqrt(nx * nx + ny * ny + nz * nz + nw * nw)
        self.qx, self.qy, self.qz, self.qw = n * nx, n * ny, n * nz, n * nw

    def _externalize(self):
        """Rotation matrix, world velocity and Euler angles of the present estimate."""
        x, y, z, w = self.qx, self.qy, self.qz, self.qw
        self._R = R = (
            1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
            2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
            2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y))
        px, py, pz = self._p
        self.vx = R[0] * px + R[1] * py + R[2] * pz
        self.vy = R[3] * px + R[4] * py + R[5] * pz
        self.vz = R[6] * px + R[7] * py + R[8] * pz
        self.yaw = math.atan2(R[3], R[0])
        self.roll = math.atan2(R[7], R[8])
        self.pitch = -math.asin(min(1.0, max(-1.0, R[6])))


# (standard deviation a millisecond)^2, ten of them a prediction: 0.5 m/s^2 in x and y, 1.0 in z,
# 0.1 rad/s on the angles (kalman_core_params_defaults.h; the position's share is dt^2 smaller).
_PROCESS_NOISE = 10.0 * np.array([
    (0.5e-6) ** 2, (0.5e-6) ** 2, (1e-6) ** 2, (0.5e-3) ** 2, (0.5e-3) ** 2, (1e-3) ** 2,
    (1e-4) ** 2, (1e-4) ** 2, (1e-4) ** 2])
