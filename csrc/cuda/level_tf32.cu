#include "kernels.cuh"

PARNET_CONVOLUTIONS(tf32, TensorFloat32)

namespace parnet::cuda {
KernelTable kernels_tf32() {
  return {PARNET_ADDRESS(parnet_level_tf32), PARNET_ADDRESS(parnet_stem_tf32), nullptr, nullptr};
}
}  // namespace parnet::cuda
