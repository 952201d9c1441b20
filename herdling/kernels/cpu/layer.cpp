// Attention and feed-forward of a decoder layer, each from its norm to its residual addition.
#include "layer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "experts.h"
#include "pool.h"

#define HERDLING_API extern "C" __attribute__((visibility("default")))

using herdling::bf16;
// Of dense.cpp.
extern "C" void herdling_rms_norm_f32(const float*, const float*, float*, int64_t, int64_t, float);
extern "C" void herdling_rms_norm_bf16(const bf16*, const bf16*, bf16*, int64_t, int64_t, float);

namespace herdling {
namespace {

inline void rms_norm(const float* x, const float* gain, float* y, int64_t M, int64_t D, float eps) {
  herdling_rms_norm_f32(x, gain, y, M, D, eps);
}
inline void rms_norm(const bf16* x, const bf16* gain, bf16* y, int64_t M, int64_t D, float eps) {
  herdling_rms_norm_bf16(x, gain, y, M, D, eps);
}

constexpr int64_t kSpan = 256;  // slots that one thread sees at a time; a matter of no thread count

template <class T>
inline float rounded(float x) {
  return widen(narrow<T>(x));
}

// Arrays of several types in one piece of scratch memory.
class Cuts {
 public:
  template <class U>
  Cuts& add(U*& out, int64_t count) {
    places_.push_back({reinterpret_cast<void**>(&out), bytes_});
    bytes_ += (count * sizeof(U) + 63) / 64 * 64;
    return *this;
  }
  void make(Scratch& scratch) {
    auto* memory = static_cast<char*>(scratch.take(bytes_ + 64));
    for (auto& place : places_) *place.first = memory + place.second;
  }

 private:
  std::vector<std::pair<void**, size_t>> places_;
  size_t bytes_ = 0;
};

// e^x for x <= 0 to a part in 10^7; below -87 what e^-87 is. Branchless, so that loops of it are vectors.
inline float exp_down(float x) {
  x = x < -87.f ? -87.f : x;  // NaN stays
  constexpr float magic = 12582912.f;
  float shifted = x * 1.44269504f + magic, n = shifted - magic;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000 + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

// out[t] = scale * q . keys[slots[t]]
template <class T>
void scores(const float* q, const T* keys, const int64_t* slots, int64_t n, int64_t stride, int64_t d,
            float scale, float* out) {
  constexpr int R = kTile;
  for (int64_t t = 0; t < n; t += R) {
    const T* rows[R];
    for (int i = 0; i < R; i++) rows[i] = keys + slots[std::min(t + i, n - 1)] * stride;
    vfloat acc[R] = {};
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) {
      vfloat wide = load(q + j);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) acc[i] += wide * load(rows[i] + j);
    }
    float got[R];
    sums<R>(acc, got);
    for (int i = 0; i < R && t + i < n; i++) {
      for (int64_t e = j; e < d; e++) got[i] += q[e] * widen(rows[i][e]);
      out[t + i] = got[i] * scale;
    }
  }
}

// out[g][j..] = sum over t of p[g][t] * values[slots[t]][j..], NV vectors
template <class T, int G, int NV>
inline void mix_columns(const float* p, const T* values, const int64_t* slots, int64_t n, int64_t stride,
                        float* out, int64_t d) {
  vfloat acc[G][NV] = {};
  for (int64_t t = 0; t < n; t++) {
    const T* row = values + slots[t] * stride;
    vfloat v[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) v[i] = load(row + i * kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      vfloat weight = splat(p[g * kSpan + t]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; i++) acc[g][i] += weight * v[i];
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < NV; i++) store(out + g * d + i * kLanes, acc[g][i]);
}

template <class T, int G>
void mix(const float* p, const T* values, const int64_t* slots, int64_t n, int64_t stride, int64_t d, float* out) {
  constexpr int NV = kTile / 4;
  int64_t j = 0;
  for (; j + NV * kLanes <= d; j += NV * kLanes)
    mix_columns<T, G, NV>(p, values + j, slots, n, stride, out + j, d);
  for (; j + kLanes <= d; j += kLanes) mix_columns<T, G, 1>(p, values + j, slots, n, stride, out + j, d);
  for (; j < d; j++)
    for (int g = 0; g < G; g++) {
      float total = 0;
      for (int64_t t = 0; t < n; t++) total += p[g * kSpan + t] * widen(values[slots[t] * stride + j]);
      out[g * d + j] = total;
    }
}

struct Range {  // some of the slots that a token sees
  int64_t token, first, count;
};

// The query heads of one KV head over one range: unnormalised sums (G, d), and of each head the largest
// score and the sum of weights.
template <class T>
void attend(const float* q, const T* keys, const T* values, const int64_t* slots, int64_t n, int64_t stride,
            int64_t G, int64_t d, float* out, float* most, float* sums_out) {
  thread_local Scratch scratch;
  auto* p = static_cast<float*>(scratch.take(G * kSpan * sizeof(float)));
  const float scale = 1 / std::sqrt(float(d));
  for (int64_t g = 0; g < G; g++) {
    float* row = p + g * kSpan;
    scores(q + g * d, keys, slots, n, stride, d, scale, row);
    float top = row[0], total = 0;
    for (int64_t t = 1; t < n; t++) top = row[t] > top ? row[t] : top;
    for (int64_t t = 0; t < n; t++) row[t] = exp_down(row[t] - top);
    vfloat part = {};
    int64_t t = 0;
    for (; t + kLanes <= n; t += kLanes) part += load(row + t);
    total = sum(part);
    for (; t < n; t++) total += row[t];
    most[g] = top, sums_out[g] = total;
  }
  int64_t g = 0;
  for (; g + 4 <= G; g += 4) mix<T, 4>(p + g * kSpan, values, slots, n, stride, d, out + g * d);
  for (; g < G; g++) mix<T, 1>(p + g * kSpan, values, slots, n, stride, d, out + g * d);
}

// One head: rotation of neighbouring pairs, then RMS 1, each rounded.
template <class T>
void place(T* head, int64_t d, const float* cos, const float* sin, bool norm, float eps) {
  for (int64_t j = 0; j < d / 2; j++) {
    float even = widen(head[2 * j]), odd = widen(head[2 * j + 1]);
    head[2 * j] = narrow<T>(even * cos[j] - odd * sin[j]);
    head[2 * j + 1] = narrow<T>(even * sin[j] + odd * cos[j]);
  }
  if (norm) rms_norm(head, static_cast<const T*>(nullptr), head, 1, d, eps);
}

template <class T>
int attention(const Attention& a, const Tokens& at, const Memory& memory, const T* x, T* y, int threads) {
  const int64_t N = at.N, D = a.D, d = a.d, G = a.H / a.KV, Q = a.H * d, K = a.KV * d, W = Q + 2 * K;
  thread_local std::vector<Range> own_ranges;
  std::vector<Range>& ranges = own_ranges;
  ranges.clear();
  for (int64_t n = 0, first = 0; n < N; first = at.ends[n++]) {
    if (at.ends[n] <= first) return 1;
    for (int64_t t = first; t < at.ends[n]; t += kSpan) ranges.push_back({n, t, std::min(kSpan, at.ends[n] - t)});
  }
  auto outside = [&](int64_t slot) { return uint64_t(slot + memory.shift) >= uint64_t(memory.slots); };
  if (std::any_of(at.slots, at.slots + at.ends[N - 1], outside) || std::any_of(at.fresh, at.fresh + N, outside))
    return 1;
  thread_local Scratch scratch;
  thread_local Inputs<T> own_rows, own_seen;
  Inputs<T>&rows = own_rows, &seen = own_seen;
  const int64_t R = ranges.size();
  T *normed, *qkv;
  float *queries, *parts, *most, *totals;
  Cuts().add(normed, N * D).add(qkv, N * W).add(queries, N * Q).add(parts, R * Q).add(most, R * a.H)
      .add(totals, R * a.H).make(scratch);

  rms_norm(x, static_cast<const T*>(a.gain), normed, N, D, a.eps);
  rows.fill(N, D, {&a.q, &a.k, &a.v}, threads, [&](int64_t n, int64_t i) { return widen(normed[n * D + i]); });
  const Weight* weights[] = {&a.q, &a.k, &a.v};
  const int64_t edges[] = {0, Q, Q + K};
  Chunks chunks[] = {output_chunks<T>(a.q, threads), output_chunks<T>(a.k, threads), output_chunks<T>(a.v, threads)};
  parallel(threads, chunks[0].count + chunks[1].count + chunks[2].count, [&](int64_t i) {
    int w = 0;
    while (i >= chunks[w].count) i -= chunks[w++].count;
    rows.times(*weights[w], i * chunks[w].size, std::min(weights[w]->N, (i + 1) * chunks[w].size),
               [&](int64_t m, int64_t n, float v) { qkv[m * W + edges[w] + n] = narrow<T>(v); });
  });

  auto* keys = static_cast<T*>(memory.keys) + memory.shift * K;
  auto* values = static_cast<T*>(memory.values) + memory.shift * K;
  parallel(N > 4 ? threads : 1, N, [&](int64_t n) {
    T* q = qkv + n * W;
    if (a.local) {
      const float *cos = at.cos + n * d / 2, *sin = at.sin + n * d / 2;
      for (int64_t h = 0; h < a.H + a.KV; h++) place(q + h * d, d, cos, sin, a.qk_norm, a.eps);
    } else if (at.temperature) {
      for (int64_t i = 0; i < Q; i++) q[i] = narrow<T>(widen(q[i]) * at.temperature[n]);
    }
    for (int64_t i = 0; i < Q; i++) queries[n * Q + i] = widen(q[i]);
    std::copy_n(q + Q, K, keys + at.fresh[n] * K);
    std::copy_n(q + Q + K, K, values + at.fresh[n] * K);
  });

  parallel(threads, R * a.KV, [&](int64_t i) {
    const int64_t r = i / a.KV, head = i % a.KV;
    const Range& range = ranges[r];
    attend(queries + range.token * Q + head * G * d, keys + head * d, values + head * d, at.slots + range.first,
           range.count, K, G, d, parts + r * Q + head * G * d, most + r * a.H + head * G,
           totals + r * a.H + head * G);
  });
  // Parts are weighed by their share of the softmax's denominator (FlashDecoding).
  for (int64_t r = 0, n = 0; n < N; n++) {
    int64_t end = r;
    while (end < R && ranges[end].token == n) end++;
    for (int64_t h = 0; h < a.H; h++) {
      float top = most[r * a.H + h], total = 0;
      for (int64_t s = r + 1; s < end; s++) top = std::max(top, most[s * a.H + h]);
      float* out = parts + r * Q + h * d;
      for (int64_t s = r; s < end; s++) {
        float weight = exp_down(most[s * a.H + h] - top);
        const float* part = parts + s * Q + h * d;
        total += weight * totals[s * a.H + h];
        for (int64_t j = 0; j < d; j++) out[j] = s == r ? part[j] * weight : out[j] + part[j] * weight;
      }
      for (int64_t j = 0; j < d; j++) out[j] = rounded<T>(out[j] / total);
    }
    std::copy_n(parts + r * Q, Q, queries + n * Q);  // no longer needed as such
    r = end;
  }
  seen.fill(N, Q, {&a.o}, threads, [&](int64_t n, int64_t i) { return queries[n * Q + i]; });
  Chunks out = output_chunks<T>(a.o, threads);
  parallel(threads, out.count, [&](int64_t i) {
    seen.times(a.o, i * out.size, std::min(D, (i + 1) * out.size), [&](int64_t m, int64_t n, float v) {
      y[m * D + n] = narrow<T>(widen(x[m * D + n]) + rounded<T>(v));
    });
  });
  return 0;
}

// The k largest of E logits, largest first. Among equal ones it takes those that torch.topk takes on a
// CPU, which follow from the same two standard algorithms.
void choose(const float* logits, int64_t E, int64_t k, int64_t* chosen) {
  using Entry = std::pair<float, int64_t>;
  thread_local std::vector<Entry> queue;
  queue.resize(E);
  for (int64_t e = 0; e < E; e++) queue[e] = {logits[e], e};
  auto before = [](const Entry& a, const Entry& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= E) {
    std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), before);
  } else {
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), before);
    std::sort(queue.begin(), queue.begin() + k - 1, before);
  }
  for (int64_t j = 0; j < k; j++) chosen[j] = queue[j].second;
}

inline float gate_of(float logit) { return 1 / (1 + std::exp(-logit)); }

// y (N, D) may be x; chosen (N, k) is written, where there are experts.
template <class T>
void feed_forward(const FeedForward& f, const T* x, T* y, int64_t* chosen, int64_t N, int threads) {
  thread_local Scratch scratch, routed;
  thread_local Inputs<T> own_rows;
  thread_local Swiglu<T> own_shared;
  Inputs<T>& rows = own_rows;
  Swiglu<T>& shared = own_shared;
  const int64_t D = f.D, E = f.E;
  T *normed, *gates;
  float *logits, *sums;
  Cuts().add(normed, N * D).add(sums, N * D).add(gates, N * f.k).add(logits, N * E).make(scratch);
  rms_norm(x, static_cast<const T*>(f.gain), normed, N, D, f.eps);
  rows.fill(N, D, {&f.gate, &f.up, E ? &f.router : nullptr}, threads,
            [&](int64_t n, int64_t i) { return widen(normed[n * D + i]); });
  shared.start(rows, f.gate, f.up, f.down, N, threads);
  const Chunks choice = E ? output_chunks<T>(f.router, threads) : Chunks(0, 1, 1, 1);
  parallel(threads, choice.count + shared.firsts(), [&](int64_t i) {
    if (i >= choice.count) return shared.first(i - choice.count);
    rows.times(f.router, i * choice.size, std::min(E, (i + 1) * choice.size),
               [&](int64_t m, int64_t n, float v) { logits[m * E + n] = rounded<T>(v); });
  });
  shared.middle(threads);
  auto down = [&](int64_t i) {
    shared.second(i, [&](int64_t m, int64_t n, float v) { sums[m * D + n] = rounded<T>(v); });
  };
  if (!E) {
    parallel(threads, shared.seconds(), down);
    for (int64_t i = 0; i < N * D; i++) y[i] = narrow<T>(widen(x[i]) + sums[i]);
    return;
  }
  for (int64_t n = 0; n < N; n++) {
    choose(logits + n * E, E, f.k, chosen + n * f.k);
    for (int64_t j = 0; j < f.k; j++) gates[n * f.k + j] = narrow<T>(gate_of(logits[n * E + chosen[n * f.k + j]]));
  }
  auto rest = [&](auto bank) {
    parallel(threads, shared.seconds() + bank.firsts(), [&](int64_t i) {
      if (i < shared.seconds()) down(i);
      else bank.first(i - shared.seconds());
    });
    parallel(bank.middles() > 4 ? threads : 1, bank.middles(), [&](int64_t m) { bank.middle(m); });
    parallel(threads, bank.seconds(), [&](int64_t i) { bank.second(i); });
    parallel(N > 4 ? threads : 1, N, [&](int64_t n) {
      bank.finish(n, [&](int64_t d, float v) {
        const int64_t i = n * D + d;
        y[i] = narrow<T>(widen(x[i]) + rounded<T>(sums[i] + rounded<T>(v)));
      });
    });
  };
  if (f.gate_up.kind == kPlain)
    rest(PlainExperts<T>(routed, normed, chosen, gates, static_cast<const T*>(f.gate_up.data),
                         static_cast<const T*>(f.outs.data), N, f.k, E, D, f.I, threads));
  else
    rest(PackedExperts<T>(routed, normed, chosen, gates, f.gate_up, f.outs, N, f.k, E, threads));
}

// All layers, one after the other; y (N, D) holds x between them.
template <class T>
int layers(const Layer* all, int64_t count, const T* x, T* y, int64_t N, int threads) {
  for (int64_t i = 0; i < count; i++, x = y) {
    const Layer& layer = all[i];
    if (int wrong = attention<T>(*layer.attention, *layer.tokens, *layer.memory, x, y, threads)) return wrong;
    feed_forward<T>(*layer.forward, y, y, layer.chosen, N, threads);
  }
  return 0;
}

// chosen (N, k) and their gates, float32, of router logits (N, E)
void route(const float* logits, int64_t* chosen, float* gates, int64_t N, int64_t E, int64_t k) {
  for (int64_t n = 0; n < N; n++) {
    choose(logits + n * E, E, k, chosen + n * k);
    for (int64_t j = 0; j < k; j++) gates[n * k + j] = gate_of(logits[n * E + chosen[n * k + j]]);
  }
}

}  // namespace
}  // namespace herdling

using namespace herdling;

HERDLING_API void herdling_route(const float* logits, int64_t* chosen, float* gates, int64_t N, int64_t E, int64_t k) {
  route(logits, chosen, gates, N, E, k);
}

#define HERDLING_LAYER(NAME, T)                                                                             \
  HERDLING_API int herdling_attention_step_##NAME(const Attention* a, const Tokens* at, const Memory* m,     \
                                                  const T* x, T* y, int threads) {                          \
    return attention<T>(*a, *at, *m, x, y, threads);                                                        \
  }                                                                                                         \
  HERDLING_API void herdling_feed_forward_step_##NAME(const FeedForward* f, const T* x, T* y,                \
                                                      int64_t* chosen, int64_t N, int threads) {            \
    feed_forward<T>(*f, x, y, chosen, N, threads);                                                          \
  }                                                                                                         \
  HERDLING_API int herdling_layers_step_##NAME(const Layer* all, int64_t count, const T* x, T* y, int64_t N, \
                                               int threads) {                                               \
    return layers<T>(all, count, x, y, N, threads);                                                         \
  }

HERDLING_LAYER(f32, float)
HERDLING_LAYER(bf16, bf16)
