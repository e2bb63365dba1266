// 1x1 convolutions of the training form: matrix products of pixels and channels, read where the maps lie.
#pragma once
#include "../training.h"
#include "microkernel.h"
#include "passes.h"

namespace parnet::cpu {
namespace {

// `Rows` pixels times one panel of outputs. x: [row][pitch], w: [channel][kPanel], y: [row][pitch]. Of the
// panel, `outputs` are stored.
template <class T, int Rows>
__attribute__((noinline)) void multiply_pixels(const float* x, int64_t x_pitch, const float* w, int channels,
                                               T* y, int64_t y_pitch, int outputs, bool add) {
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
      if (add) low[r] = low[r] + read_lanes(y), high[r] = high[r] + read_lanes(y + kLanes);
      write_lanes(y, low[r]);
      write_lanes(y + kLanes, high[r]);
      continue;
    }
    const int first = least(outputs, kLanes);
    if (add) low[r] = low[r] + read_first(y, first);
    write_first(y, low[r], first);
    if (second > 0) {
      if (add) high[r] = high[r] + read_first(y + kLanes, second);
      write_first(y + kLanes, high[r], second);
    }
  }
}

template <class T>
using MultiplyPixels = void (*)(const float*, int64_t, const float*, int, T*, int64_t, int, bool);
template <class T, int Rows = 1>
MultiplyPixels<T> choose_pixels(int rows) {
  if constexpr (Rows == kMaxRows) {
    return multiply_pixels<T, Rows>;
  } else {
    return rows == Rows ? multiply_pixels<T, Rows> : choose_pixels<T, Rows + 1>(rows);
  }
}

PARNET_INLINE const float* as_floats(const float* from, int64_t, int, int, float*) { return from; }
template <class T>
const float* as_floats(const T* from, int64_t pitch, int channels, int count, float* to) {
  for (int p = 0; p < count; p++, from += pitch) {
    each_block(channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
      write<Whole>(to + int64_t{p} * channels + c, read<Whole>(from + c, lanes), lanes);
    });
  }
  return to;
}

template <class T>
void pointwise_in(const PointArgs& a, int image, int64_t first, int count, float* scratch) {
  const int in = a.in.channels, out = a.out.channels;
  const float* x = as_floats(pixels_of<T>(a.in, image, first), a.in.pixel, in, count, scratch);
  const int64_t pitch = x == scratch ? in : a.in.pixel;
  T* y = pixels_of<T>(a.out, image, first);
  // As equal as possible: few rows cannot hide the latency of the sums.
  const int strips = div_up(count, kMaxRows), rows = count / strips, bigger = count % strips;
  for (int k = 0; k * kPanel < out; k++) {
    const float* w = a.weight + int64_t{k} * in * kPanel;
    for (int s = 0, at = 0; s < strips; s++) {
      const int height = rows + (s < bigger);
      choose_pixels<T>(height)(x + at * pitch, pitch, w, in, y + at * a.out.pixel + k * kPanel, a.out.pixel,
                               least(kPanel, out - k * kPanel), a.add);
      at += height;
    }
  }
}
void pointwise(const PointArgs& a, int image, int64_t first, int count, float* scratch) {
  PARNET_BY_DTYPE(a.in.dtype, pointwise_in, a, image, first, count, scratch)
}

// `count` pixels of one block, or the first `channels` lanes of it, to [pixel][pitch]; zeros in other lanes.
template <class T>
PARNET_INLINE void copy_block(const T* from, int64_t from_pitch, int channels, int count, float* to,
                              int pitch) {
  for (int p = 0; p < count; p++, from += from_pitch, to += pitch) {
    store(to, channels >= kLanes ? read_lanes(from) : channels > 0 ? read_first(from, channels) : zero());
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

template <class T>
void point_gradient_in(const PointArgs& a, int image, int64_t first, int count, float* to, bool fresh,
                       float* scratch) {
  const int channels = a.in.channels, outputs = a.out.channels;
  float *left = scratch, *right = scratch + div_up(channels, kLanes) * kLanes * kPointPixels;
  for (int start = 0; start < count; start += kPointPixels, fresh = false) {
    const int some = least(kPointPixels, count - start);
    const T* x = pixels_of<T>(a.in, image, first + start);
    const T* g = pixels_of<T>(a.out, image, first + start);
    for (int c = 0; c < channels; c += kLanes) {
      copy_block(x + c, a.in.pixel, channels - c, some, left + int64_t{c} * some, kLanes);
    }
    for (int k = 0; k < outputs; k += kPanel) {
      copy_block(g + k, a.out.pixel, outputs - k, some, right, kPanel);
      copy_block(g + k + kLanes, a.out.pixel, outputs - k - kLanes, some, right + kLanes, kPanel);
      float* panel = to + int64_t{k} * channels;
      for (int c = 0; c < channels; c += kPointChannels) {
        multiply_points(left + int64_t{c / kLanes} * kLanes * some + c % kLanes, right, some,
                        panel + c * kPanel, least(kPointChannels, channels - c), fresh);
      }
    }
  }
}
void point_gradient(const PointArgs& a, int image, int64_t first, int count, float* to, bool fresh,
                    float* scratch) {
  PARNET_BY_DTYPE(a.in.dtype, point_gradient_in, a, image, first, count, to, fresh, scratch)
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
