/* The network of temporal.py for one sample, without allocation: same letters, same order, float32.

Compiled for one set of sizes: T knots, NX numbers in a state, H hidden channels, INNER channels inside a cell or
block, GROUPS, BLOCKS of the NN (0: equilibrium model), MEMORY of Anderson's iteration, SPHERES (width of the set
encoder, 0: none), SPACE (numbers of a centre), POSITIONS, DELTA, and HALF: the convolutions' weights are float16.
Sums are float32 in each case.

Activations are rows of channels, one row a knot. Weights of a convolution are packed as
[output block][input channel][tap][channel in block], so that they are read once and in order; the sums of one output
block at all knots stay in registers meanwhile. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16 /* floats in a vector */
#define WIDE (H % 64 == 0 ? 4 : H % 32 == 0 ? 2 : 1) /* vectors in an output block: with KNOTS sums each, and */
#define KNOTS 6                                       /* the weights of one tap, they fill the 32 registers */
#else
#define LANES 8
#define WIDE 2
#define KNOTS 5
#ifdef __F16C__
#include <immintrin.h>
#endif
#endif
#define PASSES ((T + KNOTS - 1) / KNOTS)
#define PASS ((T + PASSES - 1) / PASSES) /* knots in one pass */
#define EPS 1e-5f                        /* of torch's norms */

typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec splat(float a) { return a - (vec){0}; }

#if HALF
typedef uint16_t weight;
static inline vec load_weights(const weight *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vec v;
    const _Float16 *q = (const _Float16 *)p;
    for (int i = 0; i < LANES; i++) v[i] = (float)q[i];
    return v;
#endif
}
#else
typedef float weight;
static inline vec load_weights(const weight *p) { return load(p); }
#endif

typedef struct { const weight *w; const float *bias; } convolution;
typedef struct { const float *gain, *bias; } norm;
typedef struct { const float *w, *bias; norm ln; } encoder; /* w [input][output] */

int output_block(void) { return WIDE * LANES; }

/* Convolution of x [T][in] to y [T][out], knots first..first+count-1 of one output block */
static inline __attribute__((always_inline)) void convolve_pass(const weight *w, const float *bias,
        const float *x, int in, float *y, int out, const int first, const int count) {
    vec sum[PASS][WIDE];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < WIDE; v++) sum[t][v] = (vec){0};
    for (int i = 0; i < in; i++) {
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) {
            vec wk[WIDE];
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; v++) wk[v] = load_weights(w + v * LANES);
            w += WIDE * LANES;
#pragma GCC unroll 16
            for (int t = 0; t < count; t++) {
                const int from = first + t + k - 1;
                if (from < 0 || from >= T) continue; /* zero padding */
                const vec a = splat(x[from * in + i]);
#pragma GCC unroll 8
                for (int v = 0; v < WIDE; v++) sum[t][v] += wk[v] * a;
            }
        }
    }
    for (int t = 0; t < count; t++)
        for (int v = 0; v < WIDE; v++)
            store(y + (first + t) * out + v * LANES, sum[t][v] + load(bias + v * LANES));
}

static void convolve(const convolution *c, const float *x, int in, float *y, int out) {
    const int block = WIDE * LANES;
    for (int o = 0; o < out; o += block) {
        const weight *w = c->w + (long)o * in * 3;
#pragma GCC unroll 64
        for (int p = 0; p < PASSES; p++)
            convolve_pass(w, c->bias + o, x, in, y + o, out, p * PASS,
                          (p + 1) * PASS <= T ? PASS : T - p * PASS);
    }
}

/* sum of a_i b_i, with the sums of 64 lanes kept apart */
static float dot(const float *a, const float *b, long n) {
    float part[64] = {0}, total = 0;
    long i = 0;
    for (; i + 64 <= n; i += 64)
        for (int l = 0; l < 64; l++) part[l] += a[i + l] * b[i + l];
    for (; i < n; i++) total += a[i] * b[i];
    for (int width = 32; width; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
    return total + part[0];
}

static float sum_of(const float *a, int n) {
    float part[16] = {0}, total = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += a[i + l];
    for (; i < n; i++) total += a[i];
    for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
    return total + part[0];
}

static float spread(const float *a, int n, float mean) { /* sum of (a_i - mean)^2 */
    float part[16] = {0}, total = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += (a[i + l] - mean) * (a[i + l] - mean);
    for (; i < n; i++) total += (a[i] - mean) * (a[i] - mean);
    for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
    return total + part[0];
}

/* GroupNorm of x [rows][channels] in place, with a ReLU after it where asked for */
static void normalize(const norm *g, float *x, int rows, int channels, int groups, int relu) {
    const int width = channels / groups;
    for (int i = 0; i < groups; i++) {
        float mean = 0, variance = 0;
        for (int t = 0; t < rows; t++) mean += sum_of(x + t * channels + i * width, width);
        mean /= (float)(rows * width);
        for (int t = 0; t < rows; t++) variance += spread(x + t * channels + i * width, width, mean);
        const float by = 1.0f / sqrtf(variance / (float)(rows * width) + EPS);
        const float *gain = g->gain + i * width, *bias = g->bias + i * width;
        for (int t = 0; t < rows; t++) {
            float *v = x + t * channels + i * width;
            for (int c = 0; c < width; c++) {
                const float a = (v[c] - mean) * by * gain[c] + bias[c];
                v[c] = relu && a < 0.0f ? 0.0f : a;
            }
        }
    }
}

static void rectify(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
}

static void encode(const encoder *e, const float *in, int inputs, float *out, int width) {
    memcpy(out, e->bias, sizeof(float) * width);
    for (int i = 0; i < inputs; i++) {
        const float a = in[i], *w = e->w + (long)i * width;
        for (int c = 0; c < width; c++) out[c] += a * w[c];
    }
    normalize(&e->ln, out, 1, width, 1, 1);
}

typedef struct {
    encoder node, start;
    const float *time, *scale; /* [T][H], 1 / state scale [NX] */
    convolution injection;
    norm injection_norm;
#if BLOCKS == 0
    convolution first, second;
    norm first_norm, second_norm, last_norm;
#else
    struct { convolution first; norm first_norm; convolution second; norm second_norm; } blocks[BLOCKS];
#endif
    convolution head_in;
    norm head_norm;
    const float *head_w, *head_bias; /* [NX][H] */
#if SPHERES
    encoder sphere;
    const float *sphere_w, *sphere_bias; /* [SPHERES][H] */
#endif
} network;

typedef struct { double damping, tolerance, regularization; long evaluations; } anderson;

#define SIZE (T * H)
typedef struct {
    float e[SIZE], c[SIZE], z[SIZE], out[SIZE], y[T * INNER];
#if BLOCKS == 0
    float g[SIZE], best[SIZE], Z[MEMORY][SIZE], G[MEMORY][SIZE];
#endif
} workspace;

long workspace_size(void) { return sizeof(workspace); }

#if SPHERES
static void add_spheres(const network *n, const float *p, const double *centers, const double *radii, long K,
                        float *e) {
    float code[SPHERES], most[SPHERES] = {0}, in[SPACE + 2];
    for (long j = 0; j < K; j++) {
        if (!(radii[j] > 0.0)) continue;
        float squared = 0;
        for (int d = 0; d < SPACE; d++) {
            in[d] = (float)centers[j * SPACE + d] - p[d];
            squared += in[d] * in[d];
        }
        const float r = (float)radii[j];
        in[SPACE] = sqrtf(squared > 1e-12f ? squared : 1e-12f) - r;
        in[SPACE + 1] = r;
        encode(&n->sphere, in, SPACE + 2, code, SPHERES);
        for (int i = 0; i < SPHERES; i++) most[i] = code[i] > most[i] ? code[i] : most[i];
    }
    for (int c = 0; c < H; c++) e[c] += n->sphere_bias[c];
    for (int i = 0; i < SPHERES; i++)
        if (most[i] > 0.0f)
            for (int c = 0; c < H; c++) e[c] += most[i] * n->sphere_w[(long)i * H + c];
}
#endif

static void inject(const network *n, const double *x_init, const double *tau, const double *centers,
                   const double *radii, long K, workspace *w) {
    float start[H], in[NX];
    for (int i = 0; i < NX; i++) in[i] = (float)x_init[i] * n->scale[i];
    encode(&n->start, in, NX, start, H);
    for (int t = 0; t < T; t++) {
        const double *s = tau + (t + 1) * NX;
        float *e = w->e + t * H;
        for (int i = 0; i < NX; i++) in[i] = (float)s[i] * n->scale[i];
        encode(&n->node, in, NX, e, H);
        for (int c = 0; c < H; c++) e[c] += start[c] + n->time[t * H + c];
#if SPHERES
        float p[SPACE];
        for (int d = 0; d < SPACE; d++) p[d] = (float)s[d];
        add_spheres(n, p, centers + (t + 1) * K * SPACE, radii, K, e);
#endif
    }
    convolve(&n->injection, w->e, H, w->c, H);
    normalize(&n->injection_norm, w->c, T, H, GROUPS, 0);
}

#if BLOCKS == 0
static void cell(const network *n, workspace *w, const float *z, float *out) { /* out = d(z, c) */
    convolve(&n->first, z, H, w->y, INNER);
    rectify(w->y, T * INNER);
    normalize(&n->first_norm, w->y, T, INNER, GROUPS, 0);
    convolve(&n->second, w->y, INNER, out, H);
    for (int i = 0; i < SIZE; i++) out[i] += w->c[i];
    normalize(&n->second_norm, out, T, H, GROUPS, 0);
    for (int i = 0; i < SIZE; i++) out[i] = out[i] + z[i] < 0.0f ? 0.0f : out[i] + z[i];
    normalize(&n->last_norm, out, T, H, GROUPS, 0);
}

/* a of the mix from the inner products of the residuals; all weight on the newest where they cannot be factorised */
static void mix(double gram[MEMORY][MEMORY], int k, int newest, double regularization, double *a) {
    double L[MEMORY][MEMORY], by[MEMORY], b[MEMORY], total = 0;
    int usable = 1;
    for (int i = 0; i < k; i++) by[i] = 1.0 / sqrt(gram[i][i] > 1e-300 ? gram[i][i] : 1e-300);
    for (int i = 0; i < k && usable; i++)
        for (int j = 0; j <= i; j++) {
            double s = by[i] * gram[i][j] * by[j] + (i == j ? regularization : 0.0);
            for (int l = 0; l < j; l++) s -= L[i][l] * L[j][l];
            if (i == j) usable &= s > 0.0;
            L[i][j] = i == j ? sqrt(s) : s / L[j][j];
        }
    for (int i = 0; i < k; i++) {
        b[i] = by[i];
        for (int l = 0; l < i; l++) b[i] -= L[i][l] * b[l];
        b[i] /= L[i][i];
    }
    for (int i = k - 1; i >= 0; i--) {
        for (int l = i + 1; l < k; l++) b[i] -= L[l][i] * b[l];
        b[i] /= L[i][i];
    }
    for (int i = 0; i < k; i++) total += a[i] = by[i] * b[i];
    if (!usable || !isfinite(total)) {
        for (int i = 0; i < k; i++) a[i] = i == newest;
        total = 1.0;
    }
    for (int i = 0; i < k; i++) a[i] /= total;
}

/* deqmpc.solvers.anderson for one sample, from w->z; the best f(z) goes to w->z. Returns the evaluations. */
static long fixed_point(const network *n, const anderson *s, workspace *w, double *least, int *finite) {
    double gram[MEMORY][MEMORY] = {{0}}, a[MEMORY];
    float *now = w->z;
    *least = INFINITY;
    *finite = 1;
    memcpy(w->best, w->z, sizeof w->best);
    for (long k = 0;; k++) {
        float *const out = w->out;
        cell(n, w, now, out);
        for (int i = 0; i < SIZE; i++) w->g[i] = out[i] - now[i];
        const float size = sqrtf(dot(out, out, SIZE)), error = sqrtf(dot(w->g, w->g, SIZE));
        const double residual = error / (size > 1.1754944e-38f ? size : 1.1754944e-38f);
        *finite = isfinite(residual);
        if (*finite && residual < *least) {
            *least = residual;
            memcpy(w->best, out, sizeof w->best);
        }
        if (!*finite || residual <= s->tolerance || k + 1 == s->evaluations) {
            memcpy(w->z, w->best, sizeof w->z);
            return k + 1;
        }
        const int slot = k % MEMORY, filled = k + 1 < MEMORY ? k + 1 : MEMORY;
        memcpy(w->Z[slot], now, sizeof w->z);
        memcpy(w->G[slot], w->g, sizeof w->z);
        for (int j = 0; j < filled; j++) gram[slot][j] = gram[j][slot] = dot(w->G[j], w->g, SIZE);
        if (k == 0) {
            memcpy(now, out, sizeof w->z);
            continue;
        }
        mix(gram, filled, slot, s->regularization, a);
        memset(now, 0, sizeof w->z);
        for (int j = 0; j < filled; j++) {
            const float r = (float)a[j], f = (float)(s->damping * a[j]);
            for (int i = 0; i < SIZE; i++) now[i] += r * w->Z[j][i] + f * w->G[j][i];
        }
    }
}
#endif

/* theta [T+1][NX] from x_init [NX], tau [T+1][NX], K spheres (centers [T+1][K][SPACE], radii [K]) and, where `warm`,
   the equilibrium z [T][H], which is replaced. report: evaluations, residual, 1 where finite. */
void predict(const network *n, const anderson *s, workspace *w, double dt, const double *x_init, const double *tau,
             const double *centers, const double *radii, long K, float *z, long warm, double *theta, double *report) {
    inject(n, x_init, tau, centers, radii, K, w);
    report[0] = report[1] = 0.0;
    report[2] = 1.0;
#if BLOCKS == 0
    int finite;
    memcpy(w->z, warm ? z : w->c, sizeof w->z);
    if (!warm) rectify(w->z, SIZE);
    report[0] = (double)fixed_point(n, s, w, &report[1], &finite);
    report[2] = finite;
    memcpy(z, w->z, sizeof w->z);
#else
    memcpy(w->z, w->c, sizeof w->z);
    rectify(w->z, SIZE);
    for (int b = 0; b < BLOCKS; b++) {
        convolve(&n->blocks[b].first, w->z, H, w->y, INNER);
        normalize(&n->blocks[b].first_norm, w->y, T, INNER, GROUPS, 1);
        convolve(&n->blocks[b].second, w->y, INNER, w->out, H);
        normalize(&n->blocks[b].second_norm, w->out, T, H, GROUPS, 0);
        for (int i = 0; i < SIZE; i++) w->z[i] += w->out[i];
        rectify(w->z, SIZE);
    }
#endif
    convolve(&n->head_in, w->z, H, w->out, H);
    normalize(&n->head_norm, w->out, T, H, GROUPS, 1);
    memcpy(theta, x_init, sizeof(double) * NX);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < NX; i++) {
            const double out = dot(n->head_w + (long)i * H, w->out + t * H, H) + n->head_bias[i];
            const double value = i < POSITIONS ? x_init[i] + dt * out : out + (DELTA ? x_init[i] : 0.0);
            theta[(t + 1) * NX + i] = value;
            if (!isfinite(value)) report[2] = 0.0;
        }
}

/* `count` samples, one after the other, without spheres: predict for x_init [count][NX], tau [count][T+1][NX], z
   [count][T][H], theta [count][T+1][NX] */
void predict_many(const network *n, const anderson *s, workspace *w, double dt, long count, const double *x_init,
                  const double *tau, float *z, long warm, double *theta) {
    double report[3];
    for (long i = 0; i < count; i++)
        predict(n, s, w, dt, x_init + i * NX, tau + i * (T + 1) * NX, 0, 0, 0, z + i * SIZE, warm,
                theta + i * (T + 1) * NX, report);
}
