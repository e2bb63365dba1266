// Code that libraries generate: CUB, cooperative groups, cuda::barrier and memcpy_async, fp8, wmma
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_fp8.h>
#include <mma.h>

#include <cub/cub.cuh>
#include <cuda/barrier>
namespace cg = cooperative_groups;
extern "C" __global__ void cubsum(const float* x, float* y, int n) {
  using R = cub::BlockReduce<float, 128>;
  __shared__ typename R::TempStorage t;
  float v = threadIdx.x < n ? x[threadIdx.x] : 0;
  float s = R(t).Sum(v);
  if (threadIdx.x == 0) *y = s;
}
extern "C" __global__ void cubscan(const int* x, int* y) {
  using S = cub::BlockScan<int, 128>;
  __shared__ typename S::TempStorage t;
  int v;
  S(t).ExclusiveSum(x[threadIdx.x], v);
  y[threadIdx.x] = v;
}
extern "C" __global__ void cubsort(unsigned* x) {
  using S = cub::BlockRadixSort<unsigned, 128, 4>;
  __shared__ typename S::TempStorage t;
  unsigned k[4];
  for (int i = 0; i < 4; i++) k[i] = x[threadIdx.x * 4 + i];
  S(t).Sort(k);
  for (int i = 0; i < 4; i++) x[threadIdx.x * 4 + i] = k[i];
}
extern "C" __global__ void cgred(const float* x, float* y) {
  auto b = cg::this_thread_block();
  auto t = cg::tiled_partition<16>(b);
  float s = cg::reduce(t, x[b.thread_rank()], cg::plus<float>());
  int sc = cg::inclusive_scan(t, (int)t.thread_rank());
  if (t.thread_rank() == 15) y[b.thread_rank() / 16] = s + sc;
  auto c = cg::coalesced_threads();
  (void)c;
}
extern "C" __global__ void cgcoal(const int* x, int* cnt, int* rank) {
  int t = threadIdx.x;
  rank[t] = -1;
  if (x[t] & 1) {
    auto g = cg::coalesced_threads();
    int p;
    if (g.thread_rank() == 0) p = atomicAdd(cnt, g.size());
    p = g.shfl(p, 0);
    rank[t] = p + g.thread_rank();
  }
}
extern "C" __global__ void cgcopy(const float* x, float* y) {
  __shared__ alignas(16) float s[256];
  auto b = cg::this_thread_block();
  cg::memcpy_async(b, s, x, sizeof(float) * 256);
  cg::wait(b);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) y[i] = s[255 - i];
}
extern "C" __global__ void cudabar(int* y) {
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  __shared__ int s[128];
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = threadIdx.x * (i + 1);
    bar.arrive_and_wait();
    y[i * 128 + threadIdx.x] = s[127 - threadIdx.x];
    bar.arrive_and_wait();
  }
}
extern "C" __global__ void fp8(const float* x, float* y, unsigned char* q) {
  __nv_fp8_e4m3 a(x[threadIdx.x]);
  __nv_fp8_e5m2 b(x[threadIdx.x]);
  q[threadIdx.x] = a.__x;
  y[threadIdx.x] = float(a) + 1000.f * float(b);
}
extern "C" __global__ void wmmabf(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  using namespace nvcuda;
  __shared__ __nv_bfloat16 sa[256], sb[256];
  for (int i = threadIdx.x; i < 256; i += 32) {
    sa[i] = a[i];
    sb[i] = b[i];
  }
  __syncwarp();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 1.f);
  wmma::load_matrix_sync(fa, sa, 16);
  wmma::load_matrix_sync(fb, sb, 16);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_col_major);
}
struct Big {
  float v[10];
  int n;
};
__device__ __noinline__ Big twice(Big b, int k) {
  for (int i = 0; i < b.n; i++) b.v[i] *= k;
  return b;
}
__device__ __noinline__ int fib(int n) {
  int a = 0, b = 1;
  while (n-- > 0) {
    int t = a + b;
    a = b;
    b = t;
  }
  return a;
}
extern "C" __global__ void calls(const Big p, float* y, int* f) {
  Big q = p;
  if (threadIdx.x & 1) q = twice(q, 3);
  y[threadIdx.x] = q.v[threadIdx.x % 10];
  f[threadIdx.x] = fib(threadIdx.x % 20);
}
