#include "kernels.cuh"

PARNET_CONVOLUTIONS(f16, Float16)
PARNET_MAPS(f16, __half)

namespace parnet::cuda {
KernelTable kernels_f16() {
  return {PARNET_ADDRESS(parnet_level_f16), PARNET_ADDRESS(parnet_stem_f16), PARNET_ADDRESS(parnet_enter_f16),
          PARNET_ADDRESS(parnet_classifier_f16)};
}
}  // namespace parnet::cuda
