"""`deqmpc stream`: a recording through the NatNet wire into mocap_bridge and the policy, then evaluated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from deqmpc_bringup.composition import CompositionError, parse_assignments
from deqmpc_bringup.fly import fly, new_run_dir
from flight_log.evaluate import main as evaluate


def main(argv: list[str]) -> int:
    """Play a recorded CSV or bag through a NatNet server into mocap_bridge and the policy; evaluate."""
    parser = argparse.ArgumentParser(prog='deqmpc stream', description=main.__doc__)
    parser.add_argument('file', help='CSV (t, x y z or px py pz, qx qy qz qw) or rosbag2 bag with a pose')
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='launch arguments of mode stream')
    parser.add_argument('--duration', type=float, default=0.0, metavar='S', help='only the first S seconds')
    parser.add_argument('--json', action='store_true', help='print the evaluation as JSON')
    options = parser.parse_intermixed_args(argv)
    try:
        given = {**parse_assignments(options.arguments), 'file': str(Path(options.file).resolve()),
                 'stream_duration': str(options.duration), 'record': 'true'}
        given.setdefault('run_dir', str(new_run_dir('stream')))
        status, run_dir = fly('stream', given, None, sys.stderr)
    except (CompositionError, OSError, yaml.YAMLError) as error:
        print(f'deqmpc stream: {error}', file=sys.stderr)
        return 2
    if status == 0:
        status = evaluate([str(run_dir / 'bag'), '--report', str(run_dir / 'report'),
                           *(['--json'] if options.json else [])])
    print(f'bag, logs and report: {run_dir}', file=sys.stderr)
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
