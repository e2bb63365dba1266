// Ordering in global memory: within a block, and through an arrival counter between blocks. Each kernel is
// right unless the template arguments take something out of it.
#include <cuda/atomic>

extern "C" __device__ unsigned arrivals = 0;

// Each block writes a row of partial sums; the block that arrives last adds them up in a fixed order.
//   BARRIER: all threads have stored before thread 0 arrives
//   FENCE: the stores are released before the arrival
//   ACQUIRE: the last block's loads come after a fence that follows the arrival
template <bool BARRIER, bool FENCE, bool ACQUIRE>
__device__ void last_arriver(const float* x, float* partial, float* out, int n) {
  __shared__ bool last;
  int t = threadIdx.x, row = blockIdx.x * n;
  for (int i = t; i < n; i += blockDim.x) partial[row + i] = 2 * x[row + i];
  if (BARRIER) __syncthreads();
  if (t == 0) {
    if (FENCE) __threadfence();
    last = atomicAdd(&arrivals, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (ACQUIRE) __threadfence();
  for (int i = t; i < n; i += blockDim.x) {
    float sum = 0;
    for (int b = 0; b < gridDim.x; b++) sum += partial[b * n + i];
    out[i] = sum;
  }
  if (t == 0) arrivals = 0;
}
#define LAST_ARRIVER(name, barrier, fence, acquire)                                    \
  extern "C" __global__ void name(const float* x, float* partial, float* out, int n) { \
    last_arriver<barrier, fence, acquire>(x, partial, out, n);                         \
  }
LAST_ARRIVER(last_ok, true, true, true)
LAST_ARRIVER(last_no_barrier, false, true, true)
LAST_ARRIVER(last_no_fence, true, false, true)
LAST_ARRIVER(last_no_acquire, true, true, false)

// The same with a fence by every thread in front of the barrier, and an acquire-release arrival
extern "C" __global__ void last_fence_first(const float* x, float* partial, float* out, int n) {
  __shared__ bool last;
  int t = threadIdx.x, row = blockIdx.x * n;
  for (int i = t; i < n; i += blockDim.x) partial[row + i] = 2 * x[row + i];
  __threadfence();
  __syncthreads();
  if (t == 0) {
    cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(arrivals);
    last = counter.fetch_add(1, cuda::memory_order_acq_rel) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  for (int i = t; i < n; i += blockDim.x) {
    float sum = 0;
    for (int b = 0; b < gridDim.x; b++) sum += partial[b * n + i];
    out[i] = sum;
  }
  if (t == 0) arrivals = 0;
}

// A chain: block b adds to what block b - 1 left, in order
template <bool RELEASE>
__device__ void chain(int* turn, float* sum, const float* x) {
  cuda::atomic_ref<int, cuda::thread_scope_device> flag(*turn);
  if (threadIdx.x == 0)
    while (flag.load(cuda::memory_order_acquire) != blockIdx.x) {
    }
  __syncthreads();
  sum[threadIdx.x] += x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0)
    flag.store(blockIdx.x + 1, RELEASE ? cuda::memory_order_release : cuda::memory_order_relaxed);
}
extern "C" __global__ void chain_ok(int* turn, float* sum, const float* x) { chain<true>(turn, sum, x); }
extern "C" __global__ void chain_relaxed(int* turn, float* sum, const float* x) {
  chain<false>(turn, sum, x);
}

// Reverses in place through global memory, within one block
template <bool SYNC>
__device__ void exchange(int* d, int* scratch) {
  int t = threadIdx.x;
  scratch[t] = d[t];
  if (SYNC) __syncthreads();
  d[t] = scratch[blockDim.x - 1 - t];
}
extern "C" __global__ void exchange_ok(int* d, int* scratch) { exchange<true>(d, scratch); }
extern "C" __global__ void exchange_race(int* d, int* scratch) { exchange<false>(d, scratch); }

// A value is read by all and then overwritten by one
template <bool SYNC>
__device__ void read_then_write(int* d, int* out) {
  out[threadIdx.x] = d[0];
  if (SYNC) __syncthreads();
  if (threadIdx.x == blockDim.x - 1) d[0] = -1;
}
extern "C" __global__ void read_write_ok(int* d, int* out) { read_then_write<true>(d, out); }
extern "C" __global__ void read_write_race(int* d, int* out) { read_then_write<false>(d, out); }

// Blocks that only count: atomics on data need no order
extern "C" __global__ void count(unsigned* bins, const unsigned char* x, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
    atomicAdd(&bins[x[i]], 1u);
}

// Pointers that are data: reads through a table of addresses
extern "C" __global__ void gather(const float* const* rows, float* out, int n) {
  out[blockIdx.x * n + threadIdx.x] = rows[blockIdx.x][threadIdx.x];
}
extern "C" __global__ void scale(const float* x, float* y, float s, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = s * x[i];
}
extern "C" __global__ void approximate(const float* x, float* y) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x[threadIdx.x]));
  y[threadIdx.x] = r;
}
