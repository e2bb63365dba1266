#include "training_parts.h"

#include <algorithm>
#include <list>
#include <mutex>

#include "../process_value.h"

namespace parnet::cpu {
namespace {

constexpr size_t kPlans = 128;

class Buffers {
 public:
  Scratch::Buffer take(int64_t floats) {
    {
      const std::lock_guard lock(mutex_);
      const auto fits = [&](const auto& idle) { return idle.floats >= floats; };
      const auto found = std::find_if(idle_.begin(), idle_.end(), fits);
      if (found != idle_.end()) {
        auto buffer = std::move(*found);
        idle_.erase(found);
        return buffer;
      }
      if (!idle_.empty()) idle_.pop_back();  // the largest that is too small
    }
    return {floats, std::make_unique<Workspace>(floats, 0)};
  }
  void put(Scratch::Buffer buffer) {
    const std::lock_guard lock(mutex_);
    const auto larger = [&](const auto& idle) { return idle.floats >= buffer.floats; };
    idle_.insert(std::find_if(idle_.begin(), idle_.end(), larger), std::move(buffer));
  }

 private:
  std::mutex mutex_;
  std::vector<Scratch::Buffer> idle_;  // by size
};

Buffers& buffers() { return *process_value<Buffers>; }

struct Plans {
  std::mutex mutex;
  std::list<std::pair<PlanKey, std::shared_ptr<const TilePlan>>> all;
};

}  // namespace

Scratch::Scratch(int64_t floats) : buffer_(buffers().take(floats)) {}
Scratch::~Scratch() { buffers().put(std::move(buffer_)); }

std::shared_ptr<const TilePlan> tiles_for(const PlanKey& key, const Kernels& k) {
  auto& [mutex, plans] = *process_value<Plans>;
  const auto known = [&]() -> std::shared_ptr<const TilePlan> {
    const auto found =
        std::find_if(plans.begin(), plans.end(), [&](const auto& p) { return p.first == key; });
    if (found == plans.end()) return nullptr;
    plans.splice(plans.begin(), plans, found);
    return found->second;
  };
  {
    const std::lock_guard lock(mutex);
    if (auto plan = known()) return plan;
  }
  // Planned without the lock, so that a new shape in one thread does not stop the others.
  auto made = std::make_shared<TilePlan>(key.geometry, k, key.images, key.rows, key.cols, key.threads);
  const std::lock_guard lock(mutex);
  if (auto plan = known()) return plan;  // of another thread that was faster
  plans.emplace_front(key, made);
  if (plans.size() > kPlans) plans.pop_back();
  return made;
}

LayerParameters plain_layer(Storage storage, int stride, int64_t outputs, int64_t channels) {
  LayerParameters p{};
  p.kind = Kind::kPlain;
  p.storage = storage;
  p.stride = stride;
  p.out_channels = outputs;
  p.weight_channels = channels;
  return p;
}

}  // namespace parnet::cpu
