// dot.h's products on AMX: tiles of up to 16 pixels times 16 quads, and 16 quads times 16 output channels. A
// quad is four bytes, or two values in bfloat16.
// Without the instructions the same source runs on arrays, so that its logic is tested everywhere.
#pragma once
#define PARNET_DOT_TILES
#include "dot.h"

namespace parnet::cpu::direct {
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
#define PARNET_SUMS_LOW_2 2
#define PARNET_SUMS_HIGH_2 3
#define PARNET_VALUES 4
#define PARNET_VALUES_2 5
#define PARNET_WEIGHTS_LOW 6
#define PARNET_WEIGHTS_HIGH 7
constexpr int kTiles = 8;

#ifdef __AMX_TILE__
PARNET_INLINE void configure(const TileConfig& c) { _tile_loadconfig(&c); }
PARNET_INLINE void release() { _tile_release(); }
#define PARNET_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define PARNET_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#ifdef PARNET_BFLOAT16
#define PARNET_TILE_DOT(sums, values, weights) _tile_dpbf16ps(sums, values, weights)
#else
#define PARNET_TILE_DOT(sums, values, weights) _tile_dpbusd(sums, values, weights)
#endif
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
#ifdef PARNET_BFLOAT16
// The instruction reads and gives zeros for what is below the least normal number.
inline float normal(float x) { return x < 0x1p-126f && x > -0x1p-126f ? 0.f : x; }
inline float value_in(const uint8_t* quad, int i) {
  uint32_t bits = 0;
  memcpy(reinterpret_cast<char*>(&bits) + 2, quad + 2 * i, 2);
  float x;
  memcpy(&x, &bits, 4);
  return normal(x);
}
// Two chains, of the first and of the second values of the quads, each rounded once a product; then their
// sum.
inline void tile_dot(int sums, int values, int weights) {
  for (int r = 0; r < tile_config.rows[sums]; r++) {
    float row[16];
    memcpy(row, tile_data[sums][r], 64);
    for (int k = 0; k < 16; k++) {
      float chain[2] = {};
      for (int q = 0; q < kTileQuads; q++) {
        for (int i = 0; i < 2; i++) {
          const float x = value_in(&tile_data[values][r][4 * q], i),
                      w = value_in(&tile_data[weights][q][4 * k], i);
          chain[i] = normal(__builtin_fmaf(x, w, chain[i]));
        }
      }
      row[k] = normal(normal(row[k]) + normal(chain[0] + chain[1]));
    }
    memcpy(tile_data[sums][r], row, 64);
  }
}
#else
inline void tile_dot(int sums, int values, int weights) {
  for (int r = 0; r < tile_config.rows[sums]; r++) {
    int32_t row[16];
    memcpy(row, tile_data[sums][r], 64);
    for (int q = 0; q < kTileQuads; q++) {
      for (int i = 0; i < 64; i++) {
        row[i / 4] += tile_data[values][r][4 * q + i % 4] * static_cast<int8_t>(tile_data[weights][q][i]);
      }
    }
    memcpy(tile_data[sums][r], row, 64);
  }
}
#endif
#define PARNET_TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define PARNET_TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define PARNET_TILE_DOT(sums, values, weights) tile_dot(sums, values, weights)
#endif

// The tiles of a thread are configured for a number of pixels, and given back at the end.
class Multiplier {
 public:
  ~Multiplier() {
    if (rows_) release();
  }

  // Weights come from L2, which takes longer than multiplying them once: with two rows each is loaded half as
  // often.
  static constexpr int kMapRows = 2;

  // See dot.h.
  void multiply(Pixels x, int map_rows, int64_t row, int64_t pixel, int quads, const int8_t* w, int count,
                ProductSum* sums) {
    use(count);
    const auto run = map_rows == 2 ? multiply_map_rows<true> : multiply_map_rows<false>;
    run(x, row, pixel, quads, w, sums);
  }

 private:
  template <bool Two>
  static void multiply_map_rows(Pixels x, int64_t row, int64_t pixel, int quads, const int8_t* w,
                                ProductSum* sums) {
    ProductSum* sums_2 = sums + kMaxRows * kPanel;
    PARNET_TILE_LOAD(PARNET_SUMS_LOW, sums, 4 * kPanel);
    PARNET_TILE_LOAD(PARNET_SUMS_HIGH, sums + 16, 4 * kPanel);
    if (Two) {
      PARNET_TILE_LOAD(PARNET_SUMS_LOW_2, sums_2, 4 * kPanel);
      PARNET_TILE_LOAD(PARNET_SUMS_HIGH_2, sums_2 + 16, 4 * kPanel);
    }
    for (int tap = 0; tap < 9; tap++) {
      const uint8_t* from = x.first + tap / 3 * row + tap % 3 * pixel;
      for (int q = 0; q < quads; q += kTileQuads, from += 4 * kTileQuads, w += 4 * kTileQuads * kPanel) {
        PARNET_TILE_LOAD(PARNET_WEIGHTS_LOW, w, 4 * kPanel);
        PARNET_TILE_LOAD(PARNET_VALUES, from, x.step);
        PARNET_TILE_DOT(PARNET_SUMS_LOW, PARNET_VALUES, PARNET_WEIGHTS_LOW);
        PARNET_TILE_LOAD(PARNET_WEIGHTS_HIGH, w + 64, 4 * kPanel);
        PARNET_TILE_DOT(PARNET_SUMS_HIGH, PARNET_VALUES, PARNET_WEIGHTS_HIGH);
        if (Two) {
          PARNET_TILE_LOAD(PARNET_VALUES_2, from + x.row_step, x.step);
          PARNET_TILE_DOT(PARNET_SUMS_LOW_2, PARNET_VALUES_2, PARNET_WEIGHTS_LOW);
          PARNET_TILE_DOT(PARNET_SUMS_HIGH_2, PARNET_VALUES_2, PARNET_WEIGHTS_HIGH);
        }
      }
    }
    PARNET_TILE_STORE(PARNET_SUMS_LOW, sums, 4 * kPanel);
    PARNET_TILE_STORE(PARNET_SUMS_HIGH, sums + 16, 4 * kPanel);
    if (Two) {
      PARNET_TILE_STORE(PARNET_SUMS_LOW_2, sums_2, 4 * kPanel);
      PARNET_TILE_STORE(PARNET_SUMS_HIGH_2, sums_2 + 16, 4 * kPanel);
    }
  }

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
}  // namespace parnet::cpu::direct
