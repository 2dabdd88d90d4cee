"""Campaigns: equal starts, shuffled order, resumption, manifest."""

import collections
import json
from pathlib import Path

import pytest

from deqmpc_bringup import campaign
from deqmpc_bringup.composition import CompositionError, compose, share_dir
from deqmpc_bringup.trial import main
from flight_log.bag import read_raw

FILES = sorted((share_dir() / 'config' / 'trials').glob('*.yaml'))


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_the_campaigns_that_come_with_the_stack_compose(path):
    c = campaign.read(path)
    made = campaign.trials(c)
    for trial in made:
        compose(c.mode, campaign.given_of(trial, c, Path('/nowhere')))
    assert set(campaign.provenance(c)['policies']) == set(c.policies)
    names = [t.name(c) for t in made]
    assert len(set(names)) == len(names)


def test_every_policy_gets_the_same_starts_in_an_order_that_favours_none():
    c = campaign.Campaign(('a', 'b', 'c'), '0:20', ('0 0 1 0', '1 0 1 0'))
    made = campaign.trials(c)
    starts = collections.defaultdict(set)
    for t in made:
        starts[t.policy].add((t.seed, t.start))
    assert len(made) == 120 and starts['a'] == starts['b'] == starts['c'] and len(starts['a']) == 40
    assert made == campaign.trials(c)
    place = {p: sum(i for i, t in enumerate(made) if t.policy == p) / 40 for p in 'abc'}
    assert all(abs(v - 59.5) < 15.0 for v in place.values())  # by policy in turn: 19.5, 59.5, 99.5


@pytest.mark.parametrize('text, said', [
    ('policies: [mpc_only]', 'expected policies, seeds'), ('[1, 2]', 'got list'),
    ('{policies: [mpc_only], seeds: "0", speed: 2}', 'speed'), ('{policies: mpc_only, seeds: "0"}', 'expected a list'),
    ('{policies: [mpc_only, mpc_only], seeds: "0"}', 'different texts'), ('{policies: [], seeds: "0"}', 'is empty'),
    ('{policies: [mpc_only], seeds: "0", arguments: {seed: 3}}', 'set by the campaign'),
    ('{policies: [mpc_only], seeds: "0", pause_every: true}', 'expected a int')])
def test_a_wrong_file_is_one_clear_error(text, said, tmp_path):
    with pytest.raises(CompositionError, match=said):
        campaign.read(write(tmp_path / 'c.yaml', text))


def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path, capsys):
    file = write(tmp_path / 'two.yaml', '{policies: [mpc_only, deq_mpc_nn], seeds: "3:5", arguments: {max_steps: 6}}')
    command = [str(file), '--out', str(tmp_path / 'out'), '--jobs', '1']
    main(command)
    assert '4 of 4 trials to fly' in capsys.readouterr().err
    manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
    assert set(manifest['trials']) == {f'{p}/seed_00{s}' for p in ('mpc_only', 'deq_mpc_nn') for s in (3, 4)}
    assert {t['state'] for t in manifest['trials'].values()} == {'done'}
    assert len(manifest['sessions'][0]['policies']['deq_mpc_nn']['weights_sha256']) == 64
    for name in ('trials.csv', 'comparison.md', 'comparison.tex', 'report.html'):
        assert (tmp_path / 'out' / name).stat().st_size > 0
    kept = (tmp_path / 'out/mpc_only/seed_003/bag/bag.mcap').stat().st_mtime_ns
    (tmp_path / 'out/mpc_only/seed_004/outcome.json').unlink()  # as if it had been cut off there
    manifest['trials']['deq_mpc_nn/seed_003']['state'] = 'open'  # as if a process had ended it after the stop
    (tmp_path / 'out/manifest.json').write_text(json.dumps(manifest))
    main(command)
    said = capsys.readouterr()
    assert '1 of 4 trials to fly' in said.err and 'first - second' in said.out and '\nmpc_only' in said.out
    assert (tmp_path / 'out/mpc_only/seed_003/bag/bag.mcap').stat().st_mtime_ns == kept
    manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
    assert manifest['trials']['mpc_only/seed_004'] == {'state': 'done', 'reason': '', 'session': 1}
    assert manifest['trials']['deq_mpc_nn/seed_003'] == {'state': 'done', 'reason': '', 'session': 0}
    assert main([*command, 'max_steps:=7']) == 2
    assert 'holds another campaign: arguments differ' in capsys.readouterr().err


def test_in_real_time_the_operator_is_asked_for_a_battery_and_may_stop(tmp_path, monkeypatch):
    c = campaign.Campaign(('mpc_only',), '0:5', mode='hardware', pause_every=2)
    todo = [(t.name(c), campaign.given_of(t, c, tmp_path)) for t in campaign.trials(c)]
    asked, done, status = [], {}, iter((0, 1, 0, 130))

    def fly(mode, given, limit, log):
        Path(given['run_dir']).mkdir(parents=True, exist_ok=True)
        return next(status), Path(given['run_dir'])
    monkeypatch.setattr(campaign, 'fly', fly)
    with pytest.raises(KeyboardInterrupt):
        campaign.fly_in_turn(todo, c, 60.0, done.__setitem__, asked.append)
    assert list(done.values()) == ['', 'exit status 1', ''] and len(asked) == 1
    assert json.loads((tmp_path / todo[1][0] / 'outcome.json').read_text()) == {'reason': 'exit status 1'}


def test_a_cluster_that_is_not_there_is_said(tmp_path):
    pytest.importorskip('distributed', reason='campaigns on several machines need Dask (the extra `dask`)')
    with pytest.raises(CompositionError, match='no scheduler answers'), campaign.engine(1, 'tcp://127.0.0.1:9'):
        raise AssertionError('there is no cluster')


def test_a_cluster_flies_the_same_trials_as_processes_here(tmp_path):
    distributed = pytest.importorskip(
        'distributed', reason='campaigns on several machines need Dask (the extra `dask`)')
    file = write(tmp_path / 'two.yaml', '{policies: [deq_mpc_nn], seeds: "3:5", arguments: {max_steps: 6}}')
    assert main([str(file), '--out', str(tmp_path / 'here'), '--jobs', '1']) == 0
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        assert main([str(file), '--out', str(tmp_path / 'there'), '--dask', cluster.scheduler_address]) == 0
    for seed in (3, 4):
        plans = [[(t, data) for _, _, t, data in read_raw(tmp_path / f'{place}/deq_mpc_nn/seed_00{seed}/bag',
                                                          ['/cf1/plan', '/cf1/pose', '/cf1/setpoint'])]
                 for place in ('here', 'there')]
        assert len(plans[0]) > 100 and plans[0] == plans[1]
