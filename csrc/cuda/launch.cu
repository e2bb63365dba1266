#include <atomic>

#include "kernels.h"
#include "launch.h"
#include "policy.h"

namespace parnet::cuda {
namespace {

constexpr int kMaxDevices = 64;

struct Kernels {
  const void* address[kKernels];
  Kernels() {
    const KernelTable tables[kMaths] = {kernels_f16(), kernels_bf16(), kernels_tf32(), kernels_f32()};
    for (int math = 0; math < kMaths; math++) {
      // Maps have a type, not an arithmetic: tf32 and f32 share float's.
      const KernelTable& t = tables[math];
      const KernelTable& maps =
          tables[math == static_cast<int>(Math::tf32) ? static_cast<int>(Math::f32) : math];
      address[static_cast<int>(Kind::level) * kMaths + math] = t.level;
      address[static_cast<int>(Kind::stem) * kMaths + math] = t.stem;
      address[static_cast<int>(Kind::enter) * kMaths + math] = maps.enter;
      address[static_cast<int>(Kind::classifier) * kMaths + math] = maps.classifier;
      address[static_cast<int>(Kind::hopper) * kMaths + math] = nullptr;
    }
#if defined(PARNET_HOPPER)
    address[static_cast<int>(Kind::hopper) * kMaths + static_cast<int>(Math::f16)] = hopper_f16();
    address[static_cast<int>(Kind::hopper) * kMaths + static_cast<int>(Math::bf16)] = hopper_bf16();
#endif
  }
};

// What a kernel is on one device: the architecture that its image was compiled for, which may be older than
// the device's; 0 until it has been made ready.
using Device = std::atomic<int>[kKernels];

// Once for each kernel and device; two threads that race here do the same.
cudaError_t prepare(std::atomic<int>& image, int index, const void* kernel) {
  if (image.load(std::memory_order_relaxed) != 0) return cudaSuccess;
  int most = 0;
  if (const auto e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)) return e;
  cudaFuncAttributes attributes;
  if (const auto e = cudaFuncGetAttributes(&attributes, kernel)) return e;
  const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
  if (const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic))
    return e;
  // Those that need little shared memory too: a multiprocessor that has to divide its memory anew drains
  // first.
  if (const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared))
    return e;
  image.store(attributes.ptxVersion, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t start(const Launch& l, cudaStream_t stream) {
  static const Kernels kernels;
  static Device devices[kMaxDevices];
  int index = 0;
  if (const auto e = cudaGetDevice(&index)) return e;
  if (l.kernel < 0 || l.kernel >= kKernels || index >= kMaxDevices) return cudaErrorInvalidValue;
  const void* kernel = kernels.address[l.kernel];
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  auto& image = devices[index][l.kernel];
  if (const auto e = prepare(image, index, kernel)) return e;
  cudaLaunchAttribute attribute[3];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = l.shared;
  config.stream = stream;
  config.attrs = attribute;
  if (l.flags & kCooperative) {
    attribute[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attribute[config.numAttrs++].val.cooperative = 1;
  }
  // An older image does not wait for the kernel before it (`wait_for_producers`), whatever the device could
  // do.
  if ((l.flags & kDependent) && image.load(std::memory_order_relaxed) >= 90) {
    attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.flags & kPairs) {
    attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attribute[config.numAttrs++].val.clusterDim = {2, 1, 1};
  }
  void* arguments[] = {const_cast<void*>(l.arguments)};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears it; not after a success, where it would be the error of someone else's call
  return cudaGetErrorString(error);
}

}  // namespace

const char* launch(const Launch& l, void* stream) {
  return text_of(start(l, static_cast<cudaStream_t>(stream)));
}

const char* image(int* architecture) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernels_f16().level);
  *architecture = attributes.ptxVersion;
  return text_of(error);
}

}  // namespace parnet::cuda
