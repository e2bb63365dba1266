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
  // For parts of a network, whose maps come from and go to other parts.
  std::vector<bool> summed = {};      // inputs whose channel sums are given; empty: none
  std::vector<int64_t> results = {};  // slots that are left with their channel sums, instead of the last map
  bool operator==(const Request&) const = default;

  bool is_summed(size_t input) const { return input < summed.size() && summed[input]; }
};

// Shape of the output of a layer.
std::array<int64_t, 4> output_shape(const Geometry&, const std::array<int64_t, 4>& in);
// Shapes of all slots, as the program leaves them. Throws std::runtime_error if it is malformed.
std::vector<std::array<int64_t, 4>> slot_shapes(const Request&);
// Shape of the last step's result, pooled or classified if the request says so. Throws as slot_shapes does.
std::array<int64_t, 4> result_shape(const Request&);

}  // namespace parnet::cpu
