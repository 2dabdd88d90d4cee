"""Gradient and Gauss-Newton Hessian of the return of a deterministic policy u = pi_theta(x), from its episodes.

Brandner, Gros and Lucia, Computationally efficient Gauss-Newton reinforcement learning for model predictive control.
J(theta) = E sum_k gamma^k r(x_k, u_k) is to be large. With the action-value Q of the policy at u = pi_theta(x),

  gradient   g  = E sum_k gamma^k pi_theta' Q_u                    (the deterministic policy gradient)
  Hessian    M2 = E sum_k gamma^k pi_theta' Q_uu pi_theta          (Gauss-Newton)
             M1 = E sum_k gamma^k sum_i Q_u,i pi_i,theta theta     (needs the policy's second derivatives)

Where the policy is optimal Q_u = 0 in every state, so that M1 = 0, and M2 is the Hessian of J and negative
semi-definite: M2 alone converges superlinearly, and needs nothing but pi_theta, which the implicit function theorem
gives for an MPC.

Q comes from a model of the plant that can be differentiated (`action_values`), backward along an episode with V = 0
after its end, z = (x, u), F = df/dz and P = dz/dx = [I; pi_x]:

  Q_z  = r_z + gamma F' V_x                              V_x  = P' Q_z
  Q_zz = r_zz + gamma (F' V_xx F + V_x . f_zz)           V_xx = P' Q_zz P

This is exact but for the term Q_u . pi_xx of V_xx, which is left out like M1 and for the same reason. g is the exact
gradient of the sampled return. Or Q is learned from explored actions (deqmpc.training.action_value).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """B episodes of at most N steps under a policy of p parameters. What stands after an episode's end is not read."""

    x: Tensor  # (B, N, n) states in which an input was chosen
    u: Tensor  # (B, N, m) inputs
    reward: Tensor  # (B, N)
    alive: Tensor  # (B, N) bool: the step was taken; False from the episode's end on
    pi_x: Tensor  # (B, N, m, n) derivative of the policy with respect to the state
    pi_theta: Tensor  # (B, N, m, p) with respect to its parameters
    pi_theta_theta: Tensor | None = None  # (B, N, m, p, p) second derivative, for M1

    def returns(self, gamma: float = 1.0) -> Tensor:
        """(B,) discounted sum of rewards."""
        return (self.weights(gamma) * torch.where(self.alive, self.reward, 0.0)).sum(1)

    def weights(self, gamma: float) -> Tensor:
        """(B, N) gamma^k, 0 after the end."""
        k = torch.arange(self.alive.shape[1], dtype=self.reward.dtype)
        return self.alive * gamma ** k


class Plant(Protocol):
    """The plant and its reward at P points x (P, n), u (P, m)."""

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """f (P, n) and F (P, n, n+m)."""

    def curvature(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """Hessian of y' f with respect to (x, u), (P, n+m, n+m), for y (P, n)."""

    def reward_derivatives(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """r_z (P, n+m) and r_zz (P, n+m, n+m)."""


@dataclass(frozen=True)
class Functions:
    """A plant given by torch functions of one point; derivatives by torch.func."""

    step: Callable[[Tensor, Tensor], Tensor]  # (n,), (m,) -> (n,)
    reward: Callable[[Tensor, Tensor], Tensor]  # (n,), (m,) -> ()

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant."""
        n = x.shape[1]
        jacobian = torch.vmap(torch.func.jacrev(lambda z: self.step(z[:n], z[n:])))
        return torch.vmap(self.step)(x, u), jacobian(torch.cat([x, u], dim=1))

    def curvature(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """See Plant."""
        n = x.shape[1]
        return torch.vmap(torch.func.hessian(lambda z, y: y @ self.step(z[:n], z[n:])))(torch.cat([x, u], dim=1), y)

    def reward_derivatives(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Plant."""
        n, z = x.shape[1], torch.cat([x, u], dim=1)

        def reward(z):
            return self.reward(z[:n], z[n:])
        return torch.vmap(torch.func.grad(reward))(z), torch.vmap(torch.func.hessian(reward))(z)


@dataclass(frozen=True)
class Estimate:
    """What episodes say about J. Means are over the episodes whose numbers are all finite."""

    value: float  # J
    gradient: Tensor  # (p,) g
    gauss_newton: Tensor  # (p, p) M2
    newton: Tensor | None  # (p, p) M1 + M2, where the policy's second derivatives are known
    returns: Tensor  # (B,)
    gradients: Tensor  # (B, p) of each episode
    finite: Tensor  # (B,) bool: the episode counts


def policy_gradient(episodes: Episodes, plant: Plant, gamma: float = 1.0) -> Estimate:
    """J, g, M2 and M1 by the recursion. ValueError where no episode has finite numbers."""
    return estimate(episodes, *action_values(episodes, plant, gamma), gamma)


def action_values(episodes: Episodes, plant: Plant, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Q_u (B, N, m) and Q_uu (B, N, m, m) by the recursion; 0 after the end of an episode."""
    x, u, alive = episodes.x, episodes.u, episodes.alive
    (B, N, n), m = x.shape, u.shape[2]
    zero = x.new_zeros
    r_z, r_zz, F = zero(B, N, n + m), zero(B, N, n + m, n + m), zero(B, N, n, n + m)
    r_z[alive], r_zz[alive] = plant.reward_derivatives(x[alive], u[alive])
    _, F[alive] = plant.linearize(x[alive], u[alive])
    Q_u, Q_uu, V_x, V_xx = zero(B, N, m), zero(B, N, m, m), zero(B, n), zero(B, n, n)
    for k in range(N - 1, -1, -1):
        at = alive[:, k].nonzero()[:, 0]
        if not len(at):
            continue
        Ft, y = F[at, k].transpose(1, 2), gamma * V_x[at]
        Q_z = r_z[at, k] + (Ft @ y.unsqueeze(2)).squeeze(2)
        Q_zz = r_zz[at, k] + plant.curvature(x[at, k], u[at, k], y) + gamma * (Ft @ V_xx[at] @ F[at, k])
        Q_u[at, k], Q_uu[at, k] = Q_z[:, n:], Q_zz[:, n:, n:]
        P = torch.cat([torch.eye(n, dtype=x.dtype).expand(len(at), n, n), episodes.pi_x[at, k]], dim=1)
        V_x[at] = (P.transpose(1, 2) @ Q_z.unsqueeze(2)).squeeze(2)
        V_xx[at] = P.transpose(1, 2) @ Q_zz @ P
    return Q_u, Q_uu


def estimate(episodes: Episodes, Q_u: Tensor, Q_uu: Tensor, gamma: float = 1.0) -> Estimate:
    """J, g, M2 and M1 for known Q_u (B, N, m) and Q_uu (B, N, m, m). ValueError where no episode is finite."""
    w, alive = episodes.weights(gamma), episodes.alive
    pi = torch.where(alive[:, :, None, None], episodes.pi_theta, 0.0)
    gradients = torch.einsum('bk,bkmp,bkm->bp', w, pi, Q_u)
    M2 = torch.einsum('bk,bkmp,bkml,bklq->bpq', w, pi, Q_uu, pi)
    returns = episodes.returns(gamma)
    finite = torch.isfinite(returns) & torch.isfinite(gradients).all(1) & torch.isfinite(M2).flatten(1).all(1)
    if not finite.any():
        raise ValueError(f'none of {len(finite)} episodes has a finite return and finite derivatives')
    mean_M2, newton = M2[finite].mean(0), None
    if episodes.pi_theta_theta is not None:
        bend = torch.where(alive[:, :, None, None, None], episodes.pi_theta_theta, 0.0)
        newton = mean_M2 + torch.einsum('bk,bkm,bkmpq->bpq', w, Q_u, bend)[finite].mean(0)
    return Estimate(float(returns[finite].mean()), gradients[finite].mean(0), mean_M2, newton, returns, gradients,
                    finite)
