// Vectors of float as wide as the machine's, and bfloat16, in the compiler's own vector types: one text
// for AVX-512, AVX2, NEON and plain SSE2.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HERDLING_BF16_DOT 1
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
inline vfloat splat(float x) { return vfloat{} + x; }

inline float sum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

}  // namespace herdling
