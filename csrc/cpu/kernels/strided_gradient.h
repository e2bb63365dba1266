// The input gradient of a 3x3 convolution of stride 2 by the transposed algorithm: y = inverse(u *
// forward(x)), so d_x = transposed forward(transposed u * transposed inverse(d_y)), added up where the
// windows of neighbouring tiles overlap. `in` is the gradient of the result, `out` that of the input.
#pragma once
#include "training.h"

namespace parnet::cpu {
namespace {

void transform_strided_gradient(const PlainArgs& a, const TileSet& set, int first, int last, float* v) {
  alignas(64) float window[kMaxIn * kMaxIn * kLanes];
  int32_t offset[kMaxTransforms];
  for (int b = first; b < last; b++) {
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      gather(a.in, tile.image, tile.row, tile.col, outputs_of(2, tile.row_kind), outputs_of(2, tile.col_kind),
             b * kLanes, window);
      for (int i = 0; i < kMaxTransforms; i++) {
        const int at = t * kMaxTransforms + i;
        offset[i] = set.table->v_offset[at] + b * set.table->v_step[at];
      }
      kTransposed[1].of[tile.row_kind][tile.col_kind](window, offset, v);
    }
  }
}

// Of one tile and one block of channels, products to its window of inputs: [row][kMaxIn][lane].
template <class Row, class Col>
__attribute__((noinline)) void adjoint_tile(const float* m, const int32_t* offset, float* window) {
  Vec half[Row::kIn][Col::kValues];
  PARNET_UNROLL for (int j = 0; j < Col::kValues; j++) {
    Vec o[Row::kValues], d[Row::kIn];
    PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) o[i] = load(m + offset[i * Col::kValues + j]);
    Row::adjoint(o, d);
    PARNET_UNROLL for (int i = 0; i < Row::kIn; i++) half[i][j] = d[i];
  }
  PARNET_UNROLL for (int i = 0; i < Row::kIn; i++) {
    Vec d[Col::kIn];
    Col::adjoint(half[i], d);
    PARNET_UNROLL for (int j = 0; j < Col::kIn; j++) store(window + (i * kMaxIn + j) * kLanes, d[j]);
  }
}

typedef void (*AdjointTile)(const float*, const int32_t*, float*);
struct AdjointTiles {
  AdjointTile of[4][4];  // [row kind][column kind]
};
template <int... Pair>
constexpr AdjointTiles adjoint_tiles(std::integer_sequence<int, Pair...>) {
  AdjointTiles t{};
  ((t.of[Pair / 4][Pair % 4] = adjoint_tile<SchemeOf<2, Pair / 4>, SchemeOf<2, Pair % 4>>), ...);
  return t;
}
constexpr AdjointTiles kAdjoint = adjoint_tiles(std::make_integer_sequence<int, 16>());

template <class T>
void add_window(const PixelMap& to, const Tile& tile, int channel, const float* window) {
  const int channels = least(kLanes, to.channels - channel), top = 2 * tile.row - 1, left = 2 * tile.col - 1;
  const int rows = least(inputs_of(2, tile.row_kind), to.rows - top);
  const int cols = least(inputs_of(2, tile.col_kind), to.cols - left);
  for (int i = top < 0; i < rows; i++) {
    T* y = pixel_at<T>(to, tile.image, top + i, left, channel);
    for (int j = left < 0; j < cols; j++) {
      const Vec value = load(window + (i * kMaxIn + j) * kLanes);
      T* at = y + j * to.pixel;
      if (channels == kLanes) {
        write_lanes(at, value + read_lanes(at));
      } else {
        write_first(at, value + read_first(at, channels), channels);
      }
    }
  }
}
void add_window(const PixelMap& to, const Tile& tile, int channel, const float* window) {
  PARNET_BY_DTYPE(to.dtype, add_window, to, tile, channel, window)
}

void add_strided_gradient(const PlainArgs& a, const TileSet& set, const float* v, int first, int last,
                          float* m, float* u) {
  const PackedHeader& h = *a.packed;
  ConvArgs c{};
  c.packed = a.packed;
  c.sum_channels = a.sum_channels;
  c.chunk_blocks = a.chunk_blocks;
  transforms_at_call(h.storage) ? multiply_taps(c, *set.table, v, first, last, m, u)
                                : multiply_transformed(c, *set.table, v, first, last, m);
  alignas(64) float window[kMaxIn * kMaxIn * kLanes];
  for (int b = 2 * first; b < least(2 * last, h.out_blocks); b++) {
    const float* from = m + int64_t{b / 2 - first} * set.table->m_rows * kPanel + b % 2 * kLanes;
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      kAdjoint.of[tile.row_kind][tile.col_kind](from, set.table->m_offset + t * kMaxTransforms, window);
      add_window(a.out, tile, b * kLanes, window);
    }
  }
}

}  // namespace
}  // namespace parnet::cpu
