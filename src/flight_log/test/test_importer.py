"""Flights recorded by other means as bags."""

import os
from pathlib import Path

import numpy as np
import pytest

from flight_log import importer
from flight_log.bag import BagError
from flight_log.evaluation import evaluate
from flight_log.flight import load_flight
from flight_log.scene import scene

T = 100.0 + 0.01 * np.arange(300)


def written(path, columns):
    names = list(columns)
    rows = np.column_stack([columns[n] for n in names])
    path.write_text(','.join(names) + '\n' + '\n'.join(','.join(repr(float(v)) for v in row) for row in rows) + '\n')
    return path


def circle(**more):
    angle = 2.0 * (T - T[0])
    return {'t': T, 'x': np.cos(angle), 'y': np.sin(angle), 'z': np.ones_like(T), 'qx': 0 * T, 'qy': 0 * T, 'qz': 0 * T,
            'qw': 1 + 0 * T, **more}


def test_a_minimal_file_gives_poses_and_the_velocity_of_their_motion(tmp_path):
    importer.convert(written(tmp_path / 'a.csv', circle()), tmp_path / 'bag')
    flight = load_flight(tmp_path / 'bag')
    np.testing.assert_allclose(flight.odom.t, T, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flight.odom.velocity[5:-5], axis=1), 2.0, rtol=1e-3)
    e = evaluate(flight)
    assert e.mode == 'open_loop' and e.metadata['source'] == 'a.csv' and not flight.setpoint.t.size


def test_gyro_in_degrees_setpoints_and_battery_are_taken_over(tmp_path):
    ahead = {f'sp_ctrltarget_{a}': v for a, v in zip('xyz', (np.cos(2 * (T - T[0])) + 0.3, np.sin(2 * (T - T[0])) + 0.4,
                                                             np.ones_like(T)), strict=True)}
    gyro = {f'imu_gyro_{a}': 0 * T + v for a, v in zip('xyz', (0.0, 0.0, 90.0), strict=True)}
    importer.convert(written(tmp_path / 'a.csv', circle(**ahead, **gyro, vbat=0 * T + 3.9)), tmp_path / 'bag')
    flight = load_flight(tmp_path / 'bag')
    np.testing.assert_allclose(flight.odom.rates[:, 2], np.pi / 2)
    e = evaluate(flight)
    assert e.tracking_rms == pytest.approx(0.5, abs=1e-6) and len(flight.status) == pytest.approx(30, abs=1)
    assert flight.status[3].battery_v == pytest.approx(3.9)
    assert scene(flight, e)['tracking'][1][0] == pytest.approx(50.0)  # cm


@pytest.mark.parametrize('change, said', [
    (lambda c: c.pop('qw'), 'expected t, px py pz'), (lambda c: c.update(t=T[::-1]), 'line 3: t must increase'),
    (lambda c: c.update(qw=0.5 + 0 * T), 'line 2: the quaternion must have norm 1'),
    (lambda c: c.update(x=np.where(T > 101, np.nan, 0.0)), 'time and pose must be finite')])
def test_a_file_that_cannot_be_used_is_named_with_the_line(change, said, tmp_path):
    columns = circle()
    change(columns)
    with pytest.raises(BagError, match=said):
        importer.convert(written(tmp_path / 'a.csv', columns), tmp_path / 'bag')
    assert not (tmp_path / 'bag').exists()


def test_text_in_a_number_and_an_old_bag_are_refused(tmp_path, capsys):
    path = written(tmp_path / 'a.csv', circle())
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace('1.0', 'fast', 1)
    path.write_text('\n'.join(lines))
    assert importer.main([str(path), str(tmp_path / 'bag')]) == 1
    assert 'a.csv, line 8: expected numbers' in capsys.readouterr().err
    written(path, circle())
    assert importer.main([str(path), str(tmp_path / 'bag')]) == 0
    assert importer.main([str(path), str(tmp_path / 'bag')]) == 1 and 'exists' in capsys.readouterr().err


def test_a_real_flight_keeps_its_path_and_its_tracking_error(tmp_path):
    source = Path(os.environ.get('DEQMPC_DATA', '')) / 'flights/mell_trefoil_slow_rep1.csv'
    if not source.exists():
        pytest.skip(f'needs {source.name} (shared data; $DEQMPC_DATA)')
    importer.convert(source, tmp_path / 'bag')
    table = np.genfromtxt(source, delimiter=',', names=True)
    flight = load_flight(tmp_path / 'bag')
    position = np.column_stack([table[n] for n in ('px', 'py', 'pz')])
    np.testing.assert_allclose(flight.pose.position, position, atol=1e-9)
    error = position - np.column_stack([table[f'sp_ctrltarget_{a}'] for a in 'xyz'])
    assert evaluate(flight).tracking_rms == pytest.approx(np.sqrt((error**2).sum(1).mean()), rel=1e-3)
