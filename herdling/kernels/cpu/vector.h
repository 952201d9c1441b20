// Vectors of float as wide as the machine's, and bfloat16, in the compiler's own vector types: one text
// for AVX-512, AVX2, NEON and plain SSE2.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace herdling {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTile = 16;  // accumulators that stay in registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kTile = 8;
#else
constexpr int kLanes = 4;
constexpr int kTile = 8;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vfloat load(const bf16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}
inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
inline vfloat splat(float x) { return x - vfloat{}; }  // folded: -0 stays -0

// out[i] = sum of the lanes of v[i], i < N <= 16; the order of a sum is the same for every i and N.
template <int N>
inline void sums(const vfloat* v, float* out) {
#if defined(__AVX512F__)
  __m512 t[16], zero = _mm512_setzero_ps();  // a tree of transposed additions: 45 operations for 16 sums
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) t[i] = i < N ? (__m512)v[i] : zero;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int width = 2; width; width--)
    for (int i = 0; i < width; i++)
      t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
  _mm512_mask_storeu_ps(out, __mmask16((1u << N) - 1), t[0]);
#else
  for (int i = 0; i < N; i++) {
    float total = 0;
    for (int j = 0; j < kLanes; j++) total += v[i][j];
    out[i] = total;
  }
#endif
}

inline float sum(vfloat v) {
  float out;
  sums<1>(&v, &out);
  return out;
}

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

}  // namespace herdling
