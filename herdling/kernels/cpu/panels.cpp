// The kernels of packed.h: one panel of 16 outputs times a few rows, for every kind of code.
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "packed.h"
#include "tiles.h"

namespace herdling {
namespace {

constexpr int64_t kFar = 2048;  // bytes between a read and its prefetch

// Of E2M1 by its code; twice that, plus 12, is an unsigned byte.
constexpr float kE2M1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
constexpr uint8_t kE2M1Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr float kInts[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kSigns[16] = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0};  // by the two lowest bits

// What a block of 64 bytes holds: codes of 4 inputs a step, as bytes and as numbers.
template <int kind>
struct Block {
  static constexpr int steps = kind == kInt8 ? 1 : kind == kTernary ? 4 : 2, bits = 8 / steps;
  static constexpr int32_t offset = kind == kInt8 ? kOffset8 : kind == kInt4 ? 8 : kind == kMxfp4 ? 12 : 1;

  static Codes bytes(Codes c, int step) {
    if (kind == kInt8) return c;
    if (kind == kTernary) return crumbs(c, step);
    Codes four = step ? high(c) : low(c);
    return kind == kMxfp4 ? pick(kE2M1Bytes, four) : four;
  }
  static Ints dot(Ints acc, Codes c, int32_t a) { return kind == kInt8 ? dot8(acc, c, a) : dot4(acc, c, a); }
  static Floats numbers(Codes c, int byte, int step) {
    if (kind == kInt8) return signed_byte(c, byte);
    return pick(kind == kMxfp4 ? kE2M1 : kind == kInt4 ? kInts : kSigns, c, byte * 8 + step * bits);
  }
};

template <int kind>
struct Decode {  // a type, not a pointer, so that it is inlined
  Codes operator()(Codes c, int step) const { return Block<kind>::bytes(c, step); }
};

inline Floats scales_at(const Weight& w, int64_t at) {
  const void* p = static_cast<const char*>(w.scales) + at * 16 * w.scale;
  if (w.scale == 2) return floats(static_cast<const half*>(p));
  if (w.scale == 1) return powers(static_cast<const uint8_t*>(p));
  return floats(static_cast<const float*>(p));
}

// each(group, row, integers of 16 outputs)
template <int kind, int RM, class Each>
inline void panel_integers(const Rows& rows, const Weight& w, const uint8_t* p, Each each) {
  using B = Block<kind>;
  constexpr int kInputs = 4 * B::steps;
  // Independent sums hide the latency of a product; where there are groups, those do.
  constexpr int Chains = kind != kInt8 && kind != kTernary ? 1 : RM == 1 ? 4 : 2;
  const int64_t span = w.group ? w.group : rows.depth, blocks = span / kInputs;
  for (int64_t g = 0; g < rows.groups; g++) {
    Ints acc[RM][Chains];
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++)
#pragma GCC unroll 4
      for (int i = 0; i < Chains; i++) acc[m][i] = ints(i ? 0 : rows.starts[m * rows.groups + g]);
    const int8_t* a = rows.a + g * span;
    auto block = [&](int i) {
      prefetch(p + kFar);
      Codes c = codes(p);
#pragma GCC unroll 4
      for (int s = 0; s < B::steps; s++) {
        Codes bytes = B::bytes(c, s);
#pragma GCC unroll 4
        for (int m = 0; m < RM; m++) {
          Ints& sum = acc[m][(i * B::steps + s) % Chains];
          sum = B::dot(sum, bytes, four(a + m * rows.depth + 4 * s));
        }
      }
      p += 64, a += kInputs;
    };
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) block(i);
    for (; b < blocks; b++) block(0);
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++) {
#pragma GCC unroll 4
      for (int i = 1; i < Chains; i++) acc[m][0] = add(acc[m][0], acc[m][i]);
      each(g, m, acc[m][0]);
    }
  }
}

// total[row] = sum over groups of scale * (sum of number * activation), 16 outputs
template <int kind, int RM>
inline void panel_numbers(const Rows& rows, const Weight& w, const uint8_t* p, int64_t scales, Floats* total) {
  using B = Block<kind>;
  constexpr int kInputs = 4 * B::steps;
  const int64_t span = w.group ? w.group : rows.depth;
  for (int64_t g = 0; g < rows.groups; g++) {
    Floats acc[RM][4];  // a chain for each byte hides latency
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[m][j] = floats(0.f);
    const float* x = rows.wide + g * span;
    for (int64_t b = 0; b < span; b += kInputs, p += 64, x += kInputs) {
      prefetch(p + kFar);
      Codes c = codes(p);
#pragma GCC unroll 4
      for (int s = 0; s < B::steps; s++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          Floats n = B::numbers(c, j, s);
#pragma GCC unroll 4
          for (int m = 0; m < RM; m++) acc[m][j] = fma(n, floats(x[m * rows.depth + 4 * s + j]), acc[m][j]);
        }
    }
    Floats scale = scales_at(w, scales + g);
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++)
      total[m] = fma(add(add(acc[m][0], acc[m][1]), add(acc[m][2], acc[m][3])), scale, total[m]);
  }
}

template <int kind, int RM>
__attribute__((noinline)) void few(const Rows& rows, const Weight& w, int64_t panel, float (*out)[16]) {
  const uint8_t* p = w.panel(panel);
  const int64_t scales = panel * w.groups();
  Floats total[RM];
#pragma GCC unroll 4
  for (int m = 0; m < RM; m++) total[m] = floats(0.f);
  if (w.floats) {
    panel_numbers<kind, RM>(rows, w, p, scales, total);
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++) put(out[m], total[m]);
    return;
  }
  Floats scale;
  panel_integers<kind, RM>(rows, w, p, [&](int64_t g, int m, Ints v) {
    if (m == 0) {
      // a stream too thin for the machine's own prefetching
      prefetch(static_cast<const char*>(w.scales) + (scales + g + 16) * 16 * w.scale);
      scale = scales_at(w, scales + g);
    }
    total[m] = fma(v, scale, total[m]);
  });
#pragma GCC unroll 4
  for (int m = 0; m < RM; m++) put(out[m], times(total[m], rows.scales[m]));
}

#ifdef HERDLING_TILES
struct Scaled {  // what tiles add up, 16 rows at a time, times scales
  const Weight& w;
  int64_t scales;
  const Rows& rows;
  float (*out)[16];
  Floats total[16], scale;

  void start() {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) total[i] = floats(0.f);
  }
  void operator()(int64_t g, int i, Ints v) {
    if (i == 0) scale = scales_at(w, scales + g);
    total[i] = fma(v, scale, total[i]);
  }
  void finish(int64_t first, int64_t count) {
    alignas(64) float all[16][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) put(all[i], total[i]);
    for (int64_t i = 0; i < count; i++) put(out[first + i], times(floats(all[i]), rows.scales[first + i]));
  }
};
#endif

template <int kind>
void kind_product(const Rows& rows, int64_t M, const Weight& w, int64_t panel, float (*out)[16]) {
#ifdef HERDLING_TILES
  if (M > 4 && !w.floats && tiles_allowed()) {
    Scaled scaled{w, panel * w.groups(), rows, out};
    panel_tiles<Block<kind>::steps>(rows, M, w.group ? w.group : rows.depth, w.panel(panel), Decode<kind>{}, scaled);
    return;
  }
#endif
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m;
    if (left >= 4) few<kind, 4>(rows.from(m), w, panel, out + m), m += 4;
    else if (left >= 2) few<kind, 2>(rows.from(m), w, panel, out + m), m += 2;
    else few<kind, 1>(rows.from(m), w, panel, out + m), m += 1;
  }
}

template <class Do>
void by_kind(int32_t kind, Do act) {
  switch (kind) {
    case kInt8: return act(std::integral_constant<int, kInt8>{});
    case kInt4: return act(std::integral_constant<int, kInt4>{});
    case kMxfp4: return act(std::integral_constant<int, kMxfp4>{});
    case kTernary: return act(std::integral_constant<int, kTernary>{});
  }
}

}  // namespace

void panel_product(const Rows& rows, int64_t M, const Weight& w, int64_t panel, float (*out)[16]) {
  by_kind(w.kind, [&](auto kind) { kind_product<decltype(kind)::value>(rows, M, w, panel, out); });
}

void start_sums(const Rows& rows, int64_t m, const Weight& w) {
  const int64_t span = w.group ? w.group : rows.depth;
  int32_t offset = 0;
  by_kind(w.kind, [&](auto kind) { offset = Block<decltype(kind)::value>::offset; });
  for (int64_t g = 0; g < rows.groups; g++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < span; k++) sum += rows.a[m * rows.depth + g * span + k];
    rows.starts[m * rows.groups + g] = -offset * sum;
  }
}

void put_row(const float* x, const Rows& rows, int64_t m, const Weight& w) {
  if (w.floats) {
    std::copy_n(x, w.K, rows.wide + m * rows.depth);
    std::fill(rows.wide + m * rows.depth + w.K, rows.wide + (m + 1) * rows.depth, 0.f);
    return;
  }
  int32_t bits = 0;  // of the largest magnitude: without signs floats are ordered as integers are
  for (int64_t k = 0; k < w.K; k++) {
    int32_t b;
    memcpy(&b, x + k, 4);
    bits = std::max(bits, b & 0x7fffffff);
  }
  float most;
  memcpy(&most, &bits, 4);
  int8_t* a = rows.a + m * rows.depth;
  const float inverse = most > 0 ? std::min(127 / most, std::numeric_limits<float>::max()) : 0;
  // Not by adding 1.5 * 2^23: that would be fused with the product, and round differently, on some machines.
  for (int64_t k = 0; k < w.K; k++) a[k] = int8_t(int32_t(std::rint(x[k] * inverse)));
  for (int64_t k = w.K; k < rows.depth; k++) a[k] = 0;
  // E2M1's integers are twice its numbers.
  rows.scales[m] = most / 127 * (w.kind == kMxfp4 ? .5f : 1.f);
  start_sums(rows, m, w);
}

}  // namespace herdling

using namespace herdling;

// The integer sums themselves, for tests: a (M, K) int8, out (M, groups, N) int32; many: by tiles, if there are.
extern "C" __attribute__((visibility("default"))) void herdling_packed_integers(const int8_t* a, const Weight* weight,
                                                                                int32_t* out, int64_t M, int many) {
  const Weight& w = *weight;
  Scratch scratch;
  Rows all = Rows::in(scratch.take(Rows::bytes(M, w)), M, w);
  for (int64_t m = 0; m < M; m++) {
    std::fill_n(all.a + m * all.depth, all.depth, 0);
    std::copy_n(a + m * w.K, w.K, all.a + m * all.depth);
    start_sums(all, m, w);
  }
  by_kind(w.kind, [&](auto constant) {
    constexpr int kind = decltype(constant)::value;
    for (int64_t panel = 0; panel < w.panels(); panel++)
      for (int64_t m = 0, taken = 1; m < M; m += taken) {
        Rows rows = all.from(m);
        const uint8_t* p = w.panel(panel);
        auto each = [&](int64_t g, int64_t i, Ints v) {
          int32_t sums[16];
          put(sums, v);
          int64_t count = std::min<int64_t>(16, w.N - panel * 16);
          std::copy_n(sums, count, out + ((m + i) * w.groups() + g) * w.N + panel * 16);
        };
        const int64_t left = M - m;
#ifdef HERDLING_TILES
        if (many && tiles_allowed()) {
          taken = std::min(left, kMostRows);
          struct Raw {
            decltype(each)& put;
            int64_t first, M;
            void start() {}
            __attribute__((noinline)) void operator()(int64_t g, int i, Ints v) {
              if (first + i < M) put(g, first + i, v);
            }
            void finish(int64_t, int64_t) { first += 16; }
          } raw{each, 0, taken};
          panel_tiles<Block<kind>::steps>(rows, taken, w.group ? w.group : rows.depth, p, Decode<kind>{}, raw);
          continue;
        }
#endif
        if (left >= 4) taken = 4, panel_integers<kind, 4>(rows, w, p, each);
        else if (left >= 2) taken = 2, panel_integers<kind, 2>(rows, w, p, each);
        else taken = 1, panel_integers<kind, 1>(rows, w, p, each);
      }
  });
}

extern "C" __attribute__((visibility("default"))) const char* herdling_integer_features() {
#if defined(HERDLING_TILES)
  return tiles_allowed() ? "avx512-vnni, amx-int8" : "avx512-vnni";
#elif defined(__AVX512VNNI__)
  return "avx512-vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "plain";
#endif
}
