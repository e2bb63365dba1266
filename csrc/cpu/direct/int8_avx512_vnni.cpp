// AVX-512 VNNI: 32 registers, 28 of them for the sums of 14 pixels.
#include <immintrin.h>
#include <stdint.h>
#define PARNET_DOT_LANES 16
#define PARNET_DOT_ROWS 14

namespace {
typedef __m512i Sum;
typedef __m512i Weights;
inline Sum load_sum(const int32_t* from) { return _mm512_load_si512(from); }
inline void store_sum(int32_t* to, Sum s) { _mm512_store_si512(to, s); }
inline Weights load_weights(const int8_t* from) { return _mm512_load_si512(from); }
inline __attribute__((always_inline)) void dot(Sum& sum, int32_t bytes, Weights w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(bytes)), "v"(w));
}
}  // namespace

#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_avx512_vnni;
constinit const Kernels kernels_avx512_vnni = table_of("avx512_vnni", 1);
}  // namespace parnet::cpu::direct
