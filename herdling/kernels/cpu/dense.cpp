// Linear, SwiGLU and routed experts for a few rows: the plain C interface of dense.h.
#include <cmath>

#include "experts.h"

namespace herdling {
namespace {

// y (M, N) = x (M, K) @ W (N, K)^T
template <class T>
void linear(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, int threads) {
  thread_local Inputs<T> storage;
  Inputs<T>& rows = storage;
  const Weight weight = plain(w, N, K);
  rows.fill(M, K, {&weight}, threads, [&](int64_t m, int64_t k) { return widen(x[m * K + k]); });
  Chunks chunks = output_chunks<T>(weight, threads);
  parallel(threads, chunks.count, [&](int64_t i) {
    rows.times(weight, i * chunks.size, std::min(N, (i + 1) * chunks.size),
               [&](int64_t m, int64_t n, float v) { y[m * N + n] = narrow<T>(v); });
  });
}

// y (M, D) = (silu(x @ G^T) * (x @ U^T)) @ W^T; G, U (F, D); W (D, F)
template <class T>
void swiglu(const T* x, const T* gate, const T* up, const T* down, T* y, int64_t M, int64_t D, int64_t F,
            int threads) {
  thread_local Swiglu<T> storage;
  Swiglu<T>& mlp = storage;
  const Weight g = plain(gate, F, D), u = plain(up, F, D), d = plain(down, D, F);
  thread_local Inputs<T> inputs;
  Inputs<T>& rows = inputs;
  rows.fill(M, D, {&g}, threads, [&](int64_t m, int64_t k) { return widen(x[m * D + k]); });
  mlp.start(rows, g, u, d, M, threads);
  parallel(threads, mlp.firsts(), [&](int64_t i) { mlp.first(i); });
  mlp.middle(threads);
  parallel(threads, mlp.seconds(), [&](int64_t i) {
    mlp.second(i, [&](int64_t m, int64_t n, float v) { y[m * D + n] = narrow<T>(v); });
  });
}

// y (N, D): sum over a token's k experts of SwiGLU(gate * x); gate_up (E, D, 2F), down (E, F, D).
template <class T>
void experts(const T* x, const int64_t* chosen, const T* gates, const T* gate_up, const T* down, T* y, int64_t N,
             int64_t k, int64_t E, int64_t D, int64_t F, int threads) {
  thread_local Scratch scratch;
  PlainExperts<T> bank(scratch, x, chosen, gates, gate_up, down, N, k, E, D, F, threads);
  run_bank(bank, y, N, D, threads);
}

// y = rounded(x / rms(x)) * gain, row by row; gain may be null
template <class T>
void rms_norm(const T* x, const T* gain, T* y, int64_t M, int64_t D, float eps) {
  for (int64_t m = 0; m < M; m++, x += D, y += D) {
    float squares[8] = {};
    int64_t d = 0;
    for (; d + 8 <= D; d += 8)
      for (int j = 0; j < 8; j++) squares[j] += widen(x[d + j]) * widen(x[d + j]);
    float total = 0;
    for (float s : squares) total += s;
    for (; d < D; d++) total += widen(x[d]) * widen(x[d]);
    float scale = 1 / std::sqrt(total / D + eps);
    for (d = 0; d < D; d++) {
      T unit = narrow<T>(widen(x[d]) * scale);
      y[d] = gain ? narrow<T>(widen(unit) * widen(gain[d])) : unit;
    }
  }
}

}  // namespace
}  // namespace herdling

using namespace herdling;

#define HERDLING_API extern "C" __attribute__((visibility("default")))

#define HERDLING_DENSE(NAME, T)                                                                             \
  HERDLING_API void herdling_linear_##NAME(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K,     \
                                         int threads) {                                                     \
    linear<T>(x, w, y, M, N, K, threads);                                                                   \
  }                                                                                                         \
  HERDLING_API void herdling_swiglu_##NAME(const T* x, const T* gate, const T* up, const T* down, T* y,       \
                                         int64_t M, int64_t D, int64_t F, int threads) {                    \
    swiglu<T>(x, gate, up, down, y, M, D, F, threads);                                                      \
  }                                                                                                         \
  HERDLING_API int herdling_experts_##NAME(const T* x, const int64_t* chosen, const T* gates,                \
                                          const T* gate_up, const T* down, T* y, int64_t N, int64_t k,      \
                                          int64_t E, int64_t D, int64_t F, int threads) {                   \
    for (int64_t r = 0; r < N * k; r++)                                                                     \
      if (chosen[r] < 0 || chosen[r] >= E) return 1;                                                        \
    experts<T>(x, chosen, gates, gate_up, down, y, N, k, E, D, F, threads);                                 \
    return 0;                                                                                               \
  }                                                                                                         \
  HERDLING_API void herdling_rms_norm_##NAME(const T* x, const T* gain, T* y, int64_t M, int64_t D,           \
                                           float eps) {                                                     \
    rms_norm<T>(x, gain, y, M, D, eps);                                                                     \
  }

HERDLING_DENSE(f32, float)
HERDLING_DENSE(bf16, bf16)

// What this library was compiled for, to be told in reports.
HERDLING_API const char* herdling_features() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "plain";
#endif
}

// Sum of 32-bit words: reads memory and does little else, the roofline of all of the above.
HERDLING_API float herdling_read(const float* p, int64_t words, int threads) {
  constexpr int64_t kBlock = 1 << 16;
  std::vector<float> sums((words + kBlock - 1) / kBlock);
  parallel(threads, sums.size(), [&](int64_t i) {
    const float *q = p + i * kBlock, *end = p + std::min(words, (i + 1) * kBlock);
    vfloat acc[8] = {};
    for (; q + 8 * kLanes <= end; q += 8 * kLanes)
      for (int j = 0; j < 8; j++) {
        acc[j] += load(q + j * kLanes);
        if (j * kLanes % 16 == 0) prefetch(q + j * kLanes + 512);
      }
    for (int j = 1; j < 8; j++) acc[0] += acc[j];
    sums[i] = sum(acc[0]);
    for (; q < end; q++) sums[i] += *q;
  });
  float total = 0;
  for (float s : sums) total += s;
  return total;
}
