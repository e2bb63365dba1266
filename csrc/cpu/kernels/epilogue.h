// The epilogue: what follows the convolution, on one tile of outputs, and the channel sums of what it stores.
//
//   y = out_scale*phi(conv_gate*(conv + bias) + skip_gate*x + skip_bias) + out_shift
//
// `gate` (gate.h) has reduced the argument of phi to two numbers for each image and channel: it is
// conv + scale*x + offset with a skip, and scale*conv + offset without.
#pragma once
#include "../layer.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

constexpr int kMaxGroups = 2;

template <class T>
PARNET_INLINE const T* section(const PackedHeader& h, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(&h) + offset);
}

typedef float TileValues[kMaxTile * kMaxTile * kLanes];
typedef void (*Epilogue)(const ConvArgs&, const Tile&, int panel, int half, int out_block,
                         const TileValues* z);

template <bool SiLU>
PARNET_INLINE Vec activate(Vec x) {
  return SiLU ? silu(x) : relu(x);
}

// Output scale and shift, store and sum of one block of channels; value(i, j) is phi(...) of one pixel. Rows
// and Cols of 0: the tile's own. Whole: all channels of the block are stored.
template <bool Affine, bool Whole, int Rows, int Cols, class Value>
PARNET_INLINE void emit_sized(const ConvArgs& a, const Tile& tile, int out_block, int channels, Value value) {
  const PackedHeader& h = *a.packed;
  const int rows = Rows ? Rows : tile.rows, cols = Cols ? Cols : tile.cols;
  const int64_t pixel = a.out.pixel;
  float* y = a.out.base + tile.image * a.out.image + out_block * a.out.block + tile.row * a.out.row +
             tile.col * pixel;
  Vec scale = zero(), shift = zero(), sum = zero();
  if (Affine) {
    scale = load(section<float>(h, h.out_scale) + out_block * kLanes);
    shift = load(section<float>(h, h.out_shift) + out_block * kLanes);
  }
  for (int i = 0; i < rows; i++, y += a.out.row) {
    const auto one = [&](int j) PARNET_INLINE_LAMBDA {
      Vec v = value(i, j);
      if (Affine) v = fma(v, scale, shift);
      sum = sum + v;
      Whole ? store_unaligned(y + j * pixel, v) : store_first(y + j * pixel, v, channels);
      prefetch_to_write(y + (j + cols) * pixel);  // the next tile is most likely the one to the right
    };
    if constexpr (Cols) {
      PARNET_UNROLL
      for (int j = 0; j < Cols; j++) one(j);
    } else {
      for (int j = 0; j < cols; j++) one(j);
    }
  }
  store(a.sums + (int64_t{tile.sum_row} * h.out_blocks + out_block) * kLanes, sum);
}

template <bool Affine, class Value>
PARNET_INLINE void emit(const ConvArgs& a, const Tile& tile, int out_block, Value value) {
  // A user's tensor has no padding behind the last channel.
  const int left = a.packed->out_channels - out_block * kLanes;
  const int channels = a.out.pixel == kLanes ? kLanes : least(kLanes, left);
  if (channels < kLanes) {
    emit_sized<Affine, false, 0, 0>(a, tile, out_block, channels, value);
  } else if (tile.rows == 6 && tile.cols == 6) {
    emit_sized<Affine, true, 6, 6>(a, tile, out_block, channels, value);
  } else if (tile.rows == 4 && tile.cols == 4) {
    emit_sized<Affine, true, 4, 4>(a, tile, out_block, channels, value);
  } else {
    emit_sized<Affine, true, 0, 0>(a, tile, out_block, channels, value);
  }
}

template <bool Skip, bool SiLU, bool Affine>
void epilogue_dense(const ConvArgs& a, const Tile& tile, int panel, int half, int out_block,
                    const TileValues* z) {
  const int64_t at = (int64_t{tile.image} * a.packed->panels + panel) * kPanel + half * kLanes;
  const Vec scale = load(a.scale + at), offset = load(a.offset + at);
  const View& in = a.in[0];
  const int64_t row = in.row;
  const float* x =
      in.base + tile.image * in.image + out_block * in.block + tile.row * row + tile.col * kLanes;
  emit<Affine>(a, tile, out_block, [&](int i, int j) PARNET_INLINE_LAMBDA {
    const Vec conv = load(z[0] + (i * kMaxTile + j) * kLanes);
    if (Skip) prefetch(x + i * row + (j + tile.cols) * kLanes);
    return activate<SiLU>(Skip ? conv + fma(scale, load(x + i * row + j * kLanes), offset)
                               : fma(scale, conv, offset));
  });
}

// A fusion: the channels of its two groups alternate in the result.
template <bool SiLU, bool Affine>
void epilogue_interleaved(const ConvArgs& a, const Tile& tile, int panel, int half, int out_block,
                          const TileValues* z) {
  const int64_t at = (int64_t{tile.image} * a.packed->panels + panel) * kPanel + half * kLanes;
  const Vec scale0 = load(a.scale + at), offset0 = load(a.offset + at);
  const Vec scale1 = load(a.scale + at + kPanel), offset1 = load(a.offset + at + kPanel);
  alignas(64) TileValues mixed[kMaxGroups];
  for (int i = 0; i < tile.rows; i++) {
    for (int j = 0; j < tile.cols; j++) {
      const int at_z = (i * kMaxTile + j) * kLanes;
      Vec low, high;
      interleave(activate<SiLU>(fma(scale0, load(z[0] + at_z), offset0)),
                 activate<SiLU>(fma(scale1, load(z[1] + at_z), offset1)), low, high);
      store(mixed[0] + at_z, low);
      store(mixed[1] + at_z, high);
    }
  }
  for (int b = 0; b < 2 && out_block + b < a.packed->out_blocks; b++) {
    emit<Affine>(a, tile, out_block + b, [&](int i, int j) PARNET_INLINE_LAMBDA {
      return load(mixed[b] + (i * kMaxTile + j) * kLanes);
    });
  }
}

template <bool SiLU, bool Affine>
Epilogue choose_epilogue(const PackedHeader& h) {
  if (h.groups == 2) return epilogue_interleaved<SiLU, Affine>;
  return h.kind == Kind::kRepVGG ? epilogue_dense<true, SiLU, Affine> : epilogue_dense<false, SiLU, Affine>;
}
Epilogue choose_epilogue(const PackedHeader& h) {
  const bool affine = h.out_scale != 0;
  if (h.activation == Activation::kSiLU)
    return affine ? choose_epilogue<true, true>(h) : choose_epilogue<true, false>(h);
  return affine ? choose_epilogue<false, true>(h) : choose_epilogue<false, false>(h);
}

}  // namespace
}  // namespace parnet::cpu
