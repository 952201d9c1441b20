// Products of a few rows with a large matrix, in float32 or bfloat16, at the speed of memory.
//
// dot_*: weights as nn.Linear keeps them, W (N, K): y = x @ W^T; each output is a dot product along a row.
// col_*: weights as fused experts keep them, W (K, N): y = x @ W; a strip of columns is summed row by row.
// Activations and sums are float32. bfloat16 weights are widened two vectors at a time, the even and the odd
// ones (a shift, a mask): products in bfloat16 itself take four times as long as float32's where there are any.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "vector.h"

namespace herdling {

// One step along the memory of W: so many vectors of floats, whose order Step<T>::place tells.
template <class T>
struct Step {
  static constexpr int vectors = 1, width = kLanes;
  static void load(const T* p, vfloat* out) { out[0] = herdling::load(p); }
  static int64_t place(int64_t k) { return k; }
};

template <>
struct Step<bf16> {
  static constexpr int vectors = 2, width = 2 * kLanes;
  static void load(const bf16* p, vfloat* out) {
    vuint pairs;
    memcpy(&pairs, p, sizeof pairs);
    out[0] = (vfloat)(pairs << 16), out[1] = (vfloat)(pairs & 0xffff0000u);
  }
  static int64_t place(int64_t k) {  // where element k stands among the floats: even ones, odd ones
    const int64_t in = k % width;
    return k - in + in / 2 + in % 2 * kLanes;
  }
};

// Length of a row of activations of dot_*, which stand in the order of Step and end in zeros.
template <class T>
int64_t padded(int64_t K) {
  return (K + Step<T>::width - 1) / Step<T>::width * Step<T>::width;
}

template <class T, class F>
void prepare_row(F value, float* out, int64_t K) {
  constexpr int width = Step<T>::width;
  int64_t k = 0;
  for (; k + width <= K; k += width)
    for (int i = 0; i < width; i++) out[k + Step<T>::place(i)] = value(k + i);
  for (int i = 0; k < padded<T>(K) && i < width; i++) out[k + Step<T>::place(i)] = k + i < K ? value(k + i) : 0.f;
}

constexpr int64_t kRows = 8;  // of W, kept in the first-level cache while the rows of x pass

template <class T>
constexpr int64_t kAhead = 512 / sizeof(T);  // elements between a read and its prefetch

// acc[m][n] += x[m][..] * w[n][..], one step of W. Every loop is unrolled: sums indexed by a variable would live in
// memory.
template <class T, int RM, int RN, class Place>
inline void dot_step(const float* x, int64_t x_stride, Place w, vfloat (*acc)[RN]) {
  using S = Step<T>;
#pragma GCC unroll 8
  for (int n = 0; n < RN; n++) {
    vfloat wv[S::vectors];
    S::load(w(n), wv);
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++)
#pragma GCC unroll 2
      for (int v = 0; v < S::vectors; v++) acc[m][n] += load(x + m * x_stride + v * kLanes) * wv[v];
  }
}

struct Pass {  // of the rows of x over one block of rows of W
  int64_t number, count;
};

// RM rows of x times RN rows of W: out[m][n].
template <class T, int RM, int RN>
inline void dot_tile(const float* x, int64_t x_stride, const T* w, int64_t K, Pass pass, float (*out)[RN]) {
  constexpr int width = Step<T>::width;
  vfloat acc[RM][RN] = {};
  int64_t k = 0;
  if (pass.count == 1) {
    for (; k + width <= K; k += width) {
      const int64_t ahead = k + kAhead<T>;  // goes over to the next tile at the end of the rows
      const T* soon = w + (ahead < K ? ahead : ahead + (RN - 1) * K);
      dot_step<T, RM, RN>(x + k, x_stride, [&](int n) {
        prefetch(soon + n * K);
        return w + n * K + k;
      }, acc);
    }
  } else {  // each pass fetches its share of the next block, so that memory never waits for products
    const T* soon[RN];
    for (int n = 0; n < RN; n++) soon[n] = w + (n % pass.count == pass.number ? n + kRows : n) * K;
    for (; k + width <= K; k += width)
      dot_step<T, RM, RN>(x + k, x_stride, [&](int n) {
        prefetch(soon[n] + k);
        return w + n * K + k;
      }, acc);
  }
  if (k < K) {  // the last elements of a row, padded so that no load passes its end
    T rest[RN][width];
    memset(rest, 0, sizeof rest);
    for (int n = 0; n < RN; n++) memcpy(rest[n], w + n * K + k, (K - k) * sizeof(T));
    dot_step<T, RM, RN>(x + k, x_stride, [&](int n) { return rest[n]; }, acc);
  }
  sums<RM * RN>(acc[0], out[0]);
}

template <class T, int RM, class Store>
inline void dot_rows(const float* x, int64_t x_stride, const T* w, int64_t K, int64_t m, int64_t n0, int64_t n1,
                     Pass pass, Store store) {
  constexpr int RN = RM == 1 ? 8 : kTile / 4 * 4 / RM > 4 ? 4 : kTile / RM;
  float out[RM][RN], last[RM][1];
  int64_t n = n0;
  for (; n + RN <= n1; n += RN) {
    dot_tile<T, RM, RN>(x + m * x_stride, x_stride, w + n * K, K, pass, out);
    for (int i = 0; i < RM; i++)
      for (int j = 0; j < RN; j++) store(m + i, n + j, out[i][j]);
  }
  for (; n < n1; n++) {
    dot_tile<T, RM, 1>(x + m * x_stride, x_stride, w + n * K, K, pass, last);
    for (int i = 0; i < RM; i++) store(m + i, n, last[i][0]);
  }
}

// All M rows times rows n0..n1 of W, each given to store(m, n, value). W is read from memory once.
template <class T, class Store>
void dot_block(const float* x, int64_t x_stride, int64_t M, const T* w, int64_t K, int64_t n0, int64_t n1,
               Store store) {
  for (int64_t n = n0; n < n1; n += kRows) {
    const int64_t end = std::min(n + kRows, n1);
    Pass pass{0, (M + 3) / 4};
    for (int64_t m = 0; m < M; m += 4, pass.number++) switch (M - m) {
        case 1: dot_rows<T, 1>(x, x_stride, w, K, m, n, end, pass, store); break;
        case 2: dot_rows<T, 2>(x, x_stride, w, K, m, n, end, pass, store); break;
        case 3: dot_rows<T, 3>(x, x_stride, w, K, m, n, end, pass, store); break;
        default: dot_rows<T, 4>(x, x_stride, w, K, m, n, end, pass, store);
      }
  }
}

constexpr int64_t kDeep = 16;    // rows of W between two visits of the sums
constexpr int64_t kStrip = 256;  // columns whose weights stay in the first-level cache while rows of x pass

// sums[m][c] += x[m][k] * w[k][c] for RM rows, NV vectors of columns, `deep` rows of W. `ahead` elements
// further stands what comes after this strip. Columns keep the order of Step until all sums are there.
template <class T, int RM, int NV>
inline void col_tile(const float* x, int64_t x_stride, const T* w, int64_t N, int64_t deep, int64_t ahead,
                     float* sums, int64_t stride) {
  constexpr int V = Step<T>::vectors;
  vfloat acc[RM][NV] = {};  // added to the sums at the end: short chains round less
  for (int64_t k = 0; k < deep; k++) {
    const T* row = w + k * N;
    for (int c = 0; c < NV * kLanes; c += 64 / sizeof(T)) prefetch(row + ahead + c);
    vfloat xv[RM];
#pragma GCC unroll 4
    for (int m = 0; m < RM; m++) xv[m] = splat(x[m * x_stride + k]);
#pragma GCC unroll 16
    for (int v = 0; v < NV; v += V) {
      vfloat wv[V];
      Step<T>::load(row + v * kLanes, wv);
#pragma GCC unroll 4
      for (int m = 0; m < RM; m++)
#pragma GCC unroll 2
        for (int i = 0; i < V; i++) acc[m][v + i] += xv[m] * wv[i];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < RM; m++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* p = sums + m * stride + v * kLanes;
      store(p, load(p) + acc[m][v]);
    }
}

// Columns c..width in tiles of NV vectors; says how far it came.
template <class T, int RM, int NV>
inline int64_t col_tiles(const float* x, int64_t x_stride, const T* w, int64_t N, int64_t deep, int64_t ahead,
                         float* sums, int64_t stride, int64_t c, int64_t width) {
  for (; c + NV * kLanes <= width; c += NV * kLanes)
    col_tile<T, RM, NV>(x, x_stride, w + c, N, deep, ahead, sums + c, stride);
  return c;
}

template <class T, int RM>
inline void col_rows(const float* x, int64_t x_stride, const T* w, int64_t N, int64_t deep, int64_t ahead,
                     float* sums, int64_t stride, int64_t width) {
  constexpr int kNarrow = Step<T>::vectors;
  int64_t c = col_tiles<T, RM, kTile / RM>(x, x_stride, w, N, deep, ahead, sums, stride, 0, width);
  c = col_tiles<T, RM, kNarrow>(x, x_stride, w, N, deep, ahead, sums, stride, c, width);
  for (int64_t k = 0; k < deep; k++)
    for (int m = 0; m < RM; m++) {
      float xv = x[m * x_stride + k];
      for (int64_t j = c; j < width; j++) sums[m * stride + j] += xv * widen(w[k * N + j]);
    }
}

// sums (M, N) = x (M, K) @ W (K, N): W is read in the order of memory, once. The order of each sum depends
// on K alone, so a row's result does not depend on the rows beside it.
template <class T>
void col_block(const float* x, int64_t x_stride, int64_t M, const T* w, int64_t K, int64_t N, float* sums) {
  std::fill_n(sums, M * N, 0.f);
  for (int64_t k = 0; k < K; k += kDeep) {
    int64_t deep = std::min(kDeep, K - k);
    for (int64_t c = 0; c < N; c += kStrip) {
      int64_t width = std::min(kStrip, N - c), m = 0;
      const int64_t ahead = c + kStrip < N ? kStrip : kDeep * N - c;  // the next strip, beside or below
      const T* block = w + k * N + c;
      auto rows = [&](auto count) {
        constexpr int RM = decltype(count)::value;
        col_rows<T, RM>(x + m * x_stride + k, x_stride, block, N, deep, ahead, sums + m * N + c, N, width);
        m += RM;
      };
      while (m + 4 <= M) rows(std::integral_constant<int, 4>{});
      while (m + 2 <= M) rows(std::integral_constant<int, 2>{});
      if (m < M) rows(std::integral_constant<int, 1>{});
    }
  }
  constexpr int width = Step<T>::width;
  if (Step<T>::vectors == 1) return;
  for (int64_t m = 0; m < M; m++)
    for (int64_t c = 0; c + width <= N; c += width) {
      float woven[width], *p = sums + m * N + c;
      memcpy(woven, p, sizeof woven);
      for (int i = 0; i < width; i++) p[i] = woven[Step<T>::place(i)];
    }
}

// K cut into parts that threads take one by one; a matter of K alone, like the order of sums.
struct Parts {
  int64_t K, size, count;
  explicit Parts(int64_t K) : K(K) {
    size = std::max<int64_t>(32, (K / 16 + kDeep - 1) / kDeep * kDeep);
    count = (K + size - 1) / size;
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const { return std::min(size, K - part * size); }
};

// Memory of the calling thread that the next call reuses.
class Scratch {
 public:
  void* take(size_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = aligned_alloc(64, size_);
    }
    return memory_;
  }
  ~Scratch() { free(memory_); }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace herdling
