/* first + D first and its gradients, the arithmetic of product.py, for kernels in plain contiguous memory: `groups`
   groups of `rows` output channels, each of `channels` input channels, each of k <= LANES kernel positions.

   What they cost is the memory that has to be read and written. Rows of k = 9 numbers fill neither a vector register
   nor a cache line, so loads and stores take LANES numbers from where a row begins; what lies beyond it is ignored, or
   overwritten by the next row. hatch_build.py compiles a library for each REAL (float, double) and each WIDTH (the
   bytes of a processor's vectors). */

#include <immintrin.h>
#include <stddef.h>

enum { LANES = 16, WIDE = WIDTH / sizeof(REAL), PARTS = LANES / WIDE, ROWS = 8 / PARTS };
typedef ptrdiff_t size;
typedef REAL vector __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE size smaller(size a, size b) { return a < b ? a : b; }
INLINE vector load(const REAL *from) { return *(const vector *)from; }
INLINE void store(REAL *to, vector x) { *(vector *)to = x; }

/* One input channel in `rows` rows, n numbers apart: out = w + sum_s w[s] matrix[s], the first `numbers` of it. */
INLINE void add_product(const REAL *w, const REAL *matrix, REAL *out, size n, size rows, size k, size numbers) {
  vector sum[ROWS][PARTS];
  for (size r = 0; r < rows; r++)
    for (size i = 0; i < PARTS; i++) sum[r][i] = load(w + r * n + i * WIDE);
  for (size s = 0; s < k; s++)
    for (size i = 0; i < PARTS; i++) {
      vector d = load(matrix + s * k + i * WIDE);
      for (size r = 0; r < rows; r++) sum[r][i] += w[r * n + s] * d;
    }
  for (size r = 0; r < rows; r++) {
    REAL all[LANES], *to = numbers == LANES ? out + r * n : all;
    for (size i = 0; i < PARTS; i++) store(to + i * WIDE, sum[r][i]);
    for (size p = 0; numbers < LANES && p < numbers; p++) out[r * n + p] = all[p];
  }
}

/* The same for all rows where LANES numbers would reach beyond a row's end. */
INLINE void add_product_at_end(const REAL *w, const REAL *matrix, REAL *out, size n, size rows, size k) {
  for (size r = 0; r < rows; r++)
    for (size p = 0; p < k; p++) {
      REAL sum = w[r * n + p];
      for (size s = 0; s < k; s++) sum += w[r * n + s] * matrix[s * k + p];
      out[r * n + p] = sum;
    }
}

INLINE void compose_rows(const REAL *w, const REAL *transposed, REAL *out, size channels, size rows, size k) {
  size n = channels * k, c = 0;
  for (; c * k + LANES <= n; c++) add_product(w + c * k, transposed + c * k * k, out + c * k, n, rows, k, LANES);
  for (; c < channels; c++) add_product_at_end(w + c * k, transposed + c * k * k, out + c * k, n, rows, k);
}

/* out[o, c, p] = w[o, c, p] + sum_s D[c, p, s] w[o, c, s]. `transposed` is room for D[c, s, p]. */
void compose(const REAL *w, const REAL *d, REAL *out, REAL *transposed, size groups, size rows, size channels, size k,
             int threads) {
  size blocks = (rows + ROWS - 1) / ROWS, n = channels * k;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (size c = 0; c < groups * channels; c++)
      for (size s = 0; s < k; s++)
        for (size p = 0; p < k; p++) transposed[(c * k + s) * k + p] = d[(c * k + p) * k + s];
#pragma omp for
    for (size b = 0; b < groups * blocks; b++) {
      size group = b / blocks, first = b % blocks * ROWS, some = smaller(ROWS, rows - first);
      size at = (group * rows + first) * n;
      const REAL *own = transposed + group * n * k;
      if (some < ROWS)
        for (size r = 0; r < some; r++) compose_rows(w + at + r * n, own, out + at + r * n, channels, 1, k);
      else if (k == 9) compose_rows(w + at, own, out + at, channels, ROWS, 9);
      else compose_rows(w + at, own, out + at, channels, ROWS, k);
    }
  }
}

/* One input channel in `rows` rows, n numbers apart: sums[p] += g[p] w. */
INLINE void add_outer(const REAL *g, const REAL *w, REAL *sums, size n, size rows, size k) {
  for (size i = 0; i < PARTS; i++) {
    vector sum[LANES];
    for (size p = 0; p < k; p++) sum[p] = load(sums + p * LANES + i * WIDE);
    for (size r = 0; r < rows; r++) {
      vector x = load(w + r * n + i * WIDE);
      for (size p = 0; p < k; p++) sum[p] += g[r * n + p] * x;
    }
    for (size p = 0; p < k; p++) store(sums + p * LANES + i * WIDE, sum[p]);
  }
}

INLINE void add_outer_at_end(const REAL *g, const REAL *w, REAL *sums, size n, size rows, size k) {
  for (size r = 0; r < rows; r++)
    for (size p = 0; p < k; p++)
      for (size s = 0; s < k; s++) sums[p * LANES + s] += g[r * n + p] * w[r * n + s];
}

/* Of the channels from `first` to `last`. */
INLINE void differentiate_range(const REAL *g, const REAL *w, const REAL *d, REAL *for_w, REAL *for_d, REAL *sums, size n,
                                size rows, size first, size last, size k) {
  for (size i = first * k * LANES; i < last * k * LANES; i++) sums[i] = 0;
  for (size r = 0; r < rows; r += ROWS)
    for (size c = first; c < last; c++) {
      size at = r * n + c * k, some = smaller(ROWS, rows - r);
      const REAL *matrix = d + c * k * k;
      REAL *own = sums + c * k * LANES;
      if (c * k + LANES > n) {
        add_outer_at_end(g + at, w + at, own, n, some, k);
        add_product_at_end(g + at, matrix, for_w + at, n, some, k);
      } else if (some < ROWS || c * k + LANES > last * k) { /* beyond `last` it may be another thread's */
        add_outer(g + at, w + at, own, n, some, k);
        add_product(g + at, matrix, for_w + at, n, some, k, k);
      } else {
        add_outer(g + at, w + at, own, n, ROWS, k);
        add_product(g + at, matrix, for_w + at, n, ROWS, k, LANES);
      }
    }
  for (size i = first * k; i < last * k; i++)
    for (size s = 0; s < k; s++) for_d[i * k + s] = sums[i * LANES + s];
}

/* for_w[o, c, s] = g[o, c, s] + sum_p D[c, p, s] g[o, c, p],  for_d[c, p, s] = sum_o g[o, c, p] w[o, c, s]. `sums` is
   room for (groups * channels, k, LANES) numbers. A thread has channels to itself, so their number changes no sum. */
void differentiate(const REAL *g, const REAL *w, const REAL *d, REAL *for_w, REAL *for_d, REAL *sums, size groups,
                   size rows, size channels, size k, int threads) {
  size ranges = smaller((threads + groups - 1) / groups, channels), n = channels * k;
#pragma omp parallel for num_threads(threads)
  for (size b = 0; b < groups * ranges; b++) {
    size group = b / ranges, first = b % ranges * channels / ranges, last = (b % ranges + 1) * channels / ranges;
    size at = group * rows * n, ats = group * n * k;
    REAL *own = sums + group * n * LANES;
    if (k == 9) differentiate_range(g + at, w + at, d + ats, for_w + at, for_d + ats, own, n, rows, first, last, 9);
    else differentiate_range(g + at, w + at, d + ats, for_w + at, for_d + ats, own, n, rows, first, last, k);
  }
}

/* What follows is the same for depthwise kernels: one row of k numbers a channel, k of any size. D is the larger tensor
   by far, and is read once. */

enum { AHEAD = 4096 / sizeof(REAL), SQUARE = 64 * 64, CACHED = (1 << 20) / sizeof(REAL) };

/* The numbers AHEAD of these `numbers`: a processor's own prefetching ends with each page. */
INLINE void prefetch(const REAL *d, size numbers) {
  for (size i = 0; i < numbers; i += 64 / sizeof(REAL)) __builtin_prefetch(d + i + AHEAD);
}

/* Four rows of D at a time, for their sums to run side by side. */
INLINE void compose_one(const REAL *w, const REAL *d, REAL *out, size k) {
  size p = 0;
  for (; p + 4 <= k; p += 4, d += 4 * k) {
    REAL a = 0, b = 0, c = 0, e = 0;
    prefetch(d, 4 * k);
#pragma omp simd reduction(+ : a, b, c, e)
    for (size s = 0; s < k; s++) {
      a += d[s] * w[s];
      b += d[k + s] * w[s];
      c += d[2 * k + s] * w[s];
      e += d[3 * k + s] * w[s];
    }
    out[p] = w[p] + a;
    out[p + 1] = w[p + 1] + b;
    out[p + 2] = w[p + 2] + c;
    out[p + 3] = w[p + 3] + e;
  }
  for (; p < k; p++, d += k) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size s = 0; s < k; s++) sum += d[s] * w[s];
    out[p] = w[p] + sum;
  }
}

void compose_depthwise(const REAL *w, const REAL *d, REAL *out, size channels, size k, int threads) {
#pragma omp parallel for num_threads(threads)
  for (size c = 0; c < channels; c++) {
    if (k == 9) compose_one(w + c * 9, d + c * 81, out + c * 9, 9);
    else if (k == 49) compose_one(w + c * 49, d + c * 2401, out + c * 49, 49);
    else compose_one(w + c * k, d + c * k * k, out + c * k, k);
  }
}

/* A copy that goes past the caches. */
INLINE void stream(REAL *to, const REAL *from, size numbers) {
  size i = 0;
  for (; i < numbers && (size)(to + i) % WIDTH; i++) to[i] = from[i];
  for (; i + WIDE <= numbers; i += WIDE)
#if WIDTH == 64
    _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512(from + i));
#else
    _mm256_stream_si256((void *)(to + i), _mm256_loadu_si256((const void *)(from + i)));
#endif
  for (; i < numbers; i++) to[i] = from[i];
}

/* Nobody reads D's gradient before the optimizer does: where it is too large to wait in the caches, it goes past them,
   a channel's matrix at a time. */
void differentiate_depthwise(const REAL *g, const REAL *w, const REAL *d, REAL *for_w, REAL *for_d, size channels,
                             size k, int threads) {
  int past = k * k <= SQUARE && channels * k * k > CACHED;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (size at = 0; at < channels * k; at += k) {
      REAL matrix[SQUARE], *own = past ? matrix : for_d + at * k;
      prefetch(d + at * k, k * k);
      for (size s = 0; s < k; s++) for_w[at + s] = g[at + s];
      for (size p = 0; p < k; p++)
#pragma omp simd
        for (size s = 0; s < k; s++) {
          for_w[at + s] += g[at + p] * d[(at + p) * k + s];
          own[p * k + s] = g[at + p] * w[at + s];
        }
      if (past) stream(for_d + at * k, own, k * k);
    }
    _mm_sfence();
  }
}
