"""The simulated Crazyflie's firmware behaviour, driven through its radio-level interface."""

import math
import struct

import numpy as np
import pytest

from deqmpc.airframe import Airframe
from deqmpc.types import RigidBodyState
from sim_env.estimator import ImuSettings
from sim_env.high_level import EBUSY, REFUSED, derivatives, polynomial
from sim_env.plant import PlantSettings
from sim_env.simulated_crazyflie import SimSettings, SimulatedCrazyflie

ARMED, CAN_FLY, FLYING, TUMBLED, LOCKED, CRASHED, ACTIVE, DISABLED = (1 << k for k in (1, 3, 4, 5, 6, 7, 8, 10))
LEVEL = (0.0, 0.0, 0.0, 1.0)
# The plant that the firmware-in-the-loop figures were measured on: crazyswarm2's simulator.
CRAZYSWARM2 = SimSettings(
    airframe=Airframe(mass=0.034, inertia=(16.57e-6, 16.66e-6, 29.26e-6), thrust_to_torque=0.006,
                      motor_time_constant=0.0, drag=(0.0, 0.0, 0.0)),
    plant=PlantSettings(motor_spread=0.0, battery_resistance=0.0), imu=ImuSettings(0.0, 0.0, 0.0, 0.0, 0.0))


def run(crazyflie, seconds, mocap=True):
    """Step with an external pose every 10 ms, or none."""
    for _ in range(round(seconds * 100)):
        if mocap:
            truth = crazyflie.truth()
            crazyflie.receive_extpose(truth.position, truth.quaternion)
        crazyflie.step(10)


def drone(settings=SimSettings(), seed=0):
    """A Crazyflie on the floor that listens to external poses."""
    crazyflie = SimulatedCrazyflie(settings, seed)
    crazyflie.set_parameter('stabilizer.estimator', 2)
    return crazyflie


def hovering(seed=0, settings=SimSettings()):
    """A Crazyflie that took off to 1 m."""
    crazyflie = drone(settings, seed)
    run(crazyflie, 0.5)
    assert crazyflie.takeoff(1.0, 1.5) == 0
    run(crazyflie, 3.0)
    return crazyflie


def at_rest(z, quaternion):
    return RigidBodyState(0.0, np.array([0.0, 0.0, z]), np.array(quaternion), np.zeros(3), np.zeros(3))


def height(crazyflie):
    return crazyflie.truth().position[2]


def info(crazyflie, bit):
    return bool(crazyflie.supervisor_info & bit)


# --- life of a flight -----------------------------------------------------------------------------

def test_takeoff_hover_go_to_and_land():
    crazyflie = hovering()
    assert info(crazyflie, FLYING) and info(crazyflie, ACTIVE)
    assert crazyflie.truth().position == pytest.approx([0.0, 0.0, 1.0], abs=0.06)
    assert crazyflie.go_to((0.5, -0.3, 0.8), 1.0, 2.0) == 0
    run(crazyflie, 3.5)
    truth = crazyflie.truth()
    assert truth.position == pytest.approx([0.5, -0.3, 0.8], abs=0.06)
    assert 2.0 * math.atan2(truth.quaternion[2], truth.quaternion[3]) == pytest.approx(1.0, abs=0.05)
    assert crazyflie.land(0.0, 2.0) == 0
    run(crazyflie, 2.5)
    assert height(crazyflie) < 0.01 and crazyflie.pwm == (0, 0, 0, 0)
    run(crazyflie, 2.5)
    assert not info(crazyflie, FLYING) and not info(crazyflie, LOCKED)


def test_the_estimate_comes_from_sensors_and_stays_close_to_the_truth():
    crazyflie = hovering(seed=3)
    estimate, truth = crazyflie.estimate(), crazyflie.truth()
    error = np.linalg.norm(estimate.position - truth.position)
    assert 0.0 < error < 0.02
    assert np.linalg.norm(estimate.velocity - truth.velocity) < 0.1
    assert crazyflie.log_variables['kalman.varPX'][1]() < 1e-3


def test_drift_after_mocap_loss_is_of_the_firmware_s_size():
    """Facts: 0.015-0.045 m at 1 s, 0.06-0.17 m at 2 s; the estimate notices nothing."""
    after = []
    for seed in range(5):
        crazyflie = hovering(seed)
        start = crazyflie.truth().position
        drift = []
        for _ in range(2):
            run(crazyflie, 1.0, mocap=False)
            drift.append(np.linalg.norm(crazyflie.truth().position - start))
        after.append(drift)
        assert np.linalg.norm(crazyflie.estimate().position - [0.0, 0.0, 1.0]) < 0.06
    median = np.median(after, axis=0)
    assert 0.01 < median[0] < 0.07 and 0.04 < median[1] < 0.25


@pytest.mark.parametrize('kind, rate, look_ahead, figure', [
    ('full', 50, 0.0, 0.034), ('position', 10, 0.0, 0.27), ('position', 10, 0.1, 0.22)])
def test_circle_tracking_equals_the_firmware_in_the_loop(kind, rate, look_ahead, figure):
    """R 0.4 m, 5 s a round, on the same plant: RMS within a quarter of the facts' figure."""
    crazyflie = drone(CRAZYSWARM2)
    w = 2.0 * math.pi / 5.0

    def circle(t):
        return np.array([0.4 * math.cos(w * t), 0.4 * math.sin(w * t), 1.0])
    run(crazyflie, 0.5)
    crazyflie.takeoff(1.0, 1.5)
    run(crazyflie, 2.0)
    crazyflie.go_to((0.4, 0.0, 1.0), 0.0, 1.5)
    run(crazyflie, 2.5)
    start, errors = crazyflie.time, []
    for k in range(11 * rate):
        p = circle(k / rate + look_ahead)
        if kind == 'full':
            centre = p - [0.0, 0.0, 1.0]
            velocity = w * np.array([-centre[1], centre[0], 0.0])
            crazyflie.set_full_state(p, velocity, -w * w * centre, LEVEL, (0.0, 0.0, 0.0))
        else:
            crazyflie.set_position(p, 0.0)
        for _ in range(100 // rate):
            run(crazyflie, 0.01)
            t = crazyflie.time - start
            if t > 5.0:
                errors.append(np.linalg.norm(crazyflie.truth().position - circle(t)))
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(figure, rel=0.25)


def test_equal_seeds_fly_equal_paths_and_others_do_not():
    def flown(seed):
        crazyflie = drone(seed=seed)
        run(crazyflie, 0.2)
        crazyflie.takeoff(0.5, 0.5)
        run(crazyflie, 0.8)
        return crazyflie.truth().position.tolist() + list(crazyflie.pwm)
    assert flown(1) == flown(1)
    assert flown(1) != flown(2)


# --- commander ------------------------------------------------------------------------------------

def test_a_setpoint_half_a_second_old_levels_out_and_two_seconds_old_locks():
    crazyflie = hovering()
    for k in range(50):
        crazyflie.set_full_state((0.012 * k, 0.0, 1.0), (0.6, 0.0, 0.0), (0.0,) * 3, LEVEL, (0.0,) * 3)
        run(crazyflie, 0.02)
    last = crazyflie.truth().position[0]
    run(crazyflie, 0.45)
    assert crazyflie.target.track_position
    run(crazyflie, 0.1)
    assert not crazyflie.target.track_position and crazyflie.target.track_height
    assert height(crazyflie) > 0.9
    run(crazyflie, 1.35)
    # Facts: streaming at 0.6 m/s and then silent, +0.50 m at 2.1 s, then it falls.
    assert crazyflie.truth().position[0] - last == pytest.approx(0.50, abs=0.15)
    run(crazyflie, 0.3)
    assert info(crazyflie, LOCKED) and crazyflie.pwm == (0, 0, 0, 0)
    assert 'SUP: Locked, reboot required' in crazyflie.console
    run(crazyflie, 1.0)
    assert height(crazyflie) < 0.05
    assert not crazyflie.arm(True) and crazyflie.takeoff(1.0, 1.0) == EBUSY


def test_a_go_to_before_the_stop_notice_hands_over_without_a_fall():
    crazyflie = hovering()
    for _ in range(25):
        crazyflie.set_position((0.0, 0.0, 1.0), 0.0)
        run(crazyflie, 0.02)
    assert crazyflie.go_to((0.0, 0.0, 1.0), 0.0, 1.0) == 0
    crazyflie.notify_setpoint_stop()
    lowest = 1.0
    for _ in range(30):
        run(crazyflie, 0.1)
        lowest = min(lowest, height(crazyflie))
    assert lowest > 0.9 and not info(crazyflie, LOCKED)


def test_a_stop_notice_with_nothing_planned_stops_the_motors_but_does_not_lock():
    crazyflie = hovering()
    crazyflie.set_position((0.0, 0.0, 1.0), 0.0)
    run(crazyflie, 0.1)
    crazyflie.notify_setpoint_stop()
    run(crazyflie, 0.1)
    assert crazyflie.pwm == (0, 0, 0, 0) and not info(crazyflie, LOCKED)


def test_a_streamed_setpoint_outranks_the_planner_and_stops_it():
    crazyflie = hovering()
    crazyflie.go_to((2.0, 0.0, 1.0), 0.0, 1.0)
    crazyflie.set_position((0.0, 0.0, 1.0), 0.0)
    run(crazyflie, 0.4)
    assert not info(crazyflie, ACTIVE)
    assert crazyflie.truth().position[0] < 0.1


def test_zero_thrust_stops_the_motors_and_unlocks_thrust():
    crazyflie = SimulatedCrazyflie()
    crazyflie.set_rpyt(0.0, 0.0, 0.0, 30000)
    run(crazyflie, 0.3)
    assert crazyflie.pwm == (0, 0, 0, 0)
    crazyflie.set_rpyt(0.0, 0.0, 0.0, 0)
    crazyflie.set_rpyt(0.0, 0.0, 0.0, 30000)
    run(crazyflie, 0.1)
    assert min(crazyflie.pwm) > 0
    crazyflie.set_rpyt(0.0, 0.0, 0.0, 0)
    run(crazyflie, 0.1)
    assert crazyflie.pwm == (0, 0, 0, 0)


# --- high-level commander -------------------------------------------------------------------------

def test_takeoff_is_refused_before_the_checks_and_while_flying():
    crazyflie = SimulatedCrazyflie()
    assert crazyflie.takeoff(1.0, 1.0) == EBUSY
    run(crazyflie, 0.3)
    assert crazyflie.takeoff(1.0, 1.0) == 0
    assert crazyflie.takeoff(1.0, 1.0) == REFUSED


def test_the_polynomial_meets_its_boundary_conditions():
    rng = np.random.default_rng(0)
    for _ in range(20):
        T = rng.uniform(0.2, 5.0)
        x0, v0, a0, x1, v1, a1 = rng.standard_normal(6)
        c = polynomial(T, x0, v0, a0, x1, v1, a1)
        assert derivatives(c, 0.0) == pytest.approx((x0, v0, a0, 0.0))
        assert derivatives(c, T) == pytest.approx((x1, v1, a1, 0.0), abs=1e-6 * max(1.0, T ** -4))
    assert derivatives(polynomial(0.0, 1.0, 1.0, 1.0, 2.0, 0.0, 0.0), 0.0)[:2] == (2.0, 0.0)


def test_planned_rates_are_the_derivative_of_the_planned_attitude():
    crazyflie = hovering(settings=CRAZYSWARM2)
    planner = crazyflie.high_level
    planner.go_to(0.0, (1.0, 0.7, 1.5), 1.2, 1.5, False)

    def attitude(t):
        s = planner._evaluate(t)
        z = np.array(s.acceleration) + [0.0, 0.0, 9.81]
        z /= np.linalg.norm(z)
        y = np.cross(z, [math.cos(s.yaw), math.sin(s.yaw), 0.0])
        y /= np.linalg.norm(y)
        return np.column_stack([np.cross(y, z), y, z])
    for t in (0.3, 0.6, 0.9):
        skew = attitude(t).T @ (attitude(t + 1e-5) - attitude(t - 1e-5)) / 2e-5
        rates = planner._evaluate(t).rates
        assert rates[:2] == pytest.approx((skew[2, 1], skew[0, 2]), abs=1e-3)
    # The firmware's yaw rate leaves out the part that comes from tilting: exact only without a tilt.
    planner.go_to(2.0, planner._evaluate(2.0).position, -0.4, 1.0, False)
    skew = attitude(2.5).T @ (attitude(2.5 + 1e-5) - attitude(2.5 - 1e-5)) / 2e-5
    assert planner._evaluate(2.5).rates == pytest.approx((0.0, 0.0, skew[1, 0]), abs=1e-6)


# --- supervisor -----------------------------------------------------------------------------------

def test_without_auto_arming_the_drone_flies_only_when_armed_and_disarms_by_itself():
    crazyflie = SimulatedCrazyflie(SimSettings(auto_arm=False))
    run(crazyflie, 0.3)
    assert not info(crazyflie, ARMED) and crazyflie.takeoff(1.0, 1.0) == EBUSY
    crazyflie.set_parameter('supervisor.prefltTimeout', 1000)
    assert crazyflie.arm(True)
    run(crazyflie, 0.3)
    assert info(crazyflie, CAN_FLY)
    run(crazyflie, 1.0)
    assert not info(crazyflie, ARMED)


def test_emergency_stop_cuts_the_motors_and_locks():
    crazyflie = hovering()
    crazyflie.emergency_stop()
    run(crazyflie, 0.1)
    assert crazyflie.pwm == (0, 0, 0, 0) and info(crazyflie, LOCKED)


def test_the_emergency_watchdog_acts_one_second_after_its_last_packet_and_not_before_the_first():
    crazyflie = hovering()
    for _ in range(3):
        crazyflie.emergency_watchdog()
        run(crazyflie, 0.9)
        assert not info(crazyflie, LOCKED)
    run(crazyflie, 0.2)
    assert info(crazyflie, LOCKED)


def test_a_drone_disarmed_in_flight_arms_itself_again_but_forgets_its_trajectory():
    crazyflie = hovering()
    assert crazyflie.arm(False) and not crazyflie.armed
    run(crazyflie, 0.3)
    assert info(crazyflie, ARMED) and info(crazyflie, CAN_FLY) and not info(crazyflie, ACTIVE)
    assert crazyflie.pwm == (0, 0, 0, 0)
    run(crazyflie, 0.7)
    assert height(crazyflie) < 0.1


def test_the_supervisor_bits_change_at_25_hz_and_the_answer_to_arming_at_once():
    crazyflie = SimulatedCrazyflie(SimSettings(auto_arm=False))
    crazyflie.step(200)
    assert crazyflie.arm(True) and crazyflie.armed and not info(crazyflie, ARMED)
    crazyflie.step(40)
    assert info(crazyflie, ARMED)


def test_a_tumbled_drone_is_crashed_until_it_stands_again_and_is_recovered():
    crazyflie = hovering()
    crazyflie.place(at_rest(0.1, (1.0, 0.0, 0.0, 0.0)))
    run(crazyflie, 1.5)
    assert info(crazyflie, CRASHED) and info(crazyflie, TUMBLED) and crazyflie.pwm == (0, 0, 0, 0)
    assert not crazyflie.recover()
    crazyflie.place(at_rest(0.0, LEVEL))
    run(crazyflie, 0.3)
    assert crazyflie.recover()
    run(crazyflie, 0.5)
    assert not info(crazyflie, CRASHED) and info(crazyflie, CAN_FLY)


def test_a_go_to_that_is_not_a_number_disables_the_planner_and_the_old_setpoint_ends_the_flight():
    crazyflie = hovering()
    assert crazyflie.go_to((math.nan, 0.0, 1.0), 0.0, 1.0) == 0
    run(crazyflie, 1.9)
    assert info(crazyflie, DISABLED) and info(crazyflie, FLYING) and height(crazyflie) > 0.8
    run(crazyflie, 0.3)
    assert info(crazyflie, LOCKED) and crazyflie.pwm == (0, 0, 0, 0)


def test_before_the_kalman_filter_is_chosen_external_poses_are_not_heard():
    crazyflie = SimulatedCrazyflie(position=(1.0, -0.5, 0.0))
    run(crazyflie, 1.0)
    assert np.linalg.norm(crazyflie.estimate().position - crazyflie.truth().position) > 0.5
    crazyflie.set_parameter('stabilizer.estimator', 2)
    run(crazyflie, 1.0)
    assert crazyflie.estimate().position == pytest.approx(crazyflie.truth().position, abs=0.02)


def test_a_nan_pose_stops_the_motors_without_an_exception():
    crazyflie = hovering()
    crazyflie.receive_extpose((math.nan,) * 3, LEVEL)
    crazyflie.step(200)
    assert crazyflie.pwm == (0, 0, 0, 0)
    assert crazyflie.truth().is_finite()
    crazyflie.set_parameter('kalman.resetEstimation', 1)
    crazyflie.step(10)
    assert crazyflie.estimate().is_finite()


# --- parameters and log variables -----------------------------------------------------------------

def test_parameters_act_and_wrong_ones_are_named():
    crazyflie = SimulatedCrazyflie()
    crazyflie.set_parameter('ctrlMel.kp_xy', 0.7)
    assert crazyflie.controller.gains.kp_xy == pytest.approx(0.7, rel=1e-6)  # stored as a C float
    crazyflie.set_parameter('stabilizer.controller', 1)
    assert crazyflie.parameters['stabilizer.controller'].value == 1
    assert any('not simulated' in line for line in crazyflie.console)
    with pytest.raises(KeyError, match='no.such'):
        crazyflie.set_parameter('no.such', 1)
    for name, value in (('system.selftestPassed', 0), ('stabilizer.controller', 300), ('ctrlMel.kp_xy', 'x')):
        with pytest.raises(ValueError, match=name):
            crazyflie.set_parameter(name, value)


def test_extpose_standard_deviation_weights_the_pose():
    def pulled(std):
        crazyflie = hovering()
        crazyflie.set_parameter('locSrv.extPosStdDev', std)
        before = crazyflie.estimate().position[0]
        crazyflie.receive_extpos(crazyflie.truth().position + [0.05, 0.0, 0.0])
        crazyflie.step(1)
        return crazyflie.estimate().position[0] - before
    assert pulled(0.001) > 2.0 * pulled(0.01) > 4.0 * pulled(0.1) > 0.0


def test_every_log_variable_fits_its_type():
    crazyflie = hovering()
    for name, (ctype, getter) in crazyflie.log_variables.items():
        value = getter()
        assert math.isfinite(value), name
        struct.pack('<' + ctype, value if ctype == 'f' else int(value))
    assert 3.3 < crazyflie.log_variables['pm.vbat'][1]() < 4.2
    assert crazyflie.log_variables['supervisor.info'][1]() == crazyflie.supervisor_info
