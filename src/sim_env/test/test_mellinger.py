"""Controller and mixer against the firmware's figure and an independent matrix form."""

from types import SimpleNamespace

import numpy as np
import pytest

from deqmpc.airframe import GRAVITY
from deqmpc.dynamics import rotation
from sim_env import commander, power_distribution
from sim_env.mellinger import DT, Mellinger, MellingerGains

LEVEL = (0.0, 0.0, 0.0, 1.0)


def state(position=(0.0, 0.0, 0.0), velocity=(0.0, 0.0, 0.0), quaternion=LEVEL):
    """What the controller reads of the estimator."""
    values = dict(zip(('x', 'y', 'z', 'vx', 'vy', 'vz', 'qx', 'qy', 'qz', 'qw'),
                      (*position, *velocity, *quaternion), strict=True))
    return SimpleNamespace(**values, yaw=float(rotation.yaw(np.array(quaternion))))


ZERO = (0.0, 0.0, 0.0)


def full(position=ZERO, velocity=ZERO, acceleration=ZERO, quaternion=LEVEL, rates=ZERO):
    return commander.full_state(position, velocity, acceleration, quaternion, rates)


def test_one_step_with_a_tenth_of_a_metre_in_x_equals_the_firmware():
    thrust, roll, pitch, yaw = Mellinger().update(full((0.1, 0.0, 0.0)), state(), (0.0, 0.0, 0.0))
    assert thrust == pytest.approx(37552.68, abs=0.01)
    assert (roll, pitch, yaw) == (0, -19497, 0)
    pwm = power_distribution.cap(power_distribution.mix(thrust, roll, pitch, yaw))
    assert pwm == (27804, 47300, 47300, 27804)


@pytest.mark.parametrize('seed', range(20))
def test_moments_equal_the_matrix_form_of_the_paper(seed):
    """M = -kR vee(Rd'R - R'Rd) + kw (wd - w), with Rd from the force; small motions, so nothing clamps."""
    rng = np.random.default_rng(seed)
    q = rotation.normalize(np.array([0.1, 0.1, 1.0, 1.0]) * rng.standard_normal(4))
    position, velocity, acceleration = 0.1 * rng.standard_normal((3, 3))
    w, wd = 0.05 * rng.standard_normal((2, 3))
    heading = rotation.yaw(q) + 0.05 * rng.standard_normal()
    controller = Mellinger(MellingerGains(kd_omega_rp=0.0))
    setpoint = full(position, velocity, acceleration, tuple(rotation.from_yaw(heading)), wd)
    thrust, roll, pitch, yaw = controller.update(setpoint, state(quaternion=tuple(q)), tuple(w))

    g = controller.gains
    kp, kd, ki = (np.array([a, a, b]) for a, b in ((g.kp_xy, g.kp_z), (g.kd_xy, g.kd_z), (g.ki_xy, g.ki_z)))
    force = g.mass * (acceleration + [0, 0, GRAVITY]) + (kp + ki * DT) * position + kd * velocity
    R = rotation.rotate(q, np.eye(3)).T
    z = force / np.linalg.norm(force)
    y = np.cross(z, [np.cos(heading), np.sin(heading), 0.0])
    y /= np.linalg.norm(y)
    Rd = np.column_stack([np.cross(y, z), y, z])
    e = Rd.T @ R - R.T @ Rd
    error = np.array([e[2, 1], e[0, 2], e[1, 0]])
    moment = -np.array([g.kR_xy, g.kR_xy, g.kR_z]) * error + np.array([g.kw_xy, g.kw_xy, g.kw_z]) * (wd - w)
    moment[2] -= g.ki_m_z * error[2] * DT
    expected = np.clip(moment, -32000, 32000)
    assert thrust == pytest.approx(g.massThrust * force @ R[:, 2])
    assert (roll, -pitch, -yaw) == pytest.approx(expected, abs=1.0)  # integers on the firmware's side


def test_the_integral_in_z_stops_at_its_range():
    controller = Mellinger()
    for _ in range(1000):
        controller.update(full((0.0, 0.0, 1.0)), state(), (0.0, 0.0, 0.0))
    assert controller.iz == controller.gains.i_range_z


@pytest.mark.parametrize('setpoint, where', [
    (commander.NULL, state()), (full(), state(position=(float('nan'),) * 3)),
    (commander.position((0.0, 0.0, 1.0), float('inf')), state()), (full((0.0, 0.0, float('nan'))), state())])
def test_no_setpoint_or_no_number_stops_the_motors_and_clears_the_integrals(setpoint, where):
    controller = Mellinger()
    controller.update(full((1.0, 1.0, 1.0)), state(), (0.0, 0.0, 0.0))
    assert controller.update(setpoint, where, (0.0, 0.0, 0.0)) == (0.0, 0, 0, 0)
    assert (controller.ix, controller.iy, controller.iz, controller.imz) == (0.0, 0.0, 0.0, 0.0)


def test_saturated_motors_give_up_thrust_and_keep_the_moments():
    commands = power_distribution.mix(60000.0, 8000, -6000, 2000)
    pwm = power_distribution.cap(commands)
    assert max(commands) > 65535 and max(pwm) == 65535
    assert np.diff(pwm).tolist() == np.diff(commands).tolist()


def test_no_motor_turns_slower_than_idle_nor_backwards():
    commands = power_distribution.mix(5000.0, 20000, 0, 0)
    assert min(commands) < 0
    assert min(power_distribution.cap(commands, idle=3000)) == 3000
    assert min(power_distribution.cap(commands)) == 0
