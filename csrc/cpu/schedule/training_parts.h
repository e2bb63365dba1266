// What the training kernels' schedules share: scratch memory and plans of tiles, both kept from call to call.
#pragma once
#include <memory>

#include "pack.h"
#include "plan.h"
#include "workspace.h"

namespace parnet::cpu {

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Buffers of finished items serve later ones. At most as many are kept as ran at once.
class Scratch {
 public:
  struct Buffer {
    int64_t floats;  // that it holds, perhaps more than were asked for
    std::unique_ptr<Workspace> memory;
  };
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  float* at(int64_t offset) const { return buffer_.memory->at(offset); }

 private:
  Buffer buffer_;
};

struct PlanKey {
  Geometry geometry;
  int images, rows, cols, threads;
  bool operator==(const PlanKey&) const = default;
};
std::shared_ptr<const TilePlan> tiles_for(const PlanKey&, const Kernels&);

LayerParameters plain_layer(Storage, int stride, int64_t outputs, int64_t channels);

}  // namespace parnet::cpu
