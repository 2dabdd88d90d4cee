"""Demonstrations that a policy can follow, in rounds: `deqmpc dagger TASK`.

  round 0     the expert flies with noise on its inputs; what it would do in every state joins the demonstrations
  round k     the direct part of a network (deqmpc.networks.temporal) is fitted to all of them; with the MPC behind it,
              it is the policy that flies with the expert in turns, and the expert's answers join

by deqmpc.training.aggregate and deqmpc.training.imitation.fit_direct: no gradient passes the solver, and a round takes
two minutes. A policy of any variant is then trained through the solver, from the last fit on:

  deqmpc dagger qpole --demonstrations runs/experts/qpole.npz --rounds 5
  deqmpc train qpole --policy deq_mpc_deq --direct 256 --output delta --init runs/dagger/qpole-s0/fit_5/model --fit 0 \\
      --demonstrations runs/dagger/qpole-s0/round_5.npz --method iterations=1 --method mu_0=100

A folder keeps round_K.npz and fit_K/ (a model folder) of every round. The same command continues after the last one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from deqmpc import experts
from deqmpc.policies.model import SETTINGS
from deqmpc.training import aggregate, train

HIDDEN = 16  # channels of the convolutions, which add nothing here


def main(argv: list[str] | None = None) -> int:
    """Rounds of aggregation and fits."""
    a = _parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        print(run(a))
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc dagger: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog='deqmpc dagger', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=sorted(experts.RECIPES))
    p.add_argument('--demonstrations', type=Path, help='to add to; default: runs/experts/TASK.npz')
    p.add_argument('--rounds', type=int, default=5, help='after the first, default 5')
    p.add_argument('--episodes', type=int, default=50, help='of a round, twice as many in the first; default 50')
    p.add_argument('--steps', type=int, default=200, help='of an episode at most, default 200')
    p.add_argument('--direct', type=int, default=256, metavar='WIDTH', help='of the fitted part, default 256')
    p.add_argument('--sight', type=int, default=0, metavar='WIDTH',
                   help='of what it sees of spheres, default 0: nothing')
    p.add_argument('--init', type=Path, metavar='MODEL', help='folder of a model with whose direct part to begin')
    p.add_argument('--fit', type=int, default=6000, metavar='STEPS', help='of a fit, default 6000')
    p.add_argument('--seed', type=int, default=0, help='of starts, noise, fits and the split')
    p.add_argument('--out', type=Path, help='default: runs/dagger/TASK-sSEED')
    return p


def run(a: argparse.Namespace) -> Path:
    """Do what the command line says; the folder. ValueError and FileNotFoundError say what is wrong."""
    if a.rounds < 0:
        raise ValueError(f'rounds = {a.rounds}; expected an integer >= 0')
    out = a.out or Path('runs/dagger') / f'{a.task}-s{a.seed}'
    out.mkdir(parents=True, exist_ok=True)
    given, model = a.demonstrations or Path('runs/experts') / f'{a.task}.npz', None
    for k in range(a.rounds + 1):
        made = out / f'round_{k}.npz'
        if not made.exists():
            _aggregate(a, k, given, model, made)
        fit = out / f'fit_{k}'
        if not (fit / 'model' / SETTINGS).exists():  # the file that is written last
            _fit(a, made, model or a.init, fit)
        given, model = made, fit / 'model'
    return out


def _aggregate(a: argparse.Namespace, k: int, given: Path, model: Path | None, made: Path) -> None:
    command = [a.task, *([str(model)] if model else []), '--demonstrations', str(given), '--output', str(made),
               '--episodes', str(a.episodes if k else 2 * a.episodes), '--steps', str(a.steps),
               '--noise', '0.1' if k else '0.2', '--seed', str(100 * (a.seed + 1) + k), '--split-seed', str(a.seed)]
    aggregate.run(aggregate.parser().parse_args(command), command)


def _fit(a: argparse.Namespace, data: Path, model: Path | None, out: Path) -> None:
    command = [a.task, '--policy', 'deq_mpc_nn', '--hidden', str(HIDDEN), '--direct', str(a.direct),
               '--sight', str(a.sight), '--fit', str(a.fit), '--steps', '0', '--output', 'delta',
               '--method', 'iterations=1', '--method', 'mu_0=100', '--demonstrations', str(data), '--seed', str(a.seed),
               '--split-seed', str(a.seed), '--out', str(out), *(['--init', str(model)] if model else [])]
    train.run(train.parser().parse_args(command), command, 'cpu')


if __name__ == '__main__':
    sys.exit(main())
