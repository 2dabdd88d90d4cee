"""Fleet files, and the rows they give. What the drones then do is in test_in_process_fleet.py."""

import copy
import re

import pytest
import yaml

from deqmpc_bringup.composition import CompositionError, compose, share_dir
from deqmpc_bringup.fleet import FleetError, read_fleet

TWO = share_dir() / 'config' / 'fleet' / 'two.yaml'


def changed(tmp_path, path, value):
    """The two-drone file with the entry at `path` ('robots.cf1.uri') set to `value`, or taken away (None)."""
    data = copy.deepcopy(yaml.safe_load(TWO.read_text()))
    *way, last = path.split('.')
    part = data
    for key in way:
        part = part.setdefault(key, {})
    if value is None:
        del part[last]
    else:
        part[last] = value
    file = tmp_path / 'fleet.yaml'
    file.write_text(yaml.safe_dump(data))
    return file


def test_a_fleet_file_is_read_with_each_robots_own_values():
    first, second = read_fleet(TWO)
    assert (first.name, first.uri, first.initial_position) == ('cf1', 'radio://0/80/2M/E7E7E7E701', (-1.0, 0.0, 0.0))
    assert second.goal == first.start == (-1.0, 0.0, 1.0, 0.0)
    assert (first.battery_warn, first.ext_pos_std_dev) == ('3.8', '0.01')


def test_a_disabled_robot_does_not_fly(tmp_path):
    assert [r.name for r in read_fleet(changed(tmp_path, 'robots.cf1.enabled', False))] == ['cf2']


def test_the_robot_wins_over_its_type_and_the_type_over_all(tmp_path):
    assert read_fleet(changed(tmp_path, 'robot_types.cf21.firmware_params', {'locSrv': {'extPosStdDev': '1e-3'}}))[
        0].ext_pos_std_dev == '0.001'
    own = read_fleet(changed(tmp_path, 'robots.cf2.firmware_params', {'locSrv': {'extPosStdDev': 0.02}}))
    assert [r.ext_pos_std_dev for r in own] == ['0.01', '0.02']
    assert [r.ext_quat_std_dev for r in own] == ['0.0045', '0.0045']


@pytest.mark.parametrize(('path', 'value', 'said'), [
    ('robots.cf1.uri', 'bluetooth://1', "robots.cf1.uri = 'bluetooth://1'; expected radio://"),
    ('robots.cf1.uri', 'radio://0/80/2M/E7E7E7E702', 'robots.cf2 = .*; expected another uri than that of cf1'),
    ('robots.cf1.uri', None, r"robots.cf1: no key \['uri'\]"),
    ('robots.cf1.type', 'cf9', "robots.cf1.type = 'cf9'; expected one of robot_types: cf21"),
    ('robots.cf1.enabled', 'yes please', 'expected true or false'),
    ('robots.cf1.initial_position', [0.0, 0.0], r'initial_position = \[0.0, 0.0\]; expected 3 numbers'),
    ('robots.cf1.deqmpc.goal', [0.0, 0.0, float('nan'), 0.0], 'goal = nan; expected a number'),
    ('robots.cf1.deqmpc.gaol', [0.0], r"robots.cf1.deqmpc: unknown key \['gaol'\]"),
    ('robots.cf1.deqmpc.start', '1 2 3', r"start = \['1', '2', '3'\]; expected 4 numbers"),
    ('robots.9', {}, 'names of letters'), ('robots', {}, 'at least one with enabled'),
    ('robots', 3, 'robots = 3; expected a mapping'), ('fileversion', 7, 'fileversion = 7; expected 1, 2 or 3'),
    ('swarm', {}, r"unknown key \['swarm'\]"),
    ('all.reference_frame', 'odom', "reference_frame = 'odom'; expected world"),
    ('robot_types.cf21.motion_capture.tracking', 'librigidbodytracker', 'expected vendor'),
    ('robot_types.cf21.battery.voltage_critical', 3.9, 'expected voltage_critical below voltage_warning'),
    ('all.firmware_params.stabilizer.controller', 1, 'controller = 1; expected 2, without which')])
def test_a_wrong_entry_is_named_with_file_and_what_was_expected(tmp_path, path, value, said):
    file = changed(tmp_path, path, value)
    with pytest.raises(FleetError, match=said) as raised:
        read_fleet(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(('path', 'value', 'said'), [
    ('robots.cf2.initial_position', [-0.8, 0.0, 0.0], 'initial positions of cf1 and cf2 come within 0.20 m'),
    ('robots.cf1.deqmpc.start', '1.0 0.1 1.0 0.0', 'ways to the starts of cf1 and cf2 come within 0.10 m'),
    ('robots.cf1.deqmpc.goal', [-1.0, 0.3, 0.5, 0.0], 'goals of cf1 and cf2 come within 0.30 m')])
def test_robots_that_would_meet_before_a_policy_flies_them_are_refused(tmp_path, path, value, said):
    with pytest.raises(FleetError, match=said):
        read_fleet(changed(tmp_path, path, value))


def by_label(mode, **given):
    return {r.label: r for r in compose(mode, {'fleet': str(TWO), **given})}


def test_every_robot_has_its_own_nodes_and_the_fleet_one_simulator_and_one_field():
    rows = by_label('sim', trial='true', run_dir='/run')
    own = ('mocap_bridge', 'policy', 'crazyflie_interface', 'recorder', 'trial')
    assert set(rows) == {'sim', 'obstacles', *(f'{r}.{n}' for r in ('cf1', 'cf2') for n in own)}
    assert all(rows[f'{r}.{n}'].namespace == f'/{r}' for r in ('cf1', 'cf2') for n in own)
    assert 'robots:=["cf1", "cf2"]' in rows['sim'].ros_arguments
    assert 'starts:=["-1.0 0.0 0.0 0.0", "1.0 0.0 0.0 0.0"]' in rows['sim'].ros_arguments
    assert 'bag_path:="/run/cf2/bag"' in rows['cf2.recorder'].ros_arguments


def test_each_policy_has_its_own_goal_and_the_others_as_neighbours():
    rows = by_label('sim')
    assert {'goal:=[1.0, 0.0, 1.0, 0.0]', 'neighbours:=["cf2"]'} <= set(rows['cf1.policy'].ros_arguments)
    assert {'goal:=[-1.0, 0.0, 1.0, 0.0]', 'neighbours:=["cf1"]'} <= set(rows['cf2.policy'].ros_arguments)


def test_the_uri_is_the_files_on_hardware_and_a_port_each_in_simulation():
    hardware, sim = by_label('hardware'), by_label('sim', uri='udp://127.0.0.1:20000')
    assert 'uri:="radio://0/80/2M/E7E7E7E702"' in hardware['cf2.crazyflie_interface'].ros_arguments
    assert 'uri:="udp://127.0.0.1:20000"' in sim['cf1.crazyflie_interface'].ros_arguments
    assert 'uri:="udp://127.0.0.1:20001"' in sim['cf2.crazyflie_interface'].ros_arguments


def test_a_policy_of_the_file_yields_to_one_of_the_command_line(tmp_path):
    file = changed(tmp_path, 'robots.cf2.deqmpc.policy', 'mpc_only')
    rows = {r.label: r for r in compose('sim', {'fleet': str(file)})}
    assert 'policy:="deq_mpc_deq"' in rows['cf1.policy'].ros_arguments
    assert 'policy:="mpc_only"' in rows['cf2.policy'].ros_arguments
    assert any(a.endswith('policies/mpc_only.yaml"') for a in rows['cf2.policy'].ros_arguments)
    rows = {r.label: r for r in compose('sim', {'fleet': str(file), 'policy': 'network_only'})}
    assert 'policy:="network_only"' in rows['cf2.policy'].ros_arguments


@pytest.mark.parametrize('given', ['robot', 'start', 'goal', 'body'])
def test_what_the_fleet_file_says_of_each_robot_is_no_argument_beside_it(given):
    with pytest.raises(CompositionError, match=f'{given}:=x and fleet:='):
        compose('sim', {'fleet': str(TWO), given: 'x'})


def test_a_trial_of_a_fleet_needs_every_start(tmp_path):
    file = changed(tmp_path, 'robots.cf2.deqmpc.start', None)
    with pytest.raises(CompositionError, match='robots.cf2 has no deqmpc.start'):
        compose('sim', {'fleet': str(file), 'trial': 'true'})
    assert compose('sim', {'fleet': str(file)})


def test_a_firmware_parameter_that_nobody_would_set_is_refused(tmp_path):
    file = changed(tmp_path, 'all.firmware_params.kalman', {'pNAcc_xy': 1.0})
    with pytest.raises(CompositionError, match=re.escape('all.firmware_params.kalman.pNAcc_xy = 1.0 would not be set')):
        compose('hardware', {'fleet': str(file)})


def test_beside_crazyswarm2_every_node_keeps_off_the_names_of_its_server():
    rows = {r.label: r for r in compose('hardware', {'robot': 'cf231', 'interface': 'crazyswarm2'})}
    assert {r.namespace for r in rows.values()} == {'/cf231_deqmpc'}
    assert rows['crazyflie_interface'].executable == 'crazyswarm2_interface_node'
    assert 'crazyflie:="cf231"' in rows['crazyflie_interface'].ros_arguments
    assert 'body_name:="cf231"' in rows['mocap_bridge'].ros_arguments
    fleet = by_label('hardware', interface='crazyswarm2')
    assert 'neighbours:=["cf2_deqmpc"]' in fleet['cf1_deqmpc.policy'].ros_arguments
    assert 'crazyflie:="cf2"' in fleet['cf2_deqmpc.crazyflie_interface'].ros_arguments


def test_a_firmware_parameter_is_left_to_crazyswarm2_where_its_server_flies(tmp_path):
    file = changed(tmp_path, 'all.firmware_params.kalman', {'pNAcc_xy': 1.0})
    assert compose('hardware', {'fleet': str(file), 'interface': 'crazyswarm2'})


def test_a_fleet_file_that_is_not_there_is_named():
    with pytest.raises(CompositionError, match='fleet file /nowhere.yaml: No such file'):
        compose('sim', {'fleet': '/nowhere.yaml'})


def test_the_goal_of_one_robot_reaches_policy_and_trial():
    rows = {r.name: r for r in compose('sim', {'goal': '0.5 0 1 0', 'trial': 'true'})}
    assert all('goal:=[0.5, 0.0, 1.0, 0.0]' in rows[n].ros_arguments for n in ('policy', 'trial'))
    with pytest.raises(CompositionError, match="goal:='up'; expected 'x y z yaw'"):
        compose('sim', {'goal': 'up'})
