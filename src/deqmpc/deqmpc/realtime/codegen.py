"""C code of one dynamics, generated from its component-wise definition (deqmpc.dynamics.equations).

The generated text stands before solver.c in one translation unit and defines N, M, SPACE, POSITION and

  void step_linearize(const vec *x, const vec *u, double h, vec *next, vec *F)
  void step_curvature(const vec *x, const vec *u, double h, const vec *y, vec *C)

over `vec`, a vector of LANES doubles: each lane is a knot. F holds the structurally non-zero entries of
dphi/d(x, u) in the order of F_ROW, F_COLUMN; C those of the upper triangle of d^2(y' phi)/d(x, u)^2 in the order of
C_ROW, C_COLUMN. f and df/d(x, u) share their common subexpressions, among them sin and cos of an angle, which libm
computes lane by lane; the chain rules of the integrator that the equations are made for (see
deqmpc.dynamics.integrators) are unrolled over its stages and over non-zero entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from deqmpc.dynamics.equations import Equations, curvature_program
from deqmpc.dynamics.integrators import kind_of

LANES = 8  # doubles in one vector: a register of AVX-512, two of AVX2, four of NEON


def c_source(equations: Equations, position: Sequence[int]) -> str:
    """C text of `equations`; `position` are the indices of the state that spheres act on. ValueError for dynamics that
    are a step themselves."""
    if not hasattr(equations, 'derivative'):
        raise ValueError(f'{type(equations).__name__} has no equations to write in C; expected `derivative`, or for a '
                         f'step itself a solver of deqmpc.solvers')
    n, m = equations.n, equations.m
    make = _Writer(equations)
    head = [
        f'#define N {n}', f'#define M {m}', f'#define LANES {LANES}', f'#define SPACE {len(position)}',
        f'static const int POSITION[SPACE] = {{{", ".join(map(str, position))}}};',
        'typedef double vec __attribute__((vector_size(8 * LANES)));',
        '#define LANEWISE(f) static inline vec lanes_##f(vec a) '
        '{ for (int i = 0; i < LANES; i++) a[i] = f(a[i]); return a; }',
        *(f'LANEWISE({f})' for f in _FUNCTIONS),
    ]
    return '\n'.join(['#include <math.h>', *head, *make.derivative(), *make.linearize(), *make.curvature(), ''])


_FUNCTIONS = ('sin', 'cos', 'tan', 'exp', 'log', 'sqrt', 'tanh', 'asin', 'acos', 'atan')


def doubles_printer() -> type:
    """Base class of printers of C: a function, since to import sympy takes a second."""
    from sympy.printing.c import C99CodePrinter

    class Doubles(C99CodePrinter):
        """All numbers are doubles with all 53 bits; integer powers up to `products` are products."""

        products = 8

        def _print_Float(self, expr):
            return repr(float(expr))

        def _print_Integer(self, expr):
            return repr(float(expr))

        def _print_Pow(self, expr):
            if not (expr.exp.is_Integer and 0 < abs(int(expr.exp)) <= self.products):
                return self.other_power(expr)
            product = '*'.join([self.parenthesize(expr.base, 100)] * abs(int(expr.exp)))
            return f'({product})' if expr.exp > 0 else f'(1.0/({product}))'

        def other_power(self, expr):
            return super()._print_Pow(expr)

    return Doubles


def _printer():
    class Printer(doubles_printer()):
        """Expressions over vec."""

        def _print_Rational(self, expr):
            return repr(float(expr))

        def _print_NumberSymbol(self, expr):
            return repr(float(expr))

        def other_power(self, expr):
            base = self.parenthesize(expr.base, 100)
            if expr.exp.is_Rational and expr.exp.q == 2 and abs(expr.exp.p) == 1:
                return f'lanes_sqrt({base})' if expr.exp > 0 else f'(1.0/lanes_sqrt({base}))'
            raise ValueError(f'cannot write {expr} in C; expected integer powers up to 8 or square roots')

        def _print(self, expr, **options):
            # sympy has C of its own for many more functions (fabs, erf, comparisons), which is not over vec
            if not (expr.is_Add or expr.is_Mul or expr.is_Pow or expr.is_Atom or expr.func.__name__ in _FUNCTIONS):
                raise ValueError(f'cannot write {expr} in C; expected sums, products, powers and functions among '
                                 f'{", ".join(_FUNCTIONS)}')
            return super()._print(expr, **options)

        def _print_Function(self, expr):
            return f'lanes_{expr.func.__name__}({self._print(expr.args[0])})'

    for name in _FUNCTIONS:  # sympy prints these by functions of their own
        setattr(Printer, f'_print_{name}', Printer._print_Function)

    return Printer().doprint


class _Writer:
    def __init__(self, equations):
        import sympy
        self.equations = equations
        self.n, self.m = equations.n, equations.m
        x = [sympy.Symbol(f'x{i}', real=True) for i in range(self.n)]
        u = [sympy.Symbol(f'u{i}', real=True) for i in range(self.m)]
        f = sympy.Matrix([sympy.sympify(e) for e in equations.derivative(x, u)])
        J = f.jacobian([*x, *u])
        self.nonzero = [(i, j) for i in range(self.n) for j in range(self.n + self.m) if J[i, j] != 0]
        self.assignments, reduced = sympy.cse([*f, *(J[e] for e in self.nonzero)],
                                              symbols=sympy.numbered_symbols('t'), order='none')
        self.f, self.J = reduced[:self.n], reduced[self.n:]
        self.text = _printer()
        integrator = kind_of(equations)
        self.jump = getattr(equations, 'jump', ())
        self.steps = [f'({step!r} * h)' for step in integrator.steps]  # from x to the stages after the first
        self.weights = [f'({weight!r} * h)' for weight in integrator.weights]
        self.stage_count = len(self.weights)
        # sparsity of the columns of K_1 .. K_S (dk_i/dz): J, then J + A K
        rows = {i: [j for a, j in self.nonzero if a == i] for i in range(self.n)}
        self.A = {i: [k for k in rows[i] if k < self.n] for i in rows}
        self.K = [set(self.nonzero)]
        for _ in self.steps:
            self.K.append(set(self.nonzero) | {(i, j) for i in self.A for k in self.A[i] for a, j in self.K[-1]
                                               if a == k})
        self.ones = {(i, i) for i in range(self.n)} | {(i, self.n + j) for i, j in self.jump}
        self.entries = sorted(self.K[-1] | self.ones)

    def unpack(self, names):
        return [f'  const vec {name}{i} = {name}[{i}];' for name, size in names for i in range(size)]

    def derivative(self):
        """f and J (non-zero entries, in the order of `nonzero`) in one function."""
        lines = ['static inline void f_and_jacobian(const vec *x, const vec *u, vec *f, vec *J) {',
                 *self.unpack((('x', self.n), ('u', self.m))),
                 '  const vec zero = {0}; (void)zero;']
        lines += [f'  const vec {s} = {self.text(e)};' for s, e in self.assignments]
        for name, values in (('f', self.f), ('J', self.J)):
            lines += [f'  {name}[{i}] = {"zero + " if not e.free_symbols else ""}{self.text(e)};'
                      for i, e in enumerate(values)]
        return [*lines, '}']

    def stages(self):
        """Statements: the stages k[i], their Jacobians J[i], stage states and sensitivities K[i]."""
        count, size, S = len(self.nonzero), self.n * (self.n + self.m), self.stage_count
        lines = [f'  vec k[{S}][N], J[{S}][{count}], K[{S}][{size}], stage[{S}][N];',
                 '  for (int i = 0; i < N; i++) stage[0][i] = x[i];']
        for s in range(S):
            if s:
                lines += [f'  for (int i = 0; i < N; i++) stage[{s}][i] = x[i] + {self.steps[s - 1]} * k[{s - 1}][i];']
            lines += [f'  f_and_jacobian(stage[{s}], u, k[{s}], J[{s}]);']
            for i, j in sorted(self.K[s]):
                lines.append(f'  K[{s}][{i * (self.n + self.m) + j}] = {self.chain(s, i, j)};')
        return lines

    def chain(self, s, i, j):
        own = self.jacobian(s, i, j)
        if s == 0:
            return own
        terms = []
        for k in self.A[i]:
            if (k, j) in self.K[s - 1]:
                factor = self.jacobian(s, i, k)
                terms.append(f'{factor} * K[{s - 1}][{k * (self.n + self.m) + j}]')
        if not terms:
            return own
        product = f'{self.steps[s - 1]} * ({" + ".join(terms)})'
        return f'{own} + {product}' if own else product

    def jacobian(self, s, i, j):
        return f'J[{s}][{self.nonzero.index((i, j))}]' if (i, j) in self.nonzero else ''

    def linearize(self):
        rows, columns = zip(*self.entries, strict=True)
        stages = range(self.stage_count)
        lines = [f'#define F_COUNT {len(self.entries)}',
                 f'static const short F_ROW[F_COUNT] = {{{", ".join(map(str, rows))}}};',
                 f'static const short F_COLUMN[F_COUNT] = {{{", ".join(map(str, columns))}}};',
                 'static void step_linearize(const vec *x, const vec *u, double h, vec *next, vec *F) {',
                 *self.stages(),
                 f'  for (int i = 0; i < N; i++) next[i] = x[i] + {self.weighted([f"k[{s}][i]" for s in stages])};']
        lines += [f'  next[{i}] += u[{j}];' for i, j in self.jump]
        for e, (i, j) in enumerate(self.entries):
            at = i * (self.n + self.m) + j
            one = '1.0 + ' if (i, j) in self.ones else ''
            value = self.weighted([f'K[{s}][{at}]' if (i, j) in self.K[s] else '' for s in stages])
            lines.append(f'  F[{e}] = {one}{value or "(vec){0}"};')
        return [*lines, '}']

    def weighted(self, values):
        """The sum of `values`, one for each stage or '', with the integrator's weights."""
        sums: dict[str, list[str]] = {}
        for weight, value in zip(self.weights, values, strict=True):
            if value:
                sums.setdefault(weight, []).append(value)
        return ' + '.join(f'{weight} * ({" + ".join(terms)})' for weight, terms in sums.items())

    def curvature(self):
        """d^2(y' phi)/dz^2 = sum_i S_i' [d^2(w_i' f)/dz^2] S_i, see deqmpc.dynamics.integrators."""
        program = curvature_program(self.equations)
        n = self.n
        upper = [index for index, _ in program.entries]
        S = self.sensitivities()
        entries = sorted({(min(a, b), max(a, b)) for s in S for i, j in upper for a in s[i] for b in s[j]})
        at = {e: i for i, e in enumerate(entries)}
        rows, columns = zip(*(entries or [(0, 0)]), strict=True)  # C has no empty arrays
        lines = ['static inline void f_curvature(const vec *x, const vec *u, const vec *w, vec *C) {',
                 *self.unpack((('x', n), ('u', self.m), ('w', n))), '  const vec zero = {0}; (void)zero;']
        lines += [f'  const vec {s} = {self.text(e)};' for s, e in program.assignments]
        lines += [f'  C[{e}] = {"zero + " if not v.free_symbols else ""}{self.text(v)};'
                  for e, (_, v) in enumerate(program.entries)]
        lines += ['}', f'#define C_COUNT {len(entries)}',
                  f'static const short C_ROW[{len(rows)}] = {{{", ".join(map(str, rows))}}};',
                  f'static const short C_COLUMN[{len(rows)}] = {{{", ".join(map(str, columns))}}};',
                  'static void step_curvature(const vec *x, const vec *u, double h, const vec *y, vec *C) {',
                  *self.stages(), f'  vec w[{self.stage_count}][N], c[{max(len(upper), 1)}];']
        for s in reversed(range(self.stage_count)):
            lines += self.adjoint(s)
        lines += ['  for (int e = 0; e < C_COUNT; e++) C[e] = (vec){0};']
        for s in range(self.stage_count):
            lines += ['  {', f'    f_curvature(stage[{s}], u, w[{s}], c);']
            full: dict[int, dict[int, str]] = {}
            for e, (i, j) in enumerate(upper):
                full.setdefault(i, {})[j] = f'c[{e}]'
                full.setdefault(j, {})[i] = f'c[{e}]'
            sums: dict[int, list[str]] = {}
            for i, row in full.items():  # b = C S, then S' b: the upper triangle
                right: dict[int, list[str]] = {}
                for j, value in row.items():
                    for b, factor in S[s][j].items():
                        right.setdefault(b, []).append(_times(factor, value))
                lines += [f'    const vec b{s}_{i}_{b} = {" + ".join(terms)};' for b, terms in right.items()]
                for a, factor in S[s][i].items():
                    for b in right:
                        if a <= b:
                            sums.setdefault(at[a, b], []).append(_times(factor, f'b{s}_{i}_{b}'))
            lines += [f'    C[{e}] += {" + ".join(terms)};' for e, terms in sums.items()]
            lines += ['  }']
        return [*lines, '}']

    def sensitivities(self):
        """S_1 = I, S_i = [I + step K_{i-1}; 0 I]: for each stage and row {column: factor}."""
        Z = self.n + self.m
        S = []
        for s in range(self.stage_count):
            rows: dict[int, dict[int, str]] = {r: {} for r in range(Z)}
            for i, j in self.K[s - 1] if s else ():
                rows[i][j] = f'{self.steps[s - 1]} * K[{s - 1}][{i * Z + j}]'
            for r, row in rows.items():
                row[r] = f'1.0 + {row[r]}' if r in row else '1.0'
            S.append(rows)
        return S

    def adjoint(self, s):
        """w_s = weight y + step A_{s+1}' w_{s+1}"""
        for k in range(self.n):
            value = f'{self.weights[s]} * y[{k}]'
            if s + 1 < self.stage_count:
                terms = [f'{self.jacobian(s + 1, i, k)} * w[{s + 1}][{i}]' for i in self.A if k in self.A[i]]
                value += f' + {self.steps[s]} * ({" + ".join(terms)})' if terms else ''
            yield f'  w[{s}][{k}] = {value};'


def _times(factor, value):
    return value if factor == '1.0' else f'({factor}) * {value}'
