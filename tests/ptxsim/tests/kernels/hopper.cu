// TMA, mbarrier and + wgmma GEMM, fp16 -> f32: C[M,N] = A[M,K] * B[N,K]^T; 64x64x64 tiles, 2 stages, one
// producer warp, one consumer warpgroup. BUG=1: consumer does not wait for the full barrier; BUG=2: producer
// does not wait for the empty barrier; BUG=3: no wgmma wait.
#include <cuda.h>
#include <cuda_fp16.h>
#ifndef BUG
#define BUG 0
#endif
using u32 = unsigned;
using u64 = unsigned long long;
__device__ __forceinline__ u32 sptr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mb_init(u64* b, int n) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(sptr(b)), "r"(n));
}
__device__ __forceinline__ void mb_wait(u64* b, int ph) {
  asm volatile(
      "{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra D;\nbra L;\nD:\n}" ::"r"(
          sptr(b)),
      "r"(ph)
      : "memory");
}
__device__ __forceinline__ void mb_arrive(u64* b) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(sptr(b)) : "memory");
}
__device__ __forceinline__ void mb_tx(u64* b, int n) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1;}" ::"r"(sptr(b)), "r"(n)
               : "memory");
}
__device__ __forceinline__ void tma2d(void* s, const CUtensorMap* m, u64* b, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(sptr(s)),
      "l"(m), "r"(sptr(b)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ u64 desc(const void* p) {
  return (u64)((sptr(p) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
extern "C" __global__ void __launch_bounds__(160)
    hgemm(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M,
          int N, int K) {
  extern __shared__ __align__(1024) unsigned char sm[];
  __half* A = (__half*)sm;
  __half* B = A + 2 * 64 * 64;
  __shared__ u64 full[2], empty[2];
  int t = threadIdx.x, kt = (K + 63) / 64;
  if (t == 0) {
    for (int i = 0; i < 2; i++) {
      mb_init(full + i, 1);
      mb_init(empty + i, 128);
    }
    asm volatile("fence.proxy.async.shared::cta;");
  }
  __syncthreads();
  if (t >= 128) {
    if (t == 128)
      for (int k = 0; k < kt; k++) {
        int s = k & 1;
#if BUG != 2
        mb_wait(empty + s, (k >> 1 & 1) ^ 1);
#endif
        mb_tx(full + s, 2 * 64 * 64 * 2);
        tma2d(A + s * 4096, &ma, full + s, k * 64, blockIdx.y * 64);
        tma2d(B + s * 4096, &mb, full + s, k * 64, blockIdx.x * 64);
      }
  } else {
    float d[32];
    for (int i = 0; i < 32; i++) d[i] = 0;
    for (int k = 0; k < kt; k++) {
      int s = k & 1;
#if BUG != 1
      mb_wait(full + s, k >> 1 & 1);
#endif
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      for (int kk = 0; kk < 4; kk++) {
        u64 da = desc(A + s * 4096 + kk * 16), db = desc(B + s * 4096 + kk * 16);
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%"
            "26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;}"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
              "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
              "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
              "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
            : "l"(da), "l"(db));
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#if BUG != 3
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
      mb_arrive(empty + s);
    }
    int w = t >> 5, l = t & 31;
    for (int i = 0; i < 32; i++) {
      int r = blockIdx.y * 64 + w * 16 + l / 4 + (i >> 1 & 1) * 8,
          c = blockIdx.x * 64 + (i >> 2) * 8 + l % 4 * 2 + (i & 1);
      if (r < M && c < N) C[(size_t)r * N + c] = d[i];
    }
  }
}
// linear bulk copy in and out, reversing in between
extern "C" __global__ void bulk(const int* x, int* y, int n) {
  __shared__ __align__(16) int a[256];
  __shared__ __align__(16) int b[256];
  __shared__ u64 bar;
  int t = threadIdx.x;
  if (t == 0) {
    mb_init(&bar, 1);
  }
  __syncthreads();
  if (t == 0) {
    mb_tx(&bar, n * 4);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            sptr(a)),
        "l"(x), "r"(n * 4), "r"(sptr(&bar))
        : "memory");
  }
  mb_wait(&bar, 0);
  if (t < n) b[t] = a[n - 1 - t];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (t == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(y), "r"(sptr(b)),
                 "r"(n * 4)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
// One stage of a tile in by TMA and out again. BUG=4: the store is not waited for; BUG=5: no proxy fence in
// front of it.
extern "C" __global__ void tile_copy(const __grid_constant__ CUtensorMap in,
                                     const __grid_constant__ CUtensorMap out) {
  __shared__ __align__(1024) float tile[32 * 32];
  __shared__ u64 bar;
  if (threadIdx.x == 0) mb_init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mb_tx(&bar, sizeof tile);
    tma2d(tile, &in, &bar, blockIdx.x * 32, blockIdx.y * 32);
  }
  mb_wait(&bar, 0);
  for (int i = threadIdx.x; i < 32 * 32; i += blockDim.x) tile[i] += 1;
#if BUG != 5
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&out),
                 "r"(blockIdx.x * 32), "r"(blockIdx.y * 32), "r"(sptr(tile))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#if BUG != 4
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
  }
}
