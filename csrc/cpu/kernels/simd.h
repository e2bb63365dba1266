// One vector type for every instruction set, on the vector extensions of GCC and Clang. `kLanes` is the block
// size of the activations; where a hardware vector is narrower, a Vec consists of several.
#pragma once
#include <stdint.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define PARNET_INLINE inline __attribute__((always_inline))
#define PARNET_INLINE_LAMBDA __attribute__((always_inline))
#define PARNET_UNROLL _Pragma("GCC unroll 16")

namespace parnet::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kLanes = PARNET_LANES;
constexpr int kParts = kLanes / kNative;
constexpr int kPanel = 2 * kLanes;  // output channels of a panel
constexpr int kMaxRows =
    PARNET_ROWS;  // rows of a strip: its 2*kMaxRows vectors of sums must fit the registers

// Intel's cores with AVX-512 add in the units that multiply, and their L2 and memory answer late.
#ifdef PARNET_INTEL
constexpr bool kIntel = true;
#else
constexpr bool kIntel = false;
#endif

static_assert(kParts == 1 || kNative == 4, "masked loads and stores are of one part");

typedef float Native __attribute__((vector_size(kNative * 4), may_alias));
typedef float NativeUnaligned __attribute__((vector_size(kNative * 4), aligned(4), may_alias));
typedef int32_t NativeInt __attribute__((vector_size(kNative * 4), may_alias));

struct Vec {
  Native part[kParts];
};

#define PARNET_EACH(expression)                                                 \
  Vec result;                                                                   \
  PARNET_UNROLL for (int p = 0; p < kParts; p++) result.part[p] = (expression); \
  return result

PARNET_INLINE Vec load(const float* from) { PARNET_EACH(reinterpret_cast<const Native*>(from)[p]); }
PARNET_INLINE Vec load_unaligned(const float* from) {
  PARNET_EACH(reinterpret_cast<const NativeUnaligned*>(from)[p]);
}
PARNET_INLINE void store(float* to, Vec v) {
  PARNET_UNROLL for (int p = 0; p < kParts; p++) reinterpret_cast<Native*>(to)[p] = v.part[p];
}
PARNET_INLINE void store_unaligned(float* to, Vec v) {
  PARNET_UNROLL for (int p = 0; p < kParts; p++) reinterpret_cast<NativeUnaligned*>(to)[p] = v.part[p];
}
// The first `count` lanes, at most kLanes; the others are zero, and not touched in memory.
PARNET_INLINE Vec load_first(const float* from, int count) {
#if defined(__AVX512F__)
  PARNET_EACH(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  PARNET_EACH(_mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
#else
  alignas(64) float lanes[kLanes] = {};
  for (int i = 0; i < count; i++) lanes[i] = from[i];
  return load(lanes);
#endif
}
PARNET_INLINE void store_first(float* to, Vec v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), v.part[0]);
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), v.part[0]);
#else
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; i++) to[i] = lanes[i];
#endif
}
PARNET_INLINE Vec splat(float x) { PARNET_EACH(x - Native{}); }
PARNET_INLINE Vec zero() { PARNET_EACH(Native{}); }
PARNET_INLINE Vec operator+(Vec a, Vec b) { PARNET_EACH(a.part[p] + b.part[p]); }
PARNET_INLINE Vec operator-(Vec a, Vec b) { PARNET_EACH(a.part[p] - b.part[p]); }
PARNET_INLINE Vec operator*(Vec a, Vec b) { PARNET_EACH(a.part[p] * b.part[p]); }
PARNET_INLINE Vec operator*(float a, Vec b) { return splat(a) * b; }
PARNET_INLINE Vec operator/(Vec a, Vec b) { PARNET_EACH(a.part[p] / b.part[p]); }
// The compiler contracts these to fused instructions where they exist.
PARNET_INLINE Vec fma(Vec a, Vec b, Vec c) { PARNET_EACH(a.part[p] * b.part[p] + c.part[p]); }
PARNET_INLINE Vec fma(float a, Vec b, Vec c) { return fma(splat(a), b, c); }
// sum += a*b. The compiler would choose among the three forms of fma, which costs register moves and spills.
PARNET_INLINE void accumulate(Vec& sum, Vec a, Vec b) {
#if defined(__FMA__)
  PARNET_UNROLL
  for (int p = 0; p < kParts; p++)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum.part[p]) : "v"(a.part[p]), "v"(b.part[p]));
#else
  sum = fma(a, b, sum);
#endif
}
// NaN in `a` is replaced by `b`. The compiler turns the conditional into a comparison and a blend; the
// instruction is one.
PARNET_INLINE Native min(Native a, Native b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
PARNET_INLINE Native max(Native a, Native b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
PARNET_INLINE Vec min(Vec a, Vec b) { PARNET_EACH(min(a.part[p], b.part[p])); }
PARNET_INLINE Vec max(Vec a, Vec b) { PARNET_EACH(max(a.part[p], b.part[p])); }

// Terms from the highest power down.
PARNET_INLINE Vec polynomial(Vec x, const float (&terms)[6]) {
  Vec y = splat(terms[0]);
  PARNET_UNROLL for (int i = 1; i < 6; i++) y = fma(y, x, splat(terms[i]));
  return y;
}

// 1 + exp(-x), infinite from exp(-x) = 2^128 on. NaN can give a finite value: callers
// keep NaN through their own use of x.
PARNET_INLINE Vec one_plus_exp_minus(Vec x) {
#if defined(__AVX512F__) && !defined(PARNET_INTEL)
  // 2^t is 2^floor(t) times a polynomial of the rest (relative error 8e-8), which is 0 if t is infinite. On
  // Intel's processors results below 1e-38 could take very long.
  const Vec t = -1.4426950408889634f * x;
  const Vec f = {_mm512_reduce_ps(t.part[0], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  const Vec y = polynomial(f, {.001867145299911499f, .009016993455588818f, .0557999461889267f,
                               .24016444385051727f, .6931512951850891f, 1.f});
  return splat(1.f) + Vec{_mm512_scalef_ps(y.part[0], t.part[0])};
#else
  // 2^t: 2^round(t) goes into the exponent bits, a polynomial (relative error 9e-8) does the rest. t = 128 is
  // infinity.
  const Vec t = min(max(-1.4426950408889634f * x, splat(-125.f)), splat(128.f));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  const Vec shifted = t + splat(magic);
  const Vec f = t - (shifted - splat(magic));
  Vec y = polynomial(f, {.0013264714772814497f, .009671513630859167f, .055507337855797007f,
                         .24022242064467392f, .6931469775692789f, 1.f});
  PARNET_UNROLL
  for (int p = 0; p < kParts; p++) {
    y.part[p] = (Native)((NativeInt)y.part[p] + ((NativeInt)shifted.part[p] << 23));
  }
  return y + splat(1.f);
#endif
}

PARNET_INLINE Vec silu(Vec x) {
#ifdef PARNET_INTEL
  // A division of 16 lanes takes as many cycles. Newton's step makes 28 bits of 14, but NaN of infinity:
  // below -86 everything is -3e-36.
  const Vec v = max(splat(-86.f), x);
  const __m512 d = one_plus_exp_minus(v).part[0], r = _mm512_rcp14_ps(d);
  return {{_mm512_mul_ps(v.part[0], _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.f)), r))}};
#else
  return x / one_plus_exp_minus(x);
#endif
}
PARNET_INLINE Vec relu(Vec x) { return max(zero(), x); }  // max(0, NaN) is NaN
PARNET_INLINE Vec sigmoid(Vec x) {
  const Vec y = splat(1.f) / one_plus_exp_minus(x);
  PARNET_EACH(x.part[p] == x.part[p] ? y.part[p] : x.part[p]);
}

// (a0 b0 a1 b1 ...): the first kLanes values to `low`, the rest to `high`.
PARNET_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  Native out[2 * kParts];
  PARNET_UNROLL for (int p = 0; p < kParts; p++) {
    const Native x = a.part[p], y = b.part[p];
#if defined(__AVX512F__)
    out[2 * p] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    out[2 * p + 1] =
        __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
    out[2 * p] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    out[2 * p + 1] = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    out[2 * p] = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    out[2 * p + 1] = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
  }
  PARNET_UNROLL for (int p = 0; p < kParts; p++) low.part[p] = out[p], high.part[p] = out[kParts + p];
}

// Transposes a kLanes x kLanes square: log2(kLanes) perfect shuffles of its rows.
PARNET_INLINE void transpose(Vec* rows) {
  PARNET_UNROLL for (int step = 1; step < kLanes; step *= 2) {
    Vec next[kLanes];
    PARNET_UNROLL for (int i = 0; i < kLanes / 2; i++) {
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
    }
    PARNET_UNROLL for (int i = 0; i < kLanes; i++) rows[i] = next[i];
  }
}

PARNET_INLINE void prefetch(const float* at) { __builtin_prefetch(at, 0, 3); }
// For weights that are multiplied later. On Intel to L2: fewer lines can be on their way to L1 than its
// memory needs.
PARNET_INLINE void prefetch_weights(const float* at) { __builtin_prefetch(at, 0, kIntel ? 2 : 3); }
PARNET_INLINE void prefetch_to_write(const float* at) { __builtin_prefetch(at, 1, 3); }
template <class T>
PARNET_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

}  // namespace
}  // namespace parnet::cpu
