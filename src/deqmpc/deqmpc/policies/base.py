"""What a policy is, and how one is made from its name and settings."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

import numpy as np

from deqmpc.types import Obstacles, Plan, RigidBodyState

S = TypeVar('S')

# name -> module and class; a class is made by `Class.from_settings(dict)` and imported only when asked for.
POLICIES = {
    'mpc_only': 'deqmpc.policies.mpc_only:MpcOnly',
    **{name: 'deqmpc.policies.deq_mpc:DeqMpcPolicy'  # the model's folder says which of the four it is
       for name in ('deq_mpc', 'deq_mpc_deq', 'deq_mpc_nn', 'diff_mpc_deq', 'diff_mpc_nn')},
    'network_only': 'deqmpc.policies.network_only:NetworkOnlyPolicy',
}


@dataclass(frozen=True)
class PolicyStatus:
    """How one call of a policy ended."""

    ok: bool  # the plan may be flown
    message: str  # one sentence for a human
    iterations: int  # solver steps taken
    residual: float  # largest violation of dynamics and input bounds by the plan (m, m/s, rad/s, ...)


class Policy(Protocol):
    """State and obstacles to a plan. A policy keeps nothing between calls: what it wants to remember is the
    warm start it returns, which the caller passes back, or None after a break."""

    name: str
    dt: float  # s between two knots of a plan
    horizon: int  # T: a plan has T+1 knots

    def plan(self, state: RigidBodyState, obstacles: Obstacles,
             warm_start: Any = None) -> tuple[Plan | None, Any, PolicyStatus]:
        """A plan from `state` on, a warm start for the next call, and the status.

        Spheres are taken to keep their velocity. Never raises for numbers: where the input is not finite
        the plan and the warm start are None and the status says why. Raises ValueError for wrong shapes.
        """


def refused(message: str) -> tuple[None, None, PolicyStatus]:
    """What `plan` returns where it cannot plan at all."""
    return None, None, PolicyStatus(False, message, 0, float('nan'))


def check_shapes(state: RigidBodyState, obstacles: Obstacles) -> None:
    """ValueError naming the first input of `plan` whose shape is wrong."""
    K = np.shape(obstacles.radius)[0] if np.ndim(obstacles.radius) == 1 else 'K'
    for name, value, expected in (
            ('state.position', state.position, (3,)), ('state.quaternion', state.quaternion, (4,)),
            ('state.velocity', state.velocity, (3,)), ('state.rates', state.rates, (3,)),
            ('obstacles.radius', obstacles.radius, (K,)), ('obstacles.position', obstacles.position, (K, 3)),
            ('obstacles.velocity', obstacles.velocity, (K, 3))):
        if np.shape(value) != expected:
            raise ValueError(f'{name} has shape {np.shape(value)}, expected {expected}')


def load_policy(name: str, settings: dict[str, Any] | None = None) -> Policy:
    """The policy `name` with `settings` (missing ones have their defaults).

    Raises ValueError on an unknown name, setting, type or range, FileNotFoundError on a missing model file.
    """
    if name not in POLICIES:
        raise ValueError(f'unknown policy {name!r}; expected one of: {", ".join(sorted(POLICIES))}')
    module, cls = POLICIES[name].split(':')
    return getattr(importlib.import_module(module), cls).from_settings(settings or {})


def settings_from(cls: type[S], values: dict[str, Any], owner: str) -> S:
    """A dataclass of settings from a mapping, as YAML gives it: lists become tuples, ints become floats.

    Raises ValueError naming the owner, the setting, its value and what was expected.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f', did you mean {close[0]!r}?' if close else ''
            raise ValueError(f'{owner}: unknown setting {name!r}{hint}; expected some of: '
                             f'{", ".join(sorted(known))}')
        made[name] = _converted(hints[name], value, f'{owner}: {name} = {value!r}')
    return cls(**made)


def _converted(hint, value, where):
    def number(v):
        if isinstance(v, bool) or not isinstance(v, (int, float)) or v != v:
            raise ValueError(f'{where}; expected {"numbers" if v is not value else "a number"}')
        return float(v)
    if hint is float:
        return number(value)
    if hint is int or hint is bool or hint is str:
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise ValueError(f'{where}; expected a value of type {hint.__name__}')
        return value
    count = len(hint.__args__)  # tuple[float, float, ...]
    if isinstance(value, str) or not hasattr(value, '__len__') or len(value) != count:
        raise ValueError(f'{where}; expected {count} numbers')
    return tuple(number(v) for v in value)
