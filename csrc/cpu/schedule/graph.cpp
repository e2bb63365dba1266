#include "graph.h"

#include <algorithm>

namespace parnet::cpu {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct MapsAndLayers {
  std::vector<Map> maps;
  std::vector<Layer> layers;
};

// Gives every written variable a map of its own.
MapsAndLayers maps_and_layers(const Request& request, int lanes) {
  MapsAndLayers result;
  auto& [maps, layers] = result;
  std::vector<int> map_of, level_of;  // by variable
  const auto add_map = [&](const std::array<int64_t, 4>& shape) {
    maps.push_back({shape, static_cast<int>(div_up(shape[1], lanes)), 0, shape[0], -1});
    return static_cast<int>(maps.size()) - 1;
  };
  for (const auto& shape : request.inputs) map_of.push_back(add_map(shape)), level_of.push_back(0);
  const int64_t inputs = request.inputs.size();
  for (const Step& s : request.steps) {
    const Geometry& g = request.layers[s.packed];
    const int input = map_of[s.input], other = s.other >= 0 ? map_of[s.other] : -1;
    const int level = 1 + std::max(level_of[s.input], s.other >= 0 ? level_of[s.other] : 0);
    const int output = add_map(output_shape(g, maps[input].shape));
    if (s.output >= static_cast<int64_t>(map_of.size())) {
      map_of.resize(s.output + 1, -1);
      level_of.resize(s.output + 1, 0);
    }
    map_of[s.output] = output;
    level_of[s.output] = level;
    // A map with given sums is no image: its reader is no stem in the whole network.
    const bool image = s.input < inputs && !request.is_summed(s.input);
    const bool stem = image && g.kind == Kind::kDownsample && g.in_channels <= kStemChannels;
    layers.push_back({s, input, other, output, level, stem});
  }
  for (size_t i = 0; i < request.results.size(); i++) maps[map_of[request.results[i]]].result = i;
  // Planes serve stems only: an image that another kind of layer reads as well is entered as blocks.
  for (const Layer& reader : layers) {
    if (reader.stem) continue;
    for (Layer& layer : layers) {
      if (layer.input == reader.input || layer.input == reader.other) layer.stem = false;
    }
  }
  return result;
}

// A layer with its share of the plan, as the passes below complete it.
struct Tiled {
  Layer layer;
  std::shared_ptr<const TilePlan> tiles;  // null of a stem
  bool undivided;
};

class TilePlans {
 public:
  TilePlans(const Request& request, const Kernels& kernels) : request_(request), kernels_(kernels) {}

  // Layers of one shape share a plan.
  std::shared_ptr<const TilePlan> get(const Layer& l, const std::array<int64_t, 4>& shape, int threads) {
    const Geometry& g = request_.layers[l.step.packed];
    for (const Known& k : known_) {
      if (k.plan->threads == threads && k.geometry == g && k.shape == shape) return k.plan;
    }
    known_.push_back(
        {g, shape, std::make_shared<TilePlan>(g, kernels_, shape[0], shape[2], shape[3], threads)});
    return known_.back().plan;
  }

 private:
  struct Known {
    Geometry geometry;
    std::array<int64_t, 4> shape;
    std::shared_ptr<const TilePlan> plan;
  };
  const Request& request_;
  const Kernels& kernels_;
  std::vector<Known> known_;
};

// The tiles of each layer, and which layers are one item: as many of a level's as leave it a part to be
// shared out, each no more than a thread's part of the level, and with tiles that fit into one set. Their
// inputs are transformed and their weights read by one thread only, while others have other layers.
std::vector<Tiled> tile_layers(const Request& request, const Kernels& kernels, const MapsAndLayers& given) {
  TilePlans plans(request, kernels);
  const int threads = request.threads;
  int levels = 0;
  for (const Layer& l : given.layers) levels = std::max(levels, l.level + 1);
  std::vector<int64_t> level_products(levels), undivided_products(levels);
  std::vector<Tiled> result;
  std::vector<int64_t> products;  // of each layer, in some unit
  for (const Layer& l : given.layers) {
    const Geometry& g = request.layers[l.step.packed];
    result.push_back({l, l.stem ? nullptr : plans.get(l, given.maps[l.output].shape, threads), false});
    products.push_back(0);
    if (l.stem) continue;
    for (const TileSet& set : result.back().tiles->sets)
      products.back() += int64_t{set.table->m_rows} * g.group_blocks * g.panels;
    level_products[l.level] += products.back();
  }
  // In the order of the levels, since earlier layers of a level have the first choice.
  for (size_t i = 0; i < result.size(); i++) {
    const Layer& l = result[i].layer;
    if (l.stem || threads == 1) continue;
    int64_t& undivided = undivided_products[l.level];
    if (products[i] * threads > level_products[l.level]) continue;
    if ((undivided + products[i]) * 4 > level_products[l.level] * kUndividedQuarters) continue;
    const auto tiles = plans.get(l, given.maps[l.output].shape, 1);
    if (tiles->sets.size() > 1) continue;
    result[i].tiles = tiles;
    result[i].undivided = true;
    undivided += products[i];
  }
  return result;
}

// By level; undivided layers first, since what is shared out fills the gaps. Then large maps of a batch: they
// go image by image through the first layers, as far as their sets of tiles occupy all threads, so that what
// a layer leaves is still in cache when the next one reads it.
struct Order {
  std::vector<Tiled> layers;
  std::vector<bool> by_image;  // of the layers
};
Order order_of(const Request& request, const std::vector<Map>& maps, std::vector<Tiled> layers) {
  std::stable_sort(layers.begin(), layers.end(), [](const Tiled& a, const Tiled& b) {
    return a.layer.level != b.layer.level ? a.layer.level < b.layer.level : a.undivided && !b.undivided;
  });
  std::vector<bool> map_by_image(maps.size());
  for (size_t i = 0; i < request.inputs.size(); i++) map_by_image[i] = maps[i].shape[0] > 1;
  const int64_t threads = request.threads;
  const auto goes_by_image = [&](const Tiled& t) {
    const Layer& l = t.layer;
    if (!map_by_image[l.input] || (l.other >= 0 && !map_by_image[l.other])) return false;
    if (l.stem) return true;
    const int64_t images = maps[l.output].shape[0], all = t.tiles->sets.size();
    const int64_t sets = all % images ? 0 : all / images;
    return sets >= 2 * threads || (sets >= 2 && sets % threads == 0);
  };
  for (const Tiled& t : layers) map_by_image[t.layer.output] = goes_by_image(t);
  std::stable_partition(layers.begin(), layers.end(),
                        [&](const Tiled& t) { return map_by_image[t.layer.output]; });
  std::vector<bool> by_image;
  for (const Tiled& t : layers) by_image.push_back(map_by_image[t.layer.output]);
  return {std::move(layers), std::move(by_image)};
}

// Who does what of a layer, and who transforms its inputs.
Division division_of(const Request& request, const Map& output, const Tiled& tiled, bool by_image) {
  const Layer& l = tiled.layer;
  const Geometry& g = request.layers[l.step.packed];
  const int threads = request.threads;
  const int64_t images = output.shape[0];
  Division d{.tiles = tiled.tiles,
             .undivided = tiled.undivided,
             .by_image = by_image,
             .panels_per_item = 0,
             .transform_items = 0,
             .gate_items = static_cast<int>(
                 std::clamp<int64_t>(by_image ? threads : div_up(threads, images), 1, g.panels)),
             .row_items = l.stem ? row_items(output.shape[2]) : 0};
  if (l.stem) return d;
  const int64_t sets = d.tiles->sets.size(), blocks = int64_t{g.groups} * g.group_blocks;
  // With enough sets of tiles for all threads, an item is a set. Else it is some panels of a set.
  const bool whole = d.undivided || sets % threads == 0 || sets >= 2 * threads;
  const bool fine = g.groups == 1 && sets * g.panels < kFewItems * threads;
  d.panels_per_item = whole ? g.panels : fine ? 1 : std::min(2, g.panels);
  // A thread transforms the inputs of a set itself, into memory that stays in its cache. If several threads
  // use them, they share the work; but not two threads at stride 1, where the transform is a small part of
  // the work: to repeat it costs less than to read half of the values from the other's cache.
  const bool shares =
      !whole && (threads != 2 || g.stride != 1) && sets * d.tiles->v_floats * 4 <= kSharedBytes;
  if (shares) d.transform_items = std::clamp<int64_t>(div_up(kTransformItems * threads, sets), 1, blocks);
  return d;
}

}  // namespace

int row_items(int64_t rows) { return div_up(rows, div_up(rows, kRowItems)); }

Graph graph_of(const Request& request, const Kernels& kernels) {
  result_shape(request);  // checks the steps
  const MapsAndLayers given = maps_and_layers(request, kernels.lanes);
  const Order order = order_of(request, given.maps, tile_layers(request, kernels, given));
  Graph graph{given.maps, {}, {}, 0, given.layers.back().output};
  // What only layers by image read is kept for the last images only, so that it stays in cache.
  for (Map& m : graph.maps) m.kept = std::min(m.shape[0], kImagesAtOnce);
  for (size_t i = 0; i < order.layers.size(); i++) {
    const Layer& l = order.layers[i].layer;
    graph.layers.push_back(l);
    graph.divisions.push_back(division_of(request, graph.maps[l.output], order.layers[i], order.by_image[i]));
    graph.by_image += order.by_image[i];
    for (const int map : {l.input, l.other, l.output}) {
      if (map >= 0 && !order.by_image[i]) graph.maps[map].kept = graph.maps[map].shape[0];
    }
    for (const int map : {l.input, l.other}) {
      if (map >= 0) graph.maps[map].last_use = i;
    }
  }
  for (Map& m : graph.maps) {
    if (m.result < 0) continue;
    m.kept = m.shape[0];
    m.last_use = graph.layers.size();
  }
  return graph;
}

}  // namespace parnet::cpu
