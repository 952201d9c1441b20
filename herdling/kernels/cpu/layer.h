// Half a decoder layer in one call, and all layers of a step in one, for the tokens of a few sequences.
//
// Between the products stands little arithmetic, which as tensor operations costs more than the
// products of a small model: norms, rotation, writing to the store, softmax, choice of experts. Rounding
// happens where the operations one by one would round. Weights are plain or packed, each for itself; rows are
// quantized in the same pass. These structs are filled by layer.py, field for field.
#pragma once
#include <cstdint>

#include "weight.h"

namespace herdling {

struct Attention {  // weights and shapes
  const void* gain;    // (D,)
  Weight q, k, v, o;   // (H d, D), (KV d, D) twice, (D, H d)
  int64_t D, H, KV, d;
  float eps;
  int32_t local, qk_norm;  // whether q and k are rotated, and then scaled to RMS 1
};

struct Tokens {  // of a step: what each of N tokens sees, and where it stands
  int64_t N;
  const int64_t *slots, *ends, *fresh;  // ends (N,): of each token's slots; fresh (N,): its own slot
  const float *cos, *sin;               // (N, d / 2)
  const float* temperature;             // (N,), of q in layers without rotation; or null
};

struct Memory {  // one layer's keys and values (slots, KV, d); its slots are counted from `shift`
  void *keys, *values;
  int64_t slots, shift;
};

struct FeedForward {
  const void* gain;
  Weight gate, up, down;  // (F, D) twice, (D, F): the shared expert, or all there is
  Weight router;          // (E, D); unused where E is 0
  Weight gate_up, outs;   // plain: fused (E, D, 2I), (E, I, D); packed: (E, 2I outputs), (E, D outputs)
  int64_t D, F, I, E, k;
  float eps;
};

struct Layer {  // of a step; `chosen` (N, k) is written to, where there are experts
  const Attention* attention;
  const Tokens* tokens;
  const Memory* memory;
  const FeedForward* forward;
  int64_t* chosen;
};

}  // namespace herdling
