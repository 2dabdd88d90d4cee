"""The policy `mpc_only` as a function of numbers that may be tuned: what it does, and how that changes with them.

  u = pi(x, spheres; theta)        thrusts over the hover thrust of the plant's airframe

theta are settings of deqmpc.policies.mpc_only (weights, margin, speeds of the reference) and numbers of the model's
airframe: `mass` (kg) and `drag`, a factor of its drag along all axes. `write` puts them into the two files that a
flight reads.

`Tunable` is the policy's twin for batches: the same reference and problem, solved by the same interior-point method,
with the model's mass and drag as states that stand still,

  (x, rho, delta)' = (f(x, u; rho, delta), 0, 0)      rho = mass / mass_0, delta = drag / drag_0
  v' = (a + g e_z) / rho - g e_z + delta / rho a_drag     a: acceleration without drag, a_drag: by drag alone, both of
                                                          the first airframe

and inputs in hover thrusts of mass_0, so that one compiled solver serves every theta. Hovering takes u = rho, and the
input weight per (hover thrust)^2 is R / rho^2. Weights, margin and reference enter as data of the instance.

d pi/dx and d pi/dtheta come from the implicit function theorem at the plan, by the augmented Lagrangian started there
(deqmpc.realtime.batch): the derivative with respect to the initial state is also that with respect to rho and delta.
What is piecewise constant has none: which ray of the fan the reference follows, and on which side of a sphere the plan
passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from deqmpc import realtime, yaml_file
from deqmpc.airframe import GRAVITY, Airframe
from deqmpc.baselines import MpcOnlyPlanner
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.equations import Scalars
from deqmpc.planners import Planned, largest_violation, rows_of
from deqmpc.policies.base import settings_from
from deqmpc.policies.mpc_only import Settings as PolicySettings
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.tasks import Spheres, Task
from deqmpc.tasks.crazyflie import GOAL

WEIGHTS = ('position_weight', 'attitude_weight', 'velocity_weight', 'rate_weight')  # of three states each
SETTINGS = (*WEIGHTS, 'input_weight', 'margin', 'cruise_speed', 'slow_down')  # of the policy
MODEL = ('mass', 'drag')  # of its airframe
PARAMETERS = (*MODEL, *SETTINGS)
POLICY_FILE, AIRFRAME_FILE = 'policy.yaml', 'airframe.yaml'
JUMP = 0.3  # m or MRP from the last plan's next knot, from which on a plan starts cold; as in mpc_only


@dataclass(frozen=True)
class ScaledCrazyflie:
    """The Crazyflie with the states mass / mass_0 and drag / drag_0 behind its own, see the top of the file."""

    airframe: Airframe  # mass_0, drag_0
    n = 14
    m = 4

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (14 scalars) at state x and inputs u in hover thrusts of mass_0."""
        own, inverse, delta = x[:12], 1.0 / x[12], x[13]
        free = Crazyflie(replace(self.airframe, drag=(0.0, 0.0, 0.0))).derivative(own, u)
        full = Crazyflie(self.airframe).derivative(own, u)
        fall = (0.0, 0.0, GRAVITY)
        v = [(free[6 + i] + fall[i]) * inverse - fall[i] + delta * inverse * (full[6 + i] - free[6 + i])
             for i in range(3)]
        return [*free[:6], *v, *free[9:], 0.0 * x[12], 0.0 * x[13]]


@dataclass(frozen=True)
class Derivatives:
    """Of pi at B states."""

    by_x: Tensor  # (B, 4, 12)
    by_theta: Tensor  # (B, 4, p) in the units of theta
    ok: Tensor  # (B,) bool; False: no derivative here, it is 0


@dataclass(frozen=True)
class Calls:
    """B calls of the policy: what it saw, and what it made of that. Also what it remembers from one to the next."""

    x: Tensor  # (B, 12)
    spheres: Spheres
    ray: Tensor  # (B, 3) direction of its reference, seen along the way to the goal
    plan: al.WarmStart  # in the twin's states and inputs
    ok: Tensor  # (B,) bool: the plan is finite

    def __getitem__(self, rows: Tensor) -> Calls:
        """Some of them."""
        return rows_of(self, rows)


class Tunable:
    """`mpc_only` on a Crazyflie's task. `settings` are those of a policy file (what they leave out has its default;
    the goal is the task's), `frame` is its model's airframe before tuning. ValueError names what cannot be used."""

    def __init__(self, task: Task, settings: Mapping[str, Any], frame: Airframe, names: Sequence[str]):
        for name in names:
            if name not in PARAMETERS:
                raise ValueError(f'parameter {name!r}; expected some of: {", ".join(PARAMETERS)}')
        if not names or len(set(names)) < len(names):
            raise ValueError(f'parameters {", ".join(names) or "(none)"}; expected at least one, each once')
        self.task, self.frame, self.names = task, frame, tuple(names)
        self.given = {k: v for k, v in settings.items() if k not in ('goal', 'airframe')}
        self.settings = s = settings_from(PolicySettings, self.given, 'mpc_only')
        self.first = torch.tensor([self._first(name) for name in names], dtype=torch.float64)
        for name, value in zip(names, self.first.tolist(), strict=True):
            if value <= 0.0:
                raise ValueError(f'{name} = {value} before tuning; expected a number > 0, as it moves by factors')
        if s.dt != task.dt:
            raise ValueError(f'the policy plans in steps of {s.dt} s, the task {task.name} in {task.dt} s; expected '
                             f'equal ones')
        self.policy = MpcOnlyPlanner(task, **in_task_frame(s)).policy
        self.problem, self.times = self._problem(), s.dt * torch.arange(s.horizon + 1, dtype=torch.float64)
        self.to_plant = frame.hover_thrust / task.equations.airframe.hover_thrust
        self._solver = RealtimeSolver(self.problem, s.spheres_max, realtime.Settings(
            tolerance=1e-4, feasibility=1e-3, elastic=s.softness, max_steps=s.max_steps))
        self._exact = RealtimeSolver(self.problem, s.spheres_max, al.Settings(
            feasibility=1e-10, optimality=1e-16, elastic=s.softness, iterations=20, gn_steps=20, max_steps=200))

    def _first(self, name: str) -> float:
        return {'mass': self.frame.mass, 'drag': 1.0}[name] if name in MODEL else getattr(self.settings, name)

    def _problem(self) -> Problem:
        """The policy's problem with two states more, in hover thrusts of the first airframe."""
        p, f = self.policy.problem, self.frame
        return Problem(
            ScaledCrazyflie(f), p.dt, p.horizon, Q=[*p.Q.tolist(), 0.0, 0.0], R=p.R, Qf=[*p.Qf.tolist(), 0.0, 0.0],
            u_low=[f.thrust_min / f.hover_thrust] * 4, u_high=[f.thrust_max / f.hover_thrust] * 4,
            x_low=[*p.x_low.tolist(), -np.inf, -np.inf], x_high=[*p.x_high.tolist(), np.inf, np.inf])

    def write(self, folder: Path, theta: Tensor, comment: str = '') -> None:
        """The policy file with theta (p,) and its airframe file, each beginning with `comment`."""
        found = dict(zip(self.names, theta.tolist(), strict=True))
        frame = replace(self.frame, mass=found.get('mass', self.frame.mass),
                        drag=tuple(d * found.get('drag', 1.0) for d in self.frame.drag))
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(frame).items()}
        settings = {**self.given, **{k: v for k, v in found.items() if k in SETTINGS}, 'airframe': AIRFRAME_FILE}
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in ((AIRFRAME_FILE, plain), (POLICY_FILE, settings)):
            (folder / name).write_text(comment + yaml.safe_dump(values, sort_keys=False))

    @torch.no_grad()
    def call(self, theta: Tensor, x: Tensor, spheres: Spheres, before: Calls | None) -> tuple[Calls, al.Solution]:
        """What the policy with theta (p,) makes of x (B, 12), one control step after `before`."""
        theta = theta.expand(len(x), -1)
        ray = self._rays(x, spheres, self._margin(theta, spheres))
        data = self.instances(x, theta, spheres, ray)
        u_ref, model = data.u_ref, data.x_init[:, 12:].unsqueeze(1).expand(-1, len(self.times), -1)
        cold = torch.cat([data.x_ref[:, :, :12], model], dim=2)
        start = al.guess(self.problem, data, torch.cat([data.x_init.unsqueeze(1), cold[:, 1:]], dim=1), u_ref,
                         al.Settings())
        if before is not None:
            old = before.plan.shifted()
            near = before.ok & ((old.x[:, 0, :6] - x[:, :6]).abs().amax(dim=1) <= JUMP)
            start = replace(start, x=al.select(near, torch.cat([start.x[:, :1], old.x[:, 1:]], dim=1), start.x),
                            u=al.select(near, old.u, start.u))
        found = self._solver.solve_batch(data, start)
        return Calls(x, spheres, ray, found.warm_start, torch.isfinite(found.cost)), found

    def derivatives(self, theta: Tensor, calls: Calls) -> Derivatives:
        """Of pi at the calls of the policy with theta (p,)."""
        x = calls.x.clone().requires_grad_()
        numbers = theta.expand(len(x), -1).clone().requires_grad_()
        found = self.exact(x, numbers, calls)
        u = self.to_plant * found.u[:, 0]
        rows = [torch.autograd.grad(u[:, i].sum(), (x, numbers), retain_graph=True) for i in range(u.shape[1])]
        by_x, by_theta = (torch.stack([row[i] for row in rows], dim=1) for i in range(2))
        ok = calls.ok & found.differentiable & torch.isfinite(by_x.sum((1, 2)) + by_theta.sum((1, 2)))
        keep = ok.view(-1, 1, 1)
        return Derivatives(torch.where(keep, by_x, 0.0), torch.where(keep, by_theta, 0.0), ok)

    def exact(self, x: Tensor, theta: Tensor, calls: Calls) -> al.Solution:
        """The plans at x (B, 12) with theta (B, p), next to those of `calls`, with their implicit gradient."""
        data = self.instances(x, theta, calls.spheres, calls.ray)
        return self._exact.solve_batch(data, replace(calls.plan, mu=torch.full_like(calls.plan.mu, 1e4)))

    def instances(self, x: Tensor, theta: Tensor, spheres: Spheres, ray: Tensor) -> Instances:
        """The policy's problems at x (B, 12) with theta (B, p), their references along `ray` (B, 3), see Calls."""
        B, T, value = len(x), self.problem.horizon, self._value(theta)
        rho, delta = value('mass') / self.frame.mass, value('drag')
        model = torch.stack([rho, delta], dim=1)
        Q = torch.cat([torch.stack([value(name) for name in WEIGHTS], dim=1).repeat_interleave(3, dim=1),
                       torch.zeros_like(model)], dim=1)
        R = (value('input_weight') / rho.square()).unsqueeze(1).expand(B, 4)
        x_ref = torch.cat([self._reference(x, value, ray), x.new_zeros(B, T + 1, 2)], dim=2)
        return self.problem.instances(torch.cat([x, model], dim=1), x_ref, rho.view(-1, 1, 1).expand(B, T, 4),
                                      spheres.ahead(self.times), self._margin(theta, spheres), Q=Q, R=R, Qf=3.0 * Q)

    def _value(self, theta):
        """name -> (B,) number: tuned ones from theta (B, p), the others as they are."""
        columns = dict(zip(self.names, theta.unbind(1), strict=True))
        return lambda name: columns[name] if name in columns else theta.new_full((len(theta),), self._first(name))

    def _margin(self, theta, spheres) -> Tensor:
        """Radii (B, K) with the margin of theta (B, p)."""
        return torch.where(spheres.radii > 0, spheres.radii + self._value(theta)('margin').unsqueeze(1), 0.0)

    def _rays(self, x, spheres, radii) -> Tensor:
        """(B, 3) in which direction the policy's references run, see Calls; 0 at the goal."""
        made = np.zeros((len(x), 3))
        centers = spheres.ahead(self.times).numpy()
        for i, (state, yaw) in enumerate(zip(x.numpy(), heading(x[:, 3:6]).tolist(), strict=True)):
            way = self.policy.reference(state, yaw, centers[i], radii[i].numpy())[-1, :3] - state[:3]
            made[i] = way / max(np.linalg.norm(way), 1e-12)
        return (frame_to_goal(x).transpose(1, 2) @ torch.from_numpy(made).unsqueeze(2)).squeeze(2)

    def _reference(self, x, value, ray) -> Tensor:
        """(B, T+1, 12): MpcOnly.reference, differentiable, with the goal at the origin."""
        distance, dt = x[:, :3].norm(dim=1), self.problem.dt
        left, way, speeds = distance, [], []
        for _ in self.times:
            speed = torch.minimum(value('cruise_speed'), (2.0 * value('slow_down') * left.clamp_min(1e-18)).sqrt())
            way.append(distance - left)
            speeds.append(speed)
            left = left - torch.minimum(speed * dt, left)
        along = (frame_to_goal(x) @ ray.unsqueeze(2)).transpose(1, 2)
        position = x[:, None, :3] + torch.stack(way, dim=1).unsqueeze(2) * along
        velocity = torch.stack(speeds, dim=1).unsqueeze(2) * along
        yaw, rate = heading(x[:, 3:6]).unsqueeze(1), self.settings.yaw_rate
        left = torch.sign(yaw) * (yaw.abs() - rate * self.times).clamp_min(0.0)
        zero = torch.zeros_like(left)
        return torch.cat([position, torch.stack([zero, zero, torch.tan(0.25 * left)], dim=2), velocity,
                          torch.stack([zero, zero, -rate * torch.sign(left)], dim=2)], dim=2)


class TunedPlanner:
    """deqmpc.planners.Planner: the policy with theta (p,). Its memory is the last call."""

    def __init__(self, tunable: Tunable, theta: Tensor):
        self.tunable, self.theta = tunable, theta

    def plan(self, x: Tensor, spheres: Spheres, memory: Calls | None = None) -> Planned:
        """See deqmpc.planners.Planner."""
        t = self.tunable
        calls, found = t.call(self.theta, x, spheres, memory)
        u_ref = t.task.u_ref.expand(len(x), t.problem.horizon, -1)
        data = t.problem.instances(found.x[:, 0], found.x, u_ref, spheres.ahead(t.times), spheres.radii)
        violation = largest_violation(t.problem, data, found.x, found.u, calls.ok)
        u = torch.where(calls.ok.unsqueeze(1), t.to_plant * found.u[:, 0], t.task.u_ref)
        return Planned(u, found.x[:, :, :12], calls.ok, violation, found.defect, calls)


def flight_planner(task: Task, folder: Path) -> MpcOnlyPlanner:
    """The policy `mpc_only` of the files that `Tunable.write` put into `folder`, as it flies."""
    path = folder / POLICY_FILE
    settings = settings_from(PolicySettings, yaml_file.load(path), str(path))
    return MpcOnlyPlanner(task, **in_task_frame(settings), airframe=str(folder / settings.airframe))


def in_task_frame(settings: PolicySettings) -> dict[str, Any]:
    """The settings but goal and airframe, as in a frame with the goal at the origin."""
    given = asdict(replace(settings, floor=settings.floor - GOAL[2]))
    return {k: v for k, v in given.items() if k not in ('goal', 'airframe')}


def joined(parts: Sequence[Any]) -> Any:
    """Tensors, or dataclasses of them such as Calls and Spheres, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return replace(parts[0], **{f.name: joined([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})


def heading(m: Tensor) -> Tensor:
    """(B,) yaw (rad) of the attitudes m (B, 3), MRPs: deqmpc.dynamics.rotation.yaw, differentiable."""
    x, y, z = (2.0 * m).unbind(1)
    w, scale = 1.0 - m.square().sum(1), 1.0 + m.square().sum(1)
    return torch.atan2(2.0 * (w * z + x * y), scale.square() - 2.0 * (y * y + z * z))


def frame_to_goal(state: Tensor) -> Tensor:
    """(B, 3, 3) rotations whose first columns point from the states (B, 12) to the goal; the second ones are level."""
    direction = -state[:, :3] / state[:, :3].norm(dim=1, keepdim=True).clamp_min(1e-9)
    x, y, z = direction.unbind(1)
    norm = (x * x + y * y).clamp_min(1e-12).sqrt()
    upright = norm <= 1e-6
    a, b = torch.where(upright, 0.0, -y / norm), torch.where(upright, 1.0, x / norm)
    rows = (x, a, -z * b), (y, b, z * a), (z, torch.zeros_like(z), x * b - y * a)
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
