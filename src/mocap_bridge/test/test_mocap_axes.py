"""Axis conversion against rotation matrices."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mocap_bridge.axes import CONVERSIONS

# Columns: where the y-up axes x, y, z point in the z-up world.
C = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize('seed', range(20))
def test_a_y_up_pose_is_the_same_pose_seen_from_z_up_axes(seed):
    rng = np.random.default_rng(seed)
    p, R = rng.normal(size=3), Rotation.random(random_state=seed)
    position, quaternion = CONVERSIONS['y'](p, R.as_quat())
    np.testing.assert_allclose(position, C @ p, atol=1e-15)
    R_world = Rotation.from_quat(quaternion).as_matrix()
    np.testing.assert_allclose(R_world, C @ R.as_matrix() @ C.T, atol=1e-12)


def test_up_is_up_and_the_axes_stay_right_handed():
    level = np.array([0.0, 0.0, 0.0, 1.0])
    up, _ = CONVERSIONS['y'](np.array([0.0, 1.0, 0.0]), level)
    np.testing.assert_array_equal(up, [0.0, 0.0, 1.0])
    x, y, z = (CONVERSIONS['y'](e, level)[0] for e in np.eye(3))
    np.testing.assert_array_equal(np.cross(x, y), z)
    np.testing.assert_array_equal(CONVERSIONS['y'](np.zeros(3), level)[1], level)


def test_a_z_up_pose_passes_unchanged():
    p, q = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, -0.5, 0.5])
    for got, sent in zip(CONVERSIONS['z'](p, q), (p, q), strict=True):
        np.testing.assert_array_equal(got, sent)


def test_turning_about_the_vertical_stays_turning_about_the_vertical():
    about_y = Rotation.from_rotvec([0.0, 0.3, 0.0]).as_quat()
    _, q = CONVERSIONS['y'](np.zeros(3), about_y)
    np.testing.assert_allclose(Rotation.from_quat(q).as_rotvec(), [0.0, 0.0, 0.3], atol=1e-12)
