"""Rotations: unit quaternions (x, y, z, w) and modified Rodrigues parameters (MRP), body -> world.

An MRP is m = v / (1 + w) for the quaternion (v, w); m and its shadow -m / |m|^2 are the same
rotation, |m| <= 1 for angles up to 180 degrees. All functions take arrays with the components on
the last axis and any leading batch dimensions.
"""

from __future__ import annotations

import numpy as np


def normalize(q: np.ndarray) -> np.ndarray:
    """Unit quaternion along q (..., 4). Raises ValueError where |q| is zero or not finite."""
    q = np.asarray(q, dtype=float)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    if not np.all(np.isfinite(norm)) or np.any(norm < 1e-9):
        raise ValueError(f'cannot normalise quaternion {q.tolist()}: its norm must be finite and > 0')
    return q / norm


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """v (..., 3) in the body frame expressed in the world frame, for unit q (..., 4)."""
    u, w = q[..., :3], q[..., 3:]
    t = 2.0 * _cross(u, v)
    return v + w * t + _cross(u, t)


def conjugate(q: np.ndarray) -> np.ndarray:
    """The inverse rotation of unit q (..., 4)."""
    return np.concatenate([-q[..., :3], q[..., 3:]], axis=-1)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamilton product a*b (..., 4): first b, then a."""
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    v = aw * bv + bw * av + _cross(av, bv)
    w = aw * bw - np.sum(av * bv, axis=-1, keepdims=True)
    return np.concatenate([v, w], axis=-1)


def yaw(q: np.ndarray) -> np.ndarray:
    """Heading angle (rad) of unit q (..., 4): direction of the body x axis in the world x-y plane."""
    x, y, z, w = np.moveaxis(np.asarray(q), -1, 0)
    return np.arctan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))


def tilt(q: np.ndarray) -> np.ndarray:
    """Angle (rad) between the body z axis and the world z axis, for unit q (..., 4)."""
    x, y = np.asarray(q)[..., 0], np.asarray(q)[..., 1]
    return np.arccos(np.clip(1.0 - 2.0 * (x * x + y * y), -1.0, 1.0))


def from_yaw(angle: np.ndarray) -> np.ndarray:
    """Quaternion (..., 4) of a pure heading `angle` (rad)."""
    angle = np.asarray(angle, dtype=float)
    zero = np.zeros_like(angle)
    return np.stack([zero, zero, np.sin(angle / 2), np.cos(angle / 2)], axis=-1)


def mrp_from_quaternion(q: np.ndarray) -> np.ndarray:
    """MRP (..., 3) with |m| <= 1 of unit q (..., 4)."""
    q = np.where(q[..., 3:] < 0.0, -q, q)
    return q[..., :3] / (1.0 + q[..., 3:])


def quaternion_from_mrp(m: np.ndarray) -> np.ndarray:
    """Unit quaternion (..., 4) of an MRP (..., 3) of any set."""
    s = np.sum(m * m, axis=-1, keepdims=True)
    return np.concatenate([2.0 * m, 1.0 - s], axis=-1) / (1.0 + s)


_NEXT, _LAST = np.array([1, 2, 0]), np.array([2, 0, 1])


def _cross(a, b):
    """np.cross, which takes 3 to 6 times as long on a few vectors."""
    return a.take(_NEXT, -1) * b.take(_LAST, -1) - a.take(_LAST, -1) * b.take(_NEXT, -1)
