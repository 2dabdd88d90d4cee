"""The plant against closed forms and invariants."""

import dataclasses
import math

import numpy as np
import pytest

from deqmpc.airframe import GRAVITY, Airframe
from deqmpc.dynamics import rotation
from deqmpc.realtime import build
from sim_env import power_distribution
from sim_env.plant import MOTOR_21PLUS, MOTOR_LEGACY, Plant, PlantSettings, open_circuit_voltage

FRAME = Airframe()
NO_DRAG = dataclasses.replace(FRAME, drag=(0.0, 0.0, 0.0))
OFF = (0, 0, 0, 0)
COMPILED = pytest.mark.skipif(not build.available(), reason='no C compiler')
GROUNDS = ['springs', pytest.param('cones', marks=COMPILED)]


def tossed(frame, rng, height=1000.0):
    """A plant in the air with a random attitude, velocity and rates."""
    plant = Plant(frame, PlantSettings(), (0.0, 0.0, height))
    plant.qx, plant.qy, plant.qz, plant.qw = rotation.normalize(rng.standard_normal(4)).tolist()
    plant.vx, plant.vy, plant.vz = rng.standard_normal(3).tolist()
    plant.wx, plant.wy, plant.wz = (10.0 * rng.standard_normal(3)).tolist()
    return plant


def angular_momentum(plant):
    """World-frame angular momentum (3,)."""
    body = np.array(plant.airframe.inertia) * (plant.wx, plant.wy, plant.wz)
    return rotation.rotate(np.array([plant.qx, plant.qy, plant.qz, plant.qw]), body)


def hover_pwm(plant):
    """PWM at which each motor carries a quarter of the weight at the present voltage."""
    v = power_distribution.motor_voltage(plant.airframe.hover_thrust, plant.settings.motor_curve)
    return (65535.0 * v / plant.voltage,) * 4


def test_free_fall_is_a_parabola_and_conserves_energy():
    plant = tossed(NO_DRAG, np.random.default_rng(0))
    start, vz, z = plant.energy(), plant.vz, plant.z
    for _ in range(1000):
        plant.step(1e-3, OFF)
    assert plant.z == pytest.approx(z + vz - 0.5 * GRAVITY, abs=1e-9)
    # 100 rad/s of tumbling is integrated by the midpoint rule: second order, not exact.
    assert plant.energy() == pytest.approx(start, rel=1e-7)


@pytest.mark.parametrize('seed', range(3))
def test_torque_free_rotation_conserves_angular_momentum(seed):
    plant = tossed(NO_DRAG, np.random.default_rng(seed))
    before = angular_momentum(plant)
    for _ in range(1000):
        plant.step(1e-3, OFF)
    assert angular_momentum(plant) == pytest.approx(before, abs=2e-4 * np.linalg.norm(before))


@pytest.mark.parametrize('seed', range(3))
def test_drag_only_takes_energy_out(seed):
    plant = tossed(FRAME, np.random.default_rng(seed))
    energy = plant.energy()
    for _ in range(300):
        plant.step(1e-3, OFF)
        assert plant.energy() < energy
        energy = plant.energy()


def test_hover_thrust_holds_the_body_still():
    plant = Plant(FRAME, PlantSettings(), (0.0, 0.0, 1.0))
    plant.fixed_voltage = plant.voltage = 3.8
    plant.f1 = plant.f2 = plant.f3 = plant.f4 = FRAME.hover_thrust
    for _ in range(2000):
        plant.step(1e-3, hover_pwm(plant))
    assert (plant.x, plant.y, plant.z) == pytest.approx((0.0, 0.0, 1.0), abs=1e-6)
    assert plant.az_body == pytest.approx(GRAVITY, rel=1e-6)


@pytest.mark.parametrize('motors, rates', [
    ((0, 0, 1, 1), (1, 0, 0)), ((0, 1, 1, 0), (0, 1, 0)), ((0, 1, 0, 1), (0, 0, 1))])
def test_motors_turn_the_body_about_the_axes_of_the_airframe(motors, rates):
    plant = Plant(FRAME, PlantSettings(), (0.0, 0.0, 10.0))
    for _ in range(20):
        plant.step(1e-3, tuple(20000.0 + 10000.0 * m for m in motors))
    w = np.array([plant.wx, plant.wy, plant.wz])
    assert np.sign(np.round(w, 3)).tolist() == list(rates)


def test_motor_thrust_follows_a_first_order_lag():
    plant = Plant(FRAME, PlantSettings(), (0.0, 0.0, 10.0))
    plant.fixed_voltage = plant.voltage = 3.8
    for _ in range(50):
        plant.step(1e-3, hover_pwm(plant))
    assert plant.f1 == pytest.approx(FRAME.hover_thrust * (1.0 - math.exp(-0.05 / FRAME.motor_time_constant)))


@pytest.mark.parametrize('contact', GROUNDS)
@pytest.mark.parametrize('tilt', [0.0, 0.4, -0.7])
def test_a_dropped_body_comes_to_rest_on_the_floor(tilt, contact):
    plant = Plant(FRAME, PlantSettings(floor=0.2, contact=contact), (0.0, 0.0, 0.6), yaw=1.0)
    plant.qx, plant.qy, plant.qz, plant.qw = math.sin(tilt / 2.0), 0.0, 0.0, math.cos(tilt / 2.0)
    plant.vx = 0.5
    lowest, highest, landed = plant.z, 0.0, False
    for _ in range(2000):
        plant.step(1e-3, OFF)
        lowest, landed = min(lowest, plant.z), landed or plant.on_ground
        highest = max(highest, plant.z) if landed else 0.0
    assert lowest > 0.2 - 0.005
    assert highest < 0.2 + 0.05 * (1.0 + abs(tilt))  # inelastic: no bounce, a tilted body tips over
    assert plant.z == pytest.approx(0.2, abs=1e-3)
    assert math.hypot(plant.vx, plant.vy, plant.vz) < 1e-3 and abs(plant.wx) + abs(plant.wy) < 1e-2
    assert rotation.tilt(np.array([plant.qx, plant.qy, plant.qz, plant.qw])) < 0.01


@pytest.mark.parametrize('contact', GROUNDS)
def test_a_body_on_its_back_stays_there(contact):
    plant = Plant(FRAME, PlantSettings(contact=contact), (0.0, 0.0, 0.1))
    plant.qx, plant.qw = 1.0, 0.0
    for _ in range(1000):
        plant.step(1e-3, OFF)
    assert plant.az_body == pytest.approx(-GRAVITY, rel=1e-3)
    assert plant.z > 0.0


def lowest_corner(plant):
    """Height of the lowest corner over the floor, m."""
    *_, r20, r21, r22 = plant.rotation()
    return min(plant.z + r20 * x + r21 * y + r22 * z for x, y, z in plant._corners) - plant.settings.floor + 0.015


@COMPILED
@pytest.mark.parametrize('seed', range(4))
def test_a_rigid_ground_is_not_entered_gives_no_energy_and_lets_the_body_rest(seed):
    plant = tossed(FRAME, np.random.default_rng(seed), height=0.2)
    plant = _on_cones(plant)
    energy = plant.energy()
    for _ in range(2500):
        plant.step(1e-3, OFF)
        assert lowest_corner(plant) > -1e-5  # the rotation in 1 ms at 30 rad/s bends the straight path by less
        assert plant.energy() < energy + 1e-7
        energy = plant.energy()
    assert plant.on_ground
    assert math.hypot(plant.vx, plant.vy, plant.vz) < 1e-5
    assert math.hypot(plant.wx, plant.wy, plant.wz) < 1e-3


def _on_cones(body):
    """`body` as a plant over a rigid ground."""
    plant = Plant(body.airframe, PlantSettings(contact='cones'), (body.x, body.y, body.z))
    for name in ('qx', 'qy', 'qz', 'qw', 'vx', 'vy', 'vz', 'wx', 'wy', 'wz'):
        setattr(plant, name, getattr(body, name))
    return plant


@COMPILED
@pytest.mark.parametrize('heading', [0.0, 0.9])
@pytest.mark.parametrize('share', [0.5, 1.5])
def test_a_side_force_within_the_friction_cone_moves_nothing_and_one_beyond_it_accelerates_the_rest(share, heading):
    plant = Plant(NO_DRAG, PlantSettings(contact='cones'), (0.0, 0.0, 0.0), yaw=0.3)
    limit = 0.6 * FRAME.mass * GRAVITY
    for _ in range(100):
        plant.step(1e-3, OFF)
    plant.push = (share * limit * math.cos(heading), share * limit * math.sin(heading), 0.0)
    for _ in range(200):
        plant.step(1e-3, OFF)
    speed = math.hypot(plant.vx, plant.vy)
    assert speed == pytest.approx(max(0.0, share - 1.0) * 0.6 * GRAVITY * 0.2, rel=0.02, abs=1e-4)
    if share > 1.0:
        assert math.atan2(plant.vy, plant.vx) == pytest.approx(heading, abs=0.02)
    assert rotation.tilt(np.array([plant.qx, plant.qy, plant.qz, plant.qw])) < 1e-3


@COMPILED
def test_the_accelerometer_of_a_body_at_rest_on_a_rigid_ground_measures_gravity():
    plant = Plant(FRAME, PlantSettings(contact='cones'), (0.0, 0.0, 0.01))
    for _ in range(500):
        plant.step(1e-3, OFF)
    assert (plant.ax_body, plant.ay_body, plant.az_body) == pytest.approx((0.0, 0.0, GRAVITY), abs=1e-2)


@pytest.mark.parametrize('height, gain', [(0.003, 1.21), (0.015, 1.14), (0.041, 1.07), (0.078, 1.01), (0.6, 1.0)])
def test_rotors_near_the_floor_give_what_the_recorded_take_off_shows(height, gain):
    plant = Plant(NO_DRAG, PlantSettings(ground_effect=7.0, floor=0.3), (0.0, 0.0, 0.3 + height))
    plant.fixed_voltage = plant.voltage = 3.8
    plant.f1 = plant.f2 = plant.f3 = plant.f4 = FRAME.hover_thrust
    plant.step(1e-4, hover_pwm(plant))
    assert plant.az_body / GRAVITY == pytest.approx(gain, abs=0.025)


def test_the_ground_effect_turns_a_tilted_body_level():
    plant = Plant(NO_DRAG, PlantSettings(ground_effect=7.0), (0.0, 0.0, 0.03))
    plant.qx, plant.qw = math.sin(0.1), math.cos(0.1)  # rolled to the right: the left rotors are higher
    plant.f1 = plant.f2 = plant.f3 = plant.f4 = FRAME.hover_thrust
    plant.step(1e-3, hover_pwm(plant))
    assert plant.wx < -0.005 and abs(plant.wy) < 1e-9


def test_battery_sags_under_load_discharges_and_recovers():
    plant = Plant(FRAME, PlantSettings(), (0.0, 0.0, 1.0))
    rest = plant.voltage
    for _ in range(2000):
        plant.step(1e-3, hover_pwm(plant))
    loaded, used = plant.voltage, 1.0 - plant.charge
    for _ in range(500):
        plant.step(1e-3, OFF)
    assert loaded < rest - 0.25
    assert loaded + 0.25 < plant.voltage < rest
    assert 5.0 < 2.0 / used / 60.0 < 8.0  # minutes of hover on a full battery; Bitcraze says 7


def test_open_circuit_voltage_rises_with_charge():
    volts = [open_circuit_voltage(c / 50.0) for c in range(51)]
    assert volts == sorted(volts) and (volts[0], volts[-1]) == (3.0, 4.2)


@pytest.mark.parametrize('curve', [MOTOR_21PLUS, MOTOR_LEGACY])
@pytest.mark.parametrize('thrust', [0.013, 0.04, 0.08, 0.12])
def test_motor_voltage_inverts_the_thrust_curve(curve, thrust):
    v = power_distribution.motor_voltage(thrust, curve)
    assert sum(a * v ** k for k, a in enumerate(curve)) == pytest.approx(thrust, rel=1e-9)


def test_compensated_motors_give_the_same_thrust_at_every_voltage():
    thrusts = []
    for voltage in (3.3, 3.6, 4.1):
        plant = Plant(FRAME, PlantSettings())
        plant.voltage = voltage
        thrusts.append(plant.motor_thrust(power_distribution.compensate(40000, voltage, MOTOR_21PLUS), 0))
    assert thrusts == pytest.approx([40000 / 65535 * 0.12] * 3, rel=1e-4)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match='battery_charge = 1.5'):
        PlantSettings(battery_charge=1.5)
    with pytest.raises(ValueError, match='thrust_scale'):
        PlantSettings(thrust_scale=0.0)
    with pytest.raises(ValueError, match="contact = 'mud'; expected springs or cones"):
        PlantSettings(contact='mud')
    with pytest.raises(ValueError, match='ground_effect = -1.0'):
        PlantSettings(ground_effect=-1.0)


def test_a_push_in_the_world_moves_the_centre_of_mass_by_f_t2_over_2m_whatever_the_attitude():
    plant = tossed(NO_DRAG, np.random.default_rng(1))
    free = tossed(NO_DRAG, np.random.default_rng(1))
    plant.push = (0.03, -0.02, 0.05)
    for _ in range(500):
        plant.step(1e-3, OFF)
        free.step(1e-3, OFF)
    moved = np.array([plant.x - free.x, plant.y - free.y, plant.z - free.z])
    assert moved == pytest.approx(0.5 * np.array(plant.push) / FRAME.mass * 0.25, rel=1e-9)
    assert (plant.wx, plant.wy, plant.wz) == (free.wx, free.wy, free.wz)


def test_a_weakened_motor_gives_that_fraction_of_its_thrust():
    plant = Plant(FRAME, PlantSettings())
    before = [plant.motor_thrust(30000.0, i) for i in range(4)]
    plant.weaken(2, 0.7)
    after = [plant.motor_thrust(30000.0, i) for i in range(4)]
    assert after == pytest.approx([before[0], before[1], 0.7 * before[2], before[3]])
