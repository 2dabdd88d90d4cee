"""Rollouts and planners: what an episode is, and that samples of a batch do not meet."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from deqmpc import tasks
from deqmpc.dynamics.equations import Equations
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.planners import ModelPlanner, Planned
from deqmpc.policies.deq_mpc import DeqMpc, Settings
from deqmpc.policies.network_only import NetworkOnly
from deqmpc.problem import Problem
from deqmpc.rollouts import Disturbance, rollout
from deqmpc.tasks import Spheres, Task


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Point(Equations):
    """A point of 1 kg in the plane; x = (position, velocity), u = force."""

    n, m = 4, 2

    def derivative(self, x, u):
        return [x[2], x[3], u[0], u[1]]


@dataclass(frozen=True)
class Reach(Task):
    """The point to the origin."""

    name = 'reach'
    positions = 2
    spatial = 2
    steps: int = 30
    dt: float = 0.1
    horizon: int = 5
    hold: int = 0
    spheres: int = 0
    radius: float = 0.3
    margin = 0.05

    @property
    def equations(self):
        return Point()

    def problem(self, horizon=None):
        return Problem(Point(), self.dt, horizon or self.horizon, Q=[10.0, 10.0, 1.0, 1.0], R=[0.1, 0.1],
                       u_low=[-5.0, -5.0], u_high=[5.0, 5.0], position=(0, 1))

    @property
    def u_ref(self):
        return torch.zeros(2, dtype=torch.float64)

    def sample(self, count, generator):
        x = tasks.base.uniform(count, [-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], generator)
        return x, Spheres.none(count, 2)

    def reward(self, x, u):
        return -x.square().sum(1)

    @property
    def best_reward(self):
        return 0.0

    def succeeded(self, x):
        return x.norm(dim=1) < 0.05


class Feedback:
    """u = -K x, and what it was shown."""

    def __init__(self, gain=((4.0, 0.0, 4.0, 0.0), (0.0, 4.0, 0.0, 4.0))):
        self.gain, self.seen = torch.tensor(gain, dtype=torch.float64), []

    def plan(self, x, spheres, memory=None):
        self.seen.append(x)
        zero = torch.zeros(len(x), dtype=torch.float64)
        return Planned(-x @ self.gain.T, x.unsqueeze(1), torch.ones(len(x), dtype=torch.bool), zero, zero, None)


def planner(task, method='deq_mpc', kind='deq', **changes):
    torch.manual_seed(0)
    net = TemporalNetwork(task.network(kind, 32))
    if method is None:
        return ModelPlanner(task, NetworkOnly(task.problem(), net))
    return ModelPlanner(task, DeqMpc(task.problem(), net, Settings(method=method, softness=300.0, **changes)))


def starts(task, count=6):
    return task.sample(count, torch.Generator().manual_seed(1))


def test_a_linear_loop_runs_as_its_matrix_powers_say():
    task, feedback = Reach(), Feedback()
    x, _ = starts(task)
    made = rollout(task, feedback, 0.1 * x, steps=20)
    _, F = task.problem().phi.linearize(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    A = F[0, :, :4] - F[0, :, 4:] @ feedback.gain
    for t in range(21):
        assert torch.allclose(made.x[:, t], 0.1 * x @ torch.linalg.matrix_power(A, t).T, atol=1e-12)
    assert torch.allclose(made.returns, -made.x[:, :20].square().sum((1, 2)))
    assert (made.length == 20).all() and not made.failed.any()


def test_an_episode_ends_in_a_sphere_and_is_frozen_there():
    task = Reach()
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], dtype=torch.float64)
    spheres = Spheres(torch.tensor([[[0.5, 0.0]]] * 2, dtype=torch.float64), torch.zeros(2, 1, 2, dtype=torch.float64),
                      torch.full((2, 1), 0.2, dtype=torch.float64))
    made = rollout(task, Feedback(), x, spheres)
    end = int(made.length[0])
    assert made.failed.tolist() == [True, False] and 0 < end < 30
    assert (made.x[0, end, :2] - spheres.centers[0, 0]).norm() < 0.2 <= (made.x[0, end - 1, 0] - 0.5)
    assert (made.x[0, end:] == made.x[0, end]).all()
    assert (made.reward[0, end:] == 0).all() and (made.u[0, end:] == 0).all() and not made.planned[0, end:].any()
    assert made.violation[0] > 0 and made.violation[1] == 0


def test_a_start_in_a_sphere_takes_no_step():
    spheres = Spheres(torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64),
                      torch.ones(1, 1, dtype=torch.float64))
    made = rollout(Reach(), Feedback(), torch.zeros(1, 4, dtype=torch.float64), spheres)
    assert made.failed.all() and made.length.tolist() == [0] and made.returns.tolist() == [0.0]


def test_moving_spheres_move_with_the_episode():
    x = torch.zeros(1, 4, dtype=torch.float64)
    spheres = Spheres(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), torch.tensor([[[-1.0, 0.0]]]).double(),
                      torch.full((1, 1), 0.25, dtype=torch.float64))
    made = rollout(Reach(), Feedback(), x, spheres)
    assert made.length.tolist() == [8]  # 1 - 0.1 t < 0.25


def test_an_episode_ends_after_hold_successes_in_a_row():
    x = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    made = rollout(Reach(hold=3, steps=60), Feedback(), x)
    near = made.x[0].norm(dim=1) < 0.05
    assert made.succeeded.all() and not made.failed.any()
    assert int(made.length[0]) == int(near.nonzero()[0, 0]) + 2


def test_inputs_are_applied_within_their_bounds():
    made = rollout(Reach(), Feedback(), torch.full((1, 4), 3.0, dtype=torch.float64))
    assert made.u.abs().max() == 5.0


def test_a_dropped_observation_is_the_last_one_that_arrived():
    task, feedback = Reach(), Feedback()
    x, _ = starts(task, 40)
    made = rollout(task, feedback, x, disturbance=Disturbance(dropout=0.3), generator=torch.Generator().manual_seed(0))
    lost = 0
    assert torch.equal(feedback.seen[0], x)
    for t in range(1, task.steps):
        fresh = (feedback.seen[t] == made.x[:, t]).all(dim=1)
        stale = (feedback.seen[t] == feedback.seen[t - 1]).all(dim=1)
        assert (fresh | stale).all()
        lost += int((~fresh).sum())
    assert abs(lost / (40 * 29) - 0.3) < 0.05


def test_noise_has_its_deviation_and_depends_on_the_generator_only():
    task = Reach(steps=40)
    x = torch.zeros(50, 4, dtype=torch.float64)
    still = Feedback(((0.0,) * 4,) * 2)
    noise = Disturbance(process=(0.0, 0.0, 0.1, 0.2), observation=0.01)
    one, two = (rollout(task, still, x, disturbance=noise, generator=torch.Generator().manual_seed(3))
                for _ in range(2))
    assert torch.equal(one.x, two.x)
    push = one.x[:, 1:, 2:] - one.x[:, :-1, 2:]
    assert np.allclose(push.std(dim=(0, 1)), [0.1, 0.2], rtol=0.05)
    seen = torch.stack(still.seen[:40], dim=1) - one.x[:, :-1]
    assert abs(float(seen.std()) - 0.01) < 5e-4
    with pytest.raises(ValueError, match='generator'):
        rollout(task, still, x, disturbance=noise)


@pytest.mark.parametrize(('method', 'kind'), [('deq_mpc', 'deq'), ('diff_mpc', 'nn'), (None, 'deq')])
def test_a_batch_runs_as_its_episodes_one_by_one(method, kind):
    task = Reach()
    p = planner(task, method, kind)
    x, spheres = starts(task, 3)
    whole = rollout(task, p, x, spheres, steps=6)
    for i in range(3):
        alone = rollout(task, p, x[i:i + 1], spheres[[i]], steps=6)
        assert torch.allclose(whole.x[i], alone.x[0], atol=1e-3)


@pytest.mark.parametrize(('kind', 'tolerance'), [('nn', 0.0), ('deq', 1e-5)])
def test_an_episode_that_is_not_finite_leaves_the_others_as_they_are(kind, tolerance):
    # an equilibrium is sought without the samples that have theirs: matrix products of another size round otherwise
    task = Reach(spheres=2)
    x, _ = starts(task)
    generator = torch.Generator().manual_seed(0)
    centers = 2.0 + torch.rand(6, 2, 2, generator=generator, dtype=torch.float64)
    spheres = Spheres(centers, torch.zeros_like(centers), torch.full((6, 2), 0.3, dtype=torch.float64))
    p, broken = planner(task, kind=kind), x.clone()
    broken[2] = float('nan')
    others, memory, other = [0, 1, 3, 4, 5], None, None
    for seen in (broken, x, broken, x, x):
        good, bad = p.plan(x, spheres, memory), p.plan(seen, spheres, other)
        assert (good.u[others] - bad.u[others]).abs().max() <= tolerance
        assert (good.x[others] - bad.x[others]).abs().max() <= tolerance
        assert bool(bad.ok[2]) == bool(torch.isfinite(seen[2]).all()) and bad.ok[others].all()
        if not bad.ok[2]:
            assert torch.equal(bad.u[2], task.u_ref) and torch.isnan(bad.violation[2])
        memory, other = good.memory, bad.memory


def test_an_episode_without_a_plan_starts_cold_the_next_time():
    task = Reach()
    p = planner(task)
    x, spheres = starts(task)
    cold, broken = p.plan(x, spheres), x.clone()
    broken[2] = float('nan')
    again = p.plan(x, spheres, p.plan(broken, spheres).memory)
    assert torch.allclose(again.x[2], cold.x[2], atol=1e-6)
    assert not torch.allclose(again.x[3], cold.x[3], atol=1e-6)


def test_plans_go_on_across_the_seam_of_an_angle():
    @dataclass(frozen=True)
    class Wheel(Reach):
        period = (2 * np.pi, 0.0, 0.0, 0.0)

    task = Wheel()
    p = planner(task)
    x = torch.tensor([[3.1, 0.2, 1.0, 0.0]], dtype=torch.float64)
    memory = p.plan(x, Spheres.none(1, 2)).memory
    following = x + torch.tensor([[0.1, 0.0, 0.0, 0.0]], dtype=torch.float64)  # beyond pi
    turned = following - torch.tensor([[2 * np.pi, 0.0, 0.0, 0.0]], dtype=torch.float64)
    a, b = p.plan(following, Spheres.none(1, 2), memory), p.plan(turned, Spheres.none(1, 2), memory)
    assert torch.allclose(a.u, b.u, atol=1e-9) and torch.allclose(a.x, b.x, atol=1e-9)
    assert (a.x[0, :, 0] < 0).all() and a.defect < 1e-3


def test_solved_plans_keep_the_margin_that_the_episodes_end_without():
    task = replace(Reach(), spheres=1)
    p = planner(task, iterations=8)
    x = torch.tensor([[0.45, 0.0, -1.0, 0.0]], dtype=torch.float64)
    spheres = Spheres(torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64),
                      torch.full((1, 1), 0.3, dtype=torch.float64))
    made = p.plan(x, spheres)
    assert made.violation < 1e-6
    assert made.x[0, 1:, :2].norm(dim=1).min() > 0.35 - 1e-3


def test_a_network_alone_steps_to_where_it_points():
    task = Reach()
    p = planner(task, None, 'nn')
    x, spheres = starts(task)
    u = torch.tensor([[1.0, -2.0]] * 6, dtype=torch.float64)
    found, miss = p._inputs(x, task.step(x, u))
    assert torch.allclose(found, u, atol=1e-3) and miss.max() < 1e-4
    assert p._inputs(x, x + 100.0)[0].max() <= 5.0 + 1e-4
