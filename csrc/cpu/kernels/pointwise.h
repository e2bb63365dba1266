// 1x1 convolutions of the training form: matrix products of pixels and channels, read where the maps lie.
#pragma once
#include "../training.h"
#include "microkernel.h"
#include "passes.h"

namespace parnet::cpu {
namespace {

// `Rows` pixels times one panel of outputs. x: [row][pitch], w: [channel][kPanel], y: [row][pitch]. Of the
// panel, `outputs` are stored.
template <int Rows>
__attribute__((noinline)) void multiply_pixels(const float* x, int64_t x_pitch, const float* w, int channels,
                                               float* y, int64_t y_pitch, int outputs, bool add) {
  Vec low[Rows], high[Rows];
  PARNET_UNROLL for (int r = 0; r < Rows; r++) low[r] = high[r] = zero();
  for (int c = 0; c < channels; c++, w += kPanel) {
    const Vec w0 = load(w), w1 = load(w + kLanes);
    PARNET_UNROLL for (int r = 0; r < Rows; r++) {
      const Vec value = splat(x[r * x_pitch + c]);
      accumulate(low[r], value, w0);
      accumulate(high[r], value, w1);
    }
  }
  const int second = outputs - kLanes;
  PARNET_UNROLL for (int r = 0; r < Rows; r++, y += y_pitch) {
    if (outputs == kPanel) {
      if (add) low[r] = low[r] + load_unaligned(y), high[r] = high[r] + load_unaligned(y + kLanes);
      store_unaligned(y, low[r]);
      store_unaligned(y + kLanes, high[r]);
      continue;
    }
    const int first = least(outputs, kLanes);
    if (add) low[r] = low[r] + load_first(y, first);
    store_first(y, low[r], first);
    if (second > 0) {
      if (add) high[r] = high[r] + load_first(y + kLanes, second);
      store_first(y + kLanes, high[r], second);
    }
  }
}

typedef void (*MultiplyPixels)(const float*, int64_t, const float*, int, float*, int64_t, int, bool);
template <int Rows = 1>
MultiplyPixels choose_pixels(int rows) {
  if constexpr (Rows == kMaxRows) {
    return multiply_pixels<Rows>;
  } else {
    return rows == Rows ? multiply_pixels<Rows> : choose_pixels<Rows + 1>(rows);
  }
}

void pointwise(const PointArgs& a, int image, int64_t first, int count) {
  const int in = a.in.channels, out = a.out.channels;
  const int64_t pitch = a.in.pixel;
  const float* x = pixels_of<float>(a.in, image, first);
  float* y = pixels_of<float>(a.out, image, first);
  // As equal as possible: few rows cannot hide the latency of the sums.
  const int strips = div_up(count, kMaxRows), rows = count / strips, bigger = count % strips;
  for (int k = 0; k * kPanel < out; k++) {
    const float* w = a.weight + int64_t{k} * in * kPanel;
    for (int s = 0, at = 0; s < strips; s++) {
      const int height = rows + (s < bigger);
      choose_pixels(height)(x + at * pitch, pitch, w, in, y + at * a.out.pixel + k * kPanel, a.out.pixel,
                            least(kPanel, out - k * kPanel), a.add);
      at += height;
    }
  }
}

// Channels of x times a panel of the gradient's, summed over pixels.
template <bool Whole>
PARNET_INLINE void multiply_point_gradient(const float* x, int64_t x_pitch, int channels, const float* g,
                                           int64_t g_pitch, int outputs, int count, float* to, bool fresh) {
  constexpr int kAtOnce = kLanes == 16 ? 8 : 4;
  for (int c = 0; c < channels; c += kAtOnce) {
    const int some = least(kAtOnce, channels - c);
    int64_t offset[kAtOnce];  // channels beyond the last are read as the last
    PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) offset[i] = c + least(i, some - 1);
    Vec low[kAtOnce], high[kAtOnce];
    PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) low[i] = high[i] = zero();
    for (int p = 0; p < count; p++) {
      const float *left = x + p * x_pitch, *right = g + p * g_pitch;
      const Vec r0 = Whole ? load_unaligned(right) : load_first(right, least(outputs, kLanes));
      const Vec r1 = Whole              ? load_unaligned(right + kLanes)
                     : outputs > kLanes ? load_first(right + kLanes, outputs - kLanes)
                                        : zero();
      PARNET_UNROLL for (int i = 0; i < kAtOnce; i++) {
        const Vec value = splat(left[offset[i]]);
        accumulate(low[i], value, r0);
        accumulate(high[i], value, r1);
      }
    }
    for (int i = 0; i < some; i++) {
      float* at = to + (c + i) * kPanel;
      store(at, fresh ? low[i] : low[i] + load(at));
      store(at + kLanes, fresh ? high[i] : high[i] + load(at + kLanes));
    }
  }
}

void point_gradient(const PointArgs& a, int image, int64_t first, int count, float* to, bool fresh) {
  const float* x = pixels_of<float>(a.in, image, first);
  const float* g = pixels_of<float>(a.out, image, first);
  for (int k = 0; k < a.out.channels; k += kPanel, to += a.in.channels * kPanel) {
    const int outputs = least(kPanel, a.out.channels - k);
    const auto multiply = outputs == kPanel ? multiply_point_gradient<true> : multiply_point_gradient<false>;
    multiply(x, a.in.pixel, a.in.channels, g + k, a.out.pixel, outputs, count, to, fresh);
  }
}

}  // namespace
}  // namespace parnet::cpu
