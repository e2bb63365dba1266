// Products of a map's values and weights: `rows` pixels times kPanel output channels, sums in registers.
//
// What an isa file defines before: PARNET_DOT_LANES (32-bit sums in a vector), PARNET_DOT_ROWS (pixels whose
// two vectors of sums fit the registers) and dot(sum, bytes, weights), or PARNET_DOT_TILES.
#pragma once
#include <string.h>

#include "element.h"

namespace parnet::cpu::direct {
namespace {

// The pixels of one call, in one or two rows of the map: the first one's first byte, and the bytes from one
// to the next and from row to row.
struct Pixels {
  const uint8_t* first;
  int64_t step, row_step;
};

#ifndef PARNET_DOT_TILES

// Two vectors of output channels.
template <int Rows>
PARNET_INLINE void multiply(const uint8_t* x, int64_t step, int64_t row, int64_t pixel, int quads,
                            const int8_t* w, int32_t* sums) {
  constexpr int kLanes = PARNET_DOT_LANES;
  Sum low[Rows], high[Rows];
  PARNET_UNROLL for (int r = 0; r < Rows; r++) {
    low[r] = load_sum(sums + r * kPanel);
    high[r] = load_sum(sums + r * kPanel + kLanes);
  }
  for (int tap = 0; tap < 9; tap++) {
    const uint8_t* from = x + tap / 3 * row + tap % 3 * pixel;
    for (int q = 0; q < quads; q++, from += 4, w += 4 * kPanel) {
      const Weights w0 = load_weights(w), w1 = load_weights(w + 4 * kLanes);
      PARNET_UNROLL for (int r = 0; r < Rows; r++) {
        int32_t bytes;
        memcpy(&bytes, from + r * step, 4);
        dot(low[r], bytes, w0);
        dot(high[r], bytes, w1);
      }
    }
  }
  PARNET_UNROLL for (int r = 0; r < Rows; r++) {
    store_sum(sums + r * kPanel, low[r]);
    store_sum(sums + r * kPanel + kLanes, high[r]);
  }
}

template <int Rows>
__attribute__((noinline)) void multiply_rows(const uint8_t* x, int64_t step, int64_t row, int64_t pixel,
                                             int quads, const int8_t* w, int32_t* sums) {
  for (int lane = 0; lane < kPanel; lane += 2 * PARNET_DOT_LANES) {
    multiply<Rows>(x, step, row, pixel, quads, w + 4 * lane, sums + lane);
  }
}

typedef void (*MultiplyRows)(const uint8_t*, int64_t, int64_t, int64_t, int, const int8_t*, int32_t*);
template <int Rows = 1>
MultiplyRows choose_rows(int rows) {
  if constexpr (Rows == PARNET_DOT_ROWS) {
    return multiply_rows<Rows>;
  } else {
    return rows == Rows ? multiply_rows<Rows> : choose_rows<Rows + 1>(rows);
  }
}

struct Multiplier {
  static constexpr int kMapRows = 1;  // that one call may multiply

  // `count` pixels a map's row. sums: [map row][kMaxRows][kPanel], added to. x: the corner of the first
  // pixel's 3x3 window. `row`, `pixel`: bytes from one row or column of the window to the next.
  void multiply(Pixels x, int /*map_rows*/, int64_t row, int64_t pixel, int quads, const int8_t* w, int count,
                int32_t* sums) {
    const int parts = (count + PARNET_DOT_ROWS - 1) / PARNET_DOT_ROWS;
    for (int i = 0; i < parts; i++) {
      const int rows = (count + parts - 1 - i) / parts;  // as equal as they can be
      choose_rows(rows)(x.first, x.step, row, pixel, quads, w, sums);
      x.first += rows * x.step;
      sums += rows * kPanel;
    }
  }
};

#endif

}  // namespace
}  // namespace parnet::cpu::direct
