// Where everything that a running network writes lies in its workspace. All places are in floats from its
// start.
#pragma once
#include "graph.h"

namespace parnet::cpu {

struct MapMemory {
  View view;             // strides; `base` is set when the network runs
  int64_t pixels = -1;   // pixel (0, 0) of the first image, or -1: the map is the user's result
  int64_t sums;          // [image][sum row][block][lane]: channel sums, which the map's producer leaves
  int sum_rows;          // for each image
  int64_t entered_sums;  // of an input: what is added up on the way in; not used where its sums are given
  int entered_rows;      // for each image
  int reused = -1;       // the dead map whose buffer this one takes
  bool planes = false;   // an image for a stem: [image][channel][row][pixel]
};

struct LayerMemory {
  int64_t gates;    // scale, then offset: [image][panel][2*lanes] each
  int region = -1;  // of `regions`, if threads share the transformed inputs
};

// Each thread's own: transformed inputs, products, weights made at the call (or lines of a conversion),
// means.
struct ScratchMemory {
  int64_t start, floats;  // of the first thread; of each
  int64_t m, u, means;    // from the start of a thread's, where transformed inputs lie
};

struct Memory {
  std::vector<MapMemory> maps;
  std::vector<LayerMemory> layers;
  std::vector<int64_t> regions;  // of shared transformed inputs
  int64_t means;                 // [image][block][lane] of the result, for the classifier
  ScratchMemory scratch;
  int64_t floats;
};

Memory memory_of(const Request&, const Graph&, const Kernels&);

}  // namespace parnet::cpu
