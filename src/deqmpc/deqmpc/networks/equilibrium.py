"""Equilibrium layer z* = d(z*, c): forward by Anderson acceleration, backward Jacobian-free.

The exact gradient is dz*/dc = (I - d_z)^-1 d_c. Applying d another k times at the fixed point, with the graph kept,
gives its Neumann series cut after k terms, (I + d_z + ... + d_z^{k-1}) d_c (Fung et al., AAAI 2022, for k = 1;
DEQ-MPC uses 3). The error is of the order |d_z|^k, and no linear system is solved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqmpc.solvers import anderson


def equilibrium(d: Callable[[Tensor, Tensor], Tensor], injection: Tensor, z: Tensor, settings: anderson.Settings,
                gradient_steps: int = 3) -> tuple[Tensor, anderson.FixedPoint]:
    """z* (B, ...) of d(z, injection) from the initial z, and how it was found.

    Where gradients are recorded, z* is the fixed point after `gradient_steps` more applications of d. Those are
    one last improvement and not counted in the evaluations. A sample that never was finite keeps its initial z.
    """
    with torch.no_grad():
        fixed = injection.detach()
        everything = z.shape[0]

        def f(rows, samples):
            return d(rows, fixed if len(samples) == everything else fixed[samples])
        found = anderson.solve(f, z, settings)
    z = found.z
    if torch.is_grad_enabled():
        for _ in range(gradient_steps):
            z = d(z, injection)
    return z, found
