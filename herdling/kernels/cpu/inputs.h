// Rows of activations in every form that the weights they are to meet ask for.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "packed.h"
#include "pool.h"

namespace herdling {

inline float silu(float x) { return x / (1 + std::exp(-x)); }

template <class T>
int64_t output_bytes(const Weight& w) {
  return w.kind == kPlain ? w.K * int64_t(sizeof(T)) : w.panel_bytes() / 16;
}

// Lives in its thread for good, so that memory is taken once; others may read while it is not filled.
template <class T>
class Inputs {
 public:
  // Rows 0..M of K numbers value(m, k) for these weights; null ones are skipped.
  template <class Value>
  void fill(int64_t M, int64_t K, std::initializer_list<const Weight*> weights, int threads, Value value) {
    forms_.clear(), plain_ = nullptr, M_ = M;
    size_t bytes = 0;
    bool plain = false;
    for (const Weight* w : weights) {
      if (w && w->kind == kPlain) plain = true;
      if (!w || w->kind == kPlain || form(*w)) continue;
      forms_.push_back({*w, {}, bytes});
      bytes += (Rows::bytes(M, *w) + 63) / 64 * 64;
    }
    auto* memory = static_cast<char*>(scratch_.take(bytes + (plain ? M * padded<T>(K) * sizeof(float) : 0) + 64));
    for (Form& f : forms_) f.rows = Rows::in(memory + f.at, M, f.weight);
    if (plain) plain_ = reinterpret_cast<float*>(memory + bytes);
    parallel(M > 4 ? threads : 1, M, [&](int64_t m) {
      if (plain_) prepare_row<T>([&](int64_t k) { return value(m, k); }, plain_ + m * padded<T>(K), K);
      if (forms_.empty()) return;
      thread_local Scratch own;
      auto* wide = static_cast<float*>(own.take(K * sizeof(float)));
      for (int64_t k = 0; k < K; k++) wide[k] = value(m, k);
      for (Form& f : forms_) put_row(wide, f.rows, m, f.weight);
    });
  }

  // store(m, n, value) for outputs begin..end of a weight that the rows were made for; begin a multiple of 16.
  template <class Store>
  void times(const Weight& w, int64_t begin, int64_t end, Store store) const {
    if (w.kind == kPlain)
      return dot_block<T>(plain_, padded<T>(w.K), M_, static_cast<const T*>(w.data), w.K, begin, end, store);
    product(form(w)->rows, M_, w, begin / 16, (end + 15) / 16, store);
  }

 private:
  struct Form {
    Weight weight;
    Rows rows;
    size_t at;
  };
  const Form* form(const Weight& w) const {
    for (const Form& f : forms_)
      if (Rows::alike(f.weight, w)) return &f;
    return nullptr;
  }

  Scratch scratch_;
  std::vector<Form> forms_;
  float* plain_ = nullptr;
  int64_t M_ = 0;
};

// Chunks of the outputs of one weight, in whole panels.
template <class T>
Chunks output_chunks(const Weight& w, int threads) {
  return Chunks(w.N, 16, output_bytes<T>(w), threads);
}

template <class T>
Weight plain(const T* w, int64_t N, int64_t K) {
  return {w, nullptr, N, K, 0, kPlain, 0, 0};
}

// down(silu(gate(x)) * up(x)) of M rows, in phases that can share a parallel region with other work.
template <class T>
class Swiglu {
 public:
  void start(const Inputs<T>& rows, const Weight& gate, const Weight& up, const Weight& down, int64_t M,
             int threads) {
    rows_ = &rows, gate_ = gate, up_ = up, down_ = down, M_ = M;
    inner_ = Chunks(gate.N, 16, output_bytes<T>(gate) + output_bytes<T>(up), threads);
    outer_ = output_chunks<T>(down, threads);
    gated_ = static_cast<float*>(scratch_.take(M * gate.N * sizeof(float)));
  }
  int64_t firsts() const { return inner_.count; }
  int64_t seconds() const { return outer_.count; }
  void first(int64_t i) {
    const int64_t F = gate_.N, begin = i * inner_.size, end = std::min(F, begin + inner_.size);
    float* gated = gated_;
    rows_->times(gate_, begin, end, [&](int64_t m, int64_t n, float v) { gated[m * F + n] = v; });
    rows_->times(up_, begin, end, [&](int64_t m, int64_t n, float v) {
      float& g = gated[m * F + n];
      g = silu(g) * v;
    });
  }
  void middle(int threads) {
    const int64_t F = gate_.N;
    acts_.fill(M_, F, {&down_}, threads, [&](int64_t m, int64_t f) { return gated_[m * F + f]; });
  }
  template <class Store>
  void second(int64_t i, Store store) const {
    acts_.times(down_, i * outer_.size, std::min(down_.N, (i + 1) * outer_.size), store);
  }

 private:
  const Inputs<T>* rows_ = nullptr;
  Weight gate_{}, up_{}, down_{};
  int64_t M_ = 0;
  Chunks inner_{0, 1, 1, 1}, outer_{0, 1, 1, 1};
  Scratch scratch_;
  float* gated_ = nullptr;
  Inputs<T> acts_;
};

}  // namespace herdling
