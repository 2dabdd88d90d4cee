import sys
import types
from importlib.metadata import entry_points

import pytest

from deqmpc_bringup import composition
from deqmpc_bringup.composition import CompositionError, compose, parse_assignments, read_table
from deqmpc_bringup.runner import command

MODES = sorted(read_table()['modes'])


@pytest.mark.parametrize('mode', MODES)
def test_every_row_names_an_installed_executable_of_its_package(mode):
    scripts = {e.name: e.value.split('.')[0] for e in entry_points(group='console_scripts')}
    rows = compose(mode, {'trial': 'true'} if mode in ('sim', 'hardware') else {})
    assert rows
    for row in rows:
        assert scripts[row.executable] == row.package
        assert command(row)[0].endswith(row.executable)


def test_hardware_and_sim_start_the_same_nodes_but_for_the_simulator():
    sim = {r.name for r in compose('sim', {'trial': 'true'})}
    hardware = {r.name for r in compose('hardware', {'trial': 'true'})}
    assert sim - hardware == {'sim'} and hardware <= sim


def test_arguments_reach_the_nodes_as_typed_parameters():
    rows = {r.name: r for r in compose('sim', {'seed': '7', 'obstacles': 'off', 'robot': 'cf2'})}
    assert all(r.namespace == '/cf2' for r in rows.values())
    assert 'seed:=7' in rows['obstacles'].ros_arguments
    assert 'mode:="off"' in rows['obstacles'].ros_arguments  # a bare off is a YAML boolean
    assert not any(a.startswith('file:=') for a in rows['obstacles'].ros_arguments)  # empty: not passed on


def test_recording_and_the_trial_can_be_switched():
    assert 'recorder' not in {r.name for r in compose('sim', {'record': 'false'})}
    assert 'trial' not in {r.name for r in compose('sim')}


@pytest.mark.parametrize(('mode', 'words', 'message'), [
    ('simm', [], "unknown mode 'simm'"),
    ('sim', ['speed:=3'], 'mode sim has no argument speed; it has: robot'),
    ('sim', ['obstacles:=some'], "obstacles:='some'; expected one of off, static, moving"),
    ('sim', ['seed=3'], "argument 'seed=3'; expected name:=value"),
    ('sim', ['params:=nowhere.yaml'], 'parameter file nowhere.yaml'),
    ('hardware', ['bag:=x'], 'mode hardware has no argument bag'),
])
def test_a_wrong_mode_or_argument_is_named_with_what_was_expected(mode, words, message):
    with pytest.raises(CompositionError, match='.*') as error:
        compose(mode, parse_assignments(words))
    assert message in str(error.value)


def test_a_parameter_file_for_an_unknown_node_is_refused(tmp_path):
    path = tmp_path / 'p.yaml'
    path.write_text('/**:\n  polcy:\n    ros__parameters: {rate: 20.0}\n')
    with pytest.raises(CompositionError, match='polcy: expected one of'):
        compose('sim', {'params': str(path)})


class _Recorded:
    """Stands for a class of launch or launch_ros: keeps what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def _recording_launch(monkeypatch):
    made = {}
    for module, names in {'launch': ['LaunchDescription'], 'launch.substitutions': ['LaunchConfiguration'],
                          'launch.actions': ['DeclareLaunchArgument', 'OpaqueFunction',
                                             'SetEnvironmentVariable', 'Shutdown'],
                          'launch_ros': [], 'launch_ros.actions': ['Node']}.items():
        fake = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (_Recorded,), {})
            setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, module, fake)
    # Imported afresh against the recording classes, and forgotten again when the test ends.
    monkeypatch.setitem(sys.modules, 'deqmpc_bringup.ros_launch', None)
    del sys.modules['deqmpc_bringup.ros_launch']
    return made


@pytest.mark.parametrize('mode', MODES)
def test_ros2_launch_and_deqmpc_fly_start_the_same_processes(mode, monkeypatch):
    made = _recording_launch(monkeypatch)
    given = {'seed': '5'} if mode in ('sim', 'hardware') else {}
    made['LaunchConfiguration'].perform = lambda self, context: context[self.args[0]]
    path = composition.share_dir() / 'launch' / f'{mode}.launch.py'
    namespace = {}
    exec(compile(path.read_text(), str(path), 'exec'), namespace)
    entities = namespace['generate_launch_description']().args[0]
    declared = {e.args[0]: e.kwargs['default_value'] for e in entities
                if type(e).__name__ == 'DeclareLaunchArgument'}
    assert set(declared) == {a.name for a in composition.arguments(mode)}
    opaque = next(e for e in entities if type(e).__name__ == 'OpaqueFunction')
    nodes = opaque.kwargs['function']({**declared, **given})
    rows = compose(mode, given)
    assert [(n.kwargs['package'], n.kwargs['executable'], n.kwargs['name'], n.kwargs['namespace'],
             tuple(n.kwargs['ros_arguments'])) for n in nodes] == [
        (r.package, r.executable, r.name, r.namespace, r.ros_arguments) for r in rows]


def test_a_launched_fleet_ends_with_its_last_trial_or_with_the_first_that_fails(monkeypatch):
    made = _recording_launch(monkeypatch)
    made['LaunchConfiguration'].perform = lambda self, context: context[self.args[0]]
    from deqmpc_bringup.ros_launch import launch_description
    fleet = str(composition.share_dir() / 'config' / 'fleet' / 'two.yaml')

    def trials():
        entities = launch_description('sim').args[0]
        values = {e.args[0]: e.kwargs['default_value'] for e in entities if type(e).__name__ == 'DeclareLaunchArgument'}
        opaque = next(e for e in entities if type(e).__name__ == 'OpaqueFunction')
        nodes = opaque.kwargs['function']({**values, 'fleet': fleet, 'trial': 'true'})
        return [n.kwargs['on_exit'] for n in nodes if n.kwargs['name'] == 'trial']
    first, last = trials()
    assert first(types.SimpleNamespace(returncode=0), None) is None
    assert isinstance(last(types.SimpleNamespace(returncode=0), None), made['Shutdown'])
    first, _ = trials()
    assert isinstance(first(types.SimpleNamespace(returncode=1), None), made['Shutdown'])


@pytest.mark.parametrize('mode', MODES)
def test_the_real_ros2_launch_accepts_the_launch_file(mode):
    pytest.importorskip('launch_ros', reason='launch_ros is not installed (it comes with ROS 2)')
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument, OpaqueFunction
    from launch.launch_description_sources import get_launch_description_from_python_launch_file
    description = get_launch_description_from_python_launch_file(
        str(composition.share_dir() / 'launch' / f'{mode}.launch.py'))
    context = LaunchContext()
    nodes = []
    for entity in description.entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.visit(context)
        elif isinstance(entity, OpaqueFunction):
            nodes = entity.visit(context)
    rows = compose(mode)
    assert [(n.node_package, n.node_executable) for n in nodes] == [(r.package, r.executable) for r in rows]
