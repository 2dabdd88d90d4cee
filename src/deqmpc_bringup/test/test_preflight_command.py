"""`deqmpc preflight` against the interface node over a real ROS graph, and on the simulated lab."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is not installed')

from flying import sim_arguments  # noqa: E402

from deqmpc import interface  # noqa: E402
from deqmpc.interface import Diagnostic  # noqa: E402
from deqmpc_bringup import preflight  # noqa: E402
from deqmpc_bringup.composition import compose, share_dir  # noqa: E402


def deqmpc(*words, domain):
    return subprocess.Popen([sys.executable, '-m', 'deqmpc.cli', *map(str, words)], text=True,
                            env={**os.environ, 'ROS_DOMAIN_ID': str(domain)}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def status(name, passed, waived=False, robot='cf1'):
    values = {'value': f'{name} found', 'limit': f'{name} wanted', 'fix': f'mend {name}', 'passed': str(passed),
              'waived': str(waived)}
    return Diagnostic(0.0, f'{robot}/preflight/{name}', interface.OK, '', values)


def test_the_table_shows_value_and_limit_of_every_check_and_the_fix_of_those_that_did_not_pass():
    rows = preflight.rows_of([status('battery', False), status('disk', True), status('plan', False, True),
                              status('fence', True, robot='cf2'), Diagnostic(0.0, 'cf1/policy', 0, '', {})], 'cf1')
    assert [r.result for r in rows] == ['FAIL', 'pass', 'waived'] and not preflight.ready(rows)
    text = preflight.table('cf1', rows)
    assert text.startswith('cf1: NOT READY, 1 of 3 checks failed, 1 waived by the operator')
    assert all(f'{n} found' in text and f'{n} wanted' in text for n in ('battery', 'disk', 'plan'))
    assert 'mend battery' in text and 'mend plan' in text and 'mend disk' not in text
    assert preflight.ready(rows[1:]) and preflight.table('cf1', rows[1:]).startswith('cf1: ready, 1 waived')


def test_a_graph_that_is_not_there_ends_with_status_2_and_says_what_to_look_at():
    run = deqmpc('preflight', '--robot', 'cf7', '--timeout', 0.5, domain=93)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2, output
    assert '/cf7/preflight within 0.5 s' in output and 'ROS_DOMAIN_ID=93' in output and 'Traceback' not in output


def test_a_name_that_no_robot_can_have_is_refused_by_name(capsys):
    with pytest.raises(SystemExit, match='2'):
        preflight.main(['--robot', 'cf 1'])
    assert "--robot 'cf 1'" in capsys.readouterr().err


@pytest.mark.parametrize(('given', 'found'), [
    ({}, ['require_recorder:=true']), ({'record': 'false'}, ['require_recorder:=false']),
    ({'waive': 'plan,policy'}, ['require_recorder:=true', 'preflight_waive:="plan,policy"'])])
def test_a_flight_without_a_recorder_or_with_waived_checks_is_asked_for_by_launch_arguments(given, found):
    row = next(r for r in compose('sim', given) if r.name == 'crazyflie_interface')
    assert [a for a in row.ros_arguments if a.split(':=')[0] in ('require_recorder', 'preflight_waive')] == found


def test_what_the_simulated_lab_asks_for_less_strictly_is_written_in_its_parameter_file_alone():
    flight = yaml.safe_load((share_dir() / 'config' / 'flight.yaml').read_text())['/**']
    assert not [k for k in flight['crazyflie_interface']['ros__parameters'] if k.startswith('preflight')]
    sim = yaml.safe_load((share_dir() / 'config' / 'sim.yaml').read_text())['/**']
    loosened = [k for k in sim['crazyflie_interface']['ros__parameters'] if k.startswith('preflight')]
    assert loosened == ['preflight_clearance', 'preflight_latency', 'preflight_policy_latency']


@pytest.fixture(scope='module')
def flight(tmp_path_factory):
    """The simulated lab without a recorder, which says so, and with a check that the operator waives."""
    path = tmp_path_factory.mktemp('preflight')
    with (path / 'out').open('w') as out:
        run = subprocess.Popen(
            [sys.executable, '-m', 'deqmpc.cli', 'fly', 'sim', 'record:=false', 'waive:=link_quality', 'obstacles:=off',
             f'run_dir:={path / "run"}', *sim_arguments()], env={**os.environ, 'ROS_DOMAIN_ID': '92'}, stdout=out,
            stderr=subprocess.STDOUT)
        yield path / 'out'
        run.send_signal(signal.SIGTERM)
        run.wait(60)


def test_every_check_passes_in_the_simulated_lab_or_is_shown_as_waived(flight):
    until = time.monotonic() + 120.0  # the graph starts, and a busy machine may be late now and then
    while True:
        output, _ = (run := deqmpc('preflight', '--json', '--timeout', 60, domain=92)).communicate(timeout=90)
        if run.returncode == 0 or time.monotonic() > until:
            break
    assert run.returncode == 0, output + flight.read_text()
    answer = json.loads(output)['cf1']
    assert answer['ready'] and tuple(c['name'] for c in answer['checks']) == interface.PREFLIGHT_CHECKS
    assert {c['name'] for c in answer['checks'] if not c['passed']} == {'recorder', 'disk'}
    assert {c['name'] for c in answer['checks'] if c['waived']} == {'recorder', 'disk', 'link_quality'}
    assert all(f'preflight check {n} is waived by the operator' in flight.read_text() for n in
               ('recorder', 'disk', 'link_quality'))
