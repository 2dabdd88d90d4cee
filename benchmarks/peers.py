"""Other solvers behind the call of solver.py: solve(instance) -> x (T+1, 12), u (T, 4), steps.

CasADi (Ipopt, fatrop, sqpmethod; PyPI `casadi`). Its expressions are compiled by the C compiler at T <= 5 and
interpreted beyond, where compiling takes minutes: compare times there with care.
mpc.pytorch (PyPI `mpc`): bounds on u only, so on the instances without spheres.
acados is not on PyPI. ELSEWHERE holds its figures and those of the authors' code from another run.
"""

from __future__ import annotations

import tempfile
import warnings

import numpy as np
import torch
from instances import DT, FRAME, HIGH, LOW, RADIUS, Q, R, problem

from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.integrators import rk4

QUIET = {'print_time': False, 'error_on_fail': False}
_BUILD = tempfile.TemporaryDirectory(prefix='deqmpc-peers-')  # removed at exit
JIT = {'jit': True, 'compiler': 'shell',
       'jit_options': {'flags': ['-O1'], 'verbose': False, 'directory': _BUILD.name + '/'}}
IPOPT = {'print_level': 0, 'sb': 'yes', 'max_iter': 300}
WARM = {'tol': 1e-4, 'mu_init': 1e-3, 'warm_start_init_point': 'yes', 'bound_push': 1e-6, 'bound_frac': 1e-6}
FATROP = {'print_level': 0, 'tol': 1e-4, 'mu_init': 1e-2}
SQP = {'print_iteration': False, 'print_header': False, 'print_status': False, 'max_iter': 50, 'tol_pr': 1e-4,
       'tol_du': 1e-3, 'qpsol': 'daqp', 'qpsol_options': {'error_on_fail': False}}

# T -> solver, median ms, p99 ms, steps, success, with 40 spheres; NOTE says where from
ELSEWHERE = {
    5: [("authors' AL solver, 2 AL iterations", 29.2, 38.5, 6.2, '3 %'),
        ("authors' AL solver, 8 AL iterations", 89.0, 128.0, None, '92 %'),
        ('acados SQP, warm', 0.39, 1.29, None, '100 %'),
        ('acados RTI, one iteration', 0.064, 0.12, 1.0, '0 %'),
        ('theseus, one Gauss-Newton iteration', 32.0, None, 1.0, None)],
    20: [('acados SQP, warm', '3.2-4.9', None, None, '100 %')],
    50: [('acados SQP, warm', 8.4, None, None, '100 %')]}


class Casadi:
    """A solver of CasADi. Variables x_0, u_0, x_1, ... and constraints stage by stage, as fatrop wants them."""

    def __init__(self, T, K, name, options, cold=False):
        import casadi as ca
        equations = Crazyflie(FRAME)
        z, u = ca.SX.sym('x', 12), ca.SX.sym('u', 4)
        following, _ = rk4(equations.derivative, ca.vertsplit(z), ca.vertsplit(u), DT)
        step = ca.Function('step', [z, u], [ca.vertcat(*following)])
        X, U = [ca.SX.sym(f'x{t}', 12) for t in range(T + 1)], [ca.SX.sym(f'u{t}', 4) for t in range(T)]
        x0, ref, spheres = ca.SX.sym('i', 12), ca.SX.sym('r', 12, T + 1), ca.SX.sym('o', 3, K)
        cost, rows, low, high, equality, lows, highs, w = 0, [], [], [], [], [], [], []
        for t in range(T + 1):
            e = X[t] - ref[:, t]
            cost += 0.5 * ca.dot(e * e, ca.DM(Q))
            w.append(X[t])
            lows += [-np.inf] * 12
            highs += [np.inf] * 12
            if t < T:
                cost += 0.5 * ca.dot((U[t] - 1) ** 2, ca.DM(R))
                w.append(U[t])
                lows += [LOW] * 4
                highs += [HIGH] * 4
                rows.append(X[t + 1] - step(X[t], U[t]))
                low += [0.0] * 12
                high += [0.0] * 12
                equality += [True] * 12
            if t == 0:
                rows.append(X[0] - x0)
                low += [0.0] * 12
                high += [0.0] * 12
                equality += [True] * 12
            else:
                rows += [ca.sumsqr(X[t][:3] - spheres[:, k]) for k in range(K)]
                low += [RADIUS ** 2] * K
                high += [np.inf] * K
                equality += [False] * K
        nlp = dict(x=ca.vertcat(*w), f=cost, g=ca.vertcat(*rows), p=ca.veccat(x0, ref, spheres))
        if name == 'fatrop':
            options = {**options, 'structure_detection': 'auto', 'equality': equality}
        if name == 'sqpmethod':  # Gauss-Newton: with the exact Hessian made convex it needs more than 50 steps
            factor, g_factor = ca.SX.sym('lam_f'), ca.SX.sym('lam_g', nlp['g'].numel())
            diagonal = factor * ca.DM(np.concatenate([np.tile(np.concatenate([Q, R]), T), Q]))
            options = {**options, 'hess_lag': ca.Function(
                'hess_lag', [nlp['x'], nlp['p'], factor, g_factor], [ca.diag(diagonal)],
                ['x', 'p', 'lam_f', 'lam_g'], ['hess_gamma_x_x'])}
        self.solver = ca.nlpsol('solver', name, nlp, options)
        self.limits = {name: ca.DM(v) for name, v in (('lbx', lows), ('ubx', highs), ('lbg', low), ('ubg', high))}
        self.cold, self.T, self.name = cold, T, name

    def __call__(self, g):
        T = self.T
        x, u = (np.repeat(g['x_init'][None], T + 1, axis=0), g['u_ref']) if self.cold else (g['x'], g['u'])
        guess = np.concatenate([np.hstack([x[:-1], u]).ravel(), x[-1]])
        p = np.concatenate([g['x_init'], g['x_ref'].ravel(), g['spheres'].ravel()])
        w = np.asarray(self.solver(x0=guess, p=p, **self.limits)['x']).ravel()
        stages = w[:-12].reshape(T, 16)
        return np.vstack([stages[:, :12], w[-12:]]), stages[:, 12:], lambda: self.solver.stats()['iter_count']


class MpcPytorch:
    """mpc.pytorch: iLQR with bounds on u, differentiable and batched; here one instance without gradient."""

    def __init__(self, T, iterations):
        from mpc import mpc
        warnings.filterwarnings('ignore', message=r'torch\.lu')

        class Counting(mpc.MPC):
            def solve_lqr_subproblem(self, *given, no_op_forward=False):
                self.steps = getattr(self, 'steps', 0) + (not no_op_forward)
                return super().solve_lqr_subproblem(*given, no_op_forward=no_op_forward)

        class Dynamics(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.phi = problem(T).phi

            def forward(self, x, u):
                return self.phi.step(x, u)

            def grad_input(self, x, u):
                F = self.phi.linearize(x, u)[1]
                return F[..., :12], F[..., 12:]
        ones = torch.ones(T + 1, 1, 4, dtype=torch.float64)
        self.solver = Counting(12, 4, T + 1, u_lower=LOW * ones, u_upper=HIGH * ones, lqr_iter=iterations, n_batch=1,
                               grad_method=mpc.GradMethods.ANALYTIC, eps=1e-4, verbose=-1, backprop=False,
                               exit_unconverged=False, detach_unconverged=False)
        self.dynamics, self.cost, self.T = Dynamics(), mpc.QuadCost, T
        weights = torch.from_numpy(np.concatenate([Q, R]))
        self.C = torch.diag(weights).expand(T + 1, 1, 16, 16)  # its last knot has an input too; it stays at 1

    def __call__(self, g):
        T, self.solver.steps = self.T, 0
        u_ref = np.vstack([g['u_ref'], np.ones(4)])
        linear = -np.hstack([Q * g['x_ref'], R * u_ref])[:, None]
        self.solver.u_init = torch.from_numpy(np.vstack([g['u'], np.ones(4)])[:, None])
        with torch.no_grad():
            x, u, _ = self.solver(torch.from_numpy(g['x_init'])[None],
                                  self.cost(self.C, torch.from_numpy(linear)), self.dynamics)
        return x[:, 0].numpy(), u[:T, 0].numpy(), self.solver.steps


NOTE = """mpc.pytorch knows bounds on u only, so it is compared without spheres. CasADi's expressions are compiled at
T <= 5 and interpreted beyond. acados is not on PyPI (acados_template and its C library are built from source), so it is
not run. "Not measured here": 200 instances of the same kind on one core of a two-core x86 machine, in another run;
acados's times are its own, without the Python call."""


def ipopt(T: int, K: int, tolerance: float) -> Casadi:
    """Ipopt for the optimum."""
    return Casadi(T, K, 'ipopt', {**QUIET, 'ipopt': {**IPOPT, 'tol': tolerance}})


def casadi_peers(T: int, K: int) -> dict:
    """Name -> solver; empty without CasADi."""
    try:
        import casadi  # noqa: F401
    except ImportError:
        print('CasADi is not installed (pip install casadi): no Ipopt, fatrop, sqpmethod')
        return {}
    jit = JIT if T <= 5 else {}  # compiling the whole horizon's Hessian takes minutes
    return {
        'Ipopt, cold': Casadi(T, K, 'ipopt', {**QUIET, **jit, 'ipopt': IPOPT}, cold=True),
        'Ipopt to 1e-4, warm': Casadi(T, K, 'ipopt', {**QUIET, **jit, 'ipopt': {**IPOPT, **WARM}}),
        'fatrop to 1e-4, warm': Casadi(T, K, 'fatrop', {**QUIET, **jit, 'fatrop': FATROP}),
        'CasADi sqpmethod + daqp to 1e-4, warm': Casadi(T, K, 'sqpmethod', {**QUIET, **jit, **SQP}),
    }


def mpc_pytorch_peers(T: int) -> dict:
    """Name -> solver of instances without spheres; empty without mpc.pytorch."""
    try:
        return {'mpc.pytorch, 1 iteration': MpcPytorch(T, 1), 'mpc.pytorch to 1e-4, warm': MpcPytorch(T, 50)}
    except ImportError:
        print('mpc.pytorch is not installed (pip install --no-deps mpc)')
        return {}
