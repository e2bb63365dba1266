// A network as a list of stages of independent items. The rules of running them are in network.h.
#pragma once
#include "memory.h"

namespace parnet::cpu {

// What the items of a stage do. kWait is not done by any stage: profiles report it beside them.
// bench/profile.py knows these numbers.
enum class Task : int32_t {
  kEnter,
  kEnterPlanes,
  kGate,
  kTransform,
  kConvolve,
  kStem,
  kLeave,
  kMeans,
  kClassify,
  kWait
};

struct Stage {
  Task task;
  int index;  // of the layer; of the map, for conversions and means
  int64_t items, items_per_image;
  int64_t first_item;      // other than 0 where each image has a stage
  int64_t first_ticket;    // of the network's items in order
  std::vector<int> after;  // stages that must be complete
};

// Each depends on earlier ones only.
std::vector<Stage> stages_of(const Request&, const Graph&, const Memory&);

}  // namespace parnet::cpu
