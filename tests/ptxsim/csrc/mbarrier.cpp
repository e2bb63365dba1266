// mbarrier: phases of arrivals and of bytes to come.
#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

constexpr u32 kLargestCount = (1u << 20) - 1;

// The token of an arrival: the phase above, the pending count before it below.
u64 token(const Mbarrier& b) { return u64(b.phase) << 32 | b.pending; }

// Arrivals and waits must be ordered after the initialisation.
void check_use(Context& c, u32 mask, const u64* address) {
  u32 previous = ~0u;
  for_lanes(mask, [&](int l) {
    u32 x = u32(address[l]);
    if (x == previous) return;
    previous = x;
    mbarrier_at(c, l, x);
    check_shared(c, l, x, 8, kRead | kAtomic, c.warp->id);
  });
}

void init(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for_lanes(c.mask, [&](int l) {
    u32 x = u32(address[l]), count = u32(lane_source(c, in, 1, l));
    if (x & 7 || x + 8 > c.machine->shared_bytes)
      fault(c, l, format("bad mbarrier address: shared byte %u", x));
    if (count == 0 || count > kLargestCount) fault(c, l, format("mbarrier.init with a count of %u", count));
    Mbarrier b;
    b.expected = b.pending = count;
    check_shared(c, l, x, 8, kWrite, c.warp->id);
    c.block->mbarriers[x] = b;
  });
}

void inval(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for_lanes(c.mask, [&](int l) {
    mbarrier_at(c, l, u32(address[l]));
    c.block->mbarriers.erase(u32(address[l]));
  });
}

// Sources: address, and a count or (ExpectTx) a number of bytes. Drop: the thread also leaves later phases.
void arrive(Context& c, const Instruction& in) {
  c.machine->progress++;
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  check_use(c, c.mask, address);
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = mbarrier_at(c, l, u32(address[l]));
    u32 value = in.has(mod::HasOperand) ? u32(lane_source(c, in, 1, l)) : 1;
    u32 count = in.has(mod::ExpectTx) ? 1 : value;
    if (in.n_dst) set_lane(c, operand(c, in, 0), l, token(b));
    if (in.has(mod::ExpectTx)) b.tx += value;
    if (b.pending < count) fault(c, l, "mbarrier arrive: more arrivals than expected in this phase");
    publish(c, b.arriving);
    b.pending -= count;
    if (in.has(mod::Drop)) b.expected -= count;
    mbarrier_try_complete(c, b);
  });
  advance_clock(*c.block);
}

// mbarrier.expect_tx and, with Subtract, mbarrier.complete_tx
void change_tx(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  check_use(c, c.mask, address);
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = mbarrier_at(c, l, u32(address[l]));
    s64 bytes = s64(lane_source(c, in, 1, l));
    b.tx += in.has(mod::Subtract) ? -bytes : bytes;
    mbarrier_try_complete(c, b);
  });
}

// Sources: address and a token, or (Parity) the parity of the phase that must be over
void wait(Context& c, const Instruction& in) {
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  check_use(c, c.mask, address);
  u32 over = 0;
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = mbarrier_at(c, l, u32(address[l]));
    u64 state = lane_source(c, in, 1, l);
    u32 phase = in.has(mod::Parity) ? u32(state) & 1 : u32(state >> 32) & 1;
    if ((b.phase & 1) == phase) return;
    c.machine->progress++;
    over |= 1u << l;
    absorb(c, b.completed);
  });
  set_predicate(c, operand(c, in, 0), over);
  c.block->polls++;
  if (over != c.mask) c.warp->yielding = true;
}

void pending_count(Context& c, const Instruction& in) {
  for_lanes(c.mask, [&](int l) { set_lane(c, operand(c, in, 0), l, u32(lane_source(c, in, 0, l))); });
}

}  // namespace

Mbarrier& mbarrier_at(Context& c, int lane, u32 address) {
  auto it = c.block->mbarriers.find(address);
  if (it == c.block->mbarriers.end())
    fault(c, lane,
          format("mbarrier operation on shared byte %u, which holds no initialised mbarrier", address));
  return it->second;
}

void mbarrier_try_complete(Context& c, Mbarrier& b) {
  if (b.pending || b.tx) return;
  b.phase++;
  b.pending = b.expected;
  b.completed = b.arriving;
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
