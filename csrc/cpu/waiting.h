// How the threads of one run wait for each other's items.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

#include "policy.h"

namespace parnet::cpu {

// How often a thread looks for others before it sleeps, the same for all threads of a run.
class Patience {
 public:
  explicit Patience(int threads) : looks_(share_processors(threads) ? kPatienceCrowded : kPatience) {}

  // Returns when `done` has reached `items`. Who makes it reach them must call done.notify_all().
  void wait(const std::atomic<int64_t>& done, int64_t items) {
    int spins = 0;
    for (int64_t seen; (seen = done.load(std::memory_order_acquire)) < items;) {
      if (spins++ < looks_.load(std::memory_order_relaxed)) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      } else {
        // The thread that this one waits for has lost its processor: asleep, this one gives it its own.
        looks_.store(kPatienceCrowded, std::memory_order_relaxed);
        done.wait(seen, std::memory_order_acquire);
      }
    }
  }

 private:
  static bool share_processors(int threads) {
#ifdef __linux__
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && CPU_COUNT(&allowed) < threads;
#else
    return false;
#endif
  }

  std::atomic<int> looks_;
};

}  // namespace parnet::cpu
