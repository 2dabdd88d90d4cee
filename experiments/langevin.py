"""Constrained diffusion (Kurtz, Burdick): noise escapes where local methods stay; a local solver finishes it.

On the two problems of deqmpc.nonconvex, from the same scattered starts for every method, and behind a wall of spheres:

  swing-up  Figure 3: |h|^2 at the end of the flow against the penalty mu (same alpha, sigma, steps)
  maze      share of starts that end around the wall at the goal, with hard discs, when they are finished after

              raw       nothing: the scattered start itself
              descent   the flow without noise, as many steps
              bfgs      L-BFGS on the same L, 10 multiplier updates (limits on z by z = middle + half tanh y)
              langevin  the flow: 2000 steps, as few as explore best

            by the interior-point method of deqmpc.realtime, or, where that fails, by the AL solver; and by the AL
            solver alone
  wall      share of starts of the task crazyflie_wall from which deqmpc.experts finds a plan that passes its check

              al, ip    by the AL solver and the interior point, from the straight line to the goal
              lines     by the interior point, from all guesses of the recipe: lines bent to nine sides
              langevin  by the interior point, from 8 detours of a point mass (deqmpc.detours)
  time      N swing-ups at once from angles and rates in +-4, zero guess (Table I): seconds a thousand steps of the
            flow take, measured over fewer where N is large; processor time on a CPU, elapsed on a GPU

The paper's maze has 50 knots and a soft wall, where staying is cheaper than leaving, so that its paths reach the goal
only by breaking the dynamics. Here there are 100, and a path counts as escaped when it satisfies dynamics, bounds and
discs to 1e-6. The paper's text has multipliers grow at the rate mu h, its released code without mu; this is the text's.

Checks: |h|^2 falls with every mu; in the maze, more starts of langevin than of each other method end at the goal, all
of them are feasible to 1e-6 when finished, and the cheapest one of every seed is around the wall; behind the wall,
langevin leads to more plans than each other way; time grows no faster than N.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from deqmpc import experts, nonconvex, realtime, tasks
from deqmpc.provenance import commit
from deqmpc.realtime import RealtimeSolver
from deqmpc.reproduce import Check, Column, Plan, Results
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import langevin

X_LABEL = 'mu or N'
METHODS = {'maze': ('raw', 'descent', 'bfgs', 'langevin'), 'wall': ('al', 'ip', 'lines', 'langevin')}
VARIANTS = tuple(dict.fromkeys(v for names in METHODS.values() for v in names))
TASKS = ('swing-up', 'maze', 'wall', 'time')
COLUMNS = (Column('log10 of sum h^2, median', 'log_square'), Column('escaped, %', 'escaped', 100.0),
           Column('feasible to 1e-6, %', 'feasible', 100.0), Column('by AL alone: escaped, %', 'escaped_al', 100.0),
           Column('feasible, %', 'feasible_al', 100.0), Column('best cost', 'cost'),
           Column('best one escaped, %', 'best_escaped', 100.0), Column('s for 1000 steps', 'seconds'))
MUS = (0.01, 0.1, 1.0, 10.0)
FEASIBILITY = 1e-6
INTERIOR_POINT = realtime.Settings(tolerance=1e-8, max_steps=500, elastic=1e3)
# Gauss-Newton sees little curvature in the maze, where states cost nothing: it takes thousands of steps
AUGMENTED_LAGRANGIAN = al.Settings(feasibility=FEASIBILITY, optimality=1e-6, mu_0=1e4, mu_max=1e8, iterations=300,
                                   gn_steps=30, max_steps=9000)
SWING_UP = langevin.Settings(sigma=1.0)
MAZE = langevin.Settings(sigma=4.0, sharpness=5.0 * nonconvex.RADIUS ** 2)


@dataclass(frozen=True)
class Size:
    """What a budget means here."""

    starts: int  # a seed
    swing_up_steps: int
    maze_steps: int
    bfgs_steps: int  # between two multiplier updates
    walls: int  # a seed; 0: leave them out
    numbers: tuple[int, ...]  # N
    work: int  # N times steps that a time is measured over


NUMBERS = (64, 256, 1024, 2048, 4096, 8192, 16384)
SIZES = {'smoke': Size(2, 20, 20, 2, 0, (1, 2), 4), 'small': Size(8, 3000, 2000, 50, 2, NUMBERS, 20_000),
         'medium': Size(16, 20_000, 2000, 50, 8, NUMBERS, 200_000),
         'full': Size(64, 20_000, 2000, 50, 32, NUMBERS, 1_000_000)}


def rows(plan: Plan, out: Path) -> list[dict]:
    """A row for every mu, method and number of starts, and seed. ValueError for an unknown task."""
    size = SIZES[plan.budget.name]
    for task in plan.tasks:
        if task not in TASKS:
            raise ValueError(f'--tasks {task}; expected some of {", ".join(TASKS)}')
    made = []
    for task in plan.tasks or TASKS:
        for seed in range(plan.seeds):
            if task == 'swing-up':
                made += [row(task, 'langevin', mu, seed, log_square=swing_up(mu, size, seed)) for mu in MUS]
            elif task in METHODS:
                made += [row(task, v, '', seed, **(maze if task == 'maze' else wall)(v, size, seed))
                         for v in METHODS[task] if v in (plan.variants or VARIANTS)
                         and (task != 'wall' or size.walls)]
            else:
                device = 'cuda' if torch.cuda.is_available() else 'cpu'
                made += [row(task, device, N, seed, seconds=seconds(N, size, seed, device)) for N in size.numbers]
    return made


def row(task: str, variant: str, x, seed: int, **found: float) -> dict:
    """A row with NaN for what is not measured."""
    return {'task': task, 'variant': variant, 'x': x, 'seed': seed, **{c.metric: math.nan for c in COLUMNS}, **found,
            'commit': commit()}


def swing_up(mu: float, size: Size, seed: int) -> float:
    """log10 of the median |h|^2 from scattered starts."""
    problem, data = nonconvex.swing_up(torch.tensor([[3.1, 0.0]], dtype=torch.float64).repeat(size.starts, 1))
    start = scattered(problem, data, (6.0, 6.0), seed)
    end = langevin.diffuse(problem, data, replace(SWING_UP, mu=mu, steps=size.swing_up_steps), seed, start)
    return log_square(problem, data, end)


def maze(variant: str, size: Size, seed: int) -> dict[str, float]:
    """What becomes of scattered starts."""
    x_init = torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64).repeat(size.starts, 1)
    problem, data = nonconvex.maze(x_init)
    guess = guesses(variant, problem, data, scattered(problem, data, (2.0, 2.0, math.pi), seed), size, seed)
    first, second = (RealtimeSolver(problem, data.radii.shape[1], settings).solve_batch(data, guess)
                     for settings in (INTERIOR_POINT, AUGMENTED_LAGRANGIAN))
    x, cost = al.select(feasible(first), first.x, second.x), torch.where(feasible(first), first.cost, second.cost)
    known, around = feasible(first) | feasible(second), nonconvex.escaped(x)
    best = int(torch.where(known, cost, math.inf).argmin())
    return {'log_square': log_square(problem, data, guess), 'escaped': share(known & around), 'feasible': share(known),
            'escaped_al': share(feasible(second) & nonconvex.escaped(second.x)),
            'feasible_al': share(feasible(second)), 'best_escaped': float(known[best] & around[best]),
            'cost': float(cost[best]) if known[best] else math.nan}


def feasible(found: al.Solution) -> torch.Tensor:
    """(B,) bool; False for NaN."""
    return torch.maximum(found.defect, found.violation) <= FEASIBILITY


def wall(variant: str, size: Size, seed: int) -> dict[str, float]:
    """How many plans an expert finds, and what the best returns on average."""
    task, recipe = tasks.make('crazyflie_wall'), experts.RECIPES['crazyflie_wall']
    if variant in ('al', 'ip'):
        recipe = replace(recipe, guesses=straight)
    if variant != 'langevin':
        recipe = replace(recipe, detours=0)
    planner = experts.Planner(task, recipe, 'augmented_lagrangian' if variant == 'al' else 'realtime')
    x, spheres = task.sample(size.walls, torch.Generator().manual_seed(seed))
    plans = [planner.plan(x[i:i + 1], spheres[[i]], np.random.default_rng([seed, i]))[0] for i in range(size.walls)]
    return {'escaped': float(np.mean([p is not None for p in plans]))}


def straight(task, x, T, random):
    """The first guess of the recipe alone."""
    yield next(experts.deflected_lines(task, x, T, random))


def guesses(variant: str, problem, data, start: al.WarmStart, size: Size, seed: int) -> al.WarmStart:
    """Where a method takes the starts."""
    settings = replace(MAZE, steps=size.maze_steps)
    if variant == 'raw':
        return start
    if variant == 'bfgs':
        return bfgs(problem, data, start, settings, size.bfgs_steps)
    return langevin.diffuse(problem, data, settings if variant == 'langevin' else replace(settings, sigma=0.0), seed,
                            start, AUGMENTED_LAGRANGIAN)


def bfgs(problem, data, start: al.WarmStart, settings: langevin.Settings, steps: int) -> al.WarmStart:
    """L-BFGS on L, start by start: 10 times `steps` steps, after each lambda <- lambda + mu h."""
    ends = []
    for i in range(len(data.x_init)):
        one = data[i:i + 1]
        lagrangian = langevin.Lagrangian(langevin.program_of(problem, one, settings), settings)
        ends.append(minimise(lagrangian, langevin.pack(start.x[i:i + 1], start.u[i:i + 1]), steps))
    x, u = langevin.unpack(problem, data, torch.cat(ends))
    return al.guess(problem, data, x, u, AUGMENTED_LAGRANGIAN)


def minimise(lagrangian: langevin.Lagrangian, z: torch.Tensor, steps: int) -> torch.Tensor:
    """The end z (1, d) of one start."""
    low, high = lagrangian.program.low, lagrangian.program.high
    bounded = torch.isfinite(low)
    middle, half = (torch.where(bounded, v, 1.0) for v in (0.5 * (high + low), 0.5 * (high - low)))

    def z_of(y):
        return torch.where(bounded, middle + half * torch.tanh(y), y)
    y = torch.where(bounded, torch.atanh(((z - middle) / half).clamp(-0.99, 0.99)), z).requires_grad_()
    lam = torch.zeros_like(lagrangian.program.equality(z))
    for _ in range(10):
        optimizer = torch.optim.LBFGS([y], max_iter=steps, history_size=50, line_search_fn='strong_wolfe')

        def closure(optimizer=optimizer, lam=lam):
            optimizer.zero_grad()
            value = lagrangian.value(z_of(y), lam)[0].sum()
            value.backward()
            return value
        optimizer.step(closure)
        lam = lam + lagrangian.settings.mu * lagrangian.program.equality(z_of(y).detach())
    return z_of(y).detach()


def seconds(number: int, size: Size, seed: int, device: str) -> float:
    """Of a thousand steps of `number` swing-ups at once, after two steps to warm up."""
    generator = torch.Generator().manual_seed(seed)
    x_init = (8.0 * torch.rand(number, 2, generator=generator, dtype=torch.float64) - 4.0).float().to(device)
    problem, data = nonconvex.swing_up(x_init)
    steps = min(max(size.work // number, 2), 1000)
    settings = replace(SWING_UP, steps=steps)
    z = torch.zeros(number, problem.horizon * (problem.n + problem.m), device=device)
    program = langevin.program_of(problem, data, settings)
    langevin.flow(program, z, replace(settings, steps=2), seed)
    clock = time.perf_counter if device == 'cuda' else time.process_time
    begun = clock()
    langevin.flow(program, z, settings, seed).z.cpu()  # waits for a GPU
    return (clock() - begun) * 1000.0 / steps


def scattered(problem, data, width: tuple[float, ...], seed: int) -> al.WarmStart:
    """States uniform in +-width, inputs in +-0.9, at every knot."""
    generator = torch.Generator().manual_seed(seed)
    x, u = (2.0 * torch.rand(len(data.x_init), *shape, generator=generator, dtype=torch.float64) - 1.0 for shape in (
        (problem.horizon + 1, problem.n), (problem.horizon, problem.m)))
    x = x * x.new_tensor(width)
    x[:, 0] = data.x_init
    return al.guess(problem, data, x, 0.9 * u, AUGMENTED_LAGRANGIAN)


def log_square(problem, data, start: al.WarmStart) -> float:
    """log10 of the median |h|^2."""
    return math.log10(float(problem.defects(data, start.x, start.u).square().sum((1, 2)).median()))


def share(mask: torch.Tensor) -> float:
    """Of True."""
    return float(mask.double().mean())


def draw(figure, results: Results):
    """|h|^2 against mu, escapes of the methods, time against N."""
    figure.set_size_inches(15.0, 3.8)
    axes = dict(zip(TASKS, figure.subplots(1, 4), strict=True))
    for task in results.unique('task'):
        found = results.select(task=task)
        if task in METHODS:
            for i, v in enumerate(dict.fromkeys(r['variant'] for r in found)):
                axes[task].bar(v, results.mean('escaped', task=task, variant=v), color=f'C{i}')
        else:
            xs = list(dict.fromkeys(r['x'] for r in found))
            metric = 'log_square' if task == 'swing-up' else 'seconds'
            means = [results.mean(metric, task=task, x=x) for x in xs]
            axes[task].plot(xs, [10.0 ** v for v in means] if task == 'swing-up' else means, marker='o')
            axes[task].set(xscale='log', yscale='log')
    axes['swing-up'].set(xlabel='mu', ylabel='|h|^2, median', title='swing-up')
    axes['maze'].set(ylabel='share of starts that escape', title='maze', ylim=(0.0, 1.0))
    axes['wall'].set(ylabel='share of starts with a plan', title='crazyflie_wall', ylim=(0.0, 1.0))
    axes['time'].set(xlabel='N', ylabel='s for 1000 steps', title='time')


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    made, known = [], results.unique('task')
    if 'swing-up' in known:
        square = [results.mean('log_square', task='swing-up', x=mu) for mu in MUS]
        falls = all(after < before for before, after in zip(square, square[1:], strict=False))
        made.append(Check(f'|h|^2 falls with mu: 10^ {", ".join(f"{s:.2f}" for s in square)}', falls))
    for task in ('maze', 'wall'):
        made += escapes(results, task)
    if any(r['variant'] == 'langevin' for r in results.select(task='maze')):
        finished = results.mean('feasible', task='maze', variant='langevin')
        best = results.mean('best_escaped', task='maze', variant='langevin')
        made += [Check(f'{100 * finished:.0f} % of its starts are feasible to {FEASIBILITY:g} when finished; 100',
                       finished == 1.0),
                 Check(f'the cheapest one is around the wall in {100 * best:.0f} % of the seeds; 100', best == 1.0)]
    if 'time' in known:
        numbers = [r['x'] for r in results.select(task='time')]
        low, high = min(numbers), max(numbers)
        ratio = results.mean('seconds', task='time', x=high) / results.mean('seconds', task='time', x=low)
        made.append(Check(f'{high / low:g} times as many starts take {ratio:.1f} times as long', ratio <= high / low))
    return made


def escapes(results: Results, task: str) -> list[Check]:
    """langevin against each other method."""
    found = dict.fromkeys(r['variant'] for r in results.select(task=task))
    share_of = {v: results.mean('escaped', task=task, variant=v) for v in found}
    return [Check(f'{task}: langevin escapes from {100 * share_of["langevin"]:.0f} % of the starts, {v} from '
                  f'{100 * share_of[v]:.0f} %', share_of['langevin'] > share_of[v])
            for v in share_of if 'langevin' in share_of and v != 'langevin']
