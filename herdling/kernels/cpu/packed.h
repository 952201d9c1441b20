// Packed integer matrices: 8 bits with one scale an output, or 4 bits with one scale a group of inputs.
//
// Outputs stand in panels of 16. 8 bits: for every 4 inputs a block of 64 bytes, code + 128. 4 bits: for
// every 8 inputs a block of 64 bytes, code + 8: low nibbles inputs 0-3, high nibbles inputs 4-7. A panel is
// read once and in order. `integer.py` packs; padding (outputs to 16, inputs to the block or group) holds
// code 0 and meets activations that are 0.
#pragma once
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace herdling {

struct Matrix {
  const uint8_t* codes;
  const void* scales;  // 8 bits: float (panel, 16); 4 bits: float or half (panel, group, 16)
  int64_t N, K;
  int64_t group;  // inputs a scale; 0: 8 bits, one scale an output
  bool halves;

  int64_t panels() const { return (N + 15) / 16; }
  int64_t unit() const { return group ? group : 4; }
  int64_t groups() const { return group ? (K + group - 1) / group : 1; }
  int64_t depth() const { return (K + unit() - 1) / unit() * unit(); }  // K, padded
  int64_t panel_bytes() const { return depth() * (group ? 8 : 16); }
  Matrix at(int64_t expert) const {  // of several, one after the other
    Matrix m = *this;
    m.codes += expert * panels() * panel_bytes();
    m.scales = static_cast<const char*>(scales) + expert * panels() * groups() * 16 * (halves ? 2 : 4);
    return m;
  }
};

// Activations: int8 rows of `depth`, a scale a row, minus offset * sum for each group of each row.
struct Rows {
  int8_t* a;
  float* scales;
  int32_t* starts;
  int64_t depth, groups;
  Rows from(int64_t row) const { return {a + row * depth, scales + row, starts + row * groups, depth, groups}; }
  static size_t bytes(int64_t M, const Matrix& w) {
    return M * ((w.depth() + 63) / 64 * 64 + 4 + 4 * w.groups()) + 128;
  }
  static Rows in(void* memory, int64_t M, const Matrix& w) {
    auto* a = static_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(a + (M * w.depth() + 63) / 64 * 64);
    return {a, scales, reinterpret_cast<int32_t*>(scales + M), w.depth(), w.groups()};
  }
};

inline void start_sums(const Rows& rows, int64_t m, const Matrix& w) {
  const int64_t span = w.group ? w.group : w.depth();
  const int32_t offset = w.group ? 8 : kOffset8;
  for (int64_t g = 0; g < rows.groups; g++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < span; k++) sum += rows.a[m * rows.depth + g * span + k];
    rows.starts[m * rows.groups + g] = -offset * sum;
  }
}

// Row m of `rows` from floats: scale max|x| / 127, codes to nearest, ties to even.
inline void quantize(const float* x, const Rows& rows, int64_t m, const Matrix& w) {
  int32_t bits = 0;  // of the largest magnitude: without signs floats are ordered as integers are
  for (int64_t k = 0; k < w.K; k++) {
    int32_t b;
    memcpy(&b, x + k, 4);
    bits = std::max(bits, b & 0x7fffffff);
  }
  float most;
  memcpy(&most, &bits, 4);
  const float inverse = most > 0 ? 127 / most : 0;
  int8_t* a = rows.a + m * rows.depth;
  // Not by adding 1.5 * 2^23: that would be fused with the product, and round differently, on some machines.
  for (int64_t k = 0; k < w.K; k++) a[k] = int8_t(int32_t(std::rint(x[k] * inverse)));
  for (int64_t k = w.K; k < rows.depth; k++) a[k] = 0;
  rows.scales[m] = most / 127;
  start_sums(rows, m, w);
}

constexpr int64_t kFar = 2048;  // bytes between a read and its prefetch

// One panel times RM rows, group by group: each(group, row, integers of 16 outputs).
template <int RM, int Blocks, class Each>
inline void panel4(const Rows& rows, const uint8_t* p, int64_t group, Each each) {
  for (int64_t g = 0; g < rows.groups; g++) {
    Ints acc[RM];
    for (int m = 0; m < RM; m++) acc[m] = ints(rows.starts[m * rows.groups + g]);
    const int8_t* a = rows.a + g * group;
    const int64_t blocks = Blocks ? Blocks : group / 8;
#pragma GCC unroll 4
    for (int64_t b = 0; b < blocks; b++, p += 64, a += 8) {
      prefetch(p + kFar);
      Codes c = codes(p), first = low(c), second = high(c);
#pragma GCC unroll 8
      for (int m = 0; m < RM; m++) {
        acc[m] = dot4(acc[m], first, four(a + m * rows.depth));
        acc[m] = dot4(acc[m], second, four(a + m * rows.depth + 4));
      }
    }
    for (int m = 0; m < RM; m++) each(g, m, acc[m]);
  }
}

template <int RM, class Each>
inline void panel8(const Rows& rows, const uint8_t* p, Each each) {
  constexpr int Chains = RM == 1 ? 4 : 2;  // independent sums hide the latency of a product
  Ints acc[RM][Chains];
  for (int m = 0; m < RM; m++)
    for (int i = 0; i < Chains; i++) acc[m][i] = ints(i ? 0 : rows.starts[m]);
  const int64_t blocks = rows.depth / 4;
  int64_t b = 0;
  for (; b + Chains <= blocks; b += Chains)
#pragma GCC unroll 4
    for (int i = 0; i < Chains; i++, p += 64) {
      prefetch(p + kFar);
      Codes c = codes(p);
#pragma GCC unroll 8
      for (int m = 0; m < RM; m++) acc[m][i] = dot8(acc[m][i], c, four(rows.a + m * rows.depth + (b + i) * 4));
    }
  for (; b < blocks; b++, p += 64)
    for (int m = 0; m < RM; m++) acc[m][0] = dot8(acc[m][0], codes(p), four(rows.a + m * rows.depth + b * 4));
  for (int m = 0; m < RM; m++) {
    for (int i = 1; i < Chains; i++) acc[m][0] = add(acc[m][0], acc[m][i]);
    each(0, m, acc[m][0]);
  }
}

template <int RM, class Each>
inline void panel_rows(const Rows& rows, const Matrix& w, int64_t panel, Each each) {
  const uint8_t* p = w.codes + panel * w.panel_bytes();
  if (!w.group) panel8<RM>(rows, p, each);
  else if (w.group == 32) panel4<RM, 4>(rows, p, 32, each);
  else panel4<RM, 0>(rows, p, w.group, each);
}

template <int RM, class S>
inline void panel_floats(const Rows& rows, const Matrix& w, int64_t panel, const S* scales, float (*out)[16]) {
  Floats total[RM];
  for (int m = 0; m < RM; m++) total[m] = floats(0.f);
  scales += panel * w.groups() * 16;
  panel_rows<RM>(rows, w, panel, [&](int64_t g, int m, Ints v) {
    if (m == 0) prefetch(scales + (g + 16) * 16);  // a stream too thin for the machine's own prefetching
    total[m] = fma(v, floats(scales + g * 16), total[m]);
  });
  for (int m = 0; m < RM; m++) put(out[m], total[m]);
}

// store(m, n, value) for all M rows and the outputs of panels begin..end, activation scales included.
template <class Store>
void product(const Rows& rows, int64_t M, const Matrix& w, int64_t begin, int64_t end, Store store) {
  float out[4][16];
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t m = 0; m < M;) {
      int64_t left = M - m, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      Rows here = rows.from(m);
      auto run = [&](const auto* scales) {
        if (taken == 4) panel_floats<4>(here, w, panel, scales, out);
        else if (taken == 2) panel_floats<2>(here, w, panel, scales, out);
        else panel_floats<1>(here, w, panel, scales, out);
      };
      if (w.halves) run(static_cast<const half*>(w.scales));
      else run(static_cast<const float*>(w.scales));
      const int64_t count = std::min<int64_t>(16, w.N - panel * 16);
      for (int64_t i = 0; i < taken; i++)
        for (int64_t n = 0; n < count; n++) store(m + i, panel * 16 + n, out[i][n] * here.scales[i]);
      m += taken;
    }
}

}  // namespace herdling
