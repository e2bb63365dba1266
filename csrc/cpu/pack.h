// Packing: a layer's parameters, transformed once into the bytes the kernels read.
#pragma once
#include <functional>
#include <string>

#include "layer.h"

namespace parnet::cpu {

constexpr uint64_t kPackMagic = 0x31304b4341505450;  // "PTPACK01"
constexpr int kPackVersion = 1;

// Contiguous float parameters in the layout of the public operators; null where absent.
struct LayerParameters {
  Kind kind;
  Activation activation;
  Storage storage;
  int stride;
  int64_t out_channels, weight_channels;  // weight is [out_channels, weight_channels, 3, 3]
  const float *weight, *bias, *gate_weight, *gate_bias, *skip_scale, *skip_shift, *out_scale, *out_shift;
};

// parallel(count, body) calls body(i) for i in [0, count), possibly on several threads.
using Parallel = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Which storage "auto" means. Fully transformed weights are four times larger, but the whole ParNet-S ran 5
// to 17 % faster with them (batch 1, one thread, AVX2 and AVX-512). Beyond this size of a layer, not
// measured, memory is spared.
inline bool prefers_full(int64_t out_channels, int64_t weight_channels) {
  return out_channels * weight_channels * kWeightMatrices * 4 <= int64_t{192} << 20;
}

// The header alone: sizes and offsets.
PackedHeader plan_pack(const LayerParameters&, const Kernels&);
// `to`: total_bytes of zeroed memory.
void pack(const LayerParameters&, const Kernels&, const PackedHeader&, void* to, const Parallel&);

// Throws std::runtime_error unless `data` is what pack() wrote for `kernels`.
const PackedHeader& check_packed(const void* data, int64_t bytes, const Kernels&);

}  // namespace parnet::cpu
