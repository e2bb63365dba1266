// mbarrier: phases of arrivals and of bytes to come.
#include <cstdlib>

#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

constexpr u32 kLargestCount = (1u << 20) - 1;

// The token of an arrival: the phase above, the pending count before it below.
u64 token(const Mbarrier& b) { return u64(b.phase) << 32 | b.pending; }

// Where an operand's mbarrier is; only arrivals and changes of the count of bytes may name another block's.
SharedPlace place_of(Context& c, int lane, u64 address) {
  SharedPlace place = shared_place(c, lane, u32(address));
  const Instruction& in = c.machine->program[c.pc];
  bool anywhere = in.op == Op::MbarrierTx || (in.op == Op::MbarrierArrive && !in.n_dst);
  if (place.block != c.block && !anywhere)
    fault(c, lane, "this form of mbarrier operation is for the block's own mbarriers only");
  return place;
}

// The mbarriers that lanes use
class Uses {
 public:
  Uses(Context& c, const Instruction& in) : c_(c) { addresses(c, source_code(c, in, 0), in.imm, address_); }

  Mbarrier& operator[](int lane) {
    if (bar_ && address_[lane] == address_[last_]) return *bar_;  // lanes mostly use the same one
    last_ = lane;
    place_ = place_of(c_, lane, address_[lane]);
    bar_ = &use_mbarrier(c_, *place_.block, lane, place_.offset);
    return *bar_;
  }
  const Block& owner() const { return *place_.block; }  // of the last one

 private:
  Context& c_;
  u64 address_[32];
  Mbarrier* bar_ = nullptr;
  SharedPlace place_{};
  int last_ = 0;
};

void init(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for_lanes(c.mask, [&](int l) {
    u32 x = place_of(c, l, address[l]).offset, count = u32(lane_source(c, in, 1, l));
    if (x & 7 || u64(x) + 8 > c.machine->shared_bytes)
      fault(c, l, format("bad mbarrier address: shared byte %u", x));
    if (count == 0 || count > kLargestCount) fault(c, l, format("mbarrier.init with a count of %u", count));
    Mbarrier b;
    b.expected = b.pending = count;
    b.init_agent = c.warp->agent;
    b.init_stamp = c.block->cluster->clock;
    check_shared(c, *c.block, l, x, 8, kWrite, c.warp->agent);
    c.block->mbarriers[x] = b;
  });
}

void inval(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for_lanes(c.mask, [&](int l) {
    u32 x = place_of(c, l, address[l]).offset;
    mbarrier_at(c, *c.block, l, x);
    c.block->mbarriers.erase(x);
  });
}

void change_bytes(Context& c, int lane, Mbarrier& b, s64 by) {
  b.tx += by;
  if (std::llabs(b.tx) > s64(kLargestCount))
    fault(c, lane, format("an mbarrier's count of bytes to come becomes %lld", (long long)b.tx));
}

// What the thread has done becomes visible to those who wait: in its own block, or in another one if both
// name the scope of the cluster.
void publish_arrival(Context& c, const Instruction& in, const Block& owner, Mbarrier& b) {
  if (&owner == c.block) return publish(c, b.arriving);
  if (!b.arriving_remote) b.arriving_remote.emplace();
  if (in.has(mod::ClusterScope) && !in.has(mod::Relaxed))
    publish(c, *b.arriving_remote);
  else
    publish_relaxed(c, *b.arriving_remote);
}

// Sources: address, and a count or (ExpectTx) a number of bytes. Drop: the thread also leaves later phases.
void arrive(Context& c, const Instruction& in) {
  c.machine->progress++;
  Uses uses(c, in);
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = uses[l];
    u32 value = in.has(mod::HasOperand) ? u32(lane_source(c, in, 1, l)) : 1;
    u32 count = in.has(mod::ExpectTx) ? 1 : value;
    if (in.n_dst) set_lane(c, operand(c, in, 0), l, token(b));
    if (in.has(mod::ExpectTx)) change_bytes(c, l, b, value);
    if (b.pending < count) fault(c, l, "mbarrier arrive: more arrivals than expected in this phase");
    publish_arrival(c, in, uses.owner(), b);
    b.pending -= count;
    if (in.has(mod::Drop)) b.expected -= count;
    mbarrier_try_complete(c, b);
  });
  advance_clock(*c.block);
}

// mbarrier.expect_tx and, with Subtract, mbarrier.complete_tx
void change_tx(Context& c, const Instruction& in) {
  Uses uses(c, in);
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = uses[l];
    s64 bytes = s64(lane_source(c, in, 1, l));
    change_bytes(c, l, b, in.has(mod::Subtract) ? -bytes : bytes);
    mbarrier_try_complete(c, b);
  });
}

// Sources: address and a token, or (Parity) the parity of the phase that must be over
void wait(Context& c, const Instruction& in) {
  Uses uses(c, in);
  u32 over = 0;
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = uses[l];
    u64 state = lane_source(c, in, 1, l);
    u32 phase = in.has(mod::Parity) ? u32(state) & 1 : u32(state >> 32) & 1;
    if ((b.phase & 1) == phase) return;
    c.machine->progress++;
    over |= 1u << l;
    absorb(c, b.completed);
    if (in.has(mod::ClusterScope) && !in.has(mod::Relaxed)) empty_l1(*c.block);
    if (!b.completed_remote) return;
    if (in.has(mod::ClusterScope) && !in.has(mod::Relaxed))
      absorb(c, *b.completed_remote);
    else
      c.warp->sync.reached.join(b.completed_remote->reached);
  });
  set_predicate(c, operand(c, in, 0), over);
  c.block->polls++;
  if (over != c.mask) c.warp->yielding = true;
}

void pending_count(Context& c, const Instruction& in) {
  for_lanes(c.mask, [&](int l) { set_lane(c, operand(c, in, 0), l, u32(lane_source(c, in, 0, l))); });
}

}  // namespace

Mbarrier& mbarrier_at(Context& c, Block& b, int lane, u32 address) {
  auto it = b.mbarriers.find(address);
  if (it == b.mbarriers.end()) {
    std::string where = &b == c.block ? "" : format(" of block %u", b.number);
    fault(c, lane,
          format("mbarrier operation on shared byte %u%s, which holds no initialised mbarrier", address,
                 where.c_str()));
  }
  return it->second;
}

// Uses must be ordered after the initialisation, which the cluster knows of once it was fenced and a barrier
// of any kind has followed.
Mbarrier& use_mbarrier(Context& c, Block& b, int lane, u32 address) {
  Mbarrier& bar = mbarrier_at(c, b, lane, address);
  const SyncState& sync = c.warp->sync;
  u32 known = std::max(sync.seen[bar.init_agent], sync.reached[bar.init_agent]);
  if (!bar.init_fenced || bar.init_stamp > known)
    check_shared(c, b, lane, address, 8, kRead | kAtomic, c.warp->agent);
  else if (&b != c.block)
    note_visit(c, b, c.warp->agent);
  return bar;
}

void mbarrier_try_complete(Context& c, Mbarrier& b) {
  if (b.pending || b.tx) return;
  b.phase++;
  b.pending = b.expected;
  b.completed = b.arriving;
  b.completed_remote = b.arriving_remote;
  c.machine->progress++;
}

Handler mbarrier_handler(const Instruction& in) {
  switch (in.op) {
    case Op::MbarrierInit:
      return init;
    case Op::MbarrierInval:
      return inval;
    case Op::MbarrierArrive:
      return arrive;
    case Op::MbarrierTx:
      return change_tx;
    case Op::MbarrierWait:
      return wait;
    case Op::MbarrierPending:
      return pending_count;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
