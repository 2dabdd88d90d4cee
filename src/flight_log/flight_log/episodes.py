"""A recorded flight as a trajectory of the library's tasks (deqmpc.datasets): states and spheres every 0.1 s.

Taken is what was flown while the drone followed its policy, or the whole of an open-loop recording. States are those
of the Crazyflie's tasks, (p - goal, MRP, v, w), with the goal's position as origin and the world's axes; spheres are
where they were recorded, moving ones with the velocity between two messages. Motor thrusts are not recorded: controls
are NaN.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deqmpc.datasets import Demonstrations
from deqmpc.dynamics import rotation
from flight_log.bag import BagError
from flight_log.evaluation import EvaluationSettings, following, goal_of
from flight_log.flight import Flight, load_flight

PERIOD = 0.1  # s
MOTORS = 4


def read(path: str | Path) -> Demonstrations:
    """One flight. BagError where the bag cannot be read or has no odometry."""
    flight = load_flight(path)
    if not flight.odom.t.size:
        raise BagError(f'{path}: no odometry of {flight.robot}; expected it for velocities and rates')
    times, states = _states(flight)
    centers, velocity, radii = _spheres(flight, times)
    goal = goal_of(flight, EvaluationSettings(), [])
    states[:, :3] -= goal
    return Demonstrations(states, np.full((len(states), MOTORS), np.nan), np.array([len(states)]), centers - goal,
                          velocity, radii, {'bag': Path(path).name})


def _states(flight: Flight) -> tuple[np.ndarray, np.ndarray]:
    """Times (S,) and states (S, 12), positions in the world: the first sample of every period."""
    interval = following(flight.status)
    odom = flight.odom if interval is None else flight.odom.between(interval[0], interval[1])
    _, first = np.unique(np.floor((odom.t - odom.t[0]) / PERIOD), return_index=True)
    m = rotation.mrp_from_quaternion(rotation.normalize(odom.quaternion[first]))
    return odom.t[first], np.hstack([odom.position[first], m, odom.velocity[first], odom.rates[first]])


def _spheres(flight: Flight, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and velocities (S, K, 3), radii (1, K); spheres that a message lacks are absent."""
    centers, radii = flight.spheres.at(times)
    velocity = np.zeros_like(centers)
    if flight.spheres.moving and len(times) > 1:
        velocity[:-1] = np.diff(centers, axis=0) / np.diff(times)[:, None, None]
        velocity[-1] = velocity[-2]
    there = np.isfinite(centers).all(axis=(0, 2)) & np.isfinite(radii).all(axis=0)
    return centers[:, there], velocity[:, there], radii[:1, there]
