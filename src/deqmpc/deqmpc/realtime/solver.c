/* Solvers of deqmpc.problem for one instance, without allocation. The dynamics stand above, from codegen.py.

   min  sum_t [1/2 |x_t - xr_t|_Q^2 + 1/2 |u_t - ur_t|_R^2] + 1/2 |x_T - xr_T|_Qf^2
   s.t. c_0 = x_init - x_0 = 0,  c_{t+1} = phi(x_t, u_t) - x_{t+1} = 0,  g <= 0   (bounds, spheres)

   Stage t = 0..T has z_t = (x_t, u_t), padded to ZP lanes, and rows g: ZP upper bounds, ZP lower bounds, KP spheres.
   A row that is absent has the constant g = -1 and gradient 0, so that no loop has a mask.

   solve_al   augmented Lagrangian with Gauss-Newton steps: step by step deqmpc.solvers.augmented_lagrangian
   solve_ip   primal-dual interior point with the exact Hessian where it is convex enough, to a tolerance
   Both take their steps from one Riccati recursion (deqmpc.solvers.riccati) with D = delta I; delta = 1/mu or 0. */

#include <float.h>
#include <stdlib.h>
#include <string.h>

#define Z (N + M)
#define ZV ((Z + LANES - 1) / LANES)
#define ZP (ZV * LANES)
#define EACH(i, n) for (int i = 0; i < (n); i++)
typedef long long mask __attribute__((vector_size(8 * LANES)));
typedef double half __attribute__((vector_size(4 * LANES)));
typedef double pair __attribute__((vector_size(2 * LANES)));
typedef struct { vec v[ZV]; } row;       /* a stage vector, or a row of a stage matrix */

#define FILTER 128
enum { CONVERGED, LIMIT, INFEASIBLE, SINGULAR, NOT_FINITE };

/* Filled by solver.py (class _Exchange), same order. Arrays are C-contiguous doubles. */
typedef struct {
  /* the problem */
  long T, K_max, bounds;
  double dt;
  const double *Q, *R, *Qf;              /* N, M, N */
  const long *bound_lane; const double *bound_sign, *bound_limit;   /* rows of Problem.sign, Problem.limit */
  /* the instance */
  long K;
  const double *x_init, *x_ref, *u_ref, *centers, *radii;   /* N; T+1,N; T,M; T+1,K,SPACE; K */
  /* in: where to start, out: the result; lambda is T, bounds + K */
  double *x, *u, *lambda, *eta, *mu;
  /* settings */
  long iterations, gn_steps, max_steps, halvings, exact_after;
  double gamma, mu_max, progress, feasibility, optimality, elastic, armijo, tolerance, mu_start, slack_min;
  /* report */
  long status, steps, outer;
  double defect, violation, decrement, cost;
} Exchange;

typedef struct {                         /* a trajectory and what belongs to it */
  row *z, *c, *F;                        /* T+1; T+1 (x part); T*N */
  double *g;                             /* T+1, rows */
  double cost;
} Point;

typedef struct {
  int T, K, KP, rows;                    /* rows = 2 ZP + KP */
  double h, rho;
  Point a, b;
  row *ref, *weight, *H, *Hu, *s, *sd, *cc, *d, *P, *W, *V, *p, *y, *ynew, *chol, *vk;
  double *center, *half, *inv;           /* T+1, SPACE, KP; KP; KP */
  double *lam, *slack, *dlam, *dslack, *v, *w, *t, *dt, *snew, *by_z, *by_s;   /* T+1, rows */
  double filter[FILTER][3];              /* infeasibility, cost, sum of logs of former points */
  double *rho_row;                       /* rows */
  row up_on[3], up_limit[3], low_on[3], low_limit[3];      /* first, middle, last stage */
} Work;

/* ---- vectors ---------------------------------------------------------------------------------------------- */

static inline vec all(double a) { return (vec){0} + a; }
static inline vec choose(mask m, vec a, vec b) { return (vec)((m & (mask)a) | (~m & (mask)b)); }
static inline vec vmax(vec a, vec b) { return choose(a > b, a, b); }
static inline vec vmin(vec a, vec b) { return choose(a < b, a, b); }
static inline vec vabs(vec a) { return (vec)((mask)a & 0x7fffffffffffffffLL); }
static inline double sum(vec a) {         /* by halves */
  union { vec v; half h[2]; } u = {a};
  union { half h; pair p[2]; } q = {u.h[0] + u.h[1]};
  const pair p = q.p[0] + q.p[1];
  return p[0] + p[1];
}
static inline double largest(vec a) { double s = a[0]; EACH(i, LANES) if (a[i] > s) s = a[i]; return s; }
static inline vec load(const double *p) { return *(const vec *)p; }
static inline void store(double *p, vec a) { *(vec *)p = a; }
static inline double dot(const row *a, const row *b) {
  vec s = {0};
  EACH(v, ZV) s += a->v[v] * b->v[v];
  return sum(s);
}
static inline double *lanes(row *r) { return (double *)r; }
static inline const double *clanes(const row *r) { return (const double *)r; }
/* r += a b */
static inline void axpy(row *r, double a, const row *b) { EACH(v, ZV) r->v[v] += a * b->v[v]; }

/* ---- memory ----------------------------------------------------------------------------------------------- */

static size_t place(size_t *at, size_t bytes) {
  const size_t here = *at;
  *at += (bytes + 63) / 64 * 64;
  return here;
}

static size_t layout(Work *w, char *base, int T, int K_max) {
  size_t at = 0;
  const size_t stages = T + 1, rows = 2 * ZP + (K_max + LANES - 1) / LANES * LANES;
#define ROWS(p, count) p = (row *)(base + place(&at, sizeof(row) * (count)))
#define NUMBERS(p, count) p = (double *)(base + place(&at, sizeof(double) * (count)))
  Point *points[2] = {&w->a, &w->b};
  EACH(i, 2) {
    ROWS(points[i]->z, stages); ROWS(points[i]->c, stages); ROWS(points[i]->F, stages * N);
    NUMBERS(points[i]->g, stages * rows);
  }
  row **per_stage[] = {&w->ref, &w->weight, &w->s, &w->sd, &w->cc, &w->d, &w->p, &w->y, &w->ynew, &w->vk};
  EACH(i, (int)(sizeof per_stage / sizeof *per_stage)) ROWS(*per_stage[i], stages);
  ROWS(w->H, stages * Z); ROWS(w->P, N); ROWS(w->W, stages * N); ROWS(w->V, stages * M); ROWS(w->chol, stages * M);
  NUMBERS(w->center, stages * SPACE * rows); NUMBERS(w->half, rows); NUMBERS(w->inv, rows);
  double **per_row[] = {&w->lam, &w->slack, &w->dlam, &w->dslack, &w->v, &w->w, &w->t, &w->dt, &w->snew, &w->by_z, &w->by_s};
  EACH(i, (int)(sizeof per_row / sizeof *per_row)) NUMBERS(*per_row[i], stages * rows);
  NUMBERS(w->rho_row, rows);
  return at;
}

static void set_weights(Work *w, const Exchange *e) {
  EACH(t, w->T + 1) {
    EACH(i, N) lanes(&w->weight[t])[i] = t < w->T ? e->Q[i] : e->Qf[i];
    if (t < w->T) EACH(j, M) lanes(&w->weight[t])[N + j] = e->R[j];
  }
}

/* The working memory of `e`'s horizon and largest number of spheres; NULL where there is none left. */
void *create(const Exchange *e) {
  Work measure;
  const size_t own = (sizeof(Work) + 63) / 64 * 64, bytes = own + layout(&measure, NULL, e->T, e->K_max);
  void *memory;
  if (posix_memalign(&memory, 64, bytes)) return NULL;
  memset(memory, 0, bytes);
  Work *w = memory;
  layout(w, (char *)memory + own, e->T, e->K_max);
  w->T = e->T; w->h = e->dt;
  set_weights(w, e);
  EACH(kind, 3) {
    EACH(v, ZV) { w->up_limit[kind].v[v] = all(1); w->low_limit[kind].v[v] = all(1); }
    EACH(b, e->bounds) {
      const int lane = e->bound_lane[b];
      if ((kind == 0 && lane < N) || (kind == 2 && lane >= N)) continue;
      row *on = e->bound_sign[b] > 0 ? w->up_on : w->low_on, *limit = e->bound_sign[b] > 0 ? w->up_limit : w->low_limit;
      lanes(&on[kind])[lane] = e->bound_sign[b];
      lanes(&limit[kind])[lane] = e->bound_limit[b];
    }
  }
  return w;
}

void destroy(void *work) { free(work); }

static inline int kind_of(const Work *w, int t) { return t == 0 ? 0 : t < w->T ? 1 : 2; }
static inline int rows_of(const Work *w, int t) { return t ? w->rows : 2 * ZP; }   /* no spheres at knot 0 */

/* ---- into and out of the lanes ---------------------------------------------------------------------------- */

static int all_finite(const double *p, long count) {
  double s[LANES] = {0};                  /* apart, so that the additions do not wait for each other */
  long i = 0;
  for (; i + LANES <= count; i += LANES) EACH(l, LANES) s[l] += 0.0 * p[i + l];
  for (; i < count; i++) s[0] += 0.0 * p[i];
  double total = 0;
  EACH(l, LANES) total += s[l];
  return total == 0.0;
}

static int enter(Work *w, const Exchange *e) {
  const int T = w->T, K = e->K, KP = (K + LANES - 1) / LANES * LANES;
  if (!(all_finite(e->x_init, N) && all_finite(e->x_ref, (T + 1) * N) && all_finite(e->u_ref, T * M) && all_finite(e->x, (T + 1) * N)
        && all_finite(e->centers, (long)(T + 1) * K * SPACE) && all_finite(e->radii, K) && all_finite(e->u, T * M)
        && all_finite(e->lambda, T * (e->bounds + K)) && all_finite(e->eta, (T + 1) * N) && all_finite(e->mu, 1))) return 0;
  w->K = K; w->KP = KP; w->rows = 2 * ZP + KP;
  EACH(k, KP) {
    const int there = k < K && e->radii[k] > 0;
    w->half[k] = there ? 0.5 * e->radii[k] : -1.0;
    w->inv[k] = there ? 0.5 / e->radii[k] : 0.0;
  }
  EACH(t, T + 1) {
    EACH(k, KP) EACH(i, SPACE)
      w->center[(t * SPACE + i) * KP + k] = k < K ? e->centers[(t * K + k) * SPACE + i] : 0.0;
    EACH(i, N) { lanes(&w->ref[t])[i] = e->x_ref[t * N + i]; lanes(&w->a.z[t])[i] = e->x[t * N + i]; }
    if (t < T) EACH(j, M) { lanes(&w->ref[t])[N + j] = e->u_ref[t * M + j]; lanes(&w->a.z[t])[N + j] = e->u[t * M + j]; }
    EACH(i, N) lanes(&w->y[t])[i] = e->eta[t * N + i];
  }
  return 1;
}

/* Row of lane memory that holds residual b of stage t+1 (state bounds, spheres) or t (input bounds). */
static inline double *residual(const Work *w, const Exchange *e, double *of, int t, int b) {
  if (b >= e->bounds) return of + (long)(t + 1) * w->rows + 2 * ZP + b - e->bounds;
  const int lane = e->bound_lane[b];
  return of + (long)(lane < N ? t + 1 : t) * w->rows + (e->bound_sign[b] > 0 ? 0 : ZP) + lane;
}

static void lambda_in(Work *w, const Exchange *e) {
  memset(w->lam, 0, sizeof(double) * w->rows * (w->T + 1));
  EACH(t, w->T) EACH(b, e->bounds + w->K) *residual(w, e, w->lam, t, b) = e->lambda[t * (e->bounds + w->K) + b];
}

static void leave(Work *w, Exchange *e, double mu, long status) {
  EACH(t, w->T + 1) {
    EACH(i, N) { e->x[t * N + i] = lanes(&w->a.z[t])[i]; e->eta[t * N + i] = lanes(&w->y[t])[i]; }
    if (t < w->T) EACH(j, M) e->u[t * M + j] = lanes(&w->a.z[t])[N + j];
  }
  EACH(t, w->T) EACH(b, e->bounds + w->K) e->lambda[t * (e->bounds + w->K) + b] = *residual(w, e, w->lam, t, b);
  *e->mu = mu;
  e->status = status; e->cost = w->a.cost;
  vec defect = {0}, violation = {0};
  EACH(t, w->T + 1) {
    EACH(v, ZV) defect = vmax(defect, vabs(w->a.c[t].v[v]));
    for (int r = 0; r < rows_of(w, t); r += LANES) violation = vmax(violation, load(w->a.g + (long)t * w->rows + r));
  }
  e->defect = largest(defect); e->violation = largest(violation);
}

/* ---- the problem ------------------------------------------------------------------------------------------ */

/* Cost, defects, rows and linear dynamics at p->z. */
static void evaluate(const Work *w, const double *x_init, Point *p) {
  const int T = w->T;
  vec cost = {0};
  for (int t0 = 0; t0 < T; t0 += LANES) {
    const int count = T - t0 < LANES ? T - t0 : LANES;
    vec x[N], u[M], next[N], F[F_COUNT];
    EACH(l, LANES) {
      const double *z = clanes(&p->z[t0 + (l < count ? l : 0)]);
      EACH(i, N) x[i][l] = z[i];
      EACH(j, M) u[j][l] = z[N + j];
    }
    step_linearize(x, u, w->h, next, F);
    EACH(l, count) {
      double *c = lanes(&p->c[t0 + l + 1]), *f = lanes(&p->F[(t0 + l) * N]);
      const double *z = clanes(&p->z[t0 + l + 1]);
      EACH(i, N) c[i] = ((double *)&next[i])[l] - z[i];
      EACH(e, F_COUNT) f[F_ROW[e] * ZP + F_COLUMN[e]] = ((double *)&F[e])[l];
    }
  }
  EACH(i, N) lanes(&p->c[0])[i] = x_init[i] - clanes(&p->z[0])[i];
  EACH(t, T + 1) {
    const int kind = kind_of(w, t);
    double *g = p->g + (long)t * w->rows;
    EACH(v, ZV) {
      const vec z = p->z[t].v[v], e = z - w->ref[t].v[v];
      cost += w->weight[t].v[v] * e * e;
      store(g + v * LANES, w->up_on[kind].v[v] * z - w->up_limit[kind].v[v]);
      store(g + ZP + v * LANES, w->low_on[kind].v[v] * z - w->low_limit[kind].v[v]);
    }
    if (t) for (int k = 0; k < w->KP; k += LANES) {
      vec squared = {0};
      EACH(i, SPACE) {
        const vec offset = clanes(&p->z[t])[POSITION[i]] - load(w->center + (t * SPACE + i) * w->KP + k);
        squared += offset * offset;
      }
      store(g + 2 * ZP + k, load(w->half + k) - load(w->inv + k) * squared);
    }
  }
  p->cost = 0.5 * sum(cost);
}

/* Hessians H and gradients s (with multipliers v of the rows) and sd (with lam), for weights w of the rows' outer
   products; the spheres' curvature with multipliers lam times `bend`. */
static void stage_terms(Work *w, const Point *p, const double *v, const double *a, const double *lam, double bend) {
  EACH(t, w->T + 1) {
    const int kind = kind_of(w, t);
    const long at = (long)t * w->rows;
    row diagonal, s, sd;
    EACH(i, ZV) {
      const vec e = w->weight[t].v[i] * (p->z[t].v[i] - w->ref[t].v[i]);
      const vec up = w->up_on[kind].v[i], low = w->low_on[kind].v[i];
      const int u = i * LANES, l = ZP + u;
      s.v[i] = e + up * load(v + at + u) + low * load(v + at + l);
      sd.v[i] = e + up * load(lam + at + u) + low * load(lam + at + l);
      diagonal.v[i] = w->weight[t].v[i] + up * up * load(a + at + u) + low * low * load(a + at + l);
    }
    row *H = w->H + t * Z;
    memset(H, 0, sizeof(row) * Z);
    EACH(i, Z) lanes(&H[i])[i] = clanes(&diagonal)[i];
    if (t && w->KP) {
      vec push[SPACE], dual[SPACE], outer[SPACE][SPACE], curve = {0};
      EACH(i, SPACE) { push[i] = dual[i] = (vec){0}; EACH(j, SPACE) outer[i][j] = (vec){0}; }
      for (int k = 0; k < w->KP; k += LANES) {
        const vec inv = load(w->inv + k), vk = load(v + at + 2 * ZP + k), ak = load(a + at + 2 * ZP + k),
                  lk = load(lam + at + 2 * ZP + k);
        vec slope[SPACE];
        curve += inv * lk;
        EACH(i, SPACE) {
          slope[i] = -2.0 * inv * (clanes(&p->z[t])[POSITION[i]] - load(w->center + (t * SPACE + i) * w->KP + k));
          push[i] += vk * slope[i];
          dual[i] += lk * slope[i];
          const vec as = ak * slope[i];
          EACH(j, i + 1) outer[i][j] += as * slope[j];
        }
      }
      const double c = bend * -2.0 * sum(curve);
      EACH(i, SPACE) {
        lanes(&s)[POSITION[i]] += sum(push[i]);
        lanes(&sd)[POSITION[i]] += sum(dual[i]);
        EACH(j, i + 1) {
          const double o = sum(outer[i][j]) + (i == j ? c : 0.0);
          lanes(&H[POSITION[i]])[POSITION[j]] += o;
          if (i != j) lanes(&H[POSITION[j]])[POSITION[i]] += o;
        }
      }
    }
    w->s[t] = s; w->sd[t] = sd;
  }
}

/* H += d^2(y' phi)/dz^2 */
static void add_curvature(Work *w, const Point *p, const row *y) {
  for (int t0 = 0; t0 < w->T; t0 += LANES) {
    const int count = w->T - t0 < LANES ? w->T - t0 : LANES;
    vec x[N], u[M], m[N], C[C_COUNT + 1];
    EACH(l, LANES) {
      const int t = t0 + (l < count ? l : 0);
      EACH(i, N) { x[i][l] = clanes(&p->z[t])[i]; m[i][l] = clanes(&y[t + 1])[i]; }
      EACH(j, M) u[j][l] = clanes(&p->z[t])[N + j];
    }
    step_curvature(x, u, w->h, m, C);
    EACH(l, count) EACH(e, C_COUNT) {
      row *H = w->H + (t0 + l) * Z;
      const double c = ((double *)&C[e])[l];
      lanes(&H[C_ROW[e]])[C_COLUMN[e]] += c;
      if (C_ROW[e] != C_COLUMN[e]) lanes(&H[C_COLUMN[e]])[C_ROW[e]] += c;
    }
  }
}

/* ---- the step --------------------------------------------------------------------------------------------- */

/* out = H + F' G, four rows at a time so that they stay in registers */
static inline void add_product(row *out, const row *H, const row *F, const row *G) {
  int r = 0;
  for (; r + 4 <= Z; r += 4) {
    row o[4];
    EACH(i, 4) o[i] = H[r + i];
    EACH(k, N) EACH(i, 4) axpy(&o[i], clanes(&F[k])[r + i], &G[k]);
    EACH(i, 4) out[r + i] = o[i];
  }
  for (; r < Z; r++) {
    row o = H[r];
    EACH(k, N) axpy(&o, clanes(&F[k])[r], &G[k]);
    out[r] = o;
  }
}

/* out = W F for a symmetric W of which only the upper triangle is read, so that rounding cannot make it unsymmetric */
static inline void multiply_symmetric(row *out, const row *W, const row *F) {
  int r = 0;
  for (; r + 4 <= N; r += 4) {
    row o[4] = {{{{0}}}};
    EACH(k, N) {
      double f[4];
      EACH(i, 4) f[i] = k < r + i ? clanes(&W[k])[r + i] : clanes(&W[r + i])[k];
      EACH(i, 4) axpy(&o[i], f[i], &F[k]);
    }
    EACH(i, 4) out[r + i] = o[i];
  }
  for (; r < N; r++) {
    row o = {0};
    EACH(k, N) axpy(&o, k < r ? clanes(&W[k])[r] : clanes(&W[r])[k], &F[k]);
    out[r] = o;
  }
}

/* W = (I + delta P)^-1 P by elimination without pivoting, which a definite matrix does not need: with S = I + delta P
   = L U and l_ik = u_ki / u_kk, rows of U and of L^-1 P downwards, then upwards. 0 where a pivot is not positive. */
static int damp(row *W, const row *P, double delta) {
  row U[N];
  double inverse[N];
  EACH(i, N) {
    row u, b = P[i];
    EACH(v, ZV) u.v[v] = delta * P[i].v[v];
    lanes(&u)[i] += 1.0;
    EACH(k, i) {
      const double l = -clanes(&U[k])[i] * inverse[k];
      axpy(&u, l, &U[k]);
      axpy(&b, l, &W[k]);
    }
    U[i] = u; W[i] = b;
    const double pivot = clanes(&U[i])[i];
    if (!(pivot > 0)) return 0;
    inverse[i] = 1.0 / pivot;
  }
  for (int i = N - 1; i >= 0; i--) {
    row b = W[i];
    for (int k = i + 1; k < N; k++) axpy(&b, -clanes(&U[i])[k], &W[k]);
    EACH(v, ZV) W[i].v[v] = b.v[v] * inverse[i];
  }
  return 1;
}

/* Newton step d (w->d) and co-states y (w->ynew) of the LQR with Hessians w->H + reg I, gradients w->s, dynamics F,
   offsets c and dual regularisation delta I. 0 where a pivot is not positive: wrong inertia. */
static int riccati(Work *w, const row *F, const row *c, double delta, double reg) {
  const int T = w->T;
  row *P = delta > 0 ? w->P : w->W + T * N, G[N], Y[Z];
  EACH(i, N) { P[i] = w->H[T * Z + i]; lanes(&P[i])[i] += reg; }
  w->p[T] = w->s[T];
  for (int t = T - 1; t >= 0; t--) {
    const row *Ft = F + t * N;
    row *W = w->W + (t + 1) * N, *V = w->V + t * M, *L = w->chol + t * M;
    if (delta > 0 && !damp(W, P, delta)) return 0;
    row b, g = w->p[t + 1], h = w->s[t];
    EACH(v, ZV) b.v[v] = c[t + 1].v[v] - delta * w->p[t + 1].v[v];
    EACH(k, N) axpy(&g, clanes(&b)[k], &W[k]);
    EACH(k, N) axpy(&h, clanes(&g)[k], &Ft[k]);
    multiply_symmetric(G, W, Ft);                                     /* W F */
    add_product(Y, w->H + t * Z, Ft, G);                              /* H + F' W F */
    if (reg) EACH(i, Z) lanes(&Y[i])[i] += reg;
    /* Cholesky of G = Y_uu with V = L^-1 Y_u, vk = L^-1 h_u; the diagonal of L is kept inverted */
    row vk;
    EACH(i, M) {
      double own = clanes(&Y[N + i])[N + i], hi = clanes(&h)[N + i];
      row r = Y[N + i];
      EACH(j, i) {
        const double l = clanes(&V[j])[N + i];                        /* L_ij, as V_j = L^-1 Y_u holds L' too */
        lanes(&L[i])[j] = l;
        own -= l * l;
        hi -= l * clanes(&vk)[j];
        axpy(&r, -l, &V[j]);
      }
      if (!(own > 1e-12) || own > DBL_MAX) return 0;
      const double inverse = 1.0 / sqrt(own);
      lanes(&L[i])[i] = inverse;
      EACH(v, ZV) V[i].v[v] = r.v[v] * inverse;
      lanes(&vk)[i] = hi * inverse;
    }
    w->vk[t] = vk;
    if (delta == 0) P = w->W + t * N;
    EACH(i, N) {
      row r = Y[i];
      EACH(m, M) axpy(&r, -clanes(&V[m])[i], &V[m]);
      P[i] = r;
    }
    EACH(m, M) axpy(&h, -clanes(&vk)[m], &V[m]);
    w->p[t] = h;
  }
  if (delta > 0 && !damp(w->W, P, delta)) return 0;

  EACH(t, T + 1) {
    row b = c[t], wb = {0}, x = {0};
    if (t) EACH(i, N) lanes(&b)[i] += dot(&F[(t - 1) * N + i], &w->d[t - 1]);
    EACH(v, ZV) b.v[v] -= delta * w->p[t].v[v];
    EACH(k, N) axpy(&wb, clanes(&b)[k], &w->W[t * N + k]);
    EACH(i, N) {
      lanes(&x)[i] = clanes(&b)[i] - delta * clanes(&wb)[i];
      lanes(&w->ynew[t])[i] = clanes(&w->p[t])[i] + clanes(&wb)[i];
    }
    if (t < T) {
      double q[M];
      EACH(m, M) q[m] = -dot(&w->V[t * M + m], &x) - clanes(&w->vk[t])[m];
      for (int i = M - 1; i >= 0; i--) {
        for (int j = i + 1; j < M; j++) q[i] -= clanes(&w->chol[t * M + j])[i] * q[j];
        q[i] *= clanes(&w->chol[t * M + i])[i];
      }
      EACH(m, M) lanes(&x)[N + m] = q[m];
    }
    w->d[t] = x;
  }
  return 1;
}

/* ---- augmented Lagrangian --------------------------------------------------------------------------------- */

static double al_merit(const Work *w, const Point *p, double mu) {
  vec total = {0};
  const vec zero = {0};
  EACH(t, w->T + 1) {
    EACH(v, ZV) total += p->c[t].v[v] * (w->y[t].v[v] + 0.5 * mu * p->c[t].v[v]);
    for (int r = 0; r < rows_of(w, t); r += LANES) {
      const long at = (long)t * w->rows + r;
      const vec lam = load(w->lam + at), g = load(p->g + at);
      const vec v = vmin(vmax(lam + mu * g, zero), load(w->rho_row + r)), change = v - lam;
      total += v * g - change * change * (0.5 / mu);
    }
  }
  return p->cost + sum(total);
}

static void swap(Work *w) { const Point a = w->a; w->a = w->b; w->b = a; }

static void rho_rows(Work *w, double elastic, double hard) {
  EACH(r, w->rows) {
    const int on_input = r < 2 * ZP && r % ZP >= N;
    w->rho_row[r] = on_input ? hard : elastic;
  }
}

void solve_al(void *work, Exchange *e) {
  Work *w = work;
  e->steps = e->outer = 0;
  if (!enter(w, e)) { e->status = NOT_FINITE; return; }
  rho_rows(w, e->elastic, INFINITY);
  lambda_in(w, e);
  const int T = w->T;
  const vec zero = {0};
  double mu = *e->mu, reg = 0, last = INFINITY;
  long inner = 0, failures = 0;
  e->decrement = INFINITY;
  evaluate(w, e->x_init, &w->a);
  for (;;) {
    /* direction */
    EACH(t, T + 1) {
      for (int r = 0; r < rows_of(w, t); r += LANES) {
        const long at = (long)t * w->rows + r;
        const vec rho = load(w->rho_row + r), v = load(w->lam + at) + mu * load(w->a.g + at);
        store(w->w + at, (vec)((mask)all(mu) & (v > zero) & (v < rho)));
        store(w->v + at, vmin(vmax(v, zero), rho));
      }
      EACH(v, ZV) w->cc[t].v[v] = w->a.c[t].v[v] + w->y[t].v[v] / mu;
    }
    stage_terms(w, &w->a, w->v, w->w, w->v, 0.0);
    int ok = riccati(w, w->a.F, w->cc, 1.0 / mu, reg);
    double slope = 0;
    if (ok) EACH(t, T + 1) {
      slope += dot(&w->s[t], &w->d[t]);
      vec s = {0};
      EACH(v, ZV) s += (w->y[t].v[v] + mu * w->a.c[t].v[v]) * ((w->ynew[t].v[v] - w->y[t].v[v]) / mu - w->a.c[t].v[v]);
      slope += sum(s);
    }
    const double scale = fabs(w->a.cost) > 1 ? fabs(w->a.cost) : 1;
    ok = ok && slope <= DBL_EPSILON * scale && slope > -DBL_MAX;
    /* line search */
    int took = 0;
    if (ok) {
      const double merit = al_merit(w, &w->a, mu), noise = 10 * DBL_EPSILON * (fabs(merit) + fabs(w->a.cost) + 1);
      double step = 1;
      EACH(trial, e->halvings + 1) {
        EACH(t, T + 1) EACH(v, ZV) w->b.z[t].v[v] = w->a.z[t].v[v] + step * w->d[t].v[v];
        evaluate(w, e->x_init, &w->b);
        if (al_merit(w, &w->b, mu) <= merit + e->armijo * step * slope + noise) { took = 1; break; }
        step *= 0.5;
      }
      if (took) swap(w);
      e->decrement = (slope < 0 ? -slope : 0) / (1e-2 + fabs(w->a.cost));
    }
    e->steps++; inner++;
    reg = took ? (reg > 1e-3 ? 0.1 * reg : 0) : (10 * reg > 1e-2 ? 10 * reg : 1e-2);
    failures = took ? 0 : failures + 1;
    /* multipliers and penalty */
    const int flat = ok && e->decrement <= (e->optimality > DBL_EPSILON ? e->optimality : DBL_EPSILON);
    const int stuck = failures >= 8, spent = e->steps >= e->max_steps;
    if (!(flat || stuck || inner >= e->gn_steps || spent)) continue;
    vec gap = {0}, broken = {0};
    EACH(t, T + 1) {
      EACH(v, ZV) {
        gap = vmax(gap, vabs(w->a.c[t].v[v]));
        w->y[t].v[v] += mu * w->a.c[t].v[v];
      }
      for (int r = 0; r < rows_of(w, t); r += LANES) {
        const long at = (long)t * w->rows + r;
        const vec rho = load(w->rho_row + r), lam = load(w->lam + at), g = load(w->a.g + at);
        const vec v = vmin(vmax(lam + mu * g, zero), rho);
        gap = vmax(gap, choose(v >= rho, zero, vabs(v - lam) / mu));
        broken = vmax(broken, g);
        store(w->lam + at, v);
      }
    }
    const double violation = largest(gap);
    e->outer++; inner = 0;
    const int done = flat && violation <= e->feasibility;
    const int limit = !done && (e->outer >= e->iterations || spent);
    const int hopeless = mu >= e->mu_max && violation > e->feasibility && violation > 0.5 * last;
    const long status = done ? (largest(broken) > e->feasibility ? INFEASIBLE : CONVERGED)
                             : stuck ? SINGULAR : hopeless ? INFEASIBLE : LIMIT;
    if (violation > e->feasibility && violation > e->progress * last && !(done || limit))
      mu = mu * e->gamma < e->mu_max ? mu * e->gamma : e->mu_max;
    last = violation;
    if (done || limit || stuck) { leave(w, e, mu, status); return; }
  }
}

/* ---- interior point ---------------------------------------------------------------------------------------

   Rows g + s = 0 with s > 0 and multiplier z > 0, s z = mu. A soft row (exact l1 penalty rho) has g + s - t = 0
   with t > 0 and (rho - z) t = mu. Eliminating ds and dt,
     sigma = 1 / (s/z + t/(rho - z))    dz = sigma (g' d + g + mu/z - mu/(rho - z))
   leaves the LQR with weights sigma and multipliers z + dz(d = 0). Its pivots certify the inertia of the whole. */

/* largest step fraction a <= 1 with 1 + a r >= 1 - tau for all ratios */
static inline double fraction(double most, double tau) { return most > tau ? tau / most : 1.0; }

typedef struct { double infeasibility, price, logs; } Barrier;  /* l1 norm of residuals; rho' t; sum of log s, log t */

/* At p with slacks a step a along: a slack that is shorter than its row allows is set to what it allows, which lowers
   both the barrier and the infeasibility (h of a sphere is concave, so rows far away would add nothing but noise).
   New slacks go to w->snew; the logarithms are relative to the present slacks, taken of products of several ratios. */
static inline Barrier measure(Work *w, const Point *p, int soft, double a) {
  vec total = {0}, price = {0}, product = all(1);
  double logs = 0;
  int count = 0;
  EACH(t, w->T + 1) {
    EACH(v, ZV) total += vabs(p->c[t].v[v]);
    for (int r = 0; r < rows_of(w, t); r += LANES) {
      const long at = (long)t * w->rows + r;
      const vec s = load(w->slack + at), stretch = 1.0 + a * load(w->dslack + at);
      vec least = -load(p->g + at);
      if (soft) {
        const vec grown = 1.0 + a * load(w->dt + at), give = load(w->t + at) * grown;
        least += give;
        product *= grown;
        price += load(w->rho_row + r) * give;
      }
      const vec snew = vmax(s * stretch, least);
      product *= a == 0.0 ? all(1) : choose(snew > s * stretch, snew * load(w->by_s + at), stretch);
      store(w->snew + at, snew);
      total += vabs(snew - least);
      if (++count == 4) {
        double q = 1;
        EACH(l, LANES) q *= product[l];
        logs += log(q);
        product = all(1); count = 0;
      }
    }
  }
  double q = 1;
  EACH(l, LANES) q *= product[l];
  return (Barrier){sum(total), sum(price), logs + log(q)};
}

void solve_ip(void *work, Exchange *e) {
  Work *w = work;
  e->steps = e->outer = 0;
  if (!enter(w, e)) { e->status = NOT_FINITE; return; }
  const int T = w->T, soft = isfinite(e->elastic);
  rho_rows(w, e->elastic, 1e8);
  const double floor_mu = 0.1 * e->tolerance;
  double mu = e->mu_start, logs = 0, theta_max = 0, theta_min = 0;
  int filter = 0;
  Barrier now = {0};
  long status = LIMIT;
  EACH(i, N) lanes(&w->a.z[0])[i] = e->x_init[i];
  evaluate(w, e->x_init, &w->a);
  lambda_in(w, e);
  long count = 0;
  EACH(t, T + 1) {
    count += rows_of(w, t);
    for (int r = 0; r < rows_of(w, t); r += LANES) {
      const long at = (long)t * w->rows + r;
      const vec s = vmax(-load(w->a.g + at), all(e->slack_min));
      vec z = mu / s;
      if (soft) { z = vmin(z, 0.5 * load(w->rho_row + r)); store(w->t + at, mu / (load(w->rho_row + r) - z)); }
      store(w->slack + at, s); store(w->lam + at, z);
    }
  }
  EACH(t, T + 1) w->y[t] = (row){0};
  for (;;) {
    /* complementarity, and the next mu by LOQO's rule */
    vec total = {0}, least = all(INFINITY), most = {0}, violation = {0}, defect = {0}, gap = {0}, zmax = {0};
    EACH(t, T + 1) {
      EACH(v, ZV) { defect = vmax(defect, vabs(w->a.c[t].v[v])); }
      for (int r = 0; r < rows_of(w, t); r += LANES) {
        const long at = (long)t * w->rows + r;
        const vec z = load(w->lam + at), s = load(w->slack + at), g = load(w->a.g + at);
        vec product = s * z;
        total += product; least = vmin(least, product); most = vmax(most, product);
        vec residual = g + s;
        if (soft) {
          const vec give = load(w->t + at);
          product = give * (load(w->rho_row + r) - z);
          total += product; least = vmin(least, product); most = vmax(most, product);
          residual -= give;
        }
        gap = vmax(gap, vabs(residual)); violation = vmax(violation, g); zmax = vmax(zmax, z);
      }
    }
    const double average = sum(total) / ((soft + 1) * count);
    double low = INFINITY;
    EACH(l, LANES) if (least[l] < low) low = least[l];
    const double xi = low / average, spread = 0.05 * (1 - xi) / xi, s3 = spread < 2 ? spread : 2;
    if (e->steps) mu = fmax(0.1 * s3 * s3 * s3 * average, fmin(0.1 * average, pow(average, 1.5)));
    if (mu < floor_mu) mu = floor_mu;
    EACH(t, T + 1) for (int r = 0; r < rows_of(w, t); r += LANES) {
      const long at = (long)t * w->rows + r;
      const vec z = load(w->lam + at), s = load(w->slack + at);
      const vec by_z = 1.0 / z, by_s = 1.0 / s;
      vec toward = load(w->a.g + at) + mu * by_z, sigma = z * by_s;
      if (soft) {
        const vec by_rest = 1.0 / (load(w->rho_row + r) - z);
        toward -= mu * by_rest; sigma = 1.0 / (s * by_z + load(w->t + at) * by_rest);
      }
      store(w->by_z + at, by_z); store(w->by_s + at, by_s);
      store(w->w + at, sigma); store(w->v + at, z + sigma * toward);
    }
    stage_terms(w, &w->a, w->v, w->w, w->lam, 1.0);
    /* stationarity */
    vec dual = {0}, ymax = {0};
    EACH(t, T + 1) {
      row r = w->sd[t];
      if (t < T) EACH(k, N) axpy(&r, clanes(&w->y[t + 1])[k], &w->a.F[t * N + k]);
      EACH(v, ZV) { r.v[v] -= w->y[t].v[v]; dual = vmax(dual, vabs(r.v[v])); ymax = vmax(ymax, vabs(w->y[t].v[v])); }
    }
    e->decrement = largest(dual);
    const double residual = fmax(largest(defect), largest(gap));
    if (residual <= e->tolerance && largest(most) <= e->tolerance && e->decrement <= 100*e->tolerance * (1 + largest(ymax) * 0.01)) {
      status = soft && largest(violation) > e->feasibility ? INFEASIBLE : CONVERGED;
      break;
    }
    if (e->steps >= e->max_steps) break;
    /* step: all curvature where Gauss-Newton is slow, then that of the spheres, then none, until the pivots are positive */
    int curvature = e->steps >= e->exact_after ? 2 : 1;
    for (; curvature >= 0; curvature--) {
      if (curvature == 2) add_curvature(w, &w->a, w->y);
      else if (curvature == 0 || e->steps >= e->exact_after) stage_terms(w, &w->a, w->v, w->w, w->lam, curvature);
      if (riccati(w, w->a.F, w->a.c, 0.0, 0.0)) break;
      e->outer++;
    }
    if (curvature < 0) { status = SINGULAR; break; }
    vec shrink = {0}, fall = {0}, slope = {0}, largest_y = {0};
    EACH(t, T + 1) {
      const int kind = kind_of(w, t);
      EACH(v, ZV) {
        slope += w->weight[t].v[v] * (w->a.z[t].v[v] - w->ref[t].v[v]) * w->d[t].v[v];
        largest_y = vmax(largest_y, vabs(w->ynew[t].v[v]));
      }
      for (int r = 0; r < rows_of(w, t); r += LANES) {
        const long at = (long)t * w->rows + r;
        vec along = {0};
        if (r < ZP) along = w->up_on[kind].v[r / LANES] * w->d[t].v[r / LANES];
        else if (r < 2 * ZP) along = w->low_on[kind].v[r / LANES - ZV] * w->d[t].v[r / LANES - ZV];
        else {
          const int k = r - 2 * ZP;
          EACH(i, SPACE) along += (clanes(&w->a.z[t])[POSITION[i]] - load(w->center + (t * SPACE + i) * w->KP + k))
                                  * clanes(&w->d[t])[POSITION[i]];
          along *= -2.0 * load(w->inv + k);
        }
        const vec z = load(w->lam + at);
        const vec dz = load(w->v + at) - z + load(w->w + at) * along;
        const vec by_z = load(w->by_z + at), rs = (mu * load(w->by_s + at) - dz) * by_z - 1.0;
        slope -= mu * rs;
        shrink = vmax(shrink, -rs); fall = vmax(fall, -dz * by_z);
        if (soft) {
          const vec rest = load(w->rho_row + r) - z, give = load(w->t + at);
          const vec rt = (mu / rest + (give / rest) * dz) / give - 1.0;
          slope += (load(w->rho_row + r) * give - mu) * rt;
          shrink = vmax(shrink, -rt); fall = vmax(fall, dz / rest);
          store(w->dt + at, rt);
        }
        largest_y = vmax(largest_y, z + dz);
        store(w->dslack + at, rs); store(w->dlam + at, dz);
      }
    }
    const double tau = fmax(0.99, 1 - mu), primal = fraction(largest(shrink), tau), a_dual = fraction(largest(fall), tau);
    /* filter line search: the step must improve the barrier function or the infeasibility, and on all before */
    if (!e->steps) now = measure(w, &w->a, soft, 0.0);
    const double theta = now.infeasibility, down = sum(slope), cost = w->a.cost + now.price;
    const double phi = cost - mu * logs, noise = 10 * DBL_EPSILON * (fabs(phi) + 1);
    if (!e->steps) theta_max = 1e4 * fmax(1, theta), theta_min = 1e-4 * fmax(1, theta);
    double a = primal;
    int took = 0, ftype = 0;
    EACH(trial, e->halvings + 1) {
      EACH(t, T + 1) EACH(v, ZV) w->b.z[t].v[v] = w->a.z[t].v[v] + a * w->d[t].v[v];
      evaluate(w, e->x_init, &w->b);
      now = measure(w, &w->b, soft, a);
      const double value = w->b.cost + now.price - mu * (logs + now.logs);
      ftype = theta <= theta_min && down < 0 && a * pow(-down, 2.3) > pow(theta, 1.1);
      int good = now.infeasibility <= theta_max;
      if (ftype) good = good && value <= phi + 1e-4 * a * down + noise;
      else good = good && (now.infeasibility <= (1 - 1e-5) * theta || value <= phi - 1e-5 * theta + noise);
      EACH(i, filter) good = good && (now.infeasibility <= w->filter[i][0]
                                      || value <= w->filter[i][1] - mu * w->filter[i][2] + noise);
      if (good) { took = 1; break; }
      a *= 0.5;
    }
    if (!took) filter = 0;
    if (!ftype && filter < FILTER) {
      w->filter[filter][0] = (1 - 1e-5) * theta; w->filter[filter][1] = cost - 1e-5 * theta;
      w->filter[filter][2] = logs; filter++;
    }
    logs += now.logs;
    swap(w);
    double *slack = w->slack; w->slack = w->snew; w->snew = slack;
    EACH(t, T + 1) {
      EACH(v, ZV) w->y[t].v[v] += a * (w->ynew[t].v[v] - w->y[t].v[v]);
      for (int r = 0; r < rows_of(w, t); r += LANES) {
        const long at = (long)t * w->rows + r;
        store(w->lam + at, load(w->lam + at) + a_dual * load(w->dlam + at));
        if (soft) store(w->t + at, load(w->t + at) * (1.0 + a * load(w->dt + at)));
      }
    }
    e->steps++;
  }
  leave(w, e, mu, status);
}

/* ---- for the tests: defects (T+1, N) and dphi/d(x, u) (T, N, Z) at e->x, e->u --------------------------------- */

void linearize(void *work, const Exchange *e, double *defects, double *F) {
  Work *w = work;
  enter(w, e);
  evaluate(w, e->x_init, &w->a);
  EACH(t, w->T + 1) EACH(i, N) defects[t * N + i] = clanes(&w->a.c[t])[i];
  EACH(t, w->T) EACH(i, N) EACH(j, Z) F[(t * N + i) * Z + j] = clanes(&w->a.F[t * N + i])[j];
}
