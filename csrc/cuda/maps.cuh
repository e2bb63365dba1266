// Into and out of the kernels' layout: a user's map to padded NHWC with its channel sums; channel means to
// logits.
#pragma once
#include "channel_gate.cuh"
#include "layer.h"
#include "math.cuh"
#include "policy.h"

namespace parnet::cuda {

constexpr int kEnterChannels = 32;

// Converts one tile of pixels of one image. Reads along whichever of channels and pixels lies adjacent.
template <class T>
__device__ __forceinline__ void run_enter(const EnterCall& p) {
  constexpr int kPitch =
      kEnterChannels + 2 / (sizeof(T) / 2);  // odd in words: columns are read without conflicts
  __shared__ T values[kEnterPixels][kPitch];
  __shared__ float partial[kThreads / 32][kEnterChannels];
  allow_dependents();
  wait_for_producers();
  const int n = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles, area = p.input.h * p.input.w;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool along_channels = p.input.stride[1] == 1;
  const T* image = static_cast<const T*>(p.input.data) + n * p.input.stride[0];
  for (int base = 0; base < p.pitch; base += kEnterChannels) {
    for (int i = threadIdx.x; i < kEnterPixels * kEnterChannels; i += kThreads) {
      const int c = along_channels ? i % kEnterChannels : i / kEnterPixels;
      const int local = along_channels ? i / kEnterChannels : i % kEnterPixels;
      const int pixel = tile * kEnterPixels + local, h = pixel / p.input.w, w = pixel - h * p.input.w;
      T v = from_float<T>(0.0f);
      if (pixel < area && base + c < p.input.c)
        v = image[(base + c) * p.input.stride[1] + h * p.input.stride[2] + w * p.input.stride[3]];
      if constexpr (sizeof(T) == 4) {
        if (p.round) v = round_to_tf32(v);
      }
      values[local][c] = v;
    }
    __syncthreads();
    const int channel = base + lane;
    float sum = 0;
    for (int local = warp * (kEnterPixels / 4); local < (warp + 1) * (kEnterPixels / 4); local++) {
      const T v = values[local][lane];
      const int64_t pixel = static_cast<int64_t>(tile) * kEnterPixels + local;
      sum += to_float(v);
      if (p.out && pixel < area && channel < p.pitch)
        static_cast<T*>(p.out)[(static_cast<int64_t>(n) * area + pixel) * p.pitch + channel] = v;
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && channel < p.pitch) {
      float total = 0;
      for (int w = 0; w < kThreads / 32; w++) total += partial[w][lane];
      p.sums[(static_cast<int64_t>(n) * p.tiles + tile) * p.pitch + channel] = total;
    }
  }
}

__device__ __forceinline__ float mean_of(const ClassifierCall& p, int n, int c) {
  float sum = 0;
  for (int t = 0; t < p.sum_tiles; t++)
    sum += __ldcg(p.sums + (static_cast<int64_t>(n) * p.sum_tiles + t) * p.pitch + c);
  return sum * p.inverse_area;
}

constexpr int kStepsAtOnce = 4;  // whose loads are on their way together

// Each warp computes one output. A lane reads 16 bytes of weights at a time where rows are aligned so.
template <class T>
__device__ __forceinline__ void run_classifier(const ClassifierCall& p) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = threadIdx.x & 31;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int n = output / p.classes, j = output % p.classes;
  const T* row = static_cast<const T*>(p.weight) + static_cast<int64_t>(j) * p.features;
  allow_dependents();
  if (p.weight && n < p.n)
    for (int64_t i = lane * 128; i < p.features * static_cast<int64_t>(sizeof(T)); i += 32 * 128)
      prefetch_l2(reinterpret_cast<const char*>(row) + i);
  const float bias = p.weight && p.bias && n < p.n ? to_float(static_cast<const T*>(p.bias)[j]) : 0.0f;
  wait_for_producers();
  if (n >= p.n) return;
  T* y = static_cast<T*>(p.y) + output;
  if (!p.weight) {
    if (lane == 0) *y = from_float<T>(mean_of(p, n, j));
    return;
  }
  float sum = 0;
  if (p.features % kVector == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0) {
    const float* sums = p.sums + static_cast<int64_t>(n) * p.sum_tiles * p.pitch;
    for (int start = lane * kVector; start < p.features; start += 32 * kVector * kStepsAtOnce) {
      uint4 w[kStepsAtOnce];
      float4 v[kStepsAtOnce][kVector / 4];
#pragma unroll
      for (int k = 0; k < kStepsAtOnce; k++) {
        const int c = start + k * 32 * kVector;
        w[k] = c < p.features ? __ldg(reinterpret_cast<const uint4*>(row + c)) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int q = 0; q < kVector / 4; q++) v[k][q] = make_float4(0, 0, 0, 0);
      }
      for (int t = 0; t < p.sum_tiles; t++) {
        float4 more[kStepsAtOnce][kVector / 4];
#pragma unroll
        for (int k = 0; k < kStepsAtOnce; k++)
#pragma unroll
          for (int q = 0; q < kVector / 4; q++) {
            const int c = start + k * 32 * kVector + 4 * q;
            more[k][q] = c < p.features ? __ldcg(reinterpret_cast<const float4*>(sums + t * p.pitch + c))
                                        : make_float4(0, 0, 0, 0);
          }
#pragma unroll
        for (int k = 0; k < kStepsAtOnce; k++)
#pragma unroll
          for (int q = 0; q < kVector / 4; q++) add(v[k][q], more[k][q]);
      }
#pragma unroll
      for (int k = 0; k < kStepsAtOnce; k++) {
#pragma unroll
        for (int q = 0; q < kVector / 4; q++) {
          const float4 x = load4(reinterpret_cast<const T*>(&w[k]) + 4 * q), mean = v[k][q];
          sum += x.x * mean.x + x.y * mean.y + x.z * mean.z + x.w * mean.w;
        }
      }
    }
    sum *= p.inverse_area;
  } else {
    for (int c = lane; c < p.features; c += 32) sum = fmaf(to_float(row[c]), mean_of(p, n, c), sum);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0) *y = from_float<T>(sum + bias);
}

}  // namespace parnet::cuda
