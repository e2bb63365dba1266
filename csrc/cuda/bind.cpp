// Binds the player of programs to the operators of schemas.inc: device guard, current stream, addresses. No
// CUDA header.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
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

void play(const std::vector<Tensor>& buffers, const Tensor& program) {
  STD_TORCH_CHECK(program.is_cpu() && program.is_contiguous() && program.scalar_type() == ScalarType::Byte,
                  "`program` must be a contiguous uint8 CPU tensor");
  STD_TORCH_CHECK(!buffers.empty() && buffers[0].is_cuda(), "`buffers` must be CUDA tensors");
  const auto device = buffers[0].get_device_index();
  std::vector<cuda::Buffer> spans;
  for (const Tensor& b : buffers) {
    STD_TORCH_CHECK(b.is_cuda() && b.get_device_index() == device,
                    "`buffers` must be on one CUDA device, cuda:", device);
    int64_t last = 0;
    for (int64_t d = 0; d < b.dim(); d++) last += (b.size(d) - 1) * b.stride(d);
    const int64_t bytes = b.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(b.element_size());
    spans.push_back({static_cast<char*>(const_cast<void*>(b.const_data_ptr())), bytes});
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  const std::string error = cuda::play(static_cast<const uint8_t*>(program.const_data_ptr()), program.numel(),
                                       spans.data(), static_cast<int64_t>(spans.size()),
                                       [&](const cuda::Launch& l) { return cuda::launch(l, stream); });
  STD_TORCH_CHECK(error.empty(), "parnet_kernels: ", error);
}

int64_t image(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int architecture = 0;
  const char* error = cuda::image(&architecture);
  STD_TORCH_CHECK(!error, "the CUDA library's kernels do not load on cuda:", device, ": ", error);
  return architecture;
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
  m.impl("_cuda_info", TORCH_BOX(&info));
  m.impl("_cuda_image", TORCH_BOX(&image));
  m.impl("_cuda_policy", TORCH_BOX(&policy));
}
