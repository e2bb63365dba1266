// What a map's values are: bytes with a scale and a zero or, where an isa file defines PARNET_BFLOAT16
// before, bfloat16. 16 at a time, as sums of products leave them and as maps hold them.
#pragma once
#include "lanes.h"
#include "layer.h"

namespace parnet::cpu::direct {
namespace {

#ifdef PARNET_BFLOAT16

typedef uint16_t Item;     // of a map
typedef uint16_t Factor;   // a gate's weight
typedef float ProductSum;  // of one pixel and output channel; also of a channel
typedef double Total;      // of a channel's sums
typedef Floats Sums;
typedef uint16_t Items __attribute__((vector_size(32)));
constexpr Element kElement = Element::kBfloat16;
// Channels up to a multiple of kPanel are written, as zeros, so that products with zero weights are zero.
constexpr bool kWholePanels = true;

PARNET_INLINE Floats values_of(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Items>(from), Ints) << 16);
}
PARNET_INLINE Floats values_of(Sums x) { return x; }
// Rounded to even. What is no number stays none: its sum tells.
PARNET_INLINE Sums rounded(Floats x) {
  const Ints bits = (Ints)x, even = bits + 0x7fff + (bits >> 16 & 1);
  return (Floats)((x == x ? even : bits) & ~0xffff);
}
PARNET_INLINE Items narrow(Sums x) { return __builtin_convertvector((Ints)x >> 16, Items); }

#else

typedef uint8_t Item;
typedef int8_t Factor;
typedef int32_t ProductSum;
typedef int64_t Total;
typedef Ints Sums;
typedef Bytes Items;
constexpr Element kElement = Element::kByte;
constexpr bool kWholePanels = false;

PARNET_INLINE Floats values_of(const uint8_t* from) { return to_floats(widen(from)); }
PARNET_INLINE Floats values_of(const int8_t* from) { return to_floats(widen(from)); }
PARNET_INLINE Floats values_of(Sums x) { return to_floats(x); }
// Rounded to even, limited to 0...255.
PARNET_INLINE Sums rounded(Floats x) {
  const Floats limited = most(least(x, splat(255.f)), Floats{});
  return (Ints)(limited + 12582912.f) & 0xff;
}

#endif

// Of two vectors alternately: their first halves, or their second ones.
template <class Vector>
PARNET_INLINE Vector alternate_low(Vector a, Vector b) {
  return __builtin_shuffle(a, b, Vector{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
template <class Vector>
PARNET_INLINE Vector alternate_high(Vector a, Vector b) {
  return __builtin_shuffle(a, b, Vector{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

}  // namespace
}  // namespace parnet::cpu::direct
