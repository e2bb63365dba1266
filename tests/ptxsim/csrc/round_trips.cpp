// How many accesses of global memory wait for each other: an in-order scoreboard on which a load takes one
// round trip and everything else no time.
#include "memory.hpp"
#include "scheduler.hpp"

namespace ptxsim {

namespace {

bool is_global(Context& c, const Instruction& in) {
  if (in.space() == Space::Global) return true;
  if (in.space() != Space::Generic) return false;
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  u64 first = address[first_lane(c.mask)];
  if (first & (kSharedWindow | kLocalWindow)) return false;
  const Allocation* a = find_allocation(*c.machine, first);
  return a && a->kind == kReadWrite;  // parameters and constants have caches of their own
}

void wait_for_copies(RoundTrips& t, size_t newest_kept) {
  if (t.groups.size() <= newest_kept) return;
  auto end = t.groups.end() - s64(newest_kept);
  t.now = std::max(t.now, *std::max_element(t.groups.begin(), end));
  t.groups.erase(t.groups.begin(), end);
}

}  // namespace

void count_trips(Context& c, const Instruction& in) {
  RoundTrips& t = c.warp->trips;
  const s32* code = c.operands + in.operands;
  auto ready = [&](s32 register_offset) -> u16& { return t.ready[size_t(register_offset & ~3) / 4]; };
  if (in.op == Op::Mov && in.n_src == 1 && in.n_dst == 1 && code[0] >= 0) {  // ptxas gives both one register
    ready(code[0]) = code[1] >= 0 ? ready(code[1]) : u16(0);
    return;
  }
  for (int k = in.n_dst; k < in.n_dst + in.n_src; k++)
    if (code[k] >= 0) t.now = std::max<u32>(t.now, ready(code[k]));
  if (in.guard >= 0) t.now = std::max<u32>(t.now, ready(in.guard));
  bool loads = false;
  switch (in.op) {
    case Op::Ld:
    case Op::Atom:
      loads = is_global(c, in) && !(in.has(mod::Strong) && t.polled == c.pc);
      if (in.has(mod::Strong)) t.polled = c.pc;
      break;
    case Op::St:
    case Op::Red:
      if (is_global(c, in)) t.stores = std::max(t.stores, t.now + 1);
      break;
    case Op::Fence:
      if (in.has(mod::GpuScope)) t.now = std::max(t.now, t.stores);
      break;
    case Op::CpAsync:
      t.copies = std::max(t.copies, t.now + 1);
      break;
    case Op::CpAsyncCommit:
      t.groups.push_back(t.copies);
      t.copies = 0;
      break;
    case Op::CpAsyncWait:
      wait_for_copies(t, in.has(mod::WaitAll) ? 0 : size_t(in.imm));
      if (in.has(mod::WaitAll)) t.now = std::max(t.now, t.copies);
      break;
    case Op::Mma:
    case Op::WmmaMma:
    case Op::Wgmma:
      if (!t.multiplied) t.first_product = t.now;
      t.multiplied = true;
      t.last_product = t.now;
      break;
    case Op::Nop:
      // griddepcontrol.wait: all that came before went on beside the end of the launch before.
      if (in.aux) t = RoundTrips{std::vector<u16>(t.ready.size(), 0)};
      break;
    default:
      break;
  }
  for (int k = 0; k < in.n_dst; k++)
    if (code[k] >= 0) ready(code[k]) = u16(t.now + loads);
}

void finish_trips(Machine& m, const Warp& w) {
  const RoundTrips& t = w.trips;
  m.trips_before = std::max(m.trips_before, t.multiplied ? t.first_product : t.now);
  if (t.multiplied) m.trips_after = std::max(m.trips_after, t.now - t.last_product);
}

}  // namespace ptxsim
