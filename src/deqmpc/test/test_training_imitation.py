"""Training: data come in as said, runs are deterministic and resume, a short run learns."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deqmpc import datasets, tasks
from deqmpc.datasets import Demonstrations
from deqmpc.networks.inference import Inference
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.policies import model as model_folder
from deqmpc.training import checkpoint, train
from deqmpc.training.imitation import (
    VARIANTS,
    Settings,
    Streaming,
    Trainer,
    begin_with,
    build_model,
    fit_direct,
    state_scale,
)

TASK = tasks.make('quadrotor')


def demonstrations(count=12, steps=24, seed=0) -> Demonstrations:
    """Trajectories of a linear feedback to hovering from small errors: enough to learn from."""
    x, _ = TASK.sample(count, torch.Generator().manual_seed(seed))
    x = 0.05 * x
    states, controls = [x], []
    for _ in range(steps - 1):
        lift = -0.15 * x[:, 2:3] - 0.15 * x[:, 8:9]
        roll = 0.02 * (-4.0 * x[:, 3:4] - x[:, 9:10])
        pitch = 0.02 * (-4.0 * x[:, 4:5] - x[:, 10:11])
        u = TASK.u_ref + torch.cat([lift + roll - pitch, lift - roll - pitch, lift - roll + pitch,
                                    lift + roll + pitch], dim=1)
        controls.append(u)
        x = TASK.step(x, u)
        states.append(x)
    controls.append(controls[-1])
    flat = [torch.stack(v, dim=1).flatten(0, 1).numpy() for v in (states, controls)]
    return Demonstrations(*flat, np.full(count, steps), np.zeros((count, 0, 3)), np.zeros((count, 0, 3)),
                          np.zeros((count, 0)))


def trainer(variant='deq_mpc_deq', steps=6, **changes) -> Trainer:
    torch.manual_seed(0)
    d = demonstrations()
    settings = replace(Settings(steps=steps, batch=8, streaming=2), **changes)
    model = build_model(TASK, variant, 16, state_scale(d, TASK, datasets.split(d, 0)[0]))
    return Trainer(TASK, model, d, settings)


def weights(t: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def test_streaming_plans_start_at_consecutive_states_of_the_window_and_are_warm_from_the_second_on():
    t = trainer()
    w = t.windows(np.array([0, 1]), np.array([0, 3]))
    plans = list(Streaming(t.model, TASK, w, 2))
    assert len(plans) == 3
    for s, (made, target, _) in enumerate(plans):
        assert torch.equal(target, w.x[:, s:s + 6])
        assert torch.allclose(made.x[-1][:, 0], w.x[:, s], atol=1e-3)
        assert len(made.x) == (6 if s == 0 else 1)


@pytest.mark.parametrize('variant', sorted(VARIANTS))
def test_a_short_run_lowers_the_validation_error_of_every_variant(variant):
    t = trainer(variant, steps=25, batch=16)
    before = t.validate(50)
    for _ in range(25):
        report = t.step()
        assert math.isfinite(report.loss) and report.skipped == 0
    after = t.validate(50)
    assert after.cold < 0.9 * before.cold and after.streamed < 0.9 * before.streamed


def test_a_model_with_a_motion_network_learns_a_motion_that_velocity_does_not_tell():
    """Spheres that speed up: what the velocity alone predicts is short."""
    task = tasks.make('crazyflie_obs', spheres=3)
    steps, at = 30, 0.1 * torch.arange(30, dtype=torch.float64)[:, None, None]
    start, push = torch.tensor([[[1.0, 1, 1], [1, -1, 1], [-1, 1, 1]]]).double(), torch.tensor([0.0, 0.0, 0.6]).double()
    centers, velocity = start + 0.5 * at**2 * push, (at * push).expand(steps, 3, 3)
    d = Demonstrations(np.zeros((2 * steps, 12)), np.ones((2 * steps, 4)), np.full(2, steps),
                       np.concatenate([centers.numpy()] * 2), np.concatenate([velocity.numpy()] * 2),
                       np.full((2, 3), 0.1))
    torch.manual_seed(0)
    t = Trainer(task, build_model(task, 'deq_mpc_nn', 16, motion=True), d, Settings(steps=40, batch=8, decay=1.0))

    def error():
        w = t.windows(np.array([0]), np.array([10]))
        made, _, true = next(iter(Streaming(t.model, task, w, 0)))
        return float((made.motions[-1].centers - true).abs().max().detach())
    before = error()
    assert before == pytest.approx(0.5 * 0.6 * 0.5**2, rel=1e-3)  # constant velocity misses a/2 t^2
    for _ in range(40):
        t.step()
    assert error() < 0.6 * before


def test_a_run_that_was_stopped_ends_with_the_same_weights_bit_for_bit(tmp_path):
    whole = trainer()
    for _ in range(6):
        whole.step()
    part = trainer()
    for _ in range(2):
        part.step()
    checkpoint.save(tmp_path, part, {'seed': 0})
    resumed = trainer()
    assert checkpoint.load(tmp_path, resumed, {'seed': 0}) and resumed.done == 2
    for _ in range(4):
        resumed.step()
    assert torch.equal(weights(whole), weights(resumed))


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path):
    t = trainer()
    t.step()
    checkpoint.save(tmp_path, t, {'seed': 0, 'hidden': 16})
    with pytest.raises(ValueError, match='seed: 0 there, 1 now'):
        checkpoint.load(tmp_path, trainer(), {'seed': 1, 'hidden': 16})


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    (tmp_path / checkpoint.NAME).write_bytes(b'torn')
    with pytest.raises(ValueError, match=checkpoint.NAME):
        checkpoint.load(tmp_path, trainer(), {})


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted():
    t = trainer()
    before = weights(t)

    def poison(parameters):
        for p in parameters:
            p.grad.fill_(float('nan'))
    assert t.step(average=poison).skipped == 1
    assert torch.equal(before, weights(t))


def test_two_halves_of_a_batch_average_to_the_gradient_of_the_whole():
    found = []
    for share in (slice(0, 4), slice(4, 8), slice(None)):
        t = trainer()
        kept = []
        t.step(share, lambda parameters, kept=kept: kept.extend(p.grad.flatten().clone() for p in parameters))
        found.append(torch.cat(kept))
    assert torch.allclose(0.5 * (found[0] + found[1]), found[2], rtol=1e-3, atol=1e-3 * found[2].abs().max())


def test_windows_go_on_where_the_policy_leads_if_asked_and_else_at_the_experts_states():
    t = trainer()
    w = t.windows(np.array([0, 1]), np.array([0, 3]))
    made = list(Streaming(t.model, TASK, w, 2, torch.tensor([True, False])))
    for s in (1, 2):
        led = TASK.step(made[s - 1][0].x[-1][:, 0].detach(), made[s - 1][0].u[-1][:, 0].detach())
        start = made[s][0].x[-1][:, 0]
        assert torch.allclose(start[0], led[0], atol=1e-3) and torch.allclose(start[1], w.x[1, s], atol=1e-3)
        assert (start[0] - w.x[0, s]).abs().max() > 1e-2  # an untrained policy leaves the expert
        assert torch.equal(made[s][1], w.x[:, s:s + 6])  # what is tracked stays the expert's


def test_noise_moves_first_states_by_its_share_of_their_scale_and_nothing_else():
    t = trainer(batch=400, noise=0.1)
    w = t.windows(*t.draw(t.train, 400, t.generator))
    disturbed, own = t._disturbed(w, slice(None))
    moved = (disturbed.x[:, 0] - w.x[:, 0]) / t.model.network.scale
    assert torch.allclose(moved.std(dim=0), torch.full((12,), 0.1).double(), rtol=0.2)
    assert torch.equal(disturbed.x[:, 1:], w.x[:, 1:]) and own is None


def test_early_windows_are_nearer_to_the_beginning_and_end_within_their_trajectory():
    plain, early = trainer(batch=500), trainer(batch=500, early=3.0)
    _, first = plain.draw(plain.train, 500, plain.generator)
    which, earlier = early._draw_early()
    assert earlier.mean() < 0.7 * first.mean()
    assert (earlier + early.length <= early.demonstrations.lengths[which]).all()


def test_an_untrained_encoder_takes_the_goal_for_zero():
    task = tasks.make('qpole')
    torch.manual_seed(0)
    network = build_model(task, 'deq_mpc_nn', 16, (2.0,) * 14).network
    torch.manual_seed(0)
    plain = TemporalNetwork(network.settings)
    at_goal = network.node.linear((task.goal.float() + 0.3) / network.scale)
    assert torch.allclose(at_goal, plain.node.linear(torch.full((14,), 0.15)), atol=1e-6)


@pytest.mark.parametrize('direct, sight', [(0, 0), (24, 0), (24, 8)])
def test_a_training_may_begin_with_a_model_that_knew_no_spheres_and_then_answers_as_it_did(direct, sight):
    torch.manual_seed(0)
    old = build_model(tasks.make('qpole'), 'deq_mpc_deq', 16, direct=direct)
    task = tasks.make('qpole_obs')
    model = build_model(task, 'deq_mpc_deq', 16, direct=direct, sight=sight)
    begin_with(model, old.network, 'old')
    x, spheres = task.sample(3, torch.Generator().manual_seed(0))
    tau = x.unsqueeze(1).expand(-1, 6, -1)
    with torch.no_grad():
        ours = model.network(x, tau, spheres.ahead(torch.zeros(6)), spheres.radii).theta
        assert torch.allclose(ours, old.network(x, tau).theta, atol=1e-5)
    with pytest.raises(ValueError, match='other: its network has'):
        begin_with(build_model(task, 'deq_mpc_nn', 16), old.network, 'other')
    with pytest.raises(ValueError, match='spheres'):
        begin_with(old, model.network, 'other')


@pytest.mark.parametrize('output', ['velocity', 'delta'])
def test_a_fitted_direct_part_answers_what_the_expert_does_next(output):
    d = demonstrations(count=40)
    model = build_model(TASK, 'deq_mpc_deq', 16, state_scale(d, TASK, datasets.split(d, 0)[0]), output=output,
                        direct=48)
    trainer = Trainer(TASK, model, d, Settings(steps=0))
    error = fit_direct(trainer, 3000, batch=64, count=2000)
    x = datasets.windows(d, TASK, trainer.train, np.full(len(trainer.train), 12), 6).x
    with torch.no_grad():
        theta = model.network(x[:, 0], x[:, :1].expand(-1, 6, -1)).theta
    staying = (x[:, :1] - x).square().mean(dim=0).sqrt()[1:]
    missed = (theta - x).square().mean(dim=0).sqrt()[1:]
    assert missed.norm() < 0.2 * staying.norm() and error < 0.3 and theta.isfinite().all()


def test_a_direct_part_with_sight_is_fitted_to_what_spheres_do_to_the_expert():
    task, rng = tasks.make('qpole_obs', spheres=1), np.random.default_rng(0)
    side = rng.choice([-1.0, 1.0], size=40)  # the sphere is above or below, and the expert goes the other way
    x = np.tile(task.goal.numpy(), (40, 16, 1))
    x[..., 2] += rng.uniform(-3.0, 3.0, (40, 1))
    centers = x[:, :1, :3] + side[:, None, None] * [0.0, 0.0, 1.0]
    x[..., 2] -= side[:, None] * 0.1 * np.arange(16)
    d = Demonstrations(x.reshape(-1, 14), np.zeros((40 * 16, 4)), np.full(40, 16), centers, 0.0 * centers,
                       np.full((40, 1), 0.5))
    errors = {}
    for sight in (0, 16):
        torch.manual_seed(0)
        model = build_model(task, 'deq_mpc_nn', 16, (1.0,) * 14, output='delta', direct=64, sight=sight)
        errors[sight] = fit_direct(Trainer(task, model, d, Settings(steps=0)), 1500, batch=64, count=2000)
    assert errors[16] < 0.5 * errors[0]


def test_a_network_without_a_direct_part_has_nothing_to_fit():
    with pytest.raises(ValueError, match='no direct part to fit'):
        fit_direct(trainer('deq_mpc_nn'), 1)


def test_of_a_network_of_another_size_the_direct_part_is_taken():
    made, given = (build_model(TASK, variant, hidden, output='delta', direct=24)
                   for variant, hidden in (('deq_mpc_deq', 32), ('diff_mpc_nn', 16)))
    begin_with(made, given.network, 'given')
    x = TASK.sample(4, torch.Generator().manual_seed(0))[0].float()
    tau = x.unsqueeze(1).expand(-1, 6, -1)
    with torch.no_grad():
        alone = given.network.predict(x, given.network.of_state(x))
        assert torch.allclose(made.network(x, tau).theta, alone, atol=1e-6)
    with pytest.raises(ValueError, match='given: its network has'):
        begin_with(made, build_model(TASK, 'diff_mpc_nn', 16, output='delta', direct=8).network, 'given')


@pytest.mark.parametrize('hidden', [16, 32])
@pytest.mark.parametrize('own, theirs', [(8, 16), (0, 16)])
def test_sight_of_another_width_is_refused_by_name(hidden, own, theirs):
    task = tasks.make('qpole_obs')
    made, given = (build_model(task, 'deq_mpc_nn', h, direct=24, sight=v) for h, v in ((16, own), (hidden, theirs)))
    with pytest.raises(ValueError, match='given: its network has'):
        begin_with(made, given.network, 'given')


def test_compiled_inference_has_the_direct_part_too():
    torch.manual_seed(0)
    network = build_model(tasks.make('qpole'), 'deq_mpc_nn', 16, output='delta', direct=24).network
    x = tasks.make('qpole').sample(3, torch.Generator().manual_seed(0))[0]
    tau = x.unsqueeze(1).expand(-1, 6, -1).contiguous()
    with torch.no_grad():
        theta, without = network(x, tau).theta.double().numpy(), network.of_state(x.float()).abs().mean()
    compiled = Inference(network)
    assert without > 1e-2
    assert np.abs(compiled.many(x.numpy(), tau.numpy())[0] - theta).max() < 1e-4
    assert np.abs(compiled(x[0].numpy(), tau[0].numpy()).theta - theta[0]).max() < 1e-4
    far = compiled(1e6 * x[0].numpy(), 1e6 * tau[0].numpy())
    assert far.ok and np.isfinite(far.theta).all()


def test_a_network_alone_cannot_go_on_where_it_leads():
    with pytest.raises(ValueError, match='own_states = 0.5; expected 0'):
        trainer('nn', own_states=0.5)


def test_the_learning_rate_falls_from_its_start_to_the_share_that_is_left():
    s = Settings(steps=100, learning_rate=1e-2, decay=0.1)
    rates = [s.rate(i) for i in range(101)]
    assert rates[0] == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-3)
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


def test_the_command_trains_saves_a_model_with_its_card_and_continues(tmp_path):
    datasets.save(tmp_path / 'd.npz', demonstrations())
    command = ['quadrotor', '--demonstrations', str(tmp_path / 'd.npz'), '--smoke', '--out', str(tmp_path / 'run'),
               '--log-every', '5', '--policy', 'deq_mpc_nn']
    assert train.main(command) == 0
    made = model_folder.load(tmp_path / 'run/model')
    assert made.card['task'] == 'quadrotor' and made.card['seed'] == 0 and made.card['validation']['cold'] > 0
    assert made.method['method'] == 'deq_mpc' and made.network.settings.kind == 'nn'
    with Path(tmp_path / 'run/metrics.csv').open() as file:
        assert [int(row['step']) for row in csv.DictReader(file)] == [5, 10, 15, 20]
    assert train.main(command) == 0  # nothing left to do: validates and saves again


def test_two_processes_learn_what_one_does(tmp_path):
    datasets.save(tmp_path / 'd.npz', demonstrations())
    command = ['quadrotor', '--demonstrations', str(tmp_path / 'd.npz'), '--steps', '4', '--batch', '8',
               '--hidden', '16', '--direct', '8', '--fit', '20', '--restart', '--validate-every', '1',
               '--log-every', '1', '--out']
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
                'deqmpc.training.train']
    together = subprocess.run([*launcher, *command, str(tmp_path / 'two')], capture_output=True, text=True, timeout=120)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count('direct part: error') == 1
    assert train.main([*command, str(tmp_path / 'one')]) == 0
    errors = []
    for run in ('one', 'two'):
        with (tmp_path / run / 'metrics.csv').open() as file:
            errors.append([float(row['valid_streamed']) for row in csv.DictReader(file)])
    assert len(errors[0]) == 4 and errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_the_command_gives_the_model_a_motion_network_where_it_is_asked_for(tmp_path):
    task = tasks.make('crazyflie_dynobs', spheres=2)
    x, spheres = task.sample(4, torch.Generator().manual_seed(0))
    still = Demonstrations(x.repeat_interleave(8, dim=0).numpy(), np.ones((32, 4)), np.full(4, 8),
                           spheres.centers.numpy(), spheres.velocity.numpy(), spheres.radii.numpy())
    datasets.save(tmp_path / 'd.npz', still)
    command = ['crazyflie_dynobs', '--change', 'spheres=2', '--demonstrations', str(tmp_path / 'd.npz'), '--policy',
               'deq_mpc_nn', '--steps', '2', '--batch', '4', '--hidden', '16', '--windows', '4']
    for options, wanted in (([], False), (['--motion'], True)):
        out = tmp_path / f'run{wanted}'
        assert train.main([*command, *options, '--out', str(out)]) == 0
        made = model_folder.load(out / 'model')
        assert (made.motion is not None) == wanted == made.card['motion']


def test_the_command_names_a_wrong_setting_and_a_missing_file(tmp_path, capsys):
    assert train.main(['quadrotor', '--demonstrations', str(tmp_path / 'none.npz')]) == 1
    assert 'none.npz' in capsys.readouterr().err
    datasets.save(tmp_path / 'd.npz', demonstrations())
    assert train.main(['quadrotor', '--demonstrations', str(tmp_path / 'd.npz'), '--smoke', '--method',
                       'iterations=none', '--out', str(tmp_path / 'r')]) == 1
    assert 'iterations=none' in capsys.readouterr().err
