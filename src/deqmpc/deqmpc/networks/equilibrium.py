"""Equilibrium layer z* = d(z*, c): forward by Anderson acceleration, backward Jacobian-free.

The exact gradient of a loss is v' d_c with v = (I - d_z')^-1 g, g the loss's gradient with respect to z*. Its Neumann
series cut after k terms, v = g + d_z' g + ... + (d_z')^{k-1} g, is what back-propagation through k more applications
of d at the fixed point gives (Fung et al., AAAI 2022, for k = 1; DEQ-MPC uses 3), with an error of the order |d_z|^k.
Here one application keeps its graph, the series is summed by k - 1 products with d_z', and the weights' gradient is
taken once, from the sum: less than half the matrix products of k applications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deqmpc.solvers import anderson


def equilibrium(d: Callable[[Tensor, Tensor], Tensor], injection: Tensor, z: Tensor, settings: anderson.Settings,
                gradient_steps: int = 3, weights: Iterable[Tensor] = ()) -> tuple[Tensor, anderson.FixedPoint]:
    """z* (B, ...) of d(z, injection) from the initial z, and how it was found. `weights`: what else d depends on.

    Where gradients are recorded, z* is the fixed point after one more application of d, which is not counted in the
    evaluations; its gradient, with respect to the injection and the weights, has `gradient_steps` terms. A sample that
    never was finite keeps its initial z.
    """
    with torch.no_grad():
        fixed = injection.detach()
        everything = z.shape[0]

        def f(rows, samples):
            return d(rows, fixed if len(samples) == everything else fixed[samples])
        found = anderson.solve(f, z, settings)
    if not torch.is_grad_enabled():
        return found.z, found
    start, c = found.z.requires_grad_(), fixed.requires_grad_()
    graph = d(start, c), start, c  # in a tuple autograd does not follow it: only `backward` does
    return _Equilibrium.apply(graph, gradient_steps, injection, *weights), found


class _Equilibrium(torch.autograd.Function):
    """The value of d(start, c), with the gradient of the fixed point."""

    @staticmethod
    def forward(ctx, graph, terms, injection, *weights):
        ctx.graph, ctx.terms, ctx.weights = graph, terms, weights
        return graph[0].detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        once, start, c = ctx.graph
        v = gradient
        for _ in range(ctx.terms - 1):
            v = gradient + torch.autograd.grad(once, start, v, retain_graph=True)[0]
        inputs = [p if wanted else None for p, wanted in zip((c, *ctx.weights), ctx.needs_input_grad[2:], strict=True)]
        found = iter(torch.autograd.grad(once, [p for p in inputs if p is not None], v, retain_graph=True))
        return None, None, *(None if p is None else next(found) for p in inputs)
