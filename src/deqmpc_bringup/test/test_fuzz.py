"""A small form of `deqmpc fuzz`, and that the fuzzer finds what it is there to find."""

import json
import random

import pytest

from deqmpc_bringup import fuzz

SEED = 20


@pytest.mark.parametrize(('target', 'count'), [
    ('natnet_client', 2000), ('natnet_server', 400), ('crtp_peer', 1500), ('cflib_radio', 400)])
def test_mutated_packets_crash_no_reader_of_them(target, count):
    outcome = fuzz.PACKET_TARGETS[target][1](count, SEED)
    assert outcome.cases == count and outcome.passed, (outcome.shown, outcome.faults)


def test_mutated_settings_files_end_in_the_one_documented_error_of_their_reader():
    outcome = fuzz.fuzz_config(60, SEED)
    assert outcome.passed, (outcome.shown, outcome.faults)
    assert outcome.taken and outcome.refused  # neither mutates too little nor too much


def test_a_crash_is_counted_and_shown_with_its_input():
    def take(data):
        if len(data) < 3:
            raise IndexError('too short')
        return True
    outcome = fuzz.run_cases('reader', iter([b'abc', b'\x01\x02']), take, 2)
    assert (outcome.taken, outcome.crashes, outcome.passed) == (1, 1, False)
    assert 'IndexError: too short' in outcome.shown[0] and '0102' in outcome.shown[0]


def test_memory_and_time_beyond_their_bounds_are_faults(monkeypatch):
    monkeypatch.setattr(fuzz, 'TIME_LIMIT', -1.0)
    monkeypatch.setattr(fuzz, 'peak_memory', iter((100.0, 500.0)).__next__)
    outcome = fuzz.run_cases('reader', iter([b'']), lambda data: True, 1)
    assert ['CPU' in outcome.faults[0], '400 MB' in outcome.faults[1]] == [True, True]


def test_equal_seeds_give_equal_mutations_and_others_give_others():
    def some(seed):
        rng = random.Random(seed)
        return [fuzz.mutate(rng, bytes(range(40)), [b'other']) for _ in range(20)]
    assert some(1) == some(1) != some(2)
    text = 'a: [1, 2]\nb: {c: x}\n'
    assert [fuzz.mutate_text(random.Random(k), text) for k in range(9)] == [
        fuzz.mutate_text(random.Random(k), text) for k in range(9)]


def test_the_command_prints_json_and_its_exit_status_says_whether_all_passed(capsys, monkeypatch):
    assert fuzz.main(['--packets', '1000', '--configs', '0', '--only', 'natnet_server', '--json']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed['outcomes'][0]['target'] == 'natnet_server' and printed['outcomes'][0]['cases'] == 100
    monkeypatch.setattr(fuzz, 'fuzz', lambda *_: [fuzz.Outcome('x', cases=1, crashes=1)])
    assert fuzz.main([]) == 1
