"""Speed of the network for one sample, and of a whole control step. One thread.

  python benchmarks/network.py                      the network: this project against torch and ONNX Runtime
  python benchmarks/network.py --step               whole control steps along expert trajectories, warm-started
  --model FOLDER                                    with trained weights instead of fresh ones (--step)
  --emptied                                         caches emptied before every call, as between two ticks at 10 Hz

A Markdown table; every line: median and p99 of the calls, evaluations of the equilibrium cell (mean), megabytes of
convolution weights read, largest difference of theta to the torch module in float32. torch.compile and ONNX Runtime
run where they are installed (pip install onnx onnxscript onnxruntime) and with --peers.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import table
import torch
from torch.nn import functional

from deqmpc.dynamics.quadrotor import U_HIGH, U_HOVER, U_LOW, Quadrotor
from deqmpc.networks.inference import Inference
from deqmpc.networks.normalization import GroupNorm
from deqmpc.networks.temporal import Convolution, Settings, TemporalNetwork
from deqmpc.policies import model
from deqmpc.policies.deq_mpc import Controller, DeqMpc
from deqmpc.policies.deq_mpc import Settings as Method
from deqmpc.problem import Problem

DATA = Path(os.environ.get('DEQMPC_DATA', Path(__file__).parents[1] / '../shared/data'))
LARGE = np.zeros(1 << 26, np.uint8)  # 64 MB, twice the last-level cache of the machines used


def empty_caches():
    """Write more than the caches hold."""
    LARGE[:] = (int(LARGE[0]) + 1) % 256


def timed(call, count: int, emptied: bool):
    """ms of each call, after a tenth as many for warming up."""
    for _ in range(max(count // 10, 3)):
        call()
    made = np.empty(count)
    for i in range(count):
        if emptied:
            empty_caches()
        start = time.perf_counter()
        call()
        made[i] = (time.perf_counter() - start) * 1e3
    return made


def line(name, ms, evaluations, megabytes, difference):
    table.row(name, float(np.median(ms)), float(np.percentile(ms, 99)), f'{evaluations:.1f}', f'{megabytes:.1f}',
              f'{difference:.1e}')


def sample(settings: Settings, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=settings.n)
    tau = x + 0.1 * rng.normal(size=(settings.horizon + 1, settings.n))
    centers = rng.normal(size=(settings.horizon + 1, 40, 3))
    return x, tau, centers, np.full(40, 0.1)


def networks(arguments):
    """One call of the network, by hidden size and way of computing."""
    table.header('network', 'median ms', 'p99 ms', 'evaluations', 'MB', 'difference')
    for hidden in arguments.hidden:
        for kind in ('nn', 'deq'):
            torch.manual_seed(0)
            network = TemporalNetwork(Settings(kind=kind, hidden=hidden, expansion=arguments.expansion, spheres=True))
            given = sample(network.settings)
            tensors = [torch.tensor(v, dtype=torch.float32)[None] for v in given]
            with torch.inference_mode():
                expected = network(*tensors)
            theta = expected.theta[0].numpy()
            for storage in ('float32', 'float16'):
                inference = Inference(network, storage)
                way = 'compiled' if inference.compiled else 'torch (no compiler)'
                answer = inference(*given)
                line(f'{kind} {hidden} {way} {storage}, cold', timed(lambda: inference(*given), arguments.count,  # noqa: B023
                                                                     arguments.emptied),
                     answer.evaluations, inference.bytes_read(answer.evaluations) / 1e6,
                     np.abs(answer.theta - theta).max())
                if kind == 'deq':
                    line(f'{kind} {hidden} {way} {storage}, at the fixed point',
                         timed(lambda: inference(*given, answer.z), arguments.count, arguments.emptied), 1,  # noqa: B023
                         inference.bytes_read(1) / 1e6, np.abs(answer.theta - theta).max())
            megabytes = (6 + 6 * arguments.expansion) * hidden ** 2 * 4 / 1e6  # every weight once

            twin = plain(network)

            def eager():
                with torch.inference_mode():
                    return twin(*tensors)  # noqa: B023
            line(f'{kind} {hidden} torch eager', timed(eager, arguments.count // 4, arguments.emptied),
                 float(expected.evaluations), megabytes, 0.0)
            if arguments.peers and kind == 'nn':
                peers(twin, tensors, theta, arguments, megabytes)


class Plain(torch.nn.Module):
    """A convolution or norm as torch's own on (B, C, N), which exporters know; its weights are read once a call, not in
    the frequency domain, where they are 8/3 as many."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, bfloat16=False):
        m, x = self.module, x.transpose(1, 2)
        if isinstance(m, GroupNorm):
            y = functional.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)
        else:
            y = functional.conv1d(x, m.weight, m.bias, padding=1)
        return y.transpose(1, 2)


def plain(network):
    """A copy of the network in which they are."""
    twin = copy.deepcopy(network)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (Convolution, GroupNorm)):
            twin.set_submodule(name, Plain(module))
    return twin


def peers(network, tensors, theta, arguments, megabytes):
    """The feed-forward network, made `plain`, by torch.compile and ONNX Runtime."""
    class Theta(torch.nn.Module):
        def forward(self, *given):
            c = network.inject(*given)
            z = torch.relu(c)
            for block in network.blocks:
                z = block(z)
            return network.predict(given[0], network.head(z))
    name = f'nn {network.settings.hidden}'
    try:
        compiled = torch.compile(Theta())
        with torch.inference_mode():
            got = compiled(*tensors)[0].numpy()

            def call():
                return compiled(*tensors)
            line(f'{name} torch.compile', timed(call, arguments.count // 4, arguments.emptied), 0, megabytes,
                 np.abs(got - theta).max())
    except Exception as error:  # a peer's failure is a line of the table
        table.row(f'{name} torch.compile: {type(error).__name__}', *[None] * 5)
    try:
        import onnxruntime
    except ImportError:
        table.row(f'{name} ONNX Runtime: not installed', *[None] * 5)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'network.onnx')
        torch.onnx.export(Theta().eval(), tuple(tensors), path, input_names=['x', 'tau', 'centers', 'radii'],
                          dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        got = session.run(None, feed)[0][0]
        line(f'{name} ONNX Runtime', timed(lambda: session.run(None, feed), arguments.count, arguments.emptied), 0,
             megabytes, np.abs(got - theta).max())


def control_steps(arguments):
    """Whole control steps of the quadrotor with 40 spheres along expert trajectories."""
    data = np.load(DATA / 'experts/quadrotor.npz')
    states = data['states'].reshape(len(data['lengths']), -1, 12).astype(float)
    problem = Problem(Quadrotor(), 0.05, 5, Q=[10.0] * 6 + [1.0] * 6, R=[1e-8] * 4, u_low=[U_LOW] * 4,
                      u_high=[U_HIGH] * 4)
    u_ref = np.full((5, 4), U_HOVER)
    rng = np.random.default_rng(0)
    centers = np.repeat(rng.uniform(-5.0, 5.0, size=(1, 40, 3)), 6, axis=0)
    radii = np.full(40, 0.3)
    table.header('control step', 'steps', 'median ms', 'p99 ms', 'evaluations', 'their p99', 'MB', 'Gauss-Newton steps',
                 'defect p99')
    for hidden in arguments.hidden:
        for kind in ('deq', 'nn'):
            torch.manual_seed(0)
            network = TemporalNetwork(Settings(kind=kind, hidden=hidden, expansion=arguments.expansion, spheres=True))
            if arguments.model:
                network = model.load(arguments.model).network
            for method, storage in (('deq_mpc', 'float32'), ('deq_mpc', 'float16'), ('diff_mpc', 'float32')):
                controller = Controller(DeqMpc(problem, network, Method(method=method, softness=300.0)), storage)
                ms, evaluations, steps, residual = [], [], [], []
                for trajectory in states[:max(arguments.count // 90, 1)]:
                    step = None
                    for x in trajectory[:min(arguments.count, 90) + 1]:
                        if arguments.emptied:
                            empty_caches()
                        start = time.perf_counter()
                        warm = None if step is None else step.shifted(1)
                        step = controller.step(x, u_ref, centers, radii, warm)
                        if warm is not None:
                            ms.append((time.perf_counter() - start) * 1e3)
                            evaluations.append(step.evaluations)
                            steps.append(step.steps)
                            residual.append(step.defect)
                read = controller.network.bytes_read(0) + np.mean(evaluations) * (
                    controller.network.bytes_read(1) - controller.network.bytes_read(0))
                table.row(f'{method} {network.settings.kind} {network.settings.hidden} {storage}', len(ms),
                          float(np.median(ms)), float(np.percentile(ms, 99)), f'{np.mean(evaluations):.1f}',
                          f'{np.percentile(evaluations, 99):.0f}', f'{read / 1e6:.1f}', f'{np.mean(steps):.1f}',
                          f'{np.percentile(residual, 99):.1e}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hidden', type=int, nargs='+', default=[256, 512, 1024])
    parser.add_argument('--expansion', type=int, default=1, help="4: the cell of the authors' code")
    parser.add_argument('--count', type=int, default=1000, help='calls of each line')
    parser.add_argument('--step', action='store_true', help='whole control steps')
    parser.add_argument('--emptied', action='store_true', help='empty the caches before each call')
    parser.add_argument('--peers', action='store_true', help='torch.compile and ONNX Runtime as well')
    parser.add_argument('--model', help='folder of a trained model, for --step')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (control_steps if arguments.step else networks)(arguments)


if __name__ == '__main__':
    main()
