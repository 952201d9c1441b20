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

// each(group, row, integers of 16 outputs) for up to 64 rows. decode(block, step) gives unsigned codes.
template <int Steps, class Decode, class Each>
void panel_tiles(const Rows& rows, int64_t M, int64_t span, const uint8_t* p, Decode decode, Each each) {
  alignas(64) uint8_t codes64[16 * 64];
  alignas(64) int32_t sums[16 * 16];
  const int64_t depth = rows.depth, tiles = (M + 15) / 16;
  Tiles shapes(span % 64);
  for (int64_t g = 0; g < rows.groups; g++) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < span; k += 64) {
      const int64_t blocks = std::min<int64_t>(16, (span - k) / 4);  // of 4 inputs
      const uint8_t* b = p;
      if (Steps > 1) {
        for (int64_t i = 0; i < blocks; i += Steps)
          for (int s = 0; s < Steps; s++)
            _mm512_store_si512(codes64 + (i + s) * 64, decode(codes(p + i / Steps * 64), s).v);
        b = codes64;
      }
      for (int64_t i = 0; i < blocks / Steps; i++) prefetch(p + 4096 + i * 64);
      p += blocks / Steps * 64;
      const int8_t* a = rows.a + g * span + k;
      asm volatile("" ::: "memory");  // loads of tiles do not tell the compiler that they read
// Registers are part of an instruction's name, so each is written out.
#define HERDLING_TILE(T, A, B)                      \
  if (tiles > T) {                                  \
    _tile_loadd(A, a + T * 16 * depth, depth);      \
    _tile_dpbsud(T, A, B);                          \
  }
#define HERDLING_TILES_OF(A, B)                     \
  _tile_loadd(B, b, 64);                            \
  HERDLING_TILE(0, A, B) HERDLING_TILE(1, A, B) HERDLING_TILE(2, A, B) HERDLING_TILE(3, A, B)
      if (blocks == 16) {
        HERDLING_TILES_OF(4, 5)
      } else {
        HERDLING_TILES_OF(6, 7)
      }
#undef HERDLING_TILES_OF
#undef HERDLING_TILE
    }
    for (int64_t t = 0; t < tiles; t++) {
      switch (t) {
        case 0: _tile_stored(0, sums, 64); break;
        case 1: _tile_stored(1, sums, 64); break;
        case 2: _tile_stored(2, sums, 64); break;
        case 3: _tile_stored(3, sums, 64); break;
      }
      for (int64_t m = t * 16; m < std::min(M, t * 16 + 16); m++) {
        Ints start = ints(rows.starts[m * rows.groups + g]);
        each(g, m, add(Ints{_mm512_load_si512(sums + (m - t * 16) * 16)}, start));
      }
    }
  }
}

}  // namespace herdling
#endif
