// Half, bfloat16 and fp8 values, and roundings the host has no instruction for.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <limits>

#include "instruction.hpp"

namespace ptxsim {

struct Half {
  u16 bits;
};
struct BFloat {
  u16 bits;
};

inline u32 float_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline u64 double_bits(double x) {
  u64 bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double bits_double(u64 bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

constexpr u32 kNan32 = 0x7fffffff;  // the NaN that GPU instructions give
constexpr u16 kNan16 = 0x7fff;

inline float canonical(float x) { return x == x ? x : bits_float(kNan32); }
inline double canonical(double x) { return x; }

inline float half_to_float(u16 h) { return _cvtsh_ss(h); }
inline float bfloat_to_float(u16 b) { return bits_float(u32(b) << 16); }

inline u16 float_to_half(float x) { return x == x ? _cvtss_sh(x, 0) : kNan16; }
inline u16 float_to_half(float x, Rounding mode) {
  if (x != x) return kNan16;
  switch (mode) {
    case Rounding::Zero:
      return _cvtss_sh(x, 3);
    case Rounding::Down:
      return _cvtss_sh(x, 1);
    case Rounding::Up:
      return _cvtss_sh(x, 2);
    default:
      return _cvtss_sh(x, 0);
  }
}
inline u16 float_to_bfloat(float x) {
  u32 bits = float_bits(x);
  u16 rounded = static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return x == x ? rounded : kNan16;
}
inline u16 float_to_bfloat(float x, Rounding mode) {
  if (mode == Rounding::Nearest || x != x) return float_to_bfloat(x);
  u32 bits = float_bits(x);
  u16 truncated = static_cast<u16>(bits >> 16);
  bool inexact = bits & 0xffff, negative = bits >> 31;
  if (inexact && ((mode == Rounding::Down && negative) || (mode == Rounding::Up && !negative))) truncated++;
  return truncated;
}

inline float flush(float x) {
  u32 bits = float_bits(x);
  return (bits & 0x7f800000) ? x : bits_float(bits & 0x80000000);
}
inline u16 flush_half(u16 h) { return (h & 0x7c00) ? h : h & 0x8000; }
inline float saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline double saturate(double x) { return x > 0. ? (x < 1. ? x : 1.) : 0.; }
template <class C>
inline C relu(C x) {
  return x != x ? x : x > 0 ? x : C(0);
}

// Rounds to odd, so that a later rounding to 16 bits is as if it were the only one.
template <class Wide>
inline float to_float_odd(Wide x) {
  float f = static_cast<float>(x);
  u32 bits = float_bits(f);
  Wide back = f;
  if (back != x && back == back && !std::isinf(back)) {
    if (std::fabs(back) > std::fabs(x)) bits--;
    bits |= 1;
  }
  return bits_float(bits);
}
// x * y + z rounded to odd; x * y must be exact in double.
inline double fma_odd(double x, double y, double z) {
  double p = x * y, s = p + z;
  if (!std::isfinite(s)) return s;
  double v = s - p, error = (p - (s - v)) + (z - v);  // Knuth's TwoSum
  u64 bits = double_bits(s);
  if (error != 0 && !(bits & 1)) {
    bool away = (error > 0) == (s > 0);
    bits = s == 0 ? (double_bits(error) & (1ull << 63)) | 1 : away ? bits + 1 : bits - 1;
  }
  return bits_double(bits);
}

// x to float in a given rounding; x may be wider than double.
template <class Wide>
inline float to_float(Wide x, Rounding mode) {
  float f = static_cast<float>(x);
  if (mode == Rounding::Nearest || static_cast<Wide>(f) == x || x != x) return f;
  if (mode == Rounding::Zero)
    return std::fabs(static_cast<Wide>(f)) > std::fabs(x) ? std::nextafterf(f, 0.f) : f;
  if (mode == Rounding::Down) return f > x ? std::nextafterf(f, -INFINITY) : f;
  return f < x ? std::nextafterf(f, INFINITY) : f;
}

inline float e4m3_to_float(u8 v) {
  int exponent = v >> 3 & 15, mantissa = v & 7;
  if (exponent == 15 && mantissa == 7) return bits_float(kNan32);
  float r = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
  return v >> 7 ? -r : r;
}
inline float e5m2_to_float(u8 v) { return half_to_float(u16(v) << 8); }

// Nearest even, saturating at the largest finite value.
inline u8 float_to_fp8(float f, bool e4m3) {
  if (f != f) return 0x7f;
  const int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
  const float largest = e4m3 ? 448.f : 57344.f;
  const u8 largest_bits = e4m3 ? 0x7e : 0x7b, sign = std::signbit(f) ? 0x80 : 0;
  float a = std::fabs(f);
  if (a >= largest) return sign | largest_bits;
  if (a == 0) return sign;
  int exponent;
  std::frexp(a, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);
  u32 scaled = static_cast<u32>(std::nearbyint(std::ldexp(a, mantissa_bits - exponent)));
  u32 one = 1u << mantissa_bits;
  u32 out = scaled >= one ? (u32(exponent + bias) << mantissa_bits) + (scaled - one) : scaled;
  return sign | static_cast<u8>(std::min<u32>(out, largest_bits));
}

inline float fp8_to_float(u8 v, bool e4m3) { return e4m3 ? e4m3_to_float(v) : e5m2_to_float(v); }

}  // namespace ptxsim
