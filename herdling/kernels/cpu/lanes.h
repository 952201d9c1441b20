// Sixteen 32-bit integers and what integer products need of them, for AVX-512-VNNI, AVX2 and plain C++.
//
// A block of codes is 64 bytes: for each of 16 outputs four unsigned bytes along the input. `dot` adds to
// each output the products of its four bytes with four signed activations. Integers are the same
// everywhere: nothing saturates. `pick` looks codes up: bytes for bytes, or a number for four bits of each output.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace herdling {

struct half {
  uint16_t bits;
};

inline float widen(half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000);
  } else {  // subnormal: a multiple of 2^-24
    float value = float(rest) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline int32_t four(const int8_t* a) {
  int32_t bits;
  memcpy(&bits, a, 4);
  return bits;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int32_t kOffset8 = 128;  // bytes are code + 128, to be taken back as 128 * sum of activations
struct Ints {
  __m512i v;
};
struct Codes {
  __m512i v;
};
struct Floats {
  __m512 v;
};
inline Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Codes codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Codes low(Codes c) { return {_mm512_and_si512(c.v, _mm512_set1_epi8(15))}; }
inline Codes high(Codes c) { return {_mm512_and_si512(_mm512_srli_epi16(c.v, 4), _mm512_set1_epi8(15))}; }
inline Ints dot4(Ints acc, Codes c, int32_t a) { return {_mm512_dpbusd_epi32(acc.v, c.v, _mm512_set1_epi32(a))}; }
inline Ints dot8(Ints acc, Codes c, int32_t a) { return dot4(acc, c, a); }
inline Floats floats(float x) { return {_mm512_set1_ps(x)}; }
inline Floats floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats floats(const half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats fma(Ints a, Floats b, Floats c) { return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(a.v), b.v, c.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats times(Floats a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
inline void put(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline void put(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Codes crumbs(Codes c, int i) {
  return {_mm512_and_si512(_mm512_srli_epi16(c.v, 2 * i), _mm512_set1_epi8(3))};
}
inline Codes pick(const uint8_t* table, Codes c) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), c.v)};
}
inline Floats pick(const float* table, Codes c, int shift) {  // looks at four bits alone
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(c.v, shift), _mm512_loadu_ps(table))};
}
inline Floats signed_byte(Codes c, int byte) {
  __m512i high = _mm512_slli_epi32(_mm512_xor_si512(c.v, _mm512_set1_epi8(char(0x80))), 24 - 8 * byte);
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24))};
}
inline Floats powers(const uint8_t* p) {  // 2^(e - 127)
  __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23);
  return {_mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x00400000)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int32_t kOffset8 = 0;  // signs are moved to the activations instead: 2 * 128 * 127 fits 16 bits
struct Ints {
  __m256i a, b;
};
struct Codes {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};
inline Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Codes codes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Codes low(Codes c) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
}
inline Codes high(Codes c) { return low({_mm256_srli_epi16(c.a, 4), _mm256_srli_epi16(c.b, 4)}); }
inline __m256i quads(__m256i acc, __m256i u8, __m256i s8) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
inline Ints dot4(Ints acc, Codes c, int32_t a) {
  const __m256i x = _mm256_set1_epi32(a);
  return {quads(acc.a, c.a, x), quads(acc.b, c.b, x)};
}
inline __m256i signed_quads(__m256i acc, __m256i code, __m256i x) {
  __m256i w = _mm256_xor_si256(code, _mm256_set1_epi8(char(0x80)));
  return quads(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
inline Ints dot8(Ints acc, Codes c, int32_t a) {
  const __m256i x = _mm256_set1_epi32(a);
  return {signed_quads(acc.a, c.a, x), signed_quads(acc.b, c.b, x)};
}
inline Floats floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats floats(const half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats fma(Ints x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(x.a), y.a, z.a), _mm256_fmadd_ps(_mm256_cvtepi32_ps(x.b), y.b, z.b)};
}
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats times(Floats x, float y) {
  return {_mm256_mul_ps(x.a, _mm256_set1_ps(y)), _mm256_mul_ps(x.b, _mm256_set1_ps(y))};
}
inline Codes crumbs(Codes c, int i) {
  const __m256i mask = _mm256_set1_epi8(3);
  return {_mm256_and_si256(_mm256_srli_epi16(c.a, 2 * i), mask), _mm256_and_si256(_mm256_srli_epi16(c.b, 2 * i), mask)};
}
inline Codes pick(const uint8_t* table, Codes c) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, c.a), _mm256_shuffle_epi8(t, c.b)};
}
inline __m256 pick8(const float* table, __m256i index) {
  __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline Floats pick(const float* table, Codes c, int shift) {
  return {pick8(table, _mm256_srli_epi32(c.a, shift)), pick8(table, _mm256_srli_epi32(c.b, shift))};
}
inline __m256 signed_byte8(__m256i c, int byte) {
  __m256i high = _mm256_slli_epi32(_mm256_xor_si256(c, _mm256_set1_epi8(char(0x80))), 24 - 8 * byte);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(high, 24));
}
inline Floats signed_byte(Codes c, int byte) { return {signed_byte8(c.a, byte), signed_byte8(c.b, byte)}; }
inline __m256 powers8(const uint8_t* p) {
  __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 23);
  return _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(0x00400000)));
}
inline Floats powers(const uint8_t* p) { return {powers8(p), powers8(p + 8)}; }
inline void put(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline void put(int32_t* p, Ints x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}

#else

// Not inlined: unrolled by the compiler at every use they take half a minute to compile.
#define HERDLING_CALL __attribute__((noinline)) static
constexpr int32_t kOffset8 = 128;
struct Ints {
  int32_t v[16];
};
struct Codes {
  uint8_t v[64];
};
struct Floats {
  float v[16];
};
inline Ints ints(int32_t x) {
  Ints out;
  for (int i = 0; i < 16; i++) out.v[i] = x;
  return out;
}
HERDLING_CALL Ints add(Ints a, Ints b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
inline Codes codes(const uint8_t* p) {
  Codes c;
  memcpy(c.v, p, 64);
  return c;
}
HERDLING_CALL Codes low(Codes c) {
  for (int i = 0; i < 64; i++) c.v[i] &= 15;
  return c;
}
HERDLING_CALL Codes high(Codes c) {
  for (int i = 0; i < 64; i++) c.v[i] >>= 4;
  return c;
}
HERDLING_CALL Ints dot4(Ints acc, const Codes& c, int32_t bits) {
  int8_t a[4];
  memcpy(a, &bits, 4);
  for (int i = 0; i < 16; i++)
    acc.v[i] += c.v[4 * i] * a[0] + c.v[4 * i + 1] * a[1] + c.v[4 * i + 2] * a[2] + c.v[4 * i + 3] * a[3];
  return acc;
}
inline Ints dot8(Ints acc, const Codes& c, int32_t bits) { return dot4(acc, c, bits); }
inline Floats floats(float x) {
  Floats out;
  for (int i = 0; i < 16; i++) out.v[i] = x;
  return out;
}
inline Floats floats(const float* p) {
  Floats out;
  memcpy(out.v, p, 64);
  return out;
}
HERDLING_CALL Floats floats(const half* p) {
  Floats out;
  for (int i = 0; i < 16; i++) out.v[i] = widen(p[i]);
  return out;
}
HERDLING_CALL Floats fma(Ints a, Floats b, Floats c) {
  for (int i = 0; i < 16; i++) c.v[i] += float(a.v[i]) * b.v[i];
  return c;
}
HERDLING_CALL Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; i++) c.v[i] += a.v[i] * b.v[i];
  return c;
}
HERDLING_CALL Floats add(Floats a, Floats b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
HERDLING_CALL Floats times(Floats a, float b) {
  for (int i = 0; i < 16; i++) a.v[i] *= b;
  return a;
}
HERDLING_CALL Codes crumbs(Codes c, int step) {
  for (int i = 0; i < 64; i++) c.v[i] = c.v[i] >> 2 * step & 3;
  return c;
}
HERDLING_CALL Codes pick(const uint8_t* table, Codes c) {
  for (int i = 0; i < 64; i++) c.v[i] = table[c.v[i]];
  return c;
}
HERDLING_CALL Floats pick(const float* table, const Codes& c, int shift) {
  Floats out;
  for (int i = 0; i < 16; i++) out.v[i] = table[c.v[4 * i + shift / 8] >> shift % 8 & 15];
  return out;
}
HERDLING_CALL Floats signed_byte(const Codes& c, int byte) {
  Floats out;
  for (int i = 0; i < 16; i++) out.v[i] = float(c.v[4 * i + byte] - 128);
  return out;
}
HERDLING_CALL Floats powers(const uint8_t* p) {
  Floats out;
  for (int i = 0; i < 16; i++) {
    uint32_t bits = p[i] ? uint32_t(p[i]) << 23 : 0x00400000;
    memcpy(out.v + i, &bits, 4);
  }
  return out;
}
inline void put(float* p, Floats a) { memcpy(p, a.v, 64); }
inline void put(int32_t* p, Ints a) { memcpy(p, a.v, 64); }

#endif

}  // namespace herdling
