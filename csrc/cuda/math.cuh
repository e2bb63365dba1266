// How a warp multiplies: 16-bit and tf32 on tensor cores, or fp32 exactly, all on the same bytes in shared
// memory and with the same places of the sums in registers.
//
// A step is 32 bytes of channels (16 of 16 bits, 8 of 32 bits) of 16 rows and of two 8-column fragments
// ("pair"). Lane l gets of each 16x8 block of sums rows l/4 and l/4 + 8, columns 2(l%4) and 2(l%4) + 1, as
// mma.sync defines it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx.cuh"

namespace parnet::cuda {

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

// Four adjacent channels, as they lie in memory.
template <class T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const __half* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  const float2 a = __half22float2(reinterpret_cast<const __half2&>(v.x));
  const float2 b = __half22float2(reinterpret_cast<const __half2&>(v.y));
  return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ float4 load4(const __nv_bfloat16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
                     __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
}
__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ void store4(__half* p, float4 v) {
  const __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
  *reinterpret_cast<uint2*>(p) =
      make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
}
__device__ __forceinline__ void store4(__nv_bfloat16* p, float4 v) {
  const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
  *reinterpret_cast<uint2*>(p) =
      make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
}
template <class T>
__device__ __forceinline__ float to_float(T v) {
  return static_cast<float>(v);
}
template <class T>
__device__ __forceinline__ T from_float(float v) {
  return static_cast<T>(v);
}
template <class T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Tensor cores. Lane l addresses row l % 16 and bytes 16 (l / 16) of a step of A; for weights see
// weight_offset.
struct TensorCore {
  static constexpr int kRowAddresses = 1;
  static constexpr bool kExact = false;
  static constexpr bool kRounds = false;  // whether maps for other layers are stored rounded to tf32
  using A = uint32_t[4];
  using B = uint32_t[4];
  static __device__ __forceinline__ int row(int) { return lane_id() & 15; }
  static __device__ __forceinline__ int row_byte() { return (lane_id() >> 4) * 16; }
  // Offset of the lane's 16 bytes in the first pair of fragments of a chunk's weights, for the step `step` (0
  // or 1).
  static __device__ __forceinline__ int weight_offset(int step) {
    const int lane = lane_id(), column = ((lane >> 4) << 3) + (lane & 7), part = ((lane >> 3) & 1) + step * 2;
    return column * 64 + ((part ^ ((column >> 1) & 3)) << 4);
  }
  static __device__ __forceinline__ void load_a(A& a, const uint32_t (&address)[1], int offset) {
    load_matrices(a, address[0] + offset);
  }
  static __device__ __forceinline__ void load_b(B& b, uint32_t address) { load_matrices(b, address); }
};

#define PARNET_MMA(SHAPE, TYPES)                                        \
  asm volatile("mma.sync.aligned." SHAPE ".row.col." TYPES              \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]))

struct Float16 : TensorCore {
  using T = __half;
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    PARNET_MMA("m16n8k16", "f32.f16.f16.f32");
  }
};

struct BFloat16 : TensorCore {
  using T = __nv_bfloat16;
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    PARNET_MMA("m16n8k16", "f32.bf16.bf16.f32");
  }
};

// Operands must be rounded to tf32 before, or the hardware truncates them. Weights are when they are packed;
// maps when they are stored for another layer, since each value is multiplied nine times (four conversions a
// fragment in the main loop halve its share of matrix instructions).
__device__ __forceinline__ float round_to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}
struct TensorFloat32 : TensorCore {
  static constexpr bool kRounds = true;
  using T = float;
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
    PARNET_MMA("m16n8k8", "f32.tf32.tf32.f32");
  }
};
#undef PARNET_MMA

// fp32 by fused multiply-adds. Three tf32 products would be faster, but tensor cores truncate when they
// accumulate: over the 4608 products of a 512-channel layer that costs more than the 2e-6 this path promises.
struct Float32 {
  static constexpr int kRowAddresses = 2;
  static constexpr bool kExact = true, kRounds = false;
  using T = float;
  struct A {
    float v[2][8];  // [row][channel of the step]
  };
  struct B {
    float v[2][2][8];  // [fragment][column][channel]
  };
  static __device__ __forceinline__ int row(int which) { return (lane_id() >> 2) + 8 * which; }
  static __device__ __forceinline__ int row_byte() { return 0; }
  static __device__ __forceinline__ int weight_offset(int step) {
    const int t = lane_id() & 3;  // columns 2t and 2t + 1 share a swizzle
    return 2 * t * 64 + (((step * 2) ^ t) << 4);
  }
  static __device__ __forceinline__ void spread(float (&to)[8], int first, float4 v) {
    to[first] = v.x, to[first + 1] = v.y, to[first + 2] = v.z, to[first + 3] = v.w;
  }
  static __device__ __forceinline__ void load_a(A& a, const uint32_t (&address)[2], int offset) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int k = 0; k < 2; k++) spread(a.v[r], 4 * k, load_shared(address[r] + offset + 16 * k));
  }
  static __device__ __forceinline__ void load_b(B& b, uint32_t address) {
#pragma unroll
    for (int f = 0; f < 2; f++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int k = 0; k < 2; k++)
          spread(b.v[f][c], 4 * k, load_shared((address + f * 512 + c * 64) ^ (16 * k)));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const A& a, const B& b, int half) {
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) d[e] = fmaf(a.v[e / 2][k], b.v[half][e % 2][k], d[e]);
  }
};

// Fast forms are off by 2 ulp of exp2 and 2 ulp of the division: 4e-7, below half precision's 5e-4 and
// tf32's.
template <class M>
__device__ __forceinline__ float silu(float v) {
  if constexpr (M::kExact) return v / (1.0f + expf(-v));
  return __fdividef(v, 1.0f + __expf(-v));
}
template <class M>
__device__ __forceinline__ float sigmoid(float v) {
  if constexpr (M::kExact) return 1.0f / (1.0f + expf(-v));
  return __fdividef(1.0f, 1.0f + __expf(-v));
}

}  // namespace parnet::cuda
