// Between users' tensors (any strides, three dtypes) and blocked float activations, with the channel sums on
// the way in.
#pragma once
#include "layer.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

PARNET_INLINE float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
PARNET_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

PARNET_INLINE float widen(float x) { return x; }
PARNET_INLINE float widen(BFloat16 x) { return as_float(uint32_t{x.bits} << 16); }
PARNET_INLINE float widen(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  // Moving the exponent by a multiplication also normalises subnormal halves.
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

PARNET_INLINE void narrow(float f, float* to) { *to = f; }
PARNET_INLINE void narrow(float f, BFloat16* to) {
  const uint32_t u = as_bits(f);
  to->bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
PARNET_INLINE void narrow(float f, Half* to) {
  const uint32_t u = as_bits(f) & 0x7fffffffu, sign = as_bits(f) >> 31 << 15;
  const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1)) >> 13;
  const uint32_t subnormal = as_bits(as_float(u) + .5f) - 0x3f000000u;  // the addition rounds at 2^-24
  const uint32_t finite = u < 0x38800000u ? subnormal : normal;
  to->bits = (u > 0x7f800000u ? 0x7e00 : u >= 0x47800000u ? 0x7c00 : finite) | sign;
}

template <class T>
PARNET_INLINE const T* at(const Strided& x, int64_t n, int64_t c, int64_t h) {
  return static_cast<const T*>(x.data) + n * x.stride[0] + c * x.stride[1] + h * x.stride[2];
}

// Hardware does not foresee the few rows of each of many channels: asks for what comes `kRowsAhead` rows
// after row `h` of `block`, in this block of channels or the next one.
constexpr int kRowsAhead = 2;
template <class T, bool ToWrite>
PARNET_INLINE void fetch_lines(const Strided& x, int image, int block, int h, int first, int last) {
  h += kRowsAhead;
  if (h >= last) h += first - last, block++;
  const int channels = least(kLanes, static_cast<int>(x.size[1]) - block * kLanes);
  if (h >= last || channels <= 0 || x.stride[3] != 1) return;
  const T* line = at<T>(x, image, block * kLanes, h);
  for (int c = 0; c < channels; c++, line += x.stride[1]) {
    for (int64_t w = 0; w < x.size[3]; w += 64 / sizeof(T)) {
      const auto* from = reinterpret_cast<const float*>(line + w);
      ToWrite ? prefetch_to_write(from) : prefetch(from);
    }
  }
}

template <class T>
void read_line(const T* from, int64_t stride, int count, float* to) {
  if (stride == 1) {
    for (int i = 0; i < count; i++) to[i] = widen(from[i]);
  } else {
    for (int i = 0; i < count; i++) to[i] = widen(from[i * stride]);
  }
}

// The channels of one pixel, adjacent in memory, and zeros.
template <class T>
PARNET_INLINE Vec read_pixel(const T* from, int channels) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return channels == kLanes ? load_unaligned(from) : load_first(from, channels);
  } else {
    alignas(64) float pixel[kLanes] = {};
    if (channels == kLanes) {
      PARNET_UNROLL for (int c = 0; c < kLanes; c++) pixel[c] = widen(from[c]);
    } else {
      for (int c = 0; c < channels; c++) pixel[c] = widen(from[c]);
    }
    return load(pixel);
  }
}

// One row of `Blocks` blocks of channels, all adjacent in memory, of which the last block has `channels`:
// together they are whole cache lines of a pixel.
template <class T, int Blocks>
void enter_pixels(const T* from, int64_t stride, int channels, int width, float* to, int64_t block,
                  float* sums, int64_t ahead) {
  Vec sum[Blocks];
  PARNET_UNROLL for (int b = 0; b < Blocks; b++) sum[b] = zero();
  for (int w = 0; w < width; w++, from += stride, to += kLanes) {
    PARNET_UNROLL for (int b = 0; b < Blocks; b++) {
      prefetch(reinterpret_cast<const float*>(from + b * kLanes + ahead));
      const Vec v = read_pixel(from + b * kLanes, b + 1 < Blocks ? kLanes : channels);
      sum[b] = sum[b] + v;
      store(to + b * block, v);
    }
  }
  PARNET_UNROLL for (int b = 0; b < Blocks; b++) store(sums + b * kLanes, load(sums + b * kLanes) + sum[b]);
}

// One row of one block of channels, each channel a line elsewhere. `lines`: [kLanes][pitch].
Vec enter_lines(const float* const* line, int width, float* to) {
  Vec sum = zero();
  for (int w = 0; w < width; w += kLanes) {
    Vec square[kLanes];
    const int count = least(kLanes, width - w);
    if (count == kLanes) {
      PARNET_UNROLL for (int c = 0; c < kLanes; c++) square[c] = load_unaligned(line[c] + w);
    } else {
      alignas(64) float tail[kLanes * kLanes] = {};
      for (int c = 0; c < kLanes; c++) {
        for (int i = 0; i < count; i++) tail[c * kLanes + i] = line[c][w + i];
      }
      PARNET_UNROLL for (int c = 0; c < kLanes; c++) square[c] = load(tail + c * kLanes);
    }
    transpose(square);
    for (int i = 0; i < count; i++) {
      sum = sum + square[i];
      store(to + (w + i) * kLanes, square[i]);
    }
  }
  return sum;
}

// Of tensors whose channels are adjacent in memory.
template <class T>
void enter_pixel_rows(const Strided& x, const View& view, int image, int first, int last, float* sums) {
  constexpr int kAtOnce = 4;
  const int channels = x.size[1], width = x.size[3], blocks = (channels + kLanes - 1) / kLanes;
  for (int block = 0; block < blocks; block++) store(sums + block * kLanes, zero());
  for (int h = first; h < last; h++) {
    for (int block = 0; block < blocks; block += kAtOnce) {
      const int count = least(kAtOnce, blocks - block);
      const int rest = least(kLanes, channels - (block + count - 1) * kLanes);
      const T* from = at<T>(x, image, block * kLanes, h);
      float* to = view.base + image * view.image + block * view.block + h * view.row;
      const auto enter = count == 4   ? enter_pixels<T, 4>
                         : count == 3 ? enter_pixels<T, 3>
                         : count == 2 ? enter_pixels<T, 2>
                                      : enter_pixels<T, 1>;
      enter(from, x.stride[3], rest, width, to, view.block, sums + block * kLanes, x.stride[2]);
    }
  }
}

// Of others. `lines`: [kLanes][pitch].
template <class T>
void enter_line_rows(const Strided& x, const View& view, int image, int first, int last, float* sums,
                     float* lines) {
  const int channels = x.size[1], width = x.size[3], pitch = (width + 15) / 16 * 16;
  const bool direct = sizeof(T) == sizeof(float) && x.stride[3] == 1;
  for (int block = 0; block * kLanes < channels; block++) {
    const int first_channel = block * kLanes, count = least(kLanes, channels - first_channel);
    float* to = view.base + image * view.image + block * view.block;
    Vec sum = zero();
    for (int h = first; h < last; h++) {
      const T* from = at<T>(x, image, first_channel, h);
      fetch_lines<T, false>(x, image, block, h, first, last);
      const float* line[kLanes];
      for (int c = 0; c < kLanes; c++) {
        line[c] = lines + c * pitch;
        if (c >= count) {
          for (int w = 0; w < width; w++) lines[c * pitch + w] = 0;
        } else if (direct) {
          line[c] = reinterpret_cast<const float*>(from + c * x.stride[1]);
        } else {
          read_line(from + c * x.stride[1], x.stride[3], width, lines + c * pitch);
        }
      }
      sum = sum + enter_lines(line, width, to + h * view.row);
    }
    store(sums + block * kLanes, sum);
  }
}

template <class T>
void enter_rows(const Strided& x, const View& view, int image, int first, int last, float* sums,
                float* lines) {
  x.stride[1] == 1 ? enter_pixel_rows<T>(x, view, image, first, last, sums)
                   : enter_line_rows<T>(x, view, image, first, last, sums, lines);
}

// Rows of a zero-padded planar copy. Row 0 and column 0 of a plane are halo, as is everything beyond the
// image.
template <class T>
void enter_plane_rows(const Strided& x, const StemArgs& a, int image, int first, int last, float* sums) {
  const int width = x.size[3];
  for (int c = 0; c < kLanes; c++) sums[c] = 0;
  for (int c = 0; c < x.size[1]; c++) {
    for (int h = first; h < last; h++) {
      float* line = const_cast<float*>(a.planes) + image * a.image + c * a.channel + (h + 1) * a.pitch;
      read_line(at<T>(x, image, c, h), x.stride[3], width, line + 1);
      Vec sum = zero();
      int w = 0;
      for (; w + kLanes <= width; w += kLanes) sum = sum + load_unaligned(line + 1 + w);
      alignas(64) float part[kLanes];
      store(part, sum);
      float total = 0;
      for (int i = 0; i < kLanes; i++) total += part[i];
      for (; w < width; w++) total += line[1 + w];
      sums[c] += total;
    }
  }
}

// The first `count` lanes.
template <class T>
PARNET_INLINE void write_lanes(T* to, Vec v, int count) {
  if constexpr (sizeof(T) == sizeof(float)) {
    count == kLanes ? store_unaligned(to, v) : store_first(to, v, count);
  } else {
    alignas(64) float lanes[kLanes];
    store(lanes, v);
    if (count == kLanes) {
      PARNET_UNROLL for (int i = 0; i < kLanes; i++) narrow(lanes[i], to + i);
    } else {
      for (int i = 0; i < count; i++) narrow(lanes[i], to + i);
    }
  }
}

template <class T>
void leave_rows(const View& view, const Strided& y, int image, int first, int last) {
  const int channels = y.size[1], width = y.size[3];
  for (int block = 0; block * kLanes < channels; block++) {
    const int first_channel = block * kLanes, count = least(kLanes, channels - first_channel);
    const float* from = view.base + image * view.image + block * view.block;
    for (int h = first; h < last; h++) {
      T* to = const_cast<T*>(at<T>(y, image, first_channel, h));
      const float* row = from + h * view.row;
      if (y.stride[1] == 1) {
        for (int w = 0; w < width; w++) write_lanes(to + w * y.stride[3], load(row + w * kLanes), count);
        continue;
      }
      fetch_lines<T, true>(y, image, block, h, first, last);
      for (int w = 0; w < width; w += kLanes) {
        const int valid = least(kLanes, width - w);
        Vec square[kLanes];
        // Beyond the row lies halo or the next row: readable, not used.
        PARNET_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(row + (w + i) * kLanes);
        transpose(square);
        PARNET_UNROLL for (int c = 0; c < kLanes; c++) {
          if (c < count) write_lanes(to + c * y.stride[1] + w, square[c], valid);
        }
      }
    }
  }
}

#define PARNET_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                            \
    case Dtype::kFloat:                       \
      return function<float>(__VA_ARGS__);    \
    case Dtype::kHalf:                        \
      return function<Half>(__VA_ARGS__);     \
    case Dtype::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
  }

void enter(const Strided& x, const View& view, int image, int first, int last, float* sums, float* lines) {
  PARNET_BY_DTYPE(x.dtype, enter_rows, x, view, image, first, last, sums, lines)
}
void enter_planes(const Strided& x, const StemArgs& a, int image, int first, int last, float* sums) {
  PARNET_BY_DTYPE(x.dtype, enter_plane_rows, x, a, image, first, last, sums)
}
void leave(const View& view, const Strided& y, int image, int first, int last) {
  PARNET_BY_DTYPE(y.dtype, leave_rows, view, y, image, first, last)
}

template <class T>
void leave_mean_values(const float* sums, int sum_rows, int blocks, float inverse_area, const Strided& y,
                       int image) {
  for (int c = 0; c < y.size[1]; c++) {
    float total = 0;
    for (int r = 0; r < sum_rows; r++) total += sums[(int64_t{image} * sum_rows + r) * blocks * kLanes + c];
    narrow(total * inverse_area, const_cast<T*>(at<T>(y, image, c, 0)));
  }
}
void leave_means(const float* sums, int sum_rows, int blocks, float inverse_area, const Strided& y,
                 int image) {
  PARNET_BY_DTYPE(y.dtype, leave_mean_values, sums, sum_rows, blocks, inverse_area, y, image)
}

}  // namespace
}  // namespace parnet::cpu
