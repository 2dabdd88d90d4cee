"""The network of deqmpc.networks.temporal for one sample, without autograd: the path in flight.

  inference = Inference(network)                                  weights float32, or storage='float16'
  answer = inference(x_init, tau, centers, radii, z)              NumPy in, NumPy out

inference.c does the same operations in the same order as the torch module, the injection once and the fixed point
from the last z. It is compiled at first use (deqmpc.realtime.build) for one set of sizes. Without a compiler the torch
module answers, several times slower; the log says so once.

Where the time goes. A convolution multiplies 13 h^2 numbers at T = 5 and reads 3 h^2 weights once, in order; the sums
of one block of output channels at all knots stay in registers. Weights in float16 halve the memory traffic (one
instruction widens 16 of them) and round each weight to 2^-11 of itself; int8 was no faster, because the sums, in
float32, then are the limit. benchmarks/network.py has the figures.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
import torch

from deqmpc.networks.temporal import Convolution, Encoder, TemporalNetwork
from deqmpc.realtime import build

log = logging.getLogger(__name__)

STORAGES = {'float32': np.float32, 'float16': np.float16}


@dataclass(frozen=True)
class Answer:
    """What the network says to one sample."""

    theta: np.ndarray  # (T+1, n) states to track
    z: np.ndarray | None  # (T, h) the equilibrium, a row a knot; None for the NN
    evaluations: int  # of the cell; 0 for the NN
    residual: float  # relative residual of the fixed point; 0 for the NN
    converged: bool  # the residual is within the tolerance
    ok: bool  # inputs and outputs are finite


class Inference:
    """The network with its weights as they are now. Owns its buffers: one thread at a time."""

    def __init__(self, network: TemporalNetwork, storage: str = 'float32'):
        if storage not in STORAGES:
            raise ValueError(f'storage = {storage!r}; expected one of {", ".join(STORAGES)}')
        self.settings, self.storage, self._direct = network.settings, storage, ()
        try:
            self._path = _Compiled(network, storage)
        except build.NoCompiler as error:
            _say_once(str(error))
            self._path = _Torch(network)
        if self.compiled and network.settings.direct:  # which compiled code leaves out
            self._goal, self._scale = (v.cpu().numpy().copy() for v in (network.goal, network.scale))
            self._direct = _layers(network.direct)
            self._sight = _layers(network.sight) if network.settings.sight else ()

    @property
    def compiled(self) -> bool:
        """False where torch answers in place of compiled code; its weights are float32 then."""
        return isinstance(self._path, _Compiled)

    def bytes_read(self, evaluations: int) -> int:
        """Bytes of convolution weights that a call with so many evaluations of the cell reads."""
        s = self.settings
        one = 3 * s.hidden * s.hidden
        inner = 2 * s.expansion * one
        repeated = evaluations * inner if s.kind == 'deq' else s.blocks * inner
        return (2 * one + repeated) * (np.dtype(STORAGES[self.storage]).itemsize if self.compiled else 4)

    def __call__(self, x_init: np.ndarray, tau: np.ndarray, centers: np.ndarray | None = None,
                 radii: np.ndarray | None = None, z: np.ndarray | None = None) -> Answer:
        """x_init (n,), tau (T+1, n), spheres centers (T+1, K, d) and radii (K,) where the network encodes them, z
        (T, h) from the answer before. ValueError for wrong shapes, never an error for numbers."""
        s = self.settings
        x_init, tau = _array('x_init', x_init, (s.n,)), _array('tau', tau, (s.horizon + 1, s.n))
        given = [x_init, tau]
        if s.spheres:
            if centers is None or radii is None:
                raise ValueError('this network encodes spheres: centers and radii must be given')
            radii = _array('radii', radii, (len(radii),))
            centers = _array('centers', centers, (s.horizon + 1, len(radii), s.spatial))
            given += [centers, radii]
        else:
            centers = radii = np.zeros(0)
        if z is not None:
            z = _array('z', z, (s.horizon, s.hidden), np.float32)
            z = z if np.isfinite(z).all() else None
        if not all(np.isfinite(v).all() for v in given):
            return Answer(np.full((s.horizon + 1, s.n), np.nan), None, 0, float('inf'), False, False)
        answer = self._path(x_init, tau, centers, radii, z)
        if not self._direct:
            return answer
        return replace(answer, theta=answer.theta + self._of_state(x_init[None], centers, radii)[0])

    def _of_state(self, x_init: np.ndarray, centers: np.ndarray | None = None,
                  radii: np.ndarray | None = None) -> np.ndarray:
        """(M, T+1, n): what the direct part adds to theta. M = 1 where it sees spheres."""
        s = self.settings
        e = (x_init.astype(np.float32) - self._goal) / self._scale
        if self._sight:
            e = np.concatenate([e, self._seen(e, x_init, centers, radii)], axis=1)
        y = _through(self._direct, e)
        part = y.reshape(-1, s.horizon, s.n).astype(np.float64)
        part[..., :s.positions] *= s.dt
        return np.concatenate([np.zeros_like(part[:, :1]), part], axis=1)

    def _seen(self, e, x_init, centers, radii) -> np.ndarray:
        """(1, v): as of the torch module."""
        there = radii > 0
        if not there.any():
            return np.zeros((1, len(self._sight[-1][1])), np.float32)
        now, last, r = centers[0, there], centers[-1, there], radii[there, None]
        offset = now - x_init[:, :self.settings.spatial]
        gap = np.linalg.norm(offset, axis=1, keepdims=True) - r
        given = np.concatenate([np.broadcast_to(e, (len(r), e.shape[1])), offset, gap, r, last - now], axis=1)
        return np.maximum(_through(self._sight, given.astype(np.float32)), 0.0).max(axis=0, keepdims=True)

    def many(self, x_init: np.ndarray, tau: np.ndarray,
             z: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """theta (M, T+1, n) and equilibria (M, T, h), None for the NN, of M samples: x_init (M, n), tau (M, T+1, n), z
        (M, T, h) from before. ValueError for a network that encodes spheres; all NaN where an input is not finite."""
        s, M = self.settings, len(x_init)
        if s.spheres:
            raise ValueError('this network encodes spheres: it takes one sample at a time')
        x_init, tau = _array('x_init', x_init, (M, s.n)), _array('tau', tau, (M, s.horizon + 1, s.n))
        if z is not None:
            z = _array('z', z, (M, s.horizon, s.hidden), np.float32)
            z = z if np.isfinite(z).all() else None
        if M == 0 or not (np.isfinite(x_init).all() and np.isfinite(tau).all()):
            return np.full((M, s.horizon + 1, s.n), np.nan), None
        theta, z = self._path.many(x_init, tau, z)
        return (theta + self._of_state(x_init) if self._direct else theta), z


def _layers(part: torch.nn.Sequential) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return tuple((m.weight.detach().cpu().numpy().T.copy(), m.bias.detach().cpu().numpy().copy())
                 for m in part if isinstance(m, torch.nn.Linear))


def _through(layers, y: np.ndarray) -> np.ndarray:
    """Linear layers with SiLU between them."""
    for i, (weight, bias) in enumerate(layers):
        if i:
            with np.errstate(over='ignore'):  # exp of a large number: y / inf is the 0 that is meant
                y = y / (1.0 + np.exp(-y))
        y = y @ weight + bias
    return y


def _array(name, value, shape, dtype=np.float64) -> np.ndarray:
    value = np.ascontiguousarray(value, dtype=dtype)
    if value.shape != shape:
        raise ValueError(f'{name} has shape {value.shape}, expected {shape}')
    return value


def _say_once(error, said=[]):  # noqa: B006
    if not said:
        log.warning('the network runs in torch, several times slower than compiled: %s', error)
        said.append(error)


class _Torch:
    def __init__(self, network: TemporalNetwork):
        self.network = network

    def __call__(self, x_init, tau, centers, radii, z) -> Answer:
        def tensor(v):
            return torch.from_numpy(v).unsqueeze(0)
        spheres = (tensor(centers), tensor(radii)) if self.network.settings.spheres else (None, None)
        with torch.inference_mode():
            p = self.network(tensor(x_init), tensor(tau), *spheres, None if z is None else tensor(z))
        return Answer(p.theta[0].double().numpy(), None if p.z is None else p.z[0].numpy(),
                      int(p.evaluations), float(p.residual), bool(p.converged), bool(p.ok))

    def many(self, x_init, tau, z) -> tuple[np.ndarray, np.ndarray | None]:
        x_init, tau = torch.from_numpy(x_init), torch.from_numpy(tau)
        with torch.inference_mode():
            p = self.network(x_init, tau, z=None if z is None else torch.from_numpy(z))
        return p.theta.double().numpy(), None if p.z is None else p.z.numpy()


class _Anderson(ctypes.Structure):
    _fields_ = [('damping', ctypes.c_double), ('tolerance', ctypes.c_double), ('regularization', ctypes.c_double),
                ('evaluations', ctypes.c_long)]


class _Compiled:
    def __init__(self, network: TemporalNetwork, storage: str):
        s = self.settings = network.settings
        sizes = dict(T=s.horizon, NX=s.n, H=s.hidden, INNER=s.hidden * s.expansion, GROUPS=s.groups,
                     BLOCKS=s.blocks if s.kind == 'nn' else 0, MEMORY=s.fixed_point.memory,
                     SPHERES=s.hidden // 4 if s.spheres else 0, SPACE=s.spatial, POSITIONS=s.positions,
                     DELTA=int(s.output == 'delta'), HALF=int(storage == 'float16'))
        head = ''.join(f'#define {name} {value}\n' for name, value in sizes.items())
        self._library = build.load(head + resources.files('deqmpc.networks').joinpath('inference.c').read_text())
        # vectors must not straddle cache lines; one big piece, so that NumPy asks for huge pages
        parts = _packed(network, storage, self._library.output_block())
        places = np.cumsum([0] + [-(-p.nbytes // 64) * 64 for p in parts])
        self._weights = _aligned(int(places[-1]))
        for part, at in zip(parts, places[:-1], strict=True):
            self._weights[at:at + part.nbytes] = part.reshape(-1).view(np.uint8)
        base = self._weights.ctypes.data
        self._network = (ctypes.c_void_p * len(parts))(*(base + int(at) for at in places[:-1]))
        self._library.workspace_size.restype = ctypes.c_long
        self._work = _aligned(self._library.workspace_size())
        f = s.fixed_point
        self._anderson = _Anderson(f.damping, f.tolerance, f.regularization, f.evaluations)
        self._predict = self._library.predict
        pointer = ctypes.c_void_p
        self._predict.argtypes = [pointer, pointer, pointer, ctypes.c_double, pointer, pointer, pointer, pointer,
                                  ctypes.c_long, pointer, ctypes.c_long, pointer, pointer]
        self._predict.restype = None
        self._predict_many = self._library.predict_many
        self._predict_many.argtypes = [pointer, pointer, pointer, ctypes.c_double, ctypes.c_long, pointer, pointer,
                                       pointer, ctypes.c_long, pointer]
        self._predict_many.restype = None

    def __call__(self, x_init, tau, centers, radii, z) -> Answer:
        s = self.settings
        equilibrium = np.empty((s.horizon, s.hidden), np.float32) if z is None else z.copy()
        theta, report = np.empty((s.horizon + 1, s.n)), np.empty(3)
        self._predict(ctypes.addressof(self._network), ctypes.addressof(self._anderson), self._work.ctypes.data, s.dt,
                      x_init.ctypes.data, tau.ctypes.data, centers.ctypes.data, radii.ctypes.data, len(radii),
                      equilibrium.ctypes.data, z is not None, theta.ctypes.data, report.ctypes.data)
        evaluations, residual, ok = report.tolist()
        return Answer(theta, equilibrium if s.kind == 'deq' else None, int(evaluations), residual,
                      residual <= s.fixed_point.tolerance, bool(ok))

    def many(self, x_init, tau, z) -> tuple[np.ndarray, np.ndarray | None]:
        s, M = self.settings, len(x_init)
        equilibrium = np.empty((M, s.horizon, s.hidden), np.float32) if z is None else z.copy()
        theta = np.empty((M, s.horizon + 1, s.n))
        self._predict_many(ctypes.addressof(self._network), ctypes.addressof(self._anderson), self._work.ctypes.data,
                           s.dt, M, x_init.ctypes.data, tau.ctypes.data, equilibrium.ctypes.data, z is not None,
                           theta.ctypes.data)
        return theta, equilibrium if s.kind == 'deq' else None


def _aligned(size: int) -> np.ndarray:
    """`size` bytes from a cache line's beginning on."""
    raw = np.zeros(size + 64, np.uint8)
    shift = -raw.ctypes.data % 64
    return raw[shift:shift + size]


def _packed(network: TemporalNetwork, storage: str, block: int) -> list[np.ndarray]:
    """The arrays of `network` in inference.c, in order; `block` output channels of a convolution lie together."""
    def array(t):
        return np.ascontiguousarray(t.detach().cpu().float().numpy())

    def norm(m):
        return [array(m.weight), array(m.bias)]

    def encoder(m: Encoder):
        return [array(m.linear.weight.T), array(m.linear.bias), *norm(m.norm)]

    def convolution(m: Convolution):
        w = array(m.weight).astype(STORAGES[storage])
        outputs, inputs, taps = w.shape
        packed = w.reshape(outputs // block, block, inputs, taps).transpose(0, 2, 3, 1)
        return [np.ascontiguousarray(packed), array(m.bias)]
    n, s = network, network.settings
    parts = [*encoder(n.node), *encoder(n.start), array(n.time.T), 1.0 / array(n.scale)]
    parts += [*convolution(n.injection), *norm(n.injection_norm)]
    if s.kind == 'deq':
        parts += [*convolution(n.first), *convolution(n.second), *norm(n.first_norm), *norm(n.second_norm),
                  *norm(n.last_norm)]
    else:
        for b in n.blocks:
            parts += [*convolution(b.first), *norm(b.first_norm), *convolution(b.second), *norm(b.second_norm)]
    parts += [*convolution(n.head_in), *norm(n.head_norm), array(n.head_out.weight), array(n.head_out.bias)]
    if s.spheres:
        parts += [*encoder(n.sphere), array(n.sphere_out.weight.T), array(n.sphere_out.bias)]
    return parts
