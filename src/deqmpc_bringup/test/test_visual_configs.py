"""The RViz config and the Foxglove layout against the topic table: names, types, QoS, message fields."""

import json
import re

import pytest
import yaml

from deqmpc import interface
from deqmpc_bringup.composition import share_dir

pytest.importorskip('rclpy', reason='rclpy is not installed')
from deqmpc_ros.messages import message_class  # noqa: E402

TOPICS = {t.resolve(robot): t for robot in ('cf1', 'cf2') for t in (*interface.RECORDED, *interface.VISUAL)}
DRAWS = {'Odometry': 'nav_msgs/msg/Odometry', 'Path': 'nav_msgs/msg/Path',
         'MarkerArray': 'visualization_msgs/msg/MarkerArray'}
# What a viewer of a flight must show: pose, plan, where it flew, obstacles, phase.
SHOWN = {'/cf1/odom', '/cf1/plan_path', '/cf1/flown_path', '/obstacles', '/cf1/flight_markers'}


def rviz_displays(entries):
    for entry in entries:
        yield from rviz_displays(entry.get('Displays', ()))
        if 'Topic' in entry:
            yield entry


@pytest.fixture(scope='module')
def rviz():
    return yaml.safe_load((share_dir() / 'config' / 'rviz' / 'flight.rviz').read_text())['Visualization Manager']


@pytest.fixture(scope='module')
def foxglove():
    return json.loads((share_dir() / 'config' / 'foxglove' / 'flight.json').read_text())


def test_rviz_shows_every_part_of_a_flight_and_only_topics_of_the_table(rviz):
    displays = list(rviz_displays(rviz['Displays']))
    for display in displays:
        topic = TOPICS[display['Topic']['Value']]
        assert DRAWS[display['Class'].split('/')[1]] == topic.type, display['Name']
    assert {d['Topic']['Value'] for d in displays if d['Enabled']} >= SHOWN
    assert rviz['Global Options']['Fixed Frame'] == interface.WORLD


def test_rviz_asks_for_no_more_than_the_publishers_offer(rviz):
    for display in rviz_displays(rviz['Displays']):
        wanted, topic = display['Topic'], TOPICS[display['Topic']['Value']]
        assert wanted['Reliability Policy'] == ('Reliable' if topic.reliable else 'Best Effort')
        assert wanted['Durability Policy'] == ('Transient Local' if topic.latched else 'Volatile')


def test_no_tool_of_rviz_publishes(rviz):
    assert not [t for t in rviz['Tools'] if 'Topic' in t or 'Goal' in t['Class'] or 'Point' in t['Class']]


def leaves(node):
    return [node] if isinstance(node, str) else leaves(node['first']) + leaves(node['second'])


def test_every_panel_of_the_foxglove_layout_has_its_place(foxglove):
    assert sorted(leaves(foxglove['layout'])) == sorted(foxglove['configById'])


def test_foxglove_shows_every_part_of_a_flight(foxglove):
    (scene,) = (c for name, c in foxglove['configById'].items() if name.startswith('3D!'))
    assert {name for name, c in scene['topics'].items() if c['visible']} >= SHOWN
    assert set(scene['topics']) <= set(TOPICS)


def last_type(path):
    """The field type that a Foxglove message path ends in; KeyError where a step does not exist."""
    topic = next(t for t in sorted(TOPICS, key=len, reverse=True) if path.startswith(t + '.'))
    kind = TOPICS[topic].type
    for step in re.sub(r'\{.*?\}', '', path[len(topic) + 1:]).split('.'):
        name, bracket, _ = step.partition('[')
        package, *_, cls = kind.split('/')
        field = message_class(f'{package}/msg/{cls}').get_fields_and_field_types()[name]
        assert bool(bracket) == field.startswith('sequence<'), f'{path}: {step}'
        kind = field.removeprefix('sequence<').removesuffix('>')
    return kind


def test_every_message_path_of_foxglove_ends_in_a_field_that_it_can_draw(foxglove):
    kinds = {'Plot!position': 'double', 'StateTransitions!phases': 'string'}
    for panel, kind in kinds.items():
        for path in foxglove['configById'][panel]['paths']:
            assert last_type(path['value']) == kind, path['value']


def test_the_status_keys_that_foxglove_follows_are_keys_of_the_flight_status(foxglove):
    keys = re.findall(r'key=="(\w+)"', json.dumps(foxglove).replace('\\"', '"'))
    assert len(keys) == 3 and set(keys) <= set(interface.FLIGHT_KEYS)
