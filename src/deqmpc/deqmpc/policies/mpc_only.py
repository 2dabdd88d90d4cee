"""Model-predictive control without a network: straight to the goal, around every sphere.

Each call solves deqmpc.problem on the Crazyflie's model with the interior-point method of deqmpc.realtime:

  min  sum of |x_t - xr_t|_Q^2 + |u_t - 1|_R^2       xr runs towards the goal at cruise speed
  s.t. the dynamics, thrust bounds, speed limit, floor, and |p_t - o_jt| >= r_j + margin for every sphere j

Spheres move on with constant velocity to every knot. The constraints on the state are soft by the exact
l1 penalty, so that they hold wherever they can, and a start inside a margin still has a plan that leaves it.

Frame: everything is solved in the world frame turned by the goal's yaw about z, so that the goal attitude
is the MRP zero for any yaw; rates are in the body frame and do not change.

Reference: the straight line from where the drone is, at cruise speed, slower near the goal. Where spheres
block the line, its direction is replaced by the least deflected one of a fixed fan that is free (a 3-D
vector field histogram; Borenstein and Koren 1991), which also breaks the symmetry of a sphere that stands
exactly on the line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deqmpc import realtime
from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.policies.base import PolicyStatus, check_shapes, refused, settings_from
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.realtime import WarmStart as SolverStart
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point
from deqmpc.types import Obstacles, Plan, RigidBodyState


@dataclass(frozen=True)
class Settings:
    """Settings of the policy `mpc_only`."""

    goal: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 0.0)  # x, y, z (m, world), yaw (rad)
    dt: float = 0.1  # s between knots
    horizon: int = 5  # T, knots after the first
    cruise_speed: float = 0.6  # m/s along the reference
    slow_down: float = 0.6  # m/s^2, deceleration of the reference towards the goal
    max_speed: float = 1.0  # m/s along each axis
    yaw_rate: float = 1.0  # rad/s, fastest turn of the reference towards the goal's yaw
    margin: float = 0.05  # m kept from every sphere's surface at the knots
    floor: float = 0.15  # m, lowest planned height
    lookahead: float = 0.7  # m of the reference that must be free of spheres
    position_weight: float = 20.0  # per m^2
    attitude_weight: float = 2.0  # per MRP^2
    velocity_weight: float = 2.0  # per (m/s)^2
    rate_weight: float = 0.1  # per (rad/s)^2
    input_weight: float = 0.1  # per (hover thrust)^2
    softness: float = 300.0  # largest multiplier of a constraint on the state: the price of 1 m of violation
    solver: str = 'realtime'  # compiled, to 1e-4; or interior_point: deqmpc.solvers.interior_point, to 1e-8, to compare
    max_steps: int = 60  # Newton steps in one call
    spheres_max: int = 200  # most spheres that one call takes
    airframe: str = ''  # YAML file of deqmpc.airframe; empty: its defaults

    def __post_init__(self):
        for name in ('dt', 'cruise_speed', 'slow_down', 'max_speed', 'yaw_rate', 'input_weight', 'softness'):
            if not 0.0 < getattr(self, name) < 1e6:
                raise ValueError(f'mpc_only: {name} = {getattr(self, name)!r}; expected a number > 0')
        for name in ('margin', 'lookahead', 'position_weight', 'attitude_weight', 'velocity_weight',
                     'rate_weight'):
            if not 0.0 <= getattr(self, name) < 1e6:
                raise ValueError(f'mpc_only: {name} = {getattr(self, name)!r}; expected a number >= 0')
        for name in ('horizon', 'max_steps', 'spheres_max'):
            if getattr(self, name) < 1:
                raise ValueError(f'mpc_only: {name} = {getattr(self, name)!r}; expected an integer >= 1')
        if self.solver not in ('realtime', 'interior_point'):
            raise ValueError(f'mpc_only: solver = {self.solver!r}; expected realtime or interior_point')
        if self.dt * self.horizon < 0.2:  # shorter ones do not see their own braking and circle the goal
            raise ValueError(f'mpc_only: dt * horizon = {self.dt * self.horizon:g} s; expected at least 0.2 s')
        if not np.isfinite(self.goal).all():
            raise ValueError(f'mpc_only: goal = {self.goal!r}; expected finite x, y, z, yaw')


@dataclass(frozen=True)
class WarmStart:
    """The solver's state and the instant of its first knot."""

    stamp: float  # s
    solver: SolverStart


class MpcOnly:
    """The policy. Attributes name, dt (s), horizon."""

    name = 'mpc_only'

    def __init__(self, settings: Settings = Settings()):
        s = self.settings = settings
        self.dt, self.horizon = s.dt, s.horizon
        frame = Airframe.load(s.airframe) if s.airframe else Airframe()
        speed, free = [s.max_speed] * 3, [float('inf')] * 3
        weights = s.position_weight, s.attitude_weight, s.velocity_weight, s.rate_weight
        Q = [weight for weight in weights for _ in range(3)]
        lowest, highest = frame.thrust_min / frame.hover_thrust, frame.thrust_max / frame.hover_thrust
        self._input_bounds = lowest, highest
        self.problem = Problem(
            Crazyflie(frame), s.dt, s.horizon, Q=Q, R=[s.input_weight] * 4, Qf=[3.0 * q for q in Q],
            u_low=[lowest] * 4, u_high=[highest] * 4,
            x_low=[-np.inf, -np.inf, s.floor, *[-np.inf] * 3, *[-v for v in speed], *[-np.inf] * 3],
            x_high=[*free, *free, *speed, *free])
        self._solver = _solver(self.problem, s)
        yaw = s.goal[3]
        self._unturn = rotation.from_yaw(yaw)  # from the turned frame to the world
        self._turn = rotation.rotate(self._unturn, np.eye(3))  # rows: the turned axes; world to turned frame
        self._goal = self._turn @ np.array(s.goal[:3])
        self._fan = _fan()

    @classmethod
    def from_settings(cls, settings: dict) -> MpcOnly:
        """From a mapping of settings; see `deqmpc.policies.base.load_policy` for what is raised."""
        return cls(settings_from(Settings, settings, cls.name))

    def plan(self, state: RigidBodyState, obstacles: Obstacles,
             warm_start: WarmStart | None = None) -> tuple[Plan | None, WarmStart | None, PolicyStatus]:
        """See `deqmpc.policies.base.Policy.plan`."""
        check_shapes(state, obstacles)
        if not state.is_finite() or abs(np.linalg.norm(state.quaternion) - 1.0) > 0.1:
            return refused('the state is not finite or its quaternion not of unit length')
        moving = obstacles.velocity.any()
        if not all(np.isfinite(a).all() for a in (obstacles.position, obstacles.radius, obstacles.velocity,
                                                  obstacles.stamp if moving else 0.0)):
            return refused('an obstacle is not finite')

        x_init, yaw = self._turned(state)
        times = self.dt * np.arange(self.horizon + 1)
        ahead = state.stamp + times - obstacles.stamp if moving else 0.0 * times
        centers = obstacles.position + ahead[:, None, None] * obstacles.velocity  # (T+1, K, 3)
        centers = centers @ self._turn.T
        radii = obstacles.radius + self.settings.margin
        x_ref = self.reference(x_init, yaw, centers, radii)

        hover = np.ones((self.horizon, 4))
        solution = self._solver.solve(x_init, x_ref, hover, centers, radii,
                                      self._start(state.stamp, x_init, x_ref, hover, len(radii), warm_start))
        x, u = solution.x.copy(), solution.u
        x[0] = x_init  # to the last digit; what the solver left open is in `defect`
        residual = max(solution.defect, self._input_violation(u))
        message = solution.status.value
        if solution.status is al.Status.INFEASIBLE:
            message = f'margin, floor or speed limit gave way by {solution.violation:.3f} m or m/s'
        report = PolicyStatus(bool(residual <= 1e-2), message, solution.steps, residual)
        if not np.isfinite(x).all():  # cannot be flown, and must not seed the next call
            return None, None, report
        return self._plan(state, times, x, u), WarmStart(state.stamp, solution.warm_start), report

    def _turned(self, state) -> tuple[np.ndarray, float]:
        """Model state (12,) in the turned frame, and the yaw in it."""
        q = rotation.multiply(rotation.conjugate(self._unturn), rotation.normalize(state.quaternion))
        return np.concatenate([self._turn @ state.position, rotation.mrp_from_quaternion(q),
                               self._turn @ state.velocity, state.rates]), float(rotation.yaw(q))

    def reference(self, x: np.ndarray, yaw: float, centers: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """(T+1, 12) what is tracked from x (12,) with that yaw: towards the goal, around the spheres that stand in the
        way, centers (T+1, K, 3) and radii (K,) with the margin. All in the turned frame."""
        s = self.settings
        to_goal = self._goal - x[:3]
        distance = float(np.linalg.norm(to_goal))
        direction = to_goal / distance if distance > 1e-9 else np.zeros(3)
        if distance > 1e-3:
            direction = self._free_direction(x[:3], direction, min(s.lookahead, distance), centers, radii)
        left, way, speeds = distance, [], []
        for _ in range(self.horizon + 1):
            speed = min(s.cruise_speed, math.sqrt(2.0 * s.slow_down * left))
            way.append(distance - left)
            speeds.append(speed)
            left -= min(speed * self.dt, left)
        ref = np.zeros((self.horizon + 1, 12))
        ref[:, :3], ref[:, 6:9] = x[:3] + np.outer(way, direction), np.outer(speeds, direction)
        heading = np.sign(yaw) * np.maximum(abs(yaw) - s.yaw_rate * self.dt * np.arange(self.horizon + 1), 0.0)
        ref[:, 5], ref[:, 11] = np.tan(heading / 4.0), -np.sign(heading) * s.yaw_rate
        return ref

    def _free_direction(self, p, direction, length, centers, radii) -> np.ndarray:
        """The direction of the fan around `direction` with the least deflection whose ray of `length` (m)
        keeps `radii` (K,) from the spheres; the one that keeps most where none does."""
        if len(radii) == 0:
            return direction
        fan = self._fan @ _frame_along(direction).T  # (F, 3), by increasing deflection
        offset = centers[0] - p  # (K, 3)
        ahead = fan @ offset.T  # (F, K)
        along = np.minimum(np.maximum(ahead, 0.0), length)
        squared = (offset ** 2).sum(1) + along * (along - 2.0 * ahead)
        nearest = np.sqrt(np.maximum(squared, 0.0))
        # a sphere whose margin we are in already only blocks the rays that lead farther into it
        needed = np.minimum(radii, np.linalg.norm(offset, axis=1) - 1e-6)
        slack = (nearest - needed).min(axis=1)
        slack[p[2] + length * fan[:, 2] < self.settings.floor] = -np.inf
        free = slack >= 0.0
        return fan[np.argmax(free)] if free.any() else fan[np.argmax(slack)]

    def _start(self, stamp, x_init, x_ref, u_ref, count, warm_start) -> SolverStart:
        """The last solution advanced to now, or the reference where there is none that fits. `count` spheres."""
        cold = SolverStart(np.vstack([x_init, x_ref[1:]]), u_ref)
        if warm_start is None:
            return cold
        steps = round((stamp - warm_start.stamp) / self.dt)
        if not 0 <= steps <= self.horizon:
            return cold
        old = warm_start.solver.shifted(steps)
        if not np.abs(old.x[0, :6] - x_init[:6]).max() <= 0.3:
            return cold  # teleported, the other set of MRPs, or not finite
        lam = old.lam if old.lam.shape[1] == len(self.problem.limit) + count else None
        return SolverStart(np.vstack([x_init, old.x[1:]]), old.u, lam, old.eta)

    def _input_violation(self, u):
        low, high = self._input_bounds
        return max(float((low - u).max()), float((u - high).max()), 0.0)

    def _plan(self, state, times, x, u) -> Plan:
        back = self._turn.T
        # the last knot has no input of its own; it keeps the one before
        rate = np.stack(self.problem.equations.derivative(x.T, np.vstack([u, u[-1:]]).T)[6:9], axis=-1)
        quaternion = rotation.multiply(self._unturn, rotation.quaternion_from_mrp(x[:, 3:6]))
        return Plan(stamp=state.stamp, time_from_start=times, position=x[:, :3] @ back.T,
                    quaternion=quaternion, velocity=x[:, 6:9] @ back.T,
                    rates=x[:, 9:12].copy(), acceleration=rate @ back.T)


def _solver(problem: Problem, s: Settings) -> RealtimeSolver:
    """The compiled interior-point method, or torch's where the settings ask for it. Without a compiler the torch
    augmented Lagrangian with so few steps that it keeps a 10 Hz tick, at the price of a refused plan now and then."""
    if s.solver == 'interior_point':
        return RealtimeSolver(problem, s.spheres_max, interior_point.Settings(
            elastic=s.softness, feasibility=1e-3, max_steps=s.max_steps, linear_solver='auto'))
    solver = RealtimeSolver(problem, s.spheres_max, realtime.Settings(
        tolerance=1e-4, feasibility=1e-3, elastic=s.softness, max_steps=s.max_steps))
    if solver.compiled:
        return solver
    return RealtimeSolver(problem, s.spheres_max, al.Settings(
        mu_0=1e4, iterations=10, gn_steps=8, max_steps=min(s.max_steps, 20), elastic=s.softness, feasibility=1e-3,
        optimality=1e-3))


def _fan() -> np.ndarray:
    """(F, 3) unit vectors around +x by increasing deflection: 0, then rings of 12 from 10 to 120 degrees."""
    rays = [np.array([1.0, 0.0, 0.0])]
    for deflection in np.radians(np.arange(10.0, 121.0, 10.0)):
        for around in np.radians(np.arange(0.0, 360.0, 30.0)):
            rays.append(np.array([np.cos(deflection), np.sin(deflection) * np.cos(around),
                                  np.sin(deflection) * np.sin(around)]))
    return np.array(rays)


def _frame_along(direction: np.ndarray) -> np.ndarray:
    """(3, 3) rotation whose first column is the unit vector `direction`; the second is level."""
    x, y, z = direction.tolist()
    norm = math.hypot(x, y)
    side = (-y / norm, x / norm) if norm > 1e-6 else (0.0, 1.0)
    return np.array([[x, side[0], -z * side[1]], [y, side[1], z * side[0]], [z, 0.0, x * side[1] - y * side[0]]])
