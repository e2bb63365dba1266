// What is asked of the kernels: layers, the order they run in, and the maps they read and leave.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "plan.h"

namespace parnet::cpu {

// One layer of a network. Variables hold maps; the first ones hold the user's tensors.
struct Step {
  int64_t packed;        // index of the layer's parameters
  int64_t input, other;  // variables that it reads; other: -1 if it has one input
  int64_t output;        // variable that it writes
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
  std::vector<bool> summed = {};  // inputs whose channel sums are given; empty: none
  std::vector<int64_t> results =
      {};  // variables that are left with their channel sums, instead of the last map
  bool operator==(const Request&) const = default;

  bool is_summed(size_t input) const { return input < summed.size() && summed[input]; }
};

// Shape of the output of a layer.
std::array<int64_t, 4> output_shape(const Geometry&, const std::array<int64_t, 4>& in);
// Shapes of the maps in all variables, as the steps leave them. Throws std::runtime_error if they are
// malformed.
std::vector<std::array<int64_t, 4>> variable_shapes(const Request&);
// Shape of the last step's result, pooled or classified if the request says so. Throws as variable_shapes
// does.
std::array<int64_t, 4> result_shape(const Request&);

}  // namespace parnet::cpu
