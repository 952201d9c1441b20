// Routed experts in phases that can share a parallel region with other work: rows sorted by expert, so that
// each chosen expert's weights are read once.
//
//     bank.first(i), i < bank.firsts();  bank.middle(m), m < bank.middles();  bank.second(i), i < bank.seconds();
//     bank.finish(n, out): out(d, sum over the token's k experts), n < N
//
// Shape letters: N tokens, M = N * k routed rows, D width, F inner width, E experts.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "inputs.h"

namespace herdling {

struct Group {  // the rows that chose one expert, or some of them
  int64_t expert, first, count;
};

// Routed rows sorted by expert, cut into groups of at most so many; `chosen` null: all of them expert 0.
inline std::vector<Group> sort_rows(const int64_t* chosen, int64_t M, int64_t E, int64_t most,
                                    std::vector<int64_t>& order) {
  std::vector<int64_t> ends(E + 1, 0);
  auto expert = [&](int64_t r) { return chosen ? chosen[r] : 0; };
  for (int64_t r = 0; r < M; r++) ends[expert(r) + 1]++;
  for (int64_t e = 0; e < E; e++) ends[e + 1] += ends[e];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  order.resize(M);
  for (int64_t r = 0; r < M; r++) order[next[expert(r)]++] = r;
  std::vector<Group> groups;
  for (int64_t e = 0; e < E; e++)
    for (int64_t a = ends[e]; a < ends[e + 1]; a += most) groups.push_back({e, a, std::min(most, ends[e + 1] - a)});
  return groups;
}

// Fused tensors gate_up (E, D, 2F) and down (E, F, D): partial sums of gate|up over parts of D, then their
// totals, SwiGLU and partial sums of the output over parts of F. Weights are read in the order of memory.
template <class T>
class PlainExperts {
 public:
  PlainExperts(Scratch& scratch, const T* x, const int64_t* chosen, const T* gates, const T* gate_up, const T* down,
               int64_t N, int64_t k, int64_t E, int64_t D, int64_t F, int threads)
      : k_(k), D_(D), F_(F), wide_(D), narrow_(F), gate_up_(gate_up), down_(down) {
    const int64_t M = N * k;
    groups_ = sort_rows(chosen, M, E, 16, order_);  // the sums of more rows would leave the caches
    const size_t hidden = wide_.count * M * 2 * F, out = narrow_.count * M * D;
    rows_ = static_cast<float*>(scratch.take((M * D + hidden + out) * sizeof(float)));
    hidden_ = rows_ + M * D;      // (group, part, row, 2F)
    partial_ = hidden_ + hidden;  // (group, part, row, D)
    parallel(M > 4 ? threads : 1, M, [&](int64_t i) {
      const T* token = x + order_[i] / k * D;
      const float gate = widen(gates[order_[i]]);
      // The scaled row is rounded to its type, as a tensor of it would be.
      for (int64_t d = 0; d < D; d++) rows_[i * D + d] = widen(narrow<T>(widen(token[d]) * gate));
    });
    firsts_.resize(M), strides_.resize(M);
    for (const Group& g : groups_)
      for (int64_t m = 0; m < g.count; m++) {
        firsts_[order_[g.first + m]] = partial_ + (g.first * narrow_.count + m) * D;
        strides_[order_[g.first + m]] = g.count * D;
      }
  }

  int64_t firsts() const { return groups_.size() * wide_.count; }
  int64_t middles() const { return 0; }
  int64_t seconds() const { return groups_.size() * narrow_.count; }

  void first(int64_t i) {
    const Group& g = groups_[i / wide_.count];
    const int64_t part = i % wide_.count, d = wide_.begin(part);
    col_block<T>(rows_ + g.first * D_ + d, D_, g.count, gate_up_ + (g.expert * D_ + d) * 2 * F_, wide_.length(part),
                 2 * F_, hidden_ + (g.first * wide_.count + part * g.count) * 2 * F_);
  }

  void middle(int64_t) {}

  void second(int64_t i) {
    thread_local Scratch own;
    const Group& g = groups_[i / narrow_.count];
    const int64_t part = i % narrow_.count, f = narrow_.begin(part), n = narrow_.length(part);
    auto* act = static_cast<float*>(own.take((g.count + 2) * n * sizeof(float)));
    float *gate = act + g.count * n, *up = gate + n;
    for (int64_t m = 0; m < g.count; m++) {
      const float* sums = hidden_ + (g.first * wide_.count + m) * 2 * F_ + f;
      std::copy_n(sums, n, gate);
      std::copy_n(sums + F_, n, up);
      for (int64_t p = 1; p < wide_.count; p++) {
        sums += g.count * 2 * F_;
        for (int64_t j = 0; j < n; j++) gate[j] += sums[j];
        for (int64_t j = 0; j < n; j++) up[j] += sums[F_ + j];
      }
      for (int64_t j = 0; j < n; j++) act[m * n + j] = silu(gate[j]) * up[j];
    }
    col_block<T>(act, n, g.count, down_ + (g.expert * F_ + f) * D_, n, D_,
                 partial_ + (g.first * narrow_.count + part * g.count) * D_);
  }

  template <class Out>
  void finish(int64_t n, Out out) {
    thread_local Scratch own;
    auto* total = static_cast<float*>(own.take(D_ * sizeof(float)));
    std::fill_n(total, D_, 0.f);
    for (int64_t r = n * k_; r < (n + 1) * k_; r++)
      for (int64_t p = 0; p < narrow_.count; p++) {
        const float* sums = firsts_[r] + p * strides_[r];
        for (int64_t d = 0; d < D_; d++) total[d] += sums[d];
      }
    for (int64_t d = 0; d < D_; d++) out(d, total[d]);
  }

 private:
  int64_t k_, D_, F_;
  Parts wide_, narrow_;
  const T *gate_up_, *down_;
  std::vector<int64_t> order_, strides_;
  std::vector<const float*> firsts_;
  std::vector<Group> groups_;
  float *rows_, *hidden_, *partial_;
};

// Packed gate_up (E, 2F outputs, gate first) and down (E, D outputs). Rows become int8, where they do, after
// the gate; inner activations again.
template <class T>
class PackedExperts {
 public:
  PackedExperts(Scratch& scratch, const T* x, const int64_t* chosen, const T* gates, const Weight& gate_up,
                const Weight& down, int64_t N, int64_t k, int64_t E, int threads)
      : k_(k), D_(down.N), F_(down.K), M_(N * k), gate_up_(gate_up), down_(down), inner_(0, 1, 1, 1),
        outer_(0, 1, 1, 1) {
    groups_ = sort_rows(chosen, M_, E, kMostRows, order_);
    const size_t rows = (Rows::bytes(M_, gate_up) + 63) / 64 * 64, acts = (Rows::bytes(M_, down) + 63) / 64 * 64;
    auto* memory = static_cast<char*>(scratch.take(rows + acts + M_ * (2 * F_ + D_) * sizeof(float)));
    rows_ = Rows::in(memory, M_, gate_up), acts_ = Rows::in(memory + rows, M_, down);
    hidden_ = reinterpret_cast<float*>(memory + rows + acts);  // (M, 2F)
    parts_ = hidden_ + M_ * 2 * F_;                             // (M, D) by routed row
    const int each = std::max<int64_t>(1, threads / std::max<int64_t>(1, groups_.size()));
    inner_ = Chunks(gate_up.panels(), 1, gate_up.panel_bytes(), each);
    outer_ = Chunks(down.panels(), 1, down.panel_bytes(), each);
    parallel(M_ > 4 ? threads : 1, M_, [&](int64_t i) {
      thread_local Scratch own;
      const int64_t K = gate_up_.K;
      auto* wide = static_cast<float*>(own.take(K * sizeof(float)));
      const T* token = x + order_[i] / k_ * K;
      const float gate = gates ? widen(gates[order_[i]]) : 1.f;
      for (int64_t d = 0; d < K; d++) wide[d] = widen(narrow<T>(widen(token[d]) * gate));
      put_row(wide, rows_, i, gate_up_);
    });
  }

  int64_t firsts() const { return groups_.size() * inner_.count; }
  int64_t middles() const { return M_; }
  int64_t seconds() const { return groups_.size() * outer_.count; }

  void first(int64_t i) {
    const Group& g = groups_[i / inner_.count];
    const int64_t begin = i % inner_.count * inner_.size, end = std::min(gate_up_.panels(), begin + inner_.size);
    product(rows_.from(g.first), g.count, gate_up_.at(g.expert), begin, end,
            [&](int64_t m, int64_t n, float v) { hidden_[(g.first + m) * 2 * F_ + n] = v; });
  }

  void middle(int64_t m) {
    float *gate = hidden_ + m * 2 * F_, *up = gate + F_;
    for (int64_t f = 0; f < F_; f++) gate[f] = silu(gate[f]) * up[f];
    put_row(gate, acts_, m, down_);
  }

  void second(int64_t i) {
    const Group& g = groups_[i / outer_.count];
    const int64_t begin = i % outer_.count * outer_.size, end = std::min(down_.panels(), begin + outer_.size);
    product(acts_.from(g.first), g.count, down_.at(g.expert), begin, end,
            [&](int64_t m, int64_t n, float v) { parts_[order_[g.first + m] * D_ + n] = v; });
  }

  template <class Out>
  void finish(int64_t n, Out out) {
    for (int64_t d = 0; d < D_; d++) {
      float total = 0;
      for (int64_t j = 0; j < k_; j++) total += parts_[(n * k_ + j) * D_ + d];
      out(d, total);
    }
  }

 private:
  int64_t k_, D_, F_, M_;
  Weight gate_up_, down_;
  Chunks inner_, outer_;
  std::vector<int64_t> order_;
  std::vector<Group> groups_;
  Rows rows_, acts_;
  float *hidden_, *parts_;
};

// y (N, D), all phases one after the other
template <class T, class Bank>
void run_bank(Bank& bank, T* y, int64_t N, int64_t D, int threads) {
  parallel(threads, bank.firsts(), [&](int64_t i) { bank.first(i); });
  parallel(bank.middles() > 1 ? threads : 1, bank.middles(), [&](int64_t m) { bank.middle(m); });
  parallel(threads, bank.seconds(), [&](int64_t i) { bank.second(i); });
  parallel(N > 1 ? threads : 1, N,
           [&](int64_t n) { bank.finish(n, [&](int64_t d, float v) { y[n * D + d] = narrow<T>(v); }); });
}

}  // namespace herdling
