#include "request.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace parnet::cpu {
namespace {

[[noreturn]] void bad_steps(const std::string& what) { throw std::runtime_error("steps: " + what); }

}  // namespace

std::array<int64_t, 4> output_shape(const Geometry& g, const std::array<int64_t, 4>& in) {
  return {in[0], g.out_channels, (in[2] + g.stride - 1) / g.stride, (in[3] + g.stride - 1) / g.stride};
}

std::vector<std::array<int64_t, 4>> variable_shapes(const Request& r) {
  std::vector<std::array<int64_t, 4>> shapes = r.inputs;  // channels of −1: nothing was written
  if (r.steps.empty()) bad_steps("no layers");
  for (const Step& s : r.steps) {
    const Geometry& g = r.layers[s.packed];
    const auto known = [&](int64_t variable) -> const std::array<int64_t, 4>& {
      if (variable < 0 || variable >= static_cast<int64_t>(shapes.size()) || shapes[variable][1] < 0)
        bad_steps("a variable is read before it is written");
      if (shapes[variable][1] != g.in_channels) {
        bad_steps("layer " + std::to_string(s.packed) + " takes " + std::to_string(g.in_channels) +
                  " channels, got " + std::to_string(shapes[variable][1]));
      }
      return shapes[variable];
    };
    if ((s.other >= 0) != (g.kind == Kind::kFusion)) bad_steps("a second input goes with fusion layers only");
    if (s.other >= 0 && known(s.other) != known(s.input)) bad_steps("the inputs of a fusion differ in shape");
    const std::array<int64_t, 4> out = output_shape(g, known(s.input));
    if (s.output < static_cast<int64_t>(r.inputs.size())) bad_steps("an input is overwritten");
    if (s.output >= static_cast<int64_t>(shapes.size())) shapes.resize(s.output + 1, {0, -1, 0, 0});
    shapes[s.output] = out;
  }
  const auto unwritten = [&](int64_t variable) {
    const auto writes = [&](const Step& s) { return s.output == variable; };
    return std::count_if(r.steps.begin(), r.steps.end(), writes) != 1;
  };
  if (std::any_of(r.results.begin(), r.results.end(), unwritten))
    bad_steps("a result must be the output of one layer");
  return shapes;
}

std::array<int64_t, 4> result_shape(const Request& r) {
  std::array<int64_t, 4> last = variable_shapes(r)[r.steps.back().output];
  if (r.pooled) last[2] = last[3] = 1;
  if (r.classifier) {
    if (r.classifier->in_channels != last[1] || !r.pooled) {
      bad_steps("the classifier takes " + std::to_string(r.classifier->in_channels) + " channel means, got " +
                std::to_string(last[1]) + (r.pooled ? "" : " maps"));
    }
    last[1] = r.classifier->out_channels;
  }
  return last;
}

}  // namespace parnet::cpu
