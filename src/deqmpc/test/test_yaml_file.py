"""YAML files: what is refused, and that it is refused with one kind of error that names the file."""

from pathlib import Path

import pytest
import yaml

from deqmpc import yaml_file

ROOT = Path(__file__).resolve().parents[3]
BOMB = 'a: &a [x, x]\n' + '\n'.join(f'{b}: &{b} [*{a}, *{a}]' for a, b in zip('abcdefghijkl', 'bcdefghijklm',
                                                                              strict=True))


@pytest.mark.parametrize('text', ['', 'a: 1', 'a: {b: [1, 2.5, x, null, true]}', '- 1\n- .inf', '2021-12-31',
                                  str(2**63 - 1)])
def test_a_plain_file_is_read_as_safe_load_reads_it(text, tmp_path):
    path = tmp_path / 'file.yaml'
    path.write_text(text)
    assert yaml_file.load(path) == yaml.safe_load(text)


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/**/*.yaml')) + sorted(ROOT.glob('models/*/*/settings.yaml')),
                         ids=str)
def test_every_settings_file_of_the_project_is_read_as_safe_load_reads_it(path):
    assert yaml_file.load(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(('text', 'what'), [
    (BOMB, 'alias'), ('a: 1\nb: 2\na: 3', "key 'a' is there twice"), ('[' * 1000 + ']' * 1000, 'nested deeper'),
    ('a: [', 'not YAML'), ('a: !!python/object/apply:os.system [ls]', 'not YAML'), ('2021-13-45', 'month'),
    ('!!int ""', 'not YAML'), ('!!bool maybe', 'not YAML'), ('!!timestamp x', 'not YAML'), ('{[1]: 2}', 'not YAML'),
    ('off: 1', 'key False is bool; expected a text'), ('a: {7: x}', 'key 7 is int'),
    ('1' * 5000, 'not YAML'), ('a: 1\n---\nb: 2', 'not YAML'), ('x: "' + 'y' * 1_000_000 + '"', 'at most'),
    ('\x00', 'not YAML'), (f'a: {2**63}', 'beyond 64 bits'), (f'- {-2**63 - 1}', 'beyond 64 bits')],
    ids=lambda value: repr(value[:30]))
def test_what_cannot_be_used_is_a_value_error_that_begins_with_the_files_name(text, what, tmp_path):
    path = tmp_path / 'file.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match='.*') as error:
        yaml_file.load(path)
    assert str(error.value).startswith(str(path)) and what in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_file_that_is_no_text_is_a_value_error(tmp_path):
    path = tmp_path / 'file.yaml'
    path.write_bytes(b'\xff\xfe\xfa')
    with pytest.raises(ValueError, match='not UTF-8'):
        yaml_file.load(path)
