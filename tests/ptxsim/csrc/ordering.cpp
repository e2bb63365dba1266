// Which accesses to global memory are ordered, within a cluster and between clusters, after the PTX memory
// model. A block that is in no cluster is one of its own.
//
// Within: barriers and mbarriers (vector clocks of stamps, one entry a warp). Between: a release (a
// .release/.acq_rel access, or a GPU-scope fence and then any strong write) publishes a snapshot of the
// releasing cluster's clock at an address; an acquire that reads this address (.acquire/.acq_rel, or a
// relaxed read and then a fence) takes it over. Lanes of one warp count as ordered.
#include "memory.hpp"

namespace ptxsim {

namespace {

u32 new_snapshot(Machine& m, const VectorClock& clock) {
  m.snapshots.push_back(clock);
  return u32(m.snapshots.size() - 1);
}

u32 join_snapshots(Machine& m, u32 a, u32 b) {
  if (a == b || m.snapshots[a].covers(m.snapshots[b])) return a;
  if (m.snapshots[b].covers(m.snapshots[a])) return b;
  VectorClock both = m.snapshots[a];
  both.join(m.snapshots[b]);
  return new_snapshot(m, both);
}

const VectorClock* find_known(Machine& m, const Knowledge& k, u32 cluster) {
  if (!k) return nullptr;
  auto it = std::lower_bound(k->begin(), k->end(), cluster,
                             [](const KnownCluster& x, u32 y) { return x.cluster < y; });
  return it != k->end() && it->cluster == cluster ? &m.snapshots[it->snapshot] : nullptr;
}

// Is `stamp` of `agent` in `cluster` ordered before what the warp does now? lenient: relaxed observations
// count too.
bool is_ordered(Context& c, u32 cluster, int agent, u32 stamp, int self, bool lenient) {
  const SyncState& sync = c.warp->sync;
  if (cluster == c.block->cluster->number) {
    if (agent == self || agent == c.warp->agent || stamp <= sync.seen[agent]) return true;
    if (c.machine->cluster_blocks == 1) return false;
  }
  const VectorClock* known = find_known(*c.machine, sync.acquired, cluster);
  if (known && stamp <= (*known)[agent]) return true;
  known = lenient ? find_known(*c.machine, sync.pending, cluster) : nullptr;
  return known && stamp <= (*known)[agent];
}

std::string whose(Context& c, u32 cluster, int agent) {
  if (cluster == c.block->cluster->number) return agent_name(*c.block, agent);
  const Machine& m = *c.machine;
  u32 id[3];
  block_index(m, cluster, u32(agent / c.block->agents()), id);
  return format("%s of block %u",
                agent_name(*c.block, c.block->first_agent + agent % c.block->agents()).c_str(),
                id[0] + m.grid[0] * (id[1] + m.grid[1] * id[2]));
}

// Why an access of another warp is not ordered
std::string missing_order(Context& c, u32 cluster, int agent, u32 stamp) {
  if (cluster == c.block->cluster->number)
    return c.block->owns(agent) ? "with no barrier in between" : "with no barrier of the cluster in between";
  Machine& m = *c.machine;
  const SyncState& sync = c.warp->sync;
  const VectorClock* pending = find_known(m, sync.pending, cluster);
  if (pending && stamp <= (*pending)[agent])
    return "observed through a relaxed access only: a fence (__threadfence) must follow it before the data "
           "are read";
  if (pending || find_known(m, sync.acquired, cluster))
    return "and what that block released since does not cover it: no barrier between it and the fence or "
           "release";
  if (c.block->unreleased_pc != ~0u)
    return format("which is not released: no fence (__threadfence) before the arrival at line %d",
                  line_of(c, c.block->unreleased_pc));
  return "with nothing that orders the blocks";
}

// A warp's stores by one instruction at one time share a record.
u32 record_write(Context& c, int agent, bool strong) {
  Machine& m = *c.machine;
  const Cluster& cluster = *c.block->cluster;
  auto append = [&] {
    m.write_records.push_back({cluster.number, cluster.clock, c.pc, u16(agent), strong, m.instructions});
    return u32(m.write_records.size() - 1);
  };
  Warp& w = *c.warp;
  if (agent != w.agent) return append();
  if (w.recent_record >= w.records.size() || w.records[w.recent_record].first != c.pc) {
    auto found =
        std::find_if(w.records.begin(), w.records.end(), [&](auto& entry) { return entry.first == c.pc; });
    w.recent_record = size_t(found - w.records.begin());
    if (found == w.records.end()) w.records.push_back({c.pc, append()});
  }
  u32& number = w.records[w.recent_record].second;
  if (m.write_records[number].stamp != cluster.clock) number = append();
  m.write_records[number].time = m.instructions;
  return number;
}

void report_race(Context& c, const Allocation& a, u64 address, int lane, bool write, const char* other,
                 u32 cluster, int agent, u32 pc, u32 stamp) {
  std::string where = a.id >= 0    ? format("buffer #%d", a.id)
                      : a.id == -1 ? "a module variable"
                                   : "a registered buffer";
  report(c, ReportKind::GlobalRace, lane, pc,
         format("%s of %s + %llu, which %s %s at line %d, %s", write ? "write" : "read", where.c_str(),
                (unsigned long long)(address - a.base), whose(c, cluster, agent).c_str(), other,
                line_of(c, pc), missing_order(c, cluster, agent, stamp).c_str()));
}

void note_reader(Context& c, ReadRecord& record, u32 bytes, int agent) {
  u32 me = c.block->cluster->number + 1, now = c.block->cluster->clock;
  Reader& last = record.last;
  if (last.cluster1 != me || last.agent != agent) {
    record.before = last;
    last = {me, now, c.pc, u16(bytes), u16(agent)};
  } else if (last.stamp != now) {
    last = {me, now, c.pc, u16(bytes), u16(agent)};
  } else {
    last.bytes |= u16(bytes);
    last.pc = c.pc;
  }
}

// What the blocks of one cluster released to each other through global memory orders all else, too.
void take_from_own_cluster(Context& c) {
  if (c.machine->cluster_blocks == 1) return;
  SyncState& sync = c.warp->sync;
  if (const VectorClock* own = find_known(*c.machine, sync.acquired, c.block->cluster->number))
    sync.seen.join(*own);
}

}  // namespace

Knowledge merge(Machine& m, const Knowledge& a, const Knowledge& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto out = std::make_shared<std::vector<KnownCluster>>();
  out->reserve(a->size() + b->size());
  auto x = a->begin(), y = b->begin();
  while (x != a->end() && y != b->end()) {
    if (x->cluster < y->cluster)
      out->push_back(*x++);
    else if (y->cluster < x->cluster)
      out->push_back(*y++);
    else {
      out->push_back({x->cluster, join_snapshots(m, x->snapshot, y->snapshot)});
      x++, y++;
    }
  }
  out->insert(out->end(), x, a->end());
  out->insert(out->end(), y, b->end());
  return out;
}

static void join(Machine& m, SyncState& into, const SyncState& from) {
  into.seen.join(from.seen);
  into.fenced.join(from.fenced);
  into.proxied.join(from.proxied);
  into.waited |= from.waited;
  into.acquired = merge(m, into.acquired, from.acquired);
  into.pending = merge(m, into.pending, from.pending);
  into.fenced_known = merge(m, into.fenced_known, from.fenced_known);
  if (!m.clustered) return;
  into.cluster_fenced.join(from.cluster_fenced);
  into.reached.join(from.reached);
}

void publish(Context& c, SyncState& into) {
  join(*c.machine, into, c.warp->sync);
  into.seen.raise(c.warp->agent, c.block->cluster->clock);
}

void publish_relaxed(Context& c, SyncState& into) {
  const SyncState& sync = c.warp->sync;
  into.seen.join(sync.cluster_fenced);
  into.reached.join(sync.reached);
  into.reached.join(view_of(c));
}

void absorb(Context& c, const SyncState& from) { join(*c.machine, c.warp->sync, from); }

void fence_gpu(Context& c) {
  SyncState& sync = c.warp->sync;
  empty_l1(*c.block);
  sync.acquired = merge(*c.machine, sync.acquired, sync.pending);
  sync.pending = nullptr;
  take_from_own_cluster(c);
  sync.fenced.join(view_of(c));
  sync.fenced_known = sync.acquired;
}

void synchronise(Context& c, const Instruction& in, u64 address, bool reads, bool writes) {
  if (!c.machine->races || !in.has(mod::GpuScope)) return;
  bool window = address >> 48 == kSharedWindow >> 48 || address >> 48 == kLocalWindow >> 48;
  if (window || in.space() == Space::Shared || in.space() == Space::Local)
    return;  // no business of other blocks
  Machine& m = *c.machine;
  SyncState& sync = c.warp->sync;
  auto it = m.released.find(address >> 2);
  Knowledge found = it == m.released.end() ? nullptr : it->second;
  if (reads && in.has(mod::Acquire)) empty_l1(*c.block);
  if (reads && found) {
    Knowledge& into = in.has(mod::Acquire) ? sync.acquired : sync.pending;
    into = merge(m, into, found);
    if (in.has(mod::Acquire)) take_from_own_cluster(c);
  }
  if (!writes) return;
  Knowledge out = reads ? found : nullptr;  // a read-modify-write carries on what it read
  bool release = in.has(mod::Release);
  const VectorClock clock = release ? view_of(c) : sync.fenced;
  if (!release && clock.empty()) {
    c.block->unreleased_pc = c.pc;
  } else {
    KnownCluster known{c.block->cluster->number, new_snapshot(m, clock)};
    auto own = std::make_shared<std::vector<KnownCluster>>(1, known);
    out = merge(m, merge(m, out, release ? sync.acquired : sync.fenced_known), own);
    if (release) advance_clock(*c.block);
  }
  if (out)
    m.released[address >> 2] = out;
  else if (it != m.released.end())
    m.released.erase(it);
}

// address..+size lies within 16 aligned bytes, or is 32 aligned ones
void check_global_order(Context& c, Allocation& a, u64 address, int size, int lane, int flags, int agent,
                        bool written_before) {
  if (size > 16) {
    check_global_order(c, a, address, 16, lane, flags, agent, written_before);
    check_global_order(c, a, address + 16, size - 16, lane, flags, agent, written_before);
    return;
  }
  Machine& m = *c.machine;
  bool strong = flags & (kAtomic | kStrongAccess), writes = flags & kWrite;
  u32* owner = reinterpret_cast<u32*>(a.writes) + (address - a.base);
  ReadRecord& readers = reinterpret_cast<ReadRecord*>(a.readers)[(address >> 4) - (a.base >> 4)];
  const u8* host = reinterpret_cast<const u8*>(a.host) + (address - a.base);
  const u32 bytes = ((1u << size) - 1) << (address & 15);

  if (written_before) {
    u32 checked = 0;  // neighbours mostly come from one store
    for (int i = 0; i < size; i++) {
      if (!owner[i] || owner[i] == checked) continue;
      const WriteRecord& w = m.write_records[owner[i]];
      if ((strong && w.strong) || is_ordered(c, w.cluster, w.agent, w.stamp, agent, strong)) {
        checked = owner[i];
        continue;
      }
      if (writes && stores_same_byte(c, lane, i, host[i])) continue;
      report_race(c, a, address + i, lane, writes, "wrote", w.cluster, w.agent, w.pc, w.stamp);
      break;
    }
  }
  if (writes) {
    if (!strong)
      for (const Reader* r : {&readers.last, &readers.before}) {
        u32 common = r->cluster1 ? r->bytes & bytes : 0;
        if (!common || is_ordered(c, r->cluster1 - 1, r->agent, r->stamp, agent, false)) continue;
        int i = first_lane(common) - int(address & 15);
        if (stores_same_byte(c, lane, i, host[i])) continue;
        report_race(c, a, address + i, lane, true, "read", r->cluster1 - 1, r->agent, r->pc, r->stamp);
        break;
      }
    u32 number = record_write(c, agent, strong);
    for (int i = 0; i < size; i++) owner[i] = number;
  } else if (!strong) {
    note_reader(c, readers, bytes, agent);
  }
}

}  // namespace ptxsim
