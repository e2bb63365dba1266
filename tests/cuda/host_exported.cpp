// The package's binding of programs to operators, for tensors on the CPU instead of a GPU, with a launcher
// that writes down what it is given: for tests of exported packages without a GPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(5);
  return 0;
}

#include <dlfcn.h>

#define dlopen(...) nullptr  // a CUDA build of torch has the function, too, which needs a driver
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#include "../../csrc/cuda/bind.cpp"
#undef dlopen
#undef is_cuda
#undef DeviceGuard

namespace {
int image_here = 80;
std::FILE* log_file = nullptr;
}  // namespace

namespace parnet::cuda {
const char* image(int* architecture) {
  *architecture = image_here;
  return nullptr;
}

const char* launch(const Launch& l, void* stream) {
  std::fprintf(log_file, "%d %u %u %d %zu ", l.kernel, l.grid, l.shared, l.flags,
               reinterpret_cast<uintptr_t>(stream));
  for (int i = 0; i < l.argument_bytes; i++)
    std::fprintf(log_file, "%02x", static_cast<const uint8_t*>(l.arguments)[i]);
  std::fprintf(log_file, " %s\n", l.label.c_str());
  std::fflush(log_file);
  return nullptr;
}
}  // namespace parnet::cuda

// From now on launches go to the file `path`, as if kernels for `architecture` ran here.
extern "C" void stub_set(const char* path, int architecture) {
  log_file = std::fopen(path, "w");
  image_here = architecture;
}
