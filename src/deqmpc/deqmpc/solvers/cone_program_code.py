"""Code generated from the conditions of a cone program (deqmpc.solvers.cone_program): functions of tensors and C.

r, its derivatives, the start and the cones' margins become straight-line programs of common subexpressions
(deqmpc.dynamics.equations). C of a program stands before cone_program.c in one translation unit; its text is kept
under the sources it is made from, since deriving it takes seconds.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import resources

import torch
from torch import Tensor

from deqmpc.dynamics import equations
from deqmpc.dynamics.equations import Program
from deqmpc.realtime import build, codegen


@dataclass(frozen=True)
class Programs:
    """Functions of w (size), theta (parameters) and, the residual, mu."""

    start: Program  # w, of theta
    residual: Program  # r
    margins: Program  # positive inside the cones, of w
    jacobian_w: Program  # dr/dw
    jacobian_theta: Program  # dr/dtheta


def derive(conditions) -> Programs:
    """The programs of `conditions`. ValueError where the numbers of equations and unknowns differ."""
    import sympy
    w, theta, mu = (list(sympy.symbols(f'{name}:{length}', real=True, seq=True)) for name, length in (
        ('w', conditions.size), ('theta', conditions.parameters), ('mu', 1)))
    free = conditions.equations(w, theta)
    r = sympy.Matrix([*free, *conditions.cones.products(w, mu[0])])
    if len(r) != conditions.size:
        raise ValueError(f'{type(conditions).__name__}: {len(free)} equations and {conditions.cones.rows} of cones; '
                         f'expected {conditions.size} in all, one for each unknown')
    vectors = (('w', len(w)), ('theta', len(theta)))

    def vector(values, arguments):
        return equations.straight_line([((i,), sympy.sympify(e)) for i, e in enumerate(values)], arguments)

    def matrix(values, arguments):
        return equations.straight_line([((i, j), e) for i, row in enumerate(values.tolist())
                                        for j, e in enumerate(row)], arguments)

    return Programs(vector(conditions.start(theta), vectors[1:]), vector(r, (*vectors, ('mu', 1))),
                    vector(conditions.cones.margins(w), vectors[:1]), matrix(r.jacobian(w), vectors),
                    matrix(r.jacobian(theta), vectors))


@dataclass(frozen=True)
class Functions:
    """The programs on tensors of P points: arguments (P, length), results (P, ...)."""

    start: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    margins: Callable[[Tensor], Tensor]
    jacobian_w: Callable[[Tensor, Tensor], Tensor]
    jacobian_theta: Callable[[Tensor, Tensor], Tensor]


@functools.lru_cache(maxsize=32)
def functions(conditions) -> Functions:
    """The functions of `conditions`, derived once a process."""
    programs, size, parameters = derive(conditions), conditions.size, conditions.parameters
    shapes = {'start': (size,), 'residual': (size,), 'margins': (len(conditions.cones.margins(range(size))),),
              'jacobian_w': (size, size), 'jacobian_theta': (size, parameters)}
    return Functions(*(_on_tensors(getattr(programs, f.name), f.name, shapes[f.name]) for f in fields(programs)))


def _on_tensors(program, name, shape):
    run = equations.compiled(program, name)

    def function(*vectors: Tensor) -> Tensor:
        out = vectors[0].new_zeros(*shape, len(vectors[0]))
        run(*(v.unbind(-1) for v in vectors), out)
        return out.movedim(-1, 0).contiguous()
    return function


# --- C ----------------------------------------------------------------------------------------------

def c_source(conditions) -> str:
    """C text of `conditions`: W, P, MARGINS and the functions named in cone_program.c."""
    programs, size = derive(conditions), conditions.size
    margins = len(conditions.cones.margins(range(size)))
    widths = {'jacobian_w': size, 'jacobian_theta': conditions.parameters}
    lines = ['#include <math.h>', f'#define W {size}', f'#define P {conditions.parameters}',
             f'#define MARGINS {margins}']
    for f in fields(programs):
        lines += _c_function(getattr(programs, f.name), f.name, widths.get(f.name))
    return '\n'.join([*lines, ''])


def _c_function(program, name, width):
    text = _printer()
    arguments = ', '.join(f'const double *{v}' for v, _ in program.arguments)
    lines = [f'static void {name}({arguments}, double *out) {{']
    for v, length in program.arguments:
        lines += [f'  const double {v}{i} = {v}[{i}]; (void){v}{i};' for i in range(length)]
    lines += [f'  const double {s} = {text(e)};' for s, e in program.assignments]
    for index, e in program.entries:  # the caller clears `out`: entries that are zero are not written
        lines.append(f'  out[{index[0] * width + index[1] if width else index[0]}] = {text(e)};')
    return [*lines, '}']


def _printer():
    class Printer(codegen.doubles_printer()):
        products = 10

    return Printer().doprint


def _text(conditions):
    import deqmpc.solvers.cone_program as own
    modules = {inspect.getmodule(c) for c in type(conditions).__mro__ if c is not object} | {codegen, equations, own}
    try:
        sources = [inspect.getsource(m) for m in sorted(modules, key=lambda m: m.__name__)]
        sources.append(inspect.getsource(inspect.getmodule(c_source)))
    except (OSError, TypeError):  # conditions typed into an interpreter: nothing to tell an old text by
        return c_source(conditions)
    return build.cached_text([repr(conditions), *sources], lambda: c_source(conditions))


@functools.lru_cache(maxsize=32)
def native(conditions) -> Native:
    """The compiled code of `conditions`. NoCompiler where it cannot be built."""
    algorithm = resources.files('deqmpc.solvers').joinpath('cone_program.c').read_text()
    return Native(build.load(f'{_text(conditions)}\n{algorithm}'), conditions.size, conditions.parameters)


class Native:
    """Compiled twins of the methods of `ConeSolver`, on float64 tensors of the CPU that are contiguous."""

    def __init__(self, library: ctypes.CDLL, size: int, parameters: int):
        self.size, self.parameters = size, parameters
        self._solve, self._sensitivity = library.solve_paths, library.sensitivities
        pointer, count, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
        self._solve.restype = self._sensitivity.restype = None
        self._solve.argtypes = [pointer, pointer, count, pointer, count, number, count, count] + [pointer] * 4
        self._sensitivity.argtypes = [pointer, pointer, count, pointer]

    def solve(self, theta: Tensor, start: Tensor | None, levels: list[float],
              settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w (B, L, size), status, steps and residual (B,) for theta (B, parameters), from start (B, size) if given."""
        B, L = len(theta), len(levels)
        mu = (ctypes.c_double * L)(*levels)
        w, residual = theta.new_empty(B, L, self.size), theta.new_empty(B)
        status, steps = torch.empty(2, B, dtype=torch.long)
        self._solve(theta.data_ptr(), None if start is None else start.data_ptr(), B, ctypes.addressof(mu), L,
                    settings.tolerance, settings.max_steps, settings.halvings, w.data_ptr(), status.data_ptr(),
                    steps.data_ptr(), residual.data_ptr())
        return w, status, steps, residual

    def sensitivity(self, w: Tensor, theta: Tensor) -> Tensor:
        """dw/dtheta (B, size, parameters)."""
        s = theta.new_empty(len(theta), self.size, self.parameters)
        self._sensitivity(w.data_ptr(), theta.data_ptr(), len(theta), s.data_ptr())
        return s

    def single(self, mu: float, settings) -> Single:
        """A solver of one sample at a time."""
        return Single(self, mu, settings)


class Single:
    """One sample after another in a loop, each from where the last one ended: plain floats in and out, since a tensor
    costs more than such a solve. Where that start leads nowhere, and at first, the path is followed from its start."""

    def __init__(self, native: Native, mu: float, settings):
        doubles = ctypes.c_double
        levels = settings.path(mu)
        self._theta, self._w = (doubles * native.parameters)(), (doubles * native.size)()
        self._path, self._mu = (doubles * (native.size * len(levels)))(), (doubles * len(levels))(*levels)
        self._status, self._steps, self._length = ctypes.c_longlong(), ctypes.c_longlong(), doubles()
        self._run, self._size, self._warm = native._solve, native.size, False
        limits = settings.tolerance, settings.max_steps, settings.halvings
        report = [ctypes.addressof(v) for v in (self._status, self._steps, self._length)]
        theta, mus, path, w = map(ctypes.addressof, (self._theta, self._mu, self._path, self._w))
        last = mus + ctypes.sizeof(doubles) * (len(levels) - 1)
        self._from_start = theta, None, 1, mus, len(levels), *limits, path, *report
        self._from_last = theta, w, 1, last, 1, *limits, path, *report
        self._last_point = native.size * (len(levels) - 1)

    def solve(self, theta: Sequence[float]) -> list[float] | None:
        """w (size) at mu, None where the conditions could not be solved."""
        self._theta[:] = theta
        if self._warm:
            self._run(*self._from_last)
            if self._status.value == 0:
                self._w[:] = w = self._path[:self._size]
                return w
        self._run(*self._from_start)
        self._warm = self._status.value == 0
        if not self._warm:
            return None
        self._w[:] = w = self._path[self._last_point:]
        return w
