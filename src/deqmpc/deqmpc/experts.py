"""Near-optimal demonstrations by long-horizon constrained optimisation: `deqmpc experts TASK`.

The tasks' reward is exp(2 - c/2) with a small quadratic cost c, so that the largest return is, to first order, the
least sum of c. A demonstration solves, for a random start x_0 of the task and over T steps of its plant phi,

  min  sum_{t<T} [1/2 |x_t|_Q^2 + 1/2 |u_t - u_ref|_R^2] + 1/2 |x_T|_Qf^2       Q as in c
  s.t. x_{t+1} = phi(x_t, u_t),  bounds of the task's problem,  |p_t - o_jt| >= r_j + margin + g_j

with the interior-point method of deqmpc.realtime, from several first guesses; o_jt is where sphere j will be, known
to the expert. The best answer that passes `check` is kept: exact under the plant, within all bounds, and clear of the
spheres between the knots too. A sphere that is cut between two knots grows by g_j and the plan is made again.

A policy in closed loop leaves these trajectories, so each of them is joined by `restarts` that begin at a perturbed
state of it. They may start inside a margin; they have to keep it after `grace` steps and never touch a sphere.

Trajectory i depends on the seed and i alone. It is saved in a folder beside the output as soon as it is made, so that
a run that was stopped continues, to the same result. The file is described in deqmpc.datasets.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deqmpc import datasets, realtime, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.dynamics.integrators import RK4
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver, WarmStart
from deqmpc.tasks import Spheres, Task

Guess = tuple[np.ndarray, np.ndarray]  # x (T+1, n), u (T, m)


@dataclass(frozen=True)
class Recipe:
    """How the demonstrations of a task are planned."""

    Q: tuple[float, ...]  # weights of the state, those of the task's reward
    R: float  # weight of every input
    perturbation: tuple[float, ...]  # standard deviation by which restarts leave a trajectory, of every state
    guesses: Callable[[Task, np.ndarray, int, np.random.Generator], Iterator[Guess]]  # (task, x_0, T, random)
    horizon: int  # T, steps that are planned
    length: int  # steps that are kept: fewer, where the end of the plan is short-sighted
    rest: float  # largest entry of the last state that is kept: inf where spheres move
    final: float = 10.0  # Qf / Q
    elastic: float = 1e4  # largest multiplier of a constraint on the state: a start may violate some


@dataclass(frozen=True)
class Settings:
    """What to make."""

    task: str  # name of deqmpc.tasks
    trajectories: int = 400  # nominal ones
    restarts: int = 3  # perturbed ones of each
    seed: int = 0

    def __post_init__(self):
        if self.task not in RECIPES:
            raise ValueError(f'task {self.task!r} has no recipe; expected one of {", ".join(RECIPES)}')
        for name, least in (('trajectories', 1), ('restarts', 0), ('seed', 0)):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= least):
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected an integer >= {least}')


# --- first guesses ------------------------------------------------------------------------------

def deflected_lines(task: Task, x: np.ndarray, T: int, random: np.random.Generator) -> Iterator[Guess]:
    """For the Crazyflie: hovering along the line to the goal; then bent to four sides and to four random ones."""
    side = np.cross(x[:3], [0.0, 0.0, 1.0])
    side = side / max(np.linalg.norm(side), 1e-9) if np.linalg.norm(side) > 1e-6 else np.array([0.0, 1.0, 0.0])
    up = np.cross(side, x[:3] / max(np.linalg.norm(x[:3]), 1e-9)) if np.linalg.norm(x[:3]) > 1e-6 else np.eye(3)[2]
    bends = [0.0 * side, *(0.35 * v for v in (side, -side, up, -up)), *random.normal(scale=0.3, size=(4, 3))]
    duration = 1.0 + np.abs(x[:3]).max() / 0.8  # s
    s = np.clip(task.dt * np.arange(T + 1) / duration, 0.0, 1.0)[:, None]
    for bend in bends:
        guess = np.zeros((T + 1, len(x)))
        guess[:, :3] = (1.0 - s * s * (3.0 - 2.0 * s)) * x[:3] + 4.0 * s * (1.0 - s) * bend
        guess[:, 2] = np.maximum(guess[:, 2], task.floor + 0.05)
        guess[:-1, 6:9] = np.diff(guess[:, :3], axis=0) / task.dt
        guess[0] = x
        yield guess, np.ones((T, 4))


_CRAZYFLIE = dict(Q=(10.0,) * 6 + (1.0,) * 6, R=0.1, guesses=deflected_lines,
                  perturbation=(0.03,) * 3 + (0.035,) * 3 + (0.2,) * 3 + (0.7,) * 3)  # 0.035: 8 deg about each axis
RECIPES = {
    'crazyflie_obs': Recipe(**_CRAZYFLIE, horizon=60, length=60, rest=0.02),
    'crazyflie_dynobs': Recipe(**_CRAZYFLIE, horizon=100, length=80, rest=float('inf')),
}


# --- planning -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Trajectory:
    """A demonstration of L steps."""

    x: np.ndarray  # (L, n)
    u: np.ndarray  # (L, m)
    centers: np.ndarray  # (L, K, d) m
    velocity: np.ndarray  # (L, K, d) m/s
    radii: np.ndarray  # (K,) m


class Planner:
    """Plans for one task. ValueError where the recipe does not fit the task."""

    rounds = 6  # plans with grown spheres at most
    fractions = (0.2, 0.4, 0.6, 0.8)  # of a step, where clearance is checked between the knots
    tolerance = 1e-6  # on transitions and bounds

    def __init__(self, task: Task, recipe: Recipe):
        self.task, self.recipe = task, recipe
        self.problem = reweighted(task.problem(recipe.horizon), recipe)
        self._solver = RealtimeSolver(self.problem, task.spheres, realtime.Settings(
            tolerance=1e-9, elastic=recipe.elastic, max_steps=200))
        self._between = [RK4(task.equations, f * task.dt) for f in self.fractions]
        self._u_ref = np.tile(task.u_ref.numpy(), (recipe.horizon, 1))

    def plan(self, x: torch.Tensor, spheres: Spheres, random: np.random.Generator,
             grace: int = 0) -> tuple[Trajectory | None, str]:
        """The best trajectory found from x (1, n) among `spheres` (of one episode), or None and why there is none."""
        start = x[0].numpy()
        still, _ = self._motion(spheres, np.tile(start, (self.recipe.horizon + 1, 1)))
        radii = spheres.radii[0].numpy() + self.task.margin
        answers = [self._solve(start, still, radii, WarmStart(*guess))
                   for guess in self.recipe.guesses(self.task, start, self.recipe.horizon, random)]
        answers = sorted((a for a in answers if np.isfinite(a.x).all()), key=lambda a: a.cost)
        reason = 'no guess led to a finite plan'
        for i, answer in enumerate(answers):
            if i and answer.cost <= answers[i - 1].cost * (1.0 + 1e-6):
                continue  # the same plan again
            found, reason = self._refined(start, spheres, radii.copy(), answer, grace)
            if found is not None:
                return found, ''
        return None, reason

    def _refined(self, start, spheres, radii, answer, grace) -> tuple[Trajectory | None, str]:
        """The plan made again among spheres that move as they do beside it and are grown where they were cut."""
        for _ in range(self.rounds):
            centers, velocity = self._motion(spheres, answer.x)
            reason, cut = self.check(answer.x, answer.u, centers, spheres.radii[0].numpy(), grace)
            if not reason:
                L = self.recipe.length
                return Trajectory(answer.x[:L], answer.u[:L], centers[:L], velocity[:L],
                                  spheres.radii[0].numpy()), ''
            radii = radii + np.where(cut > 0.0, cut + 2e-3, 0.0)
            answer = self._solve(start, centers, radii, answer.warm_start)
            if not np.isfinite(answer.x).all():
                return None, 'a plan among grown spheres is not finite'
        return None, reason

    def _solve(self, start, centers, radii, warm_start):
        T, n = self.recipe.horizon, len(start)
        return self._solver.solve(start, np.zeros((T + 1, n)), self._u_ref, centers, radii, warm_start)

    def _motion(self, spheres, x) -> tuple[np.ndarray, np.ndarray]:
        """Centres and velocities (T+1, K, d) of the spheres of an episode that goes through the states x (T+1, n)."""
        path = [spheres]
        for state in torch.from_numpy(x[1:]):
            path.append(self.task.move(path[-1], state[None]))
        return (torch.cat([s.centers for s in path]).numpy(), torch.cat([s.velocity for s in path]).numpy())

    def check(self, x: np.ndarray, u: np.ndarray, centers: np.ndarray, radii: np.ndarray,
              grace: int = 0) -> tuple[str, np.ndarray]:
        """What is wrong with x (T+1, n), u (T, m) among spheres at centers (T+1, K, d): '' or a sentence; and by how
        many metres every sphere's margin is cut (K,). In the first `grace` steps only touching counts."""
        with torch.no_grad():
            X, U = torch.from_numpy(x[:-1]), torch.from_numpy(u)
            defect = float((self.task.step(X, U) - torch.from_numpy(x[1:])).abs().max())
            between = [phi.step(X, U)[:, self.problem.position].numpy() for phi in self._between]
        margin = np.full(len(u), self.task.margin)
        margin[:grace] = 0.0
        cut = np.zeros(len(radii))
        for f, p in zip((*self.fractions, 1.0), (*between, x[1:, self.problem.position]), strict=True):
            o = (1.0 - f) * centers[:-1] + f * centers[1:]
            gap = np.linalg.norm(p[:, None] - o, axis=-1) - radii - margin[:, None]
            cut = np.maximum(cut, -gap.min(axis=0, initial=np.inf))
        bound = self._bound_violation(x, u, grace)
        last = np.abs(x[self.recipe.length]).max()
        if defect > self.tolerance:
            return f'a transition is wrong by {defect:.1e}', cut
        if bound > 1e3 * self.tolerance:
            return f'a bound is violated by {bound:.1e}', cut
        if cut.max(initial=0.0) > 1e3 * self.tolerance:
            return f'a margin is cut by {cut.max():.3f} m', cut
        return (f'not at rest at the end: {last:.3f}' if last > self.recipe.rest else ''), cut

    def _bound_violation(self, x, u, grace) -> float:
        sign, limit = self.problem.sign.numpy(), self.problem.limit.numpy()
        h = np.hstack([x[1:], u]) @ sign.T - limit
        of_state = np.abs(sign[:, :self.problem.n]).sum(axis=1) > 0
        h[:grace, of_state] = 0.0
        return float(h.max(initial=0.0))


def reweighted(problem: Problem, recipe: Recipe) -> Problem:
    """`problem` with the weights of a recipe. ValueError where their number is not that of the states."""
    if not len(recipe.Q) == len(recipe.perturbation) == problem.n:
        raise ValueError(f'the recipe has {len(recipe.Q)} weights and {len(recipe.perturbation)} perturbations; '
                         f'expected {problem.n} of each')
    made = copy.copy(problem)
    made.Q = torch.tensor(recipe.Q, dtype=torch.float64)
    made.Qf, made.R = recipe.final * made.Q, torch.full((problem.m,), recipe.R, dtype=torch.float64)
    return made


# --- one nominal trajectory and its restarts ----------------------------------------------------

GRACE = 5  # steps in which a restart may be inside a margin
START_GAP = 0.02  # m, least clearance of a restart


def family(planner: Planner, settings: Settings, index: int) -> Demonstrations:
    """Nominal trajectory `index` and its restarts; what failed is told in `about`."""
    seeds = np.random.SeedSequence([settings.seed, index]).generate_state(2)
    generator, random = torch.Generator().manual_seed(int(seeds[0])), np.random.default_rng(seeds[1])
    x, spheres = planner.task.sample(1, generator)
    nominal, reason = planner.plan(x, spheres, random)
    made, failures = [('nominal', nominal)], [f'nominal {index}: {reason}'] if reason else []
    for r in range(settings.restarts if nominal else 0):
        state, around = perturbed(planner, nominal, random)
        restart, reason = planner.plan(state, around, random, GRACE)
        made.append(('restart', restart))
        failures += [f'restart {index}.{r}: {reason}'] if reason else []
    return _together(planner.task, [(k, t) for k, t in made if t is not None], failures)


def perturbed(planner: Planner, nominal: Trajectory, random: np.random.Generator) -> tuple[torch.Tensor, Spheres]:
    """A state (1, n) beside a random one of `nominal`, and the spheres then. The unperturbed one, where 100 draws are
    all too close to a sphere."""
    t = int(random.integers(len(nominal.x)))
    at = [torch.from_numpy(np.array(v)[None]) for v in (nominal.centers[t], nominal.velocity[t], nominal.radii)]
    spheres, x = Spheres(*at), torch.from_numpy(nominal.x[t][None])
    for _ in range(100):
        moved = x + torch.from_numpy(random.normal(size=x.shape) * np.array(planner.recipe.perturbation))
        d = spheres.centers.shape[-1]
        if not planner.task.failed(moved, spheres).any() and spheres.gap(moved[:, :d]).min() >= START_GAP:
            return moved, spheres
    return x, spheres


def _together(task, made, failures) -> Demonstrations:
    """Trajectories one after another. Spheres that move are stored for every state, in single precision."""
    def stack(values, shape):
        return np.concatenate(values) if values else np.zeros((0, *shape))
    K, (n, m) = task.spheres, (task.equations.n, task.equations.m)
    trajectories = [t for _, t in made]
    moving = any(t.velocity.any() for t in trajectories)
    keep = slice(None) if moving else slice(1)
    centers, velocity = (stack([v[keep].astype(np.float32) for v in part], (K, task.spatial)) for part in (
        [t.centers for t in trajectories], [t.velocity for t in trajectories]))
    about = {'kinds': [kind for kind, _ in made], 'failures': failures,
             'returns': [episode_return(task, t) for t in trajectories]}
    return Demonstrations(stack([t.x for t in trajectories], (n,)), stack([t.u for t in trajectories], (m,)),
                          np.array([len(t.x) for t in trajectories], dtype=np.int64), centers, velocity,
                          stack([t.radii[None] for t in trajectories], (K,)), about)


def episode_return(task: Task, t: Trajectory) -> float:
    """Return of an episode along t, the last state held where the episode is longer."""
    r = task.reward(torch.from_numpy(t.x), torch.from_numpy(t.u))[:task.steps]
    return float(r.sum() + (task.steps - len(r)) * r[-1])


# --- many, in parts -----------------------------------------------------------------------------

def make(settings: Settings, output: Path, processes: int = 1, progress: bool = False,
         command: str = '') -> Demonstrations:
    """Make what is missing of the parts beside `output`, join them there, return them. ValueError where the parts are
    of other settings."""
    parts = output.with_suffix('.parts')
    _claim(parts, settings)
    missing = [i for i in range(settings.trajectories) if not _part(parts, i).exists()]
    with tqdm(total=settings.trajectories, initial=settings.trajectories - len(missing), unit='trajectory',
              desc=settings.task, disable=not progress) as bar:
        for _ in _run(settings, parts, missing, processes):
            bar.update()
    joined = join([datasets.load(_part(parts, i)) for i in range(settings.trajectories)], settings, command)
    datasets.save(output, joined)
    return joined


def _claim(parts, settings):
    """Note in the folder what it is for, or see that it is for the same."""
    own = asdict(settings) | {'recipe': repr({k: v for k, v in asdict(RECIPES[settings.task]).items()
                                              if k != 'guesses'})}
    del own['trajectories']  # more of them may follow
    note = parts / 'settings.json'
    if note.exists():
        other = json.loads(note.read_text())
        if other != own:
            raise ValueError(f'{parts} holds parts of {other}; expected {own}. Delete the folder or choose another '
                             f'--output')
    parts.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(own))


def _part(parts, index) -> Path:
    return parts / f'{index:06d}.npz'


def _run(settings, parts, indices, processes) -> Iterator[int]:
    if processes == 1 or len(indices) < 2:
        _prepare(settings, parts)
        yield from map(_make_part, indices)
        return
    with multiprocessing.get_context('spawn').Pool(processes, _prepare, (settings, parts)) as pool:
        yield from pool.imap_unordered(_make_part, indices)


_worker: dict = {}  # of this process: planner, settings, folder


def _prepare(settings, parts):
    torch.set_num_threads(1)
    _worker.update(planner=Planner(tasks.make(settings.task), RECIPES[settings.task]), settings=settings, parts=parts)


def _make_part(index) -> int:
    datasets.save(_part(_worker['parts'], index), family(_worker['planner'], _worker['settings'], index))
    return index


def join(parts: list[Demonstrations], settings: Settings, command: str = '') -> Demonstrations:
    """All parts as one, with where they come from. ValueError where no plan succeeded at all."""
    kinds = sum((p.about['kinds'] for p in parts), [])
    failures = sum((p.about['failures'] for p in parts), [])
    returns = np.array(sum((p.about['returns'] for p in parts), []))
    nominal = returns[np.array([kind == 'nominal' for kind in kinds], dtype=bool)]
    if not len(nominal):
        raise ValueError(f'{settings.task}: none of {len(parts)} starts led to a plan; {failures[0]}')
    about = asdict(settings) | {
        'commit': commit(), 'command': command, 'recipe': repr(RECIPES[settings.task]), 'kinds': kinds,
        'success_share': len(kinds) / (len(kinds) + len(failures)), 'failures': failures,
        'nominal_return_mean': float(nominal.mean()), 'nominal_return_sd': float(nominal.std())}
    return Demonstrations(*(np.concatenate([getattr(p, name) for p in parts]) for name in (
        'states', 'controls', 'lengths', 'centers', 'velocity', 'radii')), about)


def commit() -> str:
    """The commit of the code, with `-dirty` where it was changed; 'unknown' outside a repository."""
    try:
        answer = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty'], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return answer.stdout.strip()


# --- command line -------------------------------------------------------------------------------

def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='deqmpc experts', description=main.__doc__)
    parser.add_argument('task', metavar='TASK', help=', '.join(RECIPES))
    parser.add_argument('--trajectories', type=int, default=Settings.trajectories, help='nominal ones (%(default)s)')
    parser.add_argument('--restarts', type=int, default=Settings.restarts,
                        help='perturbed ones of each (%(default)s)')
    parser.add_argument('--seed', type=int, default=Settings.seed)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--output', type=Path, help='default: runs/experts/TASK.npz')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a sentence')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make near-optimal demonstrations of a task; a stopped run continues."""
    argv = sys.argv[1:] if argv is None else argv
    options = _arguments(argv)
    output = options.output or Path('runs/experts') / f'{options.task}.npz'
    try:
        settings = Settings(options.task, options.trajectories, options.restarts, options.seed)
        made = make(settings, output, max(options.processes, 1), sys.stderr.isatty(),
                    ' '.join(['deqmpc experts', *argv]))
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    about = {k: v for k, v in made.about.items() if k not in ('kinds', 'failures')}
    about |= {'output': str(output), 'demonstrations': len(made.lengths), 'states': len(made.states)}
    print(json.dumps(about) if options.json else
          f'{output}: {len(made.lengths)} demonstrations, {len(made.states)} states; {about["success_share"]:.1%} of '
          f'the plans succeeded; return {about["nominal_return_mean"]:.1f} +- {about["nominal_return_sd"]:.1f}')
    return 0
