// Kernels of the training form: the bare 3x3 convolution on users' channels_last maps with the moments of its
// result, and the gradient of its weights. The elementwise passes are in passes.h.
//
// The gradient of the weights is the transposed algorithm: y = inverse(u * forward(x)) at every point, so
// d_u = forward(x) * transposed inverse(d_y), summed over tiles: a matrix product [channels, tiles] *
// [tiles, outputs] for each matrix of weights; then the taps' part in each u.
#pragma once
#include "../training.h"
#include "convolution.h"
#include "passes.h"
#include "pointwise.h"

namespace parnet::cpu {
namespace {

constexpr int kMaxIn = 9;  // inputs of a tile along an axis
PARNET_INLINE int outputs_of(int stride, int kind) { return kSchemes[stride - 1][kind].outputs; }
PARNET_INLINE int inputs_of(int stride, int kind) { return stride * (outputs_of(stride, kind) - 1) + 3; }

template <class T>
PARNET_INLINE T* pixel_at(const PixelMap& map, int64_t image, int64_t row, int64_t col, int channel) {
  return static_cast<T*>(map.data) + ((image * map.rows + row) * map.cols + col) * map.pixel + channel;
}

// A window of `rows` x `cols` pixels, of one block of channels; zeros beyond the map. to:
// [row][kMaxIn][lane].
template <class T>
void gather(const PixelMap& x, int image, int row, int col, int rows, int cols, int channel, float* to) {
  const int channels = least(kLanes, x.channels - channel);
  const int first = col < 0 ? -col : 0, last = least(cols, x.cols - col);
  for (int i = 0; i < rows; i++, to += kMaxIn * kLanes) {
    if (row + i < 0 || row + i >= x.rows) {
      for (int j = 0; j < cols; j++) store(to + j * kLanes, zero());
      continue;
    }
    const T* from = pixel_at<T>(x, image, row + i, col, channel);
    for (int j = 0; j < first; j++) store(to + j * kLanes, zero());
    if (channels == kLanes) {
      for (int j = first; j < last; j++) store(to + j * kLanes, read_lanes(from + j * x.pixel));
    } else {
      for (int j = first; j < last; j++) store(to + j * kLanes, read_first(from + j * x.pixel, channels));
    }
    for (int j = last < 0 ? 0 : last; j < cols; j++) store(to + j * kLanes, zero());
  }
}

void gather(const PixelMap& x, int image, int row, int col, int rows, int cols, int channel, float* to) {
  PARNET_BY_DTYPE(x.dtype, gather, x, image, row, col, rows, cols, channel, to)
}

void transform_map(const PixelMap& in, int stride, const TileSet& set, int first, int last, float* v) {
  alignas(64) float window[(kMaxIn + 1) * kMaxIn * kLanes];  // the transform fetches beyond it
  for (int b = first; b < last; b++) {
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      gather(in, tile.image, stride * tile.row - 1, stride * tile.col - 1, inputs_of(stride, tile.row_kind),
             inputs_of(stride, tile.col_kind), b * kLanes, window);
      kTransforms[stride - 1].forward[tile.row_kind][tile.col_kind](
          window, kMaxIn * kLanes, v, set.table->v_offset + t * kMaxTransforms,
          set.table->v_step + t * kMaxTransforms, b);
    }
  }
}

void transform_plain(const PlainArgs& a, const TileSet& set, int first, int last, float* v) {
  transform_map(a.in, a.packed->stride, set, first, last, v);
}

// Stores one tile of one block of output channels, and its moments.
template <class T>
void finish_tile(const PlainArgs& a, const Tile& tile, int out_block, const float* z) {
  const int channels = least(kLanes, a.out.channels - out_block * kLanes);
  Vec sum = zero();
  for (int i = 0; i < tile.rows; i++) {
    T* y = pixel_at<T>(a.out, tile.image, tile.row + i, tile.col, out_block * kLanes);
    for (int j = 0; j < tile.cols; j++, y += a.out.pixel) {
      Vec value = load(z + (i * kMaxTile + j) * kLanes);
      sum = sum + value;
      if (channels == kLanes) {
        if (a.add) value = value + read_lanes(y);
        write_lanes(y, value);
      } else {
        if (a.add) value = value + read_first(y, channels);
        write_first(y, value, channels);
      }
    }
  }
  if (!a.sums) return;
  const Vec mean = (1.f / (tile.rows * tile.cols)) * sum;
  Vec square = zero();
  for (int i = 0; i < tile.rows; i++) {
    for (int j = 0; j < tile.cols; j++) {
      const Vec d = load(z + (i * kMaxTile + j) * kLanes) - mean;
      square = fma(d, d, square);
    }
  }
  const int64_t to = (int64_t{tile.sum_row} * a.packed->out_blocks + out_block) * kLanes;
  store(a.sums + to, sum);
  store(a.squares + to, square);
}

typedef void (*FinishTile)(const PlainArgs&, const Tile&, int, const float*);
FinishTile choose_finish(Dtype dtype) {
  return dtype == Dtype::kFloat     ? finish_tile<float>
         : dtype == Dtype::kFloat16 ? finish_tile<Float16>
                                    : finish_tile<BFloat16>;
}

void convolve_plain(const PlainArgs& a, const TileSet& set, const float* v, float* m, float* u) {
  const PackedHeader& h = *a.packed;
  ConvArgs c{};
  c.packed = a.packed;
  c.sum_channels = a.sum_channels;
  c.chunk_blocks = a.chunk_blocks;
  const FinishTile finish = choose_finish(a.out.dtype);
  constexpr int kStep = panels_at_once(kLanes);
  alignas(64) float z[kMaxTile * kMaxTile * kLanes];
  for (int k = 0; k < h.panels; k += kStep) {
    const int last = least(k + kStep, h.panels);
    transforms_at_call(h.storage) ? multiply_taps(c, *set.table, v, k, last, m, u)
                                  : multiply_transformed(c, *set.table, v, k, last, m);
    for (int b = 2 * k; b < least(2 * last, h.out_blocks); b++) {
      const float* from = m + int64_t{b / 2 - k} * set.table->m_rows * kPanel + b % 2 * kLanes;
      for (int t = 0; t < set.count; t++) {
        const Tile& tile = set.tiles[t];
        kTransforms[h.stride - 1].inverse[tile.row_kind][tile.col_kind](
            from, set.table->m_offset + t * kMaxTransforms, z);
        finish(a, tile, b, z);
      }
    }
  }
}

// ---- The gradient of the weights.

// d: [row][kMaxIn][lane], the gradients of one tile, zeros where it lies beyond the map.
template <class Row, class Col>
__attribute__((noinline)) void transposed_tile(const float* d, const int32_t* offset, float* m) {
  Vec half[Row::kValues][Col::kOut];
  PARNET_UNROLL for (int j = 0; j < Col::kOut; j++) {
    Vec y[Row::kOut], o[Row::kValues];
    PARNET_UNROLL for (int i = 0; i < Row::kOut; i++) y[i] = load(d + (i * kMaxIn + j) * kLanes);
    Row::transposed(y, o);
    PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) half[i][j] = o[i];
  }
  PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) {
    Vec o[Col::kValues];
    Col::transposed(half[i], o);
    PARNET_UNROLL for (int j = 0; j < Col::kValues; j++) store(m + offset[i * Col::kValues + j], o[j]);
  }
}

typedef void (*TransposedTile)(const float*, const int32_t*, float*);
struct TransposedTiles {
  TransposedTile of[4][4];  // [row kind][column kind]
};
template <int Stride, int... Pair>
constexpr TransposedTiles transposed_tiles(std::integer_sequence<int, Pair...>) {
  constexpr int kinds = kKinds[Stride - 1];
  TransposedTiles t{};
  ((t.of[Pair / kinds][Pair % kinds] =
        transposed_tile<SchemeOf<Stride, Pair / kinds>, SchemeOf<Stride, Pair % kinds>>),
   ...);
  return t;
}
// [stride - 1]
constexpr TransposedTiles kTransposed[2] = {
    transposed_tiles<1>(std::make_integer_sequence<int, kKinds[0] * kKinds[0]>()),
    transposed_tiles<2>(std::make_integer_sequence<int, kKinds[1] * kKinds[1]>())};

void spread_tiles(const GradientArgs& a, const TileSet& set, int panel, float* m) {
  const int stride = a.packed->stride;
  alignas(64) float window[kMaxIn * kMaxIn * kLanes];
  for (int half = 0; half < 2; half++) {
    const int channel = panel * kPanel + half * kLanes;
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      const int rows = outputs_of(stride, tile.row_kind);
      const int cols = outputs_of(stride, tile.col_kind);
      if (channel < a.gradient.channels) {
        gather(a.gradient, tile.image, tile.row, tile.col, rows, cols, channel, window);
      } else {
        for (int i = 0; i < kMaxIn * kMaxIn; i++) store(window + i * kLanes, zero());
      }
      kTransposed[stride - 1].of[tile.row_kind][tile.col_kind](
          window, set.table->m_offset + t * kMaxTransforms, m + half * kLanes);
    }
  }
}

// Channels whose sums are in registers together, times a panel.
constexpr int kAtOnce = kLanes == 16 ? 8 : 4;

void multiply_transposed(const GradientArgs& a, const MatrixUse& use, int first, int last, const float* v,
                         const float* m, float* du, bool fresh) {
  const int blocks = a.packed->group_blocks;
  const int small = use.rows / use.strips, bigger = use.rows % use.strips;
  for (int b = first; b < last; b++) {
    for (int c = 0; c < kLanes; c += kAtOnce, du += kAtOnce * kPanel) {
      Vec low[kAtOnce], high[kAtOnce];
      PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) low[i] = high[i] = zero();
      const float* panel = v + use.first_value;
      const float* right = m + int64_t{use.first_row} * kPanel;
      for (int p = 0; p < use.strips; p++) {
        const int rows = small + (p < bigger);
        const float* left = panel + int64_t{b} * rows * kLanes + c;
        for (int r = 0; r < rows; r++, left += kLanes, right += kPanel) {
          const Vec r0 = load(right), r1 = load(right + kLanes);
          PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) {
            const Vec x = splat(left[i]);
            accumulate(low[i], x, r0);
            accumulate(high[i], x, r1);
          }
        }
        panel += strip_floats(rows, blocks, kLanes);
      }
      // Of sums over blocks of tiles less is lost to rounding than of one sum over all tiles.
      PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) {
        float* to = du + i * kPanel;
        store(to, fresh ? low[i] : low[i] + load(to));
        store(to + kLanes, fresh ? high[i] : high[i] + load(to + kLanes));
      }
    }
  }
}

// What the three taps along one axis have of the values at the slots, the transpose of kSlots.
template <int Stride>
PARNET_INLINE void fold_axis(const Vec* u, Vec* taps) {
  if constexpr (Stride == 1) {
    const Vec s1 = u[2] + u[3], s2 = u[4] + u[5], s3 = u[6] + u[7];
    taps[0] = fma(4.f, s3, u[0] + s1 + s2);
    taps[1] = fma(2.f, (u[4] - u[5]) + (u[6] - u[7]), u[2] - u[3]);
    taps[2] = fma(4.f, s2, u[1] + s1 + s3);
  } else {
    taps[0] = u[0] + (u[1] + u[2]) + u[3];
    taps[1] = u[5];
    taps[2] = fma(2.f, u[3], u[1] - u[2]) + u[4];
  }
}

template <int Stride>
void fold_gradient_of(const GradientArgs& a, const float* du, const uint8_t* used, int panel, int first,
                      int last, float* to) {
  constexpr int kSlots = Stride == 1 ? kMaxSlots : kFewSlots;
  const PackedHeader& h = *a.packed;
  const int slots = slots_of(h.stride, h.in_channels);
  const int outputs = least(kPanel, h.out_channels - panel * kPanel);
  const int64_t matrix = int64_t{last - first} * kLanes * kPanel;
  alignas(64) float block[9 * kPanel];
  for (int b = first; b < last; b++) {
    const int channels = least(kLanes, h.in_channels - b * kLanes);
    for (int c = 0; c < channels; c++) {
      const int channel = b * kLanes + c;
      for (int half = 0; half < kPanel; half += kLanes) {
        Vec rows[3][kSlots];
        PARNET_UNROLL for (int j = 0; j < kSlots; j++) {
          Vec u[kSlots], taps[3];
          PARNET_UNROLL for (int i = 0; i < kSlots; i++) {
            const int slot = i * slots + j;
            const bool there = i < slots && j < slots && used[slot];
            u[i] = there ? load(du + slot * matrix + ((b - first) * kLanes + c) * kPanel + half) : zero();
          }
          fold_axis<Stride>(u, taps);
          PARNET_UNROLL for (int i = 0; i < 3; i++) rows[i][j] = taps[i];
        }
        PARNET_UNROLL for (int i = 0; i < 3; i++) {
          Vec taps[3];
          fold_axis<Stride>(rows[i], taps);
          PARNET_UNROLL for (int j = 0; j < 3; j++) store(block + (3 * i + j) * kPanel + half, taps[j]);
        }
      }
      for (int k = 0; k < outputs; k++) {
        float* at = to + (int64_t{panel * kPanel + k} * h.in_channels + channel) * 9;
        PARNET_UNROLL for (int tap = 0; tap < 9; tap++) at[tap] = block[tap * kPanel + k];
      }
    }
  }
}

void transform_gradient_input(const GradientArgs& a, const TileSet& set, int first, int last, float* v) {
  transform_map(a.in, a.packed->stride, set, first, last, v);
}

void fold_gradient(const GradientArgs& a, const float* du, const uint8_t* used, int panel, int first,
                   int last, float* to) {
  a.packed->stride == 1 ? fold_gradient_of<1>(a, du, used, panel, first, last, to)
                        : fold_gradient_of<2>(a, du, used, panel, first, last, to);
}

}  // namespace
}  // namespace parnet::cpu
