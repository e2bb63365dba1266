// A request as a graph of maps and layers, and how threads share the work of each layer.
#pragma once
#include <memory>

#include "request.h"

namespace parnet::cpu {

// What an input or a layer leaves; every map is written once.
struct Map {
  std::array<int64_t, 4> shape;
  int blocks;       // of channels
  size_t last_use;  // place of the last layer that reads it, in the order of the layers; their number if it
                    // leaves after all of them
  int64_t kept;     // images that have a buffer at the same time; image i has that of i % kept
  int result = -1;  // which of the request's results it is
};

struct Layer {
  Step step;
  int input, other, output;  // maps; other: -1 if there is one input
  int level;                 // longest way from an input
  bool stem;                 // reads the user's image as planes
};

// How threads share a layer. An item is what one thread does without interruption.
struct Division {
  std::shared_ptr<const TilePlan> tiles;  // null of a stem
  bool undivided;                         // the layer is one item
  bool by_image;                          // there is a stage for each image
  int panels_per_item;                    // of output channels
  int transform_items;  // for each set of tiles; 0: each item transforms the inputs it needs for itself
  int gate_items;       // for each image
  int row_items;        // of a stem, for each image
};

struct Graph {
  std::vector<Map> maps;            // the inputs, then one for each step
  std::vector<Layer> layers;        // in the order they run in
  std::vector<Division> divisions;  // of the layers
  size_t by_image;                  // layers at the front that have a stage for each image
  int result;                       // map
};

// Throws std::runtime_error if the steps are malformed.
Graph graph_of(const Request&, const Kernels&);

// Items into which the conversion of so many rows is divided. Their channel sums are added in the order of
// the items, so their number must not depend on the threads.
int row_items(int64_t rows);

}  // namespace parnet::cpu
