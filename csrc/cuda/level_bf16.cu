#include "kernels.cuh"

PARNET_CONVOLUTIONS(bf16, BFloat16)
PARNET_MAPS(bf16, __nv_bfloat16)

namespace parnet::cuda {
KernelTable kernels_bf16() {
  return {PARNET_ADDRESS(parnet_level_bf16), PARNET_ADDRESS(parnet_stem_bf16),
          PARNET_ADDRESS(parnet_enter_bf16), PARNET_ADDRESS(parnet_classifier_bf16)};
}
}  // namespace parnet::cuda
