// Integer products of many rows by AMX: 16 rows times 16 outputs times 64 inputs in one instruction.
//
// A panel's blocks are the second operand as they lie in memory (8 bits) or once unpacked. Integers and
// their order of scaling are those of the vector kernels, so are the results.
#pragma once
#include "lanes.h"
#include "packed.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#define HERDLING_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

namespace herdling {

// Whether the system lets this process use tiles: asked for once.
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// Registers: 0-3 sums of 16 rows each, 4 and 5 rows and codes of 64 inputs, 6 and 7 those of a rest.
class Tiles {
 public:
  explicit Tiles(int64_t rest) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    if (rest) shapes.bytes[6] = rest, shapes.rows[7] = rest / 4;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// The blocks of a panel as tiles want them: unsigned bytes, 4 inputs of 16 outputs in 64.
template <int Steps, class Decode>
const uint8_t* unpacked(const uint8_t* p, int64_t depth, Decode decode, Scratch& scratch) {
  if (Steps == 1) return p;
  auto* out = static_cast<uint8_t*>(scratch.take(depth * 16));
  for (int64_t i = 0; i < depth / 4; i += Steps, p += 64) {
    prefetch(p + 4096);
    Codes block = codes(p);
    for (int s = 0; s < Steps; s++) _mm512_store_si512(out + (i + s) * 64, decode(block, s).v);
  }
  return out;
}

// For each 16 of the M rows: visit.start(); visit(group, row of 16, integers of 16 outputs) for every group;
// visit.finish(first row, rows). decode(block, step) gives unsigned codes.
template <int Steps, class Decode, class Visit>
void panel_tiles(const Rows& rows, int64_t M, int64_t span, const uint8_t* p, Decode decode, Visit visit) {
  thread_local Scratch scratch;
  alignas(64) int32_t sums[4][16 * 16];
  const int64_t depth = rows.depth, groups = rows.groups, rest = span % 64;
  p = unpacked<Steps>(p, depth, decode, scratch);
  asm volatile("" ::: "memory");  // loads of tiles do not tell the compiler that they read
  Tiles shapes(rest);
  for (int64_t first = 0; first < M; first += 16) {
    const Rows own = rows.from(first);
    visit.start();
// Registers are part of an instruction's name, so each is written out. C += 16 rows times 64 inputs from k on, or times
// the rest.
#define HERDLING_TILE(C, k, full)                    \
  if (full) {                                        \
    _tile_loadd(4, own.a + (k), depth);              \
    _tile_loadd(5, p + (k) * 16, 64);                \
    _tile_dpbsud(C, 4, 5);                           \
  } else {                                           \
    _tile_loadd(6, own.a + (k), depth);              \
    _tile_loadd(7, p + (k) * 16, 64);                \
    _tile_dpbsud(C, 6, 7);                           \
  }
    if (groups == 1) {  // four sums take turns, so that none waits for its last product
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      int64_t k = 0;
      for (; k + 256 <= span; k += 256) {
        HERDLING_TILE(0, k, true)
        HERDLING_TILE(1, k + 64, true)
        HERDLING_TILE(2, k + 128, true)
        HERDLING_TILE(3, k + 192, true)
      }
      for (; k < span; k += 64) HERDLING_TILE(0, k, k + 64 <= span)
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        Ints total = ints(own.starts[i]);
        for (int j = 0; j < 4; j++) total = add(total, Ints{_mm512_load_si512(sums[j] + i * 16)});
        visit(0, i, total);
      }
    } else {
      for (int64_t g = 0; g < groups; g += 4) {  // four groups at once, for the same reason
        const int64_t count = std::min<int64_t>(4, groups - g);
#define HERDLING_GROUP(C)                                                                                   \
  if (C < count) {                                                                                          \
    _tile_zero(C);                                                                                          \
    for (int64_t k = (g + C) * span; k < (g + C + 1) * span; k += 64) HERDLING_TILE(C, k, k + 64 <= (g + C + 1) * span) \
    _tile_stored(C, sums[C], 64);                                                                           \
  }
        HERDLING_GROUP(0)
        HERDLING_GROUP(1)
        HERDLING_GROUP(2)
        HERDLING_GROUP(3)
#undef HERDLING_GROUP
        for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 16
          for (int i = 0; i < 16; i++) {
            Ints start = ints(own.starts[i * groups + g + j]);
            visit(g + j, i, add(start, Ints{_mm512_load_si512(sums[j] + i * 16)}));
          }
      }
    }
#undef HERDLING_TILE
    visit.finish(first, std::min<int64_t>(16, M - first));
  }
}

}  // namespace herdling
#endif
