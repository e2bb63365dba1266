// Binds the training kernels: see schemas.inc and parnet_kernels/cpu/training.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind.h"
#include "dispatch.h"
#include "schedule/training.h"

namespace {

using parnet::cpu::Dtype, parnet::cpu::JoinArgs, parnet::cpu::PassArgs, parnet::cpu::PixelMap;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const parnet::cpu::Parallel kParallel = parnet::cpu::parallel_items;

parnet::cpu::Threads threads() { return {static_cast<int>(torch::stable::get_num_threads()), kParallel}; }

PixelMap pixels(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "`", name, "` must be a CPU tensor [N, C, H, W]");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "`",
                  name, "` must be float32, float16 or bfloat16");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(c > 0 && h > 0 && w > 0, "`", name, "` must have channels and pixels");
  const int64_t pixel = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : c;
  STD_TORCH_CHECK((c == 1 || x.stride(1) == 1) && pixel >= c && (h == 1 || x.stride(2) == w * pixel) &&
                      (n <= 1 || x.stride(0) == h * w * pixel),
                  "`", name, "` must be channels_last");
  const Dtype dtype = type == ScalarType::Float  ? Dtype::kFloat
                      : type == ScalarType::Half ? Dtype::kFloat16
                                                 : Dtype::kBFloat16;
  return {const_cast<void*>(x.const_data_ptr()),
          dtype,
          static_cast<int32_t>(n),
          static_cast<int32_t>(h),
          static_cast<int32_t>(w),
          static_cast<int32_t>(c),
          pixel};
}

const float* floats(const Tensor& x, const char* name, int64_t count) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, "`",
      name, "` must be contiguous float32 on the CPU with ", count, " values");
  return static_cast<const float*>(x.const_data_ptr());
}
float* mutable_floats(const Tensor& x, const char* name, int64_t count) {
  return const_cast<float*>(floats(x, name, count));
}

void same_shape(const PixelMap& a, const PixelMap& b) {
  STD_TORCH_CHECK(a.images == b.images && a.rows == b.rows && a.cols == b.cols && a.channels == b.channels &&
                      a.dtype == b.dtype,
                  "maps must have one shape and dtype");
}

void same_dtype(const PixelMap& a, const PixelMap& b) {
  STD_TORCH_CHECK(a.dtype == b.dtype, "maps of a 1x1 convolution must have one dtype");
}

void check_convolution(const PixelMap& in, const PixelMap& out, int64_t stride) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, "`stride` must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(in.images == out.images && out.rows == (in.rows + stride - 1) / stride &&
                      out.cols == (in.cols + stride - 1) / stride,
                  "the result must have 1/stride of the rows and columns");
}

// 9 for a 3x3 convolution, 1 for a 1x1.
int64_t taps_of(const Tensor& weight, int64_t stride) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                      (weight.size(2) == 3 || (weight.size(2) == 1 && stride == 1)),
                  "`weight` must be [K, C, 3, 3], or [K, C, 1, 1] with `stride` 1");
  return weight.size(2) * weight.size(2);
}

Tensor convolve(const Tensor& x, const Tensor& weight, int64_t stride, bool adjoint, bool add, bool moments,
                const Tensor& out) {
  const PixelMap in = pixels(x, "x"), to = pixels(out, "out");
  const bool strided_adjoint = adjoint && stride == 2;
  strided_adjoint ? check_convolution(to, in, stride) : check_convolution(in, to, stride);
  STD_TORCH_CHECK(!strided_adjoint || (add && !moments), "`adjoint` at `stride` 2 adds, without moments");
  const int64_t taps = taps_of(weight, stride);
  const float* w = floats(weight, "weight", int64_t{in.channels} * to.channels * taps);
  Tensor result = torch::stable::new_empty(weight, {moments ? 2 : 0, to.channels}, ScalarType::Float);
  float* mean = moments ? mutable_floats(result, "moments", 2 * to.channels) : nullptr;
  float* variance = mean ? mean + to.channels : nullptr;
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  if (strided_adjoint) {
    parnet::cpu::add_strided_input_gradient(in, w, to, k, threads());
  } else if (taps == 9) {
    parnet::cpu::convolve_map(in, w, stride, adjoint, add, to, mean, variance, k, threads());
  } else {
    same_dtype(in, to);
    parnet::cpu::convolve_points(in, w, adjoint, add, to, mean, variance, k, threads());
  }
  return result;
}

void weight_gradient(const Tensor& x, const Tensor& g, int64_t stride, const Tensor& out) {
  const PixelMap in = pixels(x, "x"), gradient = pixels(g, "g");
  check_convolution(in, gradient, stride);
  const int64_t taps = taps_of(out, stride);
  float* to = mutable_floats(out, "out", int64_t{in.channels} * gradient.channels * taps);
  const parnet::cpu::Kernels& k = parnet::cpu::kernels();
  if (taps == 9) return parnet::cpu::weight_gradient(in, gradient, stride, to, k, threads());
  same_dtype(in, gradient);
  parnet::cpu::point_weight_gradient(in, gradient, to, k, threads());
}

void pool(const Tensor& x, const Tensor& out) {
  const PixelMap in = pixels(x, "x"), to = pixels(out, "out");
  check_convolution(in, to, 2);
  STD_TORCH_CHECK(in.channels == to.channels && in.dtype == to.dtype,
                  "maps must have one number of channels and dtype");
  parnet::cpu::pool_map(in, to, parnet::cpu::kernels(), threads());
}

Tensor moments(const Tensor& x, bool variance) {
  const PixelMap map = pixels(x, "x");
  Tensor result =
      torch::stable::new_empty(x, {map.images + (variance ? 2 : 0), map.channels}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  float* mean = variance ? to + int64_t{map.images} * map.channels : nullptr;
  parnet::cpu::map_moments(map, to, mean, mean ? mean + map.channels : nullptr, parnet::cpu::kernels(),
                           threads());
  return result;
}

// scales: [map][image][channel].
PassArgs pass(const std::vector<Tensor>& maps, const Tensor& scales, const Tensor& shift,
              int64_t activation) {
  STD_TORCH_CHECK(maps.size() == 2 || maps.size() == 3, "`maps` must be 2 or 3");
  STD_TORCH_CHECK(0 <= activation && activation < 2, "`activation` must be 0 or 1, got ", activation);
  PassArgs a{};
  a.activation = static_cast<parnet::cpu::Activation>(activation);
  a.maps = maps.size();
  for (int i = 0; i < a.maps; i++) same_shape(a.map[i] = pixels(maps[i], "maps"), a.map[0]);
  const int64_t values = int64_t{a.map[0].images} * a.map[0].channels;
  const float* scale = floats(scales, "scales", a.maps * values);
  for (int i = 0; i < a.maps; i++) a.scale[i] = scale + i * values;
  a.shift = floats(shift, "shift", values);
  return a;
}

void combine(const std::vector<Tensor>& maps, const Tensor& scales, const Tensor& shift, int64_t activation,
             const Tensor& out) {
  PassArgs a = pass(maps, scales, shift, activation);
  a.outputs = 1;
  same_shape(a.out[0] = pixels(out, "out"), a.map[0]);
  parnet::cpu::combine_maps(a, parnet::cpu::kernels(), threads());
}

Tensor reduce(const Tensor& g, const std::vector<Tensor>& maps, const Tensor& scales, const Tensor& shift,
              const Tensor& means, int64_t activation) {
  PassArgs a = pass(maps, scales, shift, activation);
  same_shape(a.g = pixels(g, "g"), a.map[0]);
  const float* mean = floats(means, "means", int64_t{a.maps} * a.g.channels);
  for (int i = 0; i < a.maps; i++) a.mean[i] = mean + int64_t{i} * a.g.channels;
  Tensor result = torch::stable::new_empty(g, {1 + a.maps, a.g.images, a.g.channels}, ScalarType::Float);
  parnet::cpu::reduce_maps(a, static_cast<float*>(result.mutable_data_ptr()), parnet::cpu::kernels(),
                           threads());
  return result;
}

void spread(const Tensor& g, const std::vector<Tensor>& maps, const Tensor& scales, const Tensor& shift,
            const Tensor& q, const Tensor& r, int64_t activation, const std::vector<Tensor>& out) {
  PassArgs a = pass(maps, scales, shift, activation);
  same_shape(a.g = pixels(g, "g"), a.map[0]);
  STD_TORCH_CHECK(out.size() <= maps.size(), "`out` must be at most as many as `maps`");
  a.outputs = out.size();
  const int64_t channels = a.g.channels, values = a.g.images * channels;
  const float *slope = floats(q, "q", a.maps * channels), *constant = floats(r, "r", a.maps * values);
  for (int i = 0; i < a.outputs; i++) {
    same_shape(a.out[i] = pixels(out[i], "out"), a.g);
    a.q[i] = slope + i * channels;
    a.r[i] = constant + i * values;
  }
  parnet::cpu::spread_maps(a, parnet::cpu::kernels(), threads());
}

JoinArgs joined(const Tensor& both, const std::vector<Tensor>& maps) {
  STD_TORCH_CHECK(maps.size() == 2, "`maps` must be 2");
  JoinArgs a{};
  a.joined = pixels(both, "joined");
  PixelMap half = a.joined;
  half.channels /= 2;
  for (int i = 0; i < 2; i++) same_shape(a.map[i] = pixels(maps[i], "maps"), half);
  STD_TORCH_CHECK(a.joined.channels == 2 * half.channels, "maps must have half the channels of both");
  return a;
}

void vectors(const std::vector<Tensor>& from, const char* name, int64_t channels, const float** to) {
  STD_TORCH_CHECK(from.size() == 2, "`", name, "` must be 2");
  for (int i = 0; i < 2; i++) to[i] = floats(from[i], name, channels);
}

void join(const std::vector<Tensor>& maps, const std::vector<Tensor>& scales,
          const std::vector<Tensor>& shifts, const Tensor& out) {
  JoinArgs a = joined(out, maps);
  vectors(scales, "scales", a.map[0].channels, a.q);
  vectors(shifts, "shifts", a.map[0].channels, a.r);
  parnet::cpu::join_maps(a, parnet::cpu::kernels(), threads());
}

Tensor join_sums(const Tensor& d, const std::vector<Tensor>& maps, const std::vector<Tensor>& means) {
  JoinArgs a = joined(d, maps);
  const int64_t channels = a.map[0].channels;
  vectors(means, "means", channels, a.mean);
  Tensor result = torch::stable::new_empty(d, {4, a.joined.images, channels}, ScalarType::Float);
  parnet::cpu::sum_joined(a, static_cast<float*>(result.mutable_data_ptr()), parnet::cpu::kernels(),
                          threads());
  return result;
}

void separate(const Tensor& d, const std::vector<Tensor>& maps, const std::vector<Tensor>& p,
              const std::vector<Tensor>& q, const std::vector<Tensor>& r, const std::vector<Tensor>& out) {
  JoinArgs a = joined(d, maps);
  const int64_t channels = a.map[0].channels;
  vectors(p, "p", channels, a.p), vectors(q, "q", channels, a.q), vectors(r, "r", channels, a.r);
  STD_TORCH_CHECK(out.size() == 2, "`out` must be 2");
  for (int i = 0; i < 2; i++) same_shape(a.out[i] = pixels(out[i], "out"), a.map[i]);
  parnet::cpu::separate_maps(a, parnet::cpu::kernels(), threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(parnet, CPU, m) {
  m.impl("_cpu_train_convolve", TORCH_BOX(&convolve));
  m.impl("_cpu_train_weight_gradient", TORCH_BOX(&weight_gradient));
  m.impl("_cpu_train_pool", TORCH_BOX(&pool));
  m.impl("_cpu_train_moments", TORCH_BOX(&moments));
  m.impl("_cpu_train_combine", TORCH_BOX(&combine));
  m.impl("_cpu_train_reduce", TORCH_BOX(&reduce));
  m.impl("_cpu_train_spread", TORCH_BOX(&spread));
  m.impl("_cpu_train_join", TORCH_BOX(&join));
  m.impl("_cpu_train_join_sums", TORCH_BOX(&join_sums));
  m.impl("_cpu_train_separate", TORCH_BOX(&separate));
}
