// A matrix of N outputs and K inputs: plain numbers, or integers with scales packed for products of few rows.
//
// Packed outputs stand in panels of 16, and in a panel blocks of 64 bytes: four bytes an output, each byte a
// code of 8 bits or, lowest bits first, two of 4 or four of 2. Byte j of an output holds inputs j, 4 + j, ..
// of the block's 4, 8 or 16. A panel is read once and in order. `packed.py` packs; padding (outputs to 16, inputs
// to the block or group) meets activations that are 0.
#pragma once
#include <cstdint>

namespace herdling {

enum Kind : int32_t {
  kPlain,    // T (N, K), as nn.Linear keeps it
  kInt8,     // code + 128
  kInt4,     // code + 8
  kMxfp4,    // E2M1: sign, two bits of exponent, one of mantissa
  kTernary,  // code + 1, 2 bits
};

struct Weight {  // filled by packed.py and layer.py, field for field
  const void *data, *scales;  // scales (panel, group, 16)
  int64_t N, K, group;        // group: inputs a scale; 0: one scale an output
  int32_t kind;
  int32_t scale;   // bytes of one: 4 float, 2 half, 1 E8M0
  int32_t floats;  // whether activations stay floats; else they become int8

  int64_t panels() const { return (N + 15) / 16; }
  int64_t block() const { return kind == kInt8 ? 4 : kind == kTernary ? 16 : 8; }  // inputs in 64 bytes
  int64_t unit() const { return group ? group : block(); }
  int64_t groups() const { return group ? (K + group - 1) / group : 1; }
  int64_t depth() const { return (K + unit() - 1) / unit() * unit(); }  // K, padded
  int64_t panel_bytes() const { return depth() / block() * 64; }
  const uint8_t* panel(int64_t p) const { return static_cast<const uint8_t*>(data) + p * panel_bytes(); }
  Weight at(int64_t expert) const {  // of several packed ones, one after the other
    Weight w = *this;
    w.data = panel(expert * panels());
    w.scales = static_cast<const char*>(scales) + expert * panels() * groups() * 16 * scale;
    return w;
  }
};

}  // namespace herdling
