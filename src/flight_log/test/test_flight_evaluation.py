"""Evaluation of synthetic bags whose answers are known."""

import json

import numpy as np
import pytest
from flight_log_synthetic import GOAL, T0, SyntheticTrial, reward_at, settle, static_field, write_trial

from deqmpc import interface
from deqmpc.types import Obstacles
from flight_log import bag, evaluate, evaluation, metrics, table
from flight_log.flight import load_flight


def judge(tmp_path, trial, **settings):
    path = write_trial(tmp_path / 'trial', trial)
    return evaluation.evaluate(load_flight(path), evaluation.EvaluationSettings(**settings))


def test_a_good_trial_has_the_return_clearance_and_tracking_of_its_closed_form(tmp_path):
    trial = SyntheticTrial()
    e = judge(tmp_path, trial)
    assert e.mode == 'trial' and e.success and e.reached_goal and e.failure is None
    assert e.steps == 200 and e.ticks == 200
    start, tau = trial.path(0.0), 0.8
    expected = sum(reward_at(trial.path(t), (GOAL - start) / tau * np.exp(-t / tau))
                   for t in 0.1 * np.arange(1, 200))
    at_engage = e.total_return - expected  # the velocity jumps at engage: between its two sides
    low, high = reward_at(start, (GOAL - start) / tau), reward_at(start, np.zeros(3))
    assert low - 1e-6 <= at_engage <= high + 1e-6
    assert e.normalised_return == pytest.approx(e.total_return / (200 * np.e**2))
    t = 0.01 * np.arange(2001)
    centres = np.array([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0]])
    d = [np.linalg.norm(trial.path(s) - centres, axis=1) - 0.1 for s in t]
    assert e.min_clearance == pytest.approx(np.min(d), abs=1e-6)
    assert e.min_clearance_sphere == 1
    assert e.tracking_rms == pytest.approx(0.05, abs=1e-6) and e.tracking_max == pytest.approx(0.05, abs=1e-6)
    assert e.final_max == pytest.approx(np.linalg.norm(start - GOAL) * np.exp(-19 / tau), rel=0.05)
    assert (e.solve_ms_p50, e.tick_ms_p50, e.latency_ms_p99) == (20.0, 21.0, 25.0)
    assert e.deadline_misses == e.missed_ticks == e.rejected_plans == 0
    assert e.ticks_without_plan == e.mocap_gaps == 0
    assert e.mocap_rate == pytest.approx(100.0, rel=1e-3) and e.battery_min_v == 4.0


def test_flying_through_a_sphere_is_a_collision_with_it_and_ends_the_return(tmp_path):
    start = np.array([1.0, 0.5, 1.2])
    centre = GOAL + 0.5 * (start - GOAL)  # on the way, reached at tau log 2
    e = judge(tmp_path, SyntheticTrial(seconds=3.0, obstacles=static_field([[9.0, 9, 9], centre])))
    assert not e.success and e.failure.cause == 'collision' and 'sphere 1' in e.failure.detail
    length = np.linalg.norm(start - GOAL)
    entered = -0.8 * np.log((0.5 * length + 0.1) / length)
    assert e.failure.t == pytest.approx(entered, abs=0.011)
    assert e.steps == int(entered / 0.1) + 1
    assert e.total_return < metrics.MAX_REWARD * e.steps
    assert e.min_clearance == pytest.approx(-0.1, abs=0.01)


def test_a_moving_sphere_is_judged_where_it_was_at_that_time(tmp_path):
    # It passes through the goal at 4 s after engage, at 0.2 m/s; the drone is there by then.
    def field(stamp):
        position = np.array([[0.2 * (stamp - T0 - 3.0 - 4.0), 0.0, 1.0]])
        return Obstacles(stamp, position, np.array([0.1]), np.zeros((1, 3)))
    trial = dict(seconds=6.0, path=settle((0.0, 1.0, 1.0), tau=0.3))
    e = judge(tmp_path, SyntheticTrial(**trial, obstacles=field, moving=True))
    assert e.failure.cause == 'collision' and e.failure.t == pytest.approx(3.5, abs=0.02)
    # the same sphere standing still at its first place would not have been met
    e = judge(tmp_path / 'still', SyntheticTrial(**trial, obstacles=lambda stamp: field(T0)), max_steps=60)
    assert e.success


def test_tilting_over_falling_to_the_ground_and_tumbling_are_crashes(tmp_path):
    over = np.array([np.sin(0.9), 0.0, 0.0, np.cos(0.9)])  # 1.8 rad
    level = np.array([0.0, 0.0, 0.0, 1.0])
    e = judge(tmp_path / 'a', SyntheticTrial(seconds=5.0, quaternion=lambda t: over if t > 4.0 else level))
    assert e.failure.cause == 'crash' and 'tilt 103 deg' in e.failure.detail
    assert e.failure.t == pytest.approx(4.0, abs=0.011)
    e = judge(tmp_path / 'b', SyntheticTrial(
        seconds=5.0, path=lambda t: np.array([0, 0, max(1.0 - max(t, 0) / 5, 0.0)])))
    assert e.failure.cause == 'crash' and 'ground' in e.failure.detail
    assert e.failure.t == pytest.approx(4.75, abs=0.02)
    e = judge(tmp_path / 'c', SyntheticTrial(seconds=5.0, supervisor=lambda t: 32 if t > 3 else 0b11011))
    assert e.failure.cause == 'crash' and 'tumbled' in e.failure.detail


@pytest.mark.parametrize('after, cause', [
    (('landing', 'land', 'at [2.1, 0.0, 1.0] m, 0.10 m outside the fence'), 'fence'),
    (('holding', 'hold', 'no plan for 0.40 s (limit 0.4 s)'), 'guard'),
    (('emergency', 'cut', 'tilt above 1.57 rad for 0.20 s'), 'crash'),
    (('emergency', 'cut', 'no mocap pose for 1.50 s (limit 1.5 s)'), 'guard'),
    (('emergency', 'cut', ''), 'crash'),
    (('landing', 'idle', ''), 'incomplete')])
def test_a_trial_that_the_guard_or_anyone_ends_early_has_that_cause(tmp_path, after, cause):
    e = judge(tmp_path, SyntheticTrial(seconds=6.0, after=after))
    assert not e.success and e.failure.cause == cause, e.failure
    assert after[2] in e.failure.detail
    assert e.failure.t == pytest.approx(6.0, abs=0.01) and e.steps == 60


def test_a_trial_that_stops_short_of_the_goal_is_no_failure_but_did_not_reach_it(tmp_path):
    e = judge(tmp_path, SyntheticTrial(seconds=5.0, path=settle(tau=30.0)), max_steps=50)
    assert e.success and not e.reached_goal and e.final_max > 0.5


def test_goal_and_steps_come_from_options_then_metadata(tmp_path):
    trial = SyntheticTrial(seconds=5.0, metadata={'goal': '[1.0, 0.5, 1.2]', 'max_steps': '50'},
                           path=lambda t: np.array([1.0, 0.5, 1.2]))
    e = judge(tmp_path / 'a', trial)
    assert e.goal == [1.0, 0.5, 1.2] and e.max_steps == 50 and e.success and e.reached_goal
    assert e.normalised_return == pytest.approx(1.0, abs=1e-6)
    e = judge(tmp_path / 'b', trial, goal=(0.0, 0.0, 1.0), max_steps=40)
    assert e.steps == 40 and not e.reached_goal


def test_slow_and_missing_ticks_are_counted(tmp_path):
    e = judge(tmp_path, SyntheticTrial(
        solve_ms=lambda k: 90.0 if k % 50 == 0 else 10.0, misses=lambda k: 3 + (k > 60) + (k > 90),
        gate=lambda k: 'residual 0.3 above 0.02' if k in (70, 71) else 'accepted', skip_ticks=(100, 101),
        pose_gaps=((5.0, 5.3), (8.0, 8.05))))
    assert e.deadline_misses == 2 and e.missed_ticks == 2 and e.ticks == 198
    assert e.rejections == {'residual 0.3 above 0.02': 2} and e.ticks_without_plan == 2
    assert e.solve_ms_p50 == 10.0 and e.solve_ms_p99 == 90.0
    assert e.mocap_gaps == 1 and e.mocap_longest_gap == pytest.approx(0.31, abs=1e-6)


def test_a_late_tick_is_not_a_missed_one_and_a_missed_one_is():
    on_time = 0.1 * np.arange(20)
    late = on_time.copy()
    late[7] += 0.06
    assert metrics.missed_ticks(late, 0.1) == 0
    assert metrics.missed_ticks(np.delete(on_time, 7), 0.1) == 1
    assert metrics.missed_ticks(np.delete(late, [9, 10, 11]), 0.1) == 3
    assert metrics.missed_ticks(np.delete(on_time, [6, 8]), 0.1) == 2


def test_a_slow_solve_that_delays_no_other_tick_is_not_a_missed_tick(tmp_path):
    # 100 ms period; every tenth solve takes 80 ms. First as the in-process loop stamps it: when it begins.
    trial = SyntheticTrial(seconds=5.0, solve_ms=lambda k: 80.0 if k % 10 == 0 else 10.0)
    assert judge(tmp_path / 'a', trial, max_steps=50).missed_ticks == 0
    with bag.BagWriter(tmp_path / 'b') as writer:  # as the node stamps it: when it is done
        for topic, kind, log_time, message in bag.read_bag(tmp_path / 'a' / 'trial'):
            if topic == '/diagnostics':
                values = {v.key: v.value for v in message.status[0].values}
                stamp = log_time + 1e-3 * float(values['solve_ms'])
                message.header.stamp = interface.time_message(bag.TYPES, stamp)
            writer.write(topic, kind, round(1e9 * log_time), bag.serialize(message, kind))
    e = evaluation.evaluate(load_flight(tmp_path / 'b'), evaluation.EvaluationSettings(max_steps=50))
    assert e.missed_ticks == 0 and e.ticks == 50


def test_a_drone_that_took_off_and_never_engaged_failed(tmp_path):
    e = judge(tmp_path, SyntheticTrial(seconds=0.0, after=('landing', 'land', 'battery 3.60 V')))
    assert e.failure.cause == 'never_engaged' and 'battery' in e.failure.detail and e.success is False
    assert evaluation.summarise([e]).return_mean == 0.0


def test_a_recording_without_flight_is_judged_open_loop(tmp_path):
    e = judge(tmp_path, SyntheticTrial(seconds=8.0, open_loop=True, pose_gaps=((2.0, 2.5),)))
    assert e.mode == 'open_loop' and e.success is None and e.failure is None
    assert e.ticks >= 118 and e.ticks_without_plan == 0 and e.mocap_gaps == 1
    assert any('a plan at every tick' in r for r in table.remarks(e))
    assert any('open loop' in r for r in table.remarks(e))


def test_a_torn_bag_is_judged_up_to_the_tear_and_says_so(tmp_path):
    path = write_trial(tmp_path / 'trial', SyntheticTrial(seconds=5.0))
    data = (path / 'trial.mcap').read_bytes()
    (path / 'metadata.yaml').unlink()
    (path / 'trial.mcap').write_bytes(data[:len(data) // 2])
    e = evaluation.evaluate(load_flight(path))
    assert e.torn and e.failure.cause == 'incomplete' and 'the recording ends' in e.failure.detail
    assert any('torn' in note for note in e.notes)


def test_stamps_of_another_clock_give_the_same_answers(tmp_path):
    write_trial(tmp_path / 'a', SyntheticTrial(seconds=5.0))
    with bag.BagWriter(tmp_path / 'b') as writer:  # log times an hour later than the stamps
        for topic, kind, log_time, data in bag.read_raw(tmp_path / 'a'):
            writer.write(topic, kind, log_time + 3_600_000_000_000, data)
    a, b = (evaluation.evaluate(load_flight(tmp_path / n), evaluation.EvaluationSettings(max_steps=50))
            for n in 'ab')
    assert any('log times' in note for note in b.notes)
    assert (a.steps, a.min_clearance) == (b.steps, pytest.approx(b.min_clearance))
    assert a.total_return == pytest.approx(b.total_return)


def test_the_commands_print_a_table_json_and_reports_and_say_what_they_cannot_read(tmp_path, capsys):
    good = write_trial(tmp_path / 'good', SyntheticTrial(seconds=4.0, lead=0.5, metadata={'seed': '4'}))
    bad = write_trial(tmp_path / 'bad', SyntheticTrial(
        seconds=4.0, lead=0.5, obstacles=static_field([[0.5, 0.25, 1.1]])))
    report = ['--report', str(tmp_path / 'report')]
    assert evaluate.main([str(good), str(bad), '--max-steps', '40', *report]) == 0
    out = capsys.readouterr().out
    assert '1 of 2 trials succeeded: 50 % (95 % interval 9 to 91 %)' in out and 'collision' in out
    head, units, rule, *_ = out.splitlines()
    assert len(rule) < 150
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert page.count('class="pick"') == 2 and '"seed": "4"' in page
    assert (tmp_path / 'report' / 'good.png').read_bytes().startswith(b'\x89PNG')
    assert evaluate.main([str(good), '--json', '--goal', '0', '0', '1', '--max-steps', '40']) == 0
    data = json.loads(capsys.readouterr().out)
    assert data['trials'][0]['success'] is True and data['summary']['return_sd'] is None
    assert evaluate.main([str(tmp_path / 'absent'), str(good), '--max-steps', '40']) == 1
    said = capsys.readouterr()
    assert 'no such file' in said.err and 'success' in said.out
    assert evaluate.recover_main([str(good)]) == 1 and 'is whole' in capsys.readouterr().err


def test_summary_gives_mean_and_sample_deviation_of_the_returns(tmp_path):
    trials = [SyntheticTrial(seconds=3.0), SyntheticTrial(seconds=3.0, path=settle(tau=5.0)),
              SyntheticTrial(seconds=3.0, obstacles=None)]
    es = [judge(tmp_path / str(i), t, max_steps=30) for i, t in enumerate(trials)]
    s = evaluation.summarise(es)
    returns = [e.total_return for e in es]
    assert s.trials == s.successes == 3
    assert s.return_mean == pytest.approx(np.mean(returns))
    assert s.return_sd == pytest.approx(np.std(returns, ddof=1))
    assert np.isnan(es[2].min_clearance) and es[2].spheres == 0
