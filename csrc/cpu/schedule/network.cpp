#include "network.h"

#include <list>
#include <mutex>

#include "../process_value.h"

namespace parnet::cpu {

NetworkPlan::NetworkPlan(const Request& request, const Kernels& k)
    : request_(request),
      kernels_(k),
      graph_(graph_of(request_, k)),
      memory_(memory_of(request_, graph_, k)),
      stages_(stages_of(request_, graph_, memory_)),
      pool_(std::make_unique<WorkspacePool>(memory_.floats, 2 + stages_.size())) {}

namespace {

struct Cache {
  std::mutex mutex;
  std::list<std::shared_ptr<const NetworkPlan>> plans;  // most recently used first
};

}  // namespace

std::shared_ptr<const NetworkPlan> plan_for(const Request& request, const Kernels& k) {
  auto& [mutex, plans] = *process_value<Cache>;
  const auto known = [&]() -> std::shared_ptr<const NetworkPlan> {
    for (auto it = plans.begin(); it != plans.end(); ++it) {
      if ((*it)->request() == request) {
        plans.splice(plans.begin(), plans, it);
        return plans.front();
      }
    }
    return nullptr;
  };
  {
    const std::lock_guard lock(mutex);
    if (auto plan = known()) return plan;
  }
  // Planned without the lock, so that a new shape in one thread does not stop the others.
  auto made = std::make_shared<NetworkPlan>(request, k);
  const std::lock_guard lock(mutex);
  if (auto plan = known()) return plan;  // of another thread that was faster
  plans.push_front(std::move(made));
  int64_t bytes = plans.front()->workspace_bytes();
  auto keep = std::next(plans.begin());
  for (int64_t kept = 1; keep != plans.end() && kept < kCachedPlans; ++keep, kept++) {
    bytes += (*keep)->workspace_bytes();
    if (bytes > kCachedBytes) break;
  }
  plans.erase(keep, plans.end());
  return plans.front();
}

}  // namespace parnet::cpu
