"""A batch of instances through the compiled solver, with the implicit gradient: the compiled twin of `al.solve`.

The loop over samples is C (batch.c), on torch.get_num_threads() threads that each own their working memory. Every
sample has the numbers of a solve alone, whatever the batch and the number of threads. Inputs that are contiguous are
read in place.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from deqmpc.problem import Instances
from deqmpc.solvers import augmented_lagrangian as al

_INSTANCE = ('x_init', 'x_ref', 'u_ref', 'Q', 'R', 'Qf', 'centers', 'radii')  # fields of Instances, in order of Batch
_RESULT = ('x', 'u', 'lam', 'eta', 'mu')
_REPORT = ('defect', 'violation', 'decrement', 'cost')
_SAMPLES_A_THREAD = 8  # at least; a thread costs about as much as one sample to start


class _Batch(ctypes.Structure):
    """`Batch` of batch.c."""

    _fields_ = [(name, ctypes.c_long) for name in ('K', 'interior_point', 'exact')] + [
        (name, ctypes.c_void_p) for name in (*_INSTANCE, *_RESULT, 'status', 'steps', *_REPORT, 'ok', 'by_x', 'by_u',
                                             *(f'by_{name}' for name in _INSTANCE))]

    def point(self, **tensors: Tensor) -> None:
        """Set addresses. The tensors must outlive the calls."""
        for name, value in tensors.items():
            setattr(self, name, value.data_ptr())


class BatchSolver:
    """Batches through `library`, with the problem and settings of `exchange` (an `Exchange` of solver.c).

    `arrays` are what the exchange points to: a gradient may outlive the solver that they belong to.
    """

    def __init__(self, library: ctypes.CDLL, exchange: ctypes.Structure, arrays: dict[str, np.ndarray], settings):
        self._library, self._exchange, self._arrays = library, exchange, arrays
        self._interior_point = not isinstance(settings, al.Settings)
        self._exact = self._interior_point or settings.exact_gradient
        self._works: list[int] = []  # working memory, one a thread
        for name in ('solve_batch', 'pull_back'):
            function = getattr(library, name)
            function.restype, function.argtypes = None, [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2

    def __del__(self):
        for work in self._works:
            self._library.destroy(work)

    def solve(self, data: Instances, start: al.WarmStart) -> al.Solution:
        """Solution with implicit gradient where an input requires one. ValueError unless float64 on the CPU."""
        for f, v in zip(fields(data), data.tensors(), strict=True):
            if v.dtype != torch.float64 or v.device.type != 'cpu':
                raise ValueError(f'{f.name} is {v.dtype} on {v.device}; the compiled solver takes torch.float64 on cpu')
        B, K = data.radii.shape
        if K > self._exchange.K_max:
            raise ValueError(f'{K} spheres, expected at most spheres_max = {self._exchange.K_max}')
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in data.tensors())
        plain = {name: v.detach().contiguous() for name, v in zip(_INSTANCE, data.tensors(), strict=True)}
        found = {name: v.detach().clone(memory_format=torch.contiguous_format)
                 for name, v in zip(_RESULT, start.tensors(), strict=True)}
        report = {name: plain['x_init'].new_empty(B) for name in _REPORT}
        status, steps = torch.empty(2, B, dtype=torch.long)
        ok = torch.zeros(B, dtype=torch.bool)
        batch = _Batch(K=K, interior_point=self._interior_point, exact=self._exact)
        batch.point(**plain, **found, **report, status=status, steps=steps)
        if wanted:
            batch.point(ok=ok)
        self._run(self._library.solve_batch, batch, B)
        solution = al.Solution(found['x'], found['u'], al.WarmStart(**found), status, steps=steps, differentiable=ok,
                               **report)
        if not wanted:
            return solution
        return al.attach_gradient(data, solution, _Gradient(self, plain, found, status, ok))

    def _run(self, function, batch: _Batch, count: int) -> None:
        """`function` over all samples of `batch`, an equal share for every thread."""
        threads = max(1, min(torch.get_num_threads(), count // _SAMPLES_A_THREAD))
        while len(self._works) < threads:
            work = self._library.create(ctypes.addressof(self._exchange))
            if not work:
                raise MemoryError(f'no memory for {threads} threads, a horizon of {self._exchange.T} and '
                                  f'{self._exchange.K_max} spheres')
            self._works.append(work)
        given = ctypes.addressof(self._exchange), ctypes.addressof(batch)
        shares = [(self._works[i], *given, count * i // threads, count * (i + 1) // threads) for i in range(threads)]
        others = [threading.Thread(target=function, args=share) for share in shares[1:]]
        for thread in others:
            thread.start()
        function(*shares[0])
        for thread in others:
            thread.join()


class _Gradient:
    """`al.ImplicitGradient` by compiled code."""

    def __init__(self, solver: BatchSolver, plain: dict[str, Tensor], found: dict[str, Tensor], status: Tensor,
                 ok: Tensor):
        self.ok = ok
        self._solver, self._plain, self._status = solver, plain, status.clone()
        self._found = {name: v.clone() for name, v in found.items()}  # the solution is its owner's to change

    def pull_back(self, gx: Tensor, gu: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of the loss with respect to the `wanted` fields of Instances."""
        solver = self._solver
        by = {f'by_{name}': torch.zeros_like(self._plain[name])
              for name, asked in zip(_INSTANCE, wanted, strict=True) if asked}
        gx, gu = gx.contiguous(), gu.contiguous()
        batch = _Batch(K=self._plain['radii'].shape[1], interior_point=solver._interior_point, exact=solver._exact)
        batch.point(**self._plain, **self._found, **by, status=self._status, ok=self.ok, by_x=gx, by_u=gu)
        solver._run(solver._library.pull_back, batch, len(gx))
        return tuple(by.get(f'by_{name}') for name in _INSTANCE)
