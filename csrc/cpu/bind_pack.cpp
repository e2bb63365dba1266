// Binds packing, see schemas.inc: parameters as tensors to the bytes that the kernels read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "bind.h"
#include "dispatch.h"
#include "schedule/pack.h"

namespace {

using parnet::cpu::Kind, parnet::cpu::Storage;
using parnet::cpu::parallel_items, parnet::cpu::zeroed_bytes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor as_float(const Tensor& x) {
  return torch::stable::contiguous(
      x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}
std::optional<Tensor> as_float(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(as_float(*x)) : std::nullopt;
}
const float* data(const std::optional<Tensor>& x, const char* name, int64_t count) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 1 && x->size(0) == count, "`", name, "` must be a CPU tensor [",
                  count, "]");
  return static_cast<const float*>(x->const_data_ptr());
}

// A layer as the operator gives it.
struct GivenLayer {
  int64_t kind, activation, storage, stride;
  Tensor weight, bias, gate_weight;
  std::optional<Tensor> gate_bias, skip_scale, skip_shift, out_scale, out_shift;
};

// Throws unless numbers and shapes are those of a layer. Vectors are checked where they are read (`data`).
void check(const GivenLayer& g) {
  STD_TORCH_CHECK(0 <= g.kind && g.kind < 3, "`kind` must be 0 to 2, got ", g.kind);
  STD_TORCH_CHECK(0 <= g.activation && g.activation < 2, "`activation` must be 0 or 1, got ", g.activation);
  STD_TORCH_CHECK(0 <= g.storage && g.storage < parnet::cpu::kStorages, "`storage` must be 0 to ",
                  parnet::cpu::kStorages - 1, ", got ", g.storage);
  const Kind kind = static_cast<Kind>(g.kind);
  STD_TORCH_CHECK(g.stride == 1 || (g.stride == 2 && kind != Kind::kRepVGG),
                  "`stride` must be 1, or 2 without a skip");
  const Tensor &weight = g.weight, &gate = g.gate_weight;
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.numel() > 0,
                  "`weight` must be a CPU tensor [K, C, 3, 3]");
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  STD_TORCH_CHECK(kind != Kind::kRepVGG || outputs == channels, "`weight` must be [C, C, 3, 3] with a skip");
  STD_TORCH_CHECK(kind != Kind::kFusion || outputs % 2 == 0, "`weight` must have an even number of outputs");
  STD_TORCH_CHECK(gate.is_cpu() && gate.dim() == 2 && gate.size(0) == outputs && gate.size(1) == channels,
                  "`gate_weight` must be a CPU tensor [", outputs, ", ", channels, "]");
  STD_TORCH_CHECK((kind == Kind::kRepVGG) == g.skip_scale.has_value() &&
                      g.skip_scale.has_value() == g.skip_shift.has_value(),
                  "`skip_scale` and `skip_shift` go with repvgg_sse only");
}

// The same layer with float tensors. `measuring`: the values of the large ones do not matter and are not
// converted.
GivenLayer as_float(GivenLayer g, bool measuring) {
  for (Tensor* large : {&g.weight, &g.gate_weight}) {
    if (!measuring) *large = as_float(*large);
  }
  g.bias = as_float(g.bias);
  for (auto* vector : {&g.gate_bias, &g.skip_scale, &g.skip_shift, &g.out_scale, &g.out_shift}) {
    *vector = as_float(*vector);
  }
  return g;
}

// What packing reads; points into the tensors of `g`.
parnet::cpu::LayerParameters parameters_of(const GivenLayer& g) {
  const int64_t outputs = g.weight.size(0);
  return {.kind = static_cast<Kind>(g.kind),
          .activation = static_cast<parnet::cpu::Activation>(g.activation),
          .storage = static_cast<Storage>(g.storage),
          .stride = static_cast<int>(g.stride),
          .out_channels = outputs,
          .weight_channels = g.weight.size(1),
          .weight = static_cast<const float*>(g.weight.const_data_ptr()),
          .bias = data(g.bias, "bias", outputs),
          .gate_weight = static_cast<const float*>(g.gate_weight.const_data_ptr()),
          .gate_bias = data(g.gate_bias, "gate_bias", outputs),
          .skip_scale = data(g.skip_scale, "skip_scale", outputs),
          .skip_shift = data(g.skip_shift, "skip_shift", outputs),
          .out_scale = data(g.out_scale, "out_scale", outputs),
          .out_shift = data(g.out_shift, "out_shift", outputs)};
}

// Returns where the layer ends; writes it only if `into` is not empty.
int64_t pack(const Tensor& into, int64_t at, const GivenLayer& given) {
  check(given);
  const bool measuring = into.numel() == 0;
  const GivenLayer layer = as_float(given, measuring);
  const parnet::cpu::LayerParameters parameters = parameters_of(layer);
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  const parnet::cpu::PackedHeader header = parnet::cpu::plan_pack(parameters, k);
  const int64_t end = at + header.total_bytes;
  if (measuring) return end;
  STD_TORCH_CHECK(into.is_cpu() && into.scalar_type() == ScalarType::Byte && into.is_contiguous() &&
                      at >= 0 && at % 64 == 0 && end <= into.numel(),
                  "`into` must be a contiguous uint8 CPU tensor with a place for ", header.total_bytes,
                  " bytes at ", at);
  parnet::cpu::pack(parameters, k, header, static_cast<char*>(into.mutable_data_ptr()) + at, parallel_items);
  return end;
}

// Names travel as numbers (cpu.pack.CODES), since the stable ABI loses the memory of every string
// argument.
int64_t pack_layer(const Tensor& into, int64_t at, int64_t kind, int64_t stride, const Tensor& weight,
                   const Tensor& bias, const Tensor& gate_weight, const std::optional<Tensor>& gate_bias,
                   const std::optional<Tensor>& skip_scale, const std::optional<Tensor>& skip_shift,
                   const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_shift,
                   int64_t activation, int64_t storage) {
  return pack(into, at,
              {kind, activation, storage, stride, weight, bias, gate_weight, gate_bias, skip_scale,
               skip_shift, out_scale, out_shift});
}

int64_t storage(int64_t pixels, int64_t out_channels, int64_t in_channels) {
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  return static_cast<int64_t>(
      parnet::cpu::choose_storage(pixels, out_channels, in_channels, k.lanes, k.min_pixels_6));
}

Tensor pack_classifier(const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  STD_TORCH_CHECK(weight_in.is_cpu() && weight_in.dim() == 2 && weight_in.numel() > 0,
                  "`weight` must be a CPU tensor [classes, channels]");
  const Tensor weight = as_float(weight_in);
  const std::optional<Tensor> bias = as_float(bias_in);
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  const auto header = parnet::cpu::plan_classifier(weight.size(0), weight.size(1), k);
  Tensor packed = zeroed_bytes(header.total_bytes);
  parnet::cpu::pack_classifier(static_cast<const float*>(weight.const_data_ptr()),
                               data(bias, "bias", weight.size(0)), k, header, packed.mutable_data_ptr(),
                               parallel_items);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CPU, m) {
  m.impl("_cpu_pack", TORCH_BOX(&pack_layer));
  m.impl("_cpu_pack_classifier", TORCH_BOX(&pack_classifier));
}

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cpu_storage", TORCH_BOX(&storage));
  m.impl("_cpu_bytes", TORCH_BOX(&zeroed_bytes));
}
