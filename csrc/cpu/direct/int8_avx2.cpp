// AVX2 alone: products of 16 bits, two added up in one instruction. Not faster than the float32 network, but
// thirty times as fast as plain C++, where an int8 network comes to a processor without better ones.
#include <immintrin.h>
#include <stdint.h>
#define PARNET_DOT_LANES 8
#define PARNET_DOT_ROWS 2

namespace {
// Of each lane two partial sums: of the first and of the second two bytes.
struct Sum {
  __m256i first, second;  // lanes 0...3, lanes 4...7
};
struct Weights {
  __m256i first, second;  // 16 bits each
};
inline Sum load_sum(const int32_t* from) {
  const __m128i* pairs = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtepu32_epi64(pairs[0]), _mm256_cvtepu32_epi64(pairs[1])};
}
inline void store_sum(int32_t* to, Sum s) {
  const __m256i sums = _mm256_hadd_epi32(s.first, s.second);  // lanes 0, 1, 4, 5, 2, 3, 6, 7
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(sums, 0b11011000));
}
inline Weights load_weights(const int8_t* from) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtepi8_epi16(bytes[0]), _mm256_cvtepi8_epi16(bytes[1])};
}
inline __attribute__((always_inline)) void dot(Sum& sum, int32_t bytes, const Weights& w) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_set1_epi32(bytes));
  sum.first = _mm256_add_epi32(sum.first, _mm256_madd_epi16(x, w.first));
  sum.second = _mm256_add_epi32(sum.second, _mm256_madd_epi16(x, w.second));
}
}  // namespace

#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_avx2;
constinit const Kernels kernels_avx2 = table_of("avx2", 1);
}  // namespace parnet::cpu::direct
