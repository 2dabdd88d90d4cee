"""Recordings: what is read, what is refused, and how they are played."""

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import natnet as natnet_client
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from deqmpc import interface
from deqmpc_ros.node import SettingsError
from sim_env.natnet_packets import Body
from sim_env.natnet_server import NatNetServer, NatNetSettings
from sim_env.player import Player
from sim_env.recordings import Recording, RecordingError, read_recording
from sim_env.stream_node import Settings, load

DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).resolve().parents[3] / '../shared/data'))
FILES = sorted(DATA.glob('mocap/*.csv')) + sorted(DATA.glob('flights/*.csv'))
WAIT = 60.0  # s
_domain = itertools.count(random.SystemRandom().randrange(10, 90))

HEADER = 't,x,y,z,qx,qy,qz,qw\n'


def write(path, rows, header=HEADER):
    path.write_text(header + ''.join(','.join(map(str, row)) + '\n' for row in rows))
    return path


def poses(n=100):
    return [[10.0 + 0.01 * k, 0.1 * k, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0] for k in range(n)]


def test_a_csv_of_either_form_is_read_as_it_stands(tmp_path):
    mocap = read_recording(write(tmp_path / 'a.csv', poses()))
    flight = read_recording(write(tmp_path / 'b.csv', [[*p, 'x'] for p in poses()],
                                  't,px,py,pz,qx,qy,qz,qw,state\n'))
    for r in (mocap, flight):
        assert r.time == pytest.approx(10.0 + 0.01 * np.arange(100))
        assert r.position[:, 0] == pytest.approx(0.1 * np.arange(100))
        assert r.quaternion[5].tolist() == [0, 0, 0, 1]
        assert r.duration == pytest.approx(0.99) and r.notes == ()


def test_rows_that_are_no_poses_are_skipped_and_named_by_line(tmp_path):
    rows = poses()
    rows[3][1] = 'nan'
    rows[4][7] = ''
    rows[10][0] = rows[9][0]
    rows[12][0] = rows[5][0]
    rows[20][4:] = [0, 0, 0, 0]
    recording = read_recording(write(tmp_path / 'a.csv', rows))
    assert len(recording.time) == 95 and np.all(np.diff(recording.time) > 0)
    assert recording.notes == (
        '2 of 100 rows skipped: not a number, first at line 5',
        '1 of 100 rows skipped: a quaternion that is not of unit norm, first at line 22',
        '2 of 100 rows skipped: a time that is not later than before, first at line 12')


@pytest.mark.parametrize('content, said', [
    ('', 'no column t, x'), ('t,x,y,z\n1,2,3,4\n', 'no column qx, qy, qz, qw'),
    (HEADER, '0 usable poses of 0'),
    (HEADER + '1,0,0,0,0,0,0,1\n' * 30, '1 usable poses of 30'),
    (HEADER + ''.join(f'{k if k % 2 else "nan"},0,0,0,0,0,0,1\n' for k in range(30)),
     'too much of it is no recording: 15 of 30 rows skipped: not a number, first at line 2'),
    (HEADER + '\x00\xff', 'usable poses')])
def test_a_file_that_is_no_recording_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / 'a.csv'
    path.write_text(content)
    with pytest.raises(RecordingError, match=said) as raised:
        read_recording(path)
    assert str(path) in str(raised.value)


def test_a_missing_or_unknown_file_is_refused_by_name(tmp_path):
    with pytest.raises(RecordingError, match='/nowhere.csv: no such file'):
        read_recording('/nowhere.csv')
    (tmp_path / 'a.txt').write_text('x')
    with pytest.raises(RecordingError, match='expected a .csv'):
        read_recording(tmp_path / 'a.txt')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RecordingError, match='cannot be read as a bag'):
        read_recording(tmp_path / 'empty')
    (tmp_path / 'torn.mcap').write_bytes(b'\x89MCAP0\r\n' + bytes(100))
    with pytest.raises(RecordingError, match='torn.mcap'):
        read_recording(tmp_path / 'torn.mcap')


class BagTypes:
    """rosbags' messages, as far as a pose goes."""

    store = get_typestore(Stores.ROS2_KILTED)

    def make(self, type_name, **fields):
        return self.store.types[type_name](**fields)


@pytest.mark.parametrize('plugin', [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_the_pose_of_a_bag_is_read_at_its_header_stamps(tmp_path, plugin):
    types = BagTypes()
    with Writer(tmp_path / 'bag', version=9, storage_plugin=plugin) as writer:
        connection = writer.add_connection('/cf1/pose', interface.POSE.type, typestore=types.store)
        for k in range(20):
            message = interface.pose_message(types, 5.0 + 0.01 * k, [0.1 * k, 0, 1], [0, 0, 0, 1.0])
            writer.write(connection, int(7e9) + k, types.store.serialize_cdr(message, interface.POSE.type))
    recording = read_recording(tmp_path / 'bag')
    assert recording.time == pytest.approx(5.0 + 0.01 * np.arange(20))
    assert recording.position[:, 0] == pytest.approx(0.1 * np.arange(20))
    with pytest.raises(RecordingError, match='on /cf2/pose; poses are on: /cf1/pose'):
        read_recording(tmp_path / 'bag', 'cf2')


@pytest.mark.skipif(not FILES, reason=f'no recordings under {DATA}: set DEQMPC_DATA')
@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_each_shared_recording_is_whole(path):
    recording = read_recording(path)
    assert recording.notes == () and recording.duration > 15.0


def test_a_cut_keeps_the_poses_in_it_and_an_empty_one_is_refused(tmp_path):
    recording = read_recording(write(tmp_path / 'a.csv', poses()))
    cut = recording.cut(0.2, 0.3)
    assert (cut.time[0], cut.time[-1]) == pytest.approx((10.2, 10.5))
    assert len(recording.cut(0.0, 0.0).time) == 100
    with pytest.raises(RecordingError, match='0.99 s long'):
        recording.cut(5.0, 0.0)


def test_the_node_names_the_file_that_it_cannot_play(tmp_path):
    with pytest.raises(SettingsError, match="file = ''"):
        load(Settings(), 'cf1')
    with pytest.raises(SettingsError, match='/nowhere.csv'):
        load(Settings(file='/nowhere.csv'), 'cf1')
    with pytest.raises(SettingsError, match='nothing to play from 9.0 s'):
        load(Settings(file=str(write(tmp_path / 'a.csv', poses())), start=9.0), 'cf1')


def bunched():
    """A recording with a gap and a bunch."""
    time = np.array([0.0, 0.01, 0.02, 0.17, 0.1701, 0.1702, 0.19]) + 1e9
    return Recording('bunched', time, np.arange(21.0).reshape(7, 3), np.tile([0.0, 0, 0, 1], (7, 1)))


def play(rate=1.0, loop=False, until=1.0, **settings):
    server = NatNetServer([Body('cf1', 1)], NatNetSettings(command_port=0))
    sent = []

    def note(number, exposure, poses, now):
        sent.append((number, exposure, poses['cf1'][0][0], now))
    server.send_frame = note
    player = Player(bunched(), server, 'cf1', rate, loop, wait_for_client=False, **settings)
    for k in range(round(until / 0.002)):
        player.poll(50.0 + 0.002 * k)
    server.close()
    return player, sent


def test_gaps_and_bunching_come_out_as_recorded():
    player, sent = play()
    exposures = np.array([exposure for _, exposure, _, _ in sent])
    assert exposures - 50.0 == pytest.approx(bunched().time - 1e9, abs=1e-6)
    assert all(0.0 <= now - exposure <= 0.002 + 1e-6 for _, exposure, _, now in sent)
    assert [x for _, _, x, _ in sent] == [0, 3, 6, 9, 12, 15, 18] and [n for n, *_ in sent] == list(range(7))
    assert player.finished and player.sent == 7


def test_rate_delay_and_loop_change_the_times_and_nothing_else():
    _, fast = play(rate=2.0, delay=0.1)
    assert [e - 50.1 for _, e, _, _ in fast] == pytest.approx((bunched().time - 1e9) / 2.0, abs=1e-6)
    player, again = play(loop=True, until=2.0)
    assert not player.finished and len(again) > 60
    assert np.diff([e for _, e, _, _ in again]).min() > 0.0
    assert [x for _, _, x, _ in again[7:14]] == [x for _, _, x, _ in again[:7]]


def test_playing_waits_for_a_client():
    server = NatNetServer([Body('cf1', 1)], NatNetSettings(command_port=0))
    player = Player(bunched(), server, 'cf1')
    player.poll(1.0)
    assert player.started is None
    server.clients['127.0.0.1', server.address[1]] = 2.0
    player.poll(2.0)
    assert player.started == 2.0 and player.sent == 1
    server.close()


def environment():
    return {**os.environ, 'ROS_DOMAIN_ID': str(next(_domain)), 'ROS_PYTHON_CHECK_FIELDS': '1'}


def command(*parameters):
    return [sys.executable, '-m', 'sim_env.stream_node', '--ros-args', '-r', '__ns:=/cf1',
            *(word for p in parameters for word in ('-p', p))]


def test_the_stream_node_plays_to_a_natnet_client_and_ends_with_status_0(tmp_path):
    path = write(tmp_path / 'a.csv', poses(100))
    node = subprocess.Popen(command(f'file:={path}', 'natnet_command_port:=0', 'delay:=0.0'), text=True,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = node.stdout.readline()
    port = int(re.search(r'NatNet 127\.0\.0\.1:(\d+)', said)[1])
    client, frames = natnet_client.NatNetClient(command_port=port, use_multicast=False), []
    client.on_data_frame_received_event.handlers.append(frames.append)
    client.connect(timeout=WAIT)
    client.run_async()
    said = node.communicate(timeout=WAIT)[0]
    client.shutdown()
    assert node.returncode == 0, said
    assert 'finished: 100 frames' in said
    stamps = np.array([f.suffix.stamp_camera_mid_exposure for f in frames]) * 1e-7
    assert len(frames) == 100 and np.diff(stamps) == pytest.approx(np.full(99, 0.01), abs=1e-6)
    assert [f.rigid_bodies[0].pos[0] for f in frames] == pytest.approx([p[1] for p in poses()], rel=1e-6)


def test_the_stream_node_ends_with_status_1_when_no_client_comes(tmp_path):
    path = write(tmp_path / 'a.csv', poses())
    done = subprocess.run(command(f'file:={path}', 'natnet_command_port:=0', 'client_timeout:=0.2'),
                          env=environment(), capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1 and 'no NatNet client in 0.2 s' in done.stdout + done.stderr


def test_the_stream_node_ends_with_status_2_and_one_line_on_a_bad_file():
    done = subprocess.run(command('file:=/nowhere.csv'), env=environment(), capture_output=True, text=True,
                          timeout=WAIT)
    assert (done.returncode, done.stderr) == (2, 'error: stream: /nowhere.csv: no such file or folder\n')
