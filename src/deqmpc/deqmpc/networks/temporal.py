"""The network of DEQ-MPC: 1-D convolutions over the knots of a plan, as an equilibrium model or feed-forward.

For knots t = 1..N (N = T), with the plan tau of the iterate before, its states s_t and the present state x_0:

  e_t = enc(s_t) + enc_0(x_0) + time_t [+ spheres_t]            enc = ReLU LayerNorm Linear, time_t learned
  c   = GN Conv e                                               injection, (B, N, h)
  DEQ:  z = d(z, c),  y = GN ReLU Conv z,  d = GN ReLU (z + GN (c + Conv y)), from z = ReLU c or the last z
  NN:   z <- ReLU (z + GN Conv ReLU GN Conv z), once for each block, from z = ReLU c
  out = Conv1 ReLU GN Conv z                                    Conv1 has kernel 1
  theta_t = x_0 + (dt out_position, out_velocity)  or  (position_0 + dt out_position, out_velocity)

Conv has kernel 3 and zero padding, GN is GroupNorm. h is `hidden`; the y inside a cell or block has `expansion` h
channels.

Spheres (only where `spheres` is set) come in through a set encoder, so that their number is free:

  spheres_t = Linear max_j ReLU LayerNorm Linear (o_tj - p_t, |o_tj - p_t| - r_j, r_j)

with p_t the planned position; absent spheres (radius 0) are left out, and with none spheres_t = Linear 0.

Direct part (only where `direct` = w > 0): normalisation takes the size of an error out of a code, and keeping a pole
upright needs exact gains on small errors beside the right swing far away. A plain network of the present state is
added,

  out <- out + D(e, seen)     D = Linear SiLU Linear SiLU Linear SiLU Linear, w wide, to (T, n);  e = (x_0 - g) / scale

with g the goal. `seen` is there only where `sight` = v > 0, v numbers:

  seen = max_j ReLU Linear SiLU Linear (e, o_0j - p_0, |o_0j - p_0| - r_j, r_j, o_Tj - o_0j)         0 without spheres

Among spheres that stand where they always stood the state alone says what they ask for; among others it does not. The
direct part is best begun by a fit to the expert alone (deqmpc.training.imitation.fit_direct), which needs no
solver. Not in the paper. On qpole, 256 wide and fitted to the same demonstrations, it alone is at 0.66 of the expert's
return where the convolutions with 64 channels are at 0.19.

Sizes. The paper's text gives h (256 pendulum, 512 cartpole and quadrotor, 1024 QPole) and one convolution for each
arrow above: 12 h^2 weights in `Conv`. The authors' code widens cell and injection fourfold (87 h^2, 23 M for h = 512);
`expansion = 4` gives its cell. One NN block has as many weights as the DEQ cell, hence `blocks = 1`. The embeddings
are summed, not concatenated: a convolution of the concatenation costs three times the weights and its time slice is
a constant. The cell's second convolution starts with a fifth of torch's usual weights: d is then a contraction, and a
cold start needs 7 evaluations to 1e-2 instead of 18 (median residual after 10: 0.0015 instead of 0.036).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deqmpc.networks.convolution import convolution, transformed
from deqmpc.networks.equilibrium import equilibrium
from deqmpc.networks.normalization import GroupNorm
from deqmpc.solvers import anderson

KINDS = ('deq', 'nn')
OUTPUTS = ('velocity', 'delta')


@dataclass(frozen=True)
class Settings:
    """What a network is made of. Everything but `fixed_point` and `gradient_steps` fixes the shape of the weights."""

    kind: str = 'deq'  # deq: equilibrium model; nn: feed-forward
    n: int = 12  # numbers in a state
    horizon: int = 5  # T, knots that are predicted
    hidden: int = 256  # h, channels
    expansion: int = 1  # inner channels of a cell or block as a multiple of h
    blocks: int = 1  # residual blocks of the NN
    groups: int = 4  # of every GroupNorm
    output: str = 'velocity'  # velocity: predicted absolutely (authors' code); delta: as change of x_0 (paper)
    positions: int = 6  # first numbers of a state that are predicted as x_0 + dt out
    dt: float = 0.05  # s
    spheres: bool = False  # encode spheres
    spatial: int = 3  # d, numbers of a sphere's centre; the first numbers of a state are the position they act on
    state_scale: tuple[float, ...] = ()  # states are divided by these before they are encoded; empty: ones
    direct: int = 0  # w, width of the part that sees the present state alone; 0: there is none
    sight: int = 0  # v, width of what that part sees of spheres; 0: nothing
    goal: tuple[float, ...] = ()  # g of that part; empty: zeros
    gradient_steps: int = 3  # terms of the equilibrium's gradient
    fixed_point: anderson.Settings = anderson.Settings()  # how d's fixed point is found

    def __post_init__(self):
        for name, value, choices in (('kind', self.kind, KINDS), ('output', self.output, OUTPUTS)):
            if value not in choices:
                raise ValueError(f'{name} = {value!r}; expected one of {", ".join(choices)}')
        for name in ('n', 'horizon', 'hidden', 'expansion', 'blocks', 'groups', 'spatial', 'gradient_steps'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 1')
        if self.hidden % (4 * self.groups):
            raise ValueError(f'hidden = {self.hidden}; expected a multiple of 4 x groups = {4 * self.groups}')
        if not 0 <= self.positions <= self.n:
            raise ValueError(f'positions = {self.positions!r}; expected an integer in 0..{self.n}')
        if self.state_scale and (len(self.state_scale) != self.n or not min(self.state_scale) > 0):
            raise ValueError(f'state_scale = {self.state_scale!r}; expected {self.n} numbers > 0')
        if isinstance(self.direct, bool) or not isinstance(self.direct, int) or self.direct < 0 or (
                len(self.goal) not in (0, self.n)):
            raise ValueError(f'direct = {self.direct!r}, goal = {self.goal!r}; expected an integer >= 0 and {self.n} '
                             f'numbers or none')
        if isinstance(self.sight, bool) or not isinstance(self.sight, int) or self.sight < 0 or (
                self.sight and not (self.direct and self.spheres)):
            raise ValueError(f'sight = {self.sight!r}; expected an integer >= 0, and 0 for a network without a direct '
                             f'part or spheres')
        if not 0.0 < self.dt < float('inf'):
            raise ValueError(f'dt = {self.dt!r}; expected a number of seconds > 0')


@dataclass(frozen=True)
class Prediction:
    """What the network says."""

    theta: Tensor  # (B, T+1, n) states to track; knot 0 is x_init. NaN where `ok` is False
    z: Tensor | None  # (B, T, h) the equilibrium, detached; None for the NN
    ok: Tensor  # (B,) bool: inputs and outputs were finite. Where False no gradient flows
    converged: Tensor  # (B,) bool: the fixed point was found within the tolerance; True for the NN
    evaluations: Tensor  # (B,) of the cell; 0 for the NN
    residual: Tensor  # (B,) relative residual of the fixed point; 0 for the NN


class TemporalNetwork(nn.Module):
    """The network. Calling it gives a `Prediction`; `inject`, `cell` and `head` are its parts."""

    def __init__(self, settings: Settings = Settings()):
        super().__init__()
        s = self.settings = settings
        h, inner = s.hidden, s.hidden * s.expansion
        self.node = Encoder(s.n, h)
        self.start = Encoder(s.n, h)
        self.time = nn.Parameter(torch.randn(h, s.horizon))
        if s.spheres:
            self.sphere = Encoder(s.spatial + 2, h // 4)
            self.sphere_out = nn.Linear(h // 4, h)
        self.injection = Convolution(h, h)
        self.injection_norm = GroupNorm(s.groups, h)
        if s.kind == 'deq':
            self.first, self.first_norm = Convolution(h, inner), GroupNorm(s.groups, inner)
            self.second, self.second_norm = Convolution(inner, h), GroupNorm(s.groups, h)
            self.last_norm = GroupNorm(s.groups, h)
            with torch.no_grad():
                self.second.weight.mul_(0.2)
        else:
            self.blocks = nn.ModuleList(Block(h, inner, s.groups) for _ in range(s.blocks))
        self.head_in, self.head_norm = Convolution(h, h), GroupNorm(s.groups, h)
        self.head_out = nn.Linear(h, s.n)
        if s.direct:
            if s.sight:
                self.sight = nn.Sequential(nn.Linear(s.n + 2 * s.spatial + 2, s.sight), nn.SiLU(),
                                           nn.Linear(s.sight, s.sight), nn.ReLU())
            self.direct = nn.Sequential(
                nn.Linear(s.n + s.sight, s.direct), nn.SiLU(), nn.Linear(s.direct, s.direct), nn.SiLU(),
                nn.Linear(s.direct, s.direct), nn.SiLU(), nn.Linear(s.direct, s.horizon * s.n))
            self.register_buffer('goal', torch.tensor(s.goal or [0.0] * s.n), persistent=False)
        self.register_buffer('scale', torch.tensor(s.state_scale or [1.0] * s.n), persistent=False)
        self.bfloat16 = False  # products of `Conv` in bfloat16, for training on CPUs that multiply it faster

    def forward(self, x_init: Tensor, tau: Tensor, centers: Tensor | None = None, radii: Tensor | None = None,
                z: Tensor | None = None) -> Prediction:
        """x_init (B, n); tau (B, T+1, n) states of the plan before; spheres centers (B, T+1, K, d), radii (B, K)
        where the network encodes them; z (B, T, h) a first guess of the equilibrium."""
        s = self.settings
        B = self._check(x_init, tau, centers, radii, z)
        dtype = self.time.dtype
        x_init, tau = x_init.to(dtype), tau.to(dtype)
        given = [x_init, tau] + ([centers, radii] if s.spheres else [])
        ok = torch.stack([torch.isfinite(v).reshape(B, -1).all(dim=1) for v in given]).all(dim=0)
        if not ok.all():
            def cleaned(v):
                return torch.where(ok.view(-1, *[1] * (v.dim() - 1)), v, torch.zeros_like(v))
            x_init, tau = cleaned(x_init), cleaned(tau)
            if s.spheres:
                centers, radii = cleaned(centers), cleaned(radii)
        c = self.inject(x_init, tau, centers, radii)
        converged, evaluations = torch.ones_like(ok), torch.zeros_like(ok, dtype=torch.long)
        residual = torch.zeros_like(c[:, 0, 0])
        if s.kind == 'deq':
            first = torch.relu(c).detach() if z is None else torch.nan_to_num(z.detach().to(dtype))
            weights = [p for part in (self.first, self.first_norm, self.second, self.second_norm, self.last_norm)
                       for p in part.parameters()]
            z, found = equilibrium(self.cell, c, first, s.fixed_point, s.gradient_steps, weights)
            converged, evaluations, residual = found.converged, found.evaluations, found.residual
            ok = ok & found.finite
        else:
            z = torch.relu(c)
            for block in self.blocks:
                z = block(z, self.bfloat16)
        out = self.head(z)
        if s.direct:
            out = out + self.of_state(x_init, centers, radii)
        theta = self.predict(x_init, out)
        ok = ok & torch.isfinite(theta).reshape(B, -1).all(dim=1)
        if not ok.all():
            theta = torch.where(ok.view(-1, 1, 1), theta, float('nan'))
        return Prediction(theta, z.detach() if s.kind == 'deq' else None, ok, converged, evaluations, residual)

    def inject(self, x_init: Tensor, tau: Tensor, centers: Tensor | None, radii: Tensor | None) -> Tensor:
        """c (B, T, h)."""
        e = self.node(tau[:, 1:] / self.scale) + self.start(x_init / self.scale).unsqueeze(1)
        if self.settings.spheres:
            e = e + self.encode_spheres(tau, centers.to(tau), radii.to(tau))
        return self.injection_norm(self.injection(e + self.time.T, self.bfloat16))

    def encode_spheres(self, tau: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
        """(B, T, h)."""
        B, T, K = tau.shape[0], self.settings.horizon, radii.shape[1]
        if K == 0:
            return self.sphere_out.bias.expand(B, T, -1)
        offset = centers[:, 1:] - tau[:, 1:, None, :self.settings.spatial]
        r = radii[:, None, :, None].expand(B, T, K, 1)
        code = self.sphere(torch.cat([offset, _gap(offset, r), r], dim=-1))
        return self.sphere_out((code * (r > 0)).amax(dim=2))  # codes are >= 0: zero is the least

    def cell(self, z: Tensor, c: Tensor) -> Tensor:
        """d(z, c), both (B, T, h)."""
        y = self.first_norm(torch.relu(self.first(z, self.bfloat16)))
        return self.last_norm(torch.relu(z + self.second_norm(c + self.second(y, self.bfloat16))))

    def head(self, z: Tensor) -> Tensor:
        """out (B, T, n)."""
        z = torch.relu(self.head_norm(self.head_in(z, self.bfloat16)))
        return self.head_out(z)

    def of_state(self, x_init: Tensor, centers: Tensor | None = None, radii: Tensor | None = None) -> Tensor:
        """What the direct part adds to `out`, (B, T, n). Spheres as in `forward`, of which the first and the last
        centres are looked at."""
        s = self.settings
        e = (x_init - self.goal) / self.scale
        if s.sight:
            e = torch.cat([e, self._seen(e, x_init, centers[:, [0, -1]].to(e), radii.to(e))], dim=1)
        return self.direct(e).view(-1, s.horizon, s.n)

    def _seen(self, e, x_init, centers, radii) -> Tensor:
        """(B, v)."""
        K = radii.shape[1]
        if K == 0:
            return e.new_zeros(len(e), self.settings.sight)
        offset = centers[:, 0] - x_init[:, None, :self.settings.spatial]
        r = radii.unsqueeze(2)
        moves = centers[:, 1] - centers[:, 0]
        code = self.sight(torch.cat([e.unsqueeze(1).expand(-1, K, -1), offset, _gap(offset, r), r, moves], dim=-1))
        return (code * (r > 0)).amax(dim=1)

    def predict(self, x_init: Tensor, out: Tensor) -> Tensor:
        """theta (B, T+1, n)."""
        s = self.settings
        start = x_init.unsqueeze(1)
        position = start[..., :s.positions] + s.dt * out[..., :s.positions]
        velocity = out[..., s.positions:]
        if s.output == 'delta':
            velocity = start[..., s.positions:] + velocity
        return torch.cat([start, torch.cat([position, velocity], dim=-1)], dim=1)

    def _check(self, x_init, tau, centers, radii, z) -> int:
        s, B = self.settings, x_init.shape[0]
        expected: Sequence = [('x_init', x_init, (B, s.n)), ('tau', tau, (B, s.horizon + 1, s.n))]
        if s.spheres:
            if centers is None or radii is None:
                raise ValueError('this network encodes spheres: centers and radii must be given')
            K = radii.shape[-1]
            expected += [('centers', centers, (B, s.horizon + 1, K, s.spatial)), ('radii', radii, (B, K))]
        if z is not None:
            expected += [('z', z, (B, s.horizon, s.hidden))]
        for name, value, shape in expected:
            if tuple(value.shape) != shape:
                raise ValueError(f'{name} has shape {tuple(value.shape)}, expected {shape}')
        return B


def _gap(offset: Tensor, r: Tensor) -> Tensor:
    """(..., 1): from the position to the surface of spheres at `offset` (..., d) from it; its gradient is finite at
    their centres."""
    return offset.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt() - r


class Encoder(nn.Module):
    """Linear, LayerNorm, ReLU: (..., inputs) -> (..., width)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)

    def forward(self, v: Tensor) -> Tensor:
        """Encode."""
        return torch.relu(self.norm(self.linear(v)))


class Convolution(nn.Module):
    """1-D convolution with kernel 3 and zero padding: (B, N, inputs) -> (B, N, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        like = nn.Conv1d(inputs, outputs, 3, padding=1)  # its initialisation
        self.weight, self.bias = like.weight, like.bias
        self._transformed: tuple | None = None  # what `transformed` made, and of what

    def forward(self, x: Tensor, bfloat16: bool = False) -> Tensor:
        """Convolve; with `bfloat16` the products are taken in that type and summed in float32."""
        given = self.weight._version, self.weight.data_ptr(), x.shape[1], bfloat16
        if self._transformed is None or self._transformed[0] != given:
            with torch.inference_mode(False):  # kept, and gradients may be wanted the next time
                self._transformed = given, transformed(self.weight, x.shape[1], bfloat16)
        return convolution(x, self.weight, self.bias, self._transformed[1])


class Block(nn.Module):
    """ReLU (z + GN Conv ReLU GN Conv z)."""

    def __init__(self, hidden: int, inner: int, groups: int):
        super().__init__()
        self.first, self.first_norm = Convolution(hidden, inner), GroupNorm(groups, inner)
        self.second, self.second_norm = Convolution(inner, hidden), GroupNorm(groups, hidden)

    def forward(self, z: Tensor, bfloat16: bool = False) -> Tensor:
        """z (B, N, h)."""
        y = torch.relu(self.first_norm(self.first(z, bfloat16)))
        return torch.relu(z + self.second_norm(self.second(y, bfloat16)))
