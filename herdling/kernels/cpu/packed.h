// Products of a few rows with packed matrices: rows as int8 or floats, panels of 16 outputs at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dense.h"
#include "weight.h"

namespace herdling {

constexpr int64_t kMostRows = 64;  // of one pass over a panel

// Activations (M, depth): int8 with a scale a row and, for each group of each row, minus what codes hold too
// much times the sum; or floats. Memory is there for whole tiles of 16 rows.
struct Rows {
  int8_t* a = nullptr;
  float *wide = nullptr, *scales = nullptr;
  int32_t* starts = nullptr;
  int64_t depth = 0, groups = 0;

  Rows from(int64_t row) const {
    Rows r = *this;
    if (wide) r.wide += row * depth;
    else r.a += row * depth, r.scales += row, r.starts += row * groups;
    return r;
  }
  static int64_t whole(int64_t M) { return (M + 15) / 16 * 16; }
  static size_t bytes(int64_t M, const Weight& w) {
    return whole(M) * (w.floats ? 4 * w.depth() : w.depth() + 4 + 4 * w.groups()) + 128;
  }
  static Rows in(void* memory, int64_t M, const Weight& w) {
    Rows r;
    r.depth = w.depth(), r.groups = w.groups();
    if (w.floats) {
      r.wide = static_cast<float*>(memory);
      return r;
    }
    r.a = static_cast<int8_t*>(memory);
    r.scales = reinterpret_cast<float*>(r.a + (whole(M) * r.depth + 63) / 64 * 64);
    r.starts = reinterpret_cast<int32_t*>(r.scales + whole(M));
    return r;
  }
  // Whether rows made for one weight serve another one as well.
  static bool alike(const Weight& a, const Weight& b) {
    return a.kind == b.kind && a.group == b.group && a.floats == b.floats && a.K == b.K;
  }
};

void start_sums(const Rows& rows, int64_t m, const Weight& w);

// Row m from floats: as they are, or scale max|x| / 127 and codes to nearest, ties to even.
void put_row(const float* x, const Rows& rows, int64_t m, const Weight& w);

// out (M, 16) of one panel, scales of weights and rows included; M <= kMostRows.
void panel_product(const Rows& rows, int64_t M, const Weight& w, int64_t panel, float (*out)[16]);

// store(m, n, value) for all M rows and the outputs of panels begin..end.
template <class Store>
void product(const Rows& rows, int64_t M, const Weight& w, int64_t begin, int64_t end, Store store) {
  alignas(64) float out[kMostRows][16];
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t m = 0; m < M; m += kMostRows) {
      const int64_t taken = std::min(kMostRows, M - m), count = std::min<int64_t>(16, w.N - panel * 16);
      panel_product(rows.from(m), taken, w, panel, out);
      for (int64_t i = 0; i < taken; i++)
        for (int64_t n = 0; n < count; n++) store(m + i, panel * 16 + n, out[i][n]);
    }
}

}  // namespace herdling
