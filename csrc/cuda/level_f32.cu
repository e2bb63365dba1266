#include "kernels.cuh"

PARNET_CONVOLUTIONS(f32, Float32)
PARNET_MAPS(f32, float)

namespace parnet::cuda {
KernelTable kernels_f32() {
  return {PARNET_ADDRESS(parnet_level_f32), PARNET_ADDRESS(parnet_stem_f32), PARNET_ADDRESS(parnet_enter_f32),
          PARNET_ADDRESS(parnet_classifier_f32)};
}
}  // namespace parnet::cuda
