"""Recorder, replay and trial as real processes on a DDS domain of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from flight_log_synthetic import SyntheticTrial, write_trial  # noqa: E402

from flight_log import bag  # noqa: E402

SECONDS = 1.0


@pytest.fixture
def environment():
    return {**os.environ, 'ROS_DOMAIN_ID': '71',
            'ROS_PYTHON_CHECK_FIELDS': '1'}


def start(environment, module, *parameters):
    arguments = [a for p in parameters for a in ('-p', p)]
    return subprocess.Popen(
        [sys.executable, '-c', f'import sys; from flight_log.{module} import main; sys.exit(main(sys.argv))',
         '--ros-args', '-r', '__ns:=/cf1', '--log-level', 'info', *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop(process, number):
    process.send_signal(number)
    try:
        out, _ = process.communicate(timeout=15)
    finally:
        process.kill()
    return out


def content(path, topic):
    # DDS pads a payload to 4 bytes
    return [(t, data.rstrip(b'\0')) for _, _, t, data in bag.read_raw(path, [topic])]


def test_a_replayed_bag_is_recorded_again_with_the_same_content_and_stamps_of_now(tmp_path, environment):
    source = write_trial(tmp_path / 'source', SyntheticTrial(seconds=SECONDS, lead=0.1))
    recorder = start(environment, 'recorder_node', f'bag_path:={tmp_path / "again"}', 'metadata:=["seed=3"]')
    replay = start(environment, 'replay_node', f'bag:={source}',
                   'topics:=["pose","odom","obstacles","status"]')
    said, _ = replay.communicate(timeout=30)
    assert replay.returncode == 0, said
    time.sleep(0.3)  # what is on the wire arrives
    said = stop(recorder, signal.SIGTERM)
    assert recorder.returncode == 0, said
    info = bag.bag_info(tmp_path / 'again')
    assert not info.torn and info.metadata == {'robot': 'cf1', 'seed': '3'}
    for topic in ('/cf1/pose', '/cf1/odom', '/obstacles', '/cf1/status'):
        sent, got = content(source, topic), content(tmp_path / 'again', topic)
        assert len(got) >= 0.9 * len(sent), f'{topic}: {len(got)} of {len(sent)}\n{said}'
        if topic != '/obstacles':  # bytes 4 to 12 are the stamp
            assert {d[12:] for _, d in got} <= {d[12:] for _, d in sent}, topic
    age = [t - m.header.stamp.sec - 1e-9 * m.header.stamp.nanosec
           for _, _, t, m in bag.read_bag(tmp_path / 'again', ['/cf1/pose'])]
    assert np.median(np.abs(age)) < 5.0  # stamps are of now, not of the recording


def test_a_killed_recorder_leaves_a_readable_bag_with_the_replayed_bytes(tmp_path, environment):
    source = write_trial(tmp_path / 'source', SyntheticTrial(seconds=SECONDS, lead=0.1))
    recorder = start(environment, 'recorder_node', f'bag_path:={tmp_path / "torn"}')
    replay = start(environment, 'replay_node', f'bag:={source}', 'restamp:=false')
    replay.communicate(timeout=30)
    time.sleep(0.5)
    stop(recorder, signal.SIGKILL)
    assert bag.bag_info(tmp_path / 'torn').torn
    for topic in ('/cf1/pose', '/cf1/odom', '/obstacles'):
        sent, got = content(source, topic), content(tmp_path / 'torn', topic)
        assert len(got) >= 0.9 * len(sent), topic
        assert {d for _, d in got} <= {d for _, d in sent}, topic


def test_wrong_parameters_end_a_node_with_status_2_and_one_line(tmp_path, environment):
    (tmp_path / 'there').mkdir()
    for module, parameter, words in (
            ('recorder_node', f'bag_path:={tmp_path / "there"}', 'exists'),
            ('replay_node', f'bag:={tmp_path / "absent"}', 'no such file'),
            ('trial_node', 'start:=left', 'expected "random"')):
        process = start(environment, module, parameter)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 2 and words in said and 'Traceback' not in said, said


@pytest.fixture
def drone(environment):
    script = Path(__file__).parent / 'flight_log_fake_flight.py'
    process = subprocess.Popen([sys.executable, str(script), '--ros-args', '-r', '__ns:=/cf1'],
                               env=environment, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_the_trial_node_flies_a_trial_through_the_services_and_ends_with_status_0(environment, drone):
    trial = start(environment, 'trial_node', 'start:=random', 'max_steps:=8', 'seed:=2', 'settle_time:=0.2')
    said, _ = trial.communicate(timeout=60)
    assert trial.returncode == 0, said
    assert 'following the policy for 8 steps' in said and 'trial succeeded' in said
    assert stop(drone, signal.SIGTERM).split() == ['arm', 'takeoff', 'engage', 'disengage', 'land']


def test_a_trial_node_that_is_stopped_in_the_air_asks_the_drone_to_land(environment, drone):
    trial = start(environment, 'trial_node', 'start:=0.5 0.5 1.0 0.0', 'engage_clearance:=0.0')
    for line in trial.stdout:
        if 'flying to the start' in line:
            break
    said = stop(trial, signal.SIGINT)
    assert trial.returncode == 1 and 'calling land' in said
    assert stop(drone, signal.SIGTERM).split()[-1] == 'land'


def test_a_trial_without_a_drone_fails_with_status_1_and_says_what_was_missing(environment):
    trial = start({**environment, 'ROS_DOMAIN_ID': '72'}, 'trial_node', 'preflight_timeout:=1.0')
    said, _ = trial.communicate(timeout=30)
    assert trial.returncode == 1 and 'preflight not done after 1 s: no status, no pose, no plan' in said
