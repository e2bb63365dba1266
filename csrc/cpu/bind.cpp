// Binds the CPU kernels to the operators of schemas.inc: tensors to plain pointers, outputs, torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "schedule/network.h"
#include "schedule/pack.h"

namespace {

using parnet::cpu::Dtype, parnet::cpu::Kind, parnet::cpu::Storage, parnet::cpu::Strided;
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

void parallel_items(int64_t count, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

// ---- _cpu_pack

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

Tensor zeroed_bytes(int64_t bytes) {
  Tensor result = torch::stable::empty({bytes}, ScalarType::Byte);
  char* to = static_cast<char*>(result.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 64 == 0, "the allocator must align to 64 bytes");
  parnet::cpu::advise_huge_pages(to, bytes);
  constexpr int64_t kChunk = 1 << 20;
  parallel_items((bytes + kChunk - 1) / kChunk,
                 [&](int64_t i) { std::fill_n(to + i * kChunk, std::min(kChunk, bytes - i * kChunk), 0); });
  return result;
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

// ---- _cpu_fingerprint: a hash of addresses, shapes, all values of vectors and 64 values spread over larger
// tensors.

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x100000001b3;
  return hash ^ hash >> 29;
}

template <class T>
uint64_t read_bits(const char* from) {
  T bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}
uint64_t read_element(const char* from, int64_t bytes) {
  return bytes == 8   ? read_bits<uint64_t>(from)
         : bytes == 4 ? read_bits<uint32_t>(from)
                      : read_bits<uint16_t>(from);
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

Tensor run_network(const Tensor& x, const Tensor& packed, const Tensor& steps, bool pooled,
                   bool channels_last, const std::optional<Tensor>& classifier) {
  return run({x}, network_of(packed, steps), classifier, pooled, channels_last).value;
}

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

// The constants of an exported program lie where its loader put them, neither aligned nor in huge pages. The
// kernels read copies, made at the first call and kept for the programs that ran last. `key` tells contents
// apart: addresses can come back after a program was unloaded.
struct Copies {
  std::array<int64_t, 2> key;
  Tensor packed;
  std::optional<Tensor> classifier;
};
constexpr size_t kMaxCopies = 8;
std::mutex copies_mutex;
std::vector<Copies> copies;  // the last one ran last

Tensor aligned_copy(const Tensor& from) {
  STD_TORCH_CHECK(from.is_cpu() && from.scalar_type() == ScalarType::Byte && from.is_contiguous(),
                  "`packed` and `classifier` must be contiguous uint8 CPU tensors");
  Tensor result = zeroed_bytes(from.numel());
  std::memcpy(result.mutable_data_ptr(), from.const_data_ptr(), from.numel());
  return result;
}

// Of the address and 64 of the bytes' words, since what a user loads into a program's constants has to be
// seen.
uint64_t sampled(const Tensor& bytes) {
  const char* base = static_cast<const char*>(bytes.const_data_ptr());
  const int64_t words = bytes.numel() / 8;
  uint64_t hash = mix(bytes.numel(), reinterpret_cast<uintptr_t>(base));
  for (int64_t i = 0; i < 64 && words > 0; i++) {
    hash = mix(hash, read_bits<uint64_t>(base + i * (words - 1) / 63 * 8));
  }
  return hash;
}

std::optional<Copies> kept_copies(const std::array<int64_t, 2>& key, std::optional<Copies> made) {
  const std::lock_guard<std::mutex> lock(copies_mutex);
  const auto found =
      std::find_if(copies.begin(), copies.end(), [&](const Copies& c) { return c.key == key; });
  if (found != copies.end()) {
    std::rotate(found, found + 1, copies.end());
    return copies.back();
  }
  if (made) {
    if (copies.size() == kMaxCopies) copies.erase(copies.begin());
    copies.push_back(*made);
  }
  return made;
}

Tensor exported(const Tensor& x, const Tensor& packed, const Tensor& steps,
                const std::optional<Tensor>& classifier, bool pooled, int64_t outputs, int64_t reduction,
                int64_t hash) {
  const uint64_t of_head = classifier ? sampled(*classifier) : 0;
  const std::array<int64_t, 2> key = {hash, static_cast<int64_t>(mix(sampled(packed), of_head))};
  std::optional<Copies> own = kept_copies(key, std::nullopt);
  if (!own) {
    std::optional<Tensor> head;
    if (classifier) head = aligned_copy(*classifier);
    own = kept_copies(key, Copies{key, aligned_copy(packed), head});
  }
  const Tensor result = run_network(x, own->packed, steps, pooled, false, own->classifier);
  const bool fits =
      result.size(1) == outputs && (pooled || result.size(2) == (x.size(2) - 1) / reduction + 1);
  STD_TORCH_CHECK(fits, "`outputs` and `reduction` must be those of the network, got ", outputs, " and ",
                  reduction);
  return result;
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

std::string info() { return parnet::cpu::describe_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CPU, m) {
  m.impl("_cpu_pack", TORCH_BOX(&pack_layer));
  m.impl("_cpu_pack_classifier", TORCH_BOX(&pack_classifier));
  m.impl("_cpu_layer", TORCH_BOX(&layer));
  m.impl("_cpu_network", TORCH_BOX(&run_network));
  m.impl("_cpu_exported", TORCH_BOX(&exported));
  m.impl("_cpu_part", TORCH_BOX(&part));
  m.impl("_cpu_profile", TORCH_BOX(&profile));
  m.impl("_cpu_fingerprint", TORCH_BOX(&fingerprint));
}

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cpu_layer_if_same", TORCH_BOX(&layer_if_same));
  m.impl("_cpu_storage", TORCH_BOX(&storage));
  m.impl("_cpu_bytes", TORCH_BOX(&zeroed_bytes));
  m.impl("_cpu_info", TORCH_BOX(&info));
}
