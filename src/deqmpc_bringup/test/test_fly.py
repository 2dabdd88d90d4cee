"""Whole graphs of real nodes: sockets, cflib, DDS and a bag. Every test has ports and a DDS domain of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flying import (
    assert_a_bag_was_replayed,
    assert_a_trial_was_flown,
    free_ports,
    phases,
    read,
    sim_arguments,
    write_hover,
)

from deqmpc import interface
from deqmpc_bringup.composition import share_dir

DATA = Path(os.environ['DEQMPC_DATA'])


def deqmpc(*words, domain, **options):
    env = {**os.environ, 'ROS_DOMAIN_ID': str(domain)}
    return subprocess.Popen([sys.executable, '-m', 'deqmpc.cli', *map(str, words)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def shared_memory():
    # lttng-ust-wait-*: the tracing library inside the ROS wheels makes it once a user, for ever.
    return {p.name for p in Path('/dev/shm').iterdir() if not p.name.startswith('lttng-ust')}


def node_processes(run_dir):
    """Processes that were started for `run_dir` and live."""
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if str(run_dir) in (p / 'cmdline').read_text() or str(run_dir) in (p / 'environ').read_text():
                found.append((p / 'cmdline').read_text().replace('\0', ' '))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def test_one_trial_through_the_real_graph_reaches_the_goal_and_lands(tmp_path):
    before = shared_memory()
    run = deqmpc('trial', 'sim', '--seeds', 3, '--json', f'run_dir:={tmp_path / "run"}', 'max_steps:=60',
                 *sim_arguments(), domain=87)
    output, _ = run.communicate(timeout=150)
    assert run.returncode == 0, output
    bag = tmp_path / 'run' / 'seed_003' / 'bag'
    assert_a_trial_was_flown(bag, steps=60)
    evaluated = json.loads(output[output.index('\n{') if '\n{' in output else output.index('{'):
                                  output.rindex('}') + 1])
    assert evaluated['trials'][0]['failure'] is None and evaluated['trials'][0]['steps'] == 60
    assert (tmp_path / 'run' / 'report' / 'report.html').stat().st_size > 10_000
    assert not node_processes(tmp_path)
    assert shared_memory() <= before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_a_flight_in_the_air_lands_the_drone_and_leaves_nothing(tmp_path, number):
    before = shared_memory()
    run_dir = tmp_path / 'run'
    run = deqmpc('fly', 'sim', 'trial:=true', 'start:=1.0 0.0 1.0 0.0', 'obstacles:=off', f'run_dir:={run_dir}',
                 *sim_arguments(), domain=88)
    seen = []
    for line in run.stdout:
        seen.append(line)
        if 'engage: following' in line:
            break
    else:
        pytest.fail('never engaged:\n' + ''.join(seen))
    time.sleep(0.5)
    run.send_signal(number)
    if number == signal.SIGKILL:
        run.wait(10)
        until = time.monotonic() + 30.0
        while node_processes(run_dir) and time.monotonic() < until:
            time.sleep(0.2)
    else:
        rest, _ = run.communicate(timeout=60)
        seen.append(rest)
    assert not node_processes(run_dir), ''.join(seen)
    assert shared_memory() <= before
    flown = phases(run_dir / 'bag')
    assert flown[-2:] == ['landing', 'disarmed'] or flown[-1] == 'landing', (flown, ''.join(seen))
    truth = [interface.read_odometry(m) for m in read(run_dir / 'bag', interface.TRUTH)]
    heights = np.array([s.position[2] for s in truth])
    sinking = np.array([s.velocity[2] for s in truth])
    assert heights[-1] < 0.05, ''.join(seen)
    assert sinking[heights < 0.10].min() > -0.6  # it was flown down, it did not fall


@pytest.mark.skipif(not (DATA / 'mocap').is_dir(), reason=f'shared data not found at {DATA} ($DEQMPC_DATA)')
@pytest.mark.parametrize('file', ['mocap/optitrack_20240816_00_11_25.csv', 'flights/mell_trefoil_slow_rep1.csv'])
def test_a_recording_streamed_through_natnet_gives_a_plan_at_every_tick(tmp_path, file):
    command, data = free_ports(2)
    run = deqmpc('stream', DATA / file, '--duration', 5, '--json', f'run_dir:={tmp_path / "run"}',
                 f'natnet_command_port:={command}', f'natnet_data_port:={data}', domain=89)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert 'Traceback' not in output
    ticks = [d.values for m in read(tmp_path / 'run' / 'bag', interface.DIAGNOSTICS)
             for d in interface.read_diagnostics(m) if d.name == 'cf1/policy']
    poses = [interface.read_pose(m)[0] for m in read(tmp_path / 'run' / 'bag', interface.POSE)]
    plans = read(tmp_path / 'run' / 'bag', interface.PLAN)
    assert 4.5 < poses[-1] - poses[0] < 5.5
    accepted = [t for t in ticks if t['gate'] == 'accepted']
    assert len(accepted) == len(plans) >= 30
    during = [t['gate'] for t in ticks[ticks.index(accepted[0]):ticks.index(accepted[-1])]]
    assert set(during) == {'accepted'}


def test_a_replayed_bag_gives_plans_and_is_recorded_again(tmp_path):
    source = write_hover(tmp_path / 'source', seconds=3.0)
    run = deqmpc('replay', source, f'run_dir:={tmp_path / "run"}', domain=94)
    output, _ = run.communicate(timeout=90)
    assert run.returncode == 0, output
    assert_a_bag_was_replayed(source, tmp_path / 'run' / 'bag')


@pytest.mark.parametrize(('words', 'message'), [
    (['fly', 'sim', 'policy:=nonsense'], "unknown policy 'nonsense'"),
    (['fly', 'sim', 'policy:=deq_mpc'], 'config/policies/deq_mpc.yaml'),
    (['fly', 'sim', 'policy_file:=/nowhere.yaml'], '/nowhere.yaml'),
    (['fly', 'sim', 'obstacles_file:=/nowhere.yaml'], '/nowhere.yaml'),
    (['fly', 'sim', 'start:=up', 'trial:=true'], "'up'"),
    (['fly', 'hardware', 'uri:=udp://127.0.0.1:9', 'natnet_command_port:=9'], 'udp://127.0.0.1:9'),
    (['stream', '/nowhere.csv'], '/nowhere.csv'),
])
def test_bad_input_ends_with_one_clear_message_and_a_non_zero_status(tmp_path, words, message):
    ports = sim_arguments() if words[:2] == ['fly', 'sim'] else []
    run = deqmpc(*words, f'run_dir:={tmp_path / "run"}', *ports, domain=90)
    output, _ = run.communicate(timeout=90)
    assert run.returncode not in (0, -9), output
    assert message in output and 'error' in output.lower(), output
    assert 'Traceback' not in output, output


def test_an_occupied_port_is_named(tmp_path):
    arguments = sim_arguments()
    port = int(arguments[0].rsplit(':', 1)[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(('127.0.0.1', port))
        run = deqmpc('fly', 'sim', f'run_dir:={tmp_path / "run"}', *arguments, domain=91)
        output, _ = run.communicate(timeout=60)
    assert run.returncode not in (0, -9)
    assert str(port) in output and 'Traceback' not in output, output


# Its flight is in test_in_process_fleet.py: twelve processes in real time ask more of a machine than a test may.
def test_a_fleet_in_the_real_graph_has_each_drone_on_its_own_body_and_radio_and_hears_the_other(tmp_path):
    arguments = sim_arguments()
    run_dir = tmp_path / 'run'
    port = free_pair()
    run = deqmpc('fly', 'sim', f'fleet:={share_dir() / "config" / "fleet" / "two.yaml"}', 'obstacles:=off',
                 'policy:=mpc_only', f'uri:=udp://127.0.0.1:{port}', f'run_dir:={run_dir}', *arguments[1:], domain=92)
    waited = {f'[{robot}.{node}]': what for robot, p in (('cf1', port), ('cf2', port + 1)) for node, what in (
        ('crazyflie_interface', f'udp://127.0.0.1:{p}: connected'), ('policy', 'a plan when warm'))}
    seen = []
    for line in run.stdout:
        seen.append(line)
        waited = {node: what for node, what in waited.items() if node not in line or what not in line}
        if not waited:
            break
    time.sleep(5.0)
    run.send_signal(signal.SIGINT)
    rest, _ = run.communicate(timeout=60)
    assert not waited and run.returncode == 0, ''.join(seen) + rest
    assert not node_processes(run_dir)
    for robot, x, other in (('cf1', -1.0, 'cf2'), ('cf2', 1.0, 'cf1')):
        bag = run_dir / robot / 'bag'
        own = [interface.read_odometry(m).position for m in read(bag, interface.ODOM, robot)]
        heard = [interface.read_odometry(m).position for m in read(bag, interface.ODOM, other)]
        assert own[-1] == pytest.approx([x, 0.0, 0.0], abs=0.05)
        assert heard[-1] == pytest.approx([-x, 0.0, 0.0], abs=0.05)
        gates = [d.values['gate'] for m in read(bag, interface.DIAGNOSTICS, robot)
                 for d in interface.read_diagnostics(m) if d.name == f'{robot}/policy']
        assert gates and f'no odometry of {other} yet' not in gates[-1]


def free_pair():
    """A UDP port that is free, and so is the next one."""
    while True:
        port, = free_ports(1)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind(('127.0.0.1', port + 1))
            return port
