// A model of the L2 cache: 16-way sets of 128-byte lines, least recently used goes first. It lives across
// launches.
#pragma once
#include <vector>

#include "base.hpp"

namespace ptxsim {

class L2Model {
 public:
  explicit L2Model(u64 capacity) : sets_(capacity / (kLine * kWays)), ways_(sets_ * kWays) {}

  void access(u64 line, bool write) {
    lines_requested++;
    Way* set = &ways_[(line * 0x9e3779b97f4a7c15ull >> 32) % sets_ * kWays];
    Way* victim = set;
    for (u32 i = 0; i < kWays; i++) {
      if (set[i].line1 == line + 1) {
        set[i].used = ++tick_;
        set[i].dirty |= write;
        hits++;
        return;
      }
      if (set[i].used < victim->used) victim = &set[i];
    }
    if (victim->line1 && victim->dirty) lines_written_back++;
    if (!write) lines_fetched++;
    *victim = {line + 1, ++tick_, write};
  }

  u64 capacity() const { return sets_ * kWays * kLine; }

  // Since the last reset_counters()
  u64 lines_requested = 0, hits = 0, lines_fetched = 0, lines_written_back = 0;
  void reset_counters() { lines_requested = hits = lines_fetched = lines_written_back = 0; }
  u64 dirty_lines() const {
    u64 n = 0;
    for (const Way& way : ways_) n += way.dirty;
    return n;
  }

  static constexpr u64 kLine = 128;

 private:
  static constexpr u32 kWays = 16;
  struct Way {
    u64 line1 = 0, used = 0;  // line number + 1; 0: empty
    bool dirty = false;
  };
  u64 sets_, tick_ = 0;
  std::vector<Way> ways_;
};

}  // namespace ptxsim
