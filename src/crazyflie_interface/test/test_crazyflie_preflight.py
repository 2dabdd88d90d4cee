# SPDX-License-Identifier: GPL-3.0-or-later
"""Every check of the preflight passes in a sound lab, and fails alone where its one cause is injected."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from crazyflie_interface import preflight, radio
from crazyflie_interface.preflight import Heard, Known, PoseWindow, checks, refusal
from crazyflie_interface.radio import Telemetry
from crazyflie_interface.settings import FlightSettings, PreflightSettings
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.interface import Diagnostic
from deqmpc.types import Obstacles

NOW, S = 100.0, FlightSettings()
REPORTS = {
    'mocap': {'body': 'cf1', 'tracked': 'True', 'clock_uncertainty_ms': '0.31'},
    'policy': {'policy': 'deq_mpc_deq', 'tick': '57', 'gate': 'accepted', 'latency_ms': '25.2'},
    'recorder': {'messages': '4711', 'disk_free_bytes': '9.5e+10'}}


def heard(node, level=interface.OK, message='recording', arrived=NOW - 0.4, age=0.002, **values):
    return Heard(Diagnostic(arrived - age, f'cf1/{node}', level, message, {**REPORTS[node], **values}), arrived, age)


def sphere(x, y, z, velocity=(0.0, 0.0, 0.0)):
    return Obstacles(NOW, np.array([[x, y, z]]), np.array([0.1]), np.array([velocity]))


SOUND = Known(
    now=NOW, telemetry=Telemetry(
        link='up', stamp=NOW - 0.05, battery_v=4.02, supervisor=radio.CAN_ARM, link_quality=98.0,
        position=np.array([0.31, 0.2, 0.0]), yaw=0.52, variance=np.full(3, 2e-5), parameter_faults=()),
    position=np.array([0.3, 0.2, 0.01]), quaternion=rotation.from_yaw(0.5), pose_age=0.009,
    arrivals=NOW - np.arange(0.0, 1.0, 0.01)[::-1], latencies=np.full(100, 0.006), plan_age=0.07,
    obstacles=sphere(1.0, 1.0, 0.5), heard={node: heard(node) for node in REPORTS}, clock_difference=0.0)
TILTED = np.array([np.sin(0.2), 0.0, 0.0, np.cos(0.2)])  # rolled by 0.4 rad


def but(**changes):
    """SOUND with other values; those of Telemetry go there."""
    mine = {k: changes.pop(k) for k in list(changes) if k in {f.name for f in dataclasses.fields(Telemetry)} - {
        'position', 'fault'}}
    return dataclasses.replace(SOUND, telemetry=dataclasses.replace(SOUND.telemetry, **mine), **changes)


def estimate(position):
    return dataclasses.replace(SOUND, telemetry=dataclasses.replace(SOUND.telemetry, position=position))


def hears(node, *args, **kwargs):
    return but(heard={**SOUND.heard, node: heard(node, *args, **kwargs)})


def failed(known, settings=S, body='cf1'):
    return {c.name: c for c in checks(known, settings, body) if not c.passed}


def test_every_check_passes_in_a_sound_lab_and_the_table_is_that_of_the_interface():
    table = checks(SOUND, S, 'cf1')
    assert tuple(c.name for c in table) == interface.PREFLIGHT_CHECKS
    assert [c.name for c in table if not c.passed] == [] and refusal(table) == ''
    assert all(c.value and c.limit and c.fix and c.level == interface.OK and not c.waived for c in table)


CAUSES = [
    ('radio_link', but(stamp=NOW - 1.5), '1.50 s old'),
    ('link_quality', but(link_quality=40.0), '40 %'),
    ('parameters', but(parameter_faults=('parameter stabilizer.controller reads 1, was set to 2',)), 'reads 1'),
    ('parameters', but(parameter_faults=None), 'not set yet'),
    ('supervisor', but(supervisor=radio.CAN_ARM | radio.LOCKED), 'locked (0x041)'),
    ('supervisor', but(supervisor=radio.CAN_ARM | radio.TUMBLED), 'tumbled'),
    ('supervisor', but(supervisor=radio.CAN_ARM | radio.CRASHED), 'crashed'),
    ('supervisor', but(supervisor=0), 'not ready'),
    ('supervisor', but(supervisor=None), 'unknown'),
    ('supervisor', but(phase='armed', supervisor=radio.CAN_ARM | radio.ARMED), 'not ready'),
    ('battery', but(battery_v=3.79), '3.79 V'),
    ('battery', but(battery_v=None), 'unknown'),
    ('battery', but(battery_v=float('nan')), 'nan V'),
    ('mocap_pose', but(pose_age=0.13, pose_fault='pose is not finite'), '0.13 s old (pose is not finite)'),
    ('mocap_pose', but(arrivals=np.delete(SOUND.arrivals, slice(40, 52)), latencies=np.full(88, 0.006)),
     'longest gap 0.13 s'),
    ('mocap_rate', but(arrivals=NOW - np.arange(0.0, 1.0, 0.02)[::-1]), '50.0 Hz'),
    ('mocap_rate', but(arrivals=NOW - np.arange(0.0, 1.0, 0.005)[::-1]), '200.0 Hz'),
    ('mocap_latency', but(latencies=np.full(100, 0.08)), '80.0 ms'),
    ('mocap_latency', but(latencies=np.full(100, -0.02)), '-20.0 ms'),
    ('mocap_body', hears('mocap', body='cf2'), "'cf2' tracked"),
    ('mocap_body', hears('mocap', tracked='False'), 'not tracked'),
    ('mocap_body', hears('mocap', interface.ERROR, "rigid body 'cf1' is gone from the mocap system"), 'is gone'),
    ('mocap_clock', hears('mocap', clock_uncertainty_ms='9.5'), '9.5 ms'),
    ('mocap_clock', hears('mocap', clock_uncertainty_ms='inf'), 'no echo'),
    ('mocap_clock', hears('mocap', clock_uncertainty_ms='soon'), 'nan ms'),
    ('estimate_position', estimate(np.array([0.3, 0.26, 0.01])), '0.060 m'),
    ('estimate_position', estimate(np.full(3, np.nan)), 'nan m'),
    ('estimate_position', estimate(None), 'unknown'),
    ('estimate_yaw', but(yaw=0.5 - 0.2), '0.200 rad'),
    ('estimate_yaw', but(yaw=None), 'unknown'),
    ('estimate_variance', but(variance=np.array([1e-5, 1e-5, 0.02])), '0.02 m^2'),
    ('estimate_variance', but(variance=None), 'unknown'),
    ('level', but(quaternion=TILTED, yaw=0.0), '0.40 rad'),
    ('obstacles', but(obstacles=None), 'no /obstacles yet'),
    ('obstacles', but(obstacles=sphere(0.3, 0.2, 0.4)), '-0.10 m to sphere 0'),
    ('obstacles', but(obstacles=sphere(0.3, -0.3, 0.5, (0.0, 0.3, 0.0))), 'to sphere 0'),  # comes by in 2 s
    ('policy_latency', hears('policy', latency_ms='240'), '240.0 ms'),
    ('policy_latency', hears('policy', latency_ms='nan'), 'nan ms'),
    ('plan', hears('policy', gate='planned clearance is -0.05 m'), 'no plan: planned clearance'),
    ('plan', but(plan_age=0.4, plan_fault='plan is not finite'), '0.40 s old (plan is not finite)'),
    ('plan', but(plan_age=np.inf), 'none yet'),
    ('clock', but(clock_difference=None), 'unknown'),
    ('clock', but(clock_difference=-1.7e9), 'ROS minus system time'),
    ('clock', but(clock_step=1.0), 'just set by 1.000 s'),
    ('clock', hears('policy', age=0.35), "policy's stamp is 350 ms old"),
    ('clock', hears('mocap', age=-0.2), "mocap's stamp is -200 ms old"),
    ('recorder', hears('recorder', interface.ERROR, 'recording stopped: No space left on device'), 'No space left'),
    ('disk', hears('recorder', disk_free_bytes='1.2e+09'), '1.2 GB'),
]


@pytest.mark.parametrize(('name', 'known', 'word'), CAUSES)
def test_each_check_fails_alone_when_its_one_cause_is_there(name, known, word):
    found = failed(known)
    assert list(found) == [name]
    assert word in found[name].value
    assert name in refusal(checks(known, S, 'cf1')) and found[name].fix in refusal(checks(known, S, 'cf1'))


def test_every_check_has_a_cause_above_but_those_of_a_drone_elsewhere_and_a_silent_policy():
    assert set(interface.PREFLIGHT_CHECKS) - {name for name, _, _ in CAUSES} == {'fence', 'policy'}


def test_a_drone_outside_the_fence_fails_the_fence_alone():
    outside = np.array([2.6, 0.0, 0.01])
    known = dataclasses.replace(estimate(outside), position=outside)
    assert list(failed(known)) == ['fence']
    below_floor = dataclasses.replace(estimate(np.zeros(3)), position=np.zeros(3))
    assert not failed(below_floor)  # the ground lies below the fence's floor


@pytest.mark.parametrize(('node', 'names'), [
    ('mocap', ['mocap_body', 'mocap_clock']), ('policy', ['policy', 'policy_latency']),
    ('recorder', ['recorder', 'disk'])])
def test_a_node_that_never_reported_or_fell_silent_fails_what_it_alone_can_tell(node, names):
    never = but(heard={n: h for n, h in SOUND.heard.items() if n != node})
    silent = hears(node, arrived=NOW - 3.0)
    for known, word in ((never, 'has not reported'), (silent, 'silent for 3.0 s')):
        found = failed(known)
        assert list(found) == names and all(word in c.value for c in found.values())


def test_nothing_known_fails_every_check():
    assert set(failed(Known(now=NOW))) == set(interface.PREFLIGHT_CHECKS)


def test_a_link_that_is_not_up_says_why():
    found = failed(dataclasses.replace(SOUND, telemetry=Telemetry(link='lost', fault='no dongle')))
    assert found['radio_link'].value == 'lost: no dongle'


def test_a_link_that_measures_no_quality_and_an_empty_field_pass():
    assert not failed(but(link_quality=None, obstacles=Obstacles.none(NOW)))


def test_a_heading_error_is_taken_around_the_circle():
    turned = but(quaternion=rotation.from_yaw(np.pi - 0.02), yaw=-np.pi + 0.02)
    assert 'estimate_yaw' not in failed(turned)


def test_a_waived_check_is_still_judged_and_shown_but_does_not_refuse():
    settings = FlightSettings(preflight_waive='battery, obstacles')
    table = {c.name: c for c in checks(but(battery_v=3.5), settings, 'cf1')}
    assert refusal(tuple(table.values())) == ''
    assert not table['battery'].passed and table['battery'].level == interface.WARN
    assert table['battery'].sentence.startswith('waived by the operator: 3.50 V')
    assert table['obstacles'].passed and table['obstacles'].sentence == 'waived by the operator: passed'
    assert refusal(checks(but(battery_v=3.5, link_quality=1.0), settings, 'cf1')).startswith('link_quality')


def test_a_graph_without_a_recorder_flies_when_it_is_started_so():
    without = but(heard={n: h for n, h in SOUND.heard.items() if n != 'recorder'})
    assert set(failed(without)) == {'recorder', 'disk'}
    assert refusal(checks(without, FlightSettings(require_recorder=False), 'cf1')) == ''


@pytest.mark.parametrize(('waive', 'word'), [
    ('batery', 'preflight_waive names batery; expected some of radio_link'),
    ('battery;disk', 'battery;disk'), ('disk, radio_link', 'radio_link, which cannot be waived'),
    ('mocap_pose', 'mocap_pose, which cannot be waived')])
def test_a_waiver_of_what_is_no_check_or_must_hold_is_refused_by_name(waive, word):
    with pytest.raises(ValueError, match=word):
        FlightSettings(preflight_waive=waive)


def test_the_pose_window_keeps_the_poses_of_its_span_and_no_more():
    window = PoseWindow(1.0)
    for i in range(500):
        window.add(0.01 * i, 0.005 + 1e-5 * i)
    arrivals, latencies = window.since(4.495)
    late = np.arange(450, 500)
    assert np.allclose(arrivals, 0.01 * late) and np.allclose(latencies, 0.005 + 1e-5 * late)
    assert len(window.since(-np.inf)[0]) == 101
    assert PoseWindow(1.0).since(0.0).shape == (2, 0)


def test_checks_read_no_clock_and_change_nothing(monkeypatch):
    monkeypatch.setattr('time.time', None)
    first = checks(SOUND, S, 'cf1')
    assert checks(SOUND, S, 'cf1') == first and isinstance(first[0], preflight.Check)


def test_the_readme_lists_every_check_and_every_parameter_of_the_preflight_with_its_default():
    readme = (Path(__file__).parents[1] / 'README.md').read_text()
    checks_table = readme.split('## Preflight')[1].split('\n## ')[0]
    assert [n for n in interface.PREFLIGHT_CHECKS if f'`{n}`' not in checks_table] == []
    rows = {r.split('`')[1]: r.split('|')[2].strip() for r in readme.split('## Parameters')[1].splitlines()
            if r.startswith('| `')}
    for field in dataclasses.fields(PreflightSettings):
        assert rows[field.name].strip("'").lower() == str(field.default).lower(), field.name
