// Where the values of a network lie in the workspace, and which of them share a buffer.
#include <algorithm>

#include "network.h"

namespace parnet::cpu {

namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t NetworkPlan::reserve(int64_t floats) {
  const int64_t at = floats_;
  floats_ += div_up(floats, 16) * 16;
  return at;
}

// A buffer with a halo of zeros: one row and column before the map, one after it, two where tiles overhang
// odd sizes. Takes the buffer of a dead value of the same shape and returns that value, or -1; not if it
// would have to wait for a long item of its own level.
int NetworkPlan::reserve_activation(Value& v, int level) {
  int reused = -1;
  const int64_t rows = v.shape[2] + 2 + v.shape[2] % 2, cols = v.shape[3] + 2 + v.shape[3] % 2;
  const int lanes = kernels_.lanes;
  v.view = {nullptr, v.blocks * rows * cols * lanes, rows * cols * lanes, cols * lanes, lanes};
  for (size_t i = idle_values_.size(); i-- > 0;) {  // the last one is most likely still in cache
    Value& dead = values_[idle_values_[i]];
    const Layer& reader = layers_[dead.last_use];
    if (dead.shape == v.shape && dead.kept == v.kept && (reader.level < level || !is_undivided(reader))) {
      v.start = dead.start;
      reused = idle_values_[i];
      idle_values_.erase(idle_values_.begin() + i);
      break;
    }
  }
  v.floats = v.kept * v.view.image;
  // Conversions read whole vectors of pixels, up to `lanes` pixels beyond the last row.
  if (v.start < 0) v.start = reserve(v.floats + lanes * lanes);
  v.offset = v.start + v.view.row + lanes;
  return reused;
}

void NetworkPlan::reserve_output(Layer& l) {
  const Geometry& g = request_.layers[l.step.packed];
  Value& out = values_[l.output];
  l.gates = reserve(2 * out.shape[0] * g.panels * 2 * kernels_.lanes);
  out.sum_rows = l.stem ? out.shape[2] : l.tiles->tiles_per_image;
  out.sums = reserve(out.shape[0] * out.sum_rows * out.blocks * kernels_.lanes);
  if (l.output == result_ && request_.direct) {
    const int64_t channels = out.shape[1], row = out.shape[3] * channels;
    out.view = {nullptr, out.shape[2] * row, kernels_.lanes, row, channels};
  } else {
    l.reused = reserve_activation(out, l.level);
  }
  release_inputs(l);
}

// After the last layer that reads a value, its buffer serves later values of the same shape.
void NetworkPlan::release_inputs(const Layer& l) {
  const auto release = [&](int value) {
    const Value& v = values_[value];
    if (v.last_use == static_cast<size_t>(index_of(l)) && v.start >= 0 && v.view.pixel != 1) {
      idle_values_.push_back(value);
    }
  };
  release(l.input);
  if (l.other >= 0 && l.other != l.input) release(l.other);
}

}  // namespace parnet::cpu
