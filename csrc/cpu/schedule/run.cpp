// Execution of a planned network; the rules are in network.h.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "../waiting.h"
#include "network.h"

namespace parnet::cpu {
namespace {

// Tests set PARNET_CPU_POISON=1: memory that a run must write before it reads starts as NaN.
bool poisoned() {
  static const bool on = std::getenv("PARNET_CPU_POISON") && *std::getenv("PARNET_CPU_POISON") == '1';
  return on;
}

}  // namespace

class NetworkRun {
 public:
  NetworkRun(const NetworkPlan& plan, const std::vector<const PackedHeader*>& packed,
             const PackedHeader* classifier, const std::vector<Strided>& inputs,
             const std::vector<Strided>& input_sums, const std::vector<Strided>& outputs,
             Workspace& workspace, bool profiled)
      : plan_(plan),
        packed_(packed),
        classifier_(classifier),
        inputs_(inputs),
        input_sums_(input_sums),
        outputs_(outputs),
        workspace_(workspace),
        patience_(plan.request_.threads) {
    workspace_.reset_counters();
    if (profiled) seconds_.resize(plan.request_.threads * plan.stages_.size() * 2);
    if (poisoned()) poison();
  }

  bool finite() const { return finite_; }

  // What every thread does.
  void work() {
    const int worker = workspace_.counter(0).value++;
    Scratch scratch{workspace_.at(plan_.memory_.scratch.start + worker * plan_.memory_.scratch.floats)};
    const auto& stages = plan_.stages_;
    const int64_t tickets = stages.back().first_ticket + stages.back().items;
    double* seconds = seconds_.empty() ? nullptr : seconds_.data() + worker * stages.size() * 2;
    Clock::time_point last = Clock::now();
    const auto lap = [&](size_t i) {
      if (!seconds) return;
      const Clock::time_point now = Clock::now();
      seconds[i] += std::chrono::duration<double>(now - last).count();
      last = now;
    };
    for (size_t s = 0;;) {
      const int64_t ticket = workspace_.counter(1).value++;
      if (ticket >= tickets) return;
      while (ticket >= stages[s].first_ticket + stages[s].items) s++;
      for (const int before : stages[s].after) wait(before);
      lap(2 * s);
      execute(stages[s], stages[s].first_item + ticket - stages[s].first_ticket, scratch);
      lap(2 * s + 1);
      std::atomic<int64_t>& done = workspace_.counter(2 + s).value;
      if (done.fetch_add(1, std::memory_order_release) + 1 == stages[s].items) done.notify_all();
    }
  }

  std::vector<StageTime> times() const {
    const auto& stages = plan_.stages_;
    std::vector<StageTime> result;
    for (const Stage& stage : stages) {
      result.push_back({Task::kWait, layer_of(stage), 0});
      result.push_back({stage.task, layer_of(stage), 0});
    }
    for (size_t i = 0; i < seconds_.size(); i++) result[i % result.size()].seconds += seconds_[i];
    return result;
  }

 private:
  using Clock = std::chrono::steady_clock;
  // The scratch memory of one thread.
  struct Scratch {
    float* start;
    int layer = -1;  // whose transformed inputs it holds, and of which set of tiles
    int64_t set = -1;
  };

  // The packed index of a stage's layer, or -1.
  int64_t layer_of(const Stage& stage) const {
    switch (stage.task) {
      case Task::kGate:
      case Task::kTransform:
      case Task::kConvolve:
      case Task::kStem:
        return plan_.graph_.layers[stage.index].step.packed;
      default:
        return -1;
    }
  }

  void wait(int stage) { patience_.wait(workspace_.counter(2 + stage).value, plan_.stages_[stage].items); }

  // For the items of one image, if not all images have a buffer.
  View view_of(int map, int64_t image) const {
    const Map& m = plan_.graph_.maps[map];
    const MapMemory& memory = plan_.memory_.maps[map];
    View view = memory.view;
    if (memory.pixels < 0) {
      view.base = static_cast<float*>(outputs_[0].data);
    } else if (m.kept == m.shape[0]) {
      view.base = workspace_.at(memory.pixels);
    } else {
      view.base = workspace_.at(memory.pixels + image % m.kept * view.image);
      view.image = 0;
    }
    return view;
  }
  float* sums_of(int map) const { return workspace_.at(plan_.memory_.maps[map].sums); }
  const Layer& layer(int index) const { return plan_.graph_.layers[index]; }
  const PackedHeader& packed_of(int index) const { return *packed_[layer(index).step.packed]; }
  float* scales(int index) const { return workspace_.at(plan_.memory_.layers[index].gates); }
  float* offsets(int index) const {
    const int64_t images = plan_.graph_.maps[layer(index).input].shape[0];
    return scales(index) + images * packed_of(index).panels * 2 * plan_.kernels_.lanes;
  }

  void execute(const Stage& stage, int64_t item, Scratch& scratch) {
    const ScratchMemory& places = plan_.memory_.scratch;
    float *m = scratch.start + places.m, *u = scratch.start + places.u;
    switch (stage.task) {
      case Task::kEnter:
      case Task::kEnterPlanes:
        return enter(stage, item, u);
      case Task::kGate:
        return gate(stage.index, item, scratch.start + places.means);
      case Task::kTransform:
        return transform(stage.index, item);
      case Task::kConvolve:
        return convolve(stage.index, item, scratch, m, u);
      case Task::kStem:
        return stem(stage.index, item);
      case Task::kLeave: {
        const Map& map = plan_.graph_.maps[stage.index];
        const Part rows = part_of(item, map.shape[2], stage.items_per_image);
        const Strided& to = outputs_[map.result < 0 ? 0 : 2 * map.result];
        return plan_.kernels_.leave(view_of(stage.index, rows.of), to, rows.of, rows.first, rows.last);
      }
      case Task::kMeans:
        return means(stage.index, item);
      case Task::kClassify:
        return plan_.kernels_.classify(*classifier_, workspace_.at(plan_.memory_.means), item,
                                       outputs_.back());
      case Task::kWait:
        break;
    }
  }

  // A range of rows, panels or blocks; `of` is the image or the set of tiles that they belong to.
  struct Part {
    int of, first, last;
  };
  // Item `item`, where each image or set is divided into `parts`.
  static Part part_of(int64_t item, int64_t count, int64_t parts) {
    const int64_t part = item % parts;
    return {static_cast<int>(item / parts), static_cast<int>(count * part / parts),
            static_cast<int>(count * (part + 1) / parts)};
  }

  StemArgs stem_args(int index, int64_t image) const {
    const int out = layer(index).output;
    const Map& map = plan_.graph_.maps[out];
    StemArgs a = planes_of(layer(index).input, image);
    a.packed = &packed_of(index);
    a.out = view_of(out, image);
    a.sums = sums_of(out);
    a.scale = scales(index);
    a.offset = offsets(index);
    a.out_rows = map.shape[2];
    a.out_cols = map.shape[3];
    return a;
  }

  StemArgs planes_of(int map, int64_t image) const {
    const View view = view_of(map, image);
    StemArgs a{};
    a.planes = view.base;
    a.image = view.image;
    a.channel = view.block;
    a.pitch = view.row;
    return a;
  }

  void enter(const Stage& stage, int64_t item, float* lines) {
    const int map = stage.index;
    const Map& m = plan_.graph_.maps[map];
    const Strided& x = inputs_[map];
    const MapMemory& memory = plan_.memory_.maps[map];
    const Part rows = part_of(item, m.shape[2], memory.entered_rows);
    float* sums = workspace_.at(memory.entered_sums) + item * m.blocks * plan_.kernels_.lanes;
    if (memory.sums != memory.entered_sums && rows.first == 0) take_sums(map, rows.of);
    if (stage.task == Task::kEnter) {
      plan_.kernels_.enter(x, view_of(map, rows.of), rows.of, rows.first, rows.last, sums, lines);
    } else {
      plan_.kernels_.enter_planes(x, planes_of(map, rows.of), rows.of, rows.first, rows.last, sums);
    }
    // A sum is finite only if everything in it is.
    const auto is_finite = [](float sum) { return std::isfinite(sum); };
    if (!std::all_of(sums, sums + x.size[1], is_finite)) finite_ = false;
  }

  // The sums of an input as its producer left them: added up anew, in another order, they would be other
  // bits.
  void take_sums(int map, int64_t image) {
    const Map& m = plan_.graph_.maps[map];
    const Strided& given = input_sums_[map];
    const int64_t pitch = int64_t{m.blocks} * plan_.kernels_.lanes;
    float* to = sums_of(map) + image * pitch;
    const float* from = static_cast<const float*>(given.data) + image * given.stride[0];
    for (int64_t c = 0; c < pitch; c++) to[c] = c < m.shape[1] ? from[c * given.stride[1]] : 0;
  }

  void gate(int index, int64_t item, float* means) {
    const Layer& l = layer(index);
    const int other = l.other >= 0 ? l.other : l.input;
    const Map& in = plan_.graph_.maps[l.input];
    GateArgs a;
    a.packed = &packed_of(index);
    a.sums[0] = sums_of(l.input);
    a.sums[1] = sums_of(other);
    a.sum_rows[0] = plan_.memory_.maps[l.input].sum_rows;
    a.sum_rows[1] = plan_.memory_.maps[other].sum_rows;
    a.inverse_area = 1.f / (in.shape[2] * in.shape[3]);
    a.scale = scales(index);
    a.offset = offsets(index);
    a.means = means;
    const Part panels = part_of(item, a.packed->panels, plan_.graph_.divisions[index].gate_items);
    plan_.kernels_.gate(a, panels.of, panels.first, panels.last);
  }

  ConvArgs conv_args(int index, const TileSet& set) const {
    const int64_t image = set.tiles[0].image;
    const Layer& l = layer(index);
    const TilePlan& tiles = *plan_.graph_.divisions[index].tiles;
    ConvArgs a{};
    a.packed = &packed_of(index);
    a.in[0] = view_of(l.input, image);
    if (l.other >= 0) a.in[1] = view_of(l.other, image);
    a.out = view_of(l.output, image);
    a.sums = sums_of(l.output);
    a.scale = scales(index);
    a.offset = offsets(index);
    a.sum_channels = tiles.sum_channels;
    a.chunk_blocks = tiles.chunk_blocks;
    return a;
  }

  float* shared_v(int index, int64_t set) const {
    const int64_t region = plan_.memory_.regions[plan_.memory_.layers[index].region];
    return workspace_.at(region + set * plan_.graph_.divisions[index].tiles->v_floats);
  }

  void transform(int index, int64_t item) {
    const PackedHeader& h = packed_of(index);
    const Division& d = plan_.graph_.divisions[index];
    const Part blocks = part_of(item, h.groups * h.group_blocks, d.transform_items);
    const TileSet& set = d.tiles->sets[blocks.of];
    plan_.kernels_.transform(conv_args(index, set), set, blocks.first, blocks.last,
                             shared_v(index, blocks.of));
  }

  void convolve(int index, int64_t item, Scratch& scratch, float* m, float* u) {
    const Division& d = plan_.graph_.divisions[index];
    const int64_t panels = packed_of(index).panels,
                  items = (panels + d.panels_per_item - 1) / d.panels_per_item;
    const int64_t set = item / items, first = item % items * d.panels_per_item;
    const int last = std::min(first + d.panels_per_item, panels);
    const TileSet& tiles = d.tiles->sets[set];
    const ConvArgs a = conv_args(index, tiles);
    const bool shared = d.transform_items > 0;
    float* v = shared ? shared_v(index, set) : scratch.start;
    if (!shared && (scratch.layer != index || scratch.set != set)) {
      scratch.layer = index, scratch.set = set;
      plan_.kernels_.transform(a, tiles, 0, a.packed->groups * a.packed->group_blocks, v);
    }
    plan_.kernels_.convolve(a, tiles, v, first, last, m, u);
  }

  void stem(int index, int64_t item) {
    const int64_t rows_of_image = plan_.graph_.maps[layer(index).output].shape[2];
    const Part rows = part_of(item, rows_of_image, plan_.graph_.divisions[index].row_items);
    plan_.kernels_.stem(stem_args(index, rows.of), rows.of, rows.first, rows.last);
  }

  // Channel means of one image, to the user or to where the classifier reads them; of a part's result the
  // sums.
  void means(int map, int64_t image) {
    const Map& m = plan_.graph_.maps[map];
    const bool as_sums = m.result >= 0;
    Strided to = as_sums ? outputs_[2 * m.result + 1] : outputs_.back();
    if (classifier_ && !as_sums) {
      const int64_t pitch = int64_t{m.blocks} * plan_.kernels_.lanes;
      to = {workspace_.at(plan_.memory_.means),
            Dtype::kFloat,
            {m.shape[0], m.shape[1], 1, 1},
            {pitch, 1, 1, 1}};
    }
    plan_.kernels_.leave_means(sums_of(map), plan_.memory_.maps[map].sum_rows, m.blocks,
                               as_sums ? 1.f : 1.f / (m.shape[2] * m.shape[3]), to, image);
  }

  void poison() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const auto fill = [&](int64_t start, int64_t floats) { std::fill_n(workspace_.at(start), floats, nan); };
    const Graph& graph = plan_.graph_;
    const Memory& memory = plan_.memory_;
    const int64_t lanes = plan_.kernels_.lanes;
    fill(memory.scratch.start, plan_.request_.threads * memory.scratch.floats);
    for (size_t i = 0; i < graph.layers.size(); i++) {
      const int64_t images = graph.maps[graph.layers[i].input].shape[0];
      fill(memory.layers[i].gates, 2 * images * packed_of(i).panels * 2 * lanes);
      const Division& d = graph.divisions[i];
      if (d.transform_items)
        fill(memory.regions[memory.layers[i].region], d.tiles->sets.size() * d.tiles->v_floats);
    }
    for (size_t i = 0; i < graph.maps.size(); i++) {
      const Map& map = graph.maps[i];
      const MapMemory& at = memory.maps[i];
      fill(at.sums, map.shape[0] * at.sum_rows * map.blocks * lanes);
      if (at.pixels < 0 || at.planes) continue;
      const int64_t rows = map.shape[2];
      for (int64_t r = 0; r < map.kept * map.blocks * rows; r++) {
        const int64_t row = r % rows, block = r / rows % map.blocks, image = r / rows / map.blocks;
        fill(at.pixels + image * at.view.image + block * at.view.block + row * at.view.row,
             map.shape[3] * at.view.pixel);
      }
    }
  }

  const NetworkPlan& plan_;
  const std::vector<const PackedHeader*>& packed_;
  const PackedHeader* classifier_;
  const std::vector<Strided>& inputs_;
  const std::vector<Strided>& input_sums_;
  const std::vector<Strided>& outputs_;
  Workspace& workspace_;
  Patience patience_;
  std::atomic<bool> finite_{true};
  std::vector<double> seconds_;  // of a profiled run: [worker][stage][waiting, working]
};

bool NetworkPlan::run(const std::vector<const PackedHeader*>& packed, const PackedHeader* classifier,
                      const std::vector<Strided>& inputs, const std::vector<Strided>& input_sums,
                      const std::vector<Strided>& outputs, RunParallel parallel,
                      std::vector<StageTime>* profile) const {
  std::unique_ptr<Workspace> workspace = pool_->take();
  NetworkRun run(*this, packed, classifier, inputs, input_sums, outputs, *workspace, profile != nullptr);
  parallel(request_.threads, [](void* context) { static_cast<NetworkRun*>(context)->work(); }, &run);
  pool_->put(std::move(workspace));
  if (profile) *profile = run.times();
  return run.finite();
}

}  // namespace parnet::cpu
