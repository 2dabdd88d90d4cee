"""The mocap system's axes to the stack's `world`: z up, x kept.

A y-up system (Motive's default) becomes z-up by C, a turn of +90 degrees about x, which is also what
Motive does itself when its streaming pane says "Z up":

    C = [1 0 0; 0 0 -1; 0 1 0],    p_world = C p,    R_world = C R C^T

so that a body that was created lying level keeps the identity, and the quaternion's vector part turns
like a position.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Axes = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def from_z_up(position: np.ndarray, quaternion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nothing to convert."""
    return position, quaternion


def from_y_up(position: np.ndarray, quaternion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) m and quaternion (4,) xyzw from y-up to z-up."""
    x, y, z = position
    qx, qy, qz, qw = quaternion
    return np.array([x, -z, y]), np.array([qx, -qz, qy, qw])


CONVERSIONS: dict[str, Axes] = {'z': from_z_up, 'y': from_y_up}
