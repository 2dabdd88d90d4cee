"""What docs/security.md promises of the source: nothing that is read from outside can run as code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ('src', 'launch', 'benchmarks', 'experiments')

# Modules whose loaders run what they read.
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'jsonpickle', 'pty', 'commands'}
# Calls by their dotted name; yaml.load takes a loader that makes Python objects.
CALLS = {'eval', 'exec', '__import__', 'os.system', 'os.popen', 'os.spawnl', 'os.execl', 'yaml.load', 'yaml.load_all',
         'yaml.unsafe_load', 'yaml.full_load', 'torch.load', 'torch.hub.load', 'subprocess.getoutput',
         'subprocess.getstatusoutput'}
# (file, call) -> why it is safe.
ALLOWED = {
    ('src/deqmpc/deqmpc/dynamics/equations.py', 'exec'):
        'Python made from the equations in this repository, never from a file that is read',
}


def sources():
    """Every Python file of the stack, its tests left out."""
    return [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob('*.py'))
            if 'test' not in p.relative_to(ROOT).parts]


def dotted(node):
    """'os.system' of the expression os.system, '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f'{base}.{node.attr}' if base else ''
    return ''


def findings(text, name):
    """(line, what) of everything forbidden in the source `text` of the file `name`."""
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or '']
            for module in {n.split('.')[0] for n in names} & MODULES:
                yield node.lineno, f'import {module}'
            if isinstance(node, ast.ImportFrom) and node.module:  # from yaml import load
                for alias in node.names:
                    if f'{node.module}.{alias.name}' in CALLS:
                        yield node.lineno, f'{node.module}.{alias.name}'
        elif isinstance(node, ast.Call):
            call = dotted(node.func)
            if call in CALLS and (name, call) not in ALLOWED:
                yield node.lineno, call
            for keyword in node.keywords:
                constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else 'not a constant'
                if keyword.arg in ('shell', 'allow_pickle') and constant is not False:
                    yield node.lineno, f'{call}({keyword.arg}={constant})'


def test_no_source_file_unpickles_loads_unsafe_yaml_evaluates_text_or_starts_a_shell():
    paths = sources()
    assert len(paths) > 80
    found = [f'{p.relative_to(ROOT)}:{line}: {what}' for p in paths
             for line, what in findings(p.read_text(), str(p.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize('text', [
    'import pickle', 'from pickle import loads', 'import yaml\nyaml.load(text)', 'from yaml import load', 'eval("1")',
    'exec("x = 1")', 'import os\nos.system("ls")', 'subprocess.run("ls", shell=True)', 'run("ls", shell=flag)',
    'import torch\ntorch.load("w.pt")', 'np.load(path, allow_pickle=True)'])
def test_each_forbidden_construct_is_found(text):
    assert list(findings(text, 'example.py'))


@pytest.mark.parametrize('text', [
    'network.eval()', 'yaml.safe_load(text)', 'np.load(path, allow_pickle=False)', 'subprocess.run(["ls"])',
    'from safetensors.torch import load', 'x = {"shell": True}'])
def test_what_is_harmless_is_not_found(text):
    assert not list(findings(text, 'example.py'))


def test_what_is_allowed_is_still_there():
    for name, call in ALLOWED:
        assert any(isinstance(n, ast.Call) and dotted(n.func) == call
                   for n in ast.walk(ast.parse((ROOT / name).read_text())))
