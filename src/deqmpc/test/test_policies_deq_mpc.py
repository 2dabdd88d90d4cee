"""DEQ-MPC: gradients through network and solver, warm starts, flags, the one-sample controller, models on disk."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.networks.temporal import Settings as NetworkSettings
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.policies import model
from deqmpc.policies.deq_mpc import Controller, DeqMpc, DeqMpcPolicy, Settings, distance, imitation_loss
from deqmpc.policies.learned import CrazyflieProblem, Step
from deqmpc.policies.network_only import NetworkOnly, NetworkOnlyPolicy
from deqmpc.solvers.augmented_lagrangian import Status
from deqmpc.types import Obstacles, RigidBodyState

VARIANTS = [(method, kind) for method in ('deq_mpc', 'diff_mpc') for kind in ('deq', 'nn')]
DT, T, K = 0.1, 4, 6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def network(kind='deq', seed=0):
    torch.manual_seed(seed)
    return TemporalNetwork(NetworkSettings(kind=kind, hidden=32, horizon=T, dt=DT, spheres=True))


def joint(method='deq_mpc', kind='deq', seed=0, **changes):
    problem = CrazyflieProblem().build(Airframe(), DT, T)
    return DeqMpc(problem, network(kind, seed), Settings(method=method, softness=300.0, **changes))


def situation(B=4, seed=0):
    rng = np.random.default_rng(seed)
    x = 0.1 * rng.normal(size=(B, 12))
    x[:, :3] += rng.uniform(-0.5, 0.5, size=(B, 3))
    centers = x[:, None, :3] + rng.normal(size=(B, K, 3))
    return tuple(torch.tensor(v) for v in (x, np.ones((B, T, 4)), centers, np.full((B, K), 0.1)))


@pytest.mark.parametrize(('method', 'kind'), VARIANTS)
def test_each_variant_plans_and_its_loss_falls_along_its_gradient(method, kind):
    deq_mpc = joint(method, kind)
    given = situation()
    target = 0.0 * deq_mpc(*given).x[-1].detach()
    made = deq_mpc(*given)
    assert len(made.x) == (6 if method == 'deq_mpc' else 1)
    assert made.solutions[-1].defect.max() < 1e-2
    loss, left_out = imitation_loss(made, target)
    assert left_out == 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in deq_mpc.parameters() if p.grad is not None)
    squared = sum(float(p.grad.square().sum()) for p in deq_mpc.parameters() if p.grad is not None)
    with torch.no_grad():
        for p in deq_mpc.parameters():
            p -= 1e-3 * p.grad / squared ** 0.5
        after, _ = imitation_loss(deq_mpc(*given), target)
    assert after < loss.detach()


@pytest.mark.parametrize('compiled', [True, False])
def test_the_first_iterates_gradient_agrees_with_finite_differences(compiled):
    # one iterate of a feed-forward network: no fixed point's tolerance and no warm start's history in the way
    deq_mpc = joint(kind='nn', iterations=1, al_iterations=12, gn_steps=30, tolerance=1e-9, exact_gradient=True,
                    compiled=compiled).double()
    given = situation(B=2)
    weight = deq_mpc.network.head_out.bias
    direction = torch.randn_like(weight)

    def loss():
        return deq_mpc(*given).x[-1].square().sum()
    slope = (torch.autograd.grad(loss(), weight)[0] * direction).sum()
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight += step * direction
            values.append(loss())
    assert slope == pytest.approx(float((values[0] - values[1]) / 2e-5), rel=1e-3)


@pytest.mark.parametrize('compiled', [True, False])
def test_a_finished_plan_obeys_dynamics_and_bounds_where_few_iterations_left_it_short(compiled):
    deq_mpc = joint(iterations=1, gn_steps=1, al_iterations=1, compiled=compiled)
    given = situation(B=12)
    with torch.no_grad():
        short, whole = deq_mpc(*given).solutions[-1], deq_mpc(*given, finish=True).solutions[-1]
    assert short.defect.max() > 1e-2
    assert whole.converged.all() and whole.defect.max() <= 1e-4
    residual = deq_mpc.problem.defects(deq_mpc.problem.instances(given[0], whole.x, given[1]), whole.x, whole.u)
    assert residual.abs().max() <= 1e-4
    assert torch.equal(whole.warm_start.x, whole.x) and (whole.steps > short.steps).all()


def test_a_plan_from_beyond_a_soft_bound_is_finished_where_the_bound_gives_way():
    problem = CrazyflieProblem().build(Airframe(), DT, T, floor=0.0)
    deq_mpc = DeqMpc(problem, network(), Settings(softness=300.0, iterations=1, gn_steps=1, al_iterations=1))
    x, u, centers, radii = situation(B=3)
    x[:, 2], centers = -0.15, centers + 9.0  # m below the floor, too far to be above it at the first knot
    with torch.no_grad():
        solution = deq_mpc(x, u, centers, radii, finish=True).solutions[-1]
    assert solution.defect.max() <= 1e-4 and (solution.violation > 0.01).all()
    step = Controller(deq_mpc).step(*(v[0].numpy() for v in (x, u)), np.repeat(centers[0].numpy()[None], T + 1, axis=0),
                                    radii[0].numpy())
    assert step.defect <= 1e-4


def test_a_sphere_that_a_soft_price_lets_the_plan_enter_is_avoided_at_a_higher_one():
    problem = CrazyflieProblem().build(Airframe(), DT, T)
    settings = Settings(softness=0.03, iterations=1, al_iterations=8, gn_steps=20)
    soft = DeqMpc(problem, network(), settings)
    held = DeqMpc(problem, soft.network, dataclasses.replace(settings, give=0.01))
    x, u, _, radii = situation(B=3)
    x[:] = 0.0
    height = torch.tensor([-0.22, -0.23, -0.27], dtype=torch.float64)[:, None] + 0.03 * torch.arange(T + 1)
    centers = torch.zeros(3, T + 1, K, 3, dtype=torch.float64)  # coming up to a hovering drone
    centers[..., 2], radii[:, 0], radii[:, 1:] = height[..., None], 0.1, 0.0
    with torch.no_grad():
        entering, whole = (model(x, u, centers, radii, finish=True).solutions[-1] for model in (soft, held))
    assert (entering.violation[:2] > 0.01).all() and entering.violation[2] <= 0.01
    assert (whole.violation[:2] <= 1e-3).all() and whole.defect.max() <= 1e-4
    assert torch.equal(whole.x[2], entering.x[2])
    data = problem.instances(x, whole.x, u, centers, radii)
    assert problem.residuals(data, whole.x, whole.u)[:2].max() <= 1e-3
    controller = Controller(held)
    for i in range(3):
        step = controller.step(x[i].numpy(), u[i].numpy(), centers[i].numpy(), radii[i].numpy())
        assert np.allclose(step.x, whole.x[i], atol=1e-3)


@pytest.mark.parametrize('off', [1e3, 1e200, float('inf')])
def test_a_plan_that_comes_from_a_hopeless_start_is_finished_from_standing(off):
    deq_mpc = joint(kind='nn', method='diff_mpc')  # its network does not look at the plan before
    given = situation(B=4)
    with torch.no_grad():
        before = deq_mpc(*given, finish=True)
        solver = dataclasses.replace(before.warm_start.solver, u=given[1] + off)
        lost = dataclasses.replace(before.warm_start, solver=solver)
        solver.x[:, 1:] *= off
        alone, whole = (deq_mpc(*given, warm_start=lost, finish=finish).solutions[-1] for finish in (False, True))
    assert not (alone.defect <= 1.0).any()
    assert whole.converged.all() and whole.defect.max() <= 1e-4
    controller = Controller(deq_mpc)
    for i in range(4):
        x, u, centers, radii = (v[i].numpy() for v in given)
        centers = np.repeat(centers[None], T + 1, axis=0)
        first = controller.step(x, u, centers, radii)
        step = controller.step(x, u, centers, radii, dataclasses.replace(first, x=solver.x[i].numpy(), u=u + off))
        assert step.defect <= 1e-4 and np.isfinite(step.u).all()


def test_finishing_leaves_plans_that_have_converged_as_they_are():
    deq_mpc = joint(al_iterations=8, gn_steps=20)
    given = situation()
    with torch.no_grad():
        plain, finished = deq_mpc(*given).solutions[-1], deq_mpc(*given, finish=True).solutions[-1]
    assert plain.converged.any()
    assert torch.equal(plain.x[plain.converged], finished.x[plain.converged])


def test_the_controller_finishes_its_plan_as_the_batch_does():
    deq_mpc = joint(iterations=1, gn_steps=1, al_iterations=1)
    given = situation(B=3)
    with torch.no_grad():
        whole = deq_mpc(*given, finish=True)
    controller = Controller(deq_mpc)
    for i in range(3):
        x, u, centers, radii = (v[i].numpy() for v in given)
        step = controller.step(x, u, np.repeat(centers[None], T + 1, axis=0), radii)
        assert step.defect <= 1e-4
        assert np.allclose(step.x, whole.x[-1][i], atol=1e-4)


def test_a_sample_that_is_not_finite_leaves_the_others_and_all_gradients_alone():
    deq_mpc = joint()
    x, u, centers, radii = situation()
    clean = deq_mpc(x, u, centers, radii)
    x[1, 4] = float('nan')
    made = deq_mpc(x, u, centers, radii)
    good = torch.tensor([0, 2, 3])
    assert torch.allclose(made.x[-1][good], clean.x[-1][good], atol=1e-4)
    loss, left_out = imitation_loss(made, torch.zeros_like(clean.x[0]))
    assert left_out == 6 and made.counts()['network_not_finite'] == 6
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in deq_mpc.parameters()
                                        if p.grad is not None)


def test_a_warm_start_needs_one_iteration_and_runs_its_last_penalty_at_the_largest():
    deq_mpc = joint()
    given = situation()
    with torch.no_grad():
        cold = deq_mpc(*given)
        warm = deq_mpc(*given, warm_start=cold.warm_start)
    assert len(warm.x) == 1
    assert Settings().warm_penalty(1) == 1e7 and Settings().warm_penalty(2) == 1e5
    assert float((warm.x[0] - cold.x[-1])[..., :6].abs().max()) < 0.02  # m and MRPs
    assert warm.predictions[0].evaluations.max() <= 3


@pytest.mark.parametrize('method', ['deq_mpc', 'diff_mpc'])
def test_the_compiled_solver_and_the_batched_one_give_the_same_plans_and_gradients(method):
    made, gradients = [], []
    for compiled in (True, False):
        deq_mpc = joint(method, 'nn', compiled=compiled)
        made.append(deq_mpc(*situation()))
        imitation_loss(made[-1], torch.zeros_like(made[-1].x[0]))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in deq_mpc.parameters() if p.grad is not None]))
    for a, b in zip(made[0].x, made[1].x, strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 2e-2 * gradients[1].norm()


def test_iterations_may_be_chosen_at_run_time():
    with torch.no_grad():
        assert len(joint()(*situation(), iterations=3).x) == 3
        assert len(joint('diff_mpc')(*situation(), iterations=3).x) == 1


@pytest.mark.parametrize(('method', 'kind'), VARIANTS)
def test_the_controller_plans_what_the_batched_model_plans(method, kind):
    deq_mpc = joint(method, kind)
    controller = Controller(deq_mpc)
    x, u, centers, radii = situation(B=1)
    moving = centers.unsqueeze(1).repeat(1, T + 1, 1, 1)
    with torch.no_grad():
        cold = deq_mpc(x, u, moving, radii, finish=True)
        warm = deq_mpc(x, u, moving, radii, warm_start=cold.warm_start.shifted(), finish=True)
    given = [v[0].numpy() for v in (x, u, moving, radii)]
    first = controller.step(*given)
    second = controller.step(*given, first.shifted(1))
    for step, expected in ((first, cold), (second, warm)):
        assert step.theta == pytest.approx(expected.theta[-1][0].numpy(), abs=2e-3)
        assert step.x == pytest.approx(expected.x[-1][0].numpy(), abs=2e-3)
        assert step.u == pytest.approx(expected.u[-1][0].numpy(), abs=2e-2)


def test_the_controller_takes_any_number_of_spheres_and_says_when_it_has_no_plan():
    controller = Controller(joint())
    x, u, centers, radii = (v[0].numpy() for v in situation(B=1))
    for count in (0, 6, 150):
        c = np.tile(centers, (25, 1))[:count] + 5.0
        step = controller.step(x, u, np.repeat(c[None], T + 1, axis=0), np.full(count, 0.1))
        assert np.isfinite(step.x).all()
    x[0] = np.nan
    assert controller.step(x, u, np.zeros((T + 1, 0, 3)), np.zeros(0)).message == Status.NOT_FINITE.value


def test_a_network_and_a_problem_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match='horizon = 4, the problem 5'):
        DeqMpc(CrazyflieProblem().build(Airframe(), DT, 5), network())


# --- models on disk and in flight ----------------------------------------------------------------

@pytest.fixture()
def folder(tmp_path):
    made = model.Model(network(), dataclasses.asdict(Settings(softness=300.0)), {'max_speed': 2.0}, {'seed': 0})
    model.save(tmp_path / 'm', made)
    return tmp_path / 'm'


def test_a_saved_model_comes_back_as_it_was(folder):
    loaded, original = model.load(folder), network()
    assert loaded.network.settings == original.settings and loaded.card == {'seed': 0}
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)


def test_a_missing_damaged_or_foreign_model_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        DeqMpcPolicy.from_settings({'model': str(tmp_path / 'nowhere')})
    settings, weights = folder / model.SETTINGS, folder / model.WEIGHTS
    text, content = settings.read_text(), weights.read_bytes()
    weights.write_bytes(content[:-1] + b'x')
    with pytest.raises(ValueError, match='sha256'):
        model.load(folder)
    weights.write_bytes(content)
    for wrong, expected in ((text.replace('hidden:', 'hiden:'), "'hiden', did you mean 'hidden'"),
                            (text.replace('hidden: 32', 'hidden: 64'), 'weights.safetensors'),
                            (text.replace('hidden: 32', 'hidden: many'), 'hidden'),
                            ('[1, 2', 'not YAML'), ('card: {}', 'expected exactly'),
                            (text.replace('kind: deq', 'kind: gpt'), 'kind')):
        settings.write_text(wrong)
        with pytest.raises(ValueError, match=expected):
            model.load(folder)
    values = yaml.safe_load(text)
    values['method']['iteratons'] = 3
    settings.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="deq_mpc: .*method: unknown setting 'iteratons', did you mean 'iterations'"):
        DeqMpcPolicy.from_settings({'model': str(folder)})
    weights.unlink()
    with pytest.raises(FileNotFoundError, match='weights.safetensors'):
        model.load(folder)


def hovering(stamp=0.0, position=(0.4, -0.3, 1.2), yaw=0.3):
    return RigidBodyState(stamp, np.array(position), rotation.from_yaw(yaw), np.zeros(3), np.zeros(3))


def spheres(speed=0.0):
    position = np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 1.5]])
    return Obstacles(0.0, position, np.full(2, 0.1), np.full((2, 3), speed))


@pytest.mark.parametrize('policy_class', [DeqMpcPolicy, NetworkOnlyPolicy])
def test_a_loaded_policy_plans_from_the_state_and_continues_warm(policy_class, folder):
    policy = policy_class.from_settings({'model': str(folder), 'goal': [0.1, 0.2, 1.0, 0.5]})
    plan, warm, status = policy.plan(hovering(), spheres())
    assert status.ok, status
    assert plan.is_finite() and len(plan.time_from_start) == T + 1
    assert plan.position[0] == pytest.approx([0.4, -0.3, 1.2], abs=1e-9)
    assert abs(plan.quaternion[0] @ rotation.from_yaw(0.3)) == pytest.approx(1.0)
    again, _, status = policy.plan(hovering(0.1, plan.position[1]), spheres(), warm)
    assert again is not None and status.message


def test_the_solved_plan_obeys_the_dynamics_in_the_world_frame(folder):
    policy = DeqMpcPolicy.from_settings({'model': str(folder), 'goal': [0.1, 0.2, 1.0, 0.5]})
    plan, warm, status = policy.plan(hovering(), spheres())
    assert status.residual < 1e-2
    middle = 0.5 * (plan.velocity[1:] + plan.velocity[:-1])
    assert np.diff(plan.position, axis=0) / DT == pytest.approx(middle, abs=0.1)


def test_turning_the_world_turns_the_plan(folder):
    yaw = 0.7
    turn = rotation.rotate(rotation.from_yaw(yaw), np.eye(3)).T  # columns to rows: world vectors by v @ turn.T
    state, field = hovering(position=(0.4, -0.3, 0.2)), spheres()
    straight = DeqMpcPolicy.from_settings({'model': str(folder), 'goal': [0.0, 0.0, 0.0, 0.0], 'floor': -9.0})
    turned = DeqMpcPolicy.from_settings({'model': str(folder), 'goal': [0.0, 0.0, 0.0, yaw], 'floor': -9.0})
    plan, *_ = straight.plan(state, field)
    other, *_ = turned.plan(hovering(position=turn @ state.position, yaw=0.3 + yaw),
                            dataclasses.replace(field, position=field.position @ turn.T))
    assert other.position == pytest.approx(plan.position @ turn.T, abs=1e-3)
    assert other.acceleration == pytest.approx(plan.acceleration @ turn.T, abs=2e-2)


def test_the_aim_moves_against_a_lasting_offset_up_to_its_limit_and_only_near_the_goal(folder):
    policy = DeqMpcPolicy.from_settings({'model': str(folder), 'integral': 0.5, 'integral_limit': 0.04})

    def shift_after(offset, calls):
        warm = None
        for k in range(calls):
            state = hovering(0.1 * k, np.array([0.0, 0.0, 1.0]) + offset)
            _, warm, _ = policy.plan(state, Obstacles.none(), warm)
        return warm.shift
    assert shift_after(np.array([0.1, 0.0, 0.0]), 1) == pytest.approx([0.0, 0.0, 0.0])
    assert shift_after(np.array([0.1, 0.0, -0.05]), 5) == pytest.approx([-0.02, 0.0, 0.01])  # 4 times 0.5 x 0.1 s
    assert shift_after(np.array([0.1, 0.0, 0.0]), 30) == pytest.approx([-0.04, 0.0, 0.0])
    assert shift_after(np.array([0.5, 0.0, 0.0]), 5) == pytest.approx([0.0, 0.0, 0.0])


def test_a_moved_aim_leaves_the_spheres_where_they_are_in_the_world(folder):
    """With the goal elsewhere, and the aim moved back by as much, everything is as without either."""
    plain = DeqMpcPolicy.from_settings({'model': str(folder), 'integral': 0.0})
    moved = DeqMpcPolicy.from_settings({'model': str(folder), 'goal': (0.05, 0.0, 1.0, 0.0), 'integral': 0.0})
    state = hovering(position=[0.2, 0.3, 1.0])
    plan, warm, _ = plain.plan(state, spheres())
    again = plain.plan(state, spheres(), warm)[0]
    shifted = moved.plan(state, spheres(), dataclasses.replace(warm, shift=np.array([-0.05, 0.0, 0.0])))[0]
    assert shifted.position == pytest.approx(again.position, abs=1e-6)


def test_a_policy_refuses_numbers_that_are_not_finite_and_starts_cold_after_a_jump(folder):
    policy = DeqMpcPolicy.from_settings({'model': str(folder)})
    plan, warm, status = policy.plan(hovering(), spheres())
    bad = dataclasses.replace(hovering(), velocity=np.array([0.0, np.nan, 0.0]))
    assert policy.plan(bad, spheres())[:2] == (None, None)
    far, _, _ = policy.plan(hovering(0.1, (-0.5, 0.3, 0.8)), spheres(), warm)
    cold, _, _ = policy.plan(hovering(0.1, (-0.5, 0.3, 0.8)), spheres())
    assert np.array_equal(far.position, cold.position)
    with pytest.raises(ValueError, match='state.velocity'):
        policy.plan(dataclasses.replace(hovering(), velocity=np.zeros(2)), spheres())


def test_a_network_alone_is_trained_by_the_same_loss():
    problem = CrazyflieProblem().build(Airframe(), DT, T)
    alone = NetworkOnly(problem, network())
    x, u, centers, radii = situation()
    made = alone(x, u, centers, radii)
    loss, left_out = imitation_loss(made, torch.zeros_like(made.x[0]))
    loss.backward()
    assert left_out == 0 and made.counts()['last_unconverged'] == 0


def test_a_step_shifts_its_plan_and_keeps_its_equilibrium():
    rows = np.arange(5.0)[:, None]
    step = Step(rows, rows[1:], rows[1:], rows, '', 0, 0, 0.0, 0.0).shifted(2)
    assert step.x[:, 0].tolist() == [2, 3, 4, 4, 4] and step.u[:, 0].tolist() == [3, 4, 4, 4]
    assert step.z[:, 0].tolist() == [1, 2, 3, 4]


def test_knots_that_the_expert_does_not_tell_weigh_nothing_in_the_loss():
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 4, 2, dtype=torch.float64)
    partly = target.clone()
    partly[1, 2:] = float('nan')
    found = distance(x, partly)
    assert torch.equal(found[[0, 2]], distance(x, target)[[0, 2]])
    assert found[1] == (x - target)[1, :2].abs().sum()
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[1, 2:] == 0.0).all() and (x.grad[1, :2].abs() == 1.0).all()
