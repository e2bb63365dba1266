// A network in int8 or bfloat16: its layers in levels; a level's gates, then its convolutions, are items that
// any thread may take.
//
// Running: threads take items in order from one counter, and start one when all items of earlier stages are
// done. The oldest unfinished item can always run and is held by a thread that runs it: no deadlock, however
// many threads come.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "layer.h"

namespace parnet::cpu::direct {

struct Step {
  Layer layer;
  int64_t input, other, output;  // values; value 0 is the entered map; `other` is -1 if there is one input
};

class Network {
 public:
  // shape: N, C, H, W of the entered map, channels_last. Throws std::runtime_error if steps and shape
  // do not fit each other.
  Network(std::vector<Step> steps, const std::array<int64_t, 4>& shape, int threads, const Kernels&);

  int64_t workspace_bytes() const { return bytes_; }
  std::array<int64_t, 4> result_shape() const { return values_[steps_.back().output].shape; }

  using Body = void (*)(void* context);
  using RunParallel = void (*)(int threads, Body, void* context);
  // x: the entered map, floats or bfloat16 as the kernels want it; result: [image][row][pixel][channel]
  // floats, NaN for images with values that are not finite in x or, in bfloat16, in any map but the last.
  void run(const void* x, float* result, char* workspace, RunParallel) const;

 private:
  struct Value {
    std::array<int64_t, 4> shape{};
    int64_t bytes = 0, start = -1;  // of the map in the workspace
    int64_t sums = -1, sum_rows = 0;
    int level = 0, last_level = 0;
  };
  struct Stage {
    enum class Work { kEnter, kGate, kConvolve } work;
    int step;                      // -1: entering
    int64_t images, rows, panels;  // items: images x chunks of rows x chunks of panels
    int64_t first_item;            // of the network
    bool after_all;  // needs what stages before it left; else only what the stage before it needs
  };
  class Run;

  void plan_values(const std::array<int64_t, 4>& shape);
  void plan_stages();
  void plan_memory();
  int64_t reserve(int64_t bytes);
  int64_t pixel_bytes(const Value&) const;
  // Sums of bytes are exact, so an item adds up its rows; sums in bfloat16 must not depend on the items.
  bool sums_by_row() const { return kernels_.element == Element::kBfloat16; }
  Map map_of(const Value&, char* workspace, int64_t image) const;

  std::vector<Step> steps_;  // by level
  std::vector<Value> values_;
  std::vector<Stage> stages_;
  std::vector<int64_t> barriers_;  // numbers of items that stages wait for
  std::vector<int64_t> gates_;     // of each step, in the workspace: [image][3][panel][kPanel] floats
  int threads_;
  const Kernels& kernels_;
  int64_t bytes_ = 0, items_ = 0, means_ = 0, means_bytes_ = 0, finite_ = 0;
};

}  // namespace parnet::cpu::direct
