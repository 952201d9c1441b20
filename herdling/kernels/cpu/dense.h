// Products of a few rows with a large matrix, in float32 or bfloat16, at the speed of memory.
//
// dot_*: weights as nn.Linear keeps them, W (N, K): y = x @ W^T; each output is a dot product along a row.
// col_*: weights as fused experts keep them, W (K, N): y = x @ W; a strip of columns is summed row by row.
// Sums are float32. bfloat16 goes through the dot-product instruction where the machine has one
// (products exact, rounded once a pair), else it is widened to float32.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "vector.h"

namespace herdling {

template <class T>
struct Inner {  // how T is multiplied: type of the prepared activations and elements a step
  using X = float;
  using V = vfloat;
  static constexpr int step = kLanes;
  static V load_w(const T* p) { return load(p); }
  static V load_x(const X* p) { return load(p); }
  static vfloat fma(vfloat a, V x, V w) { return a + x * w; }
};

#ifdef HERDLING_BF16_DOT
template <>
struct Inner<bf16> {
  using X = bf16;
  using V = __m512bh;
  static constexpr int step = 32;
  static V load_w(const bf16* p) { return (V)_mm512_loadu_si512(p); }
  static V load_x(const bf16* p) { return (V)_mm512_loadu_si512(p); }
  static vfloat fma(vfloat a, V x, V w) { return (vfloat)_mm512_dpbf16_ps((__m512)a, x, w); }
};
#endif

template <class T>
using Prepared = typename Inner<T>::X;

// Activations (M, K) as the products want them: widened if need be, rows padded with zeros.
template <class T>
int64_t padded(int64_t K) {
  return (K + Inner<T>::step - 1) / Inner<T>::step * Inner<T>::step;
}

template <class T, class F>
void prepare_row(F value, Prepared<T>* out, int64_t K) {
  for (int64_t k = 0; k < K; k++) out[k] = narrow<Prepared<T>>(value(k));
  for (int64_t k = K; k < padded<T>(K); k++) out[k] = Prepared<T>{};
}

template <class T>
constexpr int64_t kAhead = 512 / sizeof(T);  // elements between a read and its prefetch

// RM rows of x times RN rows of W: out[m][n].
template <class T, int RM, int RN>
inline void dot_tile(const Prepared<T>* x, int64_t x_stride, const T* w, int64_t K, float (*out)[RN]) {
  using I = Inner<T>;
  vfloat acc[RM][RN] = {};
  int64_t k = 0;
  for (; k + I::step <= K; k += I::step) {
    typename I::V wv[RN];
    const int64_t ahead = k + kAhead<T>;  // goes over to the next tile at the end of the rows
    const T* soon = w + (ahead < K ? ahead : ahead + (RN - 1) * K);
#pragma GCC unroll 8
    for (int n = 0; n < RN; n++) {
      wv[n] = I::load_w(w + n * K + k);
      prefetch(soon + n * K);
    }
#pragma GCC unroll 8
    for (int m = 0; m < RM; m++) {
      typename I::V xv = I::load_x(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < RN; n++) acc[m][n] = I::fma(acc[m][n], xv, wv[n]);
    }
  }
  if (k < K) {  // the last elements of a row, padded so that no load passes its end
    T rest[I::step];
    for (int n = 0; n < RN; n++) {
      memset(rest, 0, sizeof rest);
      memcpy(rest, w + n * K + k, (K - k) * sizeof(T));
      for (int m = 0; m < RM; m++)
        acc[m][n] = I::fma(acc[m][n], I::load_x(x + m * x_stride + k), I::load_w(rest));
    }
  }
  sums<RM * RN>(acc[0], out[0]);
}

template <class T, int RM, class Store>
inline void dot_rows(const Prepared<T>* x, int64_t x_stride, const T* w, int64_t K, int64_t m, int64_t n0,
                     int64_t n1, Store store) {
  constexpr int RN = RM == 1 ? 8 : kTile / 4 * 4 / RM > 4 ? 4 : kTile / RM;
  float out[RM][RN], last[RM][1];
  int64_t n = n0;
  for (; n + RN <= n1; n += RN) {
    dot_tile<T, RM, RN>(x + m * x_stride, x_stride, w + n * K, K, out);
    for (int i = 0; i < RM; i++)
      for (int j = 0; j < RN; j++) store(m + i, n + j, out[i][j]);
  }
  for (; n < n1; n++) {
    dot_tile<T, RM, 1>(x + m * x_stride, x_stride, w + n * K, K, last);
    for (int i = 0; i < RM; i++) store(m + i, n, last[i][0]);
  }
}

// All M rows times rows n0..n1 of W, each given to store(m, n, value). W is read from memory once.
template <class T, class Store>
void dot_block(const Prepared<T>* x, int64_t x_stride, int64_t M, const T* w, int64_t K, int64_t n0,
               int64_t n1, Store store) {
  constexpr int64_t kRows = 8;  // of W, kept in the first-level cache while the rows of x pass
  for (int64_t n = n0; n < n1; n += kRows) {
    int64_t end = std::min(n + kRows, n1), m = 0;
    for (; m + 4 <= M; m += 4) dot_rows<T, 4>(x, x_stride, w, K, m, n, end, store);
    switch (M - m) {
      case 3: dot_rows<T, 3>(x, x_stride, w, K, m, n, end, store); break;
      case 2: dot_rows<T, 2>(x, x_stride, w, K, m, n, end, store); break;
      case 1: dot_rows<T, 1>(x, x_stride, w, K, m, n, end, store); break;
    }
  }
}

constexpr int64_t kDeep = 16;    // rows of W between two visits of the sums; even
constexpr int64_t kStrip = 256;  // columns whose weights stay in the first-level cache while rows of x pass

// sums[m][c] += x[m][k] * w[k][c] for RM rows, NV vectors of columns, `deep` rows of W.
template <class T, int RM, int NV>
struct Column {
  static constexpr int width = NV * kLanes;
  static void run(const Prepared<T>* x, int64_t x_stride, const T* w, int64_t N, int64_t deep, float* sums,
                  int64_t stride) {
    vfloat acc[RM][NV] = {};  // added to the sums at the end: short chains round less
    for (int64_t k = 0; k < deep; k++) {
      const T* row = w + k * N;
      for (int c = 0; c < width; c += 64 / sizeof(T)) prefetch(row + kAhead<T> + c);
      vfloat wv[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) wv[v] = load(row + v * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < RM; m++) {
        vfloat xv = splat(widen(x[m * x_stride + k]));
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) acc[m][v] += xv * wv[v];
      }
    }
    for (int m = 0; m < RM; m++)
      for (int v = 0; v < NV; v++) {
        float* p = sums + m * stride + v * kLanes;
        store(p, load(p) + acc[m][v]);
      }
  }
};

#ifdef HERDLING_BF16_DOT
// Two rows of W are woven into pairs along K; the weave permutes columns inside a block of 32, which
// the sums keep (columns `weave` tells) until they are read.
template <int RM, int NV>
struct Column<bf16, RM, NV> {
  static constexpr int width = NV * kLanes;
  static void run(const bf16* x, int64_t x_stride, const bf16* w, int64_t N, int64_t deep, float* sums,
                  int64_t stride) {
    vfloat acc[RM][NV] = {};
    for (int64_t k = 0; k < deep; k += 2) {
      const bf16* row = w + k * N;
      for (int c = 0; c < width; c += 32) {
        prefetch(row + kAhead<bf16> + c);
        prefetch(row + N + kAhead<bf16> + c);
      }
      bool pair = k + 1 < deep;
      int pairs[RM];  // bits of x[k], x[k + 1]
      for (int m = 0; m < RM; m++) {
        const bf16* p = x + m * x_stride + k;
        pairs[m] = int(p[0].bits | (pair ? uint32_t(p[1].bits) << 16 : 0));
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; v += 2) {
        __m512i a = _mm512_loadu_si512(row + v * kLanes);
        __m512i b = pair ? _mm512_loadu_si512(row + N + v * kLanes) : _mm512_setzero_si512();
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
        for (int m = 0; m < RM; m++) {
          __m512bh xv = (__m512bh)_mm512_set1_epi32(pairs[m]);
          acc[m][v] = Inner<bf16>::fma(acc[m][v], xv, low);
          acc[m][v + 1] = Inner<bf16>::fma(acc[m][v + 1], xv, high);
        }
      }
    }
    for (int m = 0; m < RM; m++)
      for (int v = 0; v < NV; v++) {
        float* p = sums + m * stride + v * kLanes;
        store(p, load(p) + acc[m][v]);
      }
  }
};

inline void unweave(float* sums, int64_t width) {
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t c = 0; c + 32 <= width; c += 32) {
    __m512 low = _mm512_loadu_ps(sums + c), high = _mm512_loadu_ps(sums + c + 16);
    _mm512_storeu_ps(sums + c, _mm512_permutex2var_ps(low, left, high));
    _mm512_storeu_ps(sums + c + 16, _mm512_permutex2var_ps(low, right, high));
  }
}
constexpr int kNarrow = 2;
#else
constexpr int kNarrow = 1;
#endif

// Columns c..width in tiles of NV vectors; says how far it came.
template <class T, int RM, int NV>
inline int64_t col_tiles(const Prepared<T>* x, int64_t x_stride, const T* w, int64_t N, int64_t deep,
                         float* sums, int64_t stride, int64_t c, int64_t width) {
  using C = Column<T, RM, NV>;
  for (; c + C::width <= width; c += C::width) C::run(x, x_stride, w + c, N, deep, sums + c, stride);
  return c;
}

template <class T, int RM>
inline void col_rows(const Prepared<T>* x, int64_t x_stride, const T* w, int64_t N, int64_t deep,
                     float* sums, int64_t stride, int64_t width) {
  int64_t c = col_tiles<T, RM, kTile / RM>(x, x_stride, w, N, deep, sums, stride, 0, width);
  c = col_tiles<T, RM, kNarrow>(x, x_stride, w, N, deep, sums, stride, c, width);
  for (int64_t k = 0; k < deep; k++)
    for (int m = 0; m < RM; m++) {
      float xv = widen(x[m * x_stride + k]);
      for (int64_t j = c; j < width; j++) sums[m * stride + j] += xv * widen(w[k * N + j]);
    }
}

// sums (M, N) = x (M, K) @ W (K, N): W is read in the order of memory, once. The order of each sum depends
// on K alone, so a row's result does not depend on the rows beside it.
template <class T>
void col_block(const Prepared<T>* x, int64_t x_stride, int64_t M, const T* w, int64_t K, int64_t N,
               float* sums) {
  std::fill_n(sums, M * N, 0.f);
  for (int64_t k = 0; k < K; k += kDeep) {
    int64_t deep = std::min(kDeep, K - k);
    for (int64_t c = 0; c < N; c += kStrip) {
      int64_t width = std::min(kStrip, N - c), m = 0;
      const T* block = w + k * N + c;
      for (; m + 4 <= M; m += 4)
        col_rows<T, 4>(x + m * x_stride + k, x_stride, block, N, deep, sums + m * N + c, N, width);
      for (; m + 2 <= M; m += 2)
        col_rows<T, 2>(x + m * x_stride + k, x_stride, block, N, deep, sums + m * N + c, N, width);
      if (m < M) col_rows<T, 1>(x + m * x_stride + k, x_stride, block, N, deep, sums + m * N + c, N, width);
    }
  }
#ifdef HERDLING_BF16_DOT
  if (sizeof(T) == 2)
    for (int64_t m = 0; m < M; m++) unweave(sums + m * N, N);
#endif
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
