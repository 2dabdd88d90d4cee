"""What the documentation names is there, and its figures are those of the code."""

import re
from pathlib import Path

import pytest

from crazyflie_interface.settings import Settings as Flight
from deqmpc import interface
from deqmpc_bringup.composition import read_table

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/*.md')])
TEXT = {page: page.read_text() for page in PAGES}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file(page):
    links = [target.split('#')[0] for target in re.findall(r'\]\(([^)\s]+)\)', TEXT[page])]
    missing = [t for t in links if t and '://' not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_every_file_named_in_config_scripts_and_launch_exists(page):
    named = re.findall(r'`((?:config|scripts|launch)/[\w./]+\.\w+)`', TEXT[page])
    assert [n for n in named if not (ROOT / n).exists()] == []


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_every_command_is_one_of_deqmpc(page):
    # From setup.py, because installed entry points may be older than the source.
    commands = set(re.findall(r"'([\w-]+) = [\w.]+:\w+'",
                              ''.join(p.read_text() for p in ROOT.glob('src/*/setup.py'))))
    named = {word for words in re.findall(r'`deqmpc ([a-z][\w-]*(?:\\?\|[\w-]+)*)', TEXT[page])
             for word in re.split(r'\\?\|', words)}
    assert named <= commands


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_every_launch_argument_exists(page):
    lines = [line for line in TEXT[page].splitlines() if 'deqmpc' in line]
    named = {name for line in lines for name in re.findall(r'\b([a-z_]+):=', line)} - {'name'}
    assert named <= set(read_table()['arguments'])


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_every_service_that_is_called_exists(page):
    named = set(re.findall(r'ros2 service call /cf\d/(\w+)', TEXT[page]))
    assert named <= set(interface.SERVICES)


@pytest.mark.parametrize(('field', 'value', 'phrase'), [
    ('plan_hold', 0.4, 'hold at 0.4 s, lands 2 s later'), ('hold_land', 2.0, 'hold at 0.4 s, lands 2 s later'),
    ('pose_hold', 0.2, 'nothing below 0.2 s; hold at 0.2 s'), ('pose_land', 0.5, 'blind landing at 0.5 s'),
    ('pose_cut', 1.5, 'cut at 1.5 s'), ('fence_horizon', 0.3, 'outside the fence in 0.3 s'),
    ('fence_margin', 0.5, 'cut at 0.5 m outside'), ('battery_land', 3.7, 'below 3.7 V (with 0.4 V added for the load)'),
    ('battery_sag', 0.4, 'with 0.4 V added'), ('battery_time', 3.0, 'for 3 s'), ('battery_critical', 3.2, '3.2 V'),
    ('battery_critical_time', 0.5, 'measured for 0.5 s'), ('telemetry_land', 1.0, 'land at 1 s'),
    ('arm_timeout', 2.0, 'did not confirm within 2 s'), ('preflight_rate_min', 80.0, 'outside 80 to 125 Hz'),
    ('preflight_rate_max', 125.0, 'outside 80 to 125 Hz'), ('preflight_latency', 0.03, 'median latency above 30 ms'),
    ('recorder_answer', 'land', 'land (`recorder_answer`)'),
    ('firmware_watchdog', False, 'unless `firmware_watchdog`')])
def test_the_handbook_gives_the_limits_that_the_guard_has(field, value, phrase):
    assert getattr(Flight(), field) == value
    assert phrase in TEXT[ROOT / 'docs' / 'operators_handbook.md']


@pytest.mark.parametrize('name', ['mocap_rate', 'level', 'estimate_yaw', 'mocap_clock', 'disk', 'policy_latency'])
def test_the_checks_that_the_pages_name_exist(name):
    assert name in interface.PREFLIGHT_CHECKS
    assert any(f'`{name}`' in TEXT[ROOT / 'docs' / page] for page in ('operators_handbook.md', 'security.md'))
