// Binds networks in int8 and bfloat16 to the operators of schemas.inc: packed bytes to layers, torch's
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "network.h"

namespace {

using namespace parnet::cpu::direct;
using torch::headeronly::MemoryFormat, torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The columns of a row of `program`: parnet_kernels/cpu/direct.py writes them in this order.
struct Row {
  int64_t kind, activation, stride, input, other, output, in_channels, out_channels, last, in_zero, out_zero,
      in_scale;
  int64_t weight, start, multiplier, bias, skip_scale, skip_shift, out_scale, out_shift, gate_weight,
      gate_multiplier, gate_bias;
};

// Packed bytes, never read beyond their end.
class Packed {
 public:
  explicit Packed(const Tensor& t) : base_(static_cast<const char*>(t.const_data_ptr())), bytes_(t.numel()) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.is_contiguous(),
                    "`packed` must be a contiguous uint8 CPU tensor");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(base_) % 64 == 0, "`packed` must be aligned to 64 bytes");
  }
  template <class T>
  const T* at(int64_t offset, int64_t count) const {
    STD_TORCH_CHECK(offset >= 0 && offset % 64 == 0 && offset <= bytes_ &&
                        count <= (bytes_ - offset) / static_cast<int64_t>(sizeof(T)),
                    "`packed` has no ", count, " values at ", offset);
    return reinterpret_cast<const T*>(base_ + offset);
  }

 private:
  const char* base_;
  int64_t bytes_;
};

Step step_of(const Row& r, const Packed& packed, const Kernels& k) {
  STD_TORCH_CHECK(0 <= r.kind && r.kind < 3 && 0 <= r.activation && r.activation < 2,
                  "`program`: unknown layer");
  STD_TORCH_CHECK(r.stride == 1 || (r.stride == 2 && r.kind != 0),
                  "`program`: `stride` must be 1, or 2 without a skip");
  // Sums of products stay within 32 bits.
  STD_TORCH_CHECK(0 < r.in_channels && r.in_channels <= 3600 && 0 < r.out_channels &&
                      r.out_channels <= 1 << 20 && (r.kind != 0 || r.in_channels == r.out_channels) &&
                      (r.kind != 2 || r.out_channels % 2 == 0),
                  "`program`: unfit channels ", r.in_channels, " and ", r.out_channels);
  STD_TORCH_CHECK(0 <= r.in_zero && r.in_zero < 256 && 0 <= r.out_zero && r.out_zero < 256,
                  "`program`: zeros must be bytes");
  Layer l{};
  l.kind = static_cast<Kind>(r.kind);
  l.activation = static_cast<Activation>(r.activation);
  l.stride = r.stride;
  l.groups = l.inputs = l.kind == Kind::kFusion ? 2 : 1;
  l.in_channels = r.in_channels;
  l.out_channels = r.out_channels;
  l.panels = l.groups * div_up(r.out_channels / l.groups, kPanel);
  l.gate_channels = r.in_channels;  // a group of a fusion reads half of each of two inputs
  // A fusion interleaves its inputs: channel 2*c + j is channel c of input j. Group g reads from
  // g*in_channels on.
  const int64_t in_quad = 4 / bytes_of(k.element);
  for (int g = 0; g < l.groups; g++) {
    for (int j = 0; j < l.inputs; j++) {
      const int64_t c0 = div_up(g * r.in_channels - j * (l.inputs - 1), l.inputs),
                    c1 = div_up((g + 1) * r.in_channels - j * (l.inputs - 1), l.inputs),
                    first = c0 / in_quad * in_quad;
      const int64_t quads = div_up(div_up(c1 - first, in_quad), k.quad_multiple) * k.quad_multiple;
      l.segments[g][j] = {static_cast<int32_t>(first * bytes_of(k.element)), static_cast<int32_t>(quads)};
    }
  }
  // Both groups have as many, so that panels are of one size.
  for (int j = 0; j < l.inputs; j++) {
    const int32_t quads = std::max(l.segments[0][j].quads, l.segments[l.groups - 1][j].quads);
    for (int g = 0; g < l.groups; g++) l.segments[g][j].quads = quads;
    l.panel_bytes += int64_t{9} * quads * 4 * kPanel;
  }
  const int64_t lanes = int64_t{l.panels} * kPanel;
  l.weight = packed.at<int8_t>(r.weight, l.panels * l.panel_bytes);
  l.start = packed.at<int32_t>(r.start, lanes);
  l.multiplier = packed.at<float>(r.multiplier, lanes);
  l.bias = packed.at<float>(r.bias, lanes);
  if (l.kind == Kind::kSkip) {
    l.skip_scale = packed.at<float>(r.skip_scale, lanes);
    l.skip_shift = packed.at<float>(r.skip_shift, lanes);
  }
  l.out_scale = packed.at<float>(r.out_scale, lanes);
  l.out_shift = packed.at<float>(r.out_shift, lanes);
  const int64_t gate_weights = lanes * l.gate_channels;
  l.gate_weight = k.element == Element::kByte
                      ? static_cast<const void*>(packed.at<int8_t>(r.gate_weight, gate_weights))
                      : packed.at<uint16_t>(r.gate_weight, gate_weights);
  l.gate_multiplier = packed.at<float>(r.gate_multiplier, lanes);
  l.gate_bias = packed.at<float>(r.gate_bias, lanes);
  l.in_scale = *packed.at<float>(r.in_scale, 1);
  l.in_zero = r.in_zero;
  l.out_zero = r.out_zero;
  l.last = r.last != 0;
  return {l, r.input, r.other, r.output};
}

Network network_of(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& packed, const Tensor& program,
                   int64_t index) {
  const Kernels& k = kernels(index);
  constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);
  STD_TORCH_CHECK(program.is_cpu() && program.scalar_type() == ScalarType::Long && program.is_contiguous() &&
                      program.dim() == 2 && program.size(0) > 0 && program.size(1) == kColumns,
                  "`program` must be a contiguous int64 CPU tensor [layers, ", kColumns, "]");
  STD_TORCH_CHECK(n > 0 && c > 0 && h > 0 && w > 0 && h <= kMaxPixels / w, "`x` must have images and 1 to ",
                  kMaxPixels, " pixels, got [", n, ", ", c, ", ", h, ", ", w, "]");
  const Packed bytes(packed);
  std::vector<Step> steps;
  const auto* row = static_cast<const Row*>(program.const_data_ptr());
  for (int64_t i = 0; i < program.size(0); i++) steps.push_back(step_of(row[i], bytes, k));
  return Network(std::move(steps), {n, c, h, w}, torch::stable::get_num_threads(), k);
}

int64_t workspace_bytes(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& packed,
                        const Tensor& program, int64_t index) {
  return network_of(n, c, h, w, packed, program, index).workspace_bytes();
}

Tensor run(const Tensor& x, const Tensor& packed, const Tensor& program, int64_t index,
           const Tensor& workspace) {
  const bool bytes = kernels(index).element == Element::kByte;
  STD_TORCH_CHECK(
      x.is_cpu() && x.dim() == 4 && x.scalar_type() == (bytes ? ScalarType::Float : ScalarType::BFloat16),
      "`x` must be a ", bytes ? "float32" : "bfloat16", " CPU tensor [N, C, H, W]");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  for (int i = 0; i < 4; i++) {
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == strides[i], "`x` must be channels_last without gaps");
  }
  const Network network = network_of(n, c, h, w, packed, program, index);
  STD_TORCH_CHECK(workspace.is_cpu() && workspace.scalar_type() == ScalarType::Byte &&
                      workspace.is_contiguous() && workspace.numel() >= network.workspace_bytes(),
                  "`workspace` must be a contiguous uint8 CPU tensor of at least ", network.workspace_bytes(),
                  " bytes");
  const auto shape = network.result_shape();
  Tensor result = torch::stable::empty({shape[0], shape[1], shape[2], shape[3]}, ScalarType::Float,
                                       std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  network.run(x.const_data_ptr(), static_cast<float*>(result.mutable_data_ptr()),
              static_cast<char*>(workspace.mutable_data_ptr()),
              [](int threads, Network::Body body, void* context) {
                torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
              });
  return result;
}

// The numbers of the best kernels of bytes and of bfloat16 (-1: none is worth it), then for each 1 if this
// processor can run them, and their multiple of quads.
std::vector<int64_t> info() {
  std::vector<int64_t> result = {best(Element::kByte), best(Element::kBfloat16)};
  for (int64_t i = 0; i < count(); i++) {
    result.push_back(supported(i));
    result.push_back(supported(i) ? kernels(i).quad_multiple : 0);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CPU, m) { m.impl("_cpu_direct_network", TORCH_BOX(&run)); }

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cpu_direct_workspace", TORCH_BOX(&workspace_bytes));
  m.impl("_cpu_direct_info", TORCH_BOX(&info));
}
