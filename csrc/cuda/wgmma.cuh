// Hopper's asynchronous instructions by name: barriers that bulk copies fill, and products of a warpgroup.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace parnet::cuda {

__device__ __forceinline__ void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Makes barriers that this thread initialised visible to copies; other threads also need a __syncthreads.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Makes the barrier's phase complete when copies have brought so many bytes.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// A copy by one thread, of a multiple of 16 bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Waits until the phase of this parity is complete: then what was copied is visible.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Needed before products whose sums or first operands other instructions have written.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes 64 columns of weights in shared memory, 64 bytes of channels each, whose 16-byte parts lie at
// part ^ (column / 2 % 4): what wgmma calls a 64-byte swizzle, with 8 columns 512 bytes apart from the
// next 8. Adding bytes / 16 moves it on.
__device__ __forceinline__ uint64_t describe_weights(uint32_t address) {
  return uint64_t{2} << 62 | uint64_t{512 / 16} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// d += a * weights: 64 rows of which each warp has 16, 64 columns, 32 bytes of channels. A lane's sums and
// values of `a` are those of mma.sync; d[j] is a 16x8 block.
#define PARNET_SUMS(J) "+f"(d[J].x), "+f"(d[J].y), "+f"(d[J].z), "+f"(d[J].w)
#define PARNET_WGMMA(TYPES)                                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                           \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19," \
               " %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36,"    \
               " 1, 1, 1, 0;"                                                                                \
               : PARNET_SUMS(0), PARNET_SUMS(1), PARNET_SUMS(2), PARNET_SUMS(3), PARNET_SUMS(4),             \
                 PARNET_SUMS(5), PARNET_SUMS(6), PARNET_SUMS(7)                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(weights))

template <class T>
__device__ __forceinline__ void multiply_warpgroup(float4 (&d)[8], const uint32_t (&a)[4], uint64_t weights);
template <>
__device__ __forceinline__ void multiply_warpgroup<__half>(float4 (&d)[8], const uint32_t (&a)[4],
                                                           uint64_t weights) {
  PARNET_WGMMA("f16.f16");
}
template <>
__device__ __forceinline__ void multiply_warpgroup<__nv_bfloat16>(float4 (&d)[8], const uint32_t (&a)[4],
                                                                  uint64_t weights) {
  PARNET_WGMMA("bf16.bf16");
}
#undef PARNET_WGMMA
#undef PARNET_SUMS

}  // namespace parnet::cuda
