/* A batch of instances, sample by sample, and the implicit gradient of the augmented Lagrangian's solutions.
   Stands after solver.c in one translation unit.

   At a solution tau* with multipliers lambda, eta the KKT matrix is that of a Gauss-Newton step, with D = 0 where the
   sample converged and D = I/mu where it did not (deqmpc.solvers.augmented_lagrangian, "Gradient"). For the gradient g
   of a loss with respect to tau*, K [v; y] = [g; 0], and the loss changes by

     -v' (d^2L/dtau dtheta) dtheta - y' (dk/dtheta) dtheta          theta: the fields of problem.Instances

   The factorisation is made anew in the backward pass: it costs less than to write it down and read it again.

   A solution of the interior point has multipliers of rows that are not active, too, small ones: those below the row's
   slack. A soft row has given way where its multiplier is nearer to rho than that. Its D is always 0. */

/* Filled by batch.py (class _Batch), same order. C-contiguous; the first dimension is the sample. */
typedef struct {
  long K, interior_point, exact;         /* exact: gradient with the curvature of dynamics and spheres */
  const double *x_init, *x_ref, *u_ref, *Q, *R, *Qf, *centers, *radii;
  double *x, *u, *lambda, *eta, *mu;     /* in: where to start, out: the result */
  long long *status, *steps;
  double *defect, *violation, *decrement, *cost;
  unsigned char *ok;                     /* whether the KKT matrix can be factored; NULL: not asked */
  const double *by_x, *by_u;             /* gradient of a loss with respect to x and u */
  double *by_x_init, *by_x_ref, *by_u_ref, *by_Q, *by_R, *by_Qf, *by_centers, *by_radii;   /* out; NULL: not asked */
} Batch;

/* Sample i of the batch, with the settings of `e`. */
static Exchange sample(const Exchange *e, const Batch *b, long i) {
  const long T = e->T, K = b->K, rows = T * (e->bounds + K);
  Exchange one = *e;
  one.K = K;
  one.x_init = b->x_init + i * N; one.x_ref = b->x_ref + i * (T + 1) * N; one.u_ref = b->u_ref + i * T * M;
  one.Q = b->Q + i * N; one.R = b->R + i * M; one.Qf = b->Qf + i * N;
  one.centers = b->centers + i * (T + 1) * K * SPACE; one.radii = b->radii + i * K;
  one.x = b->x + i * (T + 1) * N; one.u = b->u + i * T * M; one.lambda = b->lambda + i * rows;
  one.eta = b->eta + i * (T + 1) * N; one.mu = b->mu + i;
  return one;
}

static void fill(double *p, long count, double value) { for (long i = 0; i < count; i++) p[i] = value; }

static void no_solution(Exchange *e) {
  e->status = NOT_FINITE; e->steps = 0;
  e->defect = e->violation = e->decrement = e->cost = NAN;
  fill(e->x, (e->T + 1) * N, NAN); fill(e->u, e->T * M, NAN); fill(e->eta, (e->T + 1) * N, NAN);
  fill(e->lambda, e->T * (e->bounds + e->K), NAN); *e->mu = NAN;
}

/* v (w->d) and y (w->ynew) for the right-hand side -g in w->b.z, at the point w->a with multipliers w->lam, w->y.
   0 where the matrix is not that of a minimum. */
static int implicit_step(Work *w, const Exchange *e, int interior_point, int converged, double mu, int exact) {
  converged = converged || interior_point;
  const vec zero = all(0);
  const double stiff = converged && mu < 1e8 ? 1e8 : mu;   /* an active row holds as an equation to first order */
  rho_rows(w, e->elastic, INFINITY);
  EACH(t, w->T + 1) for (int r = 0; r < rows_of(w, t); r += LANES) {
    const long at = (long)t * w->rows + r;
    const vec lam = load(w->lam + at), g = interior_point ? load(w->a.g + at) : zero;
    store(w->w + at, (vec)((mask)all(stiff) & (lam > vmax(-g, zero)) & (load(w->rho_row + r) - lam > vmax(g, zero))));
  }
  memset(w->cc, 0, sizeof(row) * (w->T + 1));
  /* a saddle has no derivative of its minimiser; Gauss-Newton's matrix still gives a descent direction */
  for (; exact >= 0; exact--) {
    stage_terms(w, &w->a, w->lam, w->w, w->lam, exact);
    if (exact) add_curvature(w, &w->a, w->y);
    memcpy(w->s, w->b.z, sizeof(row) * (w->T + 1));
    if (riccati(w, w->a.F, w->cc, converged ? 0.0 : 1.0 / mu, 0.0)) return 1;
  }
  return 0;
}

/* Whether the KKT matrix at the solution that `w` has just found can be factored. */
static int has_gradient(Work *w, const Exchange *e, int interior_point, int exact) {
  memset(w->b.z, 0, sizeof(row) * (w->T + 1));
  if (!implicit_step(w, e, interior_point, e->status == CONVERGED, *e->mu, exact)) return 0;
  vec total = {0};
  EACH(t, w->T + 1) EACH(v, ZV) total += 0.0 * (w->d[t].v[v] + w->ynew[t].v[v]);
  return sum(total) == 0.0;
}

/* Samples first .. last - 1. A sample that is not finite gets NaN. */
void solve_batch(void *work, const Exchange *e, const Batch *b, long first, long last) {
  for (long i = first; i < last; i++) {
    Exchange one = sample(e, b, i);
    one.status = NOT_FINITE;
    if (all_finite(one.Q, N) && all_finite(one.R, M) && all_finite(one.Qf, N)) {
      set_weights(work, &one);
      (b->interior_point ? solve_ip : solve_al)(work, &one);
    }
    if (one.status == NOT_FINITE) no_solution(&one);
    b->status[i] = one.status; b->steps[i] = one.steps;
    b->defect[i] = one.defect; b->violation[i] = one.violation;
    b->decrement[i] = one.decrement; b->cost[i] = one.cost;
    if (b->ok) b->ok[i] = one.status != NOT_FINITE && has_gradient(work, &one, b->interior_point, b->exact);
  }
}

/* ---- gradients with respect to the fields of one instance, from v = w->d and y = w->ynew ---------------------- */

static void pull_back_tracking(const Work *w, const Batch *b, long sample) {
  const int T = w->T;
  EACH(t, T + 1) {
    const double *v = clanes(&w->d[t]), *weight = clanes(&w->weight[t]);
    const double *z = clanes(&w->a.z[t]), *ref = clanes(&w->ref[t]);
    double *by_Q = t < T ? b->by_Q : b->by_Qf;
    EACH(i, N) {
      if (b->by_x_ref) b->by_x_ref[(sample * (T + 1) + t) * N + i] = weight[i] * v[i];
      if (by_Q) by_Q[sample * N + i] -= (z[i] - ref[i]) * v[i];
    }
    if (t < T) EACH(j, M) {
      if (b->by_u_ref) b->by_u_ref[(sample * T + t) * M + j] = weight[N + j] * v[N + j];
      if (b->by_R) b->by_R[sample * M + j] -= (z[N + j] - ref[N + j]) * v[N + j];
    }
  }
  if (b->by_x_init) EACH(i, N) b->by_x_init[sample * N + i] = -clanes(&w->ynew[0])[i];
}

/* h = r/2 - |p - o|^2 / (2 r):  dh/dp = -(p - o)/r = -dh/do,  dh/dr = 1/2 + |p - o|^2 / (2 r^2),
   d(dh/dp)/dr = (p - o)/r^2; knot 0 has no spheres. */
static void pull_back_spheres(const Work *w, const Batch *b, long sample) {
  const int T = w->T, K = w->K;
  for (int t = 1; t <= T; t++) EACH(k, K) {
    const long at = (long)t * w->rows + 2 * ZP + k;
    const double a = w->w[at], lam = w->lam[at], per_r = 2.0 * w->inv[k];
    double slope[SPACE], along = 0, squared = 0;
    EACH(i, SPACE) {
      const double offset = clanes(&w->a.z[t])[POSITION[i]] - w->center[(t * SPACE + i) * w->KP + k];
      slope[i] = -per_r * offset;
      along += slope[i] * clanes(&w->d[t])[POSITION[i]];
      squared += offset * offset;
    }
    if (b->by_centers) EACH(i, SPACE) b->by_centers[((sample * (T + 1) + t) * K + k) * SPACE + i] =
      a * along * slope[i] - per_r * lam * clanes(&w->d[t])[POSITION[i]];
    if (b->by_radii) b->by_radii[sample * K + k] -= along * (a * (0.5 + 0.5 * squared * per_r * per_r) - lam * per_r);
  }
}

/* Gradients of samples first .. last - 1 from b->by_x and b->by_u; those of samples that are not ok stay as they are:
   the caller clears the memory. */
void pull_back(void *work, const Exchange *e, const Batch *b, long first, long last) {
  Work *w = work;
  const int T = w->T;
  for (long s = first; s < last; s++) {
    Exchange one = sample(e, b, s);
    if (!b->ok[s] || !enter(w, &one)) continue;
    set_weights(w, &one);
    lambda_in(w, &one);
    evaluate(w, one.x_init, &w->a);
    memset(w->b.z, 0, sizeof(row) * (T + 1));
    EACH(t, T + 1) {
      EACH(i, N) lanes(&w->b.z[t])[i] = -b->by_x[(s * (T + 1) + t) * N + i];
      if (t < T) EACH(j, M) lanes(&w->b.z[t])[N + j] = -b->by_u[(s * T + t) * M + j];
    }
    if (!implicit_step(w, &one, b->interior_point, b->status[s] == CONVERGED, *one.mu, b->exact)) continue;
    pull_back_tracking(w, b, s);
    if (b->by_centers || b->by_radii) pull_back_spheres(w, b, s);
  }
}
