"""The flight task: fields, starts, reward, moving spheres, failures."""

import numpy as np
import pytest
import torch

from deqmpc import tasks
from deqmpc.dynamics import rotation
from deqmpc.obstacles import ObstacleField
from deqmpc.tasks.base import Spheres
from deqmpc.tasks.crazyflie import HIGH, LOW


def drawn(count=50, seed=3, name='crazyflie_obs', **changes):
    task = tasks.make(name, **changes)
    return task, *task.sample(count, torch.Generator().manual_seed(seed))


def test_fields_keep_the_rules_of_the_flight():
    task, _, spheres = drawn()
    c = spheres.centers
    assert c.shape == (50, 40, 3) and (spheres.radii == 0.1).all() and (spheres.velocity == 0.0).all()
    assert (c >= torch.tensor(LOW)).all() and (c <= torch.tensor(HIGH)).all()
    assert c.norm(dim=-1).min() >= 0.4  # goal: 0.3 m from the surfaces
    apart = torch.cdist(c, c) + torch.eye(40)
    assert apart.min() >= 0.3  # 0.1 m between surfaces
    assert c.amin((0, 1)).max() < -0.65 and c.amax((0, 1)).min() > 0.75  # the volume is used


def test_starts_are_those_of_a_trial():
    task, x, spheres = drawn()
    assert x[:, :3].norm(dim=1).min() >= 1.0 and spheres.gap(x[:, :3]).min() >= 0.3
    assert (x[:, 2] >= -0.5).all() and (x[:, 2] <= 0.6).all()  # 0.5 to 1.6 m above the ground
    assert x[:, 3:6].abs().max() < 0.06 and x[:, 6:9].abs().max() <= 0.2
    assert not task.failed(x, spheres).any()


def test_a_draw_depends_on_its_seed_only():
    _, x, spheres = drawn(4)
    _, again, same = drawn(4)
    _, other, _ = drawn(4, seed=4)
    assert torch.equal(x, again) and torch.equal(spheres.centers, same.centers) and not torch.equal(x, other)


def test_a_volume_too_small_for_the_spheres_is_refused():
    with pytest.raises(ValueError, match='of 40 of radius 0.4 m'):
        drawn(1, radius=0.4)


def test_the_reward_is_that_of_the_flight_log():
    metrics = pytest.importorskip('flight_log.metrics')
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 12)) * np.geomspace(0.01, 300.0, 64)[:, None]
    x[:, 3:6] = rng.normal(size=(64, 3))  # of both sets of MRPs
    position = x[:, :3] + [0.0, 0.0, 1.0]
    cost = metrics.cost(position, rotation.quaternion_from_mrp(x[:, 3:6]), x[:, 6:9], x[:, 9:12], np.array([0, 0, 1]))
    assert (cost > 500.0).any() and (cost < 1.0).any()
    reward = tasks.make('crazyflie_obs').reward(torch.from_numpy(x), torch.ones(64, 4)).numpy()
    assert np.abs(reward / metrics.reward(cost) - 1.0).max() < 1e-9


def test_hovering_at_the_goal_stays_there_and_earns_the_most():
    task = tasks.make('crazyflie_obs')
    rest, u = torch.zeros(1, 12, dtype=torch.float64), task.u_ref[None]
    assert (task.step(rest, u) - rest).abs().max() < 1e-12
    assert float(task.reward(rest, u)) == pytest.approx(task.best_reward, abs=1e-12)


def test_the_ground_a_sphere_and_a_wrong_number_fail():
    task = tasks.make('crazyflie_obs')
    x = torch.zeros(4, 12, dtype=torch.float64)
    x[1, 2], x[2, 0], x[3, 7] = -1.0, 1.0, float('nan')
    spheres = Spheres(torch.tensor([[[1.0, 0.0, 0.09]]], dtype=torch.float64).expand(4, 1, 3),
                      torch.zeros(4, 1, 3, dtype=torch.float64), torch.full((4, 1), 0.1, dtype=torch.float64))
    assert task.failed(x, spheres).tolist() == [False, True, True, True]


def test_the_wall_has_no_way_through_and_stands_between_every_start_and_the_goal():
    task, x, spheres = drawn(20, name='crazyflie_wall')
    share = torch.linspace(0.0, 1.0, 200, dtype=torch.float64).view(1, -1, 1)
    way = (share * x[:, None, :3]).flatten(0, 1)
    assert spheres[torch.arange(20).repeat_interleave(200)].gap(way).view(20, 200).amin(1).max() < 0.0
    one = spheres[[0]]
    c = one.centers[0].view(6, 9, 3)  # rows of five behind and two pairs beside
    back, sides = c[:, [1, 2, 3]], torch.stack([c[:, [0, 5, 7]], c[:, [4, 6, 8]]])
    for sheet in (torch.cat([c[:, :1], back, c[:, 4:5]], dim=1), *sides):
        middle = 0.25 * (sheet[1:, 1:] + sheet[1:, :-1] + sheet[:-1, 1:] + sheet[:-1, :-1]).flatten(0, 1)
        assert one[torch.zeros(len(middle), dtype=torch.long)].gap(middle).max() < task.margin
    assert torch.equal(task.move(spheres, x).centers, spheres.centers)
    assert spheres.gap(x[:, :3]).min() >= 0.3 and x[:, :3].norm(dim=1).min() >= 1.0
    with pytest.raises(ValueError, match='spheres = 3'):
        tasks.make('crazyflie_wall', spheres=3)


def test_moving_spheres_turn_back_at_the_walls_as_in_flight():
    task, x, spheres = drawn(3, name='crazyflie_dynobs')
    assert torch.allclose(spheres.velocity.norm(dim=-1), torch.tensor(0.3, dtype=torch.float64))
    fields = [ObstacleField(spheres.centers[b].numpy(), spheres.radii[b].numpy(), spheres.velocity[b].numpy(),
                            np.array(LOW), np.array(HIGH)) for b in range(3)]
    for step in range(1, 201):
        spheres = task.move(spheres, x)
        if step % 20 == 0:
            for b in range(3):
                there = fields[b].at(step * task.dt)
                assert np.abs(spheres.centers[b].numpy() - there.position).max() < 1e-9
                assert np.abs(spheres.velocity[b].numpy() - there.velocity).max() < 1e-9
