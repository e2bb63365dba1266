// The pooled gate of a block in two kernels: channel means, one thread block a channel, added in a fixed tree; then one
// warp an output channel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gate.h"

namespace parnet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 65535;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void store(float* p, float v) { *p = v; }
__device__ void store(__half* p, float v) { *p = __float2half(v); }
__device__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16(v); }

// Adds over the warp by a butterfly: every lane gets the same sum, in the same order every time.
__device__ float warp_sum(float v) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// mean[n, c] of x over h, w. Grid-stride over the N·C channels.
template <typename T>
__global__ void channel_mean_kernel(const T* __restrict__ x, float* __restrict__ mean, int64_t channels, int64_t c,
                                    int64_t pixels, int64_t w, int64_t stride_n, int64_t stride_c,
                                    int64_t stride_h, int64_t stride_w) {
  __shared__ float partial[kThreads / kWarp];
  for (int64_t channel = blockIdx.x; channel < channels; channel += gridDim.x) {
    const T* map = x + (channel / c) * stride_n + (channel % c) * stride_c;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < pixels; i += kThreads)
      sum += to_float(map[(i / w) * stride_h + (i % w) * stride_w]);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0;
      for (float v : partial) total += v;
      mean[channel] = total / static_cast<float>(pixels);
    }
    __syncthreads();  // `partial` is written again in the next round
  }
}

// gate[n, k] = sigmoid(weight[k, :] · mean[n, :] + bias[k]); one warp an output, grid-stride over the N·K outputs.
template <typename T>
__global__ void gate_kernel(const float* __restrict__ mean, const T* __restrict__ weight,
                            const T* __restrict__ bias, T* __restrict__ gate, int64_t outputs, int64_t c,
                            int64_t k) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; i < outputs;
       i += warps) {
    const float* m = mean + (i / k) * c;
    const T* row = weight + (i % k) * c;
    float sum = 0;
    for (int64_t j = lane; j < c; j += kWarp) sum += to_float(row[j]) * m[j];
    sum = warp_sum(sum);
    if (lane == 0) {
      if (bias) sum += to_float(bias[i % k]);
      store(gate + i, 1.0f / (1.0f + expf(-sum)));
    }
  }
}

template <typename T>
void launch(const PooledGate& p, cudaStream_t stream) {
  const int64_t channels = p.n * p.c, outputs = p.n * p.k;
  const auto mean_blocks = static_cast<unsigned>(channels < kMaxBlocks ? channels : kMaxBlocks);
  channel_mean_kernel<T><<<mean_blocks, kThreads, 0, stream>>>(static_cast<const T*>(p.x), p.mean, channels, p.c,
                                                              p.h * p.w, p.w, p.stride_n, p.stride_c,
                                                              p.stride_h, p.stride_w);
  const int64_t wanted = (outputs + kThreads / kWarp - 1) / (kThreads / kWarp);
  const auto gate_blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  gate_kernel<T><<<gate_blocks, kThreads, 0, stream>>>(p.mean, static_cast<const T*>(p.weight),
                                                      static_cast<const T*>(p.bias), static_cast<T*>(p.gate),
                                                      outputs, p.c, p.k);
}

}  // namespace

const char* pooled_gate(const PooledGate& p, void* stream) {
  if (p.n == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32: launch<float>(p, s); break;
    case DType::f16: launch<__half>(p, s); break;
    case DType::bf16: launch<__nv_bfloat16>(p, s); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace parnet::cuda
