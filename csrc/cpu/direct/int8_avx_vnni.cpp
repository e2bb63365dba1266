// AVX-VNNI: 16 registers of 8 sums, 12 of them for 6 pixels.
#include <immintrin.h>
#include <stdint.h>
#define PARNET_DOT_LANES 8
#define PARNET_DOT_ROWS 6

namespace {
typedef __m256i Sum;
typedef __m256i Weights;
inline Sum load_sum(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store_sum(int32_t* to, Sum s) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), s); }
inline Weights load_weights(const int8_t* from) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}
inline __attribute__((always_inline)) void dot(Sum& sum, int32_t bytes, Weights w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(_mm256_set1_epi32(bytes)), "x"(w));
}
}  // namespace

#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_avx_vnni;
constinit const Kernels kernels_avx_vnni = table_of("avx_vnni", 1);
}  // namespace parnet::cpu::direct
