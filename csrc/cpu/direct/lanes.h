// 16 lanes of floats, integers or bytes, whatever the instruction set. GCC takes bytes apart one by one where
// it converts them to lanes at once, and compares lanes of 512 bits one by one without AVX-512: hence the
// instructions, and the steps by way of 16 bits. All are exact.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define PARNET_INLINE inline __attribute__((always_inline))
#define PARNET_UNROLL _Pragma("GCC unroll 16")

namespace parnet::cpu::direct {
namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

// From and to any address.
template <class T, class From>
PARNET_INLINE T load(const From* from) {
  T result;
  memcpy(&result, from, sizeof(T));
  return result;
}
template <class T, class To>
PARNET_INLINE void store(To* to, T value) {
  memcpy(to, &value, sizeof(T));
}
PARNET_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
PARNET_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
PARNET_INLINE Floats splat(float x) { return x - Floats{}; }

// a < b ? a : b and a > b ? a : b, lane by lane; b where one is not a number.
#ifdef __AVX512F__
PARNET_INLINE Floats least(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
PARNET_INLINE Floats most(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
union Halves {
  Floats whole;
  __m256 half[2];
};
PARNET_INLINE Floats least(Floats a, Floats b) {
  const Halves x = {a}, y = {b};
  Halves r;
  for (int i = 0; i < 2; i++) r.half[i] = _mm256_min_ps(x.half[i], y.half[i]);
  return r.whole;
}
PARNET_INLINE Floats most(Floats a, Floats b) {
  const Halves x = {a}, y = {b};
  Halves r;
  for (int i = 0; i < 2; i++) r.half[i] = _mm256_max_ps(x.half[i], y.half[i]);
  return r.whole;
}
#else
PARNET_INLINE Floats least(Floats a, Floats b) { return a < b ? a : b; }
PARNET_INLINE Floats most(Floats a, Floats b) { return a > b ? a : b; }
#endif

// 16 bytes to lanes; lanes of 0...255 to bytes.
#ifdef __AVX512F__
PARNET_INLINE Ints widen(const uint8_t* from) { return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from)); }
PARNET_INLINE Ints widen(const int8_t* from) { return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(from)); }
PARNET_INLINE Bytes narrow(Ints x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
#else
typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
PARNET_INLINE Ints widen(const uint8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Shorts), Ints);
}
PARNET_INLINE Ints widen(const int8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(load<SignedBytes>(from), Shorts), Ints);
}
PARNET_INLINE Bytes narrow(Ints x) {
  return __builtin_convertvector(__builtin_convertvector(x, Shorts), Bytes);
}
#endif

template <class T>
PARNET_INLINE void copy_ends(uint8_t* to, const uint8_t* from, int count) {
  const T first = load<T>(from), last = load<T>(from + count - sizeof(T));
  store(to, first);
  store(to + count - sizeof(T), last);
}
// `count` bytes, at most 32.
PARNET_INLINE void copy(uint8_t* to, const uint8_t* from, int count) {
  if (count >= 16) return copy_ends<Bytes>(to, from, count);
  if (count >= 8) return copy_ends<uint64_t>(to, from, count);
  if (count >= 4) return copy_ends<uint32_t>(to, from, count);
  for (int i = 0; i < count; i++) to[i] = from[i];
}

}  // namespace
}  // namespace parnet::cpu::direct
