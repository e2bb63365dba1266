// What is asked of the kernels: layers, and the order and activations they are run on.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "plan.h"

namespace parnet::cpu {

// Slots hold activations; the first slots hold the user's tensors.
struct Step {
  int64_t packed, input, other, output;
  bool operator==(const Step&) const = default;
};

struct Request {
  std::vector<Geometry> layers;  // by packed index
  std::optional<Geometry> classifier;
  std::vector<Step> steps;  // in an order that respects dependencies; the last one gives the result
  std::vector<std::array<int64_t, 4>> inputs;  // N, C, H, W
  int threads;
  bool pooled;  // the result is [N, K, 1, 1]: channel means, or the classifier's logits
  bool direct;  // the result is stored by the last layer itself: float, channels_last
  bool operator==(const Request&) const = default;
};

// Shape of the output of a layer.
std::array<int64_t, 4> output_shape(const Geometry&, const std::array<int64_t, 4>& in);
// Shape of the result. Throws std::runtime_error if the program is malformed.
std::array<int64_t, 4> result_shape(const Request&);

}  // namespace parnet::cpu
