// The first layer of a network, few input channels: a direct 3x3 convolution on planar rows, because three
// channels cannot fill a block.
#pragma once
#include "epilogue.h"

namespace parnet::cpu {
namespace {

// One row of outputs of one panel.
struct StemRow {
  const float* lines[3 * kStemChannels];  // [channel][tap row]
  const float* weight;
  float* y;
  int64_t block, pixel;
  int32_t num_lines, halves;
  int32_t channels[2];  // stored of each half: a user's tensor has no padding behind its last channel
  bool affine;
  Vec scale[2], offset[2], out_scale[2], out_shift[2], sum[2];
};

// Computes `groups` times Pixels neighbouring outputs, from pixel `start` on.
template <int Stride, bool SiLU, int Pixels>
__attribute__((noinline)) void stem_pixels(StemRow& row, int start, int groups) {
  for (int g = 0; g < groups; g++, start += Pixels) {
    Vec acc[2][Pixels];
    PARNET_UNROLL for (int p = 0; p < Pixels; p++) acc[0][p] = acc[1][p] = zero();
    const float* w = row.weight;
    for (int l = 0; l < row.num_lines; l++) {
      const float* x = row.lines[l] + start * Stride;
      PARNET_UNROLL for (int s = 0; s < 3; s++, w += kPanel) {
        const Vec low = load(w), high = load(w + kLanes);
        PARNET_UNROLL for (int p = 0; p < Pixels; p++) {
          const Vec v = splat(x[p * Stride + s]);
          accumulate(acc[0][p], v, low);
          accumulate(acc[1][p], v, high);
        }
      }
    }
    PARNET_UNROLL for (int half = 0; half < 2; half++) {
      if (half == row.halves) break;
      // Local copies: the compiler cannot know that no store to y changes `row`.
      const Vec scale = row.scale[half], offset = row.offset[half];
      const Vec out_scale = row.out_scale[half], out_shift = row.out_shift[half];
      const bool affine = row.affine;
      const int channels = row.channels[half];
      const int64_t pixel = row.pixel;
      float* y = row.y + half * row.block + start * pixel;
      Vec sum = row.sum[half];
      PARNET_UNROLL for (int p = 0; p < Pixels; p++) {
        Vec v = activate<SiLU>(fma(scale, acc[half][p], offset));
        if (affine) v = fma(v, out_scale, out_shift);
        sum = sum + v;
        channels == kLanes ? store_unaligned(y + p * pixel, v) : store_first(y + p * pixel, v, channels);
      }
      row.sum[half] = sum;
    }
  }
}

template <int Stride, bool SiLU, int Pixels = 1>
void stem_rest(StemRow& row, int start, int pixels) {
  if constexpr (Pixels < kMaxRows) {
    if (pixels == Pixels) return stem_pixels<Stride, SiLU, Pixels>(row, start, 1);
    stem_rest<Stride, SiLU, Pixels + 1>(row, start, pixels);
  }
}

template <int Stride, bool SiLU>
void stem_rows(const StemArgs& a, int image, int first_row, int last_row) {
  const PackedHeader& h = *a.packed;
  StemRow row;
  row.num_lines = h.in_channels * 3;
  row.block = a.out.block;
  row.pixel = a.out.pixel;
  row.affine = h.out_scale != 0;
  for (int y = first_row; y < last_row; y++) {
    for (int c = 0; c < h.in_channels; c++) {
      for (int r = 0; r < 3; r++) {  // row 0 of a plane is the zero row above the image
        row.lines[3 * c + r] =
            a.planes + image * a.image + c * a.channel + (int64_t{Stride} * y + r) * a.pitch;
      }
    }
    for (int k = 0; k < h.panels; k++) {
      row.halves = least(2, h.out_blocks - 2 * k);
      row.weight = section<float>(h, h.stem_weight) + int64_t{k} * row.num_lines * 3 * kPanel;
      row.y = a.out.base + image * a.out.image + 2 * k * a.out.block + y * a.out.row;
      for (int half = 0; half < row.halves; half++) {
        const int64_t at = (int64_t{image} * h.panels + k) * kPanel + half * kLanes;
        row.scale[half] = load(a.scale + at);
        row.offset[half] = load(a.offset + at);
        if (row.affine) {
          row.out_scale[half] = load(section<float>(h, h.out_scale) + (2 * k + half) * kLanes);
          row.out_shift[half] = load(section<float>(h, h.out_shift) + (2 * k + half) * kLanes);
        }
        row.sum[half] = zero();
        row.channels[half] =
            row.pixel == kLanes ? kLanes : least(kLanes, h.out_channels - (2 * k + half) * kLanes);
      }
      const int groups = a.out_cols / kMaxRows, done = groups * kMaxRows;
      stem_pixels<Stride, SiLU, kMaxRows>(row, 0, groups);
      stem_rest<Stride, SiLU>(row, done, a.out_cols - done);
      float* sums = a.sums + ((int64_t{image} * a.out_rows + y) * h.out_blocks + 2 * k) * kLanes;
      for (int half = 0; half < row.halves; half++) store(sums + half * kLanes, row.sum[half]);
    }
  }
}

void stem(const StemArgs& a, int image, int first_row, int last_row) {
  const bool silu = a.packed->activation == Activation::kSiLU;
  if (a.packed->stride == 2) {
    silu ? stem_rows<2, true>(a, image, first_row, last_row)
         : stem_rows<2, false>(a, image, first_row, last_row);
  } else {
    silu ? stem_rows<1, true>(a, image, first_row, last_row)
         : stem_rows<1, false>(a, image, first_row, last_row);
  }
}

}  // namespace
}  // namespace parnet::cpu
