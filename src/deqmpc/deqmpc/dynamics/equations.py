"""Continuous dynamics written once, over scalars, and the derivatives generated from them.

An `Equations` object gives x' = f(x, u) component by component with + - * / and the functions `sin`, `cos`, `sqrt`
and `exp` of this module. The same lines run on floats, arrays and tensors, and on sympy symbols, from which this
module derives

  the Jacobian  J = df/d(x, u)                      (n, n+m)
  the curvature C = d^2 (w' f) / d(x, u)^2          (n+m, n+m), for a weight w (n,)

as straight-line programs of common subexpressions. A `Program` is kept as expressions, so that other
printers (C, numba) can write the same program; here it becomes Python that runs on scalars, NumPy arrays and
tensors. Generation takes about a second and happens once per process and airframe.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Scalars = Sequence[Any]
_LARGEST_EXPONENT = math.log(sys.float_info.max)


class Equations(Protocol):
    """Continuous dynamics. Implementations are frozen dataclasses, hence hashable by their constants. An attribute
    `integrator` names the step they are made for, where it is not RK4, and `jump` inputs that are changes of states
    (deqmpc.dynamics.integrators)."""

    n: int
    m: int

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt, n scalars."""


def sin(a: Any) -> Any:
    """sin of a float, an array, a tensor or a symbol; NaN where it is not finite."""
    return _function('sin', a)


def cos(a: Any) -> Any:
    """cos of a float, an array, a tensor or a symbol; NaN where it is not finite."""
    return _function('cos', a)


def sqrt(a: Any) -> Any:
    """Square root of a float, an array, a tensor or a symbol; NaN where it is not finite."""
    return _function('sqrt', a)


def exp(a: Any) -> Any:
    """exp of a float, an array, a tensor or a symbol; inf where it is too large for a double."""
    if isinstance(a, (float, int)):
        return math.exp(a) if a <= _LARGEST_EXPONENT else a * math.inf  # NaN stays NaN
    return _function('exp', a)


def _function(name, a):
    if isinstance(a, (float, int)):
        return getattr(math, name)(a) if math.isfinite(a) else math.nan
    if isinstance(a, np.ndarray):
        return getattr(np, name)(a)
    if hasattr(a, name):  # a tensor
        return getattr(a, name)()
    import sympy
    return getattr(sympy, name)(a)


@dataclass(frozen=True)
class Program:
    """`assignments` (name, expression) in order, then one expression for each entry of the output that is
    not zero: `entries` (index tuple, expression). Inputs are x0.., u0.. and, where used, w0.. ."""

    assignments: tuple[tuple[str, Any], ...]
    entries: tuple[tuple[tuple[int, ...], Any], ...]
    arguments: tuple[tuple[str, int], ...]  # (vector name, length)


def jacobian_program(equations: Equations) -> Program:
    """The program of df/d(x, u)."""
    import sympy  # here, because it takes 0.3 s to import and most of the stack never derives anything
    x, u, _ = _symbols(equations)
    f = sympy.Matrix(equations.derivative(x, u))
    return _program(f.jacobian([*x, *u]).tolist(), (('x', equations.n), ('u', equations.m)))


def curvature_program(equations: Equations) -> Program:
    """The program of the Hessian of w' f; entries are the upper triangle only."""
    import sympy
    x, u, w = _symbols(equations)
    z = [*x, *u]
    # differentiating w'J row by row keeps the expressions small: cse first, no expansion
    gradient = (sympy.Matrix([w]) * sympy.Matrix(equations.derivative(x, u)).jacobian(z)).tolist()[0]
    upper = [[sympy.diff(g, z[j]) if j >= i else sympy.S.Zero for j in range(len(z))]
             for i, g in enumerate(gradient)]
    return _program(upper, (('x', equations.n), ('u', equations.m), ('w', equations.n)))


def _symbols(equations):
    import sympy
    return tuple([sympy.Symbol(f'{name}{i}', real=True) for i in range(length)]
                 for name, length in (('x', equations.n), ('u', equations.m), ('w', equations.n)))


def _program(rows, arguments) -> Program:
    return straight_line([((i, j), e) for i, row in enumerate(rows) for j, e in enumerate(row)], arguments)


def straight_line(entries: Sequence[tuple[tuple[int, ...], Any]], arguments: tuple[tuple[str, int], ...]) -> Program:
    """The program of the `entries` (index, expression) that are not zero."""
    import sympy
    entries = [(index, e) for index, e in entries if e != 0]
    assignments, reduced = sympy.cse([e for _, e in entries], symbols=sympy.numbered_symbols('t'),
                                     order='none')
    return Program(tuple((str(s), e) for s, e in assignments),
                   tuple((index, e) for (index, _), e in zip(entries, reduced, strict=True)), arguments)


def python_source(program: Program, name: str) -> str:
    """Python source of `def name(<vectors>, out)`: writes the entries into `out[i, j]`."""
    from sympy.printing.pycode import PythonCodePrinter

    class Printer(PythonCodePrinter):
        def _print_Float(self, expr):
            return repr(float(expr))  # all 53 bits

        def _print_Pow(self, expr, rational=False):
            if not (expr.exp.is_Integer and abs(int(expr.exp)) <= 4):
                return super()._print_Pow(expr, rational=rational)
            base = self.parenthesize(expr.base, 100)  # array powers cost ten multiplications
            product = '*'.join([base] * abs(int(expr.exp)))
            return f'({product})' if expr.exp > 0 else f'(1.0/({product}))'

    text = Printer({'fully_qualified_modules': False}).doprint
    vectors = [v for v, _ in program.arguments]
    lines = [f'def {name}({", ".join(vectors)}, out):']
    for v, length in program.arguments:
        lines.append(f'    {", ".join(f"{v}{i}" for i in range(length))}, = {v}')
    lines += [f'    {s} = {text(e)}' for s, e in program.assignments]
    lines += [f'    out[{", ".join(map(str, index))}] = {text(e)}' for index, e in program.entries]
    return '\n'.join(lines) + '\n'


def compiled(program: Program, name: str) -> Callable:
    """`python_source` as a function."""
    namespace: dict[str, Any] = {'sin': sin, 'cos': cos, 'exp': exp, 'sqrt': sqrt}
    exec(compile(python_source(program, name), f'<generated {name}>', 'exec'), namespace)
    return namespace[name]


@functools.lru_cache(maxsize=32)
def jacobian_function(equations: Equations) -> Callable:
    """`jacobian(x, u, out)`: writes the entries of df/d(x, u) that are not zero into out (n, n+m, ...)."""
    return compiled(jacobian_program(equations), 'jacobian')


@functools.lru_cache(maxsize=32)
def curvature_function(equations: Equations) -> Callable:
    """`curvature(x, u, w, out)`: writes the upper triangle's entries that are not zero into
    out (n+m, n+m, ...)."""
    return compiled(curvature_program(equations), 'curvature')
