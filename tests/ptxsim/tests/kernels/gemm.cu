// fp16/bf16 GEMM: C[M,N] (f32) = A[M,K] (row-major) * B[K,N] (row-major). 64x64x32 tile, 4 warps, cp.async
// double buffering, ldmatrix, mma.sync m16n8k16. BUG=1: no cp.async wait; BUG=2: no barrier after the wait;
// BUG=3: no barrier at the end of the loop body; BUG=4: missing row bound on the store.
#include <cuda_fp16.h>
#ifndef BUG
#define BUG 0
#endif
#ifdef BF16
#define MMA_T "bf16"
#else
#define MMA_T "f16"
#endif
constexpr int BM = 64, BN = 64, BK = 32, AP = BK + 8, BP = BN + 8;
__device__ __forceinline__ unsigned sptr(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(void* s, const void* g, bool ok) {
  int n = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(sptr(s)), "l"(g), "r"(n));
}
extern "C" __global__ void __launch_bounds__(128)
    gemm(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  __shared__ __align__(16) unsigned short As[2][BM][AP];
  __shared__ __align__(16) unsigned short Bs[2][BK][BP];
  const int t = threadIdx.x, lane = t & 31, w = t >> 5, wm = (w & 1) * 32, wn = (w >> 1) * 32;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  float acc[2][4][4] = {};
  auto load = [&](int buf, int k0) {
    for (int i = t; i < BM * BK / 8; i += 128) {
      int r = i / (BK / 8), c = i % (BK / 8) * 8;
      bool ok = m0 + r < M && k0 + c < K;
      cp16(&As[buf][r][c], A + (ok ? (size_t)(m0 + r) * K + k0 + c : 0), ok);
    }
    for (int i = t; i < BK * BN / 8; i += 128) {
      int r = i / (BN / 8), c = i % (BN / 8) * 8;
      bool ok = k0 + r < K && n0 + c < N;
      cp16(&Bs[buf][r][c], B + (ok ? (size_t)(k0 + r) * N + n0 + c : 0), ok);
    }
    asm volatile("cp.async.commit_group;\n");
  };
  const int kt = (K + BK - 1) / BK;
  load(0, 0);
  for (int k = 0; k < kt; k++) {
    const int buf = k & 1;
    if (k + 1 < kt)
      load(buf ^ 1, (k + 1) * BK);
    else
      asm volatile("cp.async.commit_group;\n");
#if BUG != 1
    asm volatile("cp.async.wait_group 1;\n");
#endif
#if BUG != 2
    __syncthreads();
#endif
    for (int kk = 0; kk < BK; kk += 16) {
      unsigned a[2][4], b[4][2];
      for (int i = 0; i < 2; i++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3])
                     : "r"(sptr(&As[buf][wm + i * 16 + (lane & 15)][kk + (lane >> 4) * 8])));
      for (int j = 0; j < 4; j += 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(b[j][0]), "=r"(b[j][1]), "=r"(b[j + 1][0]), "=r"(b[j + 1][1])
                     : "r"(sptr(&Bs[buf][kk + (lane & 15)][wn + j * 8 + (lane >> 4) * 8])));
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
          asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_T "." MMA_T
                       ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                       : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                       : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
#if BUG != 3
    __syncthreads();
#endif
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int h = 0; h < 2; h++) {
        int r = m0 + wm + i * 16 + h * 8 + lane / 4, c = n0 + wn + j * 8 + lane % 4 * 2;
#if BUG == 4
        if (c < N) *(float2*)(C + (size_t)r * N + c) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
#else
        if (r < M && c < N)
          *(float2*)(C + (size_t)r * N + c) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
#endif
      }
}
