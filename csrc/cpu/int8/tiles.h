// dot.h's products on AMX: tiles of up to 16 pixels times 16 quads, and 16 quads times 16 output channels.
// Without the instructions the same source runs on arrays, so that its logic is tested everywhere.
#pragma once
#define PARNET_DOT_TILES
#include "dot.h"

namespace parnet::cpu::int8 {
namespace {

constexpr int kTileQuads = 16;  // weights are padded with zeros to a multiple, so what is read beyond a
                                // segment is multiplied by zero

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile registers, as the instructions' macros want them: literals.
#define PARNET_SUMS_LOW 0
#define PARNET_SUMS_HIGH 1
#define PARNET_BYTES 2
#define PARNET_WEIGHTS_LOW 3
#define PARNET_WEIGHTS_HIGH 4
constexpr int kTiles = 5;

#ifdef __AMX_INT8__
PARNET_INLINE void configure(const TileConfig& c) { _tile_loadconfig(&c); }
PARNET_INLINE void release() { _tile_release(); }
#define PARNET_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define PARNET_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define PARNET_TILE_DOT(sums, bytes, weights) _tile_dpbusd(sums, bytes, weights)
#else
thread_local TileConfig tile_config;
thread_local uint8_t tile_data[kTiles][16][64];
PARNET_INLINE void configure(const TileConfig& c) { tile_config = c; }
PARNET_INLINE void release() {}
inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < tile_config.rows[tile]; r++) {
    memcpy(tile_data[tile][r], static_cast<const char*>(from) + r * stride, tile_config.row_bytes[tile]);
  }
}
inline void tile_store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < tile_config.rows[tile]; r++) {
    memcpy(static_cast<char*>(to) + r * stride, tile_data[tile][r], tile_config.row_bytes[tile]);
  }
}
inline void tile_dot(int sums, int bytes, int weights) {
  for (int r = 0; r < tile_config.rows[sums]; r++) {
    int32_t row[16];
    memcpy(row, tile_data[sums][r], 64);
    for (int q = 0; q < kTileQuads; q++) {
      for (int i = 0; i < 64; i++) {
        row[i / 4] += tile_data[bytes][r][4 * q + i % 4] * static_cast<int8_t>(tile_data[weights][q][i]);
      }
    }
    memcpy(tile_data[sums][r], row, 64);
  }
}
#define PARNET_TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define PARNET_TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define PARNET_TILE_DOT(sums, bytes, weights) tile_dot(sums, bytes, weights)
#endif

// The tiles of a thread are configured for a number of pixels, and given back at the end.
class Multiplier {
 public:
  ~Multiplier() {
    if (rows_) release();
  }

  // See dot.h.
  void multiply(Pixels x, int64_t row, int64_t pixel, int quads, const int8_t* w, int count, int32_t* sums) {
    use(count);
    PARNET_TILE_LOAD(PARNET_SUMS_LOW, sums, 4 * kPanel);
    PARNET_TILE_LOAD(PARNET_SUMS_HIGH, sums + 16, 4 * kPanel);
    for (int tap = 0; tap < 9; tap++) {
      const uint8_t* from = x.first + tap / 3 * row + tap % 3 * pixel;
      for (int q = 0; q < quads; q += kTileQuads, from += 4 * kTileQuads, w += 4 * kTileQuads * kPanel) {
        PARNET_TILE_LOAD(PARNET_BYTES, from, x.step);
        PARNET_TILE_LOAD(PARNET_WEIGHTS_LOW, w, 4 * kPanel);
        PARNET_TILE_LOAD(PARNET_WEIGHTS_HIGH, w + 64, 4 * kPanel);
        PARNET_TILE_DOT(PARNET_SUMS_LOW, PARNET_BYTES, PARNET_WEIGHTS_LOW);
        PARNET_TILE_DOT(PARNET_SUMS_HIGH, PARNET_BYTES, PARNET_WEIGHTS_HIGH);
      }
    }
    PARNET_TILE_STORE(PARNET_SUMS_LOW, sums, 4 * kPanel);
    PARNET_TILE_STORE(PARNET_SUMS_HIGH, sums + 16, 4 * kPanel);
  }

 private:
  void use(int count) {
    if (count == rows_) return;
    rows_ = count;
    TileConfig c;
    for (int i = 0; i < kTiles; i++)
      c.row_bytes[i] = 64, c.rows[i] = i < PARNET_WEIGHTS_LOW ? count : kTileQuads;
    configure(c);
  }

  int rows_ = 0;
};

}  // namespace
}  // namespace parnet::cpu::int8
