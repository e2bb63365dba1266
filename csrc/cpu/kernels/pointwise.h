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

// `count` pixels of one block, or the first `channels` lanes of it, to [pixel][pitch]; zeros in other lanes.
PARNET_INLINE void copy_block(const float* from, int64_t from_pitch, int channels, int count, float* to,
                              int pitch) {
  for (int p = 0; p < count; p++, from += from_pitch, to += pitch) {
    store(to, channels == kLanes ? load_unaligned(from) : load_first(from, channels < 0 ? 0 : channels));
  }
}

// Some channels of x, [pixel][kLanes], times a panel of the gradient's, [pixel][kPanel], summed over pixels.
constexpr int kPointChannels = kLanes == 16 ? 8 : 4;
void multiply_points(const float* left, const float* right, int count, float* to, int some, bool fresh) {
  Vec low[kPointChannels], high[kPointChannels];
  PARNET_UNROLL for (int i = 0; i < kPointChannels; i++) low[i] = high[i] = zero();
  for (int p = 0; p < count; p++, left += kLanes, right += kPanel) {
    const Vec r0 = load(right), r1 = load(right + kLanes);
    PARNET_UNROLL for (int i = 0; i < kPointChannels; i++) {
      const Vec value = splat(left[i]);
      accumulate(low[i], value, r0);
      accumulate(high[i], value, r1);
    }
  }
  PARNET_UNROLL for (int i = 0; i < kPointChannels; i++, to += kPanel) {
    if (i == some) break;
    store(to, fresh ? low[i] : low[i] + load(to));
    store(to + kLanes, fresh ? high[i] : high[i] + load(to + kLanes));
  }
}

void point_gradient(const PointArgs& a, int image, int64_t first, int count, float* to, bool fresh,
                    float* scratch) {
  const int channels = a.in.channels, outputs = a.out.channels;
  float *left = scratch, *right = scratch + div_up(channels, kLanes) * kLanes * kPointPixels;
  for (int start = 0; start < count; start += kPointPixels, fresh = false) {
    const int some = least(kPointPixels, count - start);
    const float* x = pixels_of<float>(a.in, image, first + start);
    const float* g = pixels_of<float>(a.out, image, first + start);
    for (int c = 0; c < channels; c += kLanes) {
      copy_block(x + c, a.in.pixel, least(kLanes, channels - c), some, left + int64_t{c} * some, kLanes);
    }
    float* panel = to;
    for (int k = 0; k < outputs; k += kPanel) {
      copy_block(g + k, a.out.pixel, least(kLanes, outputs - k), some, right, kPanel);
      copy_block(g + k + kLanes, a.out.pixel, least(kLanes, outputs - k - kLanes), some, right + kLanes,
                 kPanel);
      for (int c = 0; c < channels; c += kPointChannels, panel += kPointChannels * kPanel) {
        multiply_points(left + int64_t{c / kLanes} * kLanes * some + c % kLanes, right, some, panel,
                        least(kPointChannels, channels - c), fresh);
      }
      panel = to + (k / kPanel + 1) * int64_t{channels} * kPanel;
    }
  }
}

template <class T>
void pool_in(const PointArgs& a, int image, int64_t first, int count) {
  const PixelMap& in = a.in;
  T* to = pixels_of<T>(a.out, image, first);
  for (int i = 0; i < count; i++, to += a.out.pixel) {
    const int row = 2 * ((first + i) / a.out.cols), col = 2 * ((first + i) % a.out.cols);
    const bool below = row + 1 < in.rows, beside = col + 1 < in.cols;
    const T* from = pixels_of<T>(in, image, int64_t{row} * in.cols + col);
    const T* next = from + in.cols * in.pixel;
    each_block(in.channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
      Vec sum = read<Whole>(from + c, lanes);
      if (beside) sum = sum + read<Whole>(from + in.pixel + c, lanes);
      if (below) sum = sum + read<Whole>(next + c, lanes);
      if (below && beside) sum = sum + read<Whole>(next + in.pixel + c, lanes);
      write<Whole>(to + c, .25f * sum, lanes);
    });
  }
}
void pool(const PointArgs& a, int image, int64_t first, int count) {
  PARNET_BY_DTYPE(a.in.dtype, pool_in, a, image, first, count)
}

}  // namespace
}  // namespace parnet::cpu
