// Runs a warp. Its lanes form groups, each at one instruction; the group with the smallest program counter
// goes first, which brings diverged lanes together again where their paths meet.
#include <climits>

#include "memory.hpp"
#include "scheduler.hpp"

namespace ptxsim {

namespace {

enum class Next { Continue, Switch };  // go on with this group, or choose again

void merge_groups(Warp& w) {
  auto can_merge = [](const Group& a, const Group& b) {
    if (a.pc != b.pc || a.state == GroupState::AtBarrier || b.state == GroupState::AtBarrier) return false;
    bool both_wait = a.state == GroupState::AtWarpSync && b.state == GroupState::AtWarpSync;
    return !(both_wait && a.warp_barrier);
  };
  for (size_t i = 0; i < w.groups.size(); i++)
    for (size_t j = i + 1; j < w.groups.size();) {
      if (!can_merge(w.groups[i], w.groups[j])) {
        j++;
        continue;
      }
      w.groups[i].mask |= w.groups[j].mask;
      w.groups[i].state = GroupState::Running;
      w.groups.erase(w.groups.begin() + s64(j));
    }
}

void wake_groups(Warp& w) {
  for (Group& g : w.groups)
    if (g.state == GroupState::AtWarpSync && !(g.needed & w.live & ~g.mask)) g.state = GroupState::Running;
  // bar.warp.sync may be reached at different places: it is over when all the named lanes wait at one.
  u32 waiting = 0;
  for (const Group& g : w.groups)
    if (g.state == GroupState::AtWarpSync && g.warp_barrier) waiting |= g.mask;
  for (const Group& g : w.groups) {
    if (g.state != GroupState::AtWarpSync || !g.warp_barrier) continue;
    u32 needed = g.needed & w.live;
    if (needed & ~waiting) continue;
    for (Group& other : w.groups)
      if (other.state == GroupState::AtWarpSync && other.warp_barrier && other.mask & needed) {
        other.state = GroupState::Running;
        other.pc++;
      }
    break;
  }
}

void exit_lanes(Context& c, u32 mask) {
  Block& b = *c.block;
  complete_copies(c, mask, 0, true);
  if (!c.warp->wgmma.empty())
    report(c, ReportKind::AsyncHazard, first_lane(mask), 0, "thread exits with wgmma still in flight");
  c.machine->progress++;
  c.warp->live &= ~mask;
  if (!c.warp->live) finish_trips(*c.machine, *c.warp);
  b.live -= __builtin_popcount(mask);
  if (!b.live) {
    bulk_finish(c, true);
    if (c.machine->cluster_blocks > 1) {
      bulk_drop_target(c);
      check_visits(c);
    }
  }
  barriers_after_exit(c);
  cluster_after_exit(c, mask);
}

// One warp's turn
class WarpRun {
 public:
  WarpRun(Context& c, int budget, bool rotate)
      : c_(c), w_(*c.warp), m_(*c.machine), budget_(budget), rotate_(rotate) {}

  int run() {
    int start = budget_;
    w_.yielding = false;
    while (budget_ > 0 && !w_.yielding && choose_group()) run_group();
    return start - budget_;
  }

 private:
  // Picks the group to run: the one furthest behind or, to let the others of a polling warp go on, ahead.
  bool choose_group() {
    if (w_.groups.size() > 1) merge_groups(w_);
    if (w_.groups.size() > 1 || w_.groups[0].state != GroupState::Running) wake_groups(w_);
    chosen_ = -1;
    for (size_t i = 0; i < w_.groups.size(); i++) {
      if (w_.groups[i].state != GroupState::Running) continue;
      if (chosen_ < 0 || (rotate_ ? w_.groups[i].pc > group().pc : w_.groups[i].pc < group().pc))
        chosen_ = int(i);
    }
    if (chosen_ < 0) return false;
    limit_ = ~0u;  // where another group may be joined
    for (size_t i = 0; i < w_.groups.size(); i++)
      if (int(i) != chosen_ && w_.groups[i].state != GroupState::AtBarrier && w_.groups[i].pc > group().pc)
        limit_ = std::min(limit_, w_.groups[i].pc);
    return true;
  }

  Group& group() { return w_.groups[size_t(chosen_)]; }

  void run_group() {
    int turn = rotate_ ? std::min(budget_, 500) : budget_;
    rotate_ = false;
    budget_ -= turn;
    pc_ = group().pc;
    lanes_ = group().mask;
    const Instruction* program = m_.program.data();
    const Handler* handlers = m_.handlers.data();
    const u8* classes = m_.classes.data();
    Counters* counters = m_.counters.data();
    for (;;) {
      const Instruction& in = program[pc_];
      u32 mask = lanes_;
      if (in.guard >= 0) {
        u32 p = *reinterpret_cast<const u32*>(c_.regs + in.guard);
        mask &= in.guard_negated ? ~p : p;
      }
      Counters& count = counters[pc_];
      count.executed++;
      count.lanes += __builtin_popcount(mask);
      c_.pc = pc_;
      c_.mask = mask;
      c_.counters = &count;
      turn--;
      if (m_.count_trips && mask) count_trips(c_, in);
      if (classes[pc_] == kIndependent) {
        if (mask) handlers[pc_](c_, in);
        pc_++;
      } else if (special(in, mask, count) == Next::Switch) {
        budget_ += turn;
        return;
      }
      if (pc_ >= limit_ || turn <= 0 || w_.yielding) break;
    }
    budget_ += turn;
    group().pc = pc_;
    group().mask = lanes_;
  }

  Next special(const Instruction& in, u32 mask, Counters& count) {
    if (in.op == Op::Bra) return branch(in, mask);
    if (!mask) {
      pc_++;
      return Next::Continue;
    }
    if (mask != lanes_) {  // a synchronising instruction that is predicated off for some lanes: they go ahead
      uncount(count, mask);
      group().mask = mask;
      group().pc = pc_;
      add_group(pc_ + 1, lanes_ & ~mask);
      return Next::Switch;
    }
    switch (in.op) {
      case Op::Bar:
        group().pc = pc_;
        if (barrier_arrive(c_, in, group())) return Next::Switch;
        pc_ = group().pc;
        return Next::Continue;
      case Op::ClusterWait:
        if (in.has(mod::Aligned) && w_.live & ~lanes_) {
          uncount(count, mask);
          wait_for(w_.live, lanes_, false);
          return Next::Switch;
        }
        group().pc = pc_;
        if (cluster_wait(c_, group())) return Next::Switch;
        pc_ = group().pc;
        return Next::Continue;
      case Op::BarWarp:
        return warp_barrier(in, mask, count);
      case Op::Call:
        for_lanes(mask, [&](int l) { w_.call_stack[l].push_back(pc_ + 1); });
        pc_ = u32(in.target);
        return Next::Continue;
      case Op::Brx:
        return branch_table(in, mask);
      case Op::Ret:
      case Op::Exit:
        return leave(in, mask);
      default:
        return m_.classes[pc_] == kMembers ? with_members(in, count) : with_whole_warp(in, mask, count);
    }
  }

  void add_group(u32 pc, u32 mask) { w_.groups.push_back(Group{pc, mask}); }
  void uncount(Counters& count, u32 lanes) {
    count.executed--;
    count.lanes -= __builtin_popcount(lanes);
  }
  void wait_for(u32 needed, u32 lanes, bool warp_barrier) {
    Group& g = group();
    g.pc = pc_;
    g.mask = lanes;
    g.state = GroupState::AtWarpSync;
    g.needed = needed;
    g.warp_barrier = warp_barrier;
  }

  Next branch(const Instruction& in, u32 mask) {
    if (mask == lanes_) {
      pc_ = u32(in.target);
    } else if (!mask) {
      pc_++;
    } else {
      group().pc = pc_ + 1;
      group().mask = lanes_ & ~mask;
      add_group(u32(in.target), mask);
      return Next::Switch;
    }
    return Next::Continue;
  }

  void split(const std::map<u32, u32>& by_target) {  // the group is gone; these take its place
    w_.groups.erase(w_.groups.begin() + chosen_);
    for (auto [pc, mask] : by_target) add_group(pc, mask);
  }

  Next branch_table(const Instruction& in, u32 mask) {
    std::map<u32, u32> targets;
    for_lanes(mask, [&](int l) {
      u32 index = u32(lane_source(c_, in, 0, l));
      if (index >= u32(in.aux)) fault(c_, l, "brx.idx index out of range");
      targets[u32(source_code(c_, in, 1 + int(index)))] |= 1u << l;
    });
    split(targets);
    return Next::Switch;
  }

  Next leave(const Instruction& in, u32 mask) {
    std::map<u32, u32> targets;
    u32 exiting = 0;
    for_lanes(mask, [&](int l) {
      auto& stack = w_.call_stack[l];
      if (in.op == Op::Exit || stack.empty()) {
        exiting |= 1u << l;
      } else {
        targets[stack.back()] |= 1u << l;
        stack.pop_back();
      }
    });
    split(targets);
    if (exiting) exit_lanes(c_, exiting);
    if (w_.groups.empty()) budget_ = std::min(budget_, 0), w_.yielding = true;
    return Next::Switch;
  }

  Next warp_barrier(const Instruction& in, u32 mask, Counters& count) {
    u32 needed = 0;
    for_lanes(mask, [&](int l) { needed |= u32(lane_source(c_, in, 0, l)); });
    needed &= w_.live;
    if (!(needed & ~lanes_)) {
      pc_++;
      return Next::Continue;
    }
    count.executed--;
    wait_for(needed, lanes_, true);
    return Next::Switch;
  }

  // Lanes may name different sets of members (tiles of a warp): each set that is complete runs.
  Next with_members(const Instruction& in, Counters& count) {
    u32 complete[32], n = 0, waiting = 0, needed = 0;
    for (u32 left = lanes_; left;) {
      u32 members = u32(lane_source(c_, in, in.n_src - 1, first_lane(left))), same = 0;
      for_lanes(left, [&](int l) { same |= u32(u32(lane_source(c_, in, in.n_src - 1, l)) == members) << l; });
      left &= ~same;
      if (same & ~members)
        report(
            c_, ReportKind::WarpSync, first_lane(same & ~members), 0,
            format("lane executes a .sync instruction whose member mask 0x%08x does not name it", members));
      if (members & w_.live & ~lanes_) {
        waiting |= same;
        needed |= members & w_.live;
      } else {
        complete[n++] = same;
      }
    }
    for (u32 i = 0; i < n; i++) {
      c_.mask = complete[i];
      m_.handlers[pc_](c_, in);
    }
    if (!waiting) {
      pc_++;
      return Next::Continue;
    }
    count.lanes -= __builtin_popcount(waiting);
    if (!n) count.executed--;
    u32 ran = lanes_ & ~waiting;
    wait_for(needed, waiting, false);
    if (n) add_group(pc_ + 1, ran);
    return Next::Switch;
  }

  Next with_whole_warp(const Instruction& in, u32 mask, Counters& count) {
    if (w_.live & ~lanes_) {
      uncount(count, mask);
      wait_for(w_.live, lanes_, false);
      return Next::Switch;
    }
    bool full_warp = u32(c_.block->n_threads) >= u32(w_.id + 1) * 32;
    if (lanes_ != ~0u && full_warp)
      report(c_, ReportKind::WarpSync, -1, 0, "warp-wide instruction executed with exited lanes");
    c_.mask = ~0u;
    m_.handlers[pc_](c_, in);
    pc_++;
    return Next::Continue;
  }

  Context& c_;
  Warp& w_;
  Machine& m_;
  int budget_;
  bool rotate_;
  int chosen_ = -1;
  u32 limit_ = 0, pc_ = 0, lanes_ = 0;
};

}  // namespace

int run_warp(Context& c, int budget, bool rotate) { return WarpRun(c, budget, rotate).run(); }

std::string where_are(const Machine& m, const Block& b) {
  constexpr int kShown = 12;
  std::string text;
  int n = 0;
  for (const Warp& w : b.warps)
    for (const Group& g : w.groups) {
      if (n++ == kShown) return text + " ...";
      std::string state = g.state == GroupState::AtBarrier && g.barrier == kClusterBarrier
                              ? std::string("waits at the cluster's barrier")
                          : g.state == GroupState::AtBarrier  ? format("waits at barrier %d", g.barrier)
                          : g.state == GroupState::AtWarpSync ? std::string("waits for warp lanes")
                                                              : std::string("runs");
      text += format(" [warp %d mask 0x%08x line %d %s]", w.id, g.mask, m.program[g.pc].line, state.c_str());
    }
  return text;
}

}  // namespace ptxsim
