#include "stages.h"

#include <algorithm>
#include <numeric>

namespace parnet::cpu {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kAll = -1;  // images

// Adds stage by stage, and knows of each map which stages complete it and which read it.
class Builder {
 public:
  Builder(const Request& request, const Graph& graph, const Memory& memory)
      : request_(request),
        graph_(graph),
        memory_(memory),
        maps_(graph.maps.size()),
        layers_(graph.layers.size()),
        region_reader_(memory.regions.size(), -1) {}

  size_t count() const { return stages_.size(); }
  std::vector<Stage> take() { return std::move(stages_); }
  const std::vector<int>& completing(int map) const { return maps_[map].completed_by; }

  int add(Task task, int index, int64_t images, int64_t items_per_image, int image, std::vector<int> after) {
    std::sort(after.begin(), after.end());
    after.erase(std::unique(after.begin(), after.end()), after.end());
    const int64_t items = items_per_image * (image == kAll ? images : 1);
    const int64_t ticket = stages_.empty() ? 0 : stages_.back().first_ticket + stages_.back().items;
    stages_.push_back({task, index, items, items_per_image, std::max(image, 0) * items_per_image, ticket,
                       std::move(after)});
    return stages_.size() - 1;
  }

  void enter_inputs(int image, const std::vector<int>& after) {
    for (size_t i = 0; i < request_.inputs.size(); i++) {
      const MapMemory& m = memory_.maps[i];
      const Task task = m.planes ? Task::kEnterPlanes : Task::kEnter;
      maps_[i].completed_by.push_back(add(task, i, graph_.maps[i].shape[0], m.entered_rows, image, after));
    }
  }

  void gate(size_t layer, int image) {
    const int64_t images = graph_.maps[graph_.layers[layer].input].shape[0];
    layers_[layer].gate = add(Task::kGate, layer, images, graph_.divisions[layer].gate_items, image,
                              inputs_completed_by(layer, image));
  }

  // Nothing, where each item transforms its inputs itself.
  void transform(size_t layer) {
    const Division& d = graph_.divisions[layer];
    if (!d.transform_items) return;
    auto after = inputs_completed_by(layer, kAll);
    const int reader = region_reader_[memory_.layers[layer].region];
    if (reader >= 0) after.push_back(reader);
    const int64_t items = d.tiles->sets.size() * d.transform_items;
    layers_[layer].transform = add(Task::kTransform, layer, 1, items, kAll, after);
    note_reader(layer, layers_[layer].transform, kAll);
  }

  void convolution(size_t layer, int image) {
    const Layer& l = graph_.layers[layer];
    const Division& d = graph_.divisions[layer];
    const int64_t images = graph_.maps[l.output].shape[0];
    std::vector<int> after = inputs_completed_by(layer, image);
    after.push_back(layers_[layer].gate);
    if (layers_[layer].transform >= 0) after.push_back(layers_[layer].transform);
    const int reused = memory_.maps[l.output].reused;
    if (reused >= 0) {
      for (const Reader& r : maps_[reused].readers) {
        if (image == kAll || r.image == image) after.push_back(r.stage);
      }
    }
    int stage;
    if (l.stem) {
      stage = add(Task::kStem, layer, images, d.row_items, image, after);
    } else {
      const int panels = request_.layers[l.step.packed].panels;
      const int64_t items = d.tiles->sets.size() * div_up(panels, d.panels_per_item);
      stage = image == kAll ? add(Task::kConvolve, layer, 1, items, kAll, after)
                            : add(Task::kConvolve, layer, images, items / images, image, after);
      if (d.transform_items) region_reader_[memory_.layers[layer].region] = stage;
    }
    maps_[l.output].completed_by.push_back(stage);
    note_reader(layer, stage, image);
  }

  int leave_result(int image) {
    const std::vector<int>& stages = completing(graph_.result);
    const auto& shape = graph_.maps[graph_.result].shape;
    return add(Task::kLeave, graph_.result, shape[0], row_items(shape[2]), image,
               image == kAll ? stages : std::vector{stages[image]});
  }

  // The maps that a part of a network leaves, with their channel sums.
  void leave_results() {
    for (size_t i = 0; i < graph_.maps.size(); i++) {
      if (graph_.maps[i].result < 0) continue;
      const auto& shape = graph_.maps[i].shape;
      add(Task::kLeave, i, shape[0], row_items(shape[2]), kAll, completing(i));
      add(Task::kMeans, i, shape[0], 1, kAll, completing(i));
    }
  }

 private:
  struct Reader {
    int stage, image;
  };
  struct MapStages {
    std::vector<int> completed_by;  // one, or one for each image
    std::vector<Reader> readers;
  };
  struct LayerStages {
    int gate = -1, transform = -1;
  };

  std::vector<int> inputs_completed_by(size_t layer, int image) const {
    const Layer& l = graph_.layers[layer];
    std::vector<int> result;
    for (const int map : {l.input, l.other}) {
      if (map < 0) continue;
      const std::vector<int>& stages = maps_[map].completed_by;
      if (image != kAll && stages.size() > 1) {
        result.push_back(stages[image]);
      } else {
        result.insert(result.end(), stages.begin(), stages.end());
      }
    }
    return result;
  }

  void note_reader(size_t layer, int stage, int image) {
    const Layer& l = graph_.layers[layer];
    maps_[l.input].readers.push_back({stage, image});
    if (l.other >= 0) maps_[l.other].readers.push_back({stage, image});
  }

  const Request& request_;
  const Graph& graph_;
  const Memory& memory_;
  std::vector<Stage> stages_;
  std::vector<MapStages> maps_;
  std::vector<LayerStages> layers_;
  std::vector<int> region_reader_;  // by region: the last stage that reads it
};

// The layers at the front, image by image, with the conversion of each image before them.
void add_by_image(Builder& builder, const Graph& graph, bool leaves) {
  std::vector<int> stages[kImagesAtOnce];  // of the last images
  const int images = graph.maps[graph.layers[0].output].shape[0];
  for (int image = 0; image < images; image++) {
    std::vector<int>& own = stages[image % kImagesAtOnce];
    const int first = builder.count();
    builder.enter_inputs(image, own);  // when the image before that had these buffers is finished
    // What is entered meanwhile fills the time in which a thread waits for the last item of the image before.
    if (leaves && image) stages[(image - 1) % kImagesAtOnce].push_back(builder.leave_result(image - 1));
    for (size_t i = 0; i < graph.by_image; i++) {
      builder.gate(i, image);
      builder.convolution(i, image);
    }
    own.resize(builder.count() - first);
    std::iota(own.begin(), own.end(), first);
  }
  if (leaves) builder.leave_result(images - 1);
}

// All images together. The gates and transforms of a layer stand before the products of the layer before it,
// if they depend neither on it nor on a long item: threads that run out of products find these instead of
// waiting.
void add_together(Builder& builder, const Graph& graph) {
  const std::vector<Layer>& layers = graph.layers;
  const auto is_undivided = [&](int map) {
    for (size_t i = 0; i < layers.size(); i++) {
      if (layers[i].output == map) return graph.divisions[i].undivided;
    }
    return false;
  };
  size_t prepared = graph.by_image;
  for (size_t i = graph.by_image; i < layers.size(); i++) {
    for (; prepared < layers.size() && prepared <= i + 1; prepared++) {
      const Layer& next = layers[prepared];
      if (prepared > i && (next.input == layers[i].output || next.other == layers[i].output)) break;
      const bool waits_long = is_undivided(next.input) || is_undivided(next.other);
      if (next.level > layers[i].level && waits_long) break;
      builder.gate(prepared, kAll);
      builder.transform(prepared);
    }
    builder.convolution(i, kAll);
  }
}

}  // namespace

std::vector<Stage> stages_of(const Request& request, const Graph& graph, const Memory& memory) {
  Builder builder(request, graph, memory);
  const bool leaves = !request.pooled && !request.direct && request.results.empty(),
             all_by_image = graph.by_image == graph.layers.size();
  if (graph.by_image) {
    add_by_image(builder, graph, leaves && all_by_image);
  } else {
    builder.enter_inputs(kAll, {});
  }
  add_together(builder, graph);
  if (leaves && !all_by_image) builder.leave_result(kAll);
  builder.leave_results();
  if (request.pooled) {
    const int64_t images = graph.maps[graph.result].shape[0];
    const int means =
        builder.add(Task::kMeans, graph.result, images, 1, kAll, builder.completing(graph.result));
    if (request.classifier)
      builder.add(Task::kClassify, graph.result, 1, request.classifier->panels, kAll, {means});
  }
  return builder.take();
}

}  // namespace parnet::cpu
