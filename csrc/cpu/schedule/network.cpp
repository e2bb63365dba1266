#include "network.h"

#include <pthread.h>

#include <algorithm>
#include <list>
#include <numeric>

#include "pack.h"

namespace parnet::cpu {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int sum_chunks(int64_t rows) { return div_up(rows, div_up(rows, kRowItems)); }

}  // namespace

int64_t NetworkPlan::packed_of(const Stage& stage) const {
  switch (stage.work) {
    case Work::kGate:
    case Work::kTransform:
    case Work::kConvolve:
    case Work::kStem:
      return layers_[stage.index].step.packed;
    default:
      return -1;
  }
}

int NetworkPlan::add_stage(Work work, int index, int64_t images, int64_t items_per_image, int image,
                           std::vector<int> after) {
  std::sort(after.begin(), after.end());
  after.erase(std::unique(after.begin(), after.end()), after.end());
  const int64_t items = items_per_image * (image < 0 ? images : 1);
  stages_.push_back({work, index, items, items_per_image, std::max(image, 0) * items_per_image, tickets_,
                     std::move(after)});
  tickets_ += items;
  return stages_.size() - 1;
}

std::vector<int> NetworkPlan::input_stages(const Layer& l, int image) const {
  std::vector<int> result;
  for (const int value : {l.input, l.other}) {
    if (value < 0) continue;
    const std::vector<int>& stages = values_[value].stages;
    if (image >= 0 && stages.size() > 1) {
      result.push_back(stages[image]);
    } else {
      result.insert(result.end(), stages.begin(), stages.end());
    }
  }
  return result;
}

void NetworkPlan::read_inputs(const Layer& l, int stage, int image) {
  values_[l.input].readers.push_back({stage, image});
  if (l.other >= 0) values_[l.other].readers.push_back({stage, image});
}

// Values in SSA form: the inputs, then one per layer, in execution order: by dependency level.
void NetworkPlan::plan_values() {
  std::vector<int> slot_value, slot_level;
  for (const auto& shape : request_.inputs) {
    slot_value.push_back(values_.size());
    slot_level.push_back(0);
    values_.push_back({});
    values_.back().shape = shape;
  }
  for (const Step& s : request_.steps) {
    const Geometry& g = request_.layers[s.packed];
    Layer layer{};
    layer.step = s;
    layer.input = slot_value[s.input];
    layer.other = s.other >= 0 ? slot_value[s.other] : -1;
    layer.level = 1 + std::max(slot_level[s.input], s.other >= 0 ? slot_level[s.other] : 0);
    layer.output = values_.size();
    values_.push_back({});
    values_.back().shape = output_shape(g, values_[layer.input].shape);
    if (s.output >= static_cast<int64_t>(slot_value.size())) {
      slot_value.resize(s.output + 1, -1);
      slot_level.resize(s.output + 1, 0);
    }
    slot_value[s.output] = layer.output;
    slot_level[s.output] = layer.level;
    result_ = layer.output;
    // Planes serve stems only; an image that another kind of layer reads as well is entered as blocks. A map
    // with given sums is no image: its reader is no stem in the whole network.
    layer.stem = s.input < static_cast<int64_t>(request_.inputs.size()) && !request_.is_summed(s.input) &&
                 g.kind == Kind::kDownsample && g.in_channels <= kStemChannels;
    layers_.push_back(layer);
  }
  for (size_t i = 0; i < request_.results.size(); i++) values_[slot_value[request_.results[i]]].result = i;
  for (const Layer& reader : layers_) {
    if (reader.stem) continue;
    for (Layer& layer : layers_) {
      if (layer.input == reader.input || layer.input == reader.other) layer.stem = false;
    }
  }
  std::stable_sort(layers_.begin(), layers_.end(),
                   [](const Layer& a, const Layer& b) { return a.level < b.level; });
  for (Value& v : values_) v.blocks = div_up(v.shape[1], kernels_.lanes);
}

void NetworkPlan::plan_inputs() {
  for (size_t i = 0; i < request_.inputs.size(); i++) {
    Value& v = values_[i];
    const auto is_stem = [&](const Layer& l) { return l.stem && l.input == static_cast<int>(i); };
    const bool planes = std::any_of(layers_.begin(), layers_.end(), is_stem);
    v.entered_rows = sum_chunks(v.shape[2]);
    v.entered_sums = reserve(v.shape[0] * v.entered_rows * v.blocks * kernels_.lanes);
    v.sum_rows = v.entered_rows;
    v.sums = v.entered_sums;
    if (request_.is_summed(i)) {
      v.sum_rows = 1;
      v.sums = reserve(v.shape[0] * v.blocks * kernels_.lanes);
    }
    if (planes) {
      // Pixels of a row panel are read to the full width of the panel, at most at stride 2.
      const int64_t pitch = div_up(v.shape[3] + 2 + 2 * kernels_.max_rows, 16) * 16, rows = v.shape[2] + 3;
      v.view = {nullptr, v.shape[1] * rows * pitch, rows * pitch, pitch, 1};
      v.floats = v.kept * v.view.image;
      v.start = v.offset = reserve(v.floats);
    } else {
      reserve_activation(v, 0);
    }
  }
}

void NetworkPlan::enter_inputs(int image, const std::vector<int>& after) {
  for (size_t i = 0; i < request_.inputs.size(); i++) {
    Value& v = values_[i];
    const Work work = v.view.pixel == 1 ? Work::kEnterPlanes : Work::kEnter;
    v.stages.push_back(add_stage(work, i, v.shape[0], v.entered_rows, image, after));
  }
}

// The tile plan of a layer, shared between layers of one shape.
std::shared_ptr<const TilePlan> NetworkPlan::tiles_for(const Layer& l, int threads) {
  const Geometry& g = request_.layers[l.step.packed];
  const auto& shape = values_[l.output].shape;
  for (const Layer& other : layers_) {
    if (other.tiles && other.tiles->threads == threads && request_.layers[other.step.packed] == g &&
        values_[other.output].shape == shape) {
      return other.tiles;
    }
  }
  return std::make_shared<TilePlan>(g, kernels_, shape[0], shape[2], shape[3], threads);
}

// Tile plans, and which layers are one item: as many of a level's as leave it a part to be shared out,
// each no more than a thread's part of the level, and with tiles that fit into one block. Their inputs are
// transformed and their weights read by one thread only, while others have other layers.
void NetworkPlan::plan_tiles() {
  std::vector<int64_t> level_work(layers_.back().level + 1), undivided(level_work.size());
  for (Layer& l : layers_) {
    if (l.stem) continue;
    const Geometry& g = request_.layers[l.step.packed];
    l.tiles = tiles_for(l, request_.threads);
    for (const TileBlock& b : l.tiles->blocks) l.work += int64_t{b.table->m_rows} * g.group_blocks * g.panels;
    level_work[l.level] += l.work;
  }
  for (Layer& l : layers_) {
    if (l.stem || request_.threads == 1) continue;
    if (l.work * request_.threads > level_work[l.level]) continue;
    if ((undivided[l.level] + l.work) * 4 > level_work[l.level] * kUndividedQuarters) continue;
    const auto tiles = tiles_for(l, 1);
    if (tiles->blocks.size() > 1) continue;
    l.tiles = tiles;
    undivided[l.level] += l.work;
    values_[l.output].undivided = true;
  }
  // They come first: what is shared out fills the gaps.
  std::stable_sort(layers_.begin(), layers_.end(), [&](const Layer& a, const Layer& b) {
    return a.level != b.level ? a.level < b.level : is_undivided(a) && !is_undivided(b);
  });
}

// What is an item, and who transforms the inputs.
void NetworkPlan::plan_items() {
  int64_t region = 0;
  for (size_t i = 0; i < layers_.size(); i++) {
    Layer& l = layers_[i];
    const Geometry& g = request_.layers[l.step.packed];
    means_scratch_ = std::max(means_scratch_, int64_t{g.groups} * g.group_blocks * kernels_.lanes);
    l.v_region = -1;
    if (l.stem) {
      l.row_items = sum_chunks(values_[l.output].shape[2]);
      continue;
    }
    const int64_t blocks = l.tiles->blocks.size(), refs = int64_t{g.groups} * g.group_blocks;
    const int64_t shared = blocks * l.tiles->v_floats;
    const int threads = request_.threads;
    // With enough blocks for all threads, an item is a block. Else it is some panels of a block.
    const bool whole = is_undivided(l) || blocks % threads == 0 || blocks >= 2 * threads;
    const bool fine = g.groups == 1 && blocks * g.panels < kFewItems * threads;
    l.panels_per_item = whole ? g.panels : fine ? 1 : std::min(2, g.panels);
    // A thread transforms the inputs of a block itself, into memory that stays in its cache. If several
    // threads use them, they share the work, but for two threads and a small part of the work (stride 1):
    // to repeat it costs less than to read half of the values from the other's cache.
    if (whole || (threads == 2 && g.stride == 1) || shared * 4 > kSharedBytes) {
      v_scratch_ = std::max(v_scratch_, l.tiles->v_floats);
    } else {
      l.v_region = i % kRegions;
      region = std::max(region, shared);
      l.transform_items = std::clamp<int64_t>(div_up(kTransformItems * threads, blocks), 1, refs);
    }
    m_scratch_ = std::max(m_scratch_, l.tiles->m_floats);
    u_scratch_ = std::max(u_scratch_, l.tiles->u_floats);
  }
  for (int i = 0; region && i < kRegions; i++) v_regions_.push_back({reserve(region), -1});
}

// Large maps of a batch go image by image through the first layers, as far as their blocks of tiles occupy
// all threads: what a layer leaves is still in cache when the next one reads it. What only these layers read
// is kept for the last images only, so that it stays there.
void NetworkPlan::order_layers() {
  const int inputs = request_.inputs.size();
  std::vector<bool> by_image(values_.size());
  for (int i = 0; i < inputs; i++) by_image[i] = values_[i].shape[0] > 1;
  for (Value& v : values_) v.kept = std::min(v.shape[0], kImagesAtOnce);
  for (Layer& l : layers_) {
    const int64_t images = values_[l.output].shape[0];
    const int64_t blocks = l.stem || l.tiles->blocks.size() % images ? 0 : l.tiles->blocks.size() / images;
    const int64_t threads = request_.threads;
    l.by_image = by_image[l.input] && (l.other < 0 || by_image[l.other]) &&
                 (l.stem || blocks >= 2 * threads || (blocks >= 2 && blocks % threads == 0));
    by_image[l.output] = l.by_image;
    for (const int value : {l.input, l.other, l.output}) {
      if (value >= 0 && !l.by_image) values_[value].kept = images;
    }
    const int64_t panels = request_.layers[l.step.packed].panels;
    l.gate_items = std::clamp<int64_t>(l.by_image ? threads : div_up(threads, images), 1, panels);
  }
  std::stable_partition(layers_.begin(), layers_.end(), [](const Layer& l) { return l.by_image; });
  for (size_t i = 0; i < layers_.size(); i++) {
    values_[layers_[i].input].last_use = i;
    if (layers_[i].other >= 0) values_[layers_[i].other].last_use = i;
  }
  for (Value& v : values_) {
    if (v.result < 0) continue;
    v.kept = v.shape[0];
    v.last_use = layers_.size();  // it leaves after all layers
  }
}

void NetworkPlan::plan_gate(Layer& l, int image) {
  const int64_t images = values_[l.input].shape[0];
  l.gate_stage = add_stage(Work::kGate, index_of(l), images, l.gate_items, image, input_stages(l, image));
}

void NetworkPlan::plan_transform(Layer& l) {
  if (l.v_region < 0) return;
  auto after = input_stages(l, -1);
  if (v_regions_[l.v_region].last_reader >= 0) after.push_back(v_regions_[l.v_region].last_reader);
  const int64_t items = l.tiles->blocks.size() * l.transform_items;
  l.transform_stage = add_stage(Work::kTransform, index_of(l), 1, items, -1, after);
  read_inputs(l, l.transform_stage, -1);
}

void NetworkPlan::plan_main(Layer& l, int image) {
  Value& out = values_[l.output];
  std::vector<int> after = input_stages(l, image);
  after.push_back(l.gate_stage);
  if (l.transform_stage >= 0) after.push_back(l.transform_stage);
  if (l.reused >= 0) {
    for (const Use& use : values_[l.reused].readers) {
      if (image < 0 || use.image == image) after.push_back(use.stage);
    }
  }
  int stage;
  if (l.stem) {
    stage = add_stage(Work::kStem, index_of(l), out.shape[0], l.row_items, image, after);
  } else {
    const int panels = request_.layers[l.step.packed].panels;
    const int64_t items = l.tiles->blocks.size() * div_up(panels, l.panels_per_item);
    stage = add_stage(Work::kConvolve, index_of(l), image < 0 ? 1 : out.shape[0],
                      image < 0 ? items : items / out.shape[0], image, after);
    if (l.v_region >= 0) v_regions_[l.v_region].last_reader = stage;
  }
  out.stages.push_back(stage);
  read_inputs(l, stage, image);
}

int NetworkPlan::leave_result(int image) {
  const Value& out = values_[result_];
  const auto after = image < 0 ? out.stages : std::vector{out.stages[image]};
  return add_stage(Work::kLeave, result_, out.shape[0], sum_chunks(out.shape[2]), image, after);
}

void NetworkPlan::leave_results() {
  for (size_t i = 0; i < values_.size(); i++) {
    const Value& v = values_[i];
    if (v.result < 0) continue;
    add_stage(Work::kLeave, i, v.shape[0], sum_chunks(v.shape[2]), -1, v.stages);
    add_stage(Work::kMeans, i, v.shape[0], 1, -1, v.stages);
  }
}

NetworkPlan::NetworkPlan(const Request& request, const Kernels& k) : request_(request), kernels_(k) {
  result_shape(request);  // validates the program
  plan_values();
  plan_tiles();
  plan_items();
  order_layers();
  plan_inputs();
  for (Layer& l : layers_) reserve_output(l);
  const size_t by_image =
      std::count_if(layers_.begin(), layers_.end(), [](const Layer& l) { return l.by_image; });
  const int images = by_image ? values_[layers_[0].output].shape[0] : 0;
  const bool leaves = !request_.pooled && !request_.direct && request_.results.empty(),
             leaves_by_image = leaves && by_image == layers_.size();
  std::vector<int> stages[kImagesAtOnce];  // of the last images
  for (int image = 0; image < images; image++) {
    std::vector<int>& own = stages[image % kImagesAtOnce];
    const int first = stages_.size();
    enter_inputs(image, own);  // when the image before that had these buffers is finished
    // What is entered meanwhile fills the time in which a thread waits for the last item of the image before.
    if (leaves_by_image && image) stages[(image - 1) % kImagesAtOnce].push_back(leave_result(image - 1));
    for (size_t i = 0; i < by_image; i++) {
      plan_gate(layers_[i], image);
      plan_main(layers_[i], image);
    }
    own.resize(stages_.size() - first);
    std::iota(own.begin(), own.end(), first);
  }
  if (!images) enter_inputs(-1, {});
  // The gates and transforms of a layer stand before the products of the layer before it, if they depend
  // neither on it nor on a long item: threads that run out of products find these instead of waiting.
  size_t prepared = by_image;
  for (size_t i = by_image; i < layers_.size(); i++) {
    for (; prepared < layers_.size() && prepared <= i + 1; prepared++) {
      Layer& next = layers_[prepared];
      if (prepared > i && (next.input == layers_[i].output || next.other == layers_[i].output)) break;
      const auto is_late = [&](int value) { return value >= 0 && values_[value].undivided; };
      if (next.level > layers_[i].level && (is_late(next.input) || is_late(next.other))) break;
      plan_gate(next, -1);
      plan_transform(next);
    }
    plan_main(layers_[i], -1);
  }
  if (leaves) leave_result(leaves_by_image ? images - 1 : -1);
  leave_results();
  if (request_.pooled) {
    const Value& out = values_[result_];
    const int means = add_stage(Work::kMeans, result_, out.shape[0], 1, -1, out.stages);
    if (request_.classifier) {
      means_ = reserve(out.shape[0] * out.blocks * kernels_.lanes);
      add_stage(Work::kClassify, result_, 1, request_.classifier->panels, -1, {means});
    }
  }
  // Scratch of each worker; lines for conversions share the space of the expanded weights.
  for (const auto& shape : request_.inputs) {
    u_scratch_ = std::max(u_scratch_, kernels_.lanes * div_up(shape[3], 16) * 16);
  }
  for (int64_t* floats : {&v_scratch_, &m_scratch_, &u_scratch_, &means_scratch_})
    *floats = div_up(*floats, 16) * 16;
  scratch_floats_ = v_scratch_ + m_scratch_ + u_scratch_ + means_scratch_ + kScratchGap;
  scratch_ = reserve(request_.threads * scratch_floats_);
  pool_ = std::make_unique<WorkspacePool>(floats_, 2 + stages_.size());
}

namespace {

struct Cache {
  std::mutex mutex;
  std::list<std::shared_ptr<const NetworkPlan>> plans;  // most recently used first
};

// A forked child gets a cache of its own: a thread that it does not have may have held a mutex of the
// parent's, or have been changing its list. The parent's is left behind.
Cache* cache = [] {
  pthread_atfork(nullptr, nullptr, [] { cache = new Cache; });
  return new Cache;
}();

}  // namespace

std::shared_ptr<const NetworkPlan> plan_for(const Request& request, const Kernels& k) {
  auto& [mutex, plans] = *cache;
  const auto known = [&]() -> std::shared_ptr<const NetworkPlan> {
    for (auto it = plans.begin(); it != plans.end(); ++it) {
      if ((*it)->request() == request) {
        plans.splice(plans.begin(), plans, it);
        return plans.front();
      }
    }
    return nullptr;
  };
  {
    const std::lock_guard lock(mutex);
    if (auto plan = known()) return plan;
  }
  // Planned without the lock, so that a new shape in one thread does not stop the others.
  auto made = std::make_shared<NetworkPlan>(request, k);
  const std::lock_guard lock(mutex);
  if (auto plan = known()) return plan;  // of another thread that was faster
  plans.push_front(std::move(made));
  int64_t bytes = plans.front()->workspace_bytes();
  auto keep = std::next(plans.begin());
  for (int64_t kept = 1; keep != plans.end() && kept < kCachedPlans; ++keep, kept++) {
    bytes += (*keep)->workspace_bytes();
    if (bytes > kCachedBytes) break;
  }
  plans.erase(keep, plans.end());
  return plans.front();
}

}  // namespace parnet::cpu
