"""Policies to train and to test, each done once: results stay beside the policy.

  Run   a policy to train      -> FOLDER/TASK-VARIANT-hHIDDEN-sSEED-DIGEST/model, metrics.csv (deqmpc.training.train)
  Test  a way to test it       -> .../test-DIGEST.json
  Cell  a run under a test, at the value x of what an experiment varies

Digests are of all settings and of the demonstrations: equal runs of several experiments are trained once, and an
experiment that was stopped goes on where it was. Seed s gives weights, batches and the split of the demonstrations
(the paper's mean is over three splits). Rollouts start where the demonstrations of the validation split do, and
returns are divided by those demonstrations' mean (deqmpc.evaluation).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from deqmpc import datasets, evaluation, tasks, whole_file
from deqmpc.datasets import Demonstrations
from deqmpc.planners import ModelPlanner, load_model
from deqmpc.policies.deq_mpc import DeqMpc, distance
from deqmpc.policies.deq_mpc import Settings as Method
from deqmpc.provenance import commit, sha256
from deqmpc.tasks import Task
from deqmpc.training import train
from deqmpc.training.imitation import VARIANTS, Settings, Streaming, Trainer

Numbers = tuple[tuple[str, float], ...]  # names and values
_PAPER_HIDDEN = {'pendulum': 256, 'cartpole': 512, 'quadrotor': 512, 'crazyflie_obs': 512, 'crazyflie_dynobs': 512}


@dataclass(frozen=True)
class Budget:
    """How much an experiment may cost."""

    name: str
    hidden: int  # channels of the networks; 0: the paper's for the task
    training: Settings
    seeds: int  # runs of everything
    rollouts: int  # of a test
    windows: int  # of the validation error
    steps: int = 0  # of a rollout; 0: the task's
    variants: tuple[str, ...] = ()  # only these of an experiment's; empty: all

    def hidden_of(self, task: str) -> int:
        """Channels for a task."""
        return self.hidden or _PAPER_HIDDEN.get(task, 1024)


BUDGETS = {b.name: b for b in (
    Budget('smoke', 16, Settings(steps=5, batch=4), seeds=1, rollouts=2, windows=8, steps=3,
           variants=('deq_mpc_nn', 'diff_mpc_nn')),
    Budget('small', 64, Settings(steps=1000, batch=32), seeds=3, rollouts=50, windows=500),
    Budget('medium', 128, Settings(steps=5000, batch=64), seeds=3, rollouts=200, windows=500),
    Budget('full', 0, Settings(decay=1.0), seeds=3, rollouts=200, windows=1000))}


@dataclass(frozen=True)
class Run:
    """A policy to train."""

    task: str
    variant: str  # of deqmpc.training.imitation.VARIANTS
    hidden: int
    training: Settings
    trajectories: int = 0  # demonstrations to train on; 0: all of the split
    changes: Numbers = ()  # of the task
    method: Numbers = ()  # of deqmpc.policies.deq_mpc.Settings

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f'variant {self.variant!r}; expected one of {", ".join(VARIANTS)}')

    def plain(self) -> Run:
        """Without changes to what is the default anyway, so that equal runs are equal."""
        def differing(numbers, default):
            return tuple((name, value) for name, value in numbers if getattr(default, name, None) != value)
        return replace(self, changes=differing(self.changes, tasks.make(self.task)),
                       method=differing(self.method, Method()))

    def folder(self, demonstrations: Path) -> str:
        """Name of its folder."""
        known = _digest([asdict(self), _sha256_once(demonstrations)])
        return f'{self.task}-{self.variant}-h{self.hidden}-s{self.training.seed}-{known}'

    def command(self, demonstrations: Path, out: Path) -> list[str]:
        """Arguments of `deqmpc train`."""
        s = self.training
        words = {f.name: getattr(s, f.name) for f in fields(s) if f.name != 'network_share'} | {
            'policy': self.variant, 'hidden': self.hidden, 'trajectories': self.trajectories,
            'demonstrations': demonstrations, 'out': out, 'log_every': max(s.steps // 100, 1)}
        given = [self.task, *itertools.chain(*((f'--{k.replace("_", "-")}', str(v)) for k, v in words.items()))]
        for option, numbers in (('--change', self.changes), ('--method', self.method)):
            given += itertools.chain(*((option, f'{name}={value}') for name, value in numbers))
        return given


@dataclass(frozen=True)
class Test:
    """A way to test a policy: its validation error, and rollouts."""

    __test__ = False  # for pytest: not one of its classes

    rollouts: int
    windows: int
    steps: int = 0  # of a rollout; 0: the task's
    changes: Numbers = ()  # of the task, after the run's
    method: Numbers = ()  # of the trained policy's method, where it has one
    finish: bool = True  # solve on plans that have not converged, as in flight

    @property
    def file(self) -> str:
        """Name of its result."""
        return f'test-{_digest(asdict(self))}.json'


@dataclass(frozen=True)
class Cell:
    """A run under a test."""

    run: Run
    test: Test
    x: Any = ''  # what the experiment varies


@dataclass(frozen=True)
class Plan:
    """An experiment's budget, and what of it was asked for."""

    budget: Budget
    seeds: int
    tasks: tuple[str, ...] = ()  # empty: the experiment's own
    variants: tuple[str, ...] = ()  # empty: the experiment's own
    processes: int = 1  # at once

    def cells(self, tasks: Iterable[str], variants: Iterable[str], values: Iterable[Any] = ('',),
              run: Callable[[Any, str], dict] = lambda x, variant: {},
              test: Callable[[Any, str], dict] = lambda x, variant: {}) -> list[Cell]:
        """A cell for every task, variant, value and seed; `run` and `test` say what a value changes. ValueError for an
        unknown task."""
        b, made = self.budget, []
        variants = self.variants or [v for v in variants if not b.variants or v in b.variants]
        for task, variant, x, seed in itertools.product(self.tasks or tasks, variants, values, range(self.seeds)):
            base = Run(task, variant, b.hidden_of(task), replace(b.training, seed=seed, split_seed=seed))
            made.append(Cell(replace(base, **run(x, variant)).plain(),
                             replace(Test(b.rollouts, b.windows, b.steps), **test(x, variant)), x))
        return made


def demonstrations_of(task: str, folder: Path | None = None) -> Path:
    """The task's demonstrations: in `folder`, or among the released ones, or in runs/experts. FileNotFoundError says
    how to make them."""
    released = Path(os.environ.get('DEQMPC_DATA', '../shared/data')) / 'experts'
    places = [folder] if folder else [released, Path('runs/experts')]
    for place in places:
        if (place / f'{task}.npz').exists():
            return place / f'{task}.npz'
    raise FileNotFoundError(f'no demonstrations {task}.npz in {" or ".join(map(str, places))}; make them with '
                            f'`deqmpc experts {task}`, or name other tasks with --tasks')


def execute(cells: list[Cell], store: Path, processes: int = 1, demonstrations: Path | None = None,
            device: str = 'auto') -> list[dict[str, Any]]:
    """Do what is not done yet; a row of numbers for every cell. FileNotFoundError where demonstrations are missing;
    ValueError, once all others are done, where runs failed."""
    paths = {task: demonstrations_of(task, demonstrations) for task in dict.fromkeys(c.run.task for c in cells)}
    jobs: dict[Run, list[Test]] = {}
    for cell in cells:
        folder = store / cell.run.folder(paths[cell.run.task])
        if not (folder / cell.test.file).exists():
            jobs.setdefault(cell.run, []).append(cell.test)
    given = [(run, tuple(dict.fromkeys(jobs[run])), paths[run.task], store, device) for run in jobs]
    runs = len(dict.fromkeys(c.run for c in cells))
    with tqdm(total=runs, initial=runs - len(given), unit='policy', disable=None) as bar:
        for _ in _performed(given, processes):
            bar.update()
    return [_row(cell, store / cell.run.folder(paths[cell.run.task])) for cell in cells]


def _performed(jobs, processes):
    if processes == 1 or len(jobs) < 2:
        yield from itertools.starmap(perform, jobs)
        return
    failures = []
    # spawn: torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context('spawn')) as pool:
        waiting = {pool.submit(perform, *job): job[3] / job[0].folder(job[2]) for job in jobs}
        for done in concurrent.futures.as_completed(waiting):
            if error := done.exception():
                failures.append(f'{waiting[done]}: {error}')
            yield
    if failures:
        raise ValueError(f'{len(failures)} of {len(jobs)} runs failed, the first: {failures[0]}')


def perform(run: Run, tests: tuple[Test, ...], demonstrations: Path, store: Path, device: str = 'auto') -> None:
    """Train, or go on training, and write the tests' results. What is said on the way goes to log.txt."""
    torch.set_num_threads(1)
    folder = store / run.folder(demonstrations)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if not (folder / 'model/settings.yaml').exists():
            command = [*run.command(demonstrations, folder), '--windows', str(tests[0].windows)]
            train.run(train.parser().parse_args(command), command, _device(device))
        data = datasets.load(demonstrations)
        for test in tests:
            result = json.dumps(_plain(measure(folder / 'model', run, test, data)), indent=1)
            whole_file.write_text(folder / test.file, result)


def measure(model: Path, run: Run, test: Test, data: Demonstrations) -> dict[str, Any]:
    """What a test finds: deqmpc.evaluation's scores, the errors, and where they come from."""
    task = tasks.make(run.task, **dict(run.changes + test.changes))
    learned = load_model(model, task)
    if isinstance(learned, DeqMpc):
        learned.settings = replace(learned.settings, **dict(test.method))
    seed = run.training.split_seed
    chosen = evaluation.episodes_of(data, seed)[:test.rollouts]
    x, spheres = data.starts(chosen)
    radii = torch.where(spheres.radii > 0, torch.full_like(spheres.radii, task.radius), 0.0)
    spheres = replace(spheres, radii=radii) if task.spheres else None
    expert = float(evaluation.expert_returns(task, data)[chosen].mean())
    found = evaluation.evaluate(task, ModelPlanner(task, learned, finish=test.finish), x, spheres, expert,
                                steps=test.steps or None)
    return {**asdict(found), **evaluation.validation_error(learned, task, data, seed, windows=test.windows),
            'by_iterate': errors_by_iterate(learned, task, data, run.training, test.windows),
            'run': asdict(run), 'test': asdict(test), 'commit': commit()}


def errors_by_iterate(model: nn.Module, task: Task, data: Demonstrations, settings: Settings,
                      windows: int) -> list[float]:
    """The cold validation error after every iterate i: mean of sum |x^i - x_expert| over finite plans."""
    trainer = Trainer(task, model, data, replace(settings, streaming=0))
    draws = trainer.draw(trainer.valid, windows, torch.Generator().manual_seed(0))
    with torch.no_grad():
        made, target, _ = next(iter(Streaming(model, task, trainer.windows(*draws), 0)))
    errors = [distance(x, target) for x in made.x]
    return [float(e[torch.isfinite(e)].mean()) for e in errors]


def _row(cell: Cell, folder: Path) -> dict[str, Any]:
    found = json.loads((folder / cell.test.file).read_text())
    numbers = {k: math.nan if v is None else v for k, v in found.items() if k not in ('run', 'test')}
    return {'task': cell.run.task, 'variant': cell.run.variant, 'x': cell.x, 'seed': cell.run.training.seed,
            'hidden': cell.run.hidden, 'error': numbers['cold'], 'return': numbers['normalised'], **numbers,
            'folder': str(folder)}


def _plain(value):
    """`value` as JSON has it: null for what is not finite."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device(name: str) -> str:
    return ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


_sha256_once = cache(sha256)
