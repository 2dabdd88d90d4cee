"""CPU time of one training step of DEQ-MPC on the quadrotor: forward, backward, optimiser.

  python benchmarks/training_step.py [--hidden 512] [--batch 200] [--kind deq] [--bfloat16] [--steps 5] [--profile]

Streaming: a cold problem at the first state (N = 6 iterations), then L = 2 further ones along the expert trajectory,
each warm-started from the one before (1 iteration); losses on all 8 iterates. CPU seconds are process time (all
threads), median of the steps after the first. The authors' code takes 17.5-20 without streaming (6 iterates), for a
network of 23 M weights: its convolutions are four times wider inside, and its inputs concatenated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path

import numpy as np
import table
import torch

from deqmpc.dynamics.quadrotor import U_HIGH, U_HOVER, U_LOW, Quadrotor
from deqmpc.networks.temporal import Settings, TemporalNetwork
from deqmpc.policies.deq_mpc import DeqMpc, imitation_loss
from deqmpc.policies.deq_mpc import Settings as Method
from deqmpc.problem import Problem

DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).parents[1] / '../shared/data'))
AUTHORS = 17.5  # CPU s, the least measured


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name):
        start = time.process_time()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - start

    def wrap(self, owner, attribute, name):
        """Count the calls of `owner.attribute`."""
        function = getattr(owner, attribute)

        def timed(*given, **named):
            with self.of(name):
                return function(*given, **named)
        setattr(owner, attribute, timed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hidden', type=int, default=512)
    parser.add_argument('--expansion', type=int, default=1, help="4: the cell of the authors' code")
    parser.add_argument('--batch', type=int, default=200)
    parser.add_argument('--kind', choices=('deq', 'nn'), default='deq')
    parser.add_argument('--method', choices=('deq_mpc', 'diff_mpc'), default='deq_mpc')
    parser.add_argument('--horizon', type=int, default=5)
    parser.add_argument('--streaming', type=int, default=2, help='L, warm-started problems after the cold one')
    parser.add_argument('--gradient-steps', type=int, default=3)
    parser.add_argument('--bfloat16', action='store_true', help="the network's convolutions in bfloat16")
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--profile', action='store_true', help="torch's profile of the last step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    T = arguments.horizon
    data = np.load(DATA / 'experts/quadrotor.npz')
    states = torch.tensor(data['states'].reshape(len(data['lengths']), -1, 12), dtype=torch.float64)
    problem = Problem(Quadrotor(), 0.05, T, Q=[10.0] * 6 + [1.0] * 6, R=[1e-8] * 4, u_low=[U_LOW] * 4,
                      u_high=[U_HIGH] * 4)
    network = TemporalNetwork(Settings(kind=arguments.kind, hidden=arguments.hidden, horizon=T,
                                       expansion=arguments.expansion, gradient_steps=arguments.gradient_steps))
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    network.bfloat16 = arguments.bfloat16
    policy = DeqMpc(problem, network, Method(method=arguments.method))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    u_ref = torch.full((arguments.batch, T, 4), U_HOVER, dtype=torch.float64)
    clock = Clock()
    clock.wrap(network, 'forward', 'network')
    clock.wrap(policy, '_solve', 'solver')
    generator = torch.Generator().manual_seed(0)

    def step():
        trajectory = torch.randint(0, 243, (arguments.batch,), generator=generator)
        first = torch.randint(0, states.shape[1] - T - arguments.streaming, (arguments.batch,), generator=generator)
        at = first.unsqueeze(1) + torch.arange(T + 1 + arguments.streaming)
        x = states[trajectory.unsqueeze(1), at]
        loss, warm, iterates = 0.0, None, []
        for shift in range(1 + arguments.streaming):
            made = policy(x[:, shift], u_ref, warm_start=warm)
            warm = made.warm_start.shifted()
            loss = loss + imitation_loss(made, x[:, shift:shift + T + 1])[0]
            iterates.append(made)
        with clock.of('backward'):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with clock.of('optimiser'):
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
        return float(loss.detach()), iterates

    spent, parts = [], []
    for i in range(arguments.steps + 1):
        clock.spent.clear()
        start = time.process_time()
        with torch.profiler.profile() if arguments.profile and i == arguments.steps else contextlib.nullcontext() as p:
            loss, iterates = step()
        if i:
            spent.append(time.process_time() - start)
            parts.append(dict(clock.spent))
    evaluations = [f'{float(p.evaluations.float().mean()):.1f}' for made in iterates for p in made.predictions]
    steps = [f'{float(s.steps.float().mean()):.1f}' for made in iterates for s in made.solutions]
    total = float(np.median(spent))
    table.header('training step', 'M weights', 'batch', 'CPU s', "times less than the authors'", *parts[0])
    table.row(f'{arguments.method} {arguments.kind}, hidden {arguments.hidden}, T {T}, L {arguments.streaming}, '
              f'{"bfloat16" if arguments.bfloat16 else "float32"}', f'{weights:.1f}', arguments.batch, total,
              AUTHORS / total, *(float(np.median([p[name] for p in parts])) for name in parts[0]))
    print(f'\nevaluations of the cell {" ".join(evaluations)}; Gauss-Newton steps {" ".join(steps)}; loss {loss:.1f}')
    if arguments.profile:
        print(p.key_averages().table(sort_by='self_cpu_time_total', row_limit=25, max_name_column_width=45))


if __name__ == '__main__':
    main()
