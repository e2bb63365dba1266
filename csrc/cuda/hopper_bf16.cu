#include "kernels.cuh"
#include "warpgroup.cuh"

extern "C" __global__ void __launch_bounds__(parnet::cuda::kThreads, parnet::cuda::kBlocksPerSm)
    parnet_hopper_bf16(const __grid_constant__ parnet::cuda::LevelCall call) {
  parnet::cuda::run_warpgroup_level<parnet::cuda::BFloat16>(call);
}

namespace parnet::cuda {
const void* hopper_bf16() { return PARNET_ADDRESS(parnet_hopper_bf16); }
}  // namespace parnet::cuda
