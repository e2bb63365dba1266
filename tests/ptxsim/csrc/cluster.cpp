// Clusters of blocks: where they lie in the grid, their barrier, and shared memory of other blocks.
#include "families.hpp"
#include "memory.hpp"
#include "scheduler.hpp"

namespace ptxsim {

// Clusters are numbered like blocks, x first, and so are the blocks of one.
void block_index(const Machine& m, u32 cluster, u32 rank, u32* id) {
  for (int i = 0; i < 3; i++) {
    u32 clusters = m.grid[i] / m.cluster_dim[i];
    id[i] = cluster % clusters * m.cluster_dim[i] + rank % m.cluster_dim[i];
    cluster /= clusters;
    rank /= m.cluster_dim[i];
  }
}

// ---- shared memory of other blocks
// -----------------------------------------------------------------------------
namespace {

std::string name_of(const Block& b) {
  return format("block %d of the cluster (%u,%u,%u)", b.rank, b.id[0], b.id[1], b.id[2]);
}

}  // namespace

SharedPlace shared_place(Context& c, int lane, u32 address) {
  Block& b = *c.block->cluster->blocks[size_t(rank_of(c, address))];
  if (&b == c.block)
    return {&b, c.machine->cluster_blocks > 1 && address >> kRankShift == u32(b.rank + 1)
                    ? address & ((1u << kRankShift) - 1)
                    : address};
  const Instruction& in = c.machine->program[c.pc];
  if (in.space() == Space::Shared && !in.has(mod::Cluster))
    fault(c, lane, "address of shared memory of " + name_of(b) + " in an access to .shared::cta");
  if (!b.live) fault(c, lane, "access to shared memory of " + name_of(b) + ", which has exited");
  return {&b, address & ((1u << kRankShift) - 1)};
}

void remote_access(Context& c, const SharedPlace* place, u32 mask, int size, int flags, u8** pointer) {
  u32 offset[32];
  for_lanes(mask, [&](int l) {
    auto [b, x] = place[l];
    offset[l] = x;
    if (x & (size - 1)) fault(c, l, format("misaligned %d-byte shared access at byte 0x%x", size, x));
    if (u64(x) + size > c.machine->shared_bytes)
      fault(c, l,
            format("out-of-bounds shared %s of %d bytes at byte %u of %s (it has %u)",
                   flags & kWrite ? "write" : "read", size, x, name_of(*b).c_str(), c.machine->shared_bytes));
    pointer[l] = b->smem + x;
    check_shared(c, *b, l, x, size, flags, c.warp->agent);
  });
  c.counters->requests++;
  c.counters->bytes += u64(__builtin_popcount(mask)) * size;
  count_wavefronts(c, offset, mask, size);
}

void note_visit(Context& c, Block& b, int agent) {
  Visitor& visitor = b.visitors[agent];
  visitor.stamp = c.block->cluster->clock;
  visitor.pc = c.pc;
}

// Other blocks' accesses must be over when a block exits, whether it happened so this time or not.
void check_visits(Context& c) {
  if (!c.machine->races) return;
  VectorClock before;
  for (const Warp& w : c.block->warps) {
    before.join(w.sync.seen);
    before.join(w.sync.reached);
  }
  for (const auto& [agent, visitor] : c.block->visitors)
    if (visitor.stamp > before[agent])
      report(c, ReportKind::Race, -1, visitor.pc,
             format("the block exits, and %s accesses its shared memory at line %d with no barrier of the "
                    "cluster before the exit",
                    agent_name(*c.block, agent).c_str(), line_of(c, visitor.pc)));
}

// ---- the barrier of the cluster
// --------------------------------------------------------------------------------
namespace {

// Which of these lanes have arrived in the present phase?
u32 arrived_now(const Warp& w, u32 phase, u32 mask) {
  return w.cluster_arrived & (phase & 1 ? w.cluster_parity : ~w.cluster_parity) & mask;
}

void go_on(Context& c, Warp& w, u32 mask) {
  Context other = c;
  other.warp = &w;
  absorb(other, c.block->cluster->completed);
  w.cluster_arrived &= ~mask;
  w.trips.now = std::max(w.trips.now, c.block->cluster->trips);
}

void try_complete(Context& c) {
  Cluster& cluster = *c.block->cluster;
  if (cluster.missing) return;
  cluster.phase++;
  cluster.missing = cluster.live();
  cluster.completed = cluster.arriving;
  c.machine->barriers++;
  c.machine->progress++;
  cluster.clock++;
  for (Block* b : cluster.blocks)
    for (Warp& w : b->warps)
      for (Group& g : w.groups)
        if (g.state == GroupState::AtBarrier && g.barrier == kClusterBarrier) {
          empty_l1(*b);
          g.state = GroupState::Running;
          g.pc++;
          go_on(c, w, g.mask);
        }
}

void arrive(Context& c, const Instruction& in) {
  Cluster& cluster = *c.block->cluster;
  Warp& w = *c.warp;
  u32 lanes = c.mask & w.live, again = lanes & w.cluster_arrived;
  if (again)
    fault(c, first_lane(again), "barrier.cluster.arrive, and the one before has not been waited for");
  w.cluster_arrived |= lanes;
  w.cluster_parity = (w.cluster_parity & ~lanes) | (cluster.phase & 1 ? lanes : 0);
  cluster.missing -= u32(__builtin_popcount(lanes));
  cluster.trips = std::max(cluster.trips, w.trips.now);
  if (in.has(mod::Relaxed))
    publish_relaxed(c, cluster.arriving);
  else
    publish(c, cluster.arriving);
  advance_clock(*c.block);
  try_complete(c);
}

}  // namespace

bool cluster_wait(Context& c, Group& group) {
  Warp& w = *c.warp;
  u32 early = group.mask & ~w.cluster_arrived, phase = c.block->cluster->phase;
  if (early) fault(c, first_lane(early), "barrier.cluster.wait without an arrival before it");
  if (arrived_now(w, phase, group.mask)) {
    group.state = GroupState::AtBarrier;
    group.barrier = kClusterBarrier;
    return true;
  }
  empty_l1(*c.block);
  go_on(c, w, group.mask);
  group.pc++;
  return false;
}

void cluster_after_exit(Context& c, u32 mask) {
  Cluster& cluster = *c.block->cluster;
  cluster.missing -= u32(__builtin_popcount(mask & ~arrived_now(*c.warp, cluster.phase, mask)));
  if (cluster.live()) try_complete(c);
}

Handler cluster_handler(const Instruction& in) { return in.op == Op::ClusterArrive ? arrive : nullptr; }

}  // namespace ptxsim
