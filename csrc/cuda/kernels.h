// The kernels by number, as programs name them: kind * kMaths + math.
#pragma once

namespace parnet::cuda {

enum class Math { f16, bf16, tf32, f32 };
enum class Kind { level, stem, enter, classifier, hopper };
constexpr int kMaths = 4, kKinds = 5, kKernels = kMaths * kKinds;
constexpr const char* kKernelNames[kKernels] = {
    "parnet_level_f16",
    "parnet_level_bf16",
    "parnet_level_tf32",
    "parnet_level_f32",
    "parnet_stem_f16",
    "parnet_stem_bf16",
    "parnet_stem_tf32",
    "parnet_stem_f32",
    "parnet_enter_f16",
    "parnet_enter_bf16",
    "parnet_enter_f32",
    "parnet_enter_f32",
    "parnet_classifier_f16",
    "parnet_classifier_bf16",
    "parnet_classifier_f32",
    "parnet_classifier_f32",
    "parnet_hopper_f16",
    "parnet_hopper_bf16",
    "no kernel",
    "no kernel",
};

// Host addresses of the kernels that one file defines, by kind; null where it defines none.
struct KernelTable {
  const void* level;
  const void* stem;
  const void* enter;
  const void* classifier;
};
KernelTable kernels_f16();
KernelTable kernels_bf16();
KernelTable kernels_tf32();
KernelTable kernels_f32();
// Levels with warpgroup tiles; only where the library is built for sm_90a (PARNET_HOPPER).
const void* hopper_f16();
const void* hopper_bf16();

}  // namespace parnet::cuda
