// Linear, SwiGLU and routed experts on packed weights: a plain C interface.
#include "experts.h"

using namespace herdling;

namespace herdling {
namespace {

template <class T>
void linear(const T* x, const Weight& w, T* y, int64_t M, int threads) {
  thread_local Inputs<T> storage;
  Inputs<T>& rows = storage;  // the caller's also in the threads that help
  rows.fill(M, w.K, {&w}, threads, [&](int64_t m, int64_t k) { return widen(x[m * w.K + k]); });
  Chunks chunks = output_chunks<T>(w, threads);
  parallel(threads, chunks.count, [&](int64_t i) {
    rows.times(w, i * chunks.size, std::min(w.N, (i + 1) * chunks.size),
               [&](int64_t m, int64_t n, float v) { y[m * w.N + n] = narrow<T>(v); });
  });
}

template <class T>
void experts(const T* x, const int64_t* chosen, const T* gates, const Weight& gate_up, const Weight& down, T* y,
             int64_t N, int64_t k, int64_t E, int threads) {
  thread_local Scratch scratch;
  PackedExperts<T> bank(scratch, x, chosen, gates, gate_up, down, N, k, E, threads);
  run_bank(bank, y, N, down.N, threads);
}

}  // namespace
}  // namespace herdling

#define HERDLING_API extern "C" __attribute__((visibility("default")))

#define HERDLING_PACKED(NAME, T)                                                                              \
  HERDLING_API void herdling_packed_linear_##NAME(const T* x, const Weight* w, T* y, int64_t M, int threads) { \
    linear<T>(x, *w, y, M, threads);                                                                          \
  }                                                                                                           \
  HERDLING_API void herdling_packed_swiglu_##NAME(const T* x, const Weight* gate_up, const Weight* down, T* y, \
                                                  int64_t M, int threads) {                                   \
    experts<T>(x, nullptr, nullptr, *gate_up, *down, y, M, 1, 1, threads);                                    \
  }                                                                                                           \
  HERDLING_API int herdling_packed_experts_##NAME(const T* x, const int64_t* chosen, const T* gates,          \
                                                  const Weight* gate_up, const Weight* down, T* y, int64_t N, \
                                                  int64_t k, int64_t E, int threads) {                        \
    for (int64_t r = 0; r < N * k; r++)                                                                       \
      if (chosen[r] < 0 || chosen[r] >= E) return 1;                                                          \
    experts<T>(x, chosen, gates, *gate_up, *down, y, N, k, E, threads);                                       \
    return 0;                                                                                                 \
  }

HERDLING_PACKED(f32, float)
HERDLING_PACKED(bf16, bf16)
