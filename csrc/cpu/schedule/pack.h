// Packing: a layer's parameters, brought once into the bytes that the kernels read.
#pragma once
#include <functional>
#include <string>

#include "../layer.h"

namespace parnet::cpu {

constexpr uint64_t kPackMagic = 0x31304b4341505450;  // "PTPACK01"
constexpr int kPackVersion = 5;

// Contiguous float parameters in the layout of the public operators; null where absent.
struct LayerParameters {
  Kind kind;
  Activation activation;
  Storage storage;
  int stride;
  int64_t out_channels, weight_channels;  // weight is [out_channels, weight_channels, 3, 3]
  const float *weight, *bias, *gate_weight, *gate_bias, *skip_scale, *skip_shift, *out_scale, *out_shift;
  // kPlain: `weight` is that of the convolution whose input gradient this is, [weight_channels, out_channels,
  // 3, 3]. At stride 1 that is a convolution again, with its taps turned around; at stride 2 the transposed
  // algorithm, with the taps as they are.
  bool adjoint = false;
};

// parallel(count, body) calls body(i) for i in [0, count), possibly on several threads.
using Parallel = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Values stored for the 9 taps of a filter.
inline int values_per_filter(const PackedHeader& h) {
  const int slots = slots_of(h.stride, h.in_channels);
  return h.storage == Storage::kTaps ? 9 : h.storage == Storage::kRows ? slots * 3 : slots * slots;
}

// The header alone: sizes and offsets.
PackedHeader plan_pack(const LayerParameters&, const Kernels&);
// `to`: total_bytes of zeroed memory; of kind kPlain, of any memory.
void pack(const LayerParameters&, const Kernels&, const PackedHeader&, void* to, const Parallel&);

// A classifier: logits = weight [classes, channels] * means + bias, or no bias.
PackedHeader plan_classifier(int64_t classes, int64_t channels, const Kernels&);
void pack_classifier(const float* weight, const float* bias, const Kernels&, const PackedHeader&, void* to,
                     const Parallel&);

// Throws std::runtime_error unless `data` is what pack() wrote for `kernels`.
const PackedHeader& check_packed(const void* data, int64_t bytes, const Kernels&);

}  // namespace parnet::cpu
