"""Synthetic trials with known answers, written as bags with the same builders that the nodes use."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles, Plan, RigidBodyState
from flight_log.bag import TYPES, BagWriter

GOAL = np.array([0.0, 0.0, 1.0])
T0 = 1000.0  # s, stamp at which the bag starts
LEVEL = np.array([0.0, 0.0, 0.0, 1.0])


def settle(start=(1.0, 0.5, 1.2), tau=0.8) -> Callable[[float], np.ndarray]:
    """Exponential approach of the goal; s since engage -> (3,) m."""
    start = np.array(start, dtype=float)
    return lambda t: GOAL + (start - GOAL) * np.exp(-max(t, 0.0) / tau)


def static_field(position, radius=0.1) -> Callable[[float], Obstacles]:
    """Spheres that stand still; stamp (s) -> field."""
    position = np.array(position, dtype=float).reshape(-1, 3)
    return lambda stamp: Obstacles(stamp, position, np.full(len(position), radius), np.zeros_like(position))


@dataclass
class SyntheticTrial:
    """What happens in the trial; times in s, `t` counts from engage."""

    seconds: float = 20.0  # of following
    lead: float = 1.0  # of each phase before it, and of the landing
    path: Callable[[float], np.ndarray] = field(default_factory=settle)
    quaternion: Callable[[float], np.ndarray] = lambda t: LEVEL
    obstacles: Callable[[float], Obstacles] | None = static_field([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0]])
    moving: bool = False  # publish the obstacles at 10 Hz instead of once
    setpoint_offset: tuple[float, float, float] = (0.03, 0.0, 0.04)  # m from the flown position: 0.05 long
    solve_ms: Callable[[int], float] = lambda k: 20.0
    gate: Callable[[int], str] = lambda k: 'accepted'
    misses: Callable[[int], int] = lambda k: 0  # counter at tick k
    skip_ticks: tuple[int, ...] = ()
    pose_gaps: tuple[tuple[float, float], ...] = ()  # (from, to) without pose
    after: tuple[str, str, str] = ('landing', 'idle', '')  # phase, guard and reason when following has ended
    supervisor: Callable[[float], int] = lambda t: 0b11011
    open_loop: bool = False  # a streamed recording: nothing but mocap, obstacles and the policy
    metadata: dict = field(default_factory=dict)


def _phase(trial, t):
    if t < -2 * trial.lead:
        return 'armed', 'idle', ''
    if t < -trial.lead:
        return 'taking_off', 'idle', ''
    if t < 0:
        return 'holding', 'hold', ''
    if t < trial.seconds:
        return 'following', 'follow', ''
    return trial.after


def write_trial(path, trial: SyntheticTrial, robot: str = 'cf1'):
    """The bag of `trial` at `path`; returns `path`. Log times are the stamps."""
    def put(topic, stamp, message):
        writer.write_message(topic, robot, stamp, message)

    with BagWriter(path, trial.metadata) as writer:
        start = -3 * trial.lead
        if trial.obstacles is not None and not trial.moving:
            put(interface.OBSTACLES, T0, interface.obstacles_message(TYPES, trial.obstacles(T0)))
        if not trial.open_loop:
            put(interface.GO_TO, T0, interface.pose_message(TYPES, T0, trial.path(0.0), LEVEL))
        for i in range(round((trial.seconds + 4 * trial.lead) * 100)):
            t = start + 0.01 * i
            stamp = T0 + 0.01 * i
            position = np.array(trial.path(t), dtype=float)
            velocity = (np.array(trial.path(t + 1e-4)) - np.array(trial.path(t - 1e-4))) / 2e-4
            state = RigidBodyState(stamp, position, trial.quaternion(t), velocity, np.zeros(3))
            if not any(a <= t < b for a, b in trial.pose_gaps):
                put(interface.POSE, stamp, interface.pose_message(TYPES, stamp, position, state.quaternion))
                put(interface.ODOM, stamp, interface.odometry_message(TYPES, state, robot))
            if i % 50 == 0:
                put(interface.TRUTH, stamp, interface.odometry_message(TYPES, state, robot))
            if i % 10 == 0:
                if trial.obstacles is not None and trial.moving:
                    spheres = interface.obstacles_message(TYPES, trial.obstacles(stamp))
                    put(interface.OBSTACLES, stamp, spheres)
                _tick(trial, put, robot, stamp, i // 10, position)
                if not trial.open_loop:
                    phase, guard, reason = _phase(trial, t)
                    values = dict.fromkeys(interface.FLIGHT_KEYS, '') | {
                        'phase': phase, 'guard': guard, 'reason': reason, 'battery_v': 4.0,
                        'supervisor': trial.supervisor(t), 'go_to': 'idle'}
                    put(interface.STATUS, stamp, interface.diagnostics_message(
                        TYPES, stamp, f'{robot}/flight', interface.OK, '', values, robot))
            if not trial.open_loop and i % 2 == 0 and 0 <= t < trial.seconds:
                put(interface.SETPOINT, stamp, interface.plan_message(
                    TYPES, _straight(stamp, position + trial.setpoint_offset, 1), robot))
    return path


def _straight(stamp, position, points):
    zero = np.zeros((points, 3))
    way = position + (GOAL - position) * np.linspace(0, 1, points)[:, None]
    return Plan(stamp, 0.1 * np.arange(points), way, np.tile(LEVEL, (points, 1)), zero, zero, zero)


def _tick(trial, put, robot, stamp, tick, position):
    if tick in trial.skip_ticks:
        return
    gate = trial.gate(tick)
    if gate == 'accepted':
        put(interface.PLAN, stamp, interface.plan_message(TYPES, _straight(stamp, position, 6), robot))
    solve = float(trial.solve_ms(tick))
    put(interface.DIAGNOSTICS, stamp, interface.diagnostics_message(
        TYPES, stamp, f'{robot}/policy', interface.OK, '', {
            'policy': 'mpc_only', 'tick': tick, 'status': 'ok', 'gate': gate, 'solve_ms': solve,
            'tick_ms': solve + 1.0, 'latency_ms': solve + 5.0, 'iterations': 4, 'residual': 1e-4,
            'deadline_misses': trial.misses(tick)}, robot))


def reward_at(position, velocity, quaternion=LEVEL):
    """The quadrotor task's reward, from its formula, for level rates of zero."""
    m = rotation.mrp_from_quaternion(np.array(quaternion))
    error = np.array(position) - GOAL
    cost = 10 * np.sum(error**2) + 10 * np.sum(m**2) + np.sum(np.array(velocity)**2)
    return np.exp(2 - cost / 200 / 2)
