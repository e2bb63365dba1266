// Binds the CPU kernels to the operators of schemas.inc: tensors to plain pointers, outputs.
#include "bind.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "schedule/network.h"
#include "schedule/pack.h"

namespace {

using parnet::cpu::Dtype, parnet::cpu::Kind, parnet::cpu::Strided;
using parnet::cpu::mix, parnet::cpu::read_bits;
using torch::headeronly::MemoryFormat, torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "`x` must be float32, float16 or bfloat16");
  }
}

Strided strided(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "`x` must be a CPU tensor [N, C, H, W], got ", x.dim(),
                  " dimensions");
  Strided s{const_cast<void*>(x.const_data_ptr()), dtype_of(x), {}, {}};
  for (int i = 0; i < 4; i++) s.size[i] = x.size(i), s.stride[i] = x.stride(i);
  return s;
}

void run_parallel(int threads, parnet::cpu::NetworkPlan::Body body, void* context) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

// ---- _cpu_fingerprint: a hash of addresses, shapes, all values of vectors and 64 values spread over larger
// tensors.

uint64_t read_element(const char* from, int64_t bytes) {
  switch (bytes) {
    case 1:
      return read_bits<uint8_t>(from);
    case 2:
      return read_bits<uint16_t>(from);
    case 4:
      return read_bits<uint32_t>(from);
    default:
      return read_bits<uint64_t>(from);
  }
}

uint64_t hash_of(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  const int64_t count = x.numel(), width = x.element_size();
  const char* base = static_cast<const char*>(x.const_data_ptr());
  uint64_t hash = mix(0xcbf29ce484222325, reinterpret_cast<uintptr_t>(base));
  for (size_t d = 0; d < size.size(); d++) hash = mix(mix(hash, size[d]), stride[d]);
  const bool vector = size.size() == 1, contiguous = x.is_contiguous();
  const int64_t samples = vector ? count : std::min<int64_t>(count, 64);
  int64_t i = 0;
  if (vector && contiguous) {
    for (const int64_t each = 8 / width; i + each <= count; i += each) {
      hash = mix(hash, read_bits<uint64_t>(base + i * width));
    }
  }
  for (; i < samples; i++) {
    int64_t at = samples > 1 ? i * (count - 1) / (samples - 1) : 0, offset = 0;
    if (contiguous) {
      offset = at;
    } else {
      for (size_t d = size.size(); d-- > 0; at /= size[d]) offset += at % size[d] * stride[d];
    }
    hash = mix(hash, read_element(base + offset * width, width));
  }
  return hash;
}

int64_t fingerprint(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0;
  for (const Tensor& x : tensors) hash = mix(hash, hash_of(x));
  return static_cast<int64_t>(hash);
}

// ---- _cpu_layer, _cpu_network

struct Result {
  Tensor value;
  bool finite;  // whether the inputs were
};

const parnet::cpu::PackedHeader& header_of(const Tensor& packed, int64_t at, bool classifier) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "`packed` must be a contiguous uint8 CPU tensor");
  STD_TORCH_CHECK(at >= 0 && at < packed.numel(), "`packed` has no layer at ", at);
  const parnet::cpu::PackedHeader& h = parnet::cpu::check_packed(
      static_cast<const char*>(packed.const_data_ptr()) + at, packed.numel() - at, parnet::cpu::kernels());
  STD_TORCH_CHECK((h.kind == Kind::kClassifier) == classifier,
                  "`packed` must be made by parnet::_cpu_pack, `classifier` by parnet::_cpu_pack_classifier");
  return h;
}

// The layers of a network, and the order they run in.
struct Network {
  std::vector<const parnet::cpu::PackedHeader*> layers;
  std::vector<parnet::cpu::Step> steps;
};

Network network_of(const Tensor& packed, const Tensor& steps) {
  STD_TORCH_CHECK(steps.is_cpu() && steps.scalar_type() == ScalarType::Long && steps.is_contiguous() &&
                      steps.dim() == 2 && steps.size(1) == 4,
                  "`steps` must be a contiguous int64 CPU tensor [layers, 4]");
  Network result;
  const auto* row = static_cast<const int64_t*>(steps.const_data_ptr());
  for (int64_t i = 0; i < steps.size(0); i++, row += 4) {
    result.layers.push_back(&header_of(packed, row[0], false));
    result.steps.push_back({i, row[1], row[2], row[3]});
  }
  return result;
}

Result run(const std::vector<Tensor>& inputs, Network network, const std::optional<Tensor>& classifier,
           bool pooled, bool channels_last, std::vector<parnet::cpu::StageTime>* profile = nullptr) {
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  parnet::cpu::Request request{.layers = {},
                               .classifier = {},
                               .steps = std::move(network.steps),
                               .inputs = {},
                               .threads = static_cast<int>(torch::stable::get_num_threads()),
                               .pooled = pooled,
                               .direct = false};
  for (const auto* h : network.layers) request.layers.push_back(parnet::cpu::geometry_of(*h));
  const parnet::cpu::PackedHeader* head = classifier ? &header_of(*classifier, 0, true) : nullptr;
  if (head) request.classifier = parnet::cpu::geometry_of(*head);
  std::vector<Strided> views;
  for (const Tensor& x : inputs) {
    views.push_back(strided(x));
    const int64_t* s = views.back().size;
    STD_TORCH_CHECK(s[2] > 0 && s[3] > 0, "`x` must have pixels, got a map of ", s[2], "x", s[3]);
    request.inputs.push_back({s[0], s[1], s[2], s[3]});
  }
  const std::array<int64_t, 4> shape = parnet::cpu::result_shape(request);
  std::vector<int64_t> size(shape.begin(), shape.begin() + (pooled ? 2 : 4));
  const bool last = channels_last && !pooled;
  Tensor result =
      torch::stable::empty(size, inputs[0].scalar_type(), std::nullopt, inputs[0].device(), std::nullopt,
                           last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (shape[0] == 0) return {result, true};
  request.direct = last && views[0].dtype == Dtype::kFloat;
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  Strided out{result.mutable_data_ptr(), views[0].dtype, {shape[0], c, h, w}, {c * h * w, h * w, w, 1}};
  if (last) out.stride[1] = 1, out.stride[2] = w * c, out.stride[3] = c;
  const bool finite =
      parnet::cpu::plan_for(request, k)->run(network.layers, head, views, {}, {out}, run_parallel, profile);
  return {result, finite};
}

// An empty tensor if x or y is not finite: the caller has to compute in another way (see NetworkPlan::run).
Tensor layer(const Tensor& x, const std::optional<Tensor>& y, const Tensor& packed, bool channels_last) {
  std::vector<Tensor> inputs = {x};
  if (y) inputs.push_back(*y);
  const Network network{{&header_of(packed, 0, false)}, {{0, 0, y ? 1 : -1, y ? 2 : 1}}};
  const Result result = run(inputs, network, std::nullopt, false, channels_last);
  return result.finite ? result.value : torch::stable::new_empty(x, {0});
}

// An empty tensor, too, if what is watched has another fingerprint, or if anything is elsewhere than on the
// CPU.
Tensor layer_if_same(const Tensor& x, const std::optional<Tensor>& y, const Tensor& packed,
                     bool channels_last, const std::vector<Tensor>& watched, int64_t expected) {
  const auto here = [](const Tensor& t) { return t.is_cpu(); };
  const bool same = here(x) && (!y || here(*y)) && std::all_of(watched.begin(), watched.end(), here) &&
                    fingerprint(watched) == expected;
  return same ? layer(x, y, packed, channels_last) : torch::stable::new_empty(x, {0});
}

}  // namespace

Tensor parnet::cpu::run_network(const Tensor& x, const Tensor& packed, const Tensor& steps, bool pooled,
                                bool channels_last, const std::optional<Tensor>& classifier) {
  return run({x}, network_of(packed, steps), classifier, pooled, channels_last).value;
}

namespace {

using parnet::cpu::run_network;

Strided sums_of(const Tensor& x, int64_t images, int64_t channels) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.size(0) == images &&
                      x.size(1) == channels,
                  "channel sums must be a float32 CPU tensor [", images, ", ", channels, "]");
  return {const_cast<void*>(x.const_data_ptr()),
          Dtype::kFloat,
          {images, channels, 1, 1},
          {x.stride(0), x.stride(1), 1, 1}};
}

// A part of a network: maps in, with the channel sums that their producers left or without, and maps out with
// theirs. `ends`, at most one: channel means of the last layer's map, or logits.
void part(const std::vector<Tensor>& inputs, const std::vector<Tensor>& input_sums, const Tensor& packed,
          const Tensor& steps, const std::vector<int64_t>& results, const std::vector<Tensor>& maps,
          const std::vector<Tensor>& sums, const std::vector<Tensor>& ends,
          const std::optional<Tensor>& classifier) {
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  Network network = network_of(packed, steps);
  STD_TORCH_CHECK(!inputs.empty() && inputs.size() == input_sums.size(),
                  "each of `inputs` goes with one of `input_sums`");
  STD_TORCH_CHECK(results.size() == maps.size() && maps.size() == sums.size(),
                  "each of `results` goes with one of `maps` and one of `sums`");
  STD_TORCH_CHECK(ends.size() <= 1 && results.size() + ends.size() > 0,
                  "`results` or `ends` must name a result");
  parnet::cpu::Request request{.layers = {},
                               .classifier = {},
                               .steps = std::move(network.steps),
                               .inputs = {},
                               .threads = static_cast<int>(torch::stable::get_num_threads()),
                               .pooled = !ends.empty(),
                               .direct = false,
                               .summed = {},
                               .results = results};
  for (const auto* h : network.layers) request.layers.push_back(parnet::cpu::geometry_of(*h));
  const parnet::cpu::PackedHeader* head = classifier ? &header_of(*classifier, 0, true) : nullptr;
  if (head) request.classifier = parnet::cpu::geometry_of(*head);
  std::vector<Strided> views, given, outputs;
  for (size_t i = 0; i < inputs.size(); i++) {
    views.push_back(strided(inputs[i]));
    const int64_t* s = views.back().size;
    STD_TORCH_CHECK(s[0] == views[0].size[0] && s[1] > 0 && s[2] > 0 && s[3] > 0,
                    "`inputs` must be maps with pixels, of as many images each");
    request.inputs.push_back({s[0], s[1], s[2], s[3]});
    request.summed.push_back(input_sums[i].numel() > 0);
    given.push_back(request.summed.back() ? sums_of(input_sums[i], s[0], s[1]) : Strided{});
  }
  const auto shapes = parnet::cpu::variable_shapes(request);
  for (size_t i = 0; i < maps.size(); i++) {
    const auto& shape = shapes[results[i]];
    outputs.push_back(strided(maps[i]));
    STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), outputs.back().size), "`maps` ", i, " must be [",
                    shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "]");
    outputs.push_back(sums_of(sums[i], shape[0], shape[1]));
  }
  if (!ends.empty()) {
    const auto shape = parnet::cpu::result_shape(request);
    const Tensor& end = ends[0];
    STD_TORCH_CHECK(std::find(results.begin(), results.end(), request.steps.back().output) == results.end(),
                    "the last map goes into `ends` or is one of `results`");
    STD_TORCH_CHECK(end.is_cpu() && end.dim() == 2 && end.size(0) == shape[0] && end.size(1) == shape[1],
                    "`ends` must be a CPU tensor [", shape[0], ", ", shape[1], "]");
    outputs.push_back({end.mutable_data_ptr(),
                       dtype_of(end),
                       {shape[0], shape[1], 1, 1},
                       {end.stride(0), end.stride(1), 1, 1}});
  }
  if (views[0].size[0] == 0) return;
  parnet::cpu::plan_for(request, k)->run(network.layers, head, views, given, outputs, run_parallel);
}

// One row for each stage: Task, packed index, seconds.
Tensor profile(const Tensor& x, const Tensor& packed, const Tensor& steps, bool pooled, bool channels_last,
               const std::optional<Tensor>& classifier) {
  std::vector<parnet::cpu::StageTime> times;
  run({x}, network_of(packed, steps), classifier, pooled, channels_last, &times);
  Tensor result = torch::stable::new_empty(x, {static_cast<int64_t>(times.size()), 3}, ScalarType::Double);
  auto* row = static_cast<double*>(result.mutable_data_ptr());
  for (const parnet::cpu::StageTime& t : times) {
    *row++ = static_cast<double>(t.task), *row++ = t.packed, *row++ = t.seconds;
  }
  return result;
}

// Characters as numbers: the stable ABI loses the memory of every string.
std::vector<int64_t> info() {
  const std::string text = parnet::cpu::describe_isa();
  return {text.begin(), text.end()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CPU, m) {
  m.impl("_cpu_layer", TORCH_BOX(&layer));
  m.impl("_cpu_network", TORCH_BOX(&run_network));
  m.impl("_cpu_part", TORCH_BOX(&part));
  m.impl("_cpu_profile", TORCH_BOX(&profile));
  m.impl("_cpu_fingerprint", TORCH_BOX(&fingerprint));
}

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cpu_layer_if_same", TORCH_BOX(&layer_if_same));
  m.impl("_cpu_info", TORCH_BOX(&info));
}
