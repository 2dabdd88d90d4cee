"""DEQ-MPC and Diff-MPC: a network and an MPC solver in turns, batched and differentiable.

For i = 1..N, from tau^0 = (x_init at every knot, u_ref), or from the last control step's plan:

  DEQ-MPC   theta^i = NN(x_init, spheres, tau^{i-1})      tau^i = MPC-m(theta^i, tau^{i-1})
  Diff-MPC  theta   = NN(x_init, spheres, tau^0), once    tau   = MPC to convergence

MPC-m is m augmented-Lagrangian (AL) iterations of deqmpc.solvers.augmented_lagrangian on the tracking problem
(deqmpc.problem) with x_ref = theta; trajectory, multipliers and penalty are carried from one i to the next. With the
network of kind `deq` the equilibrium z is carried too. That makes the four variants {DEQ-MPC, Diff-MPC} x {DEQ, NN}
of one solver and one network.

Penalty. Cold: mu_0, times gamma after every AL iteration up to mu_max. Warm, in the receding horizon: tau is shifted by
one knot, the multipliers are zero, and mu starts at mu_max / gamma^(AL iterations to come - 1), so that the last one
runs at mu_max. With N = 1 and m = 2 that is the 1e7, 1e8 of the authors' code. The equilibrium z is taken as it was:
its rows belong to knots counted from now, by their time embedding. (Along expert trajectories a fresh network needs
5.4 evaluations from the last z, 6.9 from a cold start, 9.1 from the shifted z.)

Moving spheres. Given as they are now, with a velocity, they keep it up to the last knot; or, where the model has a
motion network (deqmpc.networks.obstacle_motion), every i begins with o^i = motion(x_init, spheres, tau^{i-1}, o^{i-1}),
and both the network and the constraints of MPC-m take o^i. For diff_mpc once, from tau^0.

Finish. m AL iterations do not always reach the tolerance. In flight and in rollouts a last plan that has not converged
is solved on, with the same theta and from where it is, by the interior-point method: what is flown obeys the dynamics
and bounds. Where that does not end (an AL iterate far off the dynamics is a bad start) it is solved once more, from
standing at x_init. Where its soft constraints give way by more than `give` it is solved at HARDER times their price,
and that answer taken if it gives way by less: a price that keeps flight smooth can be one at which a sphere is entered
that could be avoided. Nothing is finished while gradients are recorded; validation errors are those of the iterates.

Gradient. Every iterate carries its implicit gradient at its own penalty (smooth early, sharp late); losses are taken
on all of them:  sum_i |x^i - x_expert|_1 + 0.1 |theta^i - x_expert|_1 [+ mean_j |o_j^i - o_j,true|_1]. Through the
constraints the plan's own loss reaches the motion network too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from deqmpc.networks.inference import Inference
from deqmpc.networks.obstacle_motion import Forecaster, Motion, ObstacleMotion, at_knots, constant_velocity
from deqmpc.networks.temporal import Prediction, TemporalNetwork
from deqmpc.policies.learned import LearnedPolicy, Step
from deqmpc.policies.model import Model, settings_of
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import solver as realtime
from deqmpc.solvers import augmented_lagrangian as al

METHODS = ('deq_mpc', 'diff_mpc')
HARDER = 100.0  # times `softness`, where constraints gave way too far


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Defaults are the paper's and its code's."""

    method: str = 'deq_mpc'  # deq_mpc or diff_mpc
    iterations: int = 6  # N of a cold start; diff_mpc has one
    warm_iterations: int = 1  # N of a warm-started control step
    al_iterations: int = 2  # m
    gn_steps: int = 4  # Gauss-Newton steps at most in one AL iteration
    converged_al_iterations: int = 10  # at most in the one solve of diff_mpc
    mu_0: float = 1.0  # penalty of a cold start
    gamma: float = 10.0  # its factor after an AL iteration
    mu_max: float = 1e8  # its largest value
    softness: float = float('inf')  # largest multiplier of a constraint on the state; finite: soft constraints
    give: float = float('inf')  # how far these may give way (m, units of a bound) before their price goes up
    tolerance: float = 1e-4  # on defects, violations and optimality, at which a sample stops
    exact_gradient: bool = False  # with the curvature of dynamics and spheres, which the paper's gradient leaves out
    compiled: bool = True  # batches on the CPU are solved by the compiled solver

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f'method = {self.method!r}; expected one of {", ".join(METHODS)}')
        for name in ('iterations', 'warm_iterations', 'al_iterations', 'gn_steps', 'converged_al_iterations'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 1')
        if not 0.0 < self.mu_0 <= self.mu_max < float('inf') or not self.gamma > 1.0:
            raise ValueError(f'mu_0 = {self.mu_0}, gamma = {self.gamma}, mu_max = {self.mu_max}; expected '
                             f'0 < mu_0 <= mu_max and gamma > 1')
        for name in ('softness', 'give', 'tolerance'):
            if not getattr(self, name) > 0.0:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number > 0')

    def warm_penalty(self, iterations: int) -> float:
        """mu of a warm start with so many iterations to come."""
        to_come = iterations * self.al_iterations if self.method == 'deq_mpc' else self.al_iterations
        return max(self.mu_max / self.gamma ** (to_come - 1), self.mu_0)

    def solver(self) -> al.Settings:
        """The solver's settings for one MPC-m, or for the one solve of Diff-MPC."""
        count = self.al_iterations if self.method == 'deq_mpc' else self.converged_al_iterations
        return al.Settings(iterations=count, gn_steps=self.gn_steps, mu_0=self.mu_0, gamma=self.gamma,
                           mu_max=self.mu_max, progress=0.0, feasibility=self.tolerance, optimality=self.tolerance,
                           elastic=self.softness, exact_gradient=self.exact_gradient)

    def finisher(self) -> realtime.Settings:
        """The solver's settings for a last plan that has not converged."""
        return realtime.Settings(tolerance=self.tolerance, elastic=self.softness)

    def harder(self) -> realtime.Settings:
        """The finisher's where soft constraints gave way by more than `give`."""
        return replace(self.finisher(), elastic=HARDER * self.softness)

    def ends(self) -> tuple[al.Status, ...]:
        """With which the finisher has found a minimiser; INFEASIBLE: one in which soft constraints give way."""
        soft = self.softness < float('inf')
        return (al.Status.CONVERGED, al.Status.INFEASIBLE) if soft else (al.Status.CONVERGED,)


@dataclass(frozen=True)
class WarmStart:
    """What one control step leaves for the next."""

    solver: al.WarmStart
    z: Tensor | None  # (B, T, h) equilibrium of the network, where it has one
    motion: Motion | None = None  # last prediction of the spheres' motion, where there is a network for it

    def shifted(self, steps: int = 1) -> WarmStart:
        """Advanced by `steps` knots, the last knot repeated; what networks carry stays, see the top of the file."""
        return replace(self, solver=self.solver.shifted(steps))


@dataclass
class Iterates:
    """What a call went through, one entry an iterate. Tensors of plans carry gradients."""

    theta: list[Tensor] = field(default_factory=list)  # (B, T+1, n) network
    x: list[Tensor] = field(default_factory=list)  # (B, T+1, n) solver, its type
    u: list[Tensor] = field(default_factory=list)  # (B, T, m)
    predictions: list[Prediction] = field(default_factory=list)
    solutions: list[al.Solution] = field(default_factory=list)  # none of a network alone
    motions: list[Motion] = field(default_factory=list)  # none without a motion network
    radii: Tensor | None = None  # (B, K) of the spheres of `motions`; 0 where absent
    warm_start: WarmStart | None = None

    def usable(self, i: int) -> Tensor:
        """(B,) bool: iterate i is finite and has a gradient."""
        if not self.solutions:
            return self.predictions[i].ok
        solution = self.solutions[i]
        return self.predictions[i].ok & torch.isfinite(solution.cost) & solution.differentiable

    def counts(self) -> dict[str, int]:
        """How many samples, over all iterates, fell short of what: for logs."""
        return {
            'fixed_point_unconverged': sum(int((p.ok & ~p.converged).sum()) for p in self.predictions),
            'motion_unconverged': sum(int((m.ok & ~m.converged).sum()) for m in self.motions),
            'network_not_finite': sum(int((~p.ok).sum()) for p in self.predictions),
            'solver_not_finite': sum(int((~torch.isfinite(s.cost)).sum()) for s in self.solutions),
            'no_gradient': sum(int((torch.isfinite(s.cost) & ~s.differentiable).sum()) for s in self.solutions),
            'last_unconverged': sum(int((~s.converged).sum()) for s in self.solutions[-1:]),
        }


class DeqMpc(nn.Module):
    """The joint model. `problem` and `settings` may be exchanged at run time: the weights do not depend on them."""

    def __init__(self, problem: Problem, network: TemporalNetwork, settings: Settings = Settings(),
                 motion: ObstacleMotion | None = None):
        super().__init__()
        s = network.settings
        for name, mine, its in (('n', s.n, problem.n), ('horizon', s.horizon, problem.horizon)):
            if mine != its:
                raise ValueError(f'the network has {name} = {mine}, the problem {its}')
        acted_on = list(range(problem.n)[problem.position])
        if s.spheres and acted_on != list(range(s.spatial)):
            raise ValueError(f'the network measures spheres from the first {s.spatial} numbers of the state, the '
                             f'problem from those at {acted_on}')
        if motion is not None:
            motion.check_fits(problem)
        self.problem, self.network, self.settings, self.motion = problem, network, settings, motion
        self._solvers: dict[realtime.Settings | al.Settings, realtime.RealtimeSolver] = {}

    def forward(self, x_init: Tensor, u_ref: Tensor, centers: Tensor | None = None, radii: Tensor | None = None,
                warm_start: WarmStart | None = None, iterations: int | None = None,
                velocity: Tensor | None = None, finish: bool = False) -> Iterates:
        """Plan for a batch. x_init (B, n); u_ref (B, T, m) inputs that cost nothing; radii (B, K) of spheres whose
        centers (B, K, d) stand still or, with `velocity` (B, K, d), move (see the top of the file), or are known at
        every knot, (B, T+1, K, d); all in the solver's type (float64). `warm_start` is taken as it stands: shift it
        first. `iterations` replaces the settings' N. `finish` solves last plans that have not converged to the
        tolerance, on the CPU and without gradient. ValueError for wrong shapes, never an error for numbers."""
        s, T = self.settings, self.problem.horizon
        count = iterations or (s.iterations if warm_start is None else s.warm_iterations)
        if s.method == 'diff_mpc':
            count = 1
        data = self.problem.instances(x_init, x_init.unsqueeze(1).expand(-1, T + 1, -1), u_ref,
                                      at_knots(self.problem, centers, velocity), radii)
        settings = s.solver()
        if warm_start is None:
            start, z, motion = al.cold_start(self.problem, data, settings), None, None
        else:
            start, z, motion = self._warm(warm_start, data, settings, count), warm_start.z, warm_start.motion
        tau = start.x
        made = Iterates(radii=data.radii)
        for i in range(count):
            look_at = x_init.unsqueeze(1).expand_as(tau) if s.method == 'diff_mpc' else tau
            if self.motion is not None and velocity is not None:
                motion = self.motion(x_init, look_at, centers, velocity, data.radii, motion)
                data = replace(data, centers=motion.centers)
                made.motions.append(motion)
            prediction = self.network(x_init, look_at, data.centers, data.radii, z)
            aim = replace(data, x_ref=prediction.theta.to(x_init.dtype))
            solution = self._solve(aim, start, settings)
            if finish and i + 1 == count:
                solution = self._finished(aim, solution)
            made.theta.append(prediction.theta)
            made.x.append(solution.x)
            made.u.append(solution.u)
            made.predictions.append(prediction)
            made.solutions.append(solution)
            tau, z = solution.x, prediction.z
            start = self._carried(solution, start)
            if i + 1 < count:
                start = replace(start, mu=torch.where(solution.converged, start.mu, start.mu * s.gamma).clamp_max(
                    s.mu_max))
        made.warm_start = WarmStart(start, z, None if motion is None else motion.detached())
        return made

    def _solve(self, data: Instances, start: al.WarmStart, settings: al.Settings) -> al.Solution:
        """al.solve; on the CPU by its compiled twin where there is one, with al.solve's gradient."""
        x_init = data.x_init
        if not (self.settings.compiled and x_init.device.type == 'cpu' and x_init.dtype == torch.float64):
            return al.solve(self.problem, data, start, settings)
        return self._solver(settings, data.radii.shape[1]).solve_batch(data, start)

    @torch.no_grad()
    def _finished(self, data: Instances, solution: al.Solution) -> al.Solution:
        """`solution` with its unconverged samples solved on, where that comes nearer to the constraints, and those
        whose constraints give way by more than `give` solved at a higher price, where that gives way by less."""
        s = self.settings
        ends = torch.tensor([al.STATUS.index(status) for status in s.ends()])

        def nearer(found, before, rows):
            ended = torch.isin(found.status, ends)
            return ended | (_residual(found) < _residual(before)[rows]), ended

        def harder(found, before, rows):
            better = (found.defect <= s.tolerance) & (found.violation < before.violation[rows])
            return better, better & (found.violation <= s.give)
        solution = self._retried(data, solution, ~solution.converged, s.finisher(), nearer)
        return self._retried(data, solution, solution.violation > s.give, s.harder(), harder)

    def _retried(self, data: Instances, solution: al.Solution, which: Tensor, settings: realtime.Settings,
                 judge: Callable[[al.Solution, al.Solution, Tensor], tuple[Tensor, Tensor]]) -> al.Solution:
        """`solution` with its samples `which` (B,) solved with these settings, from where they are and then, unless
        that was enough, from standing. `judge(found, before, rows)`: which of the answers for `rows` of `before` are
        taken, and which are enough."""
        rows = which.nonzero()[:, 0]
        for start in (solution.warm_start, None):
            if len(rows) == 0:
                break
            solver = self._solver(settings, data.radii.shape[1])
            found = solver.solve_batch(data[rows], None if start is None else start[rows])
            taken, enough = judge(found, solution, rows)
            solution = self._replaced(solution, rows[taken], found, taken)
            rows = rows[~enough]
        return solution

    @staticmethod
    def _replaced(solution: al.Solution, rows: Tensor, found: al.Solution, which: Tensor) -> al.Solution:
        """`solution` with `rows` taken from those of `found`."""
        def put(name):
            return getattr(solution, name).index_copy(0, rows, getattr(found, name)[which])
        changed = {name: put(name) for name in ('x', 'u', 'status', 'defect', 'violation', 'cost')}
        warm = replace(solution.warm_start, x=changed['x'], u=changed['u'])  # multipliers of another method stay out
        steps = solution.steps.index_add(0, rows, found.steps[which])
        return replace(solution, warm_start=warm, steps=steps, **changed)

    def _solver(self, settings: realtime.Settings | al.Settings, spheres: int) -> realtime.RealtimeSolver:
        """The compiled solver with these settings, kept."""
        solver = self._solvers.get(settings)
        if solver is None or solver.problem is not self.problem or solver.spheres_max < spheres:
            solver = self._solvers[settings] = realtime.RealtimeSolver(self.problem, max(spheres, 64), settings)
        return solver

    def _warm(self, warm_start: WarmStart, data: Instances, settings: al.Settings, count: int) -> al.WarmStart:
        """tau from before, first knot on x_init; multipliers zero; the penalty high enough for what is to come."""
        cold, old = al.cold_start(self.problem, data, settings), warm_start.solver
        x = torch.cat([cold.x[:, :1], old.x[:, 1:]], dim=1)
        return replace(cold, x=x, u=old.u, mu=torch.full_like(cold.mu, self.settings.warm_penalty(count)))

    @staticmethod
    def _carried(solution: al.Solution, before: al.WarmStart) -> al.WarmStart:
        """The solver's state; where it is not finite, the one before."""
        known = torch.isfinite(solution.cost)
        return al.WarmStart(*(torch.where(known.view(-1, *[1] * (new.dim() - 1)), new, old)
                              for new, old in zip(solution.warm_start.tensors(), before.tensors(), strict=True)))


def _residual(solution: al.Solution) -> Tensor:
    """(B,) largest violation of dynamics and constraints; inf where there is no solution."""
    return torch.maximum(solution.defect, solution.violation).nan_to_num(nan=float('inf'))


class Controller:
    """The model for one sample: compiled network, compiled solver, NumPy in and out; the numbers of `DeqMpc`.

    Takes the model's weights as they are now. Owns its buffers: one thread at a time.
    """

    def __init__(self, model: DeqMpc, storage: str = 'float32'):
        self.problem, self.settings = model.problem, model.settings
        self.network = Inference(model.network, storage)
        self.motion = None if model.motion is None else Forecaster(model.motion, storage)
        self._times = self.problem.dt * np.arange(self.problem.horizon + 1)
        self._make_solvers(64)

    def _make_solvers(self, spheres_max: int) -> None:
        s = self.settings
        self._solver, self._finisher = (realtime.RealtimeSolver(self.problem, spheres_max, settings)
                                        for settings in (s.solver(), s.finisher()))
        self._harder = None if s.give == float('inf') else realtime.RealtimeSolver(self.problem, spheres_max,
                                                                                   s.harder())

    def step(self, x_init: np.ndarray, u_ref: np.ndarray, centers: np.ndarray, radii: np.ndarray,
             warm_start: Step | None = None, iterations: int | None = None,
             velocity: np.ndarray | None = None) -> Step:
        """One control step. x_init (n,), u_ref (T, m), spheres radii (K,) and centers (T+1, K, d), or (K, d) with
        `velocity` (K, d). `warm_start` is taken as it stands: shift it first. ValueError for wrong shapes, never an
        error for numbers."""
        s = self.settings
        count = iterations or (s.iterations if warm_start is None else s.warm_iterations)
        if s.method == 'diff_mpc':
            count = 1
        if len(radii) > self._solver.spheres_max:
            self._make_solvers(2 * len(radii))
        standing = np.repeat(x_init[None], self.problem.horizon + 1, axis=0)
        if warm_start is None:
            start, z, motion = realtime.WarmStart(standing, u_ref), None, None
        else:
            x = np.concatenate([x_init[None], warm_start.x[1:]])
            start, z = realtime.WarmStart(x, warm_start.u, mu=s.warm_penalty(count)), warm_start.z
            motion = warm_start.motion
        now = centers
        if velocity is not None:
            centers = constant_velocity(now, velocity, self._times)
        evaluations = steps = 0
        for i in range(count):
            look_at = standing if s.method == 'diff_mpc' else start.x
            if self.motion is not None and velocity is not None:
                motion = self.motion(x_init, look_at, now, velocity, radii, motion)
                centers = motion.centers
            answer = self.network(x_init, look_at, centers, radii, z)
            solution = self._solver.solve(x_init, answer.theta, u_ref, centers, radii, start)
            evaluations, steps, z = evaluations + answer.evaluations, steps + solution.steps, answer.z
            if not answer.ok:
                return Step(solution.x, solution.u, None, answer.theta, solution.status.value, steps, evaluations,
                            float('nan'), float('nan'))
            if solution.status is al.Status.NOT_FINITE:
                break
            start = solution.warm_start
            if i + 1 < count and solution.status is not al.Status.CONVERGED:
                start = start._replace(mu=min(start.mu * s.gamma, s.mu_max))

        def nearer(found, before):
            ended = found.status in s.ends()
            return ended or found.residual < before.residual or before.status is al.Status.NOT_FINITE, ended

        def harder(found, before):
            better = found.defect <= s.tolerance and found.violation < before.violation
            return better, better and found.violation <= s.give
        given = x_init, answer.theta, u_ref, centers, radii
        if solution.status is not al.Status.CONVERGED:
            solution, more = _retried(self._finisher, given, solution, start, nearer)
            steps += more
        if solution.violation > s.give:
            solution, more = _retried(self._harder, given, solution, solution.warm_start, harder)
            steps += more
        return Step(solution.x, solution.u, z, answer.theta, solution.status.value, steps, evaluations,
                    solution.defect, solution.violation, motion)


def _retried(solver: realtime.RealtimeSolver, given: tuple, solution: realtime.Solution, start: realtime.WarmStart,
             judge: Callable[[realtime.Solution, realtime.Solution], tuple[bool, bool]],
             ) -> tuple[realtime.Solution, int]:
    """`DeqMpc._retried` for one sample, and how many steps it took."""
    steps = 0
    for begin in (start, None):
        found = solver.solve(*given, begin)
        steps += found.steps
        taken, enough = judge(found, solution)
        if taken:
            solution = found
        if enough:
            break
    return solution, steps


class DeqMpcPolicy(LearnedPolicy):
    """The policy `deq_mpc`: any of the four variants, as the model folder says."""

    name = 'deq_mpc'

    def _controller(self, made: Model, problem: Problem) -> Controller:
        given = self.settings
        own = settings_of(Settings, made.method, f'{given.model}: method')
        changed = {name: value for name in ('iterations', 'warm_iterations') if (value := getattr(given, name))}
        return Controller(DeqMpc(problem, made.network, replace(own, **changed), made.motion), given.storage)


def imitation_loss(iterates: Iterates, x_expert: Tensor, network_share: float = 0.1, centers: Tensor | None = None,
                   motion_share: float = 1.0) -> tuple[Tensor, int]:
    """Mean over samples of sum_i |x^i - x_expert|_1 + network_share |theta^i - x_expert|_1 (sums over knots and
    states), x_expert (B, T+1, n; NaN: not known, left out), and how many (sample, iterate) pairs were left out because
    they are not finite or have no gradient.

    Where the iterates predict motion, `centers` (B, T+1, K, d) says where the spheres will be, and motion_share times
    the mean over present spheres of |o^i - centers|_1 (sum over knots and coordinates, m) is added: with 1, the spheres
    together count like the drone's position."""
    if iterates.motions and centers is None:
        raise ValueError('these iterates predict the motion of spheres: their true centers must be given')
    total, left_out = x_expert.new_zeros(()), 0
    for i, (x, theta) in enumerate(zip(iterates.x, iterates.theta, strict=True)):
        usable = iterates.usable(i)
        left_out += int((~usable).sum())
        rows = usable.nonzero()[:, 0]
        if len(rows) < len(usable):
            x, theta, target = x[rows], theta[rows], x_expert[rows]
        else:
            target = x_expert
        total = total + distance(x, target).sum() + network_share * distance(theta.to(target), target).sum()
        if iterates.motions:
            total = total + motion_share * _motion_error(iterates.motions[i], centers, iterates.radii)[rows].sum()
    return total / x_expert.shape[0], left_out


def distance(x: Tensor, target: Tensor) -> Tensor:
    """(B,) sums of |x - target| over knots and states, both (B, T+1, n), without those where target is NaN."""
    return torch.where(target.isnan(), 0.0, x - target).abs().sum(dim=(1, 2))


def _motion_error(motion: Motion, centers: Tensor, radii: Tensor) -> Tensor:
    """(B,) mean over the spheres that are there of the L1 error of their predicted centres."""
    there = (radii > 0) & motion.ok
    error = torch.where(there[:, None, :, None], motion.centers - centers, 0.0).abs().sum(dim=(1, 2, 3))
    return error / there.sum(dim=1).clamp_min(1)
