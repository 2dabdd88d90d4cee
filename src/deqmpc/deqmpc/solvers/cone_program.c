/* Algorithm 1 of deqmpc.solvers.cone_program, sample by sample. Stands after the generated text of one program, which
   defines W (unknowns), P (parameters), MARGINS and

     start(theta, out)  residual(w, theta, mu, out)  margins(w, out)  jacobian_w(w, theta, out)
     jacobian_theta(w, theta, out)            out is row-major and cleared by the caller */
#include <string.h>

enum { CONVERGED = 0, STEP_LIMIT = 1, SINGULAR = 3, NOT_FINITE = 4 };   /* indices into STATUS */

static double norm(const double *r) {
  double sum = 0.0;
  for (int i = 0; i < W; i++) sum += r[i] * r[i];
  return sqrt(sum);
}

static int is_finite(const double *v, int count) {
  for (int i = 0; i < count; i++) if (!isfinite(v[i])) return 0;
  return 1;
}

static int inside(const double *w) {
  double m[MARGINS + 1];
  margins(w, m);
  for (int i = 0; i < MARGINS; i++) if (!(m[i] > 0.0)) return 0;
  return 1;
}

/* LU factors of J in place, rows exchanged as `pivot` says. 0 where J is singular or not finite. */
static int factor(double (*J)[W], int *pivot) {
  for (int k = 0; k < W; k++) {
    int p = k;
    for (int i = k + 1; i < W; i++) if (fabs(J[i][k]) > fabs(J[p][k])) p = i;
    if (!(fabs(J[p][k]) > 0.0) || !isfinite(J[p][k])) return 0;
    pivot[k] = p;
    if (p != k) for (int j = 0; j < W; j++) { double t = J[k][j]; J[k][j] = J[p][j]; J[p][j] = t; }
    const double inverse = 1.0 / J[k][k];
    for (int i = k + 1; i < W; i++) {
      if (J[i][k] == 0.0) continue;   /* most entries are zero */
      const double l = J[i][k] *= inverse;
      for (int j = k + 1; j < W; j++) J[i][j] -= l * J[k][j];
    }
  }
  return 1;
}

static void back_substitute(double (*J)[W], const int *pivot, double *b) {
  for (int k = 0; k < W; k++) { double t = b[k]; b[k] = b[pivot[k]]; b[pivot[k]] = t; }
  for (int i = 0; i < W; i++) for (int j = 0; j < i; j++) b[i] -= J[i][j] * b[j];
  for (int i = W - 1; i >= 0; i--) {
    for (int j = i + 1; j < W; j++) b[i] -= J[i][j] * b[j];
    b[i] /= J[i][i];
  }
}

/* Newton steps from w to |r(w; theta, mu)| < tolerance. Returns a status. */
static int newton(double *w, const double *theta, double mu, double tolerance, long max_steps, long halvings,
                  long long *steps, double *length) {
  double r[W], J[W][W], trial[W];
  int pivot[W];
  memset(r, 0, sizeof r);
  residual(w, theta, &mu, r);
  for (*length = norm(r); !(*length < tolerance); (*steps)++) {
    if (*steps >= max_steps) return STEP_LIMIT;
    memset(J, 0, sizeof J);
    jacobian_w(w, theta, &J[0][0]);
    if (!factor(J, pivot)) return SINGULAR;
    double D[W];
    memcpy(D, r, sizeof D);
    back_substitute(J, pivot, D);
    double alpha = 1.0, next = 0.0;
    int found = 0;
    for (long k = 0; k < halvings && !found; k++, alpha *= 0.5) {
      for (int i = 0; i < W; i++) trial[i] = w[i] - alpha * D[i];
      if (!inside(trial)) continue;
      memset(r, 0, sizeof r);
      residual(trial, theta, &mu, r);
      next = norm(r);
      found = next < *length;
    }
    if (!found) return SINGULAR;
    memcpy(w, trial, sizeof trial);
    *length = next;
  }
  return CONVERGED;
}

/* B paths over L falling parameters, from w_start (B, W) or, where that is NULL, from start(theta). w_out (B, L, W) is
   NaN from the first mu on that was not reached. */
void solve_paths(const double *theta, const double *w_start, long B, const double *mu, long L, double tolerance,
                 long max_steps, long halvings, double *w_out, long long *status, long long *steps, double *length) {
  for (long b = 0; b < B; b++, theta += P) {
    double w[W];
    memset(w, 0, sizeof w);
    if (w_start) memcpy(w, w_start + b * W, sizeof w); else start(theta, w);
    status[b] = is_finite(theta, P) && is_finite(w, W) ? CONVERGED : NOT_FINITE;
    steps[b] = 0;
    length[b] = NAN;
    for (long l = 0; l < L; l++, w_out += W) {
      if (status[b] == CONVERGED)
        status[b] = newton(w, theta, mu[l], tolerance, max_steps, halvings, steps + b, length + b);
      for (int i = 0; i < W; i++) w_out[i] = status[b] == CONVERGED ? w[i] : NAN;
    }
  }
}

/* dw/dtheta (B, W, P) = -(dr/dw)^-1 dr/dtheta at w (B, W); NaN where dr/dw is singular. */
void sensitivities(const double *w, const double *theta, long B, double *out) {
  for (long b = 0; b < B; b++, w += W, theta += P, out += W * P) {
    double J[W][W], by_theta[W * P + 1], column[W];
    int pivot[W];
    memset(J, 0, sizeof J);
    memset(by_theta, 0, sizeof by_theta);
    jacobian_w(w, theta, &J[0][0]);
    jacobian_theta(w, theta, by_theta);
    const int ok = is_finite(w, W) && factor(J, pivot);
    for (int p = 0; p < P; p++) {
      for (int i = 0; i < W; i++) column[i] = -by_theta[i * P + p];
      if (ok) back_substitute(J, pivot, column);
      for (int i = 0; i < W; i++) out[i * P + p] = ok ? column[i] : NAN;
    }
  }
}
