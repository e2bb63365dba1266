#include "workspace.h"

#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace parnet::cpu {
namespace {
constexpr int64_t kHugePage = 2 << 20;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const auto from = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t{kHugePage - 1};
  const auto to = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t{kHugePage - 1};
  // A hint: nothing depends on its success.
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Workspace::Workspace(int64_t floats, int64_t counters) : counters_(counters) {
  const int64_t page = floats * 4 >= kHugePage ? kHugePage : 4096;
  bytes_ = (floats * 4 + page - 1) / page * page;
  base_ = static_cast<float*>(std::aligned_alloc(page, bytes_));
  if (!base_) throw std::bad_alloc();
  advise_huge_pages(base_, bytes_);
  std::memset(base_, 0, bytes_);
}

Workspace::~Workspace() { std::free(base_); }

void Workspace::reset_counters() {
  for (Counter& c : counters_) c.value.store(0, std::memory_order_relaxed);
}

std::unique_ptr<Workspace> WorkspacePool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      auto workspace = std::move(idle_.back());
      idle_.pop_back();
      return workspace;
    }
  }
  return std::make_unique<Workspace>(floats_, counters_);
}

void WorkspacePool::put(std::unique_ptr<Workspace> workspace) {
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(workspace));
}

}  // namespace parnet::cpu
