// Execution of a planned network; the rules are in network.h.
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "network.h"

namespace parnet::cpu {
namespace {

// Tests set PARNET_CPU_POISON=1: memory that a run must write before it reads starts as NaN.
bool poisoned() {
  static const bool on = std::getenv("PARNET_CPU_POISON") && *std::getenv("PARNET_CPU_POISON") == '1';
  return on;
}

void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

int patience(int threads) {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && CPU_COUNT(&allowed) < threads)
    return kPatienceCrowded;
#endif
  return kPatience;
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
        patience_(patience(plan.request_.threads)) {
    workspace_.reset_counters();
    if (profiled) seconds_.resize(plan.request_.threads * plan.stages_.size() * 2);
    if (poisoned()) poison();
  }

  bool finite() const { return finite_; }

  void work() {
    const int worker = workspace_.counter(0).value++;
    Scratch scratch{workspace_.at(plan_.scratch_ + worker * plan_.scratch_floats_)};
    const auto& stages = plan_.stages_;
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
      if (ticket >= plan_.tickets_) return;
      while (ticket >= stages[s].first_ticket + stages[s].items) s++;
      for (const int before : stages[s].after) wait(before);
      lap(2 * s);
      execute(stages[s], stages[s].first_item + ticket - stages[s].first_ticket, scratch);
      lap(2 * s + 1);
      workspace_.counter(2 + s).value.fetch_add(1, std::memory_order_release);
    }
  }

  std::vector<StageTime> times() const {
    const auto& stages = plan_.stages_;
    std::vector<StageTime> result;
    for (const NetworkPlan::Stage& stage : stages) {
      result.push_back({Work::kWait, plan_.packed_of(stage), 0});
      result.push_back({stage.work, plan_.packed_of(stage), 0});
    }
    for (size_t i = 0; i < seconds_.size(); i++) result[i % result.size()].seconds += seconds_[i];
    return result;
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Value = NetworkPlan::Value;
  using Layer = NetworkPlan::Layer;
  // Of one thread: transformed inputs, products, weights, means.
  struct Scratch {
    float* v;
    const Layer* layer = nullptr;  // whose transformed inputs it holds, of which block
    int64_t block = -1;
  };

  void wait(int stage) {
    const auto& done = workspace_.counter(2 + stage).value;
    for (int spins = 0; done.load(std::memory_order_acquire) < plan_.stages_[stage].items; spins++) {
      // The thread that this one waits for may need this processor.
      spins < patience_ ? pause() : static_cast<void>(sched_yield());
    }
  }

  // For the items of one image, if not all images have a buffer.
  View view_of(const Value& v, int64_t image) const {
    View view = v.view;
    if (v.offset < 0) {
      view.base = static_cast<float*>(outputs_[0].data);
    } else if (v.kept == v.shape[0]) {
      view.base = workspace_.at(v.offset);
    } else {
      view.base = workspace_.at(v.offset + image % v.kept * view.image);
      view.image = 0;
    }
    return view;
  }
  const PackedHeader& packed_of(const Layer& l) const { return *packed_[l.step.packed]; }
  float* scales(const Layer& l) const { return workspace_.at(l.gates); }
  float* offsets(const Layer& l) const {
    return scales(l) + plan_.values_[l.input].shape[0] * packed_of(l).panels * 2 * plan_.kernels_.lanes;
  }

  void execute(const NetworkPlan::Stage& stage, int64_t item, Scratch& scratch) {
    float* m = scratch.v + plan_.v_scratch_;
    float* u = m + plan_.m_scratch_;
    float* means = u + plan_.u_scratch_;
    switch (stage.work) {
      case Work::kEnter:
      case Work::kEnterPlanes:
        return enter(stage, item, u);
      case Work::kGate:
        return gate(plan_.layers_[stage.index], item, means);
      case Work::kTransform:
        return transform(plan_.layers_[stage.index], item);
      case Work::kConvolve:
        return convolve(plan_.layers_[stage.index], item, scratch, m, u);
      case Work::kStem:
        return stem(plan_.layers_[stage.index], item);
      case Work::kLeave: {
        const Value& v = plan_.values_[stage.index];
        const Rows rows = rows_of(item, v.shape[2], stage.items_per_image);
        const Strided& to = outputs_[v.result < 0 ? 0 : 2 * v.result];
        return plan_.kernels_.leave(view_of(v, rows.image), to, rows.image, rows.first, rows.last);
      }
      case Work::kMeans: {
        const Value& v = plan_.values_[stage.index];
        const bool as_sums = v.result >= 0;
        Strided to = as_sums ? outputs_[2 * v.result + 1] : outputs_.back();
        if (classifier_ && !as_sums) {
          const int64_t pitch = int64_t{v.blocks} * plan_.kernels_.lanes;
          to = {workspace_.at(plan_.means_), Dtype::kFloat, {v.shape[0], v.shape[1], 1, 1}, {pitch, 1, 1, 1}};
        }
        return plan_.kernels_.leave_means(workspace_.at(v.sums), v.sum_rows, v.blocks,
                                          as_sums ? 1.f : 1.f / (v.shape[2] * v.shape[3]), to, item);
      }
      case Work::kClassify:
        return plan_.kernels_.classify(*classifier_, workspace_.at(plan_.means_), item, outputs_.back());
      case Work::kWait:
        break;
    }
  }

  struct Rows {
    int image, first, last;
  };
  // Item `item` when the rows of each image are split into `chunks`.
  static Rows rows_of(int64_t item, int64_t rows, int64_t chunks) {
    const int64_t chunk = item % chunks;
    return {static_cast<int>(item / chunks), static_cast<int>(rows * chunk / chunks),
            static_cast<int>(rows * (chunk + 1) / chunks)};
  }

  StemArgs stem_args(const Layer& l, int64_t image) const {
    const Value& out = plan_.values_[l.output];
    StemArgs a = planes_of(plan_.values_[l.input], image);
    a.packed = &packed_of(l);
    a.out = view_of(out, image);
    a.sums = workspace_.at(out.sums);
    a.scale = scales(l);
    a.offset = offsets(l);
    a.out_rows = out.shape[2];
    a.out_cols = out.shape[3];
    return a;
  }

  StemArgs planes_of(const Value& v, int64_t image) const {
    const View view = view_of(v, image);
    StemArgs a{};
    a.planes = view.base;
    a.image = view.image;
    a.channel = view.block;
    a.pitch = view.row;
    return a;
  }

  void enter(const NetworkPlan::Stage& stage, int64_t item, float* lines) {
    const Value& v = plan_.values_[stage.index];
    const Strided& x = inputs_[stage.index];
    const Rows rows = rows_of(item, v.shape[2], v.entered_rows);
    float* sums = workspace_.at(v.entered_sums) + item * v.blocks * plan_.kernels_.lanes;
    if (v.sums != v.entered_sums && rows.first == 0) take_sums(v, input_sums_[stage.index], rows.image);
    if (stage.work == Work::kEnter) {
      plan_.kernels_.enter(x, view_of(v, rows.image), rows.image, rows.first, rows.last, sums, lines);
    } else {
      plan_.kernels_.enter_planes(x, planes_of(v, rows.image), rows.image, rows.first, rows.last, sums);
    }
    // A sum is finite only if everything in it is.
    const auto is_finite = [](float sum) { return std::isfinite(sum); };
    if (!std::all_of(sums, sums + x.size[1], is_finite)) finite_ = false;
  }

  // The sums of an input as its producer left them: added up anew, in another order, they would be other
  // bits.
  void take_sums(const Value& v, const Strided& given, int64_t image) {
    const int64_t pitch = int64_t{v.blocks} * plan_.kernels_.lanes;
    float* to = workspace_.at(v.sums) + image * pitch;
    const float* from = static_cast<const float*>(given.data) + image * given.stride[0];
    for (int64_t c = 0; c < pitch; c++) to[c] = c < v.shape[1] ? from[c * given.stride[1]] : 0;
  }

  void gate(const Layer& l, int64_t item, float* means) {
    const Value& in = plan_.values_[l.input];
    const Value& other = plan_.values_[l.other >= 0 ? l.other : l.input];
    GateArgs a;
    a.packed = &packed_of(l);
    a.sums[0] = workspace_.at(in.sums);
    a.sums[1] = workspace_.at(other.sums);
    a.sum_rows[0] = in.sum_rows;
    a.sum_rows[1] = other.sum_rows;
    a.inverse_area = 1.f / (in.shape[2] * in.shape[3]);
    a.scale = scales(l);
    a.offset = offsets(l);
    a.means = means;
    const Rows panels = rows_of(item, a.packed->panels, l.gate_items);
    plan_.kernels_.gate(a, panels.image, panels.first, panels.last);
  }

  ConvArgs conv_args(const Layer& l, const TileBlock& tiles) const {
    const int64_t image = tiles.tiles[0].image;
    const Value& out = plan_.values_[l.output];
    ConvArgs a{};
    a.packed = &packed_of(l);
    a.in[0] = view_of(plan_.values_[l.input], image);
    if (l.other >= 0) a.in[1] = view_of(plan_.values_[l.other], image);
    a.out = view_of(out, image);
    a.sums = workspace_.at(out.sums);
    a.scale = scales(l);
    a.offset = offsets(l);
    a.sum_channels = l.tiles->sum_channels;
    a.chunk_blocks = l.tiles->chunk_blocks;
    return a;
  }

  float* shared_v(const Layer& l, int64_t block) const {
    return workspace_.at(plan_.v_regions_[l.v_region].start + block * l.tiles->v_floats);
  }

  void transform(const Layer& l, int64_t item) {
    const PackedHeader& h = packed_of(l);
    const Rows blocks = rows_of(item, h.groups * h.group_blocks, l.transform_items);
    const TileBlock& tiles = l.tiles->blocks[blocks.image];
    plan_.kernels_.transform(conv_args(l, tiles), tiles, blocks.first, blocks.last,
                             shared_v(l, blocks.image));
  }

  void convolve(const Layer& l, int64_t item, Scratch& scratch, float* m, float* u) {
    const int64_t panels = packed_of(l).panels, items = (panels + l.panels_per_item - 1) / l.panels_per_item;
    const int64_t block = item / items, first = item % items * l.panels_per_item;
    const int last = std::min(first + l.panels_per_item, panels);
    const TileBlock& tiles = l.tiles->blocks[block];
    const ConvArgs a = conv_args(l, tiles);
    const float* v = l.v_region >= 0 ? shared_v(l, block) : scratch.v;
    if (l.v_region < 0 && (scratch.layer != &l || scratch.block != block)) {
      scratch.layer = &l, scratch.block = block;
      plan_.kernels_.transform(a, tiles, 0, a.packed->groups * a.packed->group_blocks, scratch.v);
    }
    plan_.kernels_.convolve(a, tiles, v, first, last, m, u);
  }

  void stem(const Layer& l, int64_t item) {
    const Rows rows = rows_of(item, plan_.values_[l.output].shape[2], l.row_items);
    plan_.kernels_.stem(stem_args(l, rows.image), rows.image, rows.first, rows.last);
  }

  void poison() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const auto fill = [&](int64_t start, int64_t floats) { std::fill_n(workspace_.at(start), floats, nan); };
    fill(plan_.scratch_, plan_.request_.threads * plan_.scratch_floats_);
    for (const Layer& l : plan_.layers_) {
      const int64_t images = plan_.values_[l.input].shape[0];
      fill(l.gates, 2 * images * packed_of(l).panels * 2 * plan_.kernels_.lanes);
      if (l.v_region >= 0) {
        fill(plan_.v_regions_[l.v_region].start, l.tiles->blocks.size() * l.tiles->v_floats);
      }
    }
    for (const Value& v : plan_.values_) {
      fill(v.sums, v.shape[0] * v.sum_rows * v.blocks * plan_.kernels_.lanes);
      if (v.offset < 0 || v.view.pixel == 1) continue;
      for (int64_t i = 0; i < v.kept * v.blocks * v.shape[2]; i++) {
        const int64_t row = i % v.shape[2], block = i / v.shape[2] % v.blocks,
                      image = i / v.shape[2] / v.blocks;
        fill(v.offset + image * v.view.image + block * v.view.block + row * v.view.row,
             v.shape[3] * v.view.pixel);
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
  const int patience_;
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
