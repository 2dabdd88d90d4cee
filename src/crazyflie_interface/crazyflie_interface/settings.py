# SPDX-License-Identifier: GPL-3.0-or-later
"""Every number an operator may change, with its unit. Each field is one ROS parameter of the node."""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc import interface
from deqmpc_ros.settings import parameter

UNWAIVABLE = ('radio_link', 'mocap_pose')  # without them there is nothing to command, or nowhere to take off from


@dataclass(frozen=True)
class GuardSettings:
    """When the setpoint guard stops following. Times are set against the firmware's own: it levels out
    after 0.5 s without a setpoint and cuts and locks after 2 s."""

    plan_warn: float = parameter(
        0.2, 'Age (s) of the last plan at which the status warns; the plan is still followed, to its end'
        ' and then at rest.', 0.02, 0.4)
    plan_hold: float = parameter(
        0.4, 'Age (s) of the last plan at which the drone is put in hold.', 0.05, 0.45)
    hold_land: float = parameter(
        2.0, 'Time (s) in a hold that the guard began, after which it lands.', 0.0, 60.0)
    pose_warn: float = parameter(
        0.1, 'Age (s) of the last mocap pose below which a gap is ignored.', 0.02, 0.25)
    pose_hold: float = parameter(
        0.2, 'Age (s) of the last mocap pose at which the drone is put in hold.', 0.05, 0.5)
    pose_land: float = parameter(
        0.5, 'Age (s) of the last mocap pose at which the drone lands blind.', 0.1, 2.0)
    pose_cut: float = parameter(
        1.5, 'Age (s) of the last mocap pose at which the motors are cut.', 0.2, 10.0)
    fence_low: list[float] = parameter(
        [-2.5, -2.5, 0.1], 'Lower corner (m, world) of the fence.', -32.0, 32.0)
    fence_high: list[float] = parameter(
        [2.5, 2.5, 2.5], 'Upper corner (m, world) of the fence.', -32.0, 32.0)
    fence_horizon: float = parameter(
        0.3, 'Time (s) ahead at which measured velocity may not carry the drone out of the fence; 0 '
        'looks at the present only.', 0.0, 2.0)
    fence_margin: float = parameter(
        0.5, 'Distance (m) outside the fence at which the motors are cut.', 0.0, 10.0)
    tilt_cut: float = parameter(
        1.4, 'Tilt (rad) that counts as lost control.', 0.3, 3.15)
    tilt_time: float = parameter(
        0.1, 'Time (s) the tilt must last before the motors are cut.', 0.0, 1.0)
    battery_warn: float = parameter(
        3.8, 'Battery voltage (V) at which the status warns and arming is refused.', 3.0, 4.3)
    battery_land: float = parameter(
        3.7, 'Battery voltage (V, plus battery_sag in flight) below which the drone lands after '
        'battery_time.', 2.8, 4.3)
    battery_time: float = parameter(
        3.0, 'Time (s) the battery must stay below battery_land.', 0.0, 60.0)
    battery_critical: float = parameter(
        3.2, 'Battery voltage (V, measured) below which the drone lands after battery_critical_time; the'
        ' firmware calls this low.', 2.8, 4.3)
    battery_critical_time: float = parameter(
        0.5, 'Time (s) the battery must stay below battery_critical.', 0.0, 5.0)
    battery_sag: float = parameter(
        0.4, "Voltage (V) that the motors' load takes off the battery, added to the measured voltage in "
        'flight. 0.4 V is what recorded Crazyflie 2.1 flights show: 3.60 V in flight, 3.99 V just after.',
        0.0, 1.0)
    telemetry_land: float = parameter(
        1.0, "Silence (s) of the drone's telemetry at which it is told to land.", 0.2, 10.0)
    jump_speed: float = parameter(
        3.0, 'Mean speed (m/s) from one mocap pose to the next, in the air, above which the newer is a jump and not '
        'believed; policies plan up to 2 m/s.', 0.5, 20.0)
    jump_acceleration: float = parameter(
        15.0, 'Acceleration (m/s^2) from the measured velocity above which it is one too; a Crazyflie has 10.',
        1.0, 200.0)
    jump_margin: float = parameter(
        0.1, 'Distance (m) added to both: noise, and flight during a gap.', 0.005, 2.0)
    jump_rate: float = parameter(
        6.0, 'Mean rate (rad/s) from one mocap attitude to the next, in the air, above which the newer is a flip '
        'and not believed.', 0.5, 50.0)
    jump_angle: float = parameter(
        0.35, 'Angle (rad) added to it.', 0.01, 3.2)
    estimate_error: float = parameter(
        0.4, "Distance (m) of the drone's own estimate from mocap that counts as lost: twice what 0.1 s of telemetry "
        'age makes at 2 m/s.', 0.05, 5.0)
    estimate_time: float = parameter(
        0.5, 'Time (s) that it must last before the drone lands.', 0.0, 5.0)
    collision_margin: float = parameter(
        -0.03, "Distance (m) to a virtual sphere's surface below which a predicted path meets it; negative: so deep "
        'inside.', -1.0, 1.0)
    collision_horizon: float = parameter(
        0.5, 'Time (s) ahead at which flown plan and measured motion are held against the spheres; 0 looks at none.',
        0.0, 2.0)
    neighbours: list[str] = parameter(
        [], 'Other robots, by whose odometry a predicted collision with them is judged too.')
    neighbour_radius: float = parameter(
        0.2, 'Distance (m) to the centre of another drone that counts as its surface; less than what the policy '
        'keeps, more than 0.14 m, where propellers touch.', 0.05, 2.0)
    neighbour_spacing: float = parameter(
        0.3, 'As much more (m) above and below another drone, for the downwash.', 0.0, 2.0)
    collision_time: float = parameter(
        0.15, 'Time (s) that a predicted meeting must last: the policy plans anew every 0.1 s and may avoid it.',
        0.0, 1.0)
    clock_step: float = parameter(
        0.05, 'Step (s) of the system clock, against one that nobody can set, at which a followed plan is left for '
        'hold.', 0.005, 10.0)
    recorder_silence: float = parameter(
        5.0, 'Silence (s) in flight of a recorder that was heard before, after which it counts as dead.', 1.5, 60.0)
    recorder_answer: str = parameter(
        'land', 'What the guard does when the recorder has died or failed in flight.', choices=('warn', 'hold', 'land'))


@dataclass(frozen=True)
class PreflightSettings:
    """What arming and take-off ask for; see preflight.py."""

    preflight_waive: str = parameter(
        '', 'Checks of the preflight that the operator waives, separated by commas; empty: none.')
    require_recorder: bool = parameter(
        True, 'A recorder belongs to this graph; false waives the checks recorder and disk.')
    body_name: str = parameter(
        '', "Rigid body that mocap must follow; empty: the robot's name.")
    preflight_time: float = parameter(
        1.0, 'Time (s) of gapless mocap that arming asks for.', 0.2, 10.0)
    preflight_rate_min: float = parameter(
        80.0, 'Lowest rate (Hz) of mocap poses for arming.', 1.0, 1000.0)
    preflight_rate_max: float = parameter(
        125.0, 'Highest rate (Hz) of mocap poses for arming; each is one radio packet.', 1.0, 1000.0)
    preflight_position: float = parameter(
        0.05, 'Largest distance (m) of the onboard estimate from mocap.', 0.001, 1.0)
    preflight_yaw: float = parameter(
        0.175, 'Largest heading error (rad) of the onboard estimate.', 0.01, 3.15)
    preflight_variance: float = parameter(
        0.001, 'Largest onboard position variance (m^2).', 1e-6, 10.0)
    preflight_latency: float = parameter(
        0.03, 'Largest median age (s) of a mocap pose on arrival, since its exposure.', 0.001, 0.5)
    preflight_link_quality: float = parameter(
        80.0, 'Lowest link quality (percent: 100 less 10 for each retry a packet), where the link measures it.',
        0.0, 100.0)
    preflight_clearance: float = parameter(
        0.05, 'Least distance (m) of the take-off path to the surface of a virtual sphere.', -10.0, 2.0)
    preflight_policy_latency: float = parameter(
        0.1, "Largest age (s) of the odometry behind a plan when the plan goes out.", 0.01, 1.0)
    preflight_clock: float = parameter(
        0.005, 'Largest uncertainty (s) of the mocap clock, and difference of the ROS clock from the system clock.',
        1e-4, 1.0)
    preflight_message_age: float = parameter(
        0.2, "Largest age (s) of the other nodes' stamps on arrival: more is a slow network or another "
        "host's clock.", 0.01, 5.0)
    preflight_disk: float = parameter(
        2.0, 'Least free space (GB) where the bag is written.', 0.0, 10000.0)

    @property
    def waived(self) -> frozenset[str]:
        """Names of interface.PREFLIGHT_CHECKS that do not count. ValueError names one that is unknown or
        cannot be waived."""
        names = frozenset(filter(None, (n.strip() for n in self.preflight_waive.split(','))))
        unknown = sorted(names - set(interface.PREFLIGHT_CHECKS))
        if unknown:
            raise ValueError(f'preflight_waive names {", ".join(unknown)}; expected some of '
                             f'{", ".join(interface.PREFLIGHT_CHECKS)}')
        needed = sorted(names & set(UNWAIVABLE))
        if needed:
            raise ValueError(f'preflight_waive names {", ".join(needed)}, which cannot be waived')
        return names if self.require_recorder else names | {'recorder', 'disk'}


@dataclass(frozen=True)
class FlightSettings(PreflightSettings, GuardSettings):
    """How the drone is armed, lifted, moved and landed."""

    look_ahead: float = parameter(
        0.0, 'Time (s) by which setpoints are read ahead in the plan. With the full state the firmware '
        'tracks best without (0.032 m RMS against 0.041 m at 0.1 s).', 0.0, 0.5)
    takeoff_height: float = parameter(
        0.5, 'Height (m, world) of the take-off.', 0.1, 3.0)
    takeoff_duration: float = parameter(
        2.0, 'Duration (s) of the take-off.', 0.5, 20.0)
    land_speed: float = parameter(
        0.3, 'Mean speed (m/s) of a landing. With 0.4 a drone whose mocap is 80 ms late touches down at 0.66 m/s, with '
        '0.3 at 0.13 m/s (simulated).', 0.05, 2.0)
    land_duration_min: float = parameter(
        1.0, 'Shortest duration (s) of a landing.', 0.3, 10.0)
    land_height: float = parameter(
        0.0, 'Height (m, world) that a landing aims at.', -1.0, 1.0)
    go_to_speed: float = parameter(
        0.4, 'Mean speed (m/s) of a go-to; the peak is 2.2 times that.', 0.05, 2.0)
    hold_duration: float = parameter(
        1.0, 'Duration (s) in which a hold brings the drone to rest.', 0.2, 5.0)
    arrival_distance: float = parameter(
        0.10, 'Distance (m) within which a motion has arrived.', 0.01, 1.0)
    arrival_timeout: float = parameter(
        3.0, 'Time (s) beyond its duration that a motion may take.', 0.5, 20.0)
    engage_jump: float = parameter(
        0.25, 'Distance (m) from the drone to the plan above which engage is refused.', 0.01, 2.0)
    plan_jump: float = parameter(
        0.5, 'Distance (m) from the drone to a new plan, at the present, above which it is refused while following.',
        0.05, 5.0)
    plan_latency: float = parameter(
        0.5, "Age (s) of a plan's stamp on arrival above which it is refused.", 0.05, 5.0)
    arm_timeout: float = parameter(
        2.0, 'Time (s) in which the drone must confirm arming.', 0.2, 10.0)
    firmware_watchdog: bool = parameter(
        False, "Keep the firmware's 1 s emergency watchdog alive while armed. Once begun it cuts and locks"
        ' the drone when this node ends.')
    priority: int = parameter(
        25, 'Real-time priority (SCHED_FIFO) of the node where the system permits it, above the policy: the guard is'
        ' heard first. 0: none.', 0, 99)

    def __post_init__(self):
        """ValueError where settings contradict each other."""
        def ascending(*names):
            values = [getattr(self, n) for n in names]
            if any(a >= b for a, b in zip(values, values[1:], strict=False)):
                raise ValueError(f'{" < ".join(names)} must hold, got {values}')
        ascending('plan_warn', 'plan_hold')
        ascending('pose_warn', 'pose_hold', 'pose_land', 'pose_cut')
        ascending('battery_critical', 'battery_land', 'battery_warn')
        ascending('preflight_rate_min', 'preflight_rate_max')
        self.waived  # noqa: B018, raises on names that are no checks
        if len(self.fence_low) != 3 or len(self.fence_high) != 3 or any(
                not a < b for a, b in zip(self.fence_low, self.fence_high, strict=True)):
            raise ValueError('fence_low < fence_high must hold in x, y, z, '
                             f'got {self.fence_low} and {self.fence_high}')
        if not self.fence_low[2] <= self.takeoff_height <= self.fence_high[2]:
            raise ValueError(f'takeoff_height {self.takeoff_height} m is outside the fence, '
                             f'z {self.fence_low[2]} to {self.fence_high[2]} m')


@dataclass(frozen=True)
class RadioSettings:
    """The link to one Crazyflie."""

    uri: str = parameter(
        'radio://0/80/2M/E7E7E7E7E7', 'radio://<dongle>/<channel>/<rate>/<address>, usb://<number> or udp://<host>:<port>.')
    connect_timeout: float = parameter(
        10.0, 'Time (s) in which the drone must first answer.', 0.5, 300.0)
    setup_timeout: float = parameter(
        60.0, 'Time (s) for tables and parameters after the first answer.', 1.0, 600.0)
    toc_cache: str = parameter(
        '~/.cache/deqmpc/cflib', "Folder for the drone's tables of contents, used by radio and USB; empty "
        'for none.')
    ext_pos_std_dev: float = parameter(
        0.01, 'locSrv.extPosStdDev (m): trust in mocap positions.', 1e-5, 1.0)
    ext_quat_std_dev: float = parameter(
        0.0045, 'locSrv.extQuatStdDev (rad): trust in mocap attitudes.', 1e-5, 1.0)


@dataclass(frozen=True)
class Settings(RadioSettings, FlightSettings):
    """All parameters of the node `crazyflie_interface`."""
