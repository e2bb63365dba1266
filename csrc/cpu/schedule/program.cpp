#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace parnet::cpu {
namespace {

[[noreturn]] void bad_program(const std::string& what) { throw std::runtime_error("program: " + what); }

}  // namespace

std::array<int64_t, 4> output_shape(const Geometry& g, const std::array<int64_t, 4>& in) {
  return {in[0], g.out_channels, (in[2] + g.stride - 1) / g.stride, (in[3] + g.stride - 1) / g.stride};
}

std::vector<std::array<int64_t, 4>> slot_shapes(const Request& r) {
  std::vector<std::array<int64_t, 4>> slots = r.inputs;
  if (r.steps.empty()) bad_program("no layers");
  for (const Step& s : r.steps) {
    const Geometry& g = r.layers[s.packed];
    const auto known = [&](int64_t slot) -> const std::array<int64_t, 4>& {
      if (slot < 0 || slot >= static_cast<int64_t>(slots.size()) || slots[slot][1] < 0)
        bad_program("a slot is read before it is written");
      if (slots[slot][1] != g.in_channels) {
        bad_program("layer " + std::to_string(s.packed) + " takes " + std::to_string(g.in_channels) +
                    " channels, got " + std::to_string(slots[slot][1]));
      }
      return slots[slot];
    };
    if ((s.other >= 0) != (g.kind == Kind::kFusion))
      bad_program("a second input goes with fusion layers only");
    if (s.other >= 0 && known(s.other) != known(s.input))
      bad_program("the inputs of a fusion differ in shape");
    const std::array<int64_t, 4> out = output_shape(g, known(s.input));
    if (s.output < static_cast<int64_t>(r.inputs.size())) bad_program("an input slot is overwritten");
    if (s.output >= static_cast<int64_t>(slots.size())) slots.resize(s.output + 1, {0, -1, 0, 0});
    slots[s.output] = out;
  }
  const auto unwritten = [&](int64_t slot) {
    const auto writes = [&](const Step& s) { return s.output == slot; };
    return std::count_if(r.steps.begin(), r.steps.end(), writes) != 1;
  };
  if (std::any_of(r.results.begin(), r.results.end(), unwritten))
    bad_program("a result must be the output of one layer");
  return slots;
}

std::array<int64_t, 4> result_shape(const Request& r) {
  std::array<int64_t, 4> last = slot_shapes(r)[r.steps.back().output];
  if (r.pooled) last[2] = last[3] = 1;
  if (r.classifier) {
    if (r.classifier->in_channels != last[1] || !r.pooled) {
      bad_program("the classifier takes " + std::to_string(r.classifier->in_channels) +
                  " channel means, got " + std::to_string(last[1]) + (r.pooled ? "" : " maps"));
    }
    last[1] = r.classifier->out_channels;
  }
  return last;
}

}  // namespace parnet::cpu
