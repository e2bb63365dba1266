// Elementwise passes of the training form over channels_last maps, and the sums that go with them.
#pragma once
#include "../training.h"
#include "convert.h"
#include "epilogue.h"

namespace parnet::cpu {
namespace {

template <class T>
PARNET_INLINE T* pixels_of(const PixelMap& map, int image, int64_t first) {
  return static_cast<T*>(map.data) + (int64_t{image} * map.rows * map.cols + first) * map.pixel;
}
template <bool Whole, class T>
PARNET_INLINE Vec read(const T* from, int count) {
  return Whole ? read_lanes(from) : read_first(from, count);
}
template <bool Whole, class T>
PARNET_INLINE void write(T* to, Vec v, int count) {
  Whole ? write_lanes(to, v) : write_first(to, v, count);
}

// body(channel, count, std::true_type or false_type-like) for blocks of channels: whole ones, then the rest.
template <class Body>
PARNET_INLINE void each_block(int channels, Body body) {
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) body.template operator()<true>(c, kLanes);
  if (c < channels) body.template operator()<false>(c, channels - c);
}

// Sums of some pixels, and their squared distances from the mean of these pixels.
template <class T>
void moments_of(const PixelMap& x, int image, int64_t first, int count, float* sums, float* squares) {
  each_block(x.channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
    const T* from = pixels_of<T>(x, image, first) + c;
    Vec part[4] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + 4 <= count; i += 4) {
      PARNET_UNROLL for (int k = 0; k < 4; k++) {
        part[k] = part[k] + read<Whole>(from + (i + k) * x.pixel, lanes);
      }
    }
    for (; i < count; i++) part[0] = part[0] + read<Whole>(from + i * x.pixel, lanes);
    const Vec sum = (part[0] + part[1]) + (part[2] + part[3]), mean = (1.f / count) * sum;
    write<Whole>(sums + c, sum, lanes);
    if (!squares) return;
    PARNET_UNROLL for (int k = 0; k < 4; k++) part[k] = zero();
    const auto add = [&](int k, int i) PARNET_INLINE_LAMBDA {
      const Vec d = read<Whole>(from + i * x.pixel, lanes) - mean;
      part[k] = fma(d, d, part[k]);
    };
    for (i = 0; i + 4 <= count; i += 4) {
      PARNET_UNROLL for (int k = 0; k < 4; k++) add(k, i + k);
    }
    for (; i < count; i++) add(0, i);
    write<Whole>(squares + c, (part[0] + part[1]) + (part[2] + part[3]), lanes);
  });
}
void moments(const PixelMap& x, int image, int64_t first, int count, float* sums, float* squares) {
  PARNET_BY_DTYPE(x.dtype, moments_of, x, image, first, count, sums, squares)
}

// ---- Passes. `Maps` is 2 or 3.

template <int Maps, class T>
struct Reader {
  const T* from[Maps];
  Reader(const PassArgs& a, int image, int64_t first) {
    for (int m = 0; m < Maps; m++) from[m] = pixels_of<T>(a.map[m], image, first);
  }
  template <bool Whole>
  PARNET_INLINE void load(const PassArgs& a, int64_t i, int c, int lanes, Vec* x) const {
    PARNET_UNROLL for (int m = 0; m < Maps; m++) x[m] = read<Whole>(from[m] + i * a.map[m].pixel + c, lanes);
  }
};

template <int Maps, bool Whole>
PARNET_INLINE Vec before(const PassArgs& a, const Vec* x, int64_t at, int lanes) {
  Vec t = read<Whole>(a.shift + at, lanes);
  PARNET_UNROLL for (int m = 0; m < Maps; m++) t = fma(read<Whole>(a.scale[m] + at, lanes), x[m], t);
  return t;
}

// phi'(t)*g
template <bool SiLU>
PARNET_INLINE Vec slope(Vec t, Vec g) {
  if (SiLU) {
    const Vec s = sigmoid(t);
    return g * (s * fma(t, splat(1.f) - s, splat(1.f)));
  }
  PARNET_EACH(t.part[p] > 0 ? g.part[p] : t.part[p] == t.part[p] ? Native{} : t.part[p]);
}

template <int Maps, bool SiLU, class T>
void combine_as(const PassArgs& a, int image, int64_t first, int count) {
  const int channels = a.out[0].channels;
  const Reader<Maps, T> maps(a, image, first);
  T* y = pixels_of<T>(a.out[0], image, first);
  for (int i = 0; i < count; i++, y += a.out[0].pixel) {
    each_block(channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
      Vec x[Maps];
      maps.template load<Whole>(a, i, c, lanes, x);
      write<Whole>(y + c, activate<SiLU>(before<Maps, Whole>(a, x, int64_t{image} * channels + c, lanes)),
                   lanes);
    });
  }
}

template <int Maps, bool SiLU, class T>
void reduce_as(const PassArgs& a, int image, int64_t first, int count, float* sums) {
  const int channels = a.g.channels;
  const Reader<Maps, T> maps(a, image, first);
  const T* g = pixels_of<T>(a.g, image, first);
  each_block(channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
    const int64_t at = int64_t{image} * channels + c;
    const Vec shift = read<Whole>(a.shift + at, lanes);
    Vec scale[Maps], mean[Maps], sum[Maps + 1];
    sum[0] = zero();
    PARNET_UNROLL for (int m = 0; m < Maps; m++) {
      scale[m] = read<Whole>(a.scale[m] + at, lanes);
      mean[m] = read<Whole>(a.mean[m] + c, lanes);
      sum[1 + m] = zero();
    }
    for (int i = 0; i < count; i++) {
      Vec x[Maps], t = shift;
      maps.template load<Whole>(a, i, c, lanes, x);
      PARNET_UNROLL for (int m = 0; m < Maps; m++) t = fma(scale[m], x[m], t);
      const Vec d = slope<SiLU>(t, read<Whole>(g + i * a.g.pixel + c, lanes));
      sum[0] = sum[0] + d;
      PARNET_UNROLL for (int m = 0; m < Maps; m++) sum[1 + m] = fma(d, x[m] - mean[m], sum[1 + m]);
    }
    PARNET_UNROLL for (int m = 0; m <= Maps; m++) write<Whole>(sums + m * channels + c, sum[m], lanes);
  });
}

template <int Maps, bool SiLU, class T>
void spread_as(const PassArgs& a, int image, int64_t first, int count) {
  const int channels = a.g.channels;
  const Reader<Maps, T> maps(a, image, first);
  const T* g = pixels_of<T>(a.g, image, first);
  T* to[Maps];
  for (int m = 0; m < a.outputs; m++) to[m] = pixels_of<T>(a.out[m], image, first);
  for (int i = 0; i < count; i++) {
    each_block(channels, [&]<bool Whole>(int c, int lanes) PARNET_INLINE_LAMBDA {
      const int64_t at = int64_t{image} * channels + c;
      Vec x[Maps];
      maps.template load<Whole>(a, i, c, lanes, x);
      const Vec d =
          slope<SiLU>(before<Maps, Whole>(a, x, at, lanes), read<Whole>(g + i * a.g.pixel + c, lanes));
      PARNET_UNROLL for (int m = 0; m < Maps; m++) {
        if (m >= a.outputs) break;
        const Vec line = fma(read<Whole>(a.q[m] + c, lanes), x[m], read<Whole>(a.r[m] + at, lanes));
        write<Whole>(to[m] + i * a.out[m].pixel + c, fma(read<Whole>(a.scale[m] + at, lanes), d, line),
                     lanes);
      }
    });
  }
}

#define PARNET_PASS(function, T, ...)                                                                \
  const bool silu = a.activation == Activation::kSiLU;                                               \
  return a.maps == 3 ? silu ? function<3, true, T>(__VA_ARGS__) : function<3, false, T>(__VA_ARGS__) \
         : silu      ? function<2, true, T>(__VA_ARGS__)                                             \
                     : function<2, false, T>(__VA_ARGS__)

template <class T>
void combine_in(const PassArgs& a, int image, int64_t first, int count) {
  PARNET_PASS(combine_as, T, a, image, first, count);
}
template <class T>
void reduce_in(const PassArgs& a, int image, int64_t first, int count, float* sums) {
  PARNET_PASS(reduce_as, T, a, image, first, count, sums);
}
template <class T>
void spread_in(const PassArgs& a, int image, int64_t first, int count) {
  PARNET_PASS(spread_as, T, a, image, first, count);
}
#undef PARNET_PASS

void combine(const PassArgs& a, int image, int64_t first, int count) {
  PARNET_BY_DTYPE(a.map[0].dtype, combine_in, a, image, first, count)
}
void reduce(const PassArgs& a, int image, int64_t first, int count, float* sums) {
  PARNET_BY_DTYPE(a.map[0].dtype, reduce_in, a, image, first, count, sums)
}
void spread(const PassArgs& a, int image, int64_t first, int count) {
  PARNET_BY_DTYPE(a.map[0].dtype, spread_in, a, image, first, count)
}

// ---- Two maps whose channels alternate in a third: plain loops, which the compiler vectorises with
// shuffles.

template <class T>
struct Alternating {
  const T *x, *y;
  T* joined;
  int64_t x_pixel, y_pixel, pixel;
  Alternating(const JoinArgs& a, int image, int64_t first)
      : x(pixels_of<T>(a.map[0], image, first)),
        y(pixels_of<T>(a.map[1], image, first)),
        joined(pixels_of<T>(a.joined, image, first)),
        x_pixel(a.map[0].pixel),
        y_pixel(a.map[1].pixel),
        pixel(a.joined.pixel) {}
  void next() { x += x_pixel, y += y_pixel, joined += pixel; }
};

template <class T>
void join_in(const JoinArgs& a, int image, int64_t first, int count) {
  const int channels = a.map[0].channels;
  const float *q0 = a.q[0], *q1 = a.q[1], *r0 = a.r[0], *r1 = a.r[1];
  Alternating<T> at(a, image, first);
  for (int i = 0; i < count; i++, at.next()) {
    const T* __restrict x = at.x;
    const T* __restrict y = at.y;
    T* __restrict to = at.joined;
    for (int c = 0; c < channels; c++) {
      narrow(q0[c] * widen(x[c]) + r0[c], to + 2 * c);
      narrow(q1[c] * widen(y[c]) + r1[c], to + 2 * c + 1);
    }
  }
}

template <class T>
void join_sums_in(const JoinArgs& a, int image, int64_t first, int count, float* sums) {
  const int channels = a.map[0].channels;
  for (int c = 0; c < 4 * channels; c++) sums[c] = 0;
  float* __restrict s0 = sums;
  float* __restrict t0 = s0 + channels;
  float* __restrict s1 = t0 + channels;
  float* __restrict t1 = s1 + channels;
  const float *m0 = a.mean[0], *m1 = a.mean[1];
  Alternating<T> at(a, image, first);
  for (int i = 0; i < count; i++, at.next()) {
    const T *x = at.x, *y = at.y, *d = at.joined;
    for (int c = 0; c < channels; c++) {
      const float d0 = widen(d[2 * c]), d1 = widen(d[2 * c + 1]);
      s0[c] += d0;
      t0[c] += d0 * (widen(x[c]) - m0[c]);
      s1[c] += d1;
      t1[c] += d1 * (widen(y[c]) - m1[c]);
    }
  }
}

template <class T>
void separate_in(const JoinArgs& a, int image, int64_t first, int count) {
  const int channels = a.map[0].channels;
  const float *p0 = a.p[0], *p1 = a.p[1], *q0 = a.q[0], *q1 = a.q[1], *r0 = a.r[0], *r1 = a.r[1];
  Alternating<T> at(a, image, first);
  T *x_to = pixels_of<T>(a.out[0], image, first), *y_to = pixels_of<T>(a.out[1], image, first);
  for (int i = 0; i < count; i++, at.next(), x_to += a.out[0].pixel, y_to += a.out[1].pixel) {
    const T *x = at.x, *y = at.y, *d = at.joined;
    T* __restrict to0 = x_to;
    T* __restrict to1 = y_to;
    for (int c = 0; c < channels; c++) {
      narrow(p0[c] * widen(d[2 * c]) + (q0[c] * widen(x[c]) + r0[c]), to0 + c);
      narrow(p1[c] * widen(d[2 * c + 1]) + (q1[c] * widen(y[c]) + r1[c]), to1 + c);
    }
  }
}

void join(const JoinArgs& a, int image, int64_t first, int count) {
  PARNET_BY_DTYPE(a.joined.dtype, join_in, a, image, first, count)
}
void join_sums(const JoinArgs& a, int image, int64_t first, int count, float* sums) {
  PARNET_BY_DTYPE(a.joined.dtype, join_sums_in, a, image, first, count, sums)
}
void separate(const JoinArgs& a, int image, int64_t first, int count) {
  PARNET_BY_DTYPE(a.joined.dtype, separate_in, a, image, first, count)
}

}  // namespace
}  // namespace parnet::cpu
