// Launchers of the pooled gate: gate[n,k] = sigmoid(sum_c weight[k,c] · mean_hw(x)[n,c] + bias[k]). No torch, no CUDA
// header here: this file is what bind.cpp (g++, torch) and gate.cu (nvcc) share.
#pragma once
#include <cstdint>

namespace parnet::cuda {

enum class DType { f32, f16, bf16 };

struct PooledGate {
  DType dtype;           // of x, weight, bias and gate
  const void* x;         // [N, C, H, W] with the strides below, in elements
  const void* weight;    // [K, C], contiguous
  const void* bias;      // [K] or null
  float* mean;           // [N, C], scratch
  void* gate;            // [N, K]
  int64_t n, c, h, w, k;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// Returns null, or the name and message of the CUDA error.
const char* pooled_gate(const PooledGate& p, void* stream);

}  // namespace parnet::cuda
