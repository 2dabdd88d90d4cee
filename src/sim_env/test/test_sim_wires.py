"""The simulated lab on its wires: pacing, exposure times, bad parameters, and the real clients."""

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time

import cflib.crtp
import natnet as natnet_client
import numpy as np
import pytest
import rclpy
from cflib.crazyflie import Crazyflie

from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc_ros.node import SettingsError, subscription
from sim_env.pacing import Pacer
from sim_env.sim_node import Settings, make_lab, of_robot, start_pose, udp_address

WAIT = 20.0  # s

cflib.crtp.init_drivers()


def lab(clock=0.0, **given):
    settings = Settings(crazyflie_uri='udp://127.0.0.1:0', natnet_command_port=0, **given)
    return make_lab(settings, 'cf1', clock, print)


def test_the_pacer_keeps_up_with_the_clock_and_catches_up_in_bounded_portions():
    pacer = Pacer(100.0, factor=2.0, max_steps=10)
    assert pacer.due(100.0) == 0
    assert pacer.due(100.0025) == 5
    assert [pacer.due(100.0125) for _ in range(3)] == [10, 10, 0]
    assert pacer.clock(0.025) == pytest.approx(100.0125)
    assert pacer.slips == 0


def test_the_pacer_gives_up_a_long_lag_and_counts_it():
    pacer = Pacer(0.0, max_steps=10, max_lag=0.1)
    assert pacer.due(1.0) == 10
    assert (pacer.slips, pacer.slipped) == (1, pytest.approx(0.99))
    assert pacer.due(1.0) == 0 and pacer.due(1.005) == 5
    assert pacer.clock(0.015) == pytest.approx(1.005)


def test_the_pacer_never_runs_ahead_over_many_calls():
    pacer, done = Pacer(0.0), 0
    for k in range(1, 5001):
        done += pacer.due(0.0021 * k)
        assert done * 1e-3 <= 0.0021 * k + 1e-9
    assert done == 10500


def test_frames_carry_the_exposure_on_the_servers_clock_and_arrive_after_the_latency():
    sim = lab(50.0, start='0.5 -0.25 0 0', mocap_latency=0.02, mocap_jitter=0.0, position_noise=0.0)
    sent = []
    sim.server.send_frame = lambda number, exposure, poses, now: sent.append((number, exposure, poses, now))
    for k in range(1, 501):
        sim.advance(50.0 + 0.002 * k)
    sim.close()
    assert [number for number, *_ in sent] == list(range(len(sent))) and len(sent) == 98
    assert [exposure for _, exposure, _, _ in sent] == pytest.approx(50.001 + 0.01 * np.arange(98))
    assert all(0.02 - 1e-9 <= now - exposure < 0.0241 for _, exposure, _, now in sent)
    assert sent[-1][2]['cf1'][0] == pytest.approx([0.5, -0.25, 0.0], abs=0.01)


def test_a_fleet_is_one_camera_system_with_a_body_and_a_radio_port_for_each_drone():
    sim = lab(robots=['cf1', 'cf2'], starts=['0.5 0 0 0', '-0.5 0.2 0 0'], mocap_jitter=0.0, position_noise=0.0)
    sent = []
    sim.server.send_frame = lambda number, exposure, poses, now: sent.append(poses)
    for k in range(1, 101):
        sim.advance(0.002 * k)
    sim.close()
    assert [d.peer.address[1] for d in sim.drones.values()] != [sim.first.peer.address[1]] * 2
    assert sent[-1]['cf1'][0] == pytest.approx([0.5, 0.0, 0.0], abs=0.01)
    assert sent[-1]['cf2'][0] == pytest.approx([-0.5, 0.2, 0.0], abs=0.01)


def test_a_lost_frame_is_lost_for_every_body_and_an_occlusion_hides_one():
    sim = lab(robots=['cf1', 'cf2'], drop_probability=0.5, occlusion_rate=5.0, seed=3)
    sent = []
    sim.server.send_frame = lambda number, exposure, poses, now: sent.append(poses)
    for k in range(1, 1001):
        sim.advance(0.002 * k)
    sim.close()
    assert 60 < len(sent) < 140  # of 198
    hidden = [tuple(pose is None for pose in poses.values()) for poses in sent]
    assert {(False, False), (True, False), (False, True)} <= set(hidden)


def test_the_first_of_a_fleet_is_simulated_as_if_it_were_alone():
    alone, fleet = Settings(seed=5), Settings(seed=5, robots=['cf1', 'cf2'])
    assert of_robot(fleet, 'cf1') == alone
    second = of_robot(fleet, 'cf2')
    assert second.seed != 5 and second.crazyflie_uri == 'udp://127.0.0.1:19851'


@pytest.mark.parametrize(('given', 'said'), [
    ({'starts': ['0 0 0 0']}, 'starts has 1 entries for 2 robots'), ({'robots': ['cf1', 'cf1']}, 'different names'),
    ({'robots': ['cf8']}, "expected 'cf1' among"), ({'body': 'x'}, "body = 'x'")])
def test_a_fleet_whose_lists_do_not_fit_is_refused(given, said):
    fleet = {'robots': ['cf1', 'cf2'], **given}
    with pytest.raises(SettingsError, match=said):
        of_robot(Settings(**fleet), 'cf1')
        lab(**fleet)


def test_cflib_and_natnet_see_the_same_crazyflie_take_off():
    sim = lab(time.monotonic(), start='0.3 0.2 0 0')
    mocap = natnet_client.NatNetClient(command_port=sim.server.address[1], use_multicast=False)
    cf = Crazyflie()
    ready, heights = [], []

    def run(condition, also=lambda: None):
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end
            sim.advance(time.monotonic())
            also()
            time.sleep(0.002)

    def forward(frame):
        body = frame.rigid_bodies[0]
        heights.append(body.pos[2])
        cf.extpos.send_extpose(*body.pos, *body.rot)
    try:
        cf.fully_connected.add_callback(ready.append)
        cf.open_link(f'udp://127.0.0.1:{sim.first.peer.address[1]}')
        run(lambda: ready)
        threading.Thread(target=mocap.connect, args=(WAIT,), daemon=True).start()
        run(lambda: mocap.connected)
        mocap.on_data_frame_received_event.handlers.append(forward)
        run(lambda: len(heights) > 50, mocap.update_sync)
        cf.high_level_commander.takeoff(0.4, 1.0)
        run(lambda: heights[-1] > 0.35, mocap.update_sync)
        assert sim.first.crazyflie.supervisor_info & 1 << 4  # flying
        assert sim.first.crazyflie.truth().position == pytest.approx([0.3, 0.2, 0.4], abs=0.1)
        assert sim.first.peer.counts['malformed'] == sim.server.counts['malformed'] == 0
    finally:
        cf.close_link()
        mocap.shutdown()
        sim.close()


def test_a_random_start_stands_on_the_floor_and_follows_the_seed():
    position, yaw = start_pose('random', 5, 0.8)
    again, _ = start_pose('random', 5, 0.8)
    other, _ = start_pose('random', 6, 0.8)
    assert np.array_equal(position, again) and not np.array_equal(position, other)
    assert position[2] == 0.0 and np.abs(position[:2]).max() <= 0.8 and abs(yaw) <= np.pi


@pytest.mark.parametrize('text', ['', '1 2 3', '0 0 -1 0', 'a b c d', '0 0 nan 0', '1 2 3 4 5'])
def test_a_start_that_is_no_pose_is_quoted(text):
    with pytest.raises(SettingsError, match=re.escape(f'start = {text!r}')):
        start_pose(text, 0, 1.0)


@pytest.mark.parametrize('uri', ['radio://0/80/2M', 'udp://127.0.0.1', 'udp://127.0.0.1:70000', ''])
def test_a_uri_that_is_no_udp_link_is_quoted(uri):
    with pytest.raises(SettingsError, match='udp://HOST:PORT'):
        udp_address(uri)


def test_an_occupied_natnet_port_is_named_and_the_radio_port_released():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        taken.bind(('127.0.0.1', 0))
        probe.bind(('127.0.0.1', 0))
        radio = probe.getsockname()[1]
        probe.close()
        with pytest.raises(SettingsError, match=f'NatNet server: cannot open UDP .*{taken.getsockname()[1]}'):
            make_lab(Settings(crazyflie_uri=f'udp://127.0.0.1:{radio}',
                              natnet_command_port=taken.getsockname()[1]), 'cf1', 0.0, print)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(('127.0.0.1', radio))


def test_a_missing_airframe_file_is_named():
    with pytest.raises(SettingsError, match='/nowhere.yaml'):
        lab(airframe='/nowhere.yaml')


class SimProcess:
    """The sim node in its own process and ROS domain, with ports of the system's choice."""

    def __init__(self, *parameters):
        self.domain = random.SystemRandom().randrange(100, 190)
        environment = {**os.environ, 'ROS_DOMAIN_ID': str(self.domain), 'ROS_PYTHON_CHECK_FIELDS': '1'}
        arguments = [w for p in ('crazyflie_uri:=udp://127.0.0.1:0', 'natnet_command_port:=0', *parameters)
                     for w in ('-p', p)]
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'sim_env.sim_node', '--ros-args', '-r', '__ns:=/cf1', *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.output = self.process.communicate(timeout=WAIT)[0]


def test_the_sim_node_publishes_the_truth_and_its_state_and_ends_cleanly_on_sigterm():
    context, truth, states = rclpy.Context(), [], []
    with SimProcess('start:="0.4 -0.3 0 1.0"') as sim:
        rclpy.init(context=context, domain_id=sim.domain)
        node = rclpy.create_node('watcher', namespace='/cf1', context=context)
        executor = rclpy.executors.SingleThreadedExecutor(context=context)
        executor.add_node(node)
        subscription(node, interface.TRUTH, 'cf1', lambda m: truth.append(interface.read_odometry(m)))
        subscription(node, interface.DIAGNOSTICS, 'cf1',
                     lambda m: states.extend(interface.read_diagnostics(m)))
        end = time.monotonic() + WAIT
        while len(truth) < 50 or not states:
            assert time.monotonic() < end, sim.process.poll()
            executor.spin_once(timeout_sec=0.1)
        node.destroy_node()
        rclpy.shutdown(context=context)
    assert sim.process.returncode == 0, sim.output
    assert truth[-1].position == pytest.approx([0.4, -0.3, 0.0], abs=0.01)
    assert rotation.yaw(truth[-1].quaternion) == pytest.approx(1.0, abs=0.05)
    stamps = np.diff([state.stamp for state in truth])
    assert stamps.min() > 0.0 and np.median(stamps) == pytest.approx(0.01, abs=1e-3)  # simulated instants
    assert states[-1].name == 'cf1/sim' and {'lag_ms', 'slips', 'radio_malformed'} <= set(states[-1].values)


def test_the_sim_node_names_an_occupied_port_in_one_line_and_exits_with_2():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
        with SimProcess(f'natnet_command_port:={port}') as sim:
            assert sim.process.wait(WAIT) == 2
    assert sim.output.splitlines()[-1].startswith(f'error: NatNet server: cannot open UDP 127.0.0.1:{port}: ')


def test_the_sim_node_refuses_an_unknown_parameter():
    with SimProcess('latency:=0.1') as sim:
        assert sim.process.wait(WAIT) == 2
    assert 'unknown parameter latency' in sim.output
