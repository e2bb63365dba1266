// What is known to have happened: stamps of agents, and releases of other clusters.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "base.hpp"

namespace ptxsim {

constexpr int kMaxWarps = 32;
constexpr int kBlockAgents = kMaxWarps + 2;  // at most: warps, bulk engine on shared and on global memory

// Time is one counter per cluster. It is stamped on every access and moves on at every release, so that
// "agent a's accesses up to stamp s" names a prefix of a's work. Agents are numbered through the cluster;
// those beyond the most that a lone block can have lie in `more_`, which stays empty without clusters.
class VectorClock {
 public:
  u32 operator[](int agent) const {
    if (agent < kBlockAgents) return first_[size_t(agent)];
    auto i = size_t(agent - kBlockAgents);
    return i < more_.size() ? more_[i] : 0;
  }
  void raise(int agent, u32 stamp) {
    auto i = size_t(agent - kBlockAgents);
    if (agent >= kBlockAgents && i >= more_.size()) more_.resize(i + 1);
    u32& known = agent < kBlockAgents ? first_[size_t(agent)] : more_[i];
    known = std::max(known, stamp);
  }
  void join(const VectorClock& other) {
    for (size_t i = 0; i < kBlockAgents; i++) first_[i] = std::max(first_[i], other.first_[i]);
    if (more_.size() < other.more_.size()) more_.resize(other.more_.size());
    for (size_t i = 0; i < other.more_.size(); i++) more_[i] = std::max(more_[i], other.more_[i]);
  }
  bool covers(const VectorClock& other) const {
    for (size_t i = 0; i < kBlockAgents; i++)
      if (first_[i] < other.first_[i]) return false;
    for (size_t i = 0; i < other.more_.size(); i++)
      if ((i < more_.size() ? more_[i] : 0) < other.more_[i]) return false;
    return true;
  }
  bool empty() const {
    auto zero = [](u32 x) { return x == 0; };
    return std::all_of(first_.begin(), first_.end(), zero) && std::all_of(more_.begin(), more_.end(), zero);
  }

 private:
  std::array<u32, kBlockAgents> first_{};
  std::vector<u32> more_;
};

// What is known of other clusters: (cluster, snapshot of its clock), sorted. Shared and never changed.
struct KnownCluster {
  u32 cluster, snapshot;
};
using Knowledge = std::shared_ptr<const std::vector<KnownCluster>>;

// What an agent has seen and made visible. Barriers and mbarriers join these.
struct SyncState {
  VectorClock seen;        // accesses of this cluster's agents that are ordered before now
  VectorClock fenced;      // the part of `seen` that a GPU-scope fence has made visible to other clusters
  VectorClock proxied;     // the part of `seen` that a proxy fence has made visible to the async proxy
  Knowledge acquired;      // other clusters' releases that were observed with acquire semantics
  Knowledge pending;       // ... observed by a relaxed access that no fence has followed yet
  Knowledge fenced_known;  // `acquired` at the time of the last fence
  bool waited = false;     // griddepcontrol.wait: launches before this one have ended
  // With Machine::clustered only:
  VectorClock cluster_fenced;  // the part of `seen` that a fence has made visible to the cluster
  VectorClock reached;         // what was executed before now, be it ordered or not (relaxed arrivals)
};

}  // namespace ptxsim
