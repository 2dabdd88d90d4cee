# SPDX-License-Identifier: GPL-3.0-or-later
import pytest

from crazyflie_interface.stamp_clock import SETTLES, StampClock

EPOCH = 1.7e9  # s, the ROS clock where the steady one is 0


def test_without_observations_both_clocks_are_one():
    assert StampClock(0.05).steady(12.5, 12.6) == 12.5


def test_a_stamp_is_as_old_on_the_steady_clock_as_on_the_ros_clock():
    clock = StampClock(0.05)
    assert clock.observe(EPOCH + 10.0, 10.0) == 0.0
    assert clock.steady(EPOCH + 9.98, 10.0) == pytest.approx(9.98, abs=1e-6)


def test_a_slow_adjustment_is_followed_and_is_no_step():
    clock, ros = StampClock(0.05), EPOCH
    for k in range(1000):  # 500 ppm, NTP's fastest
        ros += 0.02 * (1.0 + 5e-4)
        assert clock.observe(ros, 0.02 * (k + 1)) == 0.0
    assert clock.steps == 0
    assert clock.steady(ros - 0.01, 20.0) == pytest.approx(19.99, abs=1e-6)


@pytest.mark.parametrize('step', [-3600.0, -1.0, -0.2, 0.2, 1.0, 3600.0])
def test_after_a_step_stamps_of_both_clocks_keep_their_age(step):
    clock = StampClock(0.05)
    clock.observe(EPOCH + 10.0, 10.0)
    assert clock.observe(EPOCH + step + 10.02, 10.02) == pytest.approx(step, abs=1e-6)
    assert clock.steps == 1 and clock.last_step == pytest.approx(step, abs=1e-6)
    for sent_with in (EPOCH, EPOCH + step):
        assert clock.steady(sent_with + 10.01, 10.02) == pytest.approx(10.01, abs=1e-6)
    later = 10.03 + SETTLES
    assert clock.observe(EPOCH + step + later, later) == 0.0
    assert not clock.settling(later)
    # who has not noticed by then is as wrong as the step
    assert clock.steady(EPOCH + later, later) == pytest.approx(later - step, abs=1e-6)
