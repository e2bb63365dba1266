// Binds the player of programs to the operators of schemas.inc: device guard, current stream, addresses. No
// CUDA header.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "layer.h"
#include "layout.h"
#include "policy.h"

namespace {

namespace cuda = parnet::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The current stream of a device as a cudaStream_t. The function is part of torch's stable ABI, but stands in
// libtorch_cuda.so: it is looked up, not linked, so that this library loads beside a CPU build of torch too.
// (`Stream::nativeHandle` needs torch 2.13.)
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(symbol);
  }();
  STD_TORCH_CHECK(get,
                  "parnet_kernels: this torch has no aoti_torch_get_current_cuda_stream (libtorch_cuda.so)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// Of a tensor on cuda:device.
cuda::Buffer buffer_of(const Tensor& t, int32_t device) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device,
                  "`buffers` must be on one CUDA device, cuda:", device);
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); d++) last += (t.size(d) - 1) * t.stride(d);
  const int64_t bytes = t.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), bytes};
}

void play_on(int32_t device, const std::vector<cuda::Buffer>& buffers, const void* program, int64_t size) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  const std::string error = cuda::play(static_cast<const uint8_t*>(program), size, buffers.data(),
                                       static_cast<int64_t>(buffers.size()),
                                       [&](const cuda::Launch& l) { return cuda::launch(l, stream); });
  STD_TORCH_CHECK(error.empty(), "parnet_kernels: ", error);
}

void play(const std::vector<Tensor>& buffers, const Tensor& program) {
  STD_TORCH_CHECK(program.is_cpu() && program.is_contiguous() && program.scalar_type() == ScalarType::Byte,
                  "`program` must be a contiguous uint8 CPU tensor");
  STD_TORCH_CHECK(!buffers.empty() && buffers[0].is_cuda(), "`buffers` must be CUDA tensors");
  const auto device = buffers[0].get_device_index();
  std::vector<cuda::Buffer> spans;
  for (const Tensor& b : buffers) spans.push_back(buffer_of(b, device));
  play_on(device, spans, program.const_data_ptr(), program.numel());
}

int64_t image(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int architecture = 0;
  const char* error = cuda::image(&architecture);
  STD_TORCH_CHECK(!error, "the CUDA library's kernels do not load on cuda:", device, ": ", error);
  return architecture;
}

std::string listed(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

Tensor exported(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& starts,
                const std::vector<int64_t>& program, int64_t workspace, const std::vector<int64_t>& size,
                const std::vector<int64_t>& result, int64_t made_for) {
  STD_TORCH_CHECK(x.is_cuda(), "parnet_kernels: the package runs on a CUDA device, with images there");
  STD_TORCH_CHECK(!program.empty() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte,
                  "`program` must hold launches, and `packed` contiguous bytes");
  constexpr ScalarType kTypes[cuda::kMaths] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float,
                                               ScalarType::Float};
  const bool same_type = x.scalar_type() == kTypes[static_cast<uint32_t>(program[0]) % cuda::kMaths];
  std::vector<int64_t> got;
  for (int64_t d = 0; d < x.dim(); d++) got.push_back(x.size(d));
  STD_TORCH_CHECK(got == size && x.is_contiguous() && same_type,
                  "parnet_kernels: the package takes contiguous images ", listed(size),
                  " of the network's dtype, got ", listed(got), x.is_contiguous() ? "" : ", not contiguous",
                  same_type ? "" : ", of another dtype");
  const int32_t device = x.get_device_index();
  const int64_t architecture = image(device);
  STD_TORCH_CHECK(architecture == made_for, "parnet_kernels: the package was made where kernels for sm_",
                  made_for, " run, here those for sm_", architecture, " do: export the network again here");
  // The workspace is zeroed for its counters. Both come from the allocator's memory for the current stream.
  const Tensor memory = torch::stable::new_zeros(x, {workspace}, ScalarType::Byte);
  const Tensor y = torch::stable::new_empty(x, result);
  std::vector<cuda::Buffer> spans = {buffer_of(memory, device), buffer_of(y, device), buffer_of(x, device)};
  const cuda::Buffer whole = buffer_of(packed, device);
  for (size_t i = 0; i < starts.size(); i++) {
    const int64_t end = i + 1 < starts.size() ? starts[i + 1] : whole.bytes;
    STD_TORCH_CHECK(0 <= starts[i] && starts[i] <= end && end <= whole.bytes,
                    "`starts` must be places in `packed`, in order");
    spans.push_back({whole.data + starts[i], end - starts[i]});
  }
  play_on(device, spans, program.data(), static_cast<int64_t>(program.size() * sizeof(int64_t)));
  return y;
}

// Every schema that the library was compiled with.
constexpr char kSchemas[] =
#define PARNET_SCHEMA(schema) schema "\n"
#include "../../parnet_kernels/schemas.inc"
#undef PARNET_SCHEMA
    ;

// Characters as numbers: the stable ABI loses the memory of every string.
std::vector<int64_t> info() {
  const std::string text = std::string(PARNET_CUDA_ARCHS) + '\n' + kSchemas + cuda::layout();
  return {text.begin(), text.end()};
}

// The order of parnet_kernels.cuda.plan.Policy.
std::vector<int64_t> policy(int64_t architecture) {
  std::vector<int64_t> values = {cuda::stages(static_cast<int>(architecture)),
                                 cuda::kThreads,
                                 cuda::kCellBytes,
                                 cuda::weight_stage_bytes(),
                                 cuda::kStaticSharedBytes,
                                 cuda::kColumns,
                                 cuda::kMaxLayers,
                                 cuda::kMaxBatch,
                                 cuda::kStemRows,
                                 cuda::kStemCols,
                                 cuda::kEnterPixels};
  for (const cuda::TileShape& t : cuda::kTiles)
    values.insert(values.end(),
                  {t.rows, t.max_cells, t.stride, cuda::cell_bytes(t), cuda::exchange_bytes(t), t.warpgroup});
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cuda_play", TORCH_BOX(&play));
  m.impl("_cuda_exported", TORCH_BOX(&exported));
  m.impl("_cuda_info", TORCH_BOX(&info));
  m.impl("_cuda_image", TORCH_BOX(&image));
  m.impl("_cuda_policy", TORCH_BOX(&policy));
}
