"""package.xml of every package against its sources, so that rosdep and colcon know what the package needs."""

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from deqmpc import interface

SOURCES = Path(__file__).resolve().parents[2]
PACKAGES = sorted(p.parent.name for p in SOURCES.glob('*/package.xml'))
# Modules whose rosdep key (rosdep/python.yaml of ros/rosdistro) is not their own name.
KEYS = {'numpy': 'python3-numpy', 'yaml': 'python3-yaml', 'matplotlib': 'python3-matplotlib',
        'mpl_toolkits': 'python3-matplotlib', 'sympy': 'python3-sympy', 'tqdm': 'python3-tqdm', 'usb': 'python3-usb'}
# Modules without a usable key: the package's own setup.py, or that of a package it depends on, names them.
PIP = {'torch', 'safetensors', 'cflib', 'natnet', 'rosbags', 'mcap', 'lz4', 'plotly', 'pyarrow'}
# Imported only where the user has them and asks for them.
OPTIONAL = {'crazyflie_interfaces', 'distributed', 'rerun', 'rerun_cli'}
# `deqmpc view` asks the composition for the network's environment where that is installed; deqmpc_bringup depends on
# flight_log, so flight_log cannot depend on it.
WHERE_INSTALLED = {'flight_log': {'deqmpc_bringup'}}


def manifest(package):
    return ElementTree.parse(SOURCES / package / 'package.xml').getroot()


def dependencies(package, *kinds):
    return {e.text for e in manifest(package) if e.tag in kinds}


def setup(package):
    """The literal arguments of the package's setup()."""
    call = next(n for n in ast.walk(ast.parse((SOURCES / package / 'setup.py').read_text()))
                if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'setup')
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords
            if isinstance(k.value, (ast.Constant, ast.List, ast.Dict)) and k.arg not in ('data_files', 'package_data')}


def needs(package):
    """Modules that the package imports, and the packages of the message types that it names."""
    found = set()
    for path in (SOURCES / package / package).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split('.')[0])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'interface':
                found |= message_packages(getattr(interface, node.attr, None))
            elif isinstance(node, ast.Constant) and package != 'deqmpc' and (  # which names types, and makes none
                    name := re.fullmatch(r'(\w+)/(msg|srv)/\w+', str(node.value))):
                found.add(name[1])
    return found - set(sys.stdlib_module_names) - {package, '__future__'}


def message_packages(constant):
    if constant is interface.SERVICES:
        return {name.split('/')[0] for name in constant.values()}
    topics = constant if isinstance(constant, tuple) else (constant,)
    return {t.type.split('/')[0] for t in topics if isinstance(t, interface.Topic)}


@pytest.mark.parametrize('package', PACKAGES)
def test_a_package_declares_all_that_it_imports_and_no_more(package):
    declared = dependencies(package, 'depend', 'exec_depend')
    needed = {KEYS.get(m, m) for m in needs(package) - PIP - OPTIONAL - WHERE_INSTALLED.get(package, set())}
    assert needed - declared == set()
    started = set(PACKAGES) | {'ros2launch'} if package == 'deqmpc_bringup' else set()
    assert declared - needed - started == set()


@pytest.mark.parametrize('package', PACKAGES)
def test_what_rosdep_cannot_install_is_named_for_pip(package):
    own = [package, *(dependencies(package, 'exec_depend') & set(PACKAGES))]
    asked = [r for p in own for r in (*setup(p)['install_requires'], *sum(setup(p)['extras_require'].values(), []))]
    assert needs(package) & PIP <= {re.match(r'[\w-]+', r)[0] for r in asked}


@pytest.mark.parametrize('package', PACKAGES)
def test_package_xml_setup_py_and_licence_agree(package):
    root, own = manifest(package), setup(package)
    assert root.get('format') == '3'
    assert root.find('export/build_type').text == 'ament_python'
    assert root.find('name').text == package and root.find('version').text == own['version']
    assert root.find('description').text == own['description']
    gpl = package == 'crazyflie_interface'  # cflib is
    assert root.find('license').text == own['license'] == ('GPL-3.0-or-later' if gpl else 'Apache-2.0')
    for path in (SOURCES / package / package).rglob('*.py'):
        assert path.read_text().startswith('# SPDX-License-Identifier: GPL-3.0-or-later\n') == gpl, path


@pytest.mark.parametrize('package', PACKAGES)
def test_the_manifest_is_valid_for_ros_tools(package):
    catkin_pkg = pytest.importorskip('catkin_pkg.package', reason='catkin_pkg is not installed (it comes with colcon)')
    warnings = []
    parsed = catkin_pkg.parse_package(str(SOURCES / package), warnings=warnings)
    parsed.validate(warnings=warnings)
    assert not warnings
