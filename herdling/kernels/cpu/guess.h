// A decoder and the sequences it guesses for; filled by guess.py, field for field.
#pragma once
#include <cstdint>

namespace herdling {

struct Guesser {
  const void *embed, *gain, *head;            // (V, D), (D,), (V, D)
  int64_t D, V, count, pairs, chunk, k;       // count: layers; chunk 0: layers with rotation see all
  float eps;
  const void *const *attention, *const *forward, *const *memory;  // (count,) structs of layer.h
  const int32_t* rope;                        // (count,) whether a layer rotates, and sees its chunk only
  const float *cos, *sin, *temperature;       // (places, pairs) twice, (places,) or null
  int64_t places;
};

struct Readers {  // N sequences
  int64_t N;
  const int64_t *tokens, *ends;               // unread tokens; ends (N,)
  const int64_t* place;                       // (N,) position of the first of them
  const int64_t* counts;                      // (N,) tokens to guess; 0: only read
  const int64_t *const *whole, *const *local; // slots of positions from 0, and from first[n]
  const int64_t* first;
};

}  // namespace herdling
