// A small decoder's likeliest next tokens for several sequences, step after step in one call.
//
// A draft's step is short, so what stands between two steps must be shorter: here it is an argmax and the
// row of an embedding. The first step reads all that is unread of each sequence, the others one token.
#include "guess.h"

#include <algorithm>
#include <vector>

#include "layer.h"
#include "vector.h"

#define HERDLING_API extern "C" __attribute__((visibility("default")))

// Of dense.cpp and layer.cpp.
#define HERDLING_USED(NAME, T)                                                                              \
  extern "C" void herdling_rms_norm_##NAME(const T*, const T*, T*, int64_t, int64_t, float);                \
  extern "C" void herdling_linear_##NAME(const T*, const T*, T*, int64_t, int64_t, int64_t, int);           \
  extern "C" int herdling_attention_step_##NAME(const herdling::Attention*, const herdling::Tokens*,        \
                                                const herdling::Memory*, const T*, T*, int);                \
  extern "C" void herdling_feed_forward_step_##NAME(const herdling::FeedForward*, const T*, T*, int64_t*,   \
                                                    int64_t, int);                                          \
  namespace herdling {                                                                                      \
  namespace {                                                                                               \
  inline void rms_norm(const T* x, const T* gain, T* y, int64_t M, int64_t D, float eps) {                  \
    herdling_rms_norm_##NAME(x, gain, y, M, D, eps);                                                        \
  }                                                                                                         \
  inline void linear(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, int threads) {          \
    herdling_linear_##NAME(x, w, y, M, N, K, threads);                                                      \
  }                                                                                                         \
  inline int layer(const Guesser& g, int64_t i, const Tokens* at, T* x, T* between, int64_t* chosen,        \
                   int64_t M, int threads) {                                                                \
    auto* attention = static_cast<const Attention*>(g.attention[i]);                                        \
    if (herdling_attention_step_##NAME(attention, at + g.rope[i], static_cast<const Memory*>(g.memory[i]), x, between, threads)) return 1; \
    herdling_feed_forward_step_##NAME(static_cast<const FeedForward*>(g.forward[i]), between, x, chosen, M, threads); \
    return 0;                                                                                               \
  }                                                                                                         \
  }                                                                                                         \
  }

using herdling::bf16;
HERDLING_USED(f32, float)
HERDLING_USED(bf16, bf16)

namespace herdling {
namespace {

// What the tokens of a step see in layers of one kind; kept alive while the layers run.
struct Seen {
  std::vector<int64_t> slots, ends, fresh;

  void clear() { slots.clear(), ends.clear(), fresh.clear(); }
  void add(const int64_t* table, int64_t first, int64_t from, int64_t at) {  // positions from..at of table[- first]
    slots.insert(slots.end(), table + (from - first), table + (at - first + 1));
    ends.push_back(slots.size());
    fresh.push_back(slots.back());
  }
};

template <class T>
int guess(const Guesser& g, const Readers& r, int64_t* out, int threads) {
  const int64_t D = g.D, V = g.V;
  std::vector<int64_t> place(r.place, r.place + r.N), read, owner, lasts, chosen;
  std::vector<float> cos, sin, temperature;
  std::vector<T> x, between, last, logits;
  Seen seen[2];
  bool used[2] = {};
  int64_t most = 0;
  for (int64_t i = 0; i < g.count; i++) used[g.rope[i]] = true;
  for (int64_t n = 0; n < r.N; n++) most = std::max(most, r.counts[n]);
  for (int64_t step = 0; step < std::max<int64_t>(most, 1); step++) {
    // Who reads what: the first time all that is unread, then the token guessed last.
    read.clear(), owner.clear(), lasts.clear();
    for (int64_t n = 0; n < r.N; n++) {
      if (step && r.counts[n] <= step) continue;
      if (step) {
        read.push_back(out[n * most + step - 1]);
        owner.push_back(n);
      } else {
        for (int64_t i = n ? r.ends[n - 1] : 0; i < r.ends[n]; i++) read.push_back(r.tokens[i]), owner.push_back(n);
      }
      if (r.counts[n] > step) lasts.push_back(read.size() - 1);
    }
    const int64_t M = read.size();
    cos.resize(M * g.pairs), sin.resize(M * g.pairs), temperature.resize(M);
    x.resize(M * D), between.resize(M * D), chosen.resize(M * std::max<int64_t>(g.k, 1));
    seen[0].clear(), seen[1].clear();
    for (int64_t m = 0; m < M; m++) {
      const int64_t n = owner[m], at = place[n]++;
      if (uint64_t(read[m]) >= uint64_t(V) || at >= g.places) return 1;
      std::copy_n(static_cast<const T*>(g.embed) + read[m] * D, D, x.data() + m * D);
      std::copy_n(g.cos + at * g.pairs, g.pairs, cos.data() + m * g.pairs);
      std::copy_n(g.sin + at * g.pairs, g.pairs, sin.data() + m * g.pairs);
      temperature[m] = g.temperature ? g.temperature[at] : 1.f;
      if (used[0] || !g.chunk) seen[0].add(r.whole[n], 0, 0, at);
      if (used[1] && g.chunk) seen[1].add(r.local[n], r.first[n], at / g.chunk * g.chunk, at);
    }
    Tokens at[2];
    for (int kind = 0; kind < 2; kind++) {
      const Seen& own = seen[kind && g.chunk];
      at[kind] = {M, own.slots.data(), own.ends.data(), own.fresh.data(), cos.data(), sin.data(),
                  g.temperature ? temperature.data() : nullptr};
    }
    for (int64_t i = 0; i < g.count; i++)
      if (layer(g, i, at, x.data(), between.data(), chosen.data(), M, threads)) return 1;
    const int64_t L = lasts.size();
    last.resize(L * D), logits.resize(L * V);
    for (int64_t i = 0; i < L; i++) std::copy_n(x.data() + lasts[i] * D, D, last.data() + i * D);
    if (!L) continue;
    rms_norm(last.data(), static_cast<const T*>(g.gain), last.data(), L, D, g.eps);
    linear(last.data(), static_cast<const T*>(g.head), logits.data(), L, V, D, threads);
    for (int64_t i = 0; i < L; i++) {
      const T* row = logits.data() + i * V;
      int64_t picked = 0;
      for (int64_t v = 1; v < V; v++)
        if (widen(row[v]) > widen(row[picked])) picked = v;
      out[owner[lasts[i]] * most + step] = picked;
    }
  }
  return 0;
}

}  // namespace
}  // namespace herdling

using namespace herdling;

#define HERDLING_GUESS(NAME, T)                                                                             \
  HERDLING_API int herdling_guess_##NAME(const Guesser* g, const Readers* r, int64_t* out, int threads) {   \
    return guess<T>(*g, *r, out, threads);                                                                  \
  }

HERDLING_GUESS(f32, float)
HERDLING_GUESS(bf16, bf16)
