// The package's program player with a launcher that reports instead of launching, for tests without CUDA and
// torch.
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/layout.h"
#include "../../csrc/cuda/program.h"

namespace {
using Report = int (*)(int kernel, unsigned grid, unsigned shared, int flags, const void* arguments,
                       int bytes, const char* label);
}

extern "C" const char* parnet_play(const uint8_t* program, int64_t size, const parnet::cuda::Buffer* buffers,
                                   int64_t count, Report report) {
  static thread_local std::string error;
  error = parnet::cuda::play(program, size, buffers, count, [&](const parnet::cuda::Launch& l) {
    const int failed =
        report(l.kernel, l.grid, l.shared, l.flags, l.arguments, l.argument_bytes, l.label.c_str());
    return failed ? "too many resources" : nullptr;
  });
  return error.c_str();
}

extern "C" const char* parnet_layout() {
  static const std::string lines = parnet::cuda::layout();
  return lines.c_str();
}

extern "C" const char* parnet_kernel_name(int kernel) { return parnet::cuda::kKernelNames[kernel]; }
