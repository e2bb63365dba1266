// Scratch memory of one running network. A plan keeps the workspaces of finished runs for the next ones.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace parnet::cpu {

// A counter with a cache line of its own: finished items of a stage, or tickets.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// Zeroed at creation. Kernels never write the borders of maps, so they stay zero from run to run.
class Workspace {
 public:
  Workspace(int64_t floats, int64_t counters);
  ~Workspace();
  Workspace(const Workspace&) = delete;

  float* at(int64_t offset) const { return base_ + offset; }
  Counter& counter(int64_t i) { return counters_[i]; }
  void reset_counters();

 private:
  float* base_;
  int64_t bytes_;
  std::vector<Counter> counters_;
};

// Tells the kernel to back the inside of a large range with huge pages: fewer page faults and TLB misses.
void advise_huge_pages(void* data, int64_t bytes);

class WorkspacePool {
 public:
  WorkspacePool(int64_t floats, int64_t counters) : floats_(floats), counters_(counters) {}
  std::unique_ptr<Workspace> take();
  void put(std::unique_ptr<Workspace>);

 private:
  const int64_t floats_, counters_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace parnet::cpu
