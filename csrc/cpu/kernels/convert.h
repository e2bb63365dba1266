// Conversions between users' tensors (any strides, three dtypes) and maps of blocks of float channels.
// Channels are summed on the way in.
#pragma once
#include "../layer.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Conversions of one value (U: uint32_t, F: float) or of a vector of values (`u - u` is a zero of either
// kind).
template <class F, class U>
PARNET_INLINE F widen(BFloat16, U bits) {
  return __builtin_bit_cast(F, bits << 16);
}
template <class F, class U>
PARNET_INLINE F widen(Float16, U bits) {
  const U magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  // Moving the exponent by a multiplication also normalises subnormal halves.
  const U finite = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) * 0x1p112f);
  return __builtin_bit_cast(F, (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}
template <class U, class F>
PARNET_INLINE U narrow(BFloat16, F f) {
  const U u = __builtin_bit_cast(U, f);
  const U finite = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = u - u + 0x7fc0u;
  return (u & 0x7fffffffu) > 0x7f800000u ? nan : finite;
}
template <class U, class F>
PARNET_INLINE U narrow(Float16, F f) {
  const U bits = __builtin_bit_cast(U, f), u = bits & 0x7fffffffu, sign = bits >> 31 << 15;
  const U normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  // The addition rounds at 2^-24.
  const U subnormal = __builtin_bit_cast(U, __builtin_bit_cast(F, u) + .5f) - 0x3f000000u;
  const U finite = u < 0x38800000u ? subnormal : normal, infinity = u - u + 0x7c00u, nan = infinity + 0x200u;
  return (u > 0x7f800000u ? nan : u >= 0x47800000u ? infinity : finite) | sign;
}

PARNET_INLINE float widen(float x) { return x; }
template <class T>
PARNET_INLINE float widen(T x) {
  return widen<float>(T{}, uint32_t{x.bits});
}
PARNET_INLINE void narrow(float f, float* to) { *to = f; }
template <class T>
PARNET_INLINE void narrow(float f, T* to) {
  to->bits = narrow<uint32_t>(T{}, f);
}

// kLanes values, adjacent in memory.
typedef uint16_t NativeShort __attribute__((vector_size(kNative * 2), aligned(2), may_alias));
typedef uint32_t NativeBits __attribute__((vector_size(kNative * 4)));
PARNET_INLINE Vec read_lanes(const float* from) { return load_unaligned(from); }
template <class T>
PARNET_INLINE Vec read_lanes(const T* from) {
  const NativeShort* bits = reinterpret_cast<const NativeShort*>(from);  // `auto` would align it
  PARNET_EACH(widen<Native>(T{}, __builtin_convertvector(bits[p], NativeBits)));
}
PARNET_INLINE void write_lanes(float* to, Vec v) { store_unaligned(to, v); }
template <class T>
PARNET_INLINE void write_lanes(T* to, Vec v) {
  NativeShort* bits = reinterpret_cast<NativeShort*>(to);
  PARNET_UNROLL for (int p = 0; p < kParts; p++) {
    bits[p] = __builtin_convertvector(narrow<NativeBits>(T{}, v.part[p]), NativeShort);
  }
}
// The first `count` of kLanes values.
PARNET_INLINE Vec read_first(const float* from, int count) { return load_first(from, count); }
template <class T>
PARNET_INLINE Vec read_first(const T* from, int count) {
  alignas(64) float lanes[kLanes] = {};
  for (int i = 0; i < count; i++) lanes[i] = widen(from[i]);
  return load(lanes);
}
PARNET_INLINE void write_first(float* to, Vec v, int count) { store_first(to, v, count); }
template <class T>
PARNET_INLINE void write_first(T* to, Vec v, int count) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; i++) narrow(lanes[i], to + i);
}

template <class T>
PARNET_INLINE const T* at(const Strided& x, int64_t n, int64_t c, int64_t h) {
  return static_cast<const T*>(x.data) + n * x.stride[0] + c * x.stride[1] + h * x.stride[2];
}

// Hardware does not foresee reads of a few rows each of many channels. This asks for what is read kRowsAhead
// rows after row `h` of `block`, in this block of channels or the next one.
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
  int i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store_unaligned(to + i, read_lanes(from + i));
  }
  for (; i < count; i++) to[i] = widen(from[i * stride]);
}

// Converts one row of `Blocks` blocks of channels, all adjacent in memory; the last block has `channels`. So
// many blocks at once are whole cache lines of a pixel.
template <class T, int Blocks>
void enter_pixels(const T* from, int64_t stride, int channels, int width, float* to, int64_t block,
                  float* sums, int64_t ahead) {
  Vec sum[Blocks];
  PARNET_UNROLL for (int b = 0; b < Blocks; b++) sum[b] = zero();
  for (int w = 0; w < width; w++, from += stride, to += kLanes) {
    PARNET_UNROLL for (int b = 0; b < Blocks; b++) {
      prefetch(reinterpret_cast<const float*>(from + b * kLanes + ahead));
      const bool whole = b + 1 < Blocks || channels == kLanes;
      const Vec v = whole ? read_lanes(from + b * kLanes) : read_first(from + b * kLanes, channels);
      sum[b] = sum[b] + v;
      store(to + b * block, v);
    }
  }
  PARNET_UNROLL for (int b = 0; b < Blocks; b++) store(sums + b * kLanes, load(sums + b * kLanes) + sum[b]);
}

// Converts one row of one block of channels, each of which is a line elsewhere.
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

// `enter` for tensors whose channels are adjacent in memory.
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

// `enter` for other tensors. `lines`: scratch, [kLanes][pitch].
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

// Rows of planes for a stem. Row 0 and column 0 of a plane are border, as is everything beyond the image.
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
        for (int w = 0; w < width; w++) {
          T* pixel = to + w * y.stride[3];
          const Vec v = load(row + w * kLanes);
          count == kLanes ? write_lanes(pixel, v) : write_first(pixel, v, count);
        }
        continue;
      }
      fetch_lines<T, true>(y, image, block, h, first, last);
      for (int w = 0; w < width; w += kLanes) {
        const int valid = least(kLanes, width - w);
        Vec square[kLanes];
        // Beyond the row lies the border or the next row: readable, not used.
        PARNET_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(row + (w + i) * kLanes);
        transpose(square);
        PARNET_UNROLL for (int c = 0; c < kLanes; c++) {
          if (c >= count) break;
          T* line = to + c * y.stride[1] + w;
          valid == kLanes ? write_lanes(line, square[c]) : write_first(line, square[c], valid);
        }
      }
    }
  }
}

#define PARNET_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                            \
    case Dtype::kFloat:                       \
      return function<float>(__VA_ARGS__);    \
    case Dtype::kFloat16:                     \
      return function<Float16>(__VA_ARGS__);  \
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
