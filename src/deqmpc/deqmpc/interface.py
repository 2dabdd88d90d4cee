"""The ROS interface of the stack in one place: topics, services, and messages <-> arrays.

Nothing here imports ROS. Builders take `types`, an object with
`make('geometry_msgs/msg/Pose', **fields)` and `octet(int)`: `deqmpc_ros.messages.LiveTypes` makes
rclpy messages, `flight_log.bag.BagTypes` makes rosbags messages, so that a node and an in-process
trial write the same bytes. Readers only read attributes and take either.

Every number is converted with float() or int() here, because an rclpy message given an int or a
NumPy scalar in a float64 field serialises garbage when field checks are off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles, Plan, RigidBodyState

WORLD = 'world'


@dataclass(frozen=True)
class Topic:
    """One topic. `name` starting with '/' is global, else it lives in the robot's namespace."""

    name: str
    type: str
    depth: int
    reliable: bool
    latched: bool = False

    def resolve(self, robot: str) -> str:
        """The full topic name for `robot` ('cf1' -> '/cf1/pose')."""
        return self.name if self.name.startswith('/') else f'/{robot}/{self.name}'


# Pose and odometry are best effort: a late mocap sample is worth less than the next one.
POSE = Topic('pose', 'geometry_msgs/msg/PoseStamped', 10, reliable=False)
ODOM = Topic('odom', 'nav_msgs/msg/Odometry', 10, reliable=False)  # in a fleet, every policy hears all
OBSTACLES = Topic('/obstacles', 'visualization_msgs/msg/MarkerArray', 1, reliable=True, latched=True)
PLAN = Topic('plan', 'trajectory_msgs/msg/MultiDOFJointTrajectory', 10, reliable=True)
SETPOINT = Topic('setpoint', 'trajectory_msgs/msg/MultiDOFJointTrajectory', 50, reliable=True)
STATUS = Topic('status', 'diagnostic_msgs/msg/DiagnosticArray', 10, reliable=True)
DIAGNOSTICS = Topic('/diagnostics', 'diagnostic_msgs/msg/DiagnosticArray', 50, reliable=True)
GO_TO = Topic('go_to', 'geometry_msgs/msg/PoseStamped', 1, reliable=True)  # start pose, while holding
TRUTH = Topic('truth', 'nav_msgs/msg/Odometry', 10, reliable=False)  # simulation only

# For RViz and Foxglove only, from the node `visual`: neither draws a MultiDOFJointTrajectory or a status.
PLAN_PATH = Topic('plan_path', 'nav_msgs/msg/Path', 1, reliable=True)
FLOWN_PATH = Topic('flown_path', 'nav_msgs/msg/Path', 1, reliable=True)
FLIGHT_MARKERS = Topic('flight_markers', 'visualization_msgs/msg/MarkerArray', 1, reliable=True)

VISUAL = (PLAN_PATH, FLOWN_PATH, FLIGHT_MARKERS)
RECORDED = (POSE, ODOM, OBSTACLES, PLAN, SETPOINT, STATUS, DIAGNOSTICS, GO_TO, TRUTH)

# std_srvs services in the robot's namespace: name -> type
SERVICES = {
    'arm': 'std_srvs/srv/SetBool', 'takeoff': 'std_srvs/srv/Trigger', 'land': 'std_srvs/srv/Trigger',
    'engage': 'std_srvs/srv/Trigger', 'disengage': 'std_srvs/srv/Trigger',
    'emergency': 'std_srvs/srv/Trigger', 'preflight': 'std_srvs/srv/Trigger',
}

# Flight phases, as /<robot>/status reports them under the key `phase`.
PHASES = ('disarmed', 'armed', 'taking_off', 'holding', 'following', 'landing', 'emergency')

# Keys of DiagnosticStatus '<robot>/flight' on /<robot>/status.
FLIGHT_KEYS = (
    'phase',  # one of PHASES
    'guard',  # follow | hold | land | cut | idle: the guard's current answer
    'reason',  # why the guard answered so, empty when it follows
    'battery_v', 'link_quality', 'supervisor',  # V, percent, bits as an int; empty when unknown
    'go_to',  # idle | active | done
    # The radio link, empty where it does not measure that: packets a second, share of them that carry data, mean
    # retransmissions a packet, round trip of 95 % of the pings, share of pings lost, times opened again.
    'uplink_hz', 'downlink_hz', 'uplink_use', 'downlink_use', 'retries', 'rssi_dbm', 'link_latency_ms',
    'pings_lost', 'reconnects',
)
# Checks of the preflight. On /diagnostics each is one DiagnosticStatus '<robot>/preflight/<check>' with the
# keys below; level OK passed, WARN failed but waived by the operator, ERROR failed.
PREFLIGHT_CHECKS = (
    'radio_link', 'link_quality', 'parameters', 'supervisor', 'battery',
    'mocap_pose', 'mocap_rate', 'mocap_latency', 'mocap_body', 'mocap_clock',
    'estimate_position', 'estimate_yaw', 'estimate_variance',
    'fence', 'level', 'obstacles', 'policy', 'plan', 'policy_latency', 'clock', 'recorder', 'disk',
)
PREFLIGHT_KEYS = ('value', 'limit', 'fix', 'passed', 'waived')
# Keys of DiagnosticStatus '<robot>/policy' on /diagnostics, one a tick.
POLICY_KEYS = (
    'policy', 'tick',  # name; count of ticks since start
    'status',  # solver status in words, 'ok' when converged
    'gate',  # accepted | reason of refusal (a refused plan is not published)
    'solve_ms',  # the policy call
    'tick_ms',  # the instant the tick was due to plan published
    'latency_ms',  # odometry stamp to plan published
    'iterations', 'residual', 'deadline_misses',
)

OK, WARN, ERROR, STALE = 0, 1, 2, 3  # DiagnosticStatus levels


class MessageTypes(Protocol):
    """What a builder needs of a message library."""

    def make(self, type_name: str, **fields: Any) -> Any:
        """A message of `type_name`; fields not given have their default."""

    def octet(self, value: int) -> Any:
        """`value` as the library stores a `byte` field."""


# --- time ---------------------------------------------------------------------------------------

def seconds(stamp: Any) -> float:
    """builtin_interfaces Time or Duration -> s."""
    return stamp.sec + 1e-9 * stamp.nanosec


def _split(value: float) -> tuple[int, int]:
    nanoseconds = round(value * 1e9)
    return nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000


def time_message(types: MessageTypes, stamp: float) -> Any:
    """s -> builtin_interfaces/Time."""
    sec, nanosec = _split(stamp)
    return types.make('builtin_interfaces/msg/Time', sec=sec, nanosec=nanosec)


def _set_time(message, value):
    message.sec, message.nanosec = _split(value)


def header(types: MessageTypes, stamp: float, frame: str = WORLD) -> Any:
    """std_msgs/Header."""
    return types.make('std_msgs/msg/Header', stamp=time_message(types, stamp), frame_id=frame)


# --- geometry -----------------------------------------------------------------------------------

def _vector(types, v, kind='Vector3'):
    return types.make(f'geometry_msgs/msg/{kind}', x=float(v[0]), y=float(v[1]), z=float(v[2]))


def _set_xyz(message, v):
    message.x, message.y, message.z = v


def _quaternion(types, q):
    return types.make('geometry_msgs/msg/Quaternion', x=float(q[0]), y=float(q[1]), z=float(q[2]),
                      w=float(q[3]))


def _pose(types, p, q):
    return types.make('geometry_msgs/msg/Pose', position=_vector(types, p, 'Point'),
                      orientation=_quaternion(types, q))


def _twist(types, linear, angular):
    return types.make('geometry_msgs/msg/Twist', linear=_vector(types, linear),
                      angular=_vector(types, angular))


def _xyz(v) -> np.ndarray:
    return np.array([v.x, v.y, v.z], dtype=float)


def _xyzw(q) -> np.ndarray:
    return np.array([q.x, q.y, q.z, q.w], dtype=float)


def pose_message(types: MessageTypes, stamp: float, position, quaternion, frame: str = WORLD) -> Any:
    """PoseStamped of a pose (m, xyzw) in `frame` at `stamp` (s)."""
    return types.make('geometry_msgs/msg/PoseStamped', header=header(types, stamp, frame),
                      pose=_pose(types, position, quaternion))


def read_pose(msg: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """PoseStamped -> stamp (s), position (3,), quaternion (4,) xyzw as sent."""
    return seconds(msg.header.stamp), _xyz(msg.pose.position), _xyzw(msg.pose.orientation)


def odometry_message(types: MessageTypes, state: RigidBodyState, robot: str) -> Any:
    """Odometry: pose in `world`, twist in the child frame `robot`, as nav_msgs defines it."""
    body_velocity = rotation.rotate(rotation.conjugate(state.quaternion), state.velocity)
    return types.make(
        'nav_msgs/msg/Odometry', header=header(types, state.stamp), child_frame_id=robot,
        pose=types.make('geometry_msgs/msg/PoseWithCovariance',
                        pose=_pose(types, state.position, state.quaternion)),
        twist=types.make('geometry_msgs/msg/TwistWithCovariance',
                         twist=_twist(types, body_velocity, state.rates)))


def read_odometry(msg: Any) -> RigidBodyState:
    """Odometry -> state with the velocity in the world frame. NaN passes through, for the reader to judge."""
    q = _xyzw(msg.pose.pose.orientation)
    return RigidBodyState(
        stamp=seconds(msg.header.stamp), position=_xyz(msg.pose.pose.position), quaternion=q,
        velocity=rotation.rotate(q, _xyz(msg.twist.twist.linear)), rates=_xyz(msg.twist.twist.angular))


# --- plan and setpoint --------------------------------------------------------------------------

def plan_message(types: MessageTypes, plan: Plan, robot: str) -> Any:
    """MultiDOFJointTrajectory. Linear velocity and acceleration in world, angular velocity in body."""
    return PlanMessage(types, robot).filled(plan)


class PlanMessage:
    """The plan message of one robot, its parts kept from plan to plan: filling them takes a twentieth of the
    time of making them."""

    def __init__(self, types: MessageTypes, robot: str):
        self._types, self._robot = types, robot
        self._message = self._empty(0)

    def filled(self, plan: Plan) -> Any:
        """`plan_message` of `plan`. The same object every time: publish or serialise it before the next call."""
        if len(self._message.points) != len(plan.time_from_start):
            self._message = self._empty(len(plan.time_from_start))
        _set_time(self._message.header.stamp, plan.stamp)
        columns = (plan.time_from_start, plan.position, plan.quaternion, plan.velocity, plan.rates,
                   plan.acceleration)
        # tolist() of float64 gives Python floats
        rows = zip(*(np.asarray(c, dtype=np.float64).tolist() for c in columns), strict=True)
        for point, (time, position, quaternion, velocity, rates, acceleration) in zip(
                self._message.points, rows, strict=True):
            _set_time(point.time_from_start, time)
            _set_xyz(point.transforms[0].translation, position)
            r = point.transforms[0].rotation
            r.x, r.y, r.z, r.w = quaternion
            _set_xyz(point.velocities[0].linear, velocity)
            _set_xyz(point.velocities[0].angular, rates)
            _set_xyz(point.accelerations[0].linear, acceleration)
        return self._message

    def _empty(self, count):
        make = self._types.make
        points = [make('trajectory_msgs/msg/MultiDOFJointTrajectoryPoint',
                       transforms=[make('geometry_msgs/msg/Transform')],
                       velocities=[make('geometry_msgs/msg/Twist')],
                       accelerations=[make('geometry_msgs/msg/Twist')]) for _ in range(count)]
        return make('trajectory_msgs/msg/MultiDOFJointTrajectory', header=header(self._types, 0.0),
                    joint_names=[self._robot], points=points)


def read_plan(msg: Any) -> Plan:
    """MultiDOFJointTrajectory -> Plan. Raises ValueError where a point lacks one of its three parts."""
    for i, p in enumerate(msg.points):
        if len(p.transforms) != 1 or len(p.velocities) != 1 or len(p.accelerations) != 1:
            raise ValueError(
                f'plan point {i} has {len(p.transforms)} transforms, {len(p.velocities)} velocities, '
                f'{len(p.accelerations)} accelerations; expected one of each')
    if not msg.points:
        raise ValueError('plan has no points')
    def stack(get):
        return np.array([get(p) for p in msg.points], dtype=float)
    return Plan(
        stamp=seconds(msg.header.stamp),
        time_from_start=stack(lambda p: seconds(p.time_from_start)),
        position=stack(lambda p: _xyz(p.transforms[0].translation)),
        quaternion=stack(lambda p: _xyzw(p.transforms[0].rotation)),
        velocity=stack(lambda p: _xyz(p.velocities[0].linear)),
        rates=stack(lambda p: _xyz(p.velocities[0].angular)),
        acceleration=stack(lambda p: _xyz(p.accelerations[0].linear)))


# --- obstacles ----------------------------------------------------------------------------------

def obstacles_message(types: MessageTypes, obstacles: Obstacles, rgba=(0.9, 0.3, 0.2, 0.6)) -> Any:
    """MarkerArray of SPHERE markers; id = index, scale = diameter. Markers carry no velocity."""
    color = types.make('std_msgs/msg/ColorRGBA', r=float(rgba[0]), g=float(rgba[1]), b=float(rgba[2]),
                       a=float(rgba[3]))
    markers = [
        types.make('visualization_msgs/msg/Marker', header=header(types, obstacles.stamp),
                   ns='obstacles', id=k, type=2, action=0,  # 2 = SPHERE, 0 = ADD
                   pose=_pose(types, obstacles.position[k], (0.0, 0.0, 0.0, 1.0)),
                   scale=_vector(types, [2.0 * obstacles.radius[k]] * 3), color=color)
        for k in range(len(obstacles.radius))]
    return types.make('visualization_msgs/msg/MarkerArray', markers=markers)


def read_obstacles(msg: Any, previous: Obstacles | None = None) -> Obstacles:
    """MarkerArray -> Obstacles, sorted by marker id.

    Velocity is the finite difference to `previous` (the field read before this one) where that has
    the same spheres and an earlier stamp, else zero. Markers other than ADDed spheres are skipped.
    Raises ValueError on a sphere with a radius that is not positive or a number that is not finite.
    """
    spheres = sorted((m for m in msg.markers if m.type == 2 and m.action == 0), key=lambda m: m.id)
    stamp = max((seconds(m.header.stamp) for m in spheres), default=0.0)
    position = np.array([_xyz(m.pose.position) for m in spheres]).reshape(-1, 3)
    radius = np.array([0.5 * m.scale.x for m in spheres], dtype=float)
    if not np.isfinite(position).all() or not (np.isfinite(radius) & (radius > 0)).all():
        bad = next(m.id for m, p, r in zip(spheres, position, radius, strict=True)
                   if not (np.isfinite(p).all() and np.isfinite(r) and r > 0))
        raise ValueError(f'obstacle marker {bad}: position must be finite and diameter > 0')
    velocity = np.zeros_like(position)
    if previous is not None and len(previous.radius) == len(radius) and stamp > previous.stamp:
        velocity = (position - previous.position) / (stamp - previous.stamp)
    return Obstacles(stamp, position, radius, velocity)


# --- what RViz and Foxglove draw ------------------------------------------------------------------

def path_message(types: MessageTypes, stamp: float, poses: list[Any]) -> Any:
    """Path of PoseStamped messages (`pose_message`) in `world` at `stamp` (s)."""
    return types.make('nav_msgs/msg/Path', header=header(types, stamp), poses=poses)


def plan_path_message(types: MessageTypes, plan: Plan) -> Any:
    """Path through the points of `plan`, each pose at its own time."""
    return path_message(types, plan.stamp, [
        pose_message(types, plan.stamp + dt, p, q)
        for dt, p, q in zip(plan.time_from_start, plan.position, plan.quaternion, strict=True)])


def text_message(types: MessageTypes, stamp: float, position, text: str, rgba, height: float = 0.1) -> Any:
    """MarkerArray of one text that faces the viewer, letters `height` m high, centred at `position` (m). It is
    gone after 1 s, so that what nobody says any longer is not shown any longer."""
    color = types.make('std_msgs/msg/ColorRGBA', r=float(rgba[0]), g=float(rgba[1]), b=float(rgba[2]),
                       a=float(rgba[3]))
    marker = types.make(
        'visualization_msgs/msg/Marker', header=header(types, stamp), ns='flight', id=0,
        type=9, action=0,  # 9 = TEXT_VIEW_FACING, 0 = ADD
        pose=_pose(types, position, (0.0, 0.0, 0.0, 1.0)), scale=_vector(types, (0.0, 0.0, height)), color=color,
        lifetime=types.make('builtin_interfaces/msg/Duration', sec=1, nanosec=0), text=text)
    return types.make('visualization_msgs/msg/MarkerArray', markers=[marker])


# --- diagnostics --------------------------------------------------------------------------------

def diagnostics_message(types: MessageTypes, stamp: float, name: str, level: int, message: str,
                        values: dict[str, Any], hardware_id: str) -> Any:
    """DiagnosticArray of one status; floats are written with 6 significant digits, None as ''. `hardware_id`: the
    robot, or the address of its radio or cameras."""
    def text(v):
        if v is None:
            return ''
        if isinstance(v, float):
            return f'{v:.6g}' if math.isfinite(v) else str(v)
        return str(v)
    status = types.make(
        'diagnostic_msgs/msg/DiagnosticStatus', level=types.octet(level), name=name, message=message,
        hardware_id=hardware_id,
        values=[types.make('diagnostic_msgs/msg/KeyValue', key=k, value=text(v))
                for k, v in values.items()])
    return types.make('diagnostic_msgs/msg/DiagnosticArray', header=header(types, stamp, ''),
                      status=[status])


@dataclass(frozen=True)
class Diagnostic:
    """One DiagnosticStatus, read."""

    stamp: float
    name: str
    level: int
    message: str
    values: dict[str, str]


def read_diagnostics(msg: Any) -> list[Diagnostic]:
    """DiagnosticArray -> its statuses."""
    stamp = seconds(msg.header.stamp)
    return [Diagnostic(stamp, s.name, int.from_bytes(s.level, 'little') if isinstance(s.level, bytes)
                       else int(s.level), s.message, {v.key: v.value for v in s.values})
            for s in msg.status]
