"""Kernel-3 convolution along the knots of a plan, by fewer multiplications than it has terms; forward and backward.

  y_t = W_0 x_{t-1} + W_1 x_t + W_2 x_{t+1},  t = 1..N,  x_0 = x_{N+1} = 0,  x_t of C numbers, y_t of O

One zero at the end makes this a circular convolution of length L = N + 1, since it also stands before the first knot.
For each frequency k of the Fourier transform (with w = 2 pi k / L) that is a product with one matrix,

  y^_k = (W_0 e^{-iw} + W_1 + W_2 e^{iw}) x^_k

and of real numbers k = 0..L/2 suffice. The first and, where L is even, the last are real. The others are products of
complex numbers, x^ = a + ib and W^ = c + id, which take three real ones:

  p = c (a + b),  q = (d - c) a,  r = (c + d) b:  y^ = (p - r) + i (p + q)

Altogether M real products of O C numbers, M = 8 instead of 3 N = 15 for N = 5, half as many for long plans. Everything
before and after them is linear, with small constant matrices that know nothing of C and O:

  X = F x (M),   V = E W (M),   P_m = V_m X_m,   y = S P
  backward:   P' = S^T y',   x' = F^T (V^T P'),   V'_m = sum P'_m X_m^T,   W' = E^T V'

Other ways to save products (Winograd, Toom and Cook) save a little more but lose digits, as they evaluate polynomials
at 2 or 1/2; the Fourier matrix loses none: the error is 3e-7 in float32, and 0.4 % instead of 0.3 % where the products
are taken in bfloat16 (relative, 512 channels, N = 5).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def transformed(weight: Tensor, knots: int, bfloat16: bool = False) -> Tensor:
    """V (M, O, C) of weight (O, C, 3) for sequences of `knots` knots, without gradient."""
    E = _matrices(knots, weight.dtype, weight.device)[1]
    V = (E @ weight.detach().reshape(-1, 3).T).view(-1, *weight.shape[:2])
    return V.to(torch.bfloat16) if bfloat16 else V


def convolution(x: Tensor, weight: Tensor, bias: Tensor, V: Tensor) -> Tensor:
    """x (B, N, C), weight (O, C, 3), bias (O,) -> (B, N, O), in the type of x. V is transformed(weight, N); products
    are taken in its type."""
    F, _, S = _matrices(x.shape[1], x.dtype, x.device)
    X = _products(F, x.detach(), V.dtype)
    y = S @ torch.bmm(X, V.transpose(1, 2)).to(x.dtype).transpose(0, 1)
    if torch.is_grad_enabled():
        y = _OfInput.apply(x, y, V) + _OfWeight.apply(weight, X, y)
    return y + bias


def _products(A: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, B, C) in `dtype`: A (M, N) times x (B, N, C)."""
    return (A @ x).transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)


# The gradient has two nodes, because PyTorch leaves out whole nodes only: the series of an equilibrium's gradient asks
# for that of the input and must not pay for that of the weight, nor the last step of it the reverse.

class _OfInput(torch.autograd.Function):
    """y, as a function of x."""

    @staticmethod
    def forward(ctx, x, y, V):
        ctx.save_for_backward(V)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        V, = ctx.saved_tensors
        F, _, S = _matrices(gradient.shape[1], gradient.dtype, gradient.device)
        P = _products(S.T, gradient, V.dtype)
        return F.T @ torch.bmm(P, V).to(gradient.dtype).transpose(0, 1), None, None


class _OfWeight(torch.autograd.Function):
    """Zeros like y, with the gradient of y as a function of the weight."""

    @staticmethod
    def forward(ctx, weight, X, y):
        ctx.save_for_backward(X)
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        X, = ctx.saved_tensors
        _, E, S = _matrices(gradient.shape[1], gradient.dtype, gradient.device)
        P = _products(S.T, gradient, X.dtype)
        gV = torch.bmm(P.transpose(1, 2), X).to(gradient.dtype)
        return (E.T @ gV.flatten(1)).view(3, *gV.shape[1:]).permute(1, 2, 0), None, None


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # they are kept
def _matrices(N: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """F (M, N), E (M, 3), S (N, M)."""
    L = N + 1
    F, E, S = [], [], []
    t = torch.arange(N, dtype=torch.float64)
    for k in range(L // 2 + 1):
        w = 2.0 * math.pi * k / L
        cos, sin = torch.cos(w * t), torch.sin(w * t)
        a, b = cos, -sin
        c = torch.tensor([math.cos(w), 1.0, math.cos(w)], dtype=torch.float64)
        d = torch.tensor([-math.sin(w), 0.0, math.sin(w)], dtype=torch.float64)
        if k == 0 or 2 * k == L:
            F, E, S = F + [a], E + [c], S + [cos / L]
        else:  # twice the real part of y^ e^{iwt} / L, for k and L - k
            F, E = F + [a + b, a, b], E + [c, d - c, c + d]
            S = S + [2.0 / L * v for v in (cos - sin, -sin, -cos)]
    F, E, S = (torch.stack(v).to(device, dtype) for v in (F, E, S))
    return F, E, S.T.contiguous()
