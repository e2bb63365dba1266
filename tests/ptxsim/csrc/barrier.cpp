// Barriers of a block: bar, barrier.
#include "memory.hpp"
#include "scheduler.hpp"

namespace ptxsim {

namespace {

enum class Reduction { None, Popc, And, Or };  // Instruction::aux

bool is_complete(const Block& b, const Barrier& bar) {
  return bar.expected ? bar.warps * 32 >= bar.expected : bar.lanes >= b.live;
}

void write_reduction(Context& c, Warp& w, const Group& g, const Instruction& in, const Barrier& bar) {
  s32 code = c.machine->operands[in.operands];
  auto* slots = reinterpret_cast<u32*>(w.regs + (code & ~3));
  auto kind = static_cast<Reduction>(in.aux);
  if (kind == Reduction::Popc) {
    for_lanes(g.mask, [&](int l) { slots[l] = bar.predicates; });
    return;
  }
  bool result = kind == Reduction::And ? bar.predicates == bar.lanes : bar.predicates != 0;
  *slots = (*slots & ~g.mask) | (result ? g.mask : 0);
}

void report_divergent(Context& c, Warp& w, const Group& g, u32 other_pc, int id) {
  Context at = c;
  at.pc = g.pc;
  at.warp = &w;
  report(at, ReportKind::Barrier, first_lane(g.mask), other_pc,
         format("divergent warp %d at barrier %d: its lanes wait at lines %d and %d", w.id, id,
                line_of(c, other_pc), line_of(c, g.pc)));
}

void release(Context& c, int id) {
  Block& b = *c.block;
  Barrier& bar = b.barriers[id];
  c.machine->barriers++;
  c.machine->progress++;
  advance_clock(b);
  for (Warp& w : b.warps) {
    u32 seen_pc = ~0u;
    for (Group& g : w.groups) {
      if (g.state != GroupState::AtBarrier || g.barrier != id) continue;
      if (seen_pc != ~0u && seen_pc != g.pc) report_divergent(c, w, g, seen_pc, id);
      seen_pc = g.pc;
      const Instruction& in = c.machine->program[g.pc];
      if (in.n_dst) write_reduction(c, w, g, in, bar);
      g.state = GroupState::Running;
      g.pc++;
    }
    if (seen_pc == ~0u) continue;
    Context other = c;
    other.warp = &w;
    absorb(other, bar.arriving);
    w.trips.now = std::max(w.trips.now, bar.trips);
  }
  bar = Barrier();
}

void try_release(Context& c, int id) {
  Block& b = *c.block;
  Barrier& bar = b.barriers[id];
  if (!bar.used || !is_complete(b, bar)) return;
  if (!bar.expected && b.live < u32(b.n_threads))
    report(c, ReportKind::Barrier, -1, u32(id),
           format("barrier %d reached by only %u of %d threads (the others have exited)", id, bar.lanes,
                  b.n_threads));
  release(c, id);
}

}  // namespace

// Sources: number, [thread count], [predicate]
bool barrier_arrive(Context& c, const Instruction& in, Group& group) {
  Block& b = *c.block;
  int lane = first_lane(group.mask);
  u32 id = u32(lane_source(c, in, 0, lane));
  if (id >= kBarriers) fault(c, lane, format("barrier id %u out of range", id));
  u32 count = in.has(mod::HasCount) ? u32(lane_source(c, in, 1, lane)) : 0;
  if (count & 31) fault(c, lane, format("barrier thread count %u is not a multiple of 32", count));
  if (count == u32(b.n_warps) * 32) count = 0;  // the whole block
  Barrier& bar = b.barriers[id];
  if (bar.used && bar.expected != count)
    fault(c, lane,
          format("barrier %u: thread count %u differs from the pending %u", id, count, bar.expected));
  bar.used = true;
  bar.expected = count;
  bar.lanes += __builtin_popcount(group.mask);
  bar.lane_mask[c.warp->id] |= group.mask;
  bar.trips = std::max(bar.trips, c.warp->trips.now);
  if (bar.lane_mask[c.warp->id] == c.warp->live) bar.warps++;
  publish(c, bar.arriving);
  if (in.aux) bar.predicates += __builtin_popcount(predicate_source(c, in, in.n_src - 1) & group.mask);
  bool waits = !in.has(mod::ArriveOnly);
  if (waits) {
    group.state = GroupState::AtBarrier;
    group.barrier = int(id);
  } else {
    advance_clock(b);
    group.pc++;
  }
  try_release(c, int(id));
  return waits;
}

// Lanes have exited: barriers that waited for them may now be complete.
void barriers_after_exit(Context& c) {
  Block& b = *c.block;
  for (int id = 0; id < kBarriers; id++) {
    Barrier& bar = b.barriers[id];
    if (!bar.used) continue;
    u32 arrived = bar.lane_mask[c.warp->id];
    if (arrived && arrived == c.warp->live) bar.warps++;
    if (b.live) try_release(c, id);
  }
}

}  // namespace ptxsim
