// Binds the CUDA launchers to the operators of schemas.inc: device guard, current stream, outputs. No CUDA header here.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "gate.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

parnet::cuda::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return parnet::cuda::DType::f32;
    case ScalarType::Half: return parnet::cuda::DType::f16;
    case ScalarType::BFloat16: return parnet::cuda::DType::bf16;
    default: STD_TORCH_CHECK(false, "`x` must be float32, float16 or bfloat16");
  }
}

Tensor pooled_gate(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 4, "`x` must have 4 dimensions [N, C, H, W], got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "`weight` must be [K, C = ", x.size(1), "]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "`weight` must have the dtype of `x`");
  STD_TORCH_CHECK(weight.is_contiguous(), "`weight` must be contiguous");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous(),
                    "`bias` must be [K = ", weight.size(0), "] and contiguous");
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "`bias` must have the dtype of `x`");
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t n = x.size(0), c = x.size(1), k = weight.size(0);
  Tensor gate = torch::stable::new_empty(x, {n, k});
  Tensor mean = torch::stable::new_empty(x, {n, c}, ScalarType::Float);
  const parnet::cuda::PooledGate call{
      .dtype = dtype_of(x),
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .mean = static_cast<float*>(mean.mutable_data_ptr()),
      .gate = gate.mutable_data_ptr(),
      .n = n,
      .c = c,
      .h = x.size(2),
      .w = x.size(3),
      .k = k,
      .stride_n = x.stride(0),
      .stride_c = x.stride(1),
      .stride_h = x.stride(2),
      .stride_w = x.stride(3),
  };
  const auto stream = torch::stable::accelerator::getCurrentStream(x.get_device_index());
  const char* error = parnet::cuda::pooled_gate(call, stream.nativeHandle());
  STD_TORCH_CHECK(error == nullptr, "parnet::_cuda_pooled_gate on [", n, ", ", c, ", ", x.size(2), ", ", x.size(3),
                  "] failed: ", error ? error : "");
  return gate;
}

std::string cuda_info() { return PARNET_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CUDA, m) { m.impl("_cuda_pooled_gate", TORCH_BOX(&pooled_gate)); }

STABLE_TORCH_LIBRARY_IMPL(parnet, CompositeExplicitAutograd, m) {
  m.impl("_cuda_info", TORCH_BOX(&cuda_info));
}
