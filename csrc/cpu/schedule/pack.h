// Packing: a layer's parameters, transformed once into the bytes the kernels read.
#pragma once
#include <functional>
#include <string>

#include "../layer.h"

namespace parnet::cpu {

constexpr uint64_t kPackMagic = 0x31304b4341505450;  // "PTPACK01"
constexpr int kPackVersion = 4;

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

// Values stored for the 9 of a kernel.
inline int weights_per_channel(const PackedHeader& h) {
  const Storage s = h.storage;
  const int slots = slots_of(h.stride, s, h.in_channels);
  return s == Storage::kCompact ? 9 : s == Storage::kRows ? slots * 3 : slots * slots;
}

// Which storage "auto" means. Large layers are bound by reading their weights, where the processor has
// AVX-512: at 14x14, half the bytes took 10 to 20 % less time on one thread and 30 % less on two (batch 1).
// With AVX2, making weights from taps costs more than it saves. Large maps do not ask: see storage_of in
// parnet_kernels/cpu.py. Of transformed weights, F(4, 3) reads no more where F(6, 3)'s are stored as well,
// and batches of 14x14 maps take 13 to 15 % less time with F(6, 3).
inline Storage best_storage(int64_t out_channels, int64_t weight_channels, int lanes) {
  const int64_t kernels = out_channels * weight_channels;
  if (kernels > 1'400'000) return Storage::kCompact;  // memory is spared
  if (lanes == 16 && kernels > 70'000) return Storage::kRows;
  return Storage::kWide;
}

// The header alone: sizes and offsets.
PackedHeader plan_pack(const LayerParameters&, const Kernels&);
// `to`: total_bytes of zeroed memory.
void pack(const LayerParameters&, const Kernels&, const PackedHeader&, void* to, const Parallel&);

// A classifier: logits = weight [classes, channels] * means + bias, or no bias.
PackedHeader plan_classifier(int64_t classes, int64_t channels, const Kernels&);
void pack_classifier(const float* weight, const float* bias, const Kernels&, const PackedHeader&, void* to,
                     const Parallel&);

// Throws std::runtime_error unless `data` is what pack() wrote for `kernels`.
const PackedHeader& check_packed(const void* data, int64_t bytes, const Kernels&);

}  // namespace parnet::cpu
