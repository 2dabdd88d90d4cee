"""The live viewer: what it draws, read back from the recording, and who can hear it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from deqmpc import interface
from deqmpc.types import Obstacles, Plan, RigidBodyState
from flight_log import view
from flight_log.bag import TYPES, BagError

DOMAIN = '73'
BAG_START = 1000.0  # s, the synthetic trials' first stamp
LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
CENTERS = np.array([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0]])
SPEED = np.array([0.2, 0.0, -0.1])  # m/s, of all spheres


def test_a_missing_rerun_is_an_error_that_names_the_pip_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'rerun', None)
    assert view.main(['some_bag']) == 2
    assert "pip install 'rerun-sdk" in capsys.readouterr().err


def test_listening_reads_the_sockets_of_a_process_with_their_addresses():
    with socket.create_server(('127.0.0.1', 0)) as four, socket.create_server(
            ('::1', 0), family=socket.AF_INET6) as six, socket.socket() as idle:
        idle.bind(('127.0.0.1', 0))
        heard = view.listening(os.getpid())
        assert {four.getsockname(), six.getsockname()[:2]} <= heard
        assert idle.getsockname() not in heard
        assert view.free_port(four.getsockname()[1]) != four.getsockname()[1]


rr = pytest.importorskip('rerun', reason=f'rerun is not installed ({view.INSTALL})')
chunk = pytest.importorskip('rerun.chunk', reason='this rerun cannot read a recording back')
from flight_log_synthetic import GOAL, SyntheticTrial, settle, write_trial  # noqa: E402

from flight_log.viewing import PATH_STEP, PLAN_SILENCE, Scene, robots_in, show_bag  # noqa: E402


def moving_field(stamp):
    return Obstacles(stamp, CENTERS + SPEED * (stamp - BAG_START), np.array([0.1, 0.25]), np.tile(SPEED, (2, 1)))


class Read:
    """A recording read back: component of an entity -> its times and values."""

    def __init__(self, path):
        self.rows = {}
        for part in chunk.RrdReader(path).store().stream():
            batch = part.to_record_batch()
            columns = {name: self._list(batch.column(name), name) for name in batch.schema.names}
            times = columns.get('time', [0.0] * batch.num_rows)  # what is static has none
            for name, values in columns.items():
                self.rows.setdefault((part.entity_path, name), []).extend(zip(times, values, strict=True))

    @staticmethod
    def _list(column, name):
        return [1e-9 * v for v in column.cast('int64').to_pylist()] if name in ('time', 'clock') else column.to_pylist()

    def __call__(self, entity, component):
        """Times (s after the first message) and values, in the order of time."""
        rows = sorted((r for r in self.rows.get((entity, component), []) if r[1] is not None), key=lambda r: r[0])
        return [t for t, _ in rows], [v for _, v in rows]

    def scalars(self, entity):
        return [v[0] for v in self(entity, 'Scalars:scalars')[1]]

    def log(self, entity):
        lines = zip(*self(entity, 'TextLog:text'), self(entity, 'TextLog:level')[1], strict=True)
        return [(t, text[0], level[0]) for t, text, level in lines]


def say(scene, topic, robot, message, time):
    if scene.due(topic, robot, time):
        scene.show(topic, robot, message, time)


def drawn(path, draw):
    """What `draw(scene)` leaves in a recording at `path`."""
    recording = rr.RecordingStream('test', recording_id='test')
    recording.save(path)
    draw(Scene(recording))
    recording.disconnect()
    return Read(path)


@pytest.fixture(scope='module')
def bag(tmp_path_factory):
    trial = SyntheticTrial(seconds=4.0, lead=0.5, obstacles=moving_field, moving=True,
                           gate=lambda k: 'clearance 0.02 m' if 30 <= k < 40 else 'accepted',
                           after=('landing', 'land', 'no mocap pose for 0.50 s'))
    return write_trial(tmp_path_factory.mktemp('bags') / 'trial', trial)


@pytest.fixture(scope='module')
def seen(bag, tmp_path_factory):
    def draw(scene):
        shown = show_bag(scene, bag)
        assert (shown.robots, shown.unreadable, shown.torn) == (['cf1'], 0, False)
        assert shown.seconds == pytest.approx(5.99, abs=1e-6)
    return drawn(tmp_path_factory.mktemp('recordings') / 'trial.rrd', draw)


def test_poses_of_the_bag_stand_at_their_times_as_often_as_a_screen_shows_them(seen):
    times, positions = seen('/world/cf1', 'Transform3D:translation')
    path = settle()
    np.testing.assert_allclose(times, 0.03 * np.arange(200), atol=1e-6)
    np.testing.assert_allclose(np.array(positions)[:, 0], [path(t - 1.5) for t in times], atol=1e-6)
    assert {tuple(q[0]) for q in seen('/world/cf1', 'Transform3D:quaternion')[1]} == {tuple(LEVEL)}
    clock = seen('/world/cf1', 'clock')[1]
    np.testing.assert_allclose(clock, BAG_START + 0.03 * np.arange(200), atol=1e-6)


def test_the_flown_path_is_one_chain_from_the_start_to_the_goal(seen):
    pieces = np.array([p[0] for p in seen('/world/flown/cf1', 'LineStrips3D:strips')[1]])
    np.testing.assert_array_equal(pieces[1:, 0], pieces[:-1, 1])
    np.testing.assert_allclose(pieces[0, 0], settle()(0.0), atol=1e-6)
    lengths = np.linalg.norm(pieces[:, 1] - pieces[:, 0], axis=1)
    assert lengths.min() >= PATH_STEP - 1e-6
    np.testing.assert_allclose(lengths.sum() + np.linalg.norm(pieces[-1, 1] - settle()(4.5)),
                               np.linalg.norm(settle()(4.5) - settle()(0.0)), atol=1e-3)  # a straight line


def test_a_plan_goes_from_the_drone_to_its_end_and_is_gone_when_nobody_renews_it(seen):
    times, plans = seen('/world/plan/cf1', 'LineStrips3D:strips')
    for t, plan in zip(times, plans, strict=True):
        np.testing.assert_allclose(plan[0][0], settle()(t - 1.5), atol=1e-6)
        np.testing.assert_allclose(plan[0][-1], GOAL, atol=1e-6)
        assert len(plan[0]) == 6
    assert not [t for t in times if 2.95 < t < 3.95] and max(times) > 5.8  # ticks 30 to 39 were refused
    cleared, _ = seen('/world/plan/cf1', 'Clear:is_recursive')
    assert cleared == [pytest.approx(2.9 + PLAN_SILENCE, abs=0.05)]


def test_moving_spheres_are_drawn_where_they_are_with_their_radii(seen):
    times, centers = seen('/world/obstacles', 'Points3D:positions')
    assert len(times) == 60
    np.testing.assert_allclose(centers, [CENTERS + SPEED * t for t in times], atol=1e-6)
    np.testing.assert_allclose(seen('/world/obstacles', 'Points3D:radii')[1], [[0.1, 0.25]] * 60, atol=1e-7)


def test_phase_and_guard_are_said_when_they_change_with_the_reason(seen):
    times, phases = seen('/state/cf1/phase', 'StateChange:state')
    assert [p[0] for p in phases] == ['armed', 'taking_off', 'holding', 'following', 'landing']
    np.testing.assert_allclose(times, [0.0, 0.5, 1.0, 1.5, 5.5], atol=1e-6)
    assert [g[0] for g in seen('/state/cf1/guard', 'StateChange:state')[1]] == ['idle', 'hold', 'follow', 'land']
    said = seen.log('/log/cf1/flight')
    assert [text for _, text, _ in said] == ['armed (idle)', 'taking_off (idle)', 'holding (hold)',
                                             'following (follow)', 'landing (land): no mocap pose for 0.50 s']


def test_a_refused_plan_is_a_warning_with_the_reason_and_a_state(seen):
    assert [p[0] for p in seen('/state/cf1/plan', 'StateChange:state')[1]] == ['accepted', 'refused', 'accepted']
    (_, _, before), (t, text, level), (_, _, after) = seen.log('/log/cf1/policy')
    assert t == pytest.approx(3.0) and 'clearance 0.02 m' in text
    assert (before, level, after) == ('INFO', 'WARN', 'INFO')


@pytest.mark.parametrize(('entity', 'value'), [
    ('/battery_v/cf1', 4.0), ('/solver/time_ms/cf1/solve', 20.0), ('/solver/time_ms/cf1/tick', 21.0),
    ('/solver/time_ms/cf1/latency', 25.0), ('/solver/iterations/cf1', 4.0), ('/solver/residual_log10/cf1', -4.0),
    ('/solver/deadline_misses/cf1', 0.0)])
def test_battery_and_solver_are_time_series_with_the_published_numbers(seen, entity, value):
    np.testing.assert_allclose(seen.scalars(entity), np.full(60, value))


def test_odometry_places_a_robot_without_poses_and_only_that_one(tmp_path):
    def draw(scene):
        scene.add('cf1')
        scene.add('cf2')
        for k, (robot, x) in enumerate((('cf1', 1.0), ('cf2', 2.0))):
            state = RigidBodyState(0.0, np.array([x, 0.0, 1.0]), LEVEL, np.zeros(3), np.zeros(3))
            if robot == 'cf1':
                pose = interface.pose_message(TYPES, 0.0, (5.0, 0.0, 1.0), LEVEL)
                say(scene, interface.POSE, robot, pose, 10.0 + k)
            say(scene, interface.ODOM, robot, interface.odometry_message(TYPES, state, robot), 10.1 + k)
    seen = drawn(tmp_path / 'two.rrd', draw)
    assert seen('/world/cf1', 'Transform3D:translation')[1] == [[[5.0, 0.0, 1.0]]]
    assert seen('/world/cf2', 'Transform3D:translation') == ([pytest.approx(1.1)], [[[2.0, 0.0, 1.0]]])
    assert robots_in(['/cf2/odom', '/cf1/pose', '/obstacles', '/diagnostics', '/a/b/pose']) == ['cf1', 'cf2']


def test_a_message_that_cannot_be_drawn_is_an_error_in_the_log_once(tmp_path):
    def draw(scene):
        scene.add('cf1')
        for k, x in enumerate((0.0, np.nan, np.nan, 1.0)):
            say(scene, interface.POSE, 'cf1', interface.pose_message(TYPES, 0.0, (x, 0.0, 1.0), LEVEL), 0.1 * k)
    seen = drawn(tmp_path / 'nan.rrd', draw)
    (t, text, level), = seen.log('/log/cf1/pose')
    assert t == pytest.approx(0.1) and 'finite' in text and level == 'ERROR'
    assert [p[0][0] for p in seen('/world/cf1', 'Transform3D:translation')[1]] == [0.0, 1.0]


def test_a_pose_that_falls_silent_is_said_although_nothing_else_comes(tmp_path):
    def draw(scene):
        scene.add('cf1')
        pose = interface.pose_message(TYPES, 0.0, (0.0, 0.0, 1.0), LEVEL)
        say(scene, interface.POSE, 'cf1', pose, 100.0)
        for k in range(8):
            scene.advance(100.0 + 0.25 * k)
        say(scene, interface.POSE, 'cf1', pose, 102.0)
        scene.advance(102.25)
    said = drawn(tmp_path / 'silent.rrd', draw).log('/log/cf1/pose/silence')
    assert [(t, level) for t, _, level in said] == [(pytest.approx(0.75), 'ERROR'), (pytest.approx(2.0), 'INFO')]


def test_the_body_takes_the_colour_of_the_status(tmp_path):
    def draw(scene):
        scene.add('cf1')
        for k, level in enumerate((interface.OK, interface.OK, interface.ERROR)):
            say(scene, interface.STATUS, 'cf1', interface.diagnostics_message(
                TYPES, 0.0, 'cf1/flight', level, '', {'phase': 'following'}, 'cf1'), float(k))
    times, colors = drawn(tmp_path / 'color.rrd', draw)('/world/cf1/body', 'Boxes3D:colors')
    assert times == [0.0, 2.0] and colors[0] != colors[1]  # and none is static, which would hide the others


def test_a_robot_that_the_bag_lacks_is_an_error_that_names_it(bag, tmp_path):
    with pytest.raises(BagError, match='cf7'):
        drawn(tmp_path / 'x.rrd', lambda scene: show_bag(scene, bag, ['cf7']))


def test_save_writes_a_recording_with_its_layout_and_overwrites_nothing(bag, tmp_path, capsys):
    target = tmp_path / 'flight.rrd'
    assert view.main([str(bag), '--save', str(target)]) == 0
    assert len(Read(target)('/world/cf1', 'Transform3D:translation')[0]) == 200
    assert len(chunk.RrdReader(target).blueprints()) == 1
    with pytest.raises(SystemExit):
        view.main([str(bag), '--save', str(target)])
    assert 'nothing is overwritten' in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------

def addresses(pid):
    """Local addresses of the IPv4 sockets of `pid` and its children that anyone may send to: TCP that listens, UDP."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    inodes = {os.readlink(f) for f in Path(f'/proc/{pid}/fd').iterdir() if f.is_symlink()}
    found = []
    for table, state in (('tcp', '0A'), ('tcp6', '0A'), ('udp', '07'), ('udp6', '07')):
        for line in Path(f'/proc/{pid}/net/{table}').read_text().splitlines()[1:]:
            row = line.split()
            if row[3] == state and f'socket:[{row[9]}]' in inodes:
                found.append((table, row[1].split(':')[0]))
    return found + [a for child in children for a in addresses(int(child))]


def start(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    return subprocess.Popen([sys.executable, '-u', '-m', 'flight_log.view', *map(str, arguments)], text=True,
                            env={**env, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def alive(pid):
    return Path(f'/proc/{pid}').exists() and ') Z' not in Path(f'/proc/{pid}/stat').read_text()


def until(process, pattern):
    """The first line of `process` that matches, and all before it."""
    said = ''
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(said)


def test_the_web_viewer_answers_on_loopback_alone_and_ends_with_the_command(bag):
    process = start(bag)
    try:
        said = until(process, 'messages')
        assert 'no display' in said
        page = re.search(r'http://127\.0\.0\.1:\d+', said)[0]
        with urllib.request.urlopen(page, timeout=10) as answer:
            assert answer.status == 200 and b'rerun' in answer.read().lower()
        heard = addresses(process.pid)
        assert len(heard) >= 2 and {a for _, a in heard} == {'0100007F'}, heard
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        assert children
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=15)
    assert process.returncode == 0, said
    assert not [pid for pid in children if alive(pid)]


def test_a_viewer_that_is_heard_on_the_network_is_stopped(monkeypatch):
    started = []
    real = subprocess.Popen

    def popen(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]
    monkeypatch.setattr(view.subprocess, 'Popen', popen)
    monkeypatch.setattr(view, 'listening', lambda pid: {('0.0.0.0', 9876)})
    with pytest.raises(view.ViewError, match=r'0\.0\.0\.0:9876'):
        view.Viewer(web=True)
    assert started[0].poll() is not None


class Graph:
    """A client that plays mocap, policy and crazyflie_interface of robot cf1."""

    def __init__(self):
        import rclpy
        from rclpy.experimental import EventsExecutor

        from deqmpc_ros.messages import TYPES
        from deqmpc_ros.node import now, publisher
        self.node = rclpy.create_node('client', namespace='cf1')
        self.executor = EventsExecutor()
        self.executor.add_node(self.node)
        self._now, self._types = now, TYPES
        topics = (interface.POSE, interface.ODOM, interface.OBSTACLES, interface.PLAN, interface.STATUS,
                  interface.DIAGNOSTICS)
        self.out = {t: publisher(self.node, t, 'cf1') for t in topics}

    def say(self):
        t, types = self._now(self.node), self._types
        state = RigidBodyState(t, np.array([1.0, 2.0, 0.5]), LEVEL, np.zeros(3), np.zeros(3))
        plan = Plan(t, 0.1 * np.arange(3), np.array([[1.0, 2.0, 0.5], [1.0, 2.0, 0.75], [1.0, 2.0, 1.0]]),
                    np.tile(LEVEL, (3, 1)), *np.zeros((3, 3, 3)))
        flight = {'phase': 'holding', 'guard': 'hold', 'reason': 'gap', 'battery_v': 3.75}
        policy = {'gate': 'accepted', 'iterations': 7, 'residual': 1e-3, 'solve_ms': 12.5}
        for topic, message in (
                (interface.POSE, interface.pose_message(types, t, state.position, LEVEL)),
                (interface.ODOM, interface.odometry_message(types, state, 'cf1')),
                (interface.OBSTACLES, interface.obstacles_message(types, moving_field(BAG_START))),
                (interface.PLAN, interface.plan_message(types, plan, 'cf1')),
                (interface.STATUS, interface.diagnostics_message(
                    types, t, 'cf1/flight', interface.WARN, '', flight, 'cf1')),
                (interface.DIAGNOSTICS, interface.diagnostics_message(
                    types, t, 'cf1/policy', interface.OK, '', policy, 'cf1'))):
            self.out[topic].publish(message)

    def until(self, condition):
        end = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < end
            self.say()
            for _ in range(20):
                self.executor.spin_once(timeout_sec=0.005)


@pytest.fixture
def graph(monkeypatch):
    rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
    monkeypatch.setenv('ROS_DOMAIN_ID', DOMAIN)
    rclpy.init(domain_id=int(DOMAIN))
    graph = Graph()
    yield graph
    graph.executor.shutdown()
    graph.node.destroy_node()
    rclpy.shutdown()


def test_a_running_graph_is_found_and_its_numbers_are_drawn(graph, tmp_path):
    from flight_log.view_node import LiveView
    nodes = []

    def draw(scene):
        nodes.append(LiveView(scene, (), lambda: False))
        graph.executor.add_node(nodes[0])
        graph.until(lambda: 'cf1' in scene.robots and set(scene.robots['cf1'].heard) >= {
            interface.POSE, interface.PLAN, interface.STATUS})
        for _ in range(3):
            graph.until(iter((False, True)).__next__)
    seen = drawn(tmp_path / 'live.rrd', draw)
    nodes[0].destroy_node()
    assert {tuple(p[0]) for p in seen('/world/cf1', 'Transform3D:translation')[1]} == {(1.0, 2.0, 0.5)}
    assert seen('/world/plan/cf1', 'LineStrips3D:strips')[1][0][0][-1] == [1.0, 2.0, 1.0]
    np.testing.assert_allclose(seen('/world/obstacles', 'Points3D:radii')[1][0], [0.1, 0.25])
    assert [(text, level) for _, text, level in seen.log('/log/cf1/flight')] == [('holding (hold): gap', 'WARN')]
    assert set(seen.scalars('/battery_v/cf1')) == {3.75} and set(seen.scalars('/solver/iterations/cf1')) == {7.0}
    assert set(seen.scalars('/solver/time_ms/cf1/solve')) == {12.5}


def test_the_command_shows_a_running_graph_and_is_heard_on_loopback_alone(graph, tmp_path):
    target = tmp_path / 'live.rrd'
    process = start('--save', target, ROS_DOMAIN_ID=DOMAIN)
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    reader.start()
    try:
        graph.until(lambda: process.poll() is not None or any('showing cf1' in line for line in said))
        assert process.poll() is None, said
        heard = addresses(process.pid)
        # 239.255.0.1: DDS discovery by multicast, which the stack's profile joins on the loopback interface alone.
        assert heard and {a for _, a in heard} - {'0100FFEF'} == {'0100007F'}, heard
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert process.returncode == 0, said
    assert ('/world/cf1/body', 'Boxes3D:half_sizes') in Read(target).rows


def test_a_window_that_cannot_open_is_an_error_in_words(bag):
    process = start(bag, DISPLAY=':987')  # nobody's display
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and 'error: the viewer ended' in said and 'Traceback' not in said, said
