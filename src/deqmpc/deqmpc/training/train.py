"""The command `deqmpc train`: a policy from demonstrations, with checkpoints, metrics and a model card.

  deqmpc train quadrotor --policy deq_mpc_deq --demonstrations ../shared/data/experts/quadrotor.npz --steps 2000
  torchrun --nproc-per-node 2 -m deqmpc.training.train quadrotor ...        on several GPUs

A run is a folder: metrics.csv (a line every `--log-every` steps), checkpoint.safetensors (every `--save-every`
seconds and at the end), model/ (deqmpc.policies.model) once it is done. The same command again continues where the
last one stopped. With torchrun every process takes its part of each batch and gradients are averaged.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from deqmpc import datasets, tasks
from deqmpc.networks.temporal import OUTPUTS
from deqmpc.policies import model as model_folder
from deqmpc.policies.deq_mpc import DeqMpc, Iterates
from deqmpc.provenance import commit, sha256
from deqmpc.training import checkpoint
from deqmpc.training.imitation import (
    VARIANTS,
    Report,
    Settings,
    Trainer,
    begin_with,
    build_model,
    fit_direct,
    parts,
    state_scale,
)

_COLUMNS = ('step', 'loss', 'cold', 'streamed', 'gradient_norm', 'learning_rate', 'valid_cold', 'valid_streamed',
            'left_out', 'skipped', *Iterates().counts(), 'cpu_s')


def main(argv: list[str] | None = None) -> int:
    """Train a policy by imitation of demonstrations."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    ranks = int(os.environ.get('WORLD_SIZE', '1'))
    try:
        with _processes(ranks, arguments.device) as device:
            run(arguments, sys.argv[1:] if argv is None else argv, device, ranks)
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc train: {error}', file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; `run` takes what it parses."""
    p = argparse.ArgumentParser(prog='deqmpc train', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=sorted(tasks.TASKS))
    p.add_argument('--policy', choices=sorted(VARIANTS), default='deq_mpc_deq')
    p.add_argument('--demonstrations', type=Path, help='default: runs/experts/TASK.npz')
    p.add_argument('--trajectories', type=int, default=0,
                   help='train on so many of them only (0: all but those that validate, which stay the same)')
    p.add_argument('--init', type=Path, metavar='MODEL',
                   help='begin with the weights of this model folder; of another kind or size with its direct part')
    p.add_argument('--hidden', type=int, default=128, help='channels of the network')
    p.add_argument('--output', choices=OUTPUTS, default='velocity',
                   help='velocities are predicted absolutely (velocity, default) or as changes (delta)')
    p.add_argument('--direct', type=int, default=0, metavar='WIDTH',
                   help='add a network of the present state alone (0: none), fitted to the expert first')
    p.add_argument('--sight', type=int, default=0, metavar='WIDTH',
                   help='of what that network sees of spheres (0: nothing)')
    p.add_argument('--fit', type=int, default=8000, metavar='STEPS', help='of that fit, default 8000')
    for field, kind in (('steps', int), ('batch', int), ('streaming', int), ('learning_rate', float),
                        ('decay', float), ('clip_norm', float), ('noise', float), ('own_states', float),
                        ('early', float), ('seed', int), ('split_seed', int)):
        default = getattr(Settings, field)
        p.add_argument(f'--{field.replace("_", "-")}', type=kind, default=default, help=f'default {default}')
    p.add_argument('--motion', action='store_true', help="predict the spheres' motion by a second network")
    p.add_argument('--method', metavar='NAME=VALUE', action='append', default=[],
                   help='a number of the method, e.g. iterations=3 (deqmpc.policies.deq_mpc.Settings)')
    p.add_argument('--change', metavar='NAME=VALUE', action='append', default=[],
                   help='a number of the task, e.g. horizon=8')
    p.add_argument('--out', type=Path, help='default: runs/train/TASK/POLICY-hHIDDEN-sSEED')
    p.add_argument('--restart', action='store_true', help='throw a checkpoint in --out away')
    p.add_argument('--smoke', action='store_true', help='20 steps of 16 windows with 32 channels')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1 ...')
    p.add_argument('--threads', type=int, default=1, help='of the CPU')
    p.add_argument('--bfloat16', action='store_true', help="products of the network's convolutions in bfloat16 (CPU)")
    p.add_argument('--log-every', type=int, default=50, help='steps')
    p.add_argument('--validate-every', type=int, default=500, help='steps')
    p.add_argument('--windows', type=int, default=500, help='of a validation')
    p.add_argument('--save-every', type=float, default=60.0, help='s')
    p.add_argument('--tensorboard', action='store_true', help='also write TensorBoard events (needs tensorboard)')
    return p


def run(arguments: argparse.Namespace, argv: list[str], device: str, ranks: int = 1) -> Path:
    """Train as the command line says; the model's folder. ValueError and FileNotFoundError say what is wrong."""
    a = arguments
    if a.smoke:
        a.steps, a.batch, a.hidden = 20, 16, 32
    if a.batch % ranks:
        raise ValueError(f'batch = {a.batch}; expected a multiple of the {ranks} processes')
    names = [f.name for f in dataclasses.fields(Settings) if f.name != 'network_share']
    settings = Settings(**{name: getattr(a, name) for name in names})
    task = tasks.make(a.task, **_numbers(a.change, '--change'))
    path = a.demonstrations or Path('runs/experts') / f'{a.task}.npz'
    demonstrations = datasets.load(path)
    digest = sha256(path)
    about = {'task': a.task, 'policy': a.policy, 'hidden': a.hidden,
             'trajectories': a.trajectories or len(demonstrations.lengths), 'demonstrations_sha256': digest,
             'method': a.method, 'motion': a.motion,
             'bfloat16': a.bfloat16,
             **({'change': a.change} if a.change else {}),
             **({'output': a.output} if a.output != 'velocity' else {}),
             **({'direct': a.direct, 'fit': a.fit} if a.direct else {}),
             **({'sight': a.sight} if a.sight else {}), **_origin(a.init),
             **dataclasses.asdict(settings)}
    torch.manual_seed(settings.seed)
    train, _ = parts(demonstrations, settings, a.trajectories)
    given = model_folder.load(a.init).network if a.init else None
    scale = given.settings.state_scale if given else state_scale(demonstrations, task, train)
    model = build_model(task, a.policy, a.hidden, scale, a.motion, a.output, a.direct,
                        a.sight, **_numbers(a.method, '--method'))
    if given:
        begin_with(model, given, str(a.init))
    model.network.bfloat16 = a.bfloat16
    trainer = Trainer(task, model, demonstrations, settings, device, a.trajectories)
    folder = a.out or Path('runs/train') / a.task / f'{a.policy}-h{a.hidden}-s{a.seed}'
    folder.mkdir(parents=True, exist_ok=True)
    if a.restart:
        if not _rank():
            (folder / checkpoint.NAME).unlink(missing_ok=True)
        if ranks > 1:
            dist.barrier()
    resumed = checkpoint.load(folder, trainer, about)
    if a.direct and a.fit and not resumed:
        if not _rank():
            print(f'direct part: error {fit_direct(trainer, a.fit):.4f} of the change within a window')
        if ranks > 1:
            for p in model.parameters():
                dist.broadcast(p.detach(), 0)
    found = _train(trainer, folder, about, a, ranks, resumed)
    if _rank():
        return folder / 'model'
    found = found or trainer.validate(a.windows)
    card = {**about, 'command': 'deqmpc train ' + shlex.join(_without_out(argv)), 'commit': commit(),
            'demonstrations': {'path': path.name, **{k: v for k, v in demonstrations.about.items() if k != 'failures'}},
            'validation': {'windows': a.windows, 'cold': round(found.cold, 4), 'streamed': round(found.streamed, 4)}}
    method = {} if not isinstance(model, DeqMpc) else dataclasses.asdict(model.settings)
    model_folder.save(folder / 'model', model_folder.Model(model.network, method, task.flight_problem, card,
                                                            model.motion))
    print(f'{folder / "model"}: validation error {found.cold:.3f} cold, {found.streamed:.3f} streamed')
    return folder / 'model'


def _train(trainer: Trainer, folder: Path, about: dict, a: argparse.Namespace, ranks: int,
           resumed: bool) -> Report | None:
    """All steps that are left; the validation after the last one, None where none was left."""
    batch, rank, last, start = trainer.settings.batch // ranks, _rank(), time.monotonic(), time.process_time()
    share, valid = slice(rank * batch, (rank + 1) * batch), None
    with _Metrics(folder, trainer.done if resumed else 0, a.tensorboard, rank == 0) as metrics:
        bar = tqdm(total=trainer.settings.steps, initial=trainer.done, desc=f'{a.task} {a.policy}',
                   disable=bool(rank) or None, mininterval=2.0)
        while trainer.done < trainer.settings.steps:
            report = trainer.step(share, _average if ranks > 1 else None)
            bar.update()
            at_end = trainer.done == trainer.settings.steps
            validates = not rank and (trainer.done % a.validate_every == 0 or at_end)
            valid = trainer.validate(a.windows) if validates else None
            if valid is not None or trainer.done % a.log_every == 0:
                metrics.write(trainer, report, valid, time.process_time() - start)
                bar.set_postfix(loss=f'{report.loss:.2f}', refresh=False)
            if not rank and (at_end or time.monotonic() - last > a.save_every):
                checkpoint.save(folder, trainer, about)
                last = time.monotonic()
        bar.close()
    return valid


class _Metrics:
    """metrics.csv, continued after the last line before `step`, and TensorBoard where it is asked for."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, active: bool):
        self.folder, self.step, self.active = folder, step, active
        self.board = None
        if tensorboard and active:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError('--tensorboard needs the package tensorboard: pip install tensorboard') from error
            self.board = SummaryWriter(folder)

    def __enter__(self):
        path, kept = self.folder / 'metrics.csv', []
        if not self.active:
            return self
        if self.step and path.exists():
            with path.open() as old:
                kept = [row for row in csv.DictReader(old) if int(row['step']) <= self.step]
        self.file = path.open('w', newline='')
        self.writer = csv.DictWriter(self.file, _COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(kept)
        return self

    def __exit__(self, *_):
        if self.active:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, trainer: Trainer, report: Report, valid: Report | None, cpu: float) -> None:
        """One line."""
        if not self.active:
            return
        row = {'step': trainer.done, 'loss': report.loss, 'cold': report.cold, 'streamed': report.streamed,
               'gradient_norm': report.gradient_norm, 'learning_rate': trainer.settings.rate(trainer.done - 1),
               'valid_cold': valid.cold if valid else '', 'valid_streamed': valid.streamed if valid else '',
               'left_out': report.left_out, 'skipped': report.skipped, 'cpu_s': round(cpu, 2), **report.counts}
        self.writer.writerow(row)
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if value != '':
                    self.board.add_scalar(name, value, trainer.done)


def _origin(folder: Path | None) -> dict[str, dict[str, str]]:
    """What a card says of the model that a training began with: its command, commit and weights."""
    if folder is None:
        return {}
    card = model_folder.load(folder).card
    return {'init': {**{k: card.get(k, '') for k in ('command', 'commit')},
                     'weights_sha256': sha256(folder / model_folder.WEIGHTS)}}


def _numbers(given: list[str], option: str) -> dict[str, float | int | bool]:
    """NAME=VALUE texts as a mapping."""
    made: dict[str, float | int | bool] = {}
    for text in given:
        name, _, value = text.partition('=')
        try:
            made[name] = {'true': True, 'false': False}[value] if value in ('true', 'false') else (
                int(value) if value.lstrip('-').isdigit() else float(value))
        except ValueError:
            raise ValueError(f'{option} {text!r}; expected NAME=NUMBER') from None
    return made


def _without_out(argv: list[str]) -> list[str]:
    """The words of a command but for `--out FOLDER`: where a model was made is nobody's business."""
    kept = [word for word in argv if not word.startswith('--out=')]
    return [word for before, word in zip(['', *kept], kept, strict=False) if '--out' not in (before, word)]


class _processes:
    """The process group where there are several processes; gives the device of this one."""

    def __init__(self, ranks: int, device: str):
        self.ranks = ranks
        cuda = torch.cuda.is_available()
        local = int(os.environ.get('LOCAL_RANK', '0'))
        self.device = (f'cuda:{local}' if cuda else 'cpu') if device == 'auto' else device
        if self.device.startswith('cuda') and not cuda:
            raise ValueError(f'--device {device}: torch finds no CUDA device here; expected cpu or auto')

    def __enter__(self) -> str:
        if self.ranks > 1:
            dist.init_process_group('nccl' if self.device.startswith('cuda') else 'gloo')
        return self.device

    def __exit__(self, *_):
        if self.ranks > 1:
            dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _average(parameters) -> None:
    """Mean of the gradients over all processes, in one message."""
    given = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in given])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(given, flat.split([p.numel() for p in given]), strict=True):
        p.grad.copy_(part.view_as(p))


if __name__ == '__main__':
    sys.exit(main())
