// The package's launcher with a runtime that writes down what it is asked, for tests without a GPU.
#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "../../csrc/cuda/launch.cu"

namespace {

struct Runtime {
  int device = 0, image = 80;  // the kernels', which is what a device chose
  cudaError_t fail_with = cudaSuccess, pending = cudaSuccess;
  std::string log;
} runtime;

// Kernels are told apart by address: the last of an arithmetic is Hopper's level.
char kernels[parnet::cuda::kMaths][parnet::cuda::kKinds];

parnet::cuda::KernelTable table(int math) {
  char* k = kernels[math];
  return {k, k + 1, k + 2, k + 3};
}

std::string name_of_address(const void* kernel) {
  const auto at = static_cast<const char*>(kernel) - kernels[0];
  return std::to_string(at / parnet::cuda::kKinds) + "." + std::to_string(at % parnet::cuda::kKinds);
}

}  // namespace

namespace parnet::cuda {
KernelTable kernels_f16() { return table(0); }
KernelTable kernels_bf16() { return table(1); }
KernelTable kernels_tf32() { return table(2); }
KernelTable kernels_f32() { return table(3); }
const void* hopper_f16() { return kernels[0] + kKinds - 1; }
const void* hopper_bf16() { return kernels[1] + kKinds - 1; }
}  // namespace parnet::cuda

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = runtime.device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = 100000;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  if (runtime.image == 0) return runtime.pending = cudaErrorNoKernelImageForDevice;
  attributes->sharedSizeBytes = 2000;
  attributes->ptxVersion = runtime.image;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  runtime.log += "set " + name_of_address(kernel) + " " + std::to_string(attribute) + " " +
                 std::to_string(value) + " on " + std::to_string(runtime.device) + "\n";
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  runtime.log += "launch " + name_of_address(kernel) + " " + std::to_string(config->gridDim.x) + "x" +
                 std::to_string(config->blockDim.x) + " shared " + std::to_string(config->dynamicSmemBytes) +
                 " stream " + std::to_string(reinterpret_cast<uintptr_t>(config->stream)) + " first " +
                 std::to_string(*static_cast<const uint8_t*>(arguments[0]));
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) runtime.log += " cooperative";
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      runtime.log += " dependent";
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = config->attrs[i].val.clusterDim;
      runtime.log +=
          " clusters of " + std::to_string(dim.x) + "x" + std::to_string(dim.y) + "x" + std::to_string(dim.z);
    }
  }
  runtime.log += "\n";
  if (runtime.fail_with != cudaSuccess) runtime.pending = runtime.fail_with;
  return runtime.fail_with;
}

cudaError_t cudaGetLastError() {
  const cudaError_t last = runtime.pending;
  runtime.pending = cudaSuccess;
  return last;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "stub error"; }

// image 0: none fits the device.
void stub_set(int device, int image, int fail_with, int pending) {
  runtime.device = device;
  runtime.image = image;
  runtime.fail_with = static_cast<cudaError_t>(fail_with);
  runtime.pending = static_cast<cudaError_t>(pending);
}

const char* stub_image(int* architecture) { return parnet::cuda::image(architecture); }

int stub_pending() { return runtime.pending; }

const char* stub_launch(int kernel, unsigned grid, unsigned shared, int flags, uintptr_t stream) {
  const uint8_t arguments[8] = {7};
  return parnet::cuda::launch({kernel, grid, shared, flags, arguments, 8, "label"},
                              reinterpret_cast<void*>(stream));
}

// What was asked since the last call.
const char* stub_log() {
  static std::string given;
  given = std::exchange(runtime.log, "");
  return given.c_str();
}
}
