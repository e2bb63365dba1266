// A network (or a single layer), planned once for each shape and thread count, and run on a workspace.
//
// Running: every thread takes the next item by incrementing one ticket counter, waits until the stages it
// depends on are complete, and executes it. Items are handed out in the order of the stages and a stage
// depends on earlier stages only. So the oldest unfinished item can always run and is held by a thread that
// is running it: no deadlock, however many threads really take part (one, if the caller is already inside a
// parallel region).
#pragma once
#include <memory>
#include <vector>

#include "stages.h"
#include "workspace.h"

namespace parnet::cpu {

// Seconds of all threads together. A thread that waits for others counts as kWait of the layer it waits with.
struct StageTime {
  Task task;
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
  int64_t workspace_bytes() const { return memory_.floats * 4; }

 private:
  friend class NetworkRun;

  const Request request_;
  const Kernels& kernels_;
  // Made in this order, each out of those before it.
  const Graph graph_;
  const Memory memory_;
  const std::vector<Stage> stages_;
  const std::unique_ptr<WorkspacePool> pool_;
};

// The plan for a request, from a cache of the most recently used ones.
std::shared_ptr<const NetworkPlan> plan_for(const Request&, const Kernels&);

}  // namespace parnet::cpu
