"""Equilibrium layer z* = d(z*, c): forward by Anderson acceleration, backward Jacobian-free.

The exact gradient of a loss is v' d_c with v = (I - d_z')^-1 g, g the loss's gradient with respect to z*. Its Neumann
series cut after k terms, v = g + d_z' g + ... + (d_z')^{k-1} g, is what back-propagation through k more applications
of d at the fixed point gives (Fung et al., AAAI 2022, for k = 1; DEQ-MPC uses 3), with an error of the order |d_z|^k.
Here one application keeps its graph, the series is summed by k - 1 products with d_z', and the weights' gradient is
taken once, from the sum: half the matrix products of k applications.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqmpc.solvers import anderson


def equilibrium(d: Callable[[Tensor, Tensor], Tensor], injection: Tensor, z: Tensor, settings: anderson.Settings,
                gradient_steps: int = 3) -> tuple[Tensor, anderson.FixedPoint]:
    """z* (B, ...) of d(z, injection) from the initial z, and how it was found.

    Where gradients are recorded, z* is the fixed point after one more application of d, which is not counted in the
    evaluations; its gradient has `gradient_steps` terms. A sample that never was finite keeps its initial z.
    """
    with torch.no_grad():
        fixed = injection.detach()
        everything = z.shape[0]

        def f(rows, samples):
            return d(rows, fixed if len(samples) == everything else fixed[samples])
        found = anderson.solve(f, z, settings)
    if not torch.is_grad_enabled():
        return found.z, found
    start = found.z.requires_grad_()
    once = d(start, injection)

    def series(g):
        v = g
        for _ in range(gradient_steps - 1):
            v = g + torch.autograd.grad(once, start, v, retain_graph=True)[0]
        return v
    z = once.clone()  # the series is taken of `once`, whose own backward pass must not call it again
    if z.requires_grad:
        z.register_hook(series)
    return z, found
