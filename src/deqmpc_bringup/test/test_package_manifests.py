"""package.xml of every package against its sources, so that rosdep and colcon know what the package needs."""

import ast
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import pytest

from deqmpc import interface

SOURCES = Path(__file__).resolve().parents[2]
PACKAGES = sorted(p.parent.name for p in SOURCES.glob('*/package.xml'))
# Modules whose rosdep key (rosdep/python.yaml of ros/rosdistro) is not their own name.
KEYS = {'numpy': 'python3-numpy', 'yaml': 'python3-yaml', 'matplotlib': 'python3-matplotlib',
        'mpl_toolkits': 'python3-matplotlib', 'sympy': 'python3-sympy', 'tqdm': 'python3-tqdm'}
# Modules without a usable key: the package's own setup.py, or that of a package it depends on, names them.
PIP = {'torch', 'safetensors', 'cflib', 'natnet', 'rosbags', 'mcap', 'lz4'}
# Imported only where the user has them and asks for them.
OPTIONAL = {'crazyflie_interfaces'}


def manifest(package):
    return ElementTree.parse(SOURCES / package / 'package.xml').getroot()


def dependencies(package, *kinds):
    return {e.text for e in manifest(package) if e.tag in kinds}


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
    return found - set(sys.stdlib_module_names) - {package, '__future__'}


def message_packages(constant):
    if constant is interface.SERVICES:
        return {name.split('/')[0] for name in constant.values()}
    topics = constant if isinstance(constant, tuple) else (constant,)
    return {t.type.split('/')[0] for t in topics if isinstance(t, interface.Topic)}


@pytest.mark.parametrize('package', PACKAGES)
def test_a_package_declares_all_that_it_imports_and_no_more(package):
    declared = dependencies(package, 'depend', 'exec_depend')
    needed = {KEYS.get(m, m) for m in needs(package) - PIP - OPTIONAL}
    assert needed - declared == set()
    started = set(PACKAGES) | {'ros2launch'} if package == 'deqmpc_bringup' else set()
    assert declared - needed - started == set()


@pytest.mark.parametrize('package', PACKAGES)
def test_what_rosdep_cannot_install_is_named_for_pip(package):
    own = [package, *(dependencies(package, 'exec_depend') & set(PACKAGES))]
    named = {r.split(';')[0].split('>')[0].split('<')[0].split('=')[0].strip()
             for p in own for r in metadata.requires(p) or []}
    assert needs(package) & PIP <= named


@pytest.mark.parametrize('package', PACKAGES)
def test_package_xml_setup_py_and_licence_agree(package):
    root, installed = manifest(package), metadata.metadata(package)
    assert root.get('format') == '3'
    assert root.find('export/build_type').text == 'ament_python'
    assert root.find('name').text == package and root.find('version').text == installed['Version']
    assert root.find('description').text == installed['Summary']
    gpl = package == 'crazyflie_interface'  # cflib is
    assert root.find('license').text == installed['License'] == ('GPL-3.0-or-later' if gpl else 'Apache-2.0')
    for path in (SOURCES / package / package).rglob('*.py'):
        assert path.read_text().startswith('# SPDX-License-Identifier: GPL-3.0-or-later\n') == gpl, path


@pytest.mark.parametrize('package', PACKAGES)
def test_the_manifest_is_valid_for_ros_tools(package):
    catkin_pkg = pytest.importorskip('catkin_pkg.package', reason='catkin_pkg is not installed (it comes with colcon)')
    warnings = []
    parsed = catkin_pkg.parse_package(str(SOURCES / package), warnings=warnings)
    parsed.validate(warnings=warnings)
    assert not warnings
