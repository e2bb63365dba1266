#include "memory.h"

#include <algorithm>

namespace parnet::cpu {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_lines(int64_t floats) { return div_up(floats, 16) * 16; }

class Places {
 public:
  int64_t reserve(int64_t floats) {
    const int64_t at = floats_;
    floats_ += whole_lines(floats);
    return at;
  }
  int64_t floats() const { return floats_; }

 private:
  int64_t floats_ = 0;
};

// Buffers of maps with a border of zeros: one row and column before the map, one after it, two where tiles
// overhang odd sizes. After the last layer that reads a map, its buffer serves later maps of the same shape.
class Buffers {
 public:
  Buffers(const Graph& graph, int lanes, Places& places)
      : graph_(graph), lanes_(lanes), places_(places), start_(graph.maps.size(), -1) {}

  // A buffer for a map that a layer of `level` writes. It is not one that it would have to wait for because
  // a long item of its own level still reads it.
  MapMemory buffer(int map, int level) {
    const Map& m = graph_.maps[map];
    MapMemory result;
    const int64_t rows = m.shape[2] + 2 + m.shape[2] % 2, cols = m.shape[3] + 2 + m.shape[3] % 2;
    result.view = {nullptr, m.blocks * rows * cols * lanes_, rows * cols * lanes_, cols * lanes_, lanes_};
    int64_t& start = start_[map];
    for (size_t i = dead_.size(); i-- > 0;) {  // the last one is most likely still in cache
      const Map& dead = graph_.maps[dead_[i]];
      const bool is_free =
          graph_.layers[dead.last_use].level < level || !graph_.divisions[dead.last_use].undivided;
      if (dead.shape == m.shape && dead.kept == m.kept && is_free) {
        start = start_[dead_[i]];
        result.reused = dead_[i];
        dead_.erase(dead_.begin() + i);
        break;
      }
    }
    // Conversions read whole vectors of pixels, up to `lanes` pixels beyond the last row.
    if (start < 0) start = places_.reserve(m.kept * result.view.image + lanes_ * lanes_);
    result.pixels = start + result.view.row + lanes_;
    return result;
  }

  // Called when layer `index` has its output.
  void release_inputs(size_t index) {
    const Layer& l = graph_.layers[index];
    const auto release = [&](int map) {
      if (graph_.maps[map].last_use == index && start_[map] >= 0) dead_.push_back(map);
    };
    release(l.input);
    if (l.other >= 0 && l.other != l.input) release(l.other);
  }

 private:
  const Graph& graph_;
  const int64_t lanes_;
  Places& places_;
  std::vector<int64_t> start_;  // by map; -1: none here
  std::vector<int> dead_;       // maps whose buffers may be reused
};

// An image in planes for a stem: one zero row above, one zero column left, zeros right and below. Strips of
// pixels are read to their full width, at most at stride 2.
MapMemory planes(const Map& m, const Kernels& k, Places& places) {
  const int64_t pitch = whole_lines(m.shape[3] + 2 + 2 * k.max_rows), rows = m.shape[2] + 3;
  MapMemory result;
  result.view = {nullptr, m.shape[1] * rows * pitch, rows * pitch, pitch, 1};
  result.pixels = places.reserve(m.kept * result.view.image);
  result.planes = true;
  return result;
}

// The user's own tensor, channels_last, without a border.
View result_view(const Map& m, int lanes) {
  const int64_t channels = m.shape[1], row = m.shape[3] * channels;
  return {nullptr, m.shape[2] * row, lanes, row, channels};
}

}  // namespace

Memory memory_of(const Request& request, const Graph& graph, const Kernels& k) {
  Places places;
  Memory memory;
  int64_t region = 0, v = 0, m = 0, u = 0, means = 0;
  for (size_t i = 0; i < graph.layers.size(); i++) {
    const Geometry& g = request.layers[graph.layers[i].step.packed];
    const Division& d = graph.divisions[i];
    means = std::max(means, int64_t{g.groups} * g.group_blocks * k.lanes);
    memory.layers.push_back({});
    if (graph.layers[i].stem) continue;
    const TilePlan& tiles = *d.tiles;
    if (d.transform_items) {
      memory.layers[i].region = i % kRegions;
      region = std::max<int64_t>(region, tiles.sets.size() * tiles.v_floats);
    } else {
      v = std::max(v, tiles.v_floats);
    }
    m = std::max(m, tiles.m_floats);
    u = std::max(u, tiles.u_floats);
  }
  for (int i = 0; region && i < kRegions; i++) memory.regions.push_back(places.reserve(region));

  Buffers buffers(graph, k.lanes, places);
  memory.maps.resize(graph.maps.size());
  for (size_t i = 0; i < request.inputs.size(); i++) {
    const Map& map = graph.maps[i];
    const bool given = request.is_summed(i);
    const int rows = row_items(map.shape[2]);
    const int64_t entered = places.reserve(map.shape[0] * rows * map.blocks * k.lanes);
    const int64_t sums = given ? places.reserve(map.shape[0] * map.blocks * k.lanes) : entered;
    const bool for_stem = std::any_of(graph.layers.begin(), graph.layers.end(), [&](const Layer& l) {
      return l.stem && l.input == static_cast<int>(i);
    });
    memory.maps[i] = for_stem ? planes(map, k, places) : buffers.buffer(i, 0);
    memory.maps[i].sums = sums;
    memory.maps[i].sum_rows = given ? 1 : rows;
    memory.maps[i].entered_sums = entered;
    memory.maps[i].entered_rows = rows;
  }
  for (size_t i = 0; i < graph.layers.size(); i++) {
    const Layer& l = graph.layers[i];
    const Map& map = graph.maps[l.output];
    const int64_t panels = request.layers[l.step.packed].panels;
    memory.layers[i].gates = places.reserve(2 * map.shape[0] * panels * 2 * k.lanes);
    const int sum_rows = l.stem ? map.shape[2] : graph.divisions[i].tiles->tiles_per_image;
    const int64_t sums = places.reserve(map.shape[0] * sum_rows * map.blocks * k.lanes);
    MapMemory& out = memory.maps[l.output];
    if (l.output == graph.result && request.direct) {
      out.view = result_view(map, k.lanes);
    } else {
      out = buffers.buffer(l.output, l.level);
    }
    out.sums = sums;
    out.sum_rows = sum_rows;
    buffers.release_inputs(i);
  }
  const Map& result = graph.maps[graph.result];
  memory.means = request.classifier ? places.reserve(result.shape[0] * result.blocks * k.lanes) : -1;
  for (const auto& shape : request.inputs) u = std::max(u, k.lanes * whole_lines(shape[3]));
  v = whole_lines(v), m = whole_lines(m), u = whole_lines(u), means = whole_lines(means);
  const int64_t each = v + m + u + means + kScratchGap;
  memory.scratch = {places.reserve(request.threads * each), each, v, v + m, v + m + u};
  memory.floats = places.floats();
  return memory;
}

}  // namespace parnet::cpu
