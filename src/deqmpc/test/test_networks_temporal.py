"""The temporal network: equilibrium gradients, sets of spheres, flags; and its compiled twin."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from deqmpc.networks import convolution as convolution_module
from deqmpc.networks import inference as inference_module
from deqmpc.networks.convolution import convolution, transformed
from deqmpc.networks.equilibrium import equilibrium
from deqmpc.networks.inference import Inference
from deqmpc.networks.normalization import GroupNorm
from deqmpc.networks.temporal import Settings, TemporalNetwork
from deqmpc.realtime import build
from deqmpc.solvers import anderson

SMALL = Settings(hidden=32, n=6, horizon=4, positions=3)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def inputs(settings, B=3, K=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, settings.n))
    tau = x[:, None] + 0.3 * rng.normal(size=(B, settings.horizon + 1, settings.n))
    centers = rng.normal(size=(B, settings.horizon + 1, K, settings.spatial))
    return [torch.tensor(v) for v in (x, tau, centers, np.full((B, K), 0.2))]


def contractive(size=5, radius=0.3):
    g = torch.Generator().manual_seed(1)
    A = torch.randn(size, size, dtype=torch.float64, generator=g)
    A = radius * A / torch.linalg.matrix_norm(A, 2)
    return A, torch.randn(2, size, dtype=torch.float64, generator=g)


@pytest.mark.parametrize('steps', [1, 3, 12])
def test_the_equilibriums_gradient_is_the_exact_implicit_one_up_to_the_contraction_to_the_power_of_steps(steps):
    A, c = contractive()
    c.requires_grad_()
    tight = anderson.Settings(tolerance=1e-13, evaluations=200, regularization=1e-14)
    z, found = equilibrium(lambda z, c: torch.tanh(z @ A.T + c), c, torch.zeros_like(c), tight, steps)
    assert found.converged.all()
    weight = torch.linspace(1.0, 2.0, 5, dtype=torch.float64)
    gradient, = torch.autograd.grad((z * weight).sum(), c)
    for i in range(2):
        slope = torch.diag(1.0 - z[i].detach() ** 2)  # of tanh at the fixed point
        exact = torch.linalg.solve((torch.eye(5, dtype=torch.float64) - slope @ A).T, weight) @ slope
        error = (gradient[i] - exact).norm() / exact.norm()
        assert error < 2.0 * 0.3 ** steps + 1e-11


@pytest.mark.parametrize(('of', 'absolute'), [('input', None), ('weights', 1e-4)])  # biases before a norm do little
def test_the_networks_gradient_agrees_with_finite_differences(of, absolute):
    network = TemporalNetwork(dataclasses.replace(SMALL, gradient_steps=60, spheres=True, fixed_point=anderson.Settings(
        tolerance=1e-12, evaluations=300, regularization=1e-12))).double()
    with torch.no_grad():
        for norm in (network.last_norm, network.second_norm):
            norm.weight.mul_(0.5)
    x, tau, centers, radii = inputs(SMALL)
    variables = [x.requires_grad_()] if of == 'input' else list(network.parameters())
    directions = [torch.randn_like(v) for v in variables]
    loss = network(x, tau, centers, radii).theta.square().sum()
    slopes = [(g * d).sum() for g, d in zip(torch.autograd.grad(loss, variables), directions, strict=True)]

    def at(variable, direction, step):
        with torch.no_grad():
            variable.add_(direction, alpha=step)
            loss = network(x, tau, centers, radii).theta.square().sum()
            variable.sub_(direction, alpha=step)
        return loss
    for slope, variable, direction in zip(slopes, variables, directions, strict=True):
        difference = at(variable, direction, 1e-5) - at(variable, direction, -1e-5)
        assert slope == pytest.approx(difference / 2e-5, rel=1e-4, abs=absolute)


def test_a_cold_fixed_point_of_a_new_network_is_found_within_ten_evaluations():
    network = TemporalNetwork(Settings(hidden=128))
    answer = network(*inputs(network.settings, B=20)[:2])
    assert answer.converged.all() and answer.evaluations.max() <= 10


@pytest.mark.parametrize('kind', ['deq', 'nn'])
def test_a_batch_equals_its_samples_alone(kind):
    network = TemporalNetwork(dataclasses.replace(SMALL, kind=kind, spheres=True))
    given = inputs(SMALL, B=4)
    with torch.no_grad():
        together = network(*given)
        for i in range(4):
            alone = network(*(v[i:i + 1] for v in given))
            assert torch.allclose(alone.theta[0], together.theta[i], atol=1e-5)
            assert alone.evaluations == together.evaluations[i]


@pytest.mark.parametrize('kind', ['deq', 'nn'])
def test_a_sample_that_is_not_finite_is_flagged_and_leaves_all_gradients_finite(kind):
    network = TemporalNetwork(dataclasses.replace(SMALL, kind=kind))
    x, tau, *_ = inputs(SMALL)
    clean = network(x, tau)
    tau[1, 2, 0] = float('nan')
    answer = network(x, tau)
    assert answer.ok.tolist() == [True, False, True]
    assert answer.theta[1].isnan().all()
    assert torch.allclose(answer.theta[[0, 2]], clean.theta[[0, 2]], atol=1e-5)
    answer.theta[answer.ok].abs().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize('changes', [{}, dict(direct=16, sight=8)], ids=['encoded', 'and seen'])
def test_spheres_may_come_in_any_order_and_absent_ones_change_nothing(changes):
    network = TemporalNetwork(dataclasses.replace(SMALL, spheres=True, **changes))
    x, tau, centers, radii = inputs(SMALL)
    with torch.no_grad():
        theta = network(x, tau, centers, radii).theta
        order = torch.tensor([3, 0, 4, 1, 2])
        assert torch.allclose(network(x, tau, centers[:, :, order], radii[:, order]).theta, theta, atol=1e-5)
        more = torch.cat([centers, torch.zeros_like(centers[:, :, :2])], dim=2)
        padded = network(x, tau, more, torch.cat([radii, torch.zeros_like(radii[:, :2])], dim=1)).theta
        assert torch.allclose(padded, theta, atol=1e-5)
        assert not torch.allclose(network(x, tau, centers, 2.0 * radii).theta, theta, atol=1e-3)
        none = network(x, tau, centers[:, :, :0], radii[:, :0]).theta
        assert torch.allclose(network(x, tau, centers, 0.0 * radii).theta, none, atol=1e-5)


def test_the_direct_part_sees_where_spheres_are_and_where_they_go_and_nothing_without_sight():
    x, _, centers, radii = inputs(SMALL)
    moved = torch.cat([centers[:, :-1], centers[:, -1:] + 0.5], dim=1)
    for sight in (0, 8):
        network = TemporalNetwork(dataclasses.replace(SMALL, spheres=True, direct=16, sight=sight))
        with torch.no_grad():
            here, moving, shifted = (network.of_state(x.float(), c, radii) for c in (centers, moved, centers + 0.5))
        assert here.isfinite().all()
        assert all(torch.equal(here, other) == (sight == 0) for other in (moving, shifted))


@pytest.mark.parametrize('changes', [dict(direct=16), dict(spheres=True), dict(spheres=True, direct=16, sight=-1)])
def test_sight_needs_a_direct_part_and_spheres(changes):
    with pytest.raises(ValueError, match=r'sight = .*; expected an integer >= 0'):
        dataclasses.replace(SMALL, **{'sight': 8, **changes})


@pytest.mark.parametrize('output', ['velocity', 'delta'])
def test_the_output_is_read_as_the_settings_say(output):
    network = TemporalNetwork(dataclasses.replace(SMALL, output=output, dt=0.1))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    theta = network.predict(x, torch.ones(1, 4, 6))
    assert torch.equal(theta[0, 0], x[0])
    velocity = x[0, 3:] + 1.0 if output == 'delta' else torch.ones(3)
    assert torch.allclose(theta[0, 1:], torch.cat([x[0, :3] + 0.1, velocity]).expand(4, 6))


def convolved(N, dtype, bfloat16=False):
    """Output and gradients (input, weight) of this convolution, and torch's in float64."""
    x, w = torch.randn(3, N, 32, dtype=dtype), 0.1 * torch.randn(16, 32, 3, dtype=dtype)
    b, g = torch.randn(16, dtype=dtype), torch.randn(3, N, 16, dtype=dtype)
    results = []
    for exact in (False, True):
        given = [(v.double() if exact else v).requires_grad_() for v in (x.clone(), w.clone())]
        if exact:
            y = torch.nn.functional.conv1d(given[0].transpose(1, 2), given[1], b.double(), padding=1).transpose(1, 2)
        else:
            y = convolution(*given, b, transformed(given[1], N, bfloat16))
        results.append([y, *torch.autograd.grad(y, given, g.to(y))])
    return results


@pytest.mark.parametrize('N', [1, 2, 3, 4, 5, 12, 33])
def test_the_convolution_and_its_gradients_are_torchs_to_rounding(N):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 3e-6)):
        for made, exact in zip(*convolved(N, dtype), strict=True):
            assert made.shape == exact.shape and (made - exact).norm() < bound * exact.norm()


def test_bfloat16_products_stay_within_their_rounding_of_the_convolution():
    (y, *gradients), (exact, *true) = convolved(5, torch.float32, bfloat16=True)
    assert (exact - y).norm() < 2.0 ** -7 * exact.norm()
    for a, e in zip(gradients, true, strict=True):
        assert (a - e).norm() < 2.0 ** -6 * e.norm()


def test_bfloat16_products_follow_a_change_of_the_weights():
    network = TemporalNetwork(SMALL)
    network.bfloat16 = True
    x, tau, *_ = inputs(SMALL)
    before = network(x, tau).theta
    before.sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    after = network(x, tau).theta
    network.bfloat16 = False
    assert torch.allclose(after, network(x, tau).theta, atol=0.1) and not torch.allclose(after, before, atol=0.1)


def test_a_network_that_has_answered_in_inference_mode_learns_afterwards():
    network = TemporalNetwork(SMALL)
    x, tau, *_ = inputs(SMALL)
    convolution_module._matrices.cache_clear()
    with torch.inference_mode():
        assert network(x, tau).ok.all()
    network(x, tau).theta.sum().backward()
    assert network.first.weight.grad.abs().max() > 0


def test_the_norm_and_its_backward_pass_are_torchs():
    norm, twin = GroupNorm(4, 16).double(), torch.nn.GroupNorm(4, 16).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    twin.load_state_dict(norm.state_dict())
    x, g = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 16, dtype=torch.float64)
    y, z = norm(x), twin(x.transpose(1, 2)).transpose(1, 2)
    made = torch.autograd.grad(y, (x, norm.weight, norm.bias), g)
    expected = torch.autograd.grad(z, (x, twin.weight, twin.bias), g)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip([y, *made], [z, *expected], strict=True))


TWINS = [dict(), dict(kind='nn', blocks=2), dict(spheres=True), dict(kind='nn', spheres=True, output='delta'),
         dict(expansion=2, horizon=1), dict(horizon=20), dict(horizon=7, hidden=64, state_scale=(2.0,) * 6),
         dict(spheres=True, direct=16, sight=8)]


@pytest.mark.parametrize('changes', TWINS, ids=str)
def test_the_compiled_network_equals_the_torch_module(changes):
    settings = dataclasses.replace(SMALL, **changes)
    network = TemporalNetwork(settings)
    twin = Inference(network)
    if not twin.compiled:
        pytest.skip('no C compiler here')
    cold, z = None, None
    for seed in range(3):
        given = [v[0].numpy() for v in inputs(settings, B=1, seed=seed)]
        with torch.no_grad():
            first = None if z is None else torch.tensor(z)[None]
            expected = network(*(torch.tensor(v)[None] for v in given), z=first)
        answer = twin(*given, z=z)
        assert answer.theta == pytest.approx(expected.theta[0].numpy(), abs=2e-5)
        assert answer.evaluations == int(expected.evaluations) and answer.converged == bool(expected.converged)
        assert answer.residual == pytest.approx(float(expected.residual), rel=1e-2, abs=1e-6)
        if settings.kind == 'deq':
            # Anderson's weights magnify the rounding of the residuals' inner products
            assert answer.z == pytest.approx(expected.z[0].numpy(), abs=5e-5)
            cold = answer if cold is None else cold
            z = cold.z
    if settings.kind == 'deq':
        given = [v[0].numpy() for v in inputs(settings, B=1)]
        assert twin(*given, z=cold.z).evaluations == 1  # a start at the equilibrium


def test_float16_weights_change_the_prediction_by_their_rounding_only():
    network = TemporalNetwork(SMALL)
    half = Inference(network, 'float16')
    if not half.compiled:
        pytest.skip('no C compiler here')
    rounded = TemporalNetwork(SMALL)
    rounded.load_state_dict(network.state_dict())
    with torch.no_grad():
        for name in ('injection', 'first', 'second', 'head_in'):
            w = getattr(rounded, name).weight
            w.copy_(w.half().float())
    given = [v[0].numpy() for v in inputs(SMALL, B=1)]
    assert half(*given).theta == pytest.approx(Inference(rounded)(*given).theta, abs=2e-5)
    assert half.bytes_read(3) * 2 == Inference(network).bytes_read(3)


def test_without_a_compiler_torch_answers_and_the_log_says_so_once(monkeypatch, caplog):
    def refuse(text):
        raise build.NoCompiler('no C compiler found')
    monkeypatch.setattr(build, 'load', refuse)
    monkeypatch.setattr(inference_module._say_once, '__defaults__', ([],))
    network = TemporalNetwork(dataclasses.replace(SMALL, spheres=True))
    with caplog.at_level(logging.WARNING):
        Inference(network)
        slow = Inference(network)
    assert len(caplog.records) == 1 and not slow.compiled
    given = [v[0].numpy() for v in inputs(SMALL, B=1)]
    answer = slow(*given)
    monkeypatch.undo()
    assert answer.theta == pytest.approx(Inference(network)(*given).theta, abs=2e-5)
    assert slow(*given, z=answer.z).evaluations == 1


def test_inference_flags_numbers_that_are_not_finite_and_recovers_from_a_broken_warm_start():
    twin = Inference(TemporalNetwork(SMALL))
    x, tau = (v[0].numpy() for v in inputs(SMALL, B=1)[:2])
    answer = twin(x, tau)
    broken = answer.z.copy()
    broken[0, 0] = np.nan
    assert np.array_equal(twin(x, tau, z=broken).theta, answer.theta)
    x[2] = np.inf
    assert not twin(x, tau).ok and np.isnan(twin(x, tau).theta).all()


def test_wrong_shapes_and_settings_are_named():
    network = TemporalNetwork(SMALL)
    x, tau, *_ = inputs(SMALL)
    with pytest.raises(ValueError, match=r'tau has shape \(3, 4, 6\), expected \(3, 5, 6\)'):
        network(x, tau[:, 1:])
    with pytest.raises(ValueError, match=r'tau has shape \(4, 6\), expected \(5, 6\)'):
        Inference(network)(x[0].numpy(), tau[0, 1:].numpy())
    with pytest.raises(ValueError, match='centers and radii must be given'):
        TemporalNetwork(dataclasses.replace(SMALL, spheres=True))(x, tau)
    with pytest.raises(ValueError, match='storage'):
        Inference(network, 'int4')
    for wrong in (dict(kind='rnn'), dict(hidden=20), dict(horizon=0), dict(output='angle'), dict(state_scale=(1.0,))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)
