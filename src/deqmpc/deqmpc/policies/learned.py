"""Learned policies in flight: from a drone's state and spheres to a plan, around a one-sample controller.

The model lives in the goal's frame: origin at the goal, turned by the goal's yaw about z, so that x = 0 is hovering
there. Its dynamics are those of the Crazyflie (deqmpc.dynamics.crazyflie), its inputs thrusts over hover thrust.
Spheres keep their velocity up to the last knot, or move as the model's motion network says, where it has one
(deqmpc.networks.obstacle_motion); every radius grows by `margin`.

Offset-free hovering. Every plan starts at the measured state, so a force that the model does not know (a trim error,
wind) is met only by what the plan asks for beside the goal, and the drone rests off it. Near the goal the aim g + b,
in whose frame everything is planned, therefore integrates the error: b <- clip(b + integral dt (g - p), limit).
Spheres stay where they are in the world; the floor moves by b.

A warm start is the last plan, shifted by the knots that have passed since; where it does not fit the new state (a jump,
another set of MRPs, too long ago) the call starts cold.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.networks.obstacle_motion import Forecast
from deqmpc.policies import model
from deqmpc.policies.base import PolicyStatus, check_shapes, refused, settings_from
from deqmpc.problem import Problem
from deqmpc.types import Obstacles, Plan, RigidBodyState


@dataclass(frozen=True)
class Settings:
    """Settings of the policies `deq_mpc` and `network_only`."""

    model: str = 'models/crazyflie_obs'  # folder of a trained model (deqmpc.policies.model)
    goal: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 0.0)  # x, y, z (m, world), yaw (rad)
    margin: float = 0.05  # m kept from every sphere's surface at the knots
    floor: float = 0.15  # m, lowest planned height
    iterations: int = 0  # of a cold start; 0: the model's
    warm_iterations: int = 0  # of a warm-started step; 0: the model's
    storage: str = 'float32'  # of the network's weights: float32 or float16
    integral: float = 0.4  # 1/s, how fast the aim moves against a lasting offset; 0: never
    integral_limit: float = 0.1  # m, farthest that it moves along each axis
    integral_radius: float = 0.3  # m from the goal within which it moves, below as many m/s
    tolerance: float = 1e-2  # largest defect and input-bound violation of a plan that may be flown
    airframe: str = ''  # YAML file of deqmpc.airframe; empty: its defaults

    def __post_init__(self):
        for name in ('margin', 'tolerance', 'integral', 'integral_limit', 'integral_radius'):
            if not 0.0 <= getattr(self, name) < 1e3:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number >= 0')
        for name in ('iterations', 'warm_iterations'):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected an integer in 0..1000')
        if not np.isfinite((*self.goal, self.floor)).all():
            raise ValueError(f'goal = {self.goal!r}, floor = {self.floor!r}; expected finite numbers')


@dataclass(frozen=True)
class CrazyflieProblem:
    """`problem` of a model that flies a Crazyflie: what it was trained on. Weights are of the tracking cost."""

    position_weight: float = 10.0  # per m^2
    attitude_weight: float = 10.0  # per MRP^2
    velocity_weight: float = 1.0  # per (m/s)^2
    rate_weight: float = 0.1  # per (rad/s)^2
    input_weight: float = 0.1  # per (hover thrust)^2
    max_speed: float = 1.0  # m/s along each axis

    def build(self, frame: Airframe, dt: float, horizon: int, floor: float = -np.inf) -> Problem:
        """The problem; `floor` (m) is the lowest z, relative to the goal."""
        weights = self.position_weight, self.attitude_weight, self.velocity_weight, self.rate_weight
        free, speed = [np.inf] * 3, [self.max_speed] * 3
        lowest, highest = frame.thrust_min / frame.hover_thrust, frame.thrust_max / frame.hover_thrust
        return Problem(Crazyflie(frame), dt, horizon, Q=[w for w in weights for _ in range(3)],
                       R=[self.input_weight] * 4, u_low=[lowest] * 4, u_high=[highest] * 4,
                       x_low=[-np.inf, -np.inf, floor, *[-np.inf] * 3, *[-v for v in speed], *[-np.inf] * 3],
                       x_high=[*free, *free, *speed, *free])


@dataclass(frozen=True)
class Step:
    """What one control step made: the plan, how it came about, and the warm start for the next."""

    x: np.ndarray  # (T+1, n); NaN where not finite
    u: np.ndarray  # (T, m)
    z: np.ndarray | None  # (T, h) equilibrium of the network, where it has one
    theta: np.ndarray  # (T+1, n) the network's last answer
    message: str  # how the solver ended
    steps: int  # Gauss-Newton steps
    evaluations: int  # of the network's cell
    defect: float  # largest violation of the dynamics
    violation: float  # largest violation of a bound or sphere
    motion: Forecast | None = None  # last prediction of the spheres' motion, where there is a network for it

    def shifted(self, steps: int) -> Step:
        """Advanced by `steps` knots, the last knot repeated; what networks carry stays (deqmpc.policies.deq_mpc)."""
        def shift(v):
            return np.concatenate([v[steps:], np.repeat(v[-1:], min(steps, len(v)), axis=0)])
        return replace(self, x=shift(self.x), u=shift(self.u), theta=shift(self.theta))


class StepController(Protocol):
    """A one-sample controller, such as deqmpc.policies.deq_mpc.Controller."""

    def step(self, x_init: np.ndarray, u_ref: np.ndarray, centers: np.ndarray, radii: np.ndarray,
             warm_start: Step | None = None, iterations: int | None = None,
             velocity: np.ndarray | None = None) -> Step:
        """One control step."""


@dataclass(frozen=True)
class WarmStart:
    """The last step and the instant of its first knot."""

    stamp: float  # s
    step: Step
    shift: np.ndarray = field(default_factory=lambda: np.zeros(3))  # b, (3,) m, world


class LearnedPolicy:
    """A policy around a model folder. Attributes name, dt (s), horizon."""

    name: str

    def __init__(self, settings: Settings = Settings()):
        s = self.settings = settings
        made = model.load(s.model)
        network = made.network.settings
        if network.n != Crazyflie.n or (network.spheres and network.spatial != 3):
            raise ValueError(f'{s.model}: its states have {network.n} numbers and its spheres {network.spatial}; a '
                             f'model that flies a Crazyflie has {Crazyflie.n} and 3')
        self.dt, self.horizon = network.dt, network.horizon
        frame = Airframe.load(s.airframe) if s.airframe else Airframe()
        problem = model.settings_of(CrazyflieProblem, made.problem, f'{s.model}: problem')
        self.problem = problem.build(frame, self.dt, self.horizon, s.floor - s.goal[2])
        self.controller = self._controller(made, self.problem)
        self._unturn = rotation.from_yaw(s.goal[3])  # from the goal's frame to the world
        self._turn = rotation.rotate(self._unturn, np.eye(3))  # rows: the turned axes; world to goal's frame
        self._goal = np.array(s.goal[:3])
        self._u_ref = np.ones((self.horizon, Crazyflie.m))

    @abstractmethod
    def _controller(self, made: model.Model, problem: Problem) -> StepController:
        """The controller of this policy for a loaded model."""

    @classmethod
    def from_settings(cls, values: dict[str, Any]):
        """From a mapping, as YAML gives it. ValueError names what is wrong; FileNotFoundError a missing file."""
        settings = settings_from(Settings, values, cls.name)
        try:
            return cls(settings)
        except ValueError as error:
            raise ValueError(f'{cls.name}: {error}') from error

    def plan(self, state: RigidBodyState, obstacles: Obstacles,
             warm_start: WarmStart | None = None) -> tuple[Plan | None, WarmStart | None, PolicyStatus]:
        """See deqmpc.policies.base.Policy."""
        check_shapes(state, obstacles)
        if not state.is_finite() or np.linalg.norm(state.quaternion) < 1e-9:
            return refused('the state is not finite, or its quaternion is zero')
        if not all(np.isfinite(v).all() for v in (obstacles.position, obstacles.radius, obstacles.velocity,
                                                  obstacles.stamp)):
            return refused('an obstacle is not finite')
        shift = self._aim_shift(state, warm_start)
        aim = self._goal + shift
        x_init = self._state(state, aim)
        times = self.dt * np.arange(self.horizon + 1)
        age = state.stamp - obstacles.stamp if obstacles.velocity.any() else 0.0  # s
        centers = (obstacles.position + age * obstacles.velocity - aim) @ self._turn.T  # (K, 3) now
        step = self.controller.step(x_init, self._u_ref, centers, obstacles.radius + self.settings.margin,
                                    self._shifted(state.stamp, x_init, warm_start),
                                    velocity=obstacles.velocity @ self._turn.T)
        if not (np.isfinite(step.x).all() and np.isfinite(step.u).all()):  # cannot be flown nor seed the next call
            return None, None, PolicyStatus(False, step.message, step.steps, float('nan'))
        residual = max(step.defect, self._input_violation(step.u))
        report = PolicyStatus(bool(residual <= self.settings.tolerance), step.message, step.steps, residual)
        return self._plan(state, times, step, aim), WarmStart(state.stamp, step, shift), report

    def _aim_shift(self, state: RigidBodyState, warm_start: WarmStart | None) -> np.ndarray:
        """b (3,), see the top of the file; zero after a break."""
        if warm_start is None:
            return np.zeros(3)
        s, error = self.settings, self._goal - state.position
        dt = min(max(state.stamp - warm_start.stamp, 0.0), self.dt)
        if max(np.linalg.norm(error), np.linalg.norm(state.velocity)) > s.integral_radius:
            return warm_start.shift
        return np.clip(warm_start.shift + s.integral * dt * error, -s.integral_limit, s.integral_limit)

    def _state(self, state: RigidBodyState, aim: np.ndarray) -> np.ndarray:
        """Model state (12,) in the goal's frame, its origin at `aim`."""
        q = rotation.multiply(rotation.conjugate(self._unturn), rotation.normalize(state.quaternion))
        return np.concatenate([self._turn @ (state.position - aim), rotation.mrp_from_quaternion(q),
                               self._turn @ state.velocity, state.rates])

    def _shifted(self, stamp, x_init, warm_start) -> Step | None:
        """The last step advanced to now; None where it does not fit."""
        if warm_start is None:
            return None
        steps = round((stamp - warm_start.stamp) / self.dt)
        if not 0 <= steps <= self.horizon or warm_start.step.x.shape != (self.horizon + 1, len(x_init)):
            return None
        step = warm_start.step.shifted(steps)
        jump = float(np.abs(step.x[0] - x_init)[:6].max())
        return step if jump <= 0.3 else None  # also False for NaN

    def _input_violation(self, u) -> float:
        sign, limit = self.problem.sign[:, self.problem.n:].numpy(), self.problem.limit.numpy()
        rows = np.abs(sign).sum(axis=1) > 0
        return float(np.maximum(u @ sign[rows].T - limit[rows], 0.0).max())

    def _acceleration(self, x, u) -> np.ndarray:
        """(T+1, 3) m/s^2 in the goal's frame. The last knot has no input of its own; it keeps the one before."""
        return np.stack(self.problem.equations.derivative(x.T, np.vstack([u, u[-1:]]).T)[6:9], axis=-1)

    def _plan(self, state, times, step, aim) -> Plan:
        back, x = self._turn.T, step.x.copy()
        x[0] = self._state(state, aim)
        quaternion = rotation.multiply(self._unturn, rotation.quaternion_from_mrp(x[:, 3:6]))
        return Plan(stamp=state.stamp, time_from_start=times, position=x[:, :3] @ back.T + aim,
                    quaternion=rotation.normalize(quaternion), velocity=x[:, 6:9] @ back.T,
                    rates=x[:, 9:12].copy(), acceleration=self._acceleration(x, step.u) @ back.T)
