// cp.async.bulk and tensor copies (TMA, tiled mode). A copy is checked when it is issued and happens some
// time later, on behalf of an engine that is an agent of its own: loads report to an mbarrier, stores are
// waited for in groups.
#include "families.hpp"
#include "l2_model.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

// The 128 bytes that tensor_map() (tensor_map.py) makes in the place of a CUtensorMap
struct TensorMap {
  u64 magic, base;
  u32 element, rank, swizzle, unused, dim[5], box[5];
  u64 stride[4];
};
static_assert(sizeof(TensorMap) == 104);
constexpr u64 kTensorMapMagic = 0x50414d5458545021ull;

u32 swizzled(u32 address, u32 swizzle) {  // 0 none, 1: 32, 2: 64, 3: 128 bytes
  u32 mask = swizzle == 3 ? 7 : swizzle == 2 ? 3 : swizzle == 1 ? 1 : 0;
  return address ^ ((address >> 7 & mask) << 4);
}

TensorMap read_tensor_map(Context& c, int lane, u64 address, int rank) {
  Allocation* a = find_allocation(*c.machine, address);
  if (!a || address + 128 > a->base + a->size) fault(c, lane, "bad tensor-map address");
  TensorMap t;
  std::memcpy(&t, reinterpret_cast<const u8*>(a->host) + (address - a->base), sizeof t);
  if (t.magic != kTensorMapMagic) fault(c, lane, "the tensor map was not made by ptxsim.tensor_map()");
  if (int(t.rank) != rank)
    fault(c, lane, format("tensor map of rank %u used with %d coordinates", t.rank, rank));
  return t;
}

// Calls f(offset in shared memory, bytes to skip, address, bytes inside the tensor) for each row of the box.
template <class F>
void for_rows(const TensorMap& t, const s32* coord, F f) {
  u32 rows = 1, row_bytes = t.box[0] * t.element;
  for (u32 i = 1; i < t.rank; i++) rows *= t.box[i];
  s64 first = std::clamp<s64>(coord[0], 0, t.dim[0]),
      last = std::clamp<s64>(s64(coord[0]) + t.box[0], 0, t.dim[0]);
  for (u32 row = 0; row < rows; row++) {
    bool inside = last > first;
    u64 address = t.base + u64(first) * t.element;
    for (u32 i = 1, rest = row; i < t.rank; i++) {
      s64 index = s64(coord[i]) + rest % t.box[i];
      rest /= t.box[i];
      inside &= index >= 0 && index < s64(t.dim[i]);
      address += u64(index) * t.stride[i - 1];
    }
    f(row * row_bytes, u32(first - coord[0]) * t.element, address,
      inside ? u32(last - first) * t.element : 0);
  }
}

u32 box_bytes(const TensorMap& t) {
  u32 bytes = t.element;
  for (u32 i = 0; i < t.rank; i++) bytes *= t.box[i];
  return bytes;
}

void count(Context& c, const BulkCopy& copy, u64 global_bytes, u64 sectors, u32 targets) {
  c.counters->requests++;
  c.counters->bytes += global_bytes;
  c.counters->delivered += global_bytes * targets;
  c.counters->sectors += sectors;
  c.counters->wavefronts += targets * ((copy.smem + copy.bytes - 1) / 128 - copy.smem / 128 + 1);
  c.counters->ideal_wavefronts += targets * ((copy.bytes + 127) / 128);
}

// One contiguous piece of global memory: checks, sectors, L2. Returns the number of sectors.
u64 touch_global(Context& c, const BulkCopy& copy, u64 address, u32 bytes) {
  if (!bytes) return 0;
  int agent = copy.load ? c.warp->agent : c.block->bulk_global_agent();
  global_range(c, copy.lane, address, bytes, copy.load ? kRead : kWrite, agent);
  if (L2Model* l2 = c.machine->l2)
    for (u64 line = address >> 7; line <= (address + bytes - 1) >> 7; line++) l2->access(line, !copy.load);
  return ((address + bytes - 1) >> 5) - (address >> 5) + 1;
}

// The side in shared memory of a copy: of a load in `target`, where its mbarrier must be, too
void check_shared_side(Context& c, const BulkCopy& copy) {
  Block& b = *copy.target;
  check_shared(c, b, copy.lane, copy.smem, copy.bytes, (copy.load ? kWrite : kRead) | kAsyncProxy,
               c.block->bulk_agent());
  if (!copy.load) return check_proxy(c, copy.lane, copy.smem, copy.bytes);
  use_mbarrier(c, b, copy.lane, copy.mbar);
  for (u32 i = 0; i < copy.bytes; i++) b.in_flight[copy.smem + i]++;
}

void check_bounds(Context& c, const BulkCopy& copy, u64 address) {
  if (address + copy.bytes > c.machine->shared_bytes)
    fault(c, copy.lane,
          format("out-of-bounds shared range [%llu,+%u) in a bulk copy", (unsigned long long)address,
                 copy.bytes));
}

// Checks a copy, counts it and puts it in the queue: once for each of the `targets`, by rank in the cluster.
void issue(Context& c, BulkCopy copy, u32 targets) {
  Block& b = *c.block;
  b.bulk_used = true;
  check_bounds(c, copy, copy.smem);
  u32 n_targets = u32(__builtin_popcount(targets));
  if (copy.tensor) {
    const Instruction& in = c.machine->program[c.pc];
    TensorMap t = read_tensor_map(c, copy.lane, copy.global, in.aux);
    u64 total = 0, sectors = 0;
    for_rows(t, copy.coord, [&](u32, u32, u64 address, u32 bytes) {
      total += bytes;
      sectors += touch_global(c, copy, address, bytes);
    });
    count(c, copy, total, sectors, n_targets);
  } else if (copy.from_shared) {
    check_bounds(c, copy, copy.global);
    check_shared(c, b, copy.lane, u32(copy.global), copy.bytes, kRead | kAsyncProxy, b.bulk_agent());
    check_proxy(c, copy.lane, u32(copy.global), copy.bytes);
    note_visit(c, b, b.bulk_agent());  // its end is only known where the copy goes
    count(c, copy, copy.bytes, 0, n_targets);
  } else {
    count(c, copy, copy.bytes, touch_global(c, copy, copy.global, copy.bytes), n_targets);
  }
  copy.pc = c.pc;
  copy.warp = c.warp;
  copy.stamp = b.cluster->clock;
  copy.group = c.warp->bulk_groups[copy.lane];
  copy.done = copy.read_waited = false;
  for_lanes(targets, [&](int rank) {
    copy.target = b.cluster->blocks[size_t(rank)];
    if (!copy.target->live)
      fault(c, copy.lane,
            format("bulk copy into shared memory of block %d of the cluster, which has exited", rank));
    check_shared_side(c, copy);
    copy.delay = c.machine->seed ? c.machine->random() % 4 : 1;
    b.bulk.push_back(copy);
  });
  advance_clock(b);
}

u8* host_pointer(Context& c, u64 address) {
  Allocation* a = find_allocation(*c.machine, address);  // checked at issue
  return reinterpret_cast<u8*>(a->host) + (address - a->base);
}

void move_tensor(Context& c, const BulkCopy& copy) {
  Instruction in = c.machine->program[copy.pc];
  TensorMap t = read_tensor_map(c, copy.lane, copy.global, in.aux);
  u32 row_bytes = t.box[0] * t.element;
  u8* smem = copy.target->smem;
  for_rows(t, copy.coord, [&](u32 offset, u32 skip, u64 address, u32 bytes) {
    u8* global = bytes ? host_pointer(c, address) : nullptr;
    for (u32 i = 0; i < row_bytes; i += t.element) {
      u8* shared = smem + swizzled(copy.smem + offset + i, t.swizzle);
      bool inside = bytes && i >= skip && i < skip + bytes;
      if (!copy.load && inside)
        std::memcpy(global + (i - skip), shared, t.element);
      else if (copy.load && inside)
        std::memcpy(shared, global + (i - skip), t.element);
      else if (copy.load)
        std::memset(shared, 0, t.element);
    }
  });
}

void finish(Context& outer, BulkCopy& copy) {
  Context c = outer;
  Block &b = *c.block, &target = *copy.target;
  c.warp = copy.warp;
  c.pc = copy.pc;
  c.counters = &c.machine->counters[copy.pc];
  if (copy.tensor)
    move_tensor(c, copy);
  else if (copy.load)
    std::memcpy(target.smem + copy.smem,
                copy.from_shared ? b.smem + copy.global : host_pointer(c, copy.global), copy.bytes);
  else
    std::memcpy(host_pointer(c, copy.global), b.smem + copy.smem, copy.bytes);
  copy.done = true;
  c.machine->progress++;
  if (!copy.load) return;
  for (u32 i = 0; i < copy.bytes; i++) target.in_flight[copy.smem + i]--;
  if (c.machine->races) note_shared_write(target, copy.smem, int(copy.bytes), b.bulk_agent(), copy.pc);
  if (&target != &b) note_visit(c, target, b.bulk_agent());
  Mbarrier& bar = mbarrier_at(c, target, copy.lane, copy.mbar);
  bar.arriving.seen.raise(b.bulk_agent(), b.cluster->clock);
  bar.tx -= copy.bytes;
  mbarrier_try_complete(c, bar);
  advance_clock(b);
}

void drop_finished_loads(Block& b) {
  std::erase_if(b.bulk, [](const BulkCopy& copy) { return copy.load && copy.done; });
}

// Where a load goes: its place and its mbarrier's, in one block or (Multicast) at the same offsets in those
// of the mask, which is the last source. The ranks of the targets.
u32 place_load(Context& c, const Instruction& in, BulkCopy& copy, u32 smem, u32 mbar) {
  u32 lane = copy.lane, blocks = c.machine->cluster_blocks;
  SharedPlace to = shared_place(c, lane, smem), bar = shared_place(c, lane, mbar);
  copy.load = true;
  copy.smem = to.offset;
  copy.mbar = bar.offset;
  if (to.block != bar.block)
    fault(c, lane,
          format("bulk copy to block %d of the cluster, but its mbarrier is in block %d", to.block->rank,
                 bar.block->rank));
  if (!in.has(mod::Multicast)) return 1u << to.block->rank;
  u32 mask = u32(lane_source(c, in, in.n_src - 1, lane)) & 0xffff;
  if (!mask || mask >> blocks)
    fault(c, lane, format("multicast mask 0x%x for a cluster of %u blocks", mask, blocks));
  return mask;
}

// What is read from shared memory is the block's own.
u32 own_offset(Context& c, int lane, u32 address) {
  SharedPlace place = shared_place(c, lane, address);
  if (place.block != c.block) fault(c, lane, "the source of a bulk copy is shared memory of another block");
  return place.offset;
}

// Sources of a load: shared, global (FromShared: shared), bytes, mbarrier; of a store: global, shared, bytes.
// imm, imm2, aux: offsets of the two addresses and of the mbarrier
void bulk(Context& c, const Instruction& in) {
  bool load = in.op == Op::BulkLoad;
  for_lanes(c.mask, [&](int l) {
    u64 first = lane_source(c, in, 0, l) + u64(in.imm), second = lane_source(c, in, 1, l) + u64(in.imm2);
    BulkCopy copy{};
    copy.lane = u32(l);
    copy.from_shared = in.has(mod::FromShared);
    copy.global = copy.from_shared ? own_offset(c, l, u32(second)) : load ? second : first;
    copy.bytes = u32(lane_source(c, in, 2, l));
    copy.smem = load ? 0 : own_offset(c, l, u32(second));
    u32 targets = load ? place_load(c, in, copy, u32(first), u32(lane_source(c, in, 3, l)) + u32(in.aux))
                       : 1u << c.block->rank;
    if (copy.global & 15 || copy.bytes & 15 || copy.smem & 15 || !copy.bytes)
      fault(
          c, l,
          format("bulk copy: addresses and size must be multiples of 16 (global 0x%llx, shared %u, %u bytes)",
                 (unsigned long long)copy.global, copy.smem, copy.bytes));
    issue(c, copy, targets);
  });
}

// Sources of a load: shared, tensor map, mbarrier, coordinates; of a store: tensor map, shared, coordinates.
// aux: rank
void tensor(Context& c, const Instruction& in) {
  bool load = in.op == Op::TensorLoad;
  for_lanes(c.mask, [&](int l) {
    BulkCopy copy{};
    copy.tensor = true;
    copy.lane = u32(l);
    copy.smem = u32(lane_source(c, in, load ? 0 : 1, l)) + u32(in.imm);
    copy.global = lane_source(c, in, load ? 1 : 0, l);
    u32 targets = 1u << c.block->rank;
    if (load) targets = place_load(c, in, copy, copy.smem, u32(lane_source(c, in, 2, l)) + u32(in.imm2));
    for (int i = 0; i < in.aux; i++) copy.coord[i] = s32(lane_source(c, in, (load ? 3 : 2) + i, l));
    if (copy.smem & 127)
      fault(c, l, format("TMA shared address must be 128-byte aligned, not %u", copy.smem));
    copy.bytes = box_bytes(read_tensor_map(c, l, copy.global, in.aux));
    issue(c, copy, targets);
  });
}

void commit(Context& c, const Instruction&) {
  for_lanes(c.mask, [&](int l) { c.warp->bulk_groups[l]++; });
}

// imm: groups that may stay; ReadOnly: the sources have been read, the writes need not be visible
void wait(Context& c, const Instruction& in) {
  Block& b = *c.block;
  auto awaited = [&](const BulkCopy& copy) {
    return !copy.load && copy.warp == c.warp && c.mask >> copy.lane & 1 &&
           copy.group + u32(in.imm) < c.warp->bulk_groups[copy.lane];
  };
  VectorClock& seen = c.warp->sync.seen;
  for (BulkCopy& copy : b.bulk) {
    if (!awaited(copy)) continue;
    if (!copy.done) finish(c, copy);
    copy.read_waited = true;
    seen.raise(b.bulk_agent(), copy.stamp);
    if (!in.has(mod::ReadOnly)) seen.raise(b.bulk_global_agent(), copy.stamp);
  }
  if (!in.has(mod::ReadOnly)) std::erase_if(b.bulk, awaited);
}

}  // namespace

bool bulk_step(Context& c) {
  bool any = false;
  for (BulkCopy& copy : c.block->bulk) {
    if (copy.done) continue;
    if (copy.delay) {
      copy.delay--;
      continue;
    }
    finish(c, copy);
    any = true;
  }
  drop_finished_loads(*c.block);
  return any;
}

bool bulk_force_one(Context& c) {
  for (BulkCopy& copy : c.block->bulk)
    if (!copy.done) {
      finish(c, copy);
      drop_finished_loads(*c.block);
      return true;
    }
  return false;
}

void bulk_finish(Context& c, bool exiting) {
  for (BulkCopy& copy : c.block->bulk) {
    if (exiting && !copy.read_waited && !copy.load) {
      Context issuer = c;
      issuer.warp = copy.warp;
      issuer.pc = copy.pc;
      report(issuer, ReportKind::AsyncHazard, copy.lane, 0,
             "the block exits without waiting (cp.async.bulk.wait_group) for this bulk store to read shared "
             "memory");
    }
    if (exiting && copy.load && !copy.done && copy.target == c.block) {
      Context issuer = c;
      issuer.warp = copy.warp;
      issuer.pc = copy.pc;
      report(issuer, ReportKind::AsyncHazard, copy.lane, 0,
             "the block exits while this bulk load is in flight");
    }
    if (!copy.done) finish(c, copy);
  }
  c.block->bulk.clear();
}

void bulk_drop_target(Context& c) {
  for (Block* other : c.block->cluster->blocks) {
    if (other == c.block) continue;
    std::erase_if(other->bulk, [&](const BulkCopy& copy) {
      if (copy.done || copy.target != c.block) return false;
      report(
          c, ReportKind::AsyncHazard, -1, copy.pc,
          format(
              "the block exits while a bulk copy of block %u (line %d) into its shared memory is in flight",
              other->number, line_of(c, copy.pc)));
      return true;
    });
  }
}

Handler bulk_copy_handler(const Instruction& in) {
  switch (in.op) {
    case Op::BulkLoad:
    case Op::BulkStore:
      return bulk;
    case Op::TensorLoad:
    case Op::TensorStore:
      return tensor;
    case Op::BulkCommit:
      return commit;
    case Op::BulkWait:
      return wait;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
