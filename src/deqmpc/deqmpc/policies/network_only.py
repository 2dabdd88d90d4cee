"""The network without a solver: the plan is what it says. The baseline that shows what the solver adds.

  x = NN(x_init, spheres, tau^0), tau^0 = x_init at every knot

Its plan need not obey the dynamics, bounds or spheres, and there are no inputs in it: u stays at the reference, the
acceleration in flight is the slope of the planned velocity, and the status says no more than that the plan is finite.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from deqmpc.networks.inference import Inference
from deqmpc.networks.obstacle_motion import Forecaster, ObstacleMotion, at_knots, constant_velocity
from deqmpc.networks.temporal import TemporalNetwork
from deqmpc.policies.deq_mpc import Iterates
from deqmpc.policies.learned import LearnedPolicy, Step
from deqmpc.policies.model import Model
from deqmpc.problem import Problem


class NetworkOnly(nn.Module):
    """Batched and differentiable, with the call of deqmpc.policies.deq_mpc.DeqMpc. It knows no warm start."""

    def __init__(self, problem: Problem, network: TemporalNetwork, motion: ObstacleMotion | None = None):
        super().__init__()
        if motion is not None:
            motion.check_fits(problem)
        self.problem, self.network, self.motion = problem, network, motion

    def forward(self, x_init: Tensor, u_ref: Tensor, centers: Tensor | None = None, radii: Tensor | None = None,
                warm_start: None = None, iterations: int | None = None, velocity: Tensor | None = None,
                finish: bool = False) -> Iterates:
        """One iterate, whose x is theta in the type of x_init. There is nothing to `finish`."""
        tau = x_init.unsqueeze(1).expand(-1, self.problem.horizon + 1, -1)
        data = self.problem.instances(x_init, tau, u_ref, at_knots(self.problem, centers, velocity), radii)
        around, motions = data.centers, []
        if self.motion is not None and velocity is not None:
            motions = [self.motion(x_init, tau, centers, velocity, data.radii)]
            around = motions[0].centers
        prediction = self.network(x_init, tau, around, data.radii)
        return Iterates([prediction.theta], [prediction.theta.to(x_init.dtype)], [u_ref], [prediction],
                        motions=motions, radii=data.radii)


class Controller:
    """The network for one sample."""

    def __init__(self, model: NetworkOnly, storage: str = 'float32'):
        self.network, self.problem = Inference(model.network, storage), model.problem
        self.motion = None if model.motion is None else Forecaster(model.motion, storage)
        self._times = self.problem.dt * np.arange(self.problem.horizon + 1)

    def step(self, x_init: np.ndarray, u_ref: np.ndarray, centers: np.ndarray, radii: np.ndarray,
             warm_start: Step | None = None, iterations: int | None = None,
             velocity: np.ndarray | None = None) -> Step:
        """See deqmpc.policies.deq_mpc.Controller. Only what networks carry is used of the warm start. The dynamics
        are not checked: without inputs there is no defect."""
        tau = np.repeat(x_init[None], self.problem.horizon + 1, axis=0)
        motion = None
        if velocity is not None and self.motion is not None:
            motion = self.motion(x_init, tau, centers, velocity, radii, None if warm_start is None else
                                 warm_start.motion)
            centers = motion.centers
        elif velocity is not None:
            centers = constant_velocity(centers, velocity, self._times)
        answer = self.network(x_init, tau, centers, radii, None if warm_start is None else warm_start.z)
        gap = np.linalg.norm(centers[1:] - answer.theta[1:, None, :centers.shape[-1]], axis=-1) - radii
        message = 'the network is finite' if answer.ok else 'the network is not finite'
        inside = max(-float(gap.min(initial=np.inf)), 0.0)
        return Step(answer.theta if answer.ok else np.full_like(answer.theta, np.nan), u_ref.copy(), answer.z,
                    answer.theta, message, 0, answer.evaluations, 0.0, inside, motion)


class NetworkOnlyPolicy(LearnedPolicy):
    """The policy `network_only`."""

    name = 'network_only'

    def _controller(self, made: Model, problem: Problem) -> Controller:
        return Controller(NetworkOnly(problem, made.network, made.motion), self.settings.storage)

    def _acceleration(self, x, u) -> np.ndarray:
        return np.gradient(x[:, 6:9], self.dt, axis=0)
