# SPDX-License-Identifier: GPL-3.0-or-later
"""The preflight: may this drone be armed and take off?

A pure function of `Known` and the settings. `TABLE` is the whole of it: for each name of
interface.PREFLIGHT_CHECKS what judges it, and what to do when it fails. A check is failed, never skipped, when
what it asks about is unknown; a failed check refuses arming and take-off unless the operator has waived it by
name (parameter preflight_waive).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from crazyflie_interface import guard, radio
from crazyflie_interface.radio import Telemetry
from crazyflie_interface.settings import FlightSettings
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.interface import Diagnostic
from deqmpc.types import Obstacles

REPORTERS = ('mocap', 'policy', 'recorder')  # whose diagnostics are asked for
REPORT_AGE = 2.5  # s; they report once a second or faster
LEVEL = 0.35  # rad of tilt on the ground
PATH_POINTS = 21  # at which the take-off path is held against the spheres
ACCEPTED = 'accepted'  # key `gate` of a policy whose plan is flown
UNKNOWN = 'unknown'
RESET = 'a refused request resets the estimator, so try again 2 s later'

Verdict = tuple[bool, str, str]  # passed, value, limit


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str  # one of interface.PREFLIGHT_CHECKS
    passed: bool
    value: str  # what was found, with its unit
    limit: str  # what it must be
    fix: str  # what to do about it
    waived: bool  # by the operator; a check that passes may be waived too

    @property
    def refuses(self) -> bool:
        """True when it stands against arming and take-off."""
        return not (self.passed or self.waived)

    @property
    def level(self) -> int:
        """DiagnosticStatus level."""
        return interface.ERROR if self.refuses else interface.OK if self.passed else interface.WARN

    @property
    def sentence(self) -> str:
        """Result and reason in words."""
        found = 'passed' if self.passed else f'{self.value}, needs {self.limit}'
        return f'waived by the operator: {found}' if self.waived else found


@dataclass(frozen=True)
class Heard:
    """The newest diagnostic of another node."""

    diagnostic: Diagnostic
    arrived: float  # s
    age: float  # s of its stamp on arrival


@dataclass(frozen=True)
class Known:
    """What is known at one instant. Times and ages in s, world frame; None: never heard."""

    now: float
    phase: str = 'disarmed'  # one of interface.PHASES
    telemetry: Telemetry = Telemetry()
    position: np.ndarray | None = None  # (3,) m, newest usable pose
    quaternion: np.ndarray | None = None  # (4,) xyzw
    pose_age: float = np.inf  # since its exposure
    pose_fault: str = ''  # why the newest pose was refused
    arrivals: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) of the newest poses
    latencies: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) exposure to arrival
    plan_age: float = np.inf  # of the last usable plan's arrival
    plan_fault: str = ''  # why the newest plan was refused
    obstacles: Obstacles | None = None
    heard: Mapping[str, Heard] = field(default_factory=dict)  # of REPORTERS
    clock_difference: float | None = None  # s, ROS time minus system time
    clock_step: float = 0.0  # s by which the system clock was just set


class PoseWindow:
    """Arrival and latency of the poses of the last `span` s."""

    def __init__(self, span: float):
        self._span = span
        self._poses: collections.deque[tuple[float, float]] = collections.deque()

    def add(self, arrived: float, latency: float) -> None:
        """A pose that arrived now (s) after `latency` (s)."""
        self._poses.append((arrived, latency))
        while self._poses[0][0] < arrived - self._span:
            self._poses.popleft()

    def since(self, begin: float) -> np.ndarray:
        """(2, n): arrivals and latencies of the poses that arrived at `begin` (s) or later."""
        return np.array([p for p in self._poses if p[0] >= begin]).reshape(-1, 2).T


def checks(known: Known, settings: FlightSettings, body: str) -> tuple[Check, ...]:
    """Every check, in the order of interface.PREFLIGHT_CHECKS; `body` is the rigid body to be followed."""
    waived = settings.waived
    table = []
    for name, (judge, fix) in TABLE.items():
        passed, value, limit = judge(known, settings, body)
        table.append(Check(name, bool(passed), value, limit, fix, name in waived))
    return tuple(table)


def refusal(table: tuple[Check, ...]) -> str:
    """Why arming and take-off are refused, every failed check in a sentence; empty when they are not."""
    return '; '.join(f'{c.name}: {c.sentence} ({c.fix})' for c in table if c.refuses)


# --- the drone and its radio --------------------------------------------------------------------------

def _radio_link(k, s, _):
    t, limit = k.telemetry, f'up, telemetry < {s.telemetry_land:g} s old'
    if t.link != 'up':
        return False, f'{t.link}: {t.fault}' if t.fault else t.link, limit
    if t.stamp is None:
        return False, 'no telemetry yet', limit
    age = max(k.now - t.stamp, 0.0)
    return age < s.telemetry_land, f'up, telemetry {age:.2f} s old', limit


def _link_quality(k, s, _):
    quality, limit = k.telemetry.link_quality, f'>= {s.preflight_link_quality:g} %'
    if quality is None:
        return k.telemetry.link == 'up', 'this link does not measure it', limit
    rssi = k.telemetry.link_statistics.rssi_dbm
    heard = '' if rssi is None else f', {rssi:.0f} dBm at the drone'
    return quality >= s.preflight_link_quality, f'{quality:.0f} %{heard}', limit


def _parameters(k, s, _):
    faults, limit = k.telemetry.parameter_faults, 'read back as set'
    if faults is None:
        return False, 'not set yet', limit
    return not faults, '; '.join(faults) or 'as set', limit


def _supervisor(k, s, _):
    bits = k.telemetry.supervisor
    wanted = radio.CAN_FLY if k.phase == 'armed' else radio.CAN_FLY | radio.CAN_ARM  # self-arming reports canFly only
    limit = f'{"canFly" if k.phase == "armed" else "canArm or canFly"}, not tumbled, crashed or locked'
    if bits is None:
        return False, UNKNOWN, limit
    bad = [what for bit, what in ((radio.TUMBLED, 'tumbled'), (radio.CRASHED, 'crashed'), (radio.LOCKED, 'locked'))
           if bits & bit]
    if not bits & wanted:
        bad.append('not ready')
    return not bad, f'{", ".join(bad) or "ready"} (0x{bits:03x})', limit


def _battery(k, s, _):
    volts, limit = k.telemetry.battery_v, f'> {s.battery_warn:g} V'
    if volts is None:
        return False, UNKNOWN, limit
    return volts > s.battery_warn, f'{volts:.2f} V', limit


# --- mocap --------------------------------------------------------------------------------------------

def _mocap_pose(k, s, _):
    limit = f'< {s.pose_warn:g} s old, gapless for {s.preflight_time:g} s'
    because = f' ({k.pose_fault})' if k.pose_fault else ''
    if k.position is None:
        return False, f'no pose yet{because}', limit
    if k.pose_age >= s.pose_warn:
        return False, f'{k.pose_age:.2f} s old{because}', limit
    begin = k.now - s.preflight_time
    times = np.array([begin, *k.arrivals[k.arrivals >= begin], k.now])
    gap = float(np.max(np.diff(times)))
    return gap < s.pose_warn, f'{k.pose_age:.3f} s old, longest gap {gap:.2f} s{because}', limit


def _mocap_rate(k, s, _):
    limit = f'{s.preflight_rate_min:g} to {s.preflight_rate_max:g} Hz'
    times = k.arrivals
    if len(times) < 2 or times[-1] <= times[0]:
        return False, UNKNOWN, limit
    rate = (len(times) - 1) / (times[-1] - times[0])
    return s.preflight_rate_min <= rate <= s.preflight_rate_max, f'{rate:.1f} Hz', limit


def _mocap_latency(k, s, _):
    limit = f'{-1e3 * s.preflight_clock:g} to {1e3 * s.preflight_latency:g} ms'
    if not len(k.latencies):
        return False, UNKNOWN, limit
    median = float(np.median(k.latencies))
    return -s.preflight_clock <= median <= s.preflight_latency, f'{1e3 * median:.1f} ms', limit


def _mocap_body(k, s, body):
    limit = f'{body!r} tracked'
    values, silent = _report(k, 'mocap')
    if silent:
        return False, silent, limit
    report = k.heard['mocap'].diagnostic
    if report.level >= interface.ERROR:
        return False, report.message, limit
    tracked = values.get('tracked') == 'True'
    return (tracked and values.get('body') == body,
            f'{values.get("body", "")!r} {"tracked" if tracked else "not tracked"}', limit)


def _mocap_clock(k, s, _):
    limit = f'known within {1e3 * s.preflight_clock:g} ms'
    values, silent = _report(k, 'mocap')
    if silent:
        return False, silent, limit
    uncertainty = _number(values, 'clock_uncertainty_ms')
    if np.isinf(uncertainty):
        return False, 'the mocap server answers no echo', limit
    return uncertainty <= 1e3 * s.preflight_clock, f'{uncertainty:.2g} ms', limit


# --- the onboard estimate -----------------------------------------------------------------------------

def _estimate_position(k, s, _):
    estimate, limit = k.telemetry.position, f'<= {s.preflight_position:g} m from mocap'
    if estimate is None or k.position is None:
        return False, UNKNOWN, limit
    error = float(np.linalg.norm(estimate - k.position))
    return error <= s.preflight_position, f'{error:.3f} m', limit


def _estimate_yaw(k, s, _):
    estimate, limit = k.telemetry.yaw, f'<= {s.preflight_yaw:g} rad from mocap'
    if estimate is None or k.quaternion is None:
        return False, UNKNOWN, limit
    turn = estimate - float(rotation.yaw(k.quaternion))
    turn = abs((turn + np.pi) % (2.0 * np.pi) - np.pi)
    return turn <= s.preflight_yaw, f'{turn:.3f} rad', limit


def _estimate_variance(k, s, _):
    variance, limit = k.telemetry.variance, f'<= {s.preflight_variance:g} m^2'
    if variance is None:
        return False, UNKNOWN, limit
    return np.max(variance) <= s.preflight_variance, f'{np.max(variance):.2g} m^2', limit


# --- the place ----------------------------------------------------------------------------------------

def _fence(k, s, _):
    limit = f'inside {s.fence_low} to {s.fence_high} m'
    if k.position is None:
        return False, UNKNOWN, limit
    low = [*s.fence_low[:2], -np.inf]  # the ground lies below the fence's floor
    return guard.outside(k.position, low, s.fence_high) <= 0.0, f'at {np.round(k.position, 2).tolist()} m', limit


def _level(k, s, _):
    limit = f'<= {LEVEL:g} rad'
    if k.quaternion is None:
        return False, UNKNOWN, limit
    tilt = float(rotation.tilt(k.quaternion))
    return tilt <= LEVEL, f'{tilt:.2f} rad', limit


def _obstacles(k, s, _):
    limit = f'>= {s.preflight_clearance:g} m to the take-off path'
    if k.obstacles is None:
        return False, 'no /obstacles yet', limit
    if k.position is None:
        return False, UNKNOWN, limit
    if not len(k.obstacles.radius):
        return True, 'no spheres', limit
    top = np.array([*k.position[:2], s.takeoff_height])
    distance, sphere = min(
        k.obstacles.at(k.obstacles.stamp + f * s.takeoff_duration).clearance((1.0 - f) * k.position + f * top)
        for f in np.linspace(0.0, 1.0, PATH_POINTS))
    return distance >= s.preflight_clearance, f'{distance:.2f} m to sphere {sphere}', limit


# --- policy, clocks, recorder -------------------------------------------------------------------------

def _policy(k, s, _):
    limit = 'loaded, warmed up and ticking'
    values, silent = _report(k, 'policy')
    if silent:
        return False, silent, limit
    return True, f'{values.get("policy", "")}, tick {values.get("tick", "")}', limit


def _plan(k, s, _):
    limit = f'accepted by the plan gate, < {s.plan_warn:g} s old'
    values, silent = _report(k, 'policy')
    gate = values.get('gate', '')
    if not silent and gate != ACCEPTED:
        return False, f'no plan: {gate}', limit
    because = f' ({k.plan_fault})' if k.plan_fault else ''
    if np.isinf(k.plan_age):
        return False, f'none yet{because}', limit
    return k.plan_age < s.plan_warn, f'{k.plan_age:.2f} s old{because}', limit


def _policy_latency(k, s, _):
    limit = f'<= {1e3 * s.preflight_policy_latency:g} ms'
    values, silent = _report(k, 'policy')
    if silent:
        return False, silent, limit
    latency = _number(values, 'latency_ms')
    return latency <= 1e3 * s.preflight_policy_latency, f'{latency:.1f} ms', limit


def _clock(k, s, _):
    ms = 1e3 * s.preflight_clock
    limit = (f'ROS within {ms:g} ms of the system clock, not just set, stamps of other nodes '
             f'{-ms:g} to {1e3 * s.preflight_message_age:g} ms old')
    if k.clock_difference is None:
        return False, UNKNOWN, limit
    if not abs(k.clock_difference) <= s.preflight_clock:
        return False, f'ROS minus system time is {k.clock_difference:.3f} s', limit
    if k.clock_step:
        return False, f'the system clock was just set by {k.clock_step:.3f} s', limit
    for name, heard in k.heard.items():
        if not -s.preflight_clock <= heard.age <= s.preflight_message_age:
            return False, f"{name}'s stamp is {1e3 * heard.age:.0f} ms old on arrival", limit
    return True, f'{1e3 * k.clock_difference:.1f} ms', limit


def _recorder(k, s, _):
    limit = 'recording'
    values, silent = _report(k, 'recorder')
    if silent:
        return False, silent, limit
    report = k.heard['recorder'].diagnostic
    return report.level < interface.ERROR, f'{report.message}, {values.get("messages", "")} messages', limit


def _disk(k, s, _):
    limit = f'>= {s.preflight_disk:g} GB free'
    values, silent = _report(k, 'recorder')
    if silent:
        return False, silent, limit
    free = 1e-9 * _number(values, 'disk_free_bytes')
    return free >= s.preflight_disk, f'{free:.1f} GB', limit


def _report(k: Known, name: str) -> tuple[Mapping[str, str], str]:
    """Values of the newest diagnostic of `name`, and why there is none that counts."""
    heard = k.heard.get(name)
    if heard is None:
        return {}, f'the {name} node has not reported'
    age = k.now - heard.arrived
    if age > REPORT_AGE:
        return {}, f'the {name} node has been silent for {age:.1f} s'
    return heard.diagnostic.values, ''


def _number(values: Mapping[str, str], key: str) -> float:
    """The value under `key`; NaN, which passes no limit, where it is no number."""
    try:
        return float(values.get(key, 'nan'))
    except ValueError:
        return float('nan')


TABLE: dict[str, tuple[Callable[[Known, FlightSettings, str], Verdict], str]] = {
    'radio_link': (_radio_link, 'switch the drone on; check the dongle and the parameter uri (channel, rate, address)'),
    'link_quality': (_link_quality, 'bring the dongle nearer, or move the drone to a channel without Wi-Fi'),
    'parameters': (_parameters, 'restart the drone, or flash the firmware that has these parameters'),
    'supervisor': (_supervisor, 'set the drone upright and level; when it is locked or crashed, restart the drone'),
    'battery': (_battery, 'change the battery'),
    'mocap_pose': (_mocap_pose, 'see that Motive streams and tracks the drone without breaks'),
    'mocap_rate': (_mocap_rate, "set Motive's camera rate to 100 Hz; each pose is one radio packet"),
    'mocap_latency': (_mocap_latency, "put Motive on a wired network; a negative value means that a host's clock is "
                                      'wrong'),
    'mocap_body': (_mocap_body, "give the rigid body in Motive the robot's name, or name it by the launch argument "
                                'body'),
    'mocap_clock': (_mocap_clock, "let the mocap server's command port through its firewall, on a wired network"),
    'estimate_position': (_estimate_position, f'hold the drone still; {RESET}'),
    'estimate_yaw': (_estimate_yaw, f"point the drone's front along the rigid body's x axis; {RESET}"),
    'estimate_variance': (_estimate_variance, f'hold the drone still in sight of the cameras; {RESET}'),
    'fence': (_fence, 'put the drone inside the fence, or correct fence_low and fence_high'),
    'level': (_level, 'set the drone on level ground; or align its rigid body with the world in Motive'),
    'obstacles': (_obstacles, 'move the drone, or draw other spheres (seed); start the obstacle node'),
    'policy': (_policy, 'start the policy node and wait until it has loaded; see its log'),
    'plan': (_plan, 'see the log of the policy node: what its plan gate refuses, and why'),
    'policy_latency': (_policy_latency, 'end other work on this computer, or choose a faster policy'),
    'clock': (_clock, 'let NTP (chrony) settle on every host; do not set clocks while the graph runs'),
    'recorder': (_recorder, 'start the recorder, or start the graph with record:=false'),
    'disk': (_disk, "free space on the bag's disk, or choose another run_dir"),
}
