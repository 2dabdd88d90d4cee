"""Restamping and timing of a replay, without ROS."""

import numpy as np
import pytest
from flight_log_synthetic import SyntheticTrial, write_trial

from deqmpc import interface
from deqmpc.types import Obstacles
from flight_log import bag, replay


def messages(stamp):
    field = Obstacles(stamp, np.arange(6.0).reshape(2, 3), np.array([0.1, 0.2]), np.zeros((2, 3)))
    return {
        interface.POSE: interface.pose_message(bag.TYPES, stamp, [1, 2, 3], [0, 0, 0, 1]),
        interface.OBSTACLES: interface.obstacles_message(bag.TYPES, field),
        interface.STATUS: interface.diagnostics_message(bag.TYPES, stamp, 'x', 0, 'm', {'a': 1}, 'cf1'),
    }


@pytest.mark.parametrize('shift', [1, -3_999_999_999, 10_000_000_007])
def test_restamping_moves_every_header_by_exactly_the_shift_and_nothing_else(shift):
    before, after = 1000.25, 1000.25 + 1e-9 * shift
    for topic, message in messages(before).items():
        moved = replay.restamp(bag.serialize(message, topic.type), topic.type, shift)
        assert len(moved) == len(bag.serialize(message, topic.type))
        back = replay.restamp(moved, topic.type, -shift)
        assert back == bag.serialize(message, topic.type), topic.name
        read = bag.deserialize(moved, topic.type)
        headers = [m.header for m in read.markers] if topic is interface.OBSTACLES else [read.header]
        for h in headers:
            assert h.stamp.sec * 10**9 + h.stamp.nanosec == 1_000_250_000_000 + shift
            assert interface.seconds(h.stamp) == pytest.approx(after, abs=1e-9)


def test_what_cannot_be_restamped_is_named():
    data = bag.serialize(messages(10.0)[interface.POSE], interface.POSE.type)
    with pytest.raises(bag.BagError, match='cannot be restamped'):
        replay.restamp(data, interface.POSE.type, 2**62)  # after 2038
    with pytest.raises(bag.BagError, match='std_msgs/msg/String'):
        replay.restamp(b'\0\1\0\0', 'std_msgs/msg/String', 1)
    with pytest.raises(bag.BagError, match='4 bytes'):
        replay.restamp(b'\0\1\0\0', interface.ODOM.type, 1)


@pytest.mark.parametrize('rate', [0.5, 1.0, 4.0])
def test_messages_are_due_at_their_recorded_spacing_divided_by_the_rate(tmp_path, rate):
    path = write_trial(tmp_path / 'b', SyntheticTrial(seconds=1.0, lead=0.1))
    tracks = replay.select(path, replay.DEFAULT_TOPICS)
    got = list(replay.schedule(path, tracks, rate))
    assert {topic.name for _, topic, _, _ in got} == {'pose', 'odom', '/obstacles'}
    due, log = np.array([d for d, *_ in got]), np.array([t for *_, t, _ in got])
    assert due[0] == 0.0 and np.all(np.diff(due) >= 0)
    assert due == pytest.approx(1e-9 * (log - log[0]) / rate)


def test_selection_names_what_it_does_not_know_or_find(tmp_path):
    path = write_trial(tmp_path / 'b', SyntheticTrial(seconds=0.2, lead=0.1, open_loop=True))
    with pytest.raises(bag.BagError, match='expected some of'):
        replay.select(path, ['camera'])
    with pytest.raises(bag.BagError, match='none of the topics'):
        replay.select(path, ['setpoint'])
    with pytest.raises(bag.BagError, match='none of the topics'):
        replay.select(path, ['pose'], robot='cf9')
    with bag.BagWriter(tmp_path / 'two') as writer:
        for robot in ('cf1', 'cf2'):
            writer.write_message(interface.POSE, robot, 1.0, messages(1.0)[interface.POSE])
    with pytest.raises(bag.BagError, match="robots \\['cf1', 'cf2'\\]"):
        replay.select(tmp_path / 'two', ['pose'])
    assert replay.select(tmp_path / 'two', ['pose'], robot='cf2')[0].source == '/cf2/pose'
