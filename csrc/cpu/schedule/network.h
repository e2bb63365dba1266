// A network (or a single layer) as a list of stages of independent work items, planned once per shape and
// thread count.
//
// Running: every thread takes the next item by incrementing one ticket counter, waits until the stages it
// depends on are complete, and executes it. Items are handed out in the order of the stages and a stage
// depends on earlier stages only. So the oldest unfinished item can always run and is held by a thread that
// is running it: no deadlock, however many threads really take part (one, if the caller is already inside a
// parallel region).
#pragma once
#include <memory>
#include <vector>

#include "program.h"
#include "workspace.h"

namespace parnet::cpu {

// bench/profile.py knows these numbers.
enum class Work : int32_t {
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

// Seconds of all threads together. A thread that waits for others counts as kWait of the layer it waits with.
struct StageTime {
  Work work;
  int64_t packed;  // layer, by packed index, or -1: conversion of the input or the output
  double seconds;
};

class NetworkPlan {
 public:
  NetworkPlan(const Request&, const Kernels&);

  // body(worker) must be called at least once by `parallel`, at most `threads` times, possibly at the same
  // time.
  using Body = void (*)(void* context);
  using RunParallel = void (*)(int threads, Body, void* context);
  // False if the inputs hold NaN or infinity, or channels whose sums are beyond float: the tiles of
  // Winograd's algorithm spread them, and can turn infinity into NaN or its opposite.
  // `classifier` is null if the request has none. `profile`, if there is one, gets each stage's time.
  // `input_sums` stand beside `inputs`, [N, C, 1, 1] where they are given. `outputs` is a map and its sums
  // [N, K, 1, 1] for each of the request's results; then, if there are none or the request is pooled, the
  // last layer's output.
  bool run(const std::vector<const PackedHeader*>& packed, const PackedHeader* classifier,
           const std::vector<Strided>& inputs, const std::vector<Strided>& input_sums,
           const std::vector<Strided>& outputs, RunParallel, std::vector<StageTime>* profile = nullptr) const;

  const Request& request() const { return request_; }
  int64_t workspace_bytes() const { return floats_ * 4; }

 private:
  friend class NetworkRun;
  struct Use {
    int stage, image;  // image: -1 means all
  };
  // A blocked activation (or planes for a stem) in the workspace, with the sums its producer leaves.
  struct Value {
    std::array<int64_t, 4> shape;
    int blocks;
    int64_t kept;         // images that have a buffer; image i has that of i % kept
    View view;            // base unused
    int64_t offset = -1;  // of pixel (0, 0) in the workspace, or -1: not stored there
    int64_t floats;       // whole buffer, from `start`
    int64_t start = -1;
    int64_t sums = -1;
    int sum_rows = 0;         // per image
    int64_t entered_sums;     // of an input: what is added up on the way in, unused where sums are given
    int entered_rows = 0;     // per image
    int result = -1;          // which of the request's results it is
    std::vector<int> stages;  // that complete it: one, or one for each image
    std::vector<Use> readers;
    bool undivided = false;  // its layer is one item
    size_t last_use = 0;     // position in execution order
  };
  struct Layer {
    Step step;
    int input, other, output;  // values
    int level;
    int64_t work = 0;  // products, in some unit
    bool stem;
    bool by_image;  // it has a stage for each image
    std::shared_ptr<const TilePlan> tiles;
    int reused = -1;      // the dead value whose buffer the output takes
    int64_t gates;        // scale, then offset
    int v_region;         // of transformed inputs that the items share, or -1: each item transforms its own
    int gate_items;       // per image
    int transform_items;  // per block of tiles
    int row_items;        // of a stem, per image
    int gate_stage;
    int transform_stage = -1;
    int panels_per_item;
  };
  struct Stage {
    Work work;
    int index;  // of the layer, or of the value
    int64_t items, items_per_image, first_item, first_ticket;
    std::vector<int> after;
  };

  struct Region {
    int64_t start;
    int last_reader;  // stage
  };

  void plan_values();
  void plan_inputs();
  void enter_inputs(int image, const std::vector<int>& after);
  int leave_result(int image);  // its stage
  void leave_results();         // of a part of a network
  std::shared_ptr<const TilePlan> tiles_for(const Layer&, int threads);
  void plan_tiles();
  bool is_undivided(const Layer& l) const { return values_[l.output].undivided; }
  void plan_items();
  void order_layers();
  // Of all images (-1) or one.
  void plan_gate(Layer&, int image);
  void plan_transform(Layer&);
  void plan_main(Layer&, int image);
  void reserve_output(Layer&);
  void release_inputs(const Layer&);
  int add_stage(Work, int index, int64_t images, int64_t items_per_image, int image, std::vector<int> after);
  int64_t reserve(int64_t floats);
  int reserve_activation(Value&, int level);
  int index_of(const Layer& l) const { return &l - layers_.data(); }
  int64_t packed_of(const Stage&) const;
  std::vector<int> input_stages(const Layer&, int image) const;
  void read_inputs(const Layer&, int stage, int image);

  const Request request_;
  const Kernels& kernels_;
  std::vector<Value> values_;
  std::vector<Layer> layers_;  // in execution order
  std::vector<Stage> stages_;
  std::vector<int> idle_values_;  // whose buffers may be reused
  int64_t floats_ = 0, tickets_ = 0;
  std::vector<Region> v_regions_;
  int64_t scratch_, scratch_floats_;  // of all workers, of one: transformed inputs, products, weights, means
  int64_t v_scratch_ = 0, m_scratch_ = 0, u_scratch_ = 0, means_scratch_ = 0;
  int result_;          // value
  int64_t means_ = -1;  // [image][block][lane], for the classifier
  std::unique_ptr<WorkspacePool> pool_;
};

// The plan for a request, from a cache of the most recently used ones.
std::shared_ptr<const NetworkPlan> plan_for(const Request&, const Kernels&);

}  // namespace parnet::cpu
