"""`deqmpc reproduce NAME`: an experiment of the paper, from its file to table, plot and verdict.

  deqmpc reproduce                              what there is
  deqmpc reproduce fig2 --budget small --processes 2
  deqmpc reproduce fig3 --budget medium --tasks quadrotor cartpole --variants deq_mpc_nn diff_mpc_nn

A file of the folder experiments/ has a docstring, whose first line is what the paper claims, X_LABEL (what is varied),
`cells(plan)` (what to train and test: deqmpc.reproduce.runs) or `rows(plan, out)` (numbers from elsewhere),
`draw(figure, results)` and `checks(results)` (deqmpc.reproduce.results); it may have `metrics(row)`, more numbers of a
row, and COLUMNS of the table. The command writes results.csv, table.md and NAME.png.
Trained policies are kept in --runs, for all experiments together; the same command again continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure

import deqmpc
from deqmpc.reproduce.results import COLUMNS, Results, verdict
from deqmpc.reproduce.runs import BUDGETS, Plan, execute
from deqmpc.training.imitation import VARIANTS


def main(argv: list[str] | None = None) -> int:
    """Reproduce a figure or table of the paper: train, test, plot, judge."""
    argv = sys.argv[1:] if argv is None else argv
    a = _parser().parse_args(argv)
    try:
        known = experiments(a.experiments)
        if a.name is None:
            _list(known)
            return 0
        if a.name not in known:
            raise ValueError(f'experiment {a.name!r}; expected one of {", ".join(known)}')
        reproduce(load(known[a.name]), a, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f'deqmpc reproduce: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog='deqmpc reproduce', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('name', nargs='?', help='of an experiment; none: list them')
    p.add_argument('--budget', choices=sorted(BUDGETS), default='small',
                   help='smoke: seconds; small: an hour of a core; medium: a day of it; full: the paper\'s')
    p.add_argument('--seeds', type=int, help="runs of everything (default: the budget's)")
    p.add_argument('--tasks', nargs='+', default=[], help="default: the experiment's")
    p.add_argument('--variants', nargs='+', default=[], help="default: the experiment's")
    p.add_argument('--out', type=Path, help='default: runs/reproduce/NAME-BUDGET')
    p.add_argument('--runs', type=Path, default=Path('runs/reproduce/runs'), help='trained policies (%(default)s)')
    p.add_argument('--demonstrations', type=Path, metavar='FOLDER',
                   help='default: $DEQMPC_DATA/experts or ../shared/data/experts, then runs/experts')
    p.add_argument('--processes', type=int, default=1, help='policies trained at once, a thread each')
    p.add_argument('--device', default='auto', help='to train on: auto, cpu, cuda ...')
    p.add_argument('--experiments', type=Path, help='folder of experiments (default: that of the source tree)')
    return p


def experiments(folder: Path | None = None) -> dict[str, Path]:
    """Names and files of the experiments. FileNotFoundError where there are none."""
    folder = folder or Path(deqmpc.__file__).parents[3] / 'experiments'
    found = sorted(folder.glob('*.py'), key=lambda p: (len(p.stem), p.stem))
    if not found:
        raise FileNotFoundError(f'no experiments in {folder}; expected --experiments with the folder experiments/ of '
                                f'the source tree')
    return {p.stem: p for p in found}


def load(path: Path) -> ModuleType:
    """The module of an experiment's file."""
    spec = importlib.util.spec_from_file_location(f'deqmpc_experiment_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NAME = path.stem
    return module


def plan_of(module: ModuleType, a: argparse.Namespace) -> Plan:
    """The plan that the command line asks for. ValueError names what cannot be used."""
    known = getattr(module, 'VARIANTS', VARIANTS)
    for variant in a.variants:
        if variant not in known:
            raise ValueError(f'--variants {variant}; expected some of {", ".join(known)}')
    for name in ('seeds', 'processes'):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise ValueError(f'--{name} {getattr(a, name)}; expected an integer >= 1')
    budget = BUDGETS[a.budget]
    seeds = a.seeds or getattr(module, 'SEEDS', {}).get(budget.name, budget.seeds)
    return Plan(budget, seeds, tuple(a.tasks), tuple(a.variants), a.processes)


def reproduce(module: ModuleType, a: argparse.Namespace, argv: list[str]) -> None:
    """Do the experiment, write its files and say what it found."""
    plan, out = plan_of(module, a), a.out or Path('runs/reproduce') / f'{module.NAME}-{a.budget}'
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(module, 'rows'):
        rows = module.rows(plan, out)
    else:
        rows = execute(module.cells(plan), a.runs, plan.processes, a.demonstrations, a.device)
    if hasattr(module, 'metrics'):
        rows = [{**row, **module.metrics(row)} for row in rows]
    results = Results(rows)
    results.save(out / 'results.csv')
    figure = Figure(layout='constrained')
    module.draw(figure, results)
    figure.savefig(out / f'{module.NAME}.png', dpi=150, metadata={'Software': None})
    checks = module.checks(results)
    text = report(module, results, plan, 'deqmpc reproduce ' + shlex.join(argv), checks)
    (out / 'table.md').write_text(text)
    print(f'{text}\n{out}: results.csv, table.md, {module.NAME}.png')


def report(module: ModuleType, results: Results, plan: Plan, command: str, checks) -> str:
    """Claim, numbers, checks and verdict as Markdown."""
    b, s = plan.budget, plan.budget.training
    cost = f'{s.steps} steps of {s.batch} windows, ' if hasattr(module, 'cells') else ''
    judged = verdict(checks) if b.name != 'smoke' else 'not judged, smoke only shows that everything runs'
    marks = '\n'.join(f'- [{"x" if c.true else " "}] {c.sentence}' for c in checks)
    return (f'## {module.__doc__.splitlines()[0]}\n\n`{command}`: budget {b.name}, {cost}{plan.seeds} '
            f'seed{"s" * (plan.seeds > 1)}, commit {", ".join(results.unique("commit"))}. Mean +- standard deviation '
            f'over seeds.\n\n{results.table(module.X_LABEL, getattr(module, "COLUMNS", COLUMNS))}\n\n{marks}\n\n'
            f'Verdict: **{judged}** ({sum(c.true for c in checks)} of {len(checks)} checks).\n')


def _list(known: dict[str, Path]) -> None:
    for path in known.values():
        print((load(path).__doc__ or path.stem).splitlines()[0])
    print(f'\ndeqmpc reproduce NAME, with NAME one of {", ".join(known)}; --help tells more')
