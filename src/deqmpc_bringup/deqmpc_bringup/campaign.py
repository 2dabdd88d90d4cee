"""`deqmpc trial FILE.yaml`: a campaign, every policy from the same starts, in shuffled order, resumable.

  policies     names in config/policies
  seeds        of spheres, start and noise (as in --seeds)
  starts       start poses 'x y z yaw' (m, rad) instead of drawn ones; each is flown with every seed
  mode         sim (default) or hardware
  in_process   sim only: the in-process twin, faster than real time (default true)
  shuffle      seed of the order (default 0), so that a battery or a warm room favours no policy
  pause_every  trials after which to wait for Enter: a fresh battery (default 0: never)
  arguments    launch arguments of every trial

FOLDER (--out, default runs/campaigns/FILE) gets
  manifest.json            the campaign, commit, versions, SHA-256 of policy files and weights, and every trial's state
  POLICY/START/            bag, arguments, log, outcome.json of a trial
  trials.csv  comparison.md  comparison.tex  report.html
The same command goes on with an interrupted campaign; trials that ended are not flown again. A folder that belongs to
another campaign is refused.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deqmpc import whole_file, yaml_file
from deqmpc.policies import model
from deqmpc.provenance import commit, sha256
from deqmpc_bringup.composition import CompositionError, compose, parse_assignments, share_dir
from deqmpc_bringup.fly import fly
from deqmpc_bringup.trial import OUTCOME, flown, fly_all, parse_seeds, processes
from flight_log.evaluate import main as evaluate

PACKAGES = ('deqmpc', 'numpy', 'torch', 'cflib', 'rosbags', 'mcap')


@dataclass(frozen=True)
class Campaign:
    """What a campaign's file says."""

    policies: tuple[str, ...]
    seeds: str
    starts: tuple[str, ...] = ()
    mode: str = 'sim'
    in_process: bool = True
    shuffle: int = 0
    pause_every: int = 0
    arguments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Trial:
    """One trial of it."""

    policy: str
    seed: int
    start: str  # '' : drawn from the seed

    def name(self, campaign: Campaign) -> str:
        """POLICY/START."""
        at = f'start_{campaign.starts.index(self.start)}_' if self.start else ''
        return f'{self.policy}/{at}seed_{self.seed:03d}'


def read(path: Path) -> Campaign:
    """A campaign's file. CompositionError names the entry that is wrong."""
    try:
        data = yaml_file.load(path)
    except (OSError, ValueError) as error:
        raise CompositionError(f'campaign {path}: {error}') from error
    names = {f.name for f in dataclasses.fields(Campaign)}
    if not isinstance(data, dict) or not {'policies', 'seeds'} <= set(data) <= names:
        raise CompositionError(f'campaign {path}: expected policies, seeds and perhaps {", ".join(sorted(names))}; got '
                               f'{sorted(data) if isinstance(data, dict) else type(data).__name__}')
    for name, kind in (('policies', list), ('starts', list), ('mode', str), ('in_process', bool), ('shuffle', int),
                       ('pause_every', int), ('arguments', dict)):
        if name in data and (not isinstance(data[name], kind) or (kind is int and isinstance(data[name], bool))):
            raise CompositionError(f'campaign {path}: {name} = {data[name]!r}; expected a {kind.__name__}')
    for name in ('policies', 'starts'):
        entries = data.get(name, [])
        if not all(isinstance(e, str) for e in entries) or len(set(entries)) < len(entries):
            raise CompositionError(f'campaign {path}: {name} = {entries}; expected different texts')
    given = data.get('arguments', {})
    taken = {'policy', 'policy_file', 'seed', 'start', 'run_dir', 'trial', 'record'} & set(given)
    if taken or not data['policies']:
        raise CompositionError(f'campaign {path}: arguments {sorted(taken)} are set by the campaign' if taken else
                               f'campaign {path}: policies is empty')
    arguments = tuple((k, str(v).replace('$(share)', str(share_dir()))) for k, v in given.items())
    return Campaign(**{**data, 'policies': tuple(data['policies']), 'seeds': str(data['seeds']),
                       'starts': tuple(data.get('starts', ())), 'arguments': arguments})


def trials(campaign: Campaign) -> list[Trial]:
    """All trials in the order in which they are flown."""
    made = [Trial(policy, seed, start) for seed, start, policy in itertools.product(
        parse_seeds(campaign.seeds), campaign.starts or ('',), campaign.policies)]
    random.Random(campaign.shuffle).shuffle(made)
    return made


def given_of(trial: Trial, campaign: Campaign, folder: Path) -> dict[str, str]:
    """Launch arguments of a trial."""
    return {**dict(campaign.arguments), 'policy': trial.policy, 'seed': str(trial.seed), 'trial': 'true',
            'record': 'true', **({'start': trial.start} if trial.start else {}),
            'run_dir': str(folder / trial.name(campaign))}


def provenance(campaign: Campaign) -> dict[str, Any]:
    """What flew: code, versions, policies."""
    def version(name):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return None
    policies = {}
    for name in campaign.policies:
        file = share_dir() / 'config' / 'policies' / f'{name}.yaml'
        if not file.is_file():
            raise CompositionError(f'policy {name!r}: no {file}; expected one of '
                                   f'{", ".join(sorted(p.stem for p in file.parent.glob("*.yaml")))}')
        policies[name] = {'file_sha256': sha256(file)}
        folder = (yaml_file.load(file) or {}).get('model')
        if folder:
            policies[name]['weights_sha256'] = sha256(file.parent / folder / model.WEIGHTS)
    return {'commit': commit(), 'python': platform.python_version(), 'platform': platform.machine(),
            'versions': {name: version(name) for name in PACKAGES}, 'policies': policies}


class Manifest:
    """manifest.json: the campaign, and how far it is."""

    def __init__(self, folder: Path, campaign: Campaign):
        self.path = folder / 'manifest.json'
        asked = json.loads(json.dumps(dataclasses.asdict(campaign)))  # tuples as JSON has them
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data['campaign'] != asked:
                differs = sorted(k for k in asked if asked[k] != self.data['campaign'].get(k))
                raise CompositionError(f'{folder} holds another campaign: {", ".join(differs)} differ; choose another '
                                       f'--out, or remove it')
        else:
            self.data = {'campaign': asked, 'sessions': [], 'trials': {}}
        self.data['sessions'].append(provenance(campaign))
        self.save()

    @property
    def session(self) -> int:
        """Number of this one."""
        return len(self.data['sessions']) - 1

    def begin(self, names: Iterable[str]) -> None:
        """The trials that are left to this session."""
        self.data['trials'].update({name: {'state': 'open', 'reason': '', 'session': self.session} for name in names})
        self.save()

    def note(self, name: str, reason: str) -> None:
        """How a trial ended: '' well."""
        self._note(name, reason, self.session)

    def note_found(self, name: str, reason: str) -> None:
        """How a trial ended that was found flown: it may have ended after the session that began it was stopped."""
        begun = self.data['trials'].get(name)
        if begun and begun['state'] == 'open':
            self._note(name, reason, begun['session'])

    def _note(self, name, reason, session):
        self.data['trials'][name] = {'state': 'ended early' if reason else 'done', 'reason': reason, 'session': session}
        self.save()

    def save(self) -> None:
        """Write it, never half."""
        whole_file.write_text(self.path, json.dumps(self.data, indent=1) + '\n')


@contextlib.contextmanager
def engine(jobs: int, scheduler: str) -> Iterator[concurrent.futures.Executor]:
    """Where trials are flown: `jobs` processes here, or the workers of a Dask cluster at the address `scheduler`, which
    must see the campaign's folder under the same path. CompositionError where Dask is not installed or not there."""
    if not scheduler:
        with processes(jobs) as pool:
            yield pool
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise CompositionError("--dask needs Dask: pip install 'deqmpc-bringup[dask]'") from error
    try:
        client = Client(scheduler, timeout=10)
    except OSError as error:
        raise CompositionError(f'--dask {scheduler}: no scheduler answers: {error}') from error
    with client:
        yield client.get_executor(pure=False)


def fly_in_turn(todo: list[tuple[str, dict[str, str]]], campaign: Campaign, limit: float,
                done: Callable[[str, str], None], ask: Callable[[str], str] = input) -> None:
    """Fly in real time, one after the other; stops where the operator did."""
    for n, (name, given) in enumerate(todo):
        if campaign.pause_every and n and n % campaign.pause_every == 0:
            ask(f'{n} of {len(todo)} trials flown. Fresh battery, drone on the floor; Enter to go on, Ctrl-C to stop: ')
        print(f'== {name}, {n + 1} of {len(todo)}', file=sys.stderr)
        status, _ = fly(campaign.mode, dict(given), limit, sys.stderr)
        if status in (2, 130):
            raise KeyboardInterrupt
        reason = '' if status == 0 else f'exit status {status}'
        (Path(given['run_dir']) / OUTCOME).write_text(json.dumps({'reason': reason}) + '\n')
        done(name, reason)


def main(argv: list[str]) -> int:
    """Fly a campaign: policies x starts, shuffled, resumable; evaluate and compare."""
    parser = argparse.ArgumentParser(prog='deqmpc trial FILE.yaml', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='campaign, e.g. config/trials/table1.yaml')
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='more launch arguments of every trial')
    parser.add_argument('--out', type=Path, metavar='FOLDER')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trials at once, in process')
    parser.add_argument('--dask', default='', metavar='ADDRESS', help='scheduler of a Dask cluster to fly on')
    parser.add_argument('--time-limit', type=float, default=180.0, metavar='S', help='of a trial in real time')
    options = parser.parse_intermixed_args(argv)
    try:
        campaign = read(options.file)
        more = parse_assignments(options.arguments)
        campaign = dataclasses.replace(campaign, arguments=tuple({**dict(campaign.arguments), **more}.items()))
        folder = (options.out or Path('runs/campaigns') / options.file.stem).resolve()
        todo = [(t.name(campaign), given_of(t, campaign, folder)) for t in trials(campaign)]
        for given in {(g['policy'], g.get('start')): g for _, g in todo}.values():
            compose(campaign.mode, given)  # says now what is wrong
        folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(folder, campaign)
        ended = {name: flown(given) for name, given in todo}
        left = [(name, given) for name, given in todo if ended[name] is None]
        for name, reason in ended.items():
            if reason is not None:
                manifest.note_found(name, reason)
        for _, given in left:
            Path(given['run_dir']).mkdir(parents=True)
        manifest.begin(name for name, _ in left)
        print(f'{len(left)} of {len(todo)} trials to fly, in {folder}', file=sys.stderr)
        if left and campaign.mode == 'sim' and campaign.in_process:
            with engine(max(1, options.jobs), options.dask) as pool:
                for name, reason in fly_all(left, pool):
                    manifest.note(name, reason)
        elif left:
            fly_in_turn(left, campaign, options.time_limit, manifest.note)
    except KeyboardInterrupt:
        print('stopped; the same command goes on', file=sys.stderr)
        return 130
    except (CompositionError, ValueError, OSError) as error:
        print(f'deqmpc trial: {error}', file=sys.stderr)
        return 2
    bags = [str(folder / name / 'bag') for name, _ in sorted(todo) if (folder / name / 'bag').exists()]
    status = evaluate([*bags, '--jobs', str(max(1, options.jobs)), '--table', str(folder / 'trials.csv'), '--markdown',
                       str(folder / 'comparison.md'), '--latex', str(folder / 'comparison.tex'), '--html',
                       str(folder / 'report.html')]) if bags else 1
    early = {name: t['reason'] for name, t in manifest.data['trials'].items() if t['state'] != 'done'}
    for name, reason in early.items():
        print(f'{name}: {reason or "did not end"}', file=sys.stderr)
    return status or int(bool(early) or len(bags) < len(todo))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
