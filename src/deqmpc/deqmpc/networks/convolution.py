"""Kernel-3 convolution by bfloat16 matrix products, forward and backward.

With X the (B N, 3 C) matrix whose rows hold x at the knots t-1, t, t+1 (zero outside), and W (3 C, O):

  Y = X W      dX = dY W'      dW = X' dY

Products take bfloat16 numbers and sum in float32. torch's own bfloat16 convolution is as fast forward, but its
backward pass is three times slower than these products on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(weight: Tensor) -> Tensor:
    """W (3 C, O) in bfloat16 of weight (O, C, 3)."""
    return weight.detach().permute(2, 1, 0).reshape(-1, weight.shape[0]).to(torch.bfloat16)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, W: Tensor) -> Tensor:
    """x (B, C, N), weight (O, C, 3), bias (O,) -> (B, O, N), in the type of x. W is packed(weight)."""
    return _Convolution.apply(x, weight, W) + bias.unsqueeze(1)


def _unfold(x: Tensor) -> Tensor:
    """X (B N, 3 C) of x (B, N, C)."""
    B, N, C = x.shape
    p = F.pad(x, (0, 0, 1, 1))
    return torch.cat([p[:, :-2], p[:, 1:-1], p[:, 2:]], dim=-1).reshape(B * N, 3 * C)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, W):
        B, C, N = x.shape
        X = _unfold(x.transpose(1, 2).to(torch.bfloat16, memory_format=torch.contiguous_format))
        ctx.save_for_backward(X, W)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return (X @ W).view(B, N, -1).transpose(1, 2).to(x.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        X, W = ctx.saved_tensors
        B, C, N = ctx.shape
        g = gradient.transpose(1, 2).to(torch.bfloat16, memory_format=torch.contiguous_format).reshape(B * N, -1)
        gx = gw = None
        if ctx.needs_input_grad[0]:
            d = (g @ W.T).view(B, N, 3, C).to(ctx.dtype)
            gx = d[:, :, 1].clone()
            gx[:, :-1] += d[:, 1:, 0]
            gx[:, 1:] += d[:, :-1, 2]
            gx = gx.transpose(1, 2)
        if ctx.needs_input_grad[1]:
            gw = (g.T @ X).view(-1, 3, C).to(ctx.dtype).transpose(1, 2)
        return gx, gw, None
