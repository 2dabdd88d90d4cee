"""The motion of spheres: the network, its compiled twin, and its place in the policies."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.networks import inference as inference_module
from deqmpc.networks.obstacle_motion import Forecast, Forecaster, ObstacleMotion, constant_velocity, settings_for
from deqmpc.networks.temporal import Settings as NetworkSettings
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.policies import deq_mpc, model, network_only
from deqmpc.policies.deq_mpc import Controller, DeqMpc, DeqMpcPolicy, Settings, imitation_loss
from deqmpc.policies.learned import CrazyflieProblem
from deqmpc.policies.network_only import NetworkOnly
from deqmpc.realtime import build
from deqmpc.solvers import anderson
from deqmpc.tasks.base import Spheres
from deqmpc.types import Obstacles, RigidBodyState

DT, T, K = 0.1, 4, 6
MAIN = NetworkSettings(kind='deq', hidden=32, horizon=T, dt=DT, spheres=True)
KINDS = ['deq', 'nn']


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def motion_network(kind='deq', trained=True, seed=0, **changes):
    """An untrained network is constant velocity; `trained` gives its last layer some weights."""
    torch.manual_seed(seed)
    made = ObstacleMotion(dataclasses.replace(settings_for(dataclasses.replace(MAIN, kind=kind)), **changes))
    if trained:
        torch.nn.init.normal_(made.network.head_out.weight, std=0.1)
    return made


def situation(B=3, count=K, seed=0):
    """x_init, tau, centers, velocity, radii."""
    rng = np.random.default_rng(seed)
    x = 0.1 * rng.normal(size=(B, 12))
    tau = x[:, None] + 0.1 * rng.normal(size=(B, T + 1, 12))
    centers = x[:, None, :3] + rng.normal(size=(B, count, 3))
    return tuple(torch.tensor(v) for v in (x, tau, centers, 0.3 * rng.normal(size=(B, count, 3)),
                                           np.full((B, count), 0.1)))


def joint(method='deq_mpc', kind='deq', trained=True, **changes):
    torch.manual_seed(1)
    problem = CrazyflieProblem().build(Airframe(), DT, T)
    return DeqMpc(problem, TemporalNetwork(dataclasses.replace(MAIN, kind=kind)),
                  Settings(method=method, softness=300.0, **changes), motion_network(kind, trained))


# --- the network alone ---------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_without_training_spheres_keep_their_velocity_to_the_last_bit(kind):
    x, tau, centers, velocity, radii = situation()
    motion = motion_network(kind, trained=False)(x, tau, centers, velocity, radii)
    times = DT * torch.arange(T + 1, dtype=torch.float64)
    assert torch.equal(motion.centers, Spheres(centers, velocity, radii).ahead(times))
    assert motion.ok.all() and motion.converged.all()


@pytest.mark.parametrize('kind', KINDS)
def test_the_present_is_not_predicted_and_the_rest_is(kind):
    x, tau, centers, velocity, radii = situation()
    motion = motion_network(kind)(x, tau, centers, velocity, radii)
    assert torch.equal(motion.centers[:, 0], centers)
    times = DT * torch.arange(T + 1, dtype=torch.float64)
    change = motion.centers - constant_velocity(centers, velocity, times)
    assert torch.allclose(change[:, 1:], times[1:, None, None] * motion.w.double().transpose(1, 2), atol=1e-12)
    assert change[:, 1:].abs().min() > 0


@pytest.mark.parametrize('kind', KINDS)
def test_predictions_follow_a_permutation_of_the_spheres_and_none_sees_another(kind):
    network = motion_network(kind)
    x, tau, centers, velocity, radii = situation()
    first = network(x, tau, centers, velocity, radii)
    both = network(x, tau, centers, velocity, radii, first)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    turned = network(x, tau, centers[:, order], velocity[:, order], radii[:, order])
    assert torch.allclose(turned.centers, first.centers[:, :, order], atol=1e-6)
    for count in (0, 1, 4):
        few = network(x, tau, centers[:, :count], velocity[:, :count], radii[:, :count])
        assert torch.allclose(few.centers, first.centers[:, :, :count], atol=1e-6)
        anew = network(x, tau, centers[:, :count], velocity[:, :count], radii[:, :count], both)
        assert torch.equal(anew.centers, few.centers)  # what was said of other spheres is not fed back


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_equals_its_fields_alone(kind):
    network, given = motion_network(kind), situation(B=4)
    with torch.no_grad():
        first = network(*given)
        second = network(*given, first)
        for i in range(4):
            alone = network(*(v[i:i + 1] for v in given))
            again = network(*(v[i:i + 1] for v in given), alone)
            assert torch.allclose(alone.centers[0], first.centers[i], atol=1e-6)
            assert torch.allclose(again.centers[0], second.centers[i], atol=1e-6)


def test_the_drones_plan_and_the_prediction_before_change_the_prediction():
    network = motion_network('nn')
    x, tau, centers, velocity, radii = situation()
    with torch.no_grad():
        first = network(x, tau, centers, velocity, radii)
        assert not torch.allclose(network(x, tau + 0.3, centers, velocity, radii).centers, first.centers, atol=1e-4)
        assert not torch.allclose(network(x, tau, centers, velocity, radii, first).centers, first.centers, atol=1e-6)


def test_a_warm_equilibrium_needs_fewer_evaluations():
    network, counted, given = motion_network(), [], situation()
    with torch.no_grad():
        first = network(*given)
        cell = network.network.cell
        network.network.cell = lambda z, c: counted.append(len(z)) or cell(z, c)
        network(*given, dataclasses.replace(first, z=None))
        cold = sum(counted)
        network(*given, first)
    assert sum(counted) - cold < 0.6 * cold


@pytest.mark.parametrize('kind', KINDS)
def test_a_field_that_is_not_finite_is_flagged_and_leaves_all_gradients_finite(kind):
    network = motion_network(kind)
    x, tau, centers, velocity, radii = situation()
    clean = network(x, tau, centers, velocity, radii)
    velocity[1, 2, 0] = float('nan')
    x[2, 4] = float('inf')
    answer = network(x, tau, centers, velocity, radii)
    assert answer.ok.sum(dim=1).tolist() == [K, K - 1, 0]
    assert torch.allclose(answer.centers[0], clean.centers[0], atol=1e-6)
    answer.centers[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_the_gradient_agrees_with_finite_differences():
    network = motion_network(gradient_steps=60, fixed_point=anderson.Settings(
        tolerance=1e-12, evaluations=300, regularization=1e-12)).double()
    with torch.no_grad():
        network.network.last_norm.weight.mul_(0.5)
    x, tau, *spheres = situation(B=1, count=2)
    tau.requires_grad_()
    direction = torch.randn_like(tau)
    loss = network(x, tau, *spheres).centers.square().sum()
    slope = (torch.autograd.grad(loss, tau)[0] * direction).sum()

    def at(step):
        with torch.no_grad():
            return network(x, tau + step * direction, *spheres).centers.square().sum()
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4)


def test_wrong_shapes_and_settings_are_named():
    network = motion_network()
    x, tau, centers, velocity, radii = situation()
    with pytest.raises(ValueError, match=r'velocity has shape \(3, 5, 3\), expected \(3, 6, 3\)'):
        network(x, tau, centers, velocity[:, 1:], radii)
    with pytest.raises(ValueError, match=r'tau has shape \(3, 5, 11\), expected \(3, 5, 12\)'):
        network(x, tau[..., 1:], centers, velocity, radii)
    with pytest.raises(ValueError, match='settings of a motion network'):
        ObstacleMotion(MAIN)
    with pytest.raises(ValueError, match=r'dt = 0.05, the problem 0.1'):
        motion_network(dt=0.05).check_fits(joint().problem)


def test_its_hidden_size_is_a_quarter():
    assert settings_for(NetworkSettings(hidden=256)).hidden == 64
    assert settings_for(NetworkSettings(hidden=512)).hidden == 128
    assert settings_for(NetworkSettings(hidden=32)).hidden == 16  # the least that four groups allow
    scaled = settings_for(NetworkSettings(n=6, positions=3, spatial=2, state_scale=(2.0,) * 6))
    assert scaled.n == 13 and scaled.state_scale == (1.0,) * 7 + (2.0,) * 6


# --- pursuit -------------------------------------------------------------------------------------

def pursuit(seed, B=50, count=4, speed=0.8, ahead=3):
    """Spheres that fly at `speed` towards where the drone will be `ahead` knots later: x, tau, centers now, their
    velocity now, radii, and their centers (B, T+1, K, 3) at the knots."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(B, 12, dtype=torch.float64)
    x[:, :3] = torch.rand(B, 3, generator=g, dtype=torch.float64) - 0.5
    v = 2.0 * torch.rand(B, 3, generator=g, dtype=torch.float64) - 1.0
    x[:, 6:9] = v
    tau = x.unsqueeze(1).repeat(1, T + 1, 1)
    tau[:, :, :3] += DT * torch.arange(T + 1).view(1, -1, 1) * v.unsqueeze(1)

    def heading(o, t):
        goal = x[:, :3] + DT * (t + ahead) * v
        return speed * torch.nn.functional.normalize(goal.unsqueeze(1) - o, dim=-1)
    o = x[:, None, :3] + 0.6 * torch.nn.functional.normalize(
        torch.randn(B, count, 3, generator=g, dtype=torch.float64), dim=-1)
    velocity, path = heading(o, -2.0), [o]  # they steer with a delay: what is seen is not where they go
    for t in range(T):
        path.append(path[-1] + DT * heading(path[-1], t))
    return x, tau, o, velocity, torch.full((B, count), 0.1, dtype=torch.float64), torch.stack(path, dim=1)


@pytest.mark.parametrize('kind', KINDS)
def test_a_short_training_beats_constant_velocity_on_spheres_that_pursue_the_drone(kind):
    network = motion_network(kind, trained=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(40):
        *given, path = pursuit(seed=step)
        loss = (network(*given).centers - path).abs().sum(dim=(1, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *fresh, path = pursuit(seed=1000)
    with torch.no_grad():
        first = network(*fresh)
        error = [float((c - path).norm(dim=-1)[:, 1:].mean()) for c in (
            motion_network(trained=False)(*fresh).centers, first.centers, network(*fresh, first).centers)]
    assert error[1] < 0.6 * error[0] and error[2] < 0.8 * error[0]


# --- one field, compiled -------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('compiled', [True, False])
def test_the_forecast_of_one_field_equals_the_batched_network(kind, compiled, monkeypatch):
    def refuse(text):
        raise build.NoCompiler('no C compiler found')
    if not compiled:
        monkeypatch.setattr(build, 'load', refuse)
        monkeypatch.setattr(inference_module._say_once, '__defaults__', (['said'],))
    network = motion_network(kind)
    forecaster, given = Forecaster(network), situation(B=1)
    plain = [v[0].numpy() for v in given]
    with torch.no_grad():
        first = network(*given)
        second = network(*given, first)
    carried = Forecast(first.centers[0].numpy(), first.w[0].double().numpy(),
                       None if first.z is None else first.z[0].numpy())
    for made, expected in ((forecaster(*plain), first), (forecaster(*plain, carried), second)):
        assert made.centers == pytest.approx(expected.centers[0].numpy(), abs=1e-5)
        assert made.w == pytest.approx(expected.w[0].numpy(), abs=2e-5)
    none = forecaster(*plain[:2], np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), carried)
    assert none.centers.shape == (T + 1, 0, 3)
    broken = [v.copy() for v in plain]
    broken[0][3] = np.nan
    assert np.isnan(forecaster(*broken).centers[1:]).all()
    assert np.array_equal(forecaster(*plain, forecaster(*broken)).centers, forecaster(*plain).centers)


# --- in the policies -----------------------------------------------------------------------------

@pytest.mark.parametrize('method', ['deq_mpc', 'diff_mpc'])
@pytest.mark.parametrize('kind', KINDS)
def test_controller_and_model_avoid_the_same_predicted_spheres(method, kind):
    whole, (x, _, centers, velocity, radii) = joint(method, kind), situation(B=1)
    u = torch.ones(1, T, 4, dtype=torch.float64)
    with torch.no_grad():
        cold = whole(x, u, centers, radii, velocity=velocity)
        warm = whole(x, u, centers, radii, cold.warm_start.shifted(), velocity=velocity)
    assert len(cold.motions) == len(cold.x)
    given, controller = [v[0].numpy() for v in (x, u, centers, radii)], Controller(whole)
    first = controller.step(*given, velocity=velocity[0].numpy())
    second = controller.step(*given, first.shifted(1), velocity=velocity[0].numpy())
    for step, expected in ((first, cold), (second, warm)):
        assert step.motion.centers == pytest.approx(expected.motions[-1].centers[0].numpy(), abs=2e-3)
        assert step.x == pytest.approx(expected.x[-1][0].numpy(), abs=2e-3)


@pytest.mark.parametrize('alone', [False, True])
def test_an_untrained_motion_network_plans_as_none_does_and_that_as_with_spheres_at_constant_velocity(alone):
    whole, (x, _, centers, velocity, radii) = joint(trained=False), situation()
    u = torch.ones(len(x), T, 4, dtype=torch.float64)
    plain = DeqMpc(whole.problem, whole.network, whole.settings)
    if alone:
        whole, plain = (NetworkOnly(m.problem, m.network, m.motion) for m in (whole, plain))
    ahead = Spheres(centers, velocity, radii).ahead(DT * torch.arange(T + 1, dtype=torch.float64))
    with torch.no_grad():
        made = [whole(x, u, centers, radii, velocity=velocity), plain(x, u, centers, radii, velocity=velocity),
                plain(x, u, ahead, radii), whole(x, u, ahead, radii)]
    assert all(torch.equal(m.x[-1], made[0].x[-1]) for m in made)
    assert made[0].motions and not any(m.motions for m in made[1:])
    with pytest.raises(ValueError, match='velocity has shape .* and centers'):
        whole(x, u, ahead, radii, velocity=velocity)


def test_the_plans_own_loss_reaches_the_motion_network_through_the_constraints():
    # the main network encodes no spheres: the constraints are the only way
    whole = joint(kind='nn', iterations=1, al_iterations=12, gn_steps=30, tolerance=1e-9, exact_gradient=True)
    whole.network = TemporalNetwork(dataclasses.replace(MAIN, kind='nn', spheres=False))
    whole = whole.double()
    x, _, centers, velocity, radii = situation(B=2)
    centers = x[:, None, :3] + 0.25 * torch.nn.functional.normalize(centers - x[:, None, :3], dim=-1)
    u, weight = torch.ones(2, T, 4, dtype=torch.float64), whole.motion.network.head_out.bias
    direction = torch.zeros_like(weight)
    direction[:3] = torch.tensor([1.0, -0.5, 0.3])

    def loss():
        return whole(x, u, centers, 2.0 * radii, velocity=velocity).x[-1].square().sum()
    slope = (torch.autograd.grad(loss(), weight)[0] * direction).sum()
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight += step * direction
            values.append(loss())
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(float((values[0] - values[1]) / 2e-5), rel=2e-3)


def test_the_loss_adds_the_error_of_the_predicted_motion_over_spheres_that_are_there():
    whole, (x, _, centers, velocity, radii) = joint(iterations=2), situation()
    u = torch.ones(len(x), T, 4, dtype=torch.float64)
    radii[:, 4:] = 0.0
    made = whole(x, u, centers, radii, velocity=velocity)
    target = torch.zeros_like(made.x[0])
    truth = [m.centers.detach() for m in made.motions]
    truth = 0.5 * (truth[0] + truth[1])
    truth[:, :, 4:] += 100.0
    loss, _ = imitation_loss(made, target, centers=truth, motion_share=2.0)
    less, _ = imitation_loss(made, target, centers=truth, motion_share=0.0)
    by_hand = sum((m.centers - truth)[:, :, :4].abs().sum() / (4 * len(x)) for m in made.motions)
    assert float((loss - less).detach()) == pytest.approx(2.0 * float(by_hand.detach()), rel=1e-9)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in whole.motion.parameters())
    assert float(whole.motion.network.first.weight.grad.abs().max()) > 0
    with pytest.raises(ValueError, match='true centers'):
        imitation_loss(made, target)


def test_a_broken_field_leaves_the_other_plans_and_all_gradients_alone():
    whole, (x, _, centers, velocity, radii) = joint(), situation()
    u = torch.ones(len(x), T, 4, dtype=torch.float64)
    clean = whole(x, u, centers, radii, velocity=velocity)
    velocity[1, 0, 0] = float('nan')
    made = whole(x, u, centers, radii, velocity=velocity)
    assert torch.allclose(made.x[-1][[0, 2]], clean.x[-1][[0, 2]], atol=1e-4)
    loss, left_out = imitation_loss(made, torch.zeros_like(made.x[0]), centers=clean.motions[0].centers.detach())
    loss.backward()
    assert left_out == 6 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in whole.parameters() if p.grad is not None)


def test_spheres_without_a_velocity_cost_no_call_of_the_motion_network():
    whole, (x, _, centers, _, radii) = joint(), situation()

    def refuse(*_):
        raise AssertionError('called')
    whole.motion.forward = refuse
    with torch.no_grad():
        assert not whole(x, torch.ones(len(x), T, 4, dtype=torch.float64), centers, radii).motions


# --- on disk and in flight -----------------------------------------------------------------------

@pytest.fixture()
def folder(tmp_path):
    made = model.Model(joint().network, dataclasses.asdict(Settings(softness=300.0)), {}, {}, motion_network())
    model.save(tmp_path / 'm', made)
    return tmp_path / 'm'


def test_a_saved_model_comes_back_with_its_motion_network(folder):
    loaded, original = model.load(folder).motion, motion_network()
    assert loaded.settings == original.settings
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_wrong_settings_of_a_saved_motion_network_are_named(folder):
    path = folder / model.SETTINGS
    values = yaml.safe_load(path.read_text())
    for change, expected in ((dict(spheres=True), 'motion: settings of a motion network'),
                             (dict(hiden=3), "motion: unknown setting 'hiden', did you mean 'hidden'"),
                             (dict(hidden=32), 'weights.safetensors')):
        path.write_text(yaml.safe_dump({**values, 'motion': {**values['motion'], **change}}))
        with pytest.raises(ValueError, match=expected):
            model.load(folder)
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != 'motion'}))
    with pytest.raises(ValueError, match='motion.network'):
        model.load(folder)


@pytest.mark.parametrize('policy_class', [DeqMpcPolicy, network_only.NetworkOnlyPolicy])
def test_a_policy_in_flight_gives_its_motion_network_the_spheres_as_they_are_now_in_the_goals_frame(
        policy_class, folder):
    yaw, stamp = 0.7, 3.0
    turn = rotation.rotate(rotation.from_yaw(yaw), np.eye(3)).T
    policy = policy_class.from_settings({'model': str(folder), 'goal': [0.1, 0.2, 1.0, yaw]})
    state = RigidBodyState(stamp, np.array([0.4, -0.3, 1.2]), rotation.from_yaw(0.3), np.zeros(3), np.zeros(3))
    seen = Obstacles(stamp - 0.5, np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 1.5]]), np.full(2, 0.1),
                     np.array([[0.2, 0.0, -0.1], [0.0, 0.3, 0.0]]))
    plan, warm, status = policy.plan(state, seen)
    motion = warm.step.motion
    now = (seen.position + 0.5 * seen.velocity - np.array([0.1, 0.2, 1.0])) @ turn
    assert motion.centers[0] == pytest.approx(now, abs=1e-12)
    straight = now + DT * T * seen.velocity @ turn
    assert motion.centers[-1] == pytest.approx(straight + DT * T * motion.w[:, -1], abs=1e-12)
    again, after, _ = policy.plan(dataclasses.replace(state, stamp=stamp + DT), dataclasses.replace(
        seen, stamp=stamp + DT), warm)
    assert again is not None and after.step.motion is not None


def test_controllers_of_models_without_motion_take_spheres_as_they_are_now():
    whole, (x, _, centers, velocity, radii) = joint(), situation(B=1)
    given = [v[0].numpy() for v in (x, torch.ones(1, T, 4, dtype=torch.float64))]
    c, v, r = (v[0].numpy() for v in (centers, velocity, radii))
    for controller in (deq_mpc.Controller(DeqMpc(whole.problem, whole.network, whole.settings)),
                       network_only.Controller(NetworkOnly(whole.problem, whole.network))):
        ahead = c + DT * np.arange(T + 1)[:, None, None] * v
        now, known = controller.step(*given, c, r, velocity=v), controller.step(*given, ahead, r)
        assert np.array_equal(now.x, known.x) and now.motion is None
