// Linear, SwiGLU and routed experts on packed integer weights: the plain C interface of packed.h.
#include "packed.h"

#include "dense.h"
#include "experts.h"
#include "pool.h"

namespace herdling {
namespace {

// y (M, N) float32 = rows @ W^T, shared out over panels.
template <class Store>
void times(const Rows& rows, int64_t M, const Matrix& w, int threads, Store store) {
  Chunks chunks(w.panels(), 1, w.panel_bytes(), threads);
  parallel(threads, chunks.count, [&](int64_t i) {
    product(rows, M, w, i * chunks.size, std::min(w.panels(), (i + 1) * chunks.size), store);
  });
}

template <class T>
Rows quantized(const T* x, int64_t M, const Matrix& w, Scratch& scratch) {
  size_t bytes = (Rows::bytes(M, w) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(scratch.take(bytes + w.K * sizeof(float)));
  Rows rows = Rows::in(memory, M, w);
  auto* wide = reinterpret_cast<float*>(memory + bytes);
  for (int64_t m = 0; m < M; m++) {
    for (int64_t k = 0; k < w.K; k++) wide[k] = widen(x[m * w.K + k]);
    quantize(wide, rows, m, w);
  }
  return rows;
}

template <class T>
void linear(const T* x, const Matrix& w, T* y, int64_t M, int threads) {
  thread_local Scratch scratch;
  times(quantized(x, M, w, scratch), M, w, threads,
        [&](int64_t m, int64_t n, float v) { y[m * w.N + n] = narrow<T>(v); });
}

// SwiGLU of rows sorted by expert; the inner activation is quantized row by row. out(row, n, value).
template <class Out>
void swiglu_groups(const std::vector<Group>& groups, const Rows& rows, int64_t M, const Matrix& gate_up,
                   const Matrix& down, int threads, Out out) {
  thread_local Scratch scratch;
  const int64_t F = down.K, G = groups.size();
  const int each = std::max<int64_t>(1, threads / std::max<int64_t>(1, G));
  size_t act_bytes = (Rows::bytes(M, down) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(scratch.take(act_bytes + M * 2 * F * sizeof(float)));
  Rows acts = Rows::in(memory, M, down);
  auto* hidden = reinterpret_cast<float*>(memory + act_bytes);  // (M, 2F)
  Chunks inner(gate_up.panels(), 1, gate_up.panel_bytes(), each);
  parallel(threads, G * inner.count, [&](int64_t i) {
    const Group& g = groups[i / inner.count];
    int64_t begin = i % inner.count * inner.size, end = std::min(gate_up.panels(), begin + inner.size);
    product(rows.from(g.first), g.count, gate_up.at(g.expert), begin, end,
            [&](int64_t m, int64_t n, float v) { hidden[(g.first + m) * 2 * F + n] = v; });
  });
  parallel(M > 1 ? threads : 1, M, [&](int64_t m) {
    float *gate = hidden + m * 2 * F, *up = gate + F;
    for (int64_t f = 0; f < F; f++) gate[f] = gate[f] / (1 + std::exp(-gate[f])) * up[f];
    quantize(gate, acts, m, down);
  });
  Chunks outer(down.panels(), 1, down.panel_bytes(), each);
  parallel(threads, G * outer.count, [&](int64_t i) {
    const Group& g = groups[i / outer.count];
    int64_t begin = i % outer.count * outer.size, end = std::min(down.panels(), begin + outer.size);
    product(acts.from(g.first), g.count, down.at(g.expert), begin, end,
            [&](int64_t m, int64_t n, float v) { out(g.first + m, n, v); });
  });
}

// y (M, D) = down(silu(gate(x)) * up(x)); gate and up are one matrix of 2F outputs
template <class T>
void swiglu(const T* x, const Matrix& gate_up, const Matrix& down, T* y, int64_t M, int threads) {
  thread_local Scratch scratch;
  Rows rows = quantized(x, M, gate_up, scratch);
  swiglu_groups({{0, 0, M}}, rows, M, gate_up, down, threads,
                [&](int64_t m, int64_t n, float v) { y[m * down.N + n] = narrow<T>(v); });
}

// As experts() of dense.cpp; activations are quantized a routed row, after the gate.
template <class T>
void experts(const T* x, const int64_t* chosen, const T* gates, const Matrix& gate_up, const Matrix& down, T* y,
             int64_t N, int64_t k, int64_t E, int threads) {
  thread_local Scratch scratch;
  std::vector<int64_t> order;
  int64_t M = N * k, D = gate_up.K;
  std::vector<Group> groups = sort_rows(chosen, M, E, order);
  size_t bytes = (Rows::bytes(M, gate_up) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(scratch.take(bytes + (D + M * D) * sizeof(float)));
  Rows rows = Rows::in(memory, M, gate_up);
  auto* wide = reinterpret_cast<float*>(memory + bytes);
  float* parts = wide + D;  // (M, D) by routed row
  for (int64_t i = 0; i < M; i++) {
    const T* token = x + order[i] / k * D;
    float gate = widen(gates[order[i]]);
    for (int64_t d = 0; d < D; d++) wide[d] = widen(narrow<T>(widen(token[d]) * gate));
    quantize(wide, rows, i, gate_up);
  }
  swiglu_groups(groups, rows, M, gate_up, down, threads,
                [&](int64_t m, int64_t n, float v) { parts[order[m] * D + n] = v; });
  for (int64_t n = 0; n < N; n++)
    for (int64_t d = 0; d < D; d++) {
      float total = 0;
      for (int64_t j = 0; j < k; j++) total += parts[(n * k + j) * D + d];
      y[n * D + d] = narrow<T>(total);
    }
}

}  // namespace
}  // namespace herdling

using namespace herdling;

#define HERDLING_API extern "C" __attribute__((visibility("default")))
#define HERDLING_MATRIX(w) const uint8_t *w##_codes, const void *w##_scales, int64_t w##_N, int64_t w##_K, \
    int64_t w##_group, int w##_halves
#define HERDLING_GIVEN(w) Matrix{w##_codes, w##_scales, w##_N, w##_K, w##_group, w##_halves != 0}

#define HERDLING_PACKED(NAME, T)                                                                             \
  HERDLING_API void herdling_packed_linear_##NAME(const T* x, HERDLING_MATRIX(w), T* y, int64_t M,           \
                                                  int threads) {                                             \
    linear<T>(x, HERDLING_GIVEN(w), y, M, threads);                                                          \
  }                                                                                                          \
  HERDLING_API void herdling_packed_swiglu_##NAME(const T* x, HERDLING_MATRIX(a), HERDLING_MATRIX(b), T* y,  \
                                                  int64_t M, int threads) {                                  \
    swiglu<T>(x, HERDLING_GIVEN(a), HERDLING_GIVEN(b), y, M, threads);                                       \
  }                                                                                                          \
  HERDLING_API int herdling_packed_experts_##NAME(const T* x, const int64_t* chosen, const T* gates,         \
                                                  HERDLING_MATRIX(a), HERDLING_MATRIX(b), T* y, int64_t N,   \
                                                  int64_t k, int64_t E, int threads) {                       \
    for (int64_t r = 0; r < N * k; r++)                                                                      \
      if (chosen[r] < 0 || chosen[r] >= E) return 1;                                                         \
    experts<T>(x, chosen, gates, HERDLING_GIVEN(a), HERDLING_GIVEN(b), y, N, k, E, threads);                 \
    return 0;                                                                                                \
  }

HERDLING_PACKED(f32, float)
HERDLING_PACKED(bf16, bf16)

// The integer sums themselves, for tests: a (M, K) int8, out (M, groups, N) int32.
HERDLING_API void herdling_packed_integers(const int8_t* a, HERDLING_MATRIX(w), int32_t* out, int64_t M) {
  Matrix w = HERDLING_GIVEN(w);
  Scratch scratch;
  Rows rows = Rows::in(scratch.take(Rows::bytes(M, w)), M, w);
  for (int64_t m = 0; m < M; m++) {
    std::fill_n(rows.a + m * rows.depth, rows.depth, 0);
    std::copy_n(a + m * w.K, w.K, rows.a + m * rows.depth);
    start_sums(rows, m, w);
  }
  for (int64_t panel = 0; panel < w.panels(); panel++)
    for (int64_t m = 0; m < M;) {
      int64_t left = M - m, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      auto each = [&](int64_t g, int i, Ints v) {
        int32_t sums[16];
        put(sums, v);
        std::copy_n(sums, std::min<int64_t>(16, w.N - panel * 16), out + ((m + i) * w.groups() + g) * w.N + panel * 16);
      };
      Rows here = rows.from(m);
      if (taken == 4) panel_rows<4>(here, w, panel, each);
      else if (taken == 2) panel_rows<2>(here, w, panel, each);
      else panel_rows<1>(here, w, panel, each);
      m += taken;
    }
}

HERDLING_API const char* herdling_integer_features() {
#if defined(__AVX512VNNI__)
  return "avx512-vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "plain";
#endif
}
