"""Where the spheres will be at the knots: a second, small temporal network, the same for every sphere.

For a sphere with centre o_0, velocity v (now) and radius r, a drone at x_0 with the plan x_1..x_T of the iterate
before (positions p_t), and knots t = 1..T:

  o_t = o_0 + t dt (v + w_t)                 w_t (m/s): change of the sphere's mean velocity up to knot t
  w   = TemporalNetwork(q_0; q_1..q_T)       once for each sphere, with the same weights
  q_t = (w_t, o_t - p_t, v, r, x_t)          from the prediction before, w = 0 at first
  q_0 = (0, o_0 - p_0, v, r, x_0)

Both the prediction and the drone's plan are fed back; in the kind `deq` the equilibrium z is too. The number and order
of the spheres are free. Their positions are in the frame of the drone's state, whose first d numbers are its position.

The paper predicts the offsets o_t - o_0 themselves. Here the last layer starts at zero, so that a network without
training IS constant velocity, and spheres that fly straight ask nothing of it; with the factor t dt its output has one
size at all knots. On spheres that pursue the drone (0.081 m mean error at constant velocity) 200 steps of training
leave 0.013-0.021 m this way and 0.017-0.021 m with plain offsets, 40 steps 0.038-0.044 m and 0.045-0.107 m.

Its hidden size is a quarter of the main network's, as in the paper (`settings_for`). Its kind may differ from the main
network's: for 40 spheres beside h = 256 the kind `nn` takes 0.5 ms in flight and `deq` 1.0 ms warm; a training step on
a CPU, where the spheres make a batch of B K, takes about 3 times as long with `nn` and 4 to 5 times with `deq`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from deqmpc.networks.inference import Inference
from deqmpc.networks.temporal import Settings, TemporalNetwork
from deqmpc.problem import Problem


def constant_velocity(centers, velocity, times):
    """Centres (..., len(times), K, d) after `times` (s) of spheres at `centers` with `velocity` (..., K, d). Tensors or
    arrays."""
    return centers[..., None, :, :] + times[:, None, None] * velocity[..., None, :, :]


def at_knots(problem: Problem, centers: Tensor | None, velocity: Tensor | None) -> Tensor | None:
    """`centers` as they are where no velocity is given; else (B, T+1, K, d), at constant velocity from centers and
    velocity (B, K, d). ValueError for other shapes."""
    if velocity is None:
        return centers
    got = None if centers is None else tuple(centers.shape)
    if centers is None or centers.dim() != 3 or velocity.shape != centers.shape:
        raise ValueError(f'velocity has shape {tuple(velocity.shape)} and centers {got}; expected (B, K, d) for both: '
                         f'a velocity goes with the spheres as they are now')
    times = problem.dt * torch.arange(problem.horizon + 1, dtype=centers.dtype, device=centers.device)
    return constant_velocity(centers, velocity, times)


def settings_for(network: Settings, hidden: int | None = None) -> Settings:
    """Settings of the motion network beside `network`: `hidden` is a quarter of its h, rounded up to what the groups
    ask for."""
    unit = 4 * network.groups
    quarter = -(-network.hidden // (4 * unit)) * unit
    own = 3 * network.spatial + 1
    scale = (1.0,) * own + network.state_scale if network.state_scale else ()
    return replace(network, n=own + network.n, hidden=hidden or quarter, spheres=False,
                   positions=0, output='velocity', state_scale=scale, direct=0, goal=())


@dataclass(frozen=True)
class Motion:
    """What the network says of B fields of K spheres; also what the next call wants to know of this one."""

    centers: Tensor  # (B, T+1, K, d) m in the type of the input; knot 0 is now. NaN where `ok` is False
    w: Tensor  # (B, K, T, d) m/s, detached
    z: Tensor | None  # (B, K, T, h) equilibrium, detached; None for the NN
    ok: Tensor  # (B, K) bool: inputs and outputs were finite
    converged: Tensor  # (B, K) bool: the fixed point was found within the tolerance; True for the NN

    def detached(self) -> Motion:
        """Without the graph of the centres."""
        return replace(self, centers=self.centers.detach())


class ObstacleMotion(nn.Module):
    """The network. `settings` are those of its TemporalNetwork, made by `settings_for`."""

    def __init__(self, settings: Settings):
        super().__init__()
        s = self.settings = settings
        if s.spheres or s.positions or s.output != 'velocity' or s.n <= 4 * s.spatial:
            raise ValueError(f'settings of a motion network have n = {s.n}, spheres = {s.spheres}, positions = '
                             f'{s.positions}, output = {s.output!r}; expected n > {4 * s.spatial}, False, 0, velocity')
        self.network = TemporalNetwork(settings)
        nn.init.zeros_(self.network.head_out.weight)
        nn.init.zeros_(self.network.head_out.bias)
        times = s.dt * torch.arange(s.horizon + 1, dtype=torch.float64)
        self.register_buffer('times', times, persistent=False)  # s from now on

    @property
    def n(self) -> int:
        """Numbers in a drone's state."""
        return self.settings.n - 3 * self.settings.spatial - 1

    def check_fits(self, problem: Problem) -> None:
        """ValueError where `problem` has other sizes or another dt."""
        s = self.settings
        for name, mine, its in (('n', self.n, problem.n), ('horizon', s.horizon, problem.horizon),
                                ('dt', s.dt, problem.dt),
                                ('position', list(range(s.spatial)), list(range(problem.n)[problem.position]))):
            if mine != its:
                raise ValueError(f'the motion network has {name} = {mine}, the problem {its}')

    def forward(self, x_init: Tensor, tau: Tensor, centers: Tensor, velocity: Tensor, radii: Tensor,
                before: Motion | None = None) -> Motion:
        """x_init (B, n), tau (B, T+1, n) the plan before, spheres now: centers (B, K, d) m, velocity (B, K, d) m/s,
        radii (B, K) m. `before`, of the same spheres in the same order, is fed back; of another number it is not."""
        s = self.settings
        self._check(x_init, tau, centers, velocity, radii)
        B, K, d = centers.shape
        if K == 0:
            return self._nothing(centers)
        if before is not None and before.w.shape != (B, K, s.horizon, d):
            before = None
        w = centers.new_zeros(B, K, s.horizon, d) if before is None else torch.nan_to_num(before.w)
        z = None if before is None or before.z is None else before.z.flatten(0, 1)
        q = self._joint(x_init, tau, centers, velocity, radii, w).flatten(0, 1)
        said = self.network(q[:, 0], q, z=z)
        w = said.theta[:, 1:, :d].unflatten(0, (B, K))
        return Motion(self._centers(centers, velocity, w), w.detach(), None if said.z is None else said.z.unflatten(
            0, (B, K)), said.ok.view(B, K), said.converged.view(B, K))

    def _nothing(self, centers) -> Motion:
        s, none = self.settings, torch.zeros_like(centers[..., 0], dtype=torch.bool)
        z = centers.new_zeros(len(centers), 0, s.horizon, s.hidden) if s.kind == 'deq' else None
        w = centers.new_zeros(len(centers), 0, s.horizon, s.spatial)
        return Motion(centers.unsqueeze(1).expand(-1, s.horizon + 1, -1, -1), w, z, none, none)

    def _centers(self, centers, velocity, w) -> Tensor:
        """o_t (B, T+1, K, d)."""
        times = self.times.to(centers)
        change = times[1:, None, None] * w.to(centers).transpose(1, 2)
        straight = constant_velocity(centers, velocity, times)
        return torch.cat([straight[:, :1], straight[:, 1:] + change], dim=1)

    def _joint(self, x_init, tau, centers, velocity, radii, w) -> Tensor:
        """q (B, K, T+1, .)."""
        B, K, d = centers.shape
        x = torch.cat([x_init.unsqueeze(1), tau[:, 1:]], dim=1)
        offset = self._centers(centers, velocity, w) - x[:, :, None, :d]
        size = (B, K, x.shape[1], -1)
        parts = [torch.cat([torch.zeros_like(w[:, :, :1]), w], dim=2).to(x), offset.transpose(1, 2),
                 velocity.unsqueeze(2).expand(size), radii[:, :, None, None].expand(size), x.unsqueeze(1).expand(size)]
        return torch.cat(parts, dim=-1)

    def _check(self, x_init, tau, centers, velocity, radii) -> None:
        s, B, K = self.settings, x_init.shape[0], centers.shape[1] if centers.dim() == 3 else 'K'
        for name, value, shape in (('x_init', x_init, (B, self.n)), ('tau', tau, (B, s.horizon + 1, self.n)),
                                   ('centers', centers, (B, K, s.spatial)), ('velocity', velocity, (B, K, s.spatial)),
                                   ('radii', radii, (B, K))):
            if tuple(value.shape) != shape:
                raise ValueError(f'{name} has shape {tuple(value.shape)}, expected {shape}')


@dataclass(frozen=True)
class Forecast:
    """`Motion` of one field."""

    centers: np.ndarray  # (T+1, K, d) m; NaN where not finite
    w: np.ndarray  # (K, T, d) m/s
    z: np.ndarray | None  # (K, T, h)


class Forecaster:
    """The network for one field of spheres: compiled, NumPy in and out, the numbers of `ObstacleMotion`."""

    def __init__(self, motion: ObstacleMotion, storage: str = 'float32'):
        self.settings, self.n = motion.settings, motion.n
        self._network = Inference(motion.network, storage)
        self._times = motion.times.cpu().numpy()

    def __call__(self, x_init: np.ndarray, tau: np.ndarray, centers: np.ndarray, velocity: np.ndarray,
                 radii: np.ndarray, before: Forecast | None = None) -> Forecast:
        """x_init (n,), tau (T+1, n), centers and velocity (K, d), radii (K,)."""
        s, d, K = self.settings, self.settings.spatial, len(radii)
        if before is not None and (len(before.w) != K or not np.isfinite(before.w).all()):
            before = None
        straight = constant_velocity(centers, velocity, self._times)
        o = straight if before is None else straight + self._change(before.w)
        q = np.zeros((K, s.horizon + 1, s.n))
        if before is not None:
            q[:, 1:, :d] = before.w
        x = q[:, :, 3 * d + 1:]
        x[:, 0], x[:, 1:] = x_init, tau[1:]
        q[:, :, d:2 * d] = (o - x[0, :, None, :d]).transpose(1, 0, 2) if K else 0.0
        q[:, :, 2 * d:3 * d], q[:, :, 3 * d] = velocity[:, None], radii[:, None]
        theta, z = self._network.many(q[:, 0], q, None if before is None else before.z)
        w = theta[:, 1:, :d]
        return Forecast(straight + self._change(w), w, z)

    def _change(self, w: np.ndarray) -> np.ndarray:
        """(T+1, K, d) m by which w moves the centres."""
        change = np.zeros((len(self._times), len(w), w.shape[2]))
        change[1:] = self._times[1:, None, None] * w.transpose(1, 0, 2)
        return change
