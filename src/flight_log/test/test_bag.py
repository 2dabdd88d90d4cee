"""Bags: round trips against rosbags, torn files, metadata, wrong input."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin
from rosbags.rosbag2 import Writer as RosbagsWriter
from rosbags.typesys import Stores, get_typestore

from deqmpc import interface
from deqmpc.types import Obstacles, Plan, RigidBodyState
from flight_log import bag
from flight_log.flight import load_flight

STORE = get_typestore(Stores.ROS2_KILTED)


def state(t):
    return RigidBodyState(t, np.array([t, 2.0, 3.0]), np.array([0.0, 0.0, 0.6, 0.8]),
                          np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6]))


def messages(types, t=12.25):
    """One message of every type in the table, with `types` either rclpy's or rosbags'."""
    n = 3
    plan = Plan(t, 0.1 * np.arange(n), np.ones((n, 3)), np.tile([0.0, 0.0, 0.0, 1.0], (n, 1)),
                np.ones((n, 3)), np.zeros((n, 3)), np.zeros((n, 3)))
    field = Obstacles(t, np.arange(6.0).reshape(2, 3), np.array([0.1, 0.2]), np.zeros((2, 3)))
    return {
        interface.POSE: interface.pose_message(types, t, [1, 2, 3], [0, 0, 0, 1]),
        interface.ODOM: interface.odometry_message(types, state(t), 'cf1'),
        interface.OBSTACLES: interface.obstacles_message(types, field),
        interface.PLAN: interface.plan_message(types, plan, 'cf1'),
        interface.STATUS: interface.diagnostics_message(
            types, t, 'cf1/flight', interface.WARN, 'x', {'phase': 'armed'}, 'cf1'),
    }


def write(path, seconds=1.0, **kwargs):
    with bag.BagWriter(path, **kwargs) as writer:
        for i in range(round(100 * seconds)):
            for topic, message in messages(bag.TYPES, 0.01 * i).items():
                writer.write_message(topic, 'cf1', 0.01 * i, message)
    return path


def assert_same_for_rclpy(ours, live, type_name):
    """Equal messages, not equal bytes: Fast CDR leaves the padding between fields as it finds it."""
    from rclpy.serialization import deserialize_message, serialize_message
    data = bag.serialize(ours, type_name)
    theirs = serialize_message(live)
    assert deserialize_message(data, type(live)) == deserialize_message(theirs, type(live))
    assert len(theirs) == len(data)
    assert bag.serialize(bag.deserialize(theirs, type_name), type_name) == data


def test_bag_messages_are_the_messages_that_rclpy_makes():
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from deqmpc_ros.messages import TYPES as LIVE
    live, ours = messages(LIVE), messages(bag.TYPES)
    for topic, message in ours.items():
        assert_same_for_rclpy(message, live[topic], topic.type)


@pytest.mark.parametrize('type_name', sorted({t.type for t in interface.RECORDED}))
def test_default_bag_messages_are_rclpy_defaults(type_name):
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from deqmpc_ros.messages import message_class
    assert_same_for_rclpy(bag.TYPES.make(type_name), message_class(type_name)(), type_name)


def test_unknown_field_and_type_are_refused():
    with pytest.raises(bag.BagError, match='no field'):
        bag.TYPES.make('geometry_msgs/msg/Point', q=1.0)
    with pytest.raises(bag.BagError, match='nope/msg/Nope'):
        bag.TYPES.make('nope/msg/Nope')


def test_closed_bag_is_read_by_rosbags_with_the_same_messages_types_and_qos(tmp_path):
    path = write(tmp_path / 'b', metadata={'seed': '3'})
    with AnyReader([path]) as reader:  # checks the type hashes against the embedded definitions
        assert reader.message_count == 500
        got = [(c.topic, t, raw) for c, t, raw in reader.messages()]
        assert {c.topic: c.msgtype for c in reader.connections} == {
            t.resolve('cf1'): t.type for t in messages(bag.TYPES)}
        odom = next(reader.deserialize(raw, c.msgtype) for c, _, raw in reader.messages()
                    if c.topic == '/cf1/odom')
        assert odom.pose.pose.position.y == 2.0
    assert got == [(topic, t, raw) for topic, _, t, raw in bag.read_raw(path)]
    with Reader(path) as reader:
        profile = next(c.ext.offered_qos_profiles[0] for c in reader.connections if c.topic == '/obstacles')
        assert profile.durability.name == 'TRANSIENT_LOCAL' and profile.depth == 1
    with Reader(path / 'b.mcap') as reader:  # the file alone is whole, too
        assert reader.message_count == 500


def test_metadata_yaml_has_the_counts_times_and_settings_of_the_bag(tmp_path):
    path = write(tmp_path / 'b', metadata={'seed': '3', 'goal': '0,0,1'})
    info = yaml.safe_load((path / 'metadata.yaml').read_text())['rosbag2_bagfile_information']
    assert info['version'] == 9 and info['storage_identifier'] == 'mcap'
    assert info['message_count'] == 500 == sum(t['message_count'] for t in info['topics_with_message_count'])
    assert info['duration']['nanoseconds'] == 990_000_000
    assert info['relative_file_paths'] == ['b.mcap'] and info['custom_data'] == {'seed': '3', 'goal': '0,0,1'}
    assert bag.bag_info(path).metadata == {'seed': '3', 'goal': '0,0,1'}
    assert bag.bag_info(path / 'b.mcap').metadata == {'seed': '3', 'goal': '0,0,1'}


@pytest.mark.parametrize('plugin', [StoragePlugin.SQLITE3, StoragePlugin.MCAP])
def test_bags_of_other_recorders_are_read(tmp_path, plugin):
    with RosbagsWriter(tmp_path / 'b', version=9, storage_plugin=plugin) as writer:
        for topic, message in messages(bag.TYPES).items():
            connection = writer.add_connection(topic.resolve('cf1'), topic.type, typestore=STORE)
            writer.write(connection, 12_250_000_000, bag.serialize(message, topic.type))
    for path in (tmp_path / 'b', next((tmp_path / 'b').glob('b.*'))):
        got = {topic: m for topic, _, t, m in bag.read_bag(path) if t == pytest.approx(12.25)}
        assert interface.read_odometry(got['/cf1/odom']).position == pytest.approx([12.25, 2, 3])
        assert len(got) == 5
        assert [t for t, *_ in bag.read_bag(path, ['/cf1/pose'])] == ['/cf1/pose']


@pytest.mark.parametrize('mode', [CompressionMode.FILE, CompressionMode.MESSAGE])
def test_compressed_bags_of_other_recorders_are_read(tmp_path, mode):
    writer = RosbagsWriter(tmp_path / 'b', version=8, storage_plugin=StoragePlugin.SQLITE3)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        for topic, message in messages(bag.TYPES).items():
            connection = writer.add_connection(topic.resolve('cf1'), topic.type, typestore=STORE)
            writer.write(connection, 12_250_000_000, bag.serialize(message, topic.type))
    got = {topic: m for topic, _, t, m in bag.read_bag(tmp_path / 'b')}
    assert len(got) == 5 and interface.read_odometry(got['/cf1/odom']).position == pytest.approx([12.25, 2, 3])


def test_a_long_recording_is_split_into_files_that_any_reader_takes_as_one(tmp_path):
    path = write(tmp_path / 'b', split_seconds=0.085)  # 0.99 s: more than ten files, so that b_10 follows b_9
    info = yaml.safe_load((path / 'metadata.yaml').read_text())['rosbag2_bagfile_information']
    names = ['b.mcap', *(f'b_{i}.mcap' for i in range(1, 12))]
    assert info['relative_file_paths'] == [f['path'] for f in info['files']] == names
    assert sum(f['message_count'] for f in info['files']) == info['message_count'] == 500
    assert all(f['duration']['nanoseconds'] <= 85_000_000 for f in info['files'])
    whole = [m[:3] for m in bag.read_raw(write(tmp_path / 'c'))]
    assert [m[:3] for m in bag.read_raw(path)] == whole
    with Reader(path) as reader:
        assert reader.message_count == 500 and len(list(reader.messages())) == 500
    with Reader(path / 'b_3.mcap') as reader:
        assert reader.message_count == info['files'][3]['message_count']
    (path / 'metadata.yaml').unlink()  # as a killed recorder leaves it
    (path / 'b_11.mcap').write_bytes((path / 'b_11.mcap').read_bytes()[:-400])
    assert [m[:3] for m in bag.read_raw(path)][:450] == whole[:450]
    assert bag.recover(path).messages >= 450


def test_a_split_that_the_disk_refuses_leaves_a_whole_bag(tmp_path):
    writer = bag.BagWriter(tmp_path / 'b', split_seconds=0.05)
    (tmp_path / 'b' / 'b_1.mcap').mkdir()  # in the way
    with pytest.raises(OSError), writer:
        for i in range(100):
            message = interface.pose_message(bag.TYPES, 0.01 * i, [0.01 * i, 0, 0], [0, 0, 0, 1])
            writer.write_message(interface.POSE, 'cf1', 0.01 * i, message)
    (tmp_path / 'b' / 'b_1.mcap').rmdir()
    assert len(list(bag.read_raw(tmp_path / 'b'))) == writer.messages == 5


def test_a_bag_split_over_files_is_read_as_one(tmp_path):
    # as `ros2 bag record --max-bag-duration` leaves it: one folder, several files, one metadata.yaml
    folder, counts = tmp_path / 'split', 0
    folder.mkdir()
    for part in range(3):
        with bag.BagWriter(tmp_path / f'part_{part}') as writer:
            for i in range(100 * part, 100 * part + 100):
                message = interface.pose_message(bag.TYPES, 0.01 * i, [0.01 * i, 0, 0], [0, 0, 0, 1])
                writer.write_message(interface.POSE, 'cf1', 0.01 * i, message)
            counts += writer.messages
        (tmp_path / f'part_{part}/part_{part}.mcap').rename(folder / f'split_{part}.mcap')
    document = yaml.safe_load((tmp_path / 'part_0/metadata.yaml').read_text())
    info = document['rosbag2_bagfile_information']
    info['relative_file_paths'] = [f'split_{part}.mcap' for part in range(3)]
    info['message_count'] = info['topics_with_message_count'][0]['message_count'] = counts
    (folder / 'metadata.yaml').write_text(yaml.safe_dump(document))
    assert [round(100 * t) for _, _, t, _ in bag.read_bag(folder)] == list(range(300))
    (folder / 'metadata.yaml').unlink()  # the recorder was killed: the last file is torn as well
    last = folder / 'split_2.mcap'
    last.write_bytes(last.read_bytes()[:-400])
    assert [round(100 * t) for _, _, t, _ in bag.read_bag(folder)][:200] == list(range(200))


def test_other_types_on_the_stacks_topics_are_told_apart_from_its_own(tmp_path):
    # /cf1/pose as PoseWithCovarianceStamped, as another estimator publishes it
    kind = 'geometry_msgs/msg/PoseWithCovarianceStamped'
    with bag.BagWriter(tmp_path / 'b') as writer:
        writer.write('/cf1/pose', kind, 1_000_000_000, bag.serialize(bag.TYPES.make(kind), kind))
    with pytest.raises(bag.BagError, match='no pose and no odometry of cf1'):
        load_flight(tmp_path / 'b')


WRITE_FOR_EVER = """
import sys, time
from deqmpc import interface
from flight_log import bag
from flight_log.flight import load_flight
writer = bag.BagWriter(sys.argv[1], metadata={'seed': '7'})
i = 0
while True:
    for k in range(10):  # a simulated 0.1 s
        stamp = 0.01 * i
        message = interface.pose_message(bag.TYPES, stamp, [stamp, 0, 0], [0, 0, 0, 1])
        writer.write_message(interface.POSE, 'cf1', stamp, message)
        i += 1
    print(stamp, flush=True)
    time.sleep(0.005)
"""


def test_a_killed_writer_loses_at_most_one_second_and_recover_makes_the_bag_whole(tmp_path):
    path = tmp_path / 'torn'
    child = subprocess.Popen([sys.executable, '-c', WRITE_FOR_EVER, str(path)],
                             stdout=subprocess.PIPE, text=True)
    said = 0.0
    while said < 5.0:
        said = float(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    said = float((child.stdout.read().split('\n')[-2:-1] or [said])[0])
    child.wait()
    assert bag.bag_info(path).torn and bag.bag_info(path).metadata == {'seed': '7'}
    times = [t for _, _, t, _ in bag.read_bag(path)]
    assert times[-1] > said - 1.0
    assert np.allclose(np.diff(times), 0.01)  # nothing lost in between
    before = (path / 'torn.mcap').read_bytes()
    saved = bag.recover(path)
    assert saved.path == tmp_path / 'torn_recovered' and saved.messages == len(times)
    assert (path / 'torn.mcap').read_bytes() == before and not (path / 'metadata.yaml').exists()
    with AnyReader([saved.path]) as reader:
        assert reader.message_count == len(times)
        assert reader.connections[0].ext.offered_qos_profiles[0].reliability.name == 'BEST_EFFORT'
    assert bag.bag_info(saved.path).metadata == {'seed': '7'}


def test_a_bag_cut_at_any_byte_is_read_up_to_the_cut(tmp_path):
    whole = (write(tmp_path / 'b') / 'b.mcap').read_bytes()
    everything = [m[:3] for m in bag.read_raw(tmp_path / 'b' / 'b.mcap')]
    cut = tmp_path / 'cut.mcap'
    for length in np.linspace(8, len(whole) - 9, 60).astype(int):
        cut.write_bytes(whole[:length])
        got = [m[:3] for m in bag.read_raw(cut)]
        assert got == everything[:len(got)]
    assert len(got) == len(everything)  # cut in the index only


def test_corrupt_bytes_in_the_middle_end_the_reading_instead_of_raising(tmp_path):
    data = bytearray((write(tmp_path / 'b', flush_seconds=0.05) / 'b.mcap').read_bytes()[:-20])
    lz4 = b'\x04\x22\x4d\x18'  # begins each chunk's content
    second = data.index(lz4, data.index(lz4) + 1) + 100
    data[second:second + 8] = b'\xff' * 8
    (tmp_path / 'c.mcap').write_bytes(data)
    assert 0 < len(list(bag.read_raw(tmp_path / 'c.mcap'))) < 500


def test_quiet_topics_reach_the_disk_when_flush_is_called(tmp_path):
    writer = bag.BagWriter(tmp_path / 'b')
    writer.write_message(interface.POSE, 'cf1', 1.0, messages(bag.TYPES)[interface.POSE])
    writer.flush()
    assert len(list(bag.read_raw(tmp_path / 'b'))) == 1
    writer.close()


def test_wrong_paths_and_files_give_one_clear_error(tmp_path):
    with pytest.raises(bag.BagError, match='no such file'):
        bag.bag_info(tmp_path / 'absent')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(bag.BagError, match='no metadata.yaml and no .mcap'):
        list(bag.read_raw(tmp_path / 'empty'))
    (tmp_path / 'x.mcap').write_bytes(b'not a bag at all' * 10)
    with pytest.raises(bag.BagError, match='not an MCAP file'):
        list(bag.read_raw(tmp_path / 'x.mcap'))
    (tmp_path / 'x.db3').write_bytes(b'not a bag at all' * 10)
    with pytest.raises(bag.BagError, match='x.db3'):
        list(bag.read_raw(tmp_path / 'x.db3'))
    (tmp_path / 'x.csv').write_text('1,2')
    with pytest.raises(bag.BagError, match='expected a bag folder'):
        bag.bag_info(tmp_path / 'x.csv')
    write(tmp_path / 'b', 0.1)
    with pytest.raises(bag.BagError, match='exists'):
        bag.BagWriter(tmp_path / 'b')
    with pytest.raises(bag.BagError, match='is whole'):
        bag.recover(tmp_path / 'b')
    (tmp_path / 'b' / 'metadata.yaml').write_text('[1, 2')
    with pytest.raises(bag.BagError, match='not a readable'):
        bag.bag_info(tmp_path / 'b')


def test_an_empty_recording_is_a_valid_bag(tmp_path):
    bag.BagWriter(tmp_path / 'b').close()
    with Reader(tmp_path / 'b') as reader:
        assert reader.message_count == 0
    assert list(bag.read_raw(tmp_path / 'b')) == []
