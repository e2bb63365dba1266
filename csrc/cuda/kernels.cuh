// The kernels of one arithmetic. Each is compiled in a file of its own, so that the build runs in parallel.
#pragma once
#include "convolution.cuh"
#include "kernels.h"
#include "maps.cuh"
#include "stem.cuh"

#define PARNET_CONVOLUTIONS(NAME, MATH)                                                            \
  extern "C" __global__ void __launch_bounds__(parnet::cuda::kThreads, parnet::cuda::kBlocksPerSm) \
      parnet_level_##NAME(const __grid_constant__ parnet::cuda::LevelCall call) {                  \
    parnet::cuda::run_level<parnet::cuda::MATH>(call);                                             \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(parnet::cuda::kThreads, parnet::cuda::kBlocksPerSm) \
      parnet_stem_##NAME(const __grid_constant__ parnet::cuda::StemCall call) {                    \
    parnet::cuda::run_stem<parnet::cuda::MATH>(call);                                              \
  }

#define PARNET_MAPS(NAME, TYPE)                                                             \
  extern "C" __global__ void __launch_bounds__(parnet::cuda::kThreads)                      \
      parnet_enter_##NAME(const __grid_constant__ parnet::cuda::EnterCall call) {           \
    parnet::cuda::run_enter<TYPE>(call);                                                    \
  }                                                                                         \
  extern "C" __global__ void __launch_bounds__(parnet::cuda::kThreads)                      \
      parnet_classifier_##NAME(const __grid_constant__ parnet::cuda::ClassifierCall call) { \
    parnet::cuda::run_classifier<TYPE>(call);                                               \
  }

#define PARNET_ADDRESS(KERNEL) reinterpret_cast<const void*>(KERNEL)
