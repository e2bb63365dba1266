#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void vadd_oob(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) c[i] = a[i] + b[i];
}
extern "C" __global__ void misaligned(const float* a, float* c) {
  *(float4*)(c + threadIdx.x + 1) = *(const float4*)(a + 4 * threadIdx.x);
}

__device__ unsigned counter = 0;
extern "C" __global__ void reduce_last(const float* __restrict__ x, float* partial, float* out, int n) {
  __shared__ float s[32];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < (blockDim.x >> 5) ? s[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) {
      partial[blockIdx.x] = v;
      __threadfence();
      last = atomicInc(&counter, gridDim.x - 1) == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (last) {
    float a = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) a += ((volatile float*)partial)[i];
    for (int o = 16; o; o >>= 1) a += __shfl_xor_sync(~0u, a, o);
    if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = a;
    __syncthreads();
    if (threadIdx.x == 0) {
      float r = 0;
      for (int i = 0; i < (int)(blockDim.x >> 5); i++) r += s[i];
      *out = r;
    }
  }
}
// block-wide reversal through shared memory; SYNC=false leaves the barrier out
template <bool SYNC>
__device__ void rev(int* d) {
  __shared__ int s[256];
  int t = threadIdx.x;
  s[t] = d[t];
  if (SYNC) __syncthreads();
  d[t] = s[blockDim.x - 1 - t];
}
extern "C" __global__ void rev_ok(int* d) { rev<true>(d); }
extern "C" __global__ void rev_race(int* d) { rev<false>(d); }
extern "C" __global__ void uninit_shared(int* d, int n) {
  __shared__ int s[64];
  if (threadIdx.x < n) s[threadIdx.x] = d[threadIdx.x];
  __syncthreads();
  d[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void half_barrier(int* d) {
  if (threadIdx.x < 64) __syncthreads();
  d[threadIdx.x] = 1;
}
extern "C" __global__ void deadlock(int* d) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  d[threadIdx.x] = 1;
}
extern "C" __global__ void div_barrier(int* d) {
  if (threadIdx.x & 1) {
    d[threadIdx.x] = 2;
    __syncthreads();
  } else {
    d[threadIdx.x] = 3;
    __syncthreads();
    d[threadIdx.x] += 10;
  }
}
extern "C" __global__ void named(int* d) {  // producer/consumer pair of warps over named barriers
  __shared__ int s[32];
  int l = threadIdx.x & 31;
  for (int i = 0; i < 4; i++) {
    if (threadIdx.x < 32) {
      s[l] = i * 100 + l;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      asm volatile("bar.sync 2, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      d[i * 32 + l] = s[31 - l];
      asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}
extern "C" __global__ void divergent(
    int* d, int n) {  // nested divergence, loops with lane-dependent trip counts, switch
  int t = blockIdx.x * blockDim.x + threadIdx.x, r = 0;
  for (int i = 0; i < t % 7; i++) {
    if ((i + t) & 1)
      r += i;
    else {
      for (int j = 0; j < i; j++) {
        if (j == t % 5) break;
        r += j * t;
      }
      continue;
    }
    r ^= t;
  }
  switch (t % 6) {
    case 0:
      r += 11;
      break;
    case 1:
      r *= 3;
      break;
    case 2:
      r -= t;
      break;
    case 3:
      r ^= 0x55;
    case 4:
      r += 7;
      break;
    default:
      r = -r;
  }
  if (t < n) d[t] = r;
}
extern "C" __global__ void spin(volatile int* flag,
                                int* out) {  // block i waits for block i+1: needs blocks running together
  if (threadIdx.x == 0) {
    if (blockIdx.x + 1 < gridDim.x)
      while (flag[blockIdx.x + 1] == 0) {
      }
    out[blockIdx.x] = gridDim.x - blockIdx.x;
    __threadfence();
    flag[blockIdx.x] = 1;
  }
}
extern "C" __global__ void hist(const unsigned char* x, unsigned* h, int n) {
  __shared__ unsigned s[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
    atomicAdd(&s[x[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&h[i], s[i]);
}
extern "C" __global__ void banks(const float* x, float* y, int pad) {
  extern __shared__ float s[];
  int t = threadIdx.x;
  s[t * pad] = x[t];
  __syncthreads();
  y[t] = s[t * pad];
}
extern "C" __global__ void strided(const float* x, float* y, int st) { y[threadIdx.x] = x[threadIdx.x * st]; }
extern "C" __global__ void hello(int n) {
  if (threadIdx.x < 2) printf("t %d x %.2f %s\n", threadIdx.x, n * 0.5, "ok");
}
extern "C" __global__ void ww(int* d, int same) {
  __shared__ int s[32];
  s[threadIdx.x & 31] = same ? 5 : (int)threadIdx.x;
  __syncthreads();
  d[threadIdx.x] = s[threadIdx.x & 31];
}
extern "C" __global__ void lanelock(
    int* lock,
    int* cnt) {  // lanes of one warp contend for a lock: needs independent progress of diverged lanes
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *(volatile int*)cnt = *(volatile int*)cnt + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
extern "C" __global__ void lanelock2(int* lock, int* cnt) {
  while (atomicCAS(lock, 0, 1) != 0) {
  }
  *(volatile int*)cnt = *(volatile int*)cnt + 1;
  __threadfence();
  atomicExch(lock, 0);
}
extern "C" __global__ void syncwarp_div(
    int* d) {  // the two halves of each warp exchange data, meeting at different __syncwarp calls
  __shared__ int s[64];
  int t = threadIdx.x;
  s[t] = -1;
  __syncthreads();
  if (t & 16) {
    s[t] = t * 2;
    __syncwarp();
    d[t] = s[t ^ 16];
  } else {
    s[t] = t * 3;
    __syncwarp();
    d[t] = s[t ^ 16] + 1;
  }
}
extern "C" __global__ void halfshfl(int* d) {
  int t = threadIdx.x;
  int v = -1;
  if ((t & 31) < 8)
    v = __reduce_add_sync(0xffu, t);
  else if ((t & 31) < 16)
    v = __shfl_sync(0xff00u, t * 7, 9);
  d[t] = v;
}
extern "C" __global__ void overlap(int* d, int step) { d[blockIdx.x * step + threadIdx.x] = blockIdx.x + 1; }
extern "C" __global__ void readother(int* d, int* o) {
  d[blockIdx.x] = 1;
  if (blockIdx.x) o[blockIdx.x] = d[blockIdx.x - 1];
}
extern "C" __global__ void ids(int4* o) {
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z),
      t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z),
      n = blockDim.x * blockDim.y * blockDim.z;
  o[b * n + t] = make_int4(threadIdx.x + 100 * threadIdx.y + 10000 * threadIdx.z,
                           blockIdx.x + 100 * blockIdx.y + 10000 * blockIdx.z, t, b);
}
