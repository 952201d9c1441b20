// Linear, SwiGLU and routed experts for a few rows: the plain C interface of dense.h.
#include "dense.h"

#include <cmath>

#include "experts.h"
#include "pool.h"

namespace herdling {
namespace {

inline float silu(float x) { return x / (1 + std::exp(-x)); }

template <class T>
Prepared<T>* prepare(const T* x, int64_t M, int64_t K, Scratch& scratch) {
  int64_t P = padded<T>(K);
  auto* out = static_cast<Prepared<T>*>(scratch.take(M * P * sizeof(Prepared<T>)));
  for (int64_t m = 0; m < M; m++)
    prepare_row<T>([&](int64_t k) { return widen(x[m * K + k]); }, out + m * P, K);
  return out;
}

// y (M, N) = x (M, K) @ W (N, K)^T
template <class T>
void linear(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, int threads) {
  thread_local Scratch scratch;
  const Prepared<T>* rows = prepare<T>(x, M, K, scratch);
  Chunks chunks(N, 16, K * sizeof(T), threads);
  parallel(threads, chunks.count, [&](int64_t i) {
    dot_block<T>(rows, padded<T>(K), M, w, K, i * chunks.size, std::min(N, (i + 1) * chunks.size),
                 [&](int64_t m, int64_t n, float v) { y[m * N + n] = narrow<T>(v); });
  });
}

// y (M, D) = (silu(x @ G^T) * (x @ U^T)) @ W^T; G, U (F, D); W (D, F)
template <class T>
void swiglu(const T* x, const T* gate, const T* up, const T* down, T* y, int64_t M, int64_t D, int64_t F,
            int threads) {
  thread_local Scratch scratch, acts;
  int64_t P = padded<T>(D), Q = padded<T>(F);
  const Prepared<T>* rows = prepare<T>(x, M, D, scratch);
  size_t bytes = M * Q * sizeof(Prepared<T>);
  auto* act = static_cast<Prepared<T>*>(acts.take(bytes + M * F * sizeof(float)));
  auto* gated = reinterpret_cast<float*>(reinterpret_cast<char*>(act) + bytes);
  for (int64_t m = 0; m < M; m++) std::fill(act + m * Q + F, act + (m + 1) * Q, Prepared<T>{});
  Chunks inner(F, 8, 2 * D * sizeof(T), threads);
  parallel(threads, inner.count, [&](int64_t i) {
    int64_t begin = i * inner.size, end = std::min(F, begin + inner.size);
    dot_block<T>(rows, P, M, gate, D, begin, end, [&](int64_t m, int64_t n, float v) { gated[m * F + n] = v; });
    dot_block<T>(rows, P, M, up, D, begin, end, [&](int64_t m, int64_t n, float v) {
      act[m * Q + n] = narrow<Prepared<T>>(silu(gated[m * F + n]) * v);
    });
  });
  Chunks outer(D, 8, F * sizeof(T), threads);
  parallel(threads, outer.count, [&](int64_t i) {
    dot_block<T>(act, Q, M, down, F, i * outer.size, std::min(D, (i + 1) * outer.size),
                 [&](int64_t m, int64_t n, float v) { y[m * D + n] = narrow<T>(v); });
  });
}

// y (N, D): sum over a token's k experts of SwiGLU(gate * x); gate_up (E, D, 2F), down (E, F, D).
//
// Three passes: partial sums of gate|up over parts of D; their totals, SwiGLU and partial sums of the
// output over parts of F; the outputs' totals. Weights are read in the order of memory.
template <class T>
void experts(const T* x, const int64_t* chosen, const T* gates, const T* gate_up, const T* down, T* y,
             int64_t N, int64_t k, int64_t E, int64_t D, int64_t F, int threads) {
  thread_local Scratch scratch;
  std::vector<int64_t> order;
  int64_t M = N * k, P = padded<T>(D);
  std::vector<Group> groups = sort_rows(chosen, M, E, order);
  Parts wide(D), narrow_parts(F);
  size_t x_bytes = (M * P * sizeof(Prepared<T>) + 63) / 64 * 64;
  size_t hidden_floats = wide.count * M * 2 * F, out_floats = narrow_parts.count * M * D;
  auto* memory = static_cast<char*>(scratch.take(x_bytes + (hidden_floats + out_floats) * sizeof(float)));
  auto* rows = reinterpret_cast<Prepared<T>*>(memory);
  auto* hidden = reinterpret_cast<float*>(memory + x_bytes);  // (group, part, row, 2F)
  float* partial = hidden + hidden_floats;                     // (group, part, row, D)
  for (int64_t i = 0; i < M; i++) {
    const T* token = x + order[i] / k * D;
    float gate = widen(gates[order[i]]);
    // The scaled row is rounded to its type, as a tensor of it would be.
    prepare_row<T>([&](int64_t d) { return widen(narrow<T>(widen(token[d]) * gate)); }, rows + i * P, D);
  }
  int64_t G = groups.size();
  parallel(threads, G * wide.count, [&](int64_t i) {
    const Group& g = groups[i / wide.count];
    int64_t part = i % wide.count, d = wide.begin(part);
    col_block<T>(rows + g.first * P + d, P, g.count, gate_up + (g.expert * D + d) * 2 * F, wide.length(part),
                 2 * F, hidden + (g.first * wide.count + part * g.count) * 2 * F);
  });
  parallel(threads, G * narrow_parts.count, [&](int64_t i) {
    thread_local Scratch own;
    const Group& g = groups[i / narrow_parts.count];
    int64_t part = i % narrow_parts.count, f = narrow_parts.begin(part), n = narrow_parts.length(part);
    auto* act = static_cast<Prepared<T>*>(own.take(g.count * n * sizeof(Prepared<T>) + 2 * n * sizeof(float)));
    auto* gated = reinterpret_cast<float*>(act + (g.count * n + 1) / 2 * 2);
    for (int64_t m = 0; m < g.count; m++) {
      const float* sums = hidden + (g.first * wide.count + m) * 2 * F + f;
      std::copy_n(sums, n, gated);
      std::copy_n(sums + F, n, gated + n);
      for (int64_t p = 1; p < wide.count; p++) {
        sums += g.count * 2 * F;
        for (int64_t j = 0; j < n; j++) gated[j] += sums[j];
        for (int64_t j = 0; j < n; j++) gated[n + j] += sums[F + j];
      }
      for (int64_t j = 0; j < n; j++) act[m * n + j] = narrow<Prepared<T>>(silu(gated[j]) * gated[n + j]);
    }
    col_block<T>(act, n, g.count, down + (g.expert * F + f) * D, n, D,
                 partial + (g.first * narrow_parts.count + part * g.count) * D);
  });
  std::vector<const float*> firsts(M);  // of routed row r: its first partial sums
  std::vector<int64_t> strides(M);
  for (const Group& g : groups)
    for (int64_t m = 0; m < g.count; m++) {
      firsts[order[g.first + m]] = partial + (g.first * narrow_parts.count + m) * D;
      strides[order[g.first + m]] = g.count * D;
    }
  parallel(N > 1 ? threads : 1, N, [&](int64_t n) {
    thread_local Scratch own;
    auto* total = static_cast<float*>(own.take(D * sizeof(float)));
    std::fill_n(total, D, 0.f);
    for (int64_t r = n * k; r < (n + 1) * k; r++)
      for (int64_t p = 0; p < narrow_parts.count; p++) {
        const float* sums = firsts[r] + p * strides[r];
        for (int64_t d = 0; d < D; d++) total[d] += sums[d];
      }
    for (int64_t d = 0; d < D; d++) y[n * D + d] = narrow<T>(total[d]);
  });
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
#if defined(HERDLING_BF16_DOT)
  return "avx512-bf16";
#elif defined(__AVX512F__)
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
