// cp.async: data are read at issue and reach shared memory when the thread waits for their group, never
// before.
#include <immintrin.h>

#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

void add_in_flight(Block& b, u32 address, int size, s8 delta) {
  u8* p = b.in_flight + address;
  if (size == 16) {
    auto* v = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(v, _mm_add_epi8(_mm_loadu_si128(v), _mm_set1_epi8(delta)));
    return;
  }
  for (int i = 0; i < size; i++) p[i] += u8(delta);
}

// Copies of fewer bytes than the full size, the rest being zeros
void copy_partial(Context& c, CpAsyncCopy& copy, int lane, u64 from, u32 bytes, int flags) {
  if (from & (copy.size - 1)) fault(c, lane, "misaligned cp.async source");
  for (u32 i = 0; i < bytes; i++) {
    u64 address[32];
    u8* pointer[32];
    address[lane] = from + i;
    global_access(c, address, 1u << lane, 1, flags | kUncounted, pointer);
    copy.data[lane][i] = *pointer[lane];
  }
}

// Sources: shared address, global address, and the number of bytes to read or a predicate that says to read
// none. imm, imm2: offsets of the two addresses; aux: bytes to write
void cp_async(Context& c, const Instruction& in) {
  u64 to[32], from[32];
  u8* pointer[32];
  addresses(c, source_code(c, in, 0), in.imm, to);
  addresses(c, source_code(c, in, 1), in.imm2, from);
  c.warp->copies.emplace_back();
  CpAsyncCopy& copy = c.warp->copies.back();
  copy.mask = c.mask;
  copy.pc = c.pc;
  copy.size = in.aux;
  u32 whole = 0, partial = 0, bytes[32];
  u32 ignored = in.has(mod::IgnoreSource) ? predicate_source(c, in, 2) : 0;
  for (int l = 0; l < 32; l++) {
    copy.dst[l] = u32(to[l]);
    copy.group[l] = c.warp->copy_groups[l];
    if (!(c.mask >> l & 1)) continue;
    bytes[l] = ignored >> l & 1 ? 0 : in.has(mod::HasSize) ? u32(lane_source(c, in, 2, l)) : u32(in.aux);
    if (bytes[l] > u32(in.aux))
      fault(c, l, format("cp.async src-size %u larger than cp-size %d", bytes[l], in.aux));
    if (bytes[l] == u32(in.aux))
      whole |= 1u << l;
    else if (bytes[l])
      partial |= 1u << l;
  }
  const int flags = kRead | (in.has(mod::ThroughL1) ? kThroughL1 : 0);
  if (whole) global_access(c, from, whole, in.aux, flags, pointer);
  if (whole != c.mask) std::memset(copy.data, 0, sizeof copy.data);
  for_lanes(whole, [&](int l) { std::memcpy(copy.data[l], pointer[l], in.aux); });
  for_lanes(partial, [&](int l) { copy_partial(c, copy, l, from[l], bytes[l], flags); });
  if (partial && !whole) count_global_request(c, from, partial, in.aux);
  shared_access(c, copy.dst, c.mask, in.aux, kWrite | kAsync | kUncounted, nullptr);
  count_wavefronts(c, copy.dst, c.mask, in.aux);
  for_lanes(c.mask, [&](int l) { add_in_flight(*c.block, copy.dst[l], in.aux, 1); });
}

void commit(Context& c, const Instruction&) {
  for_lanes(c.mask, [&](int l) { c.warp->copy_groups[l]++; });
}

void wait(Context& c, const Instruction& in) {
  complete_copies(c, c.mask, u32(in.imm), in.has(mod::WaitAll));
}

// cp.async.mbarrier.arrive: the thread's copies complete, and then it arrives. Without .noinc the pending
// count is raised first, so the arrival cancels out.
void arrive_after_copies(Context& c, const Instruction& in) {
  complete_copies(c, c.mask, 0, true);
  u64 address[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for_lanes(c.mask, [&](int l) {
    Mbarrier& b = mbarrier_at(c, *c.block, l, u32(address[l]));
    publish(c, b.arriving);
    if (in.has(mod::NoIncrement)) {
      if (!b.pending) fault(c, l, "mbarrier arrive: more arrivals than expected in this phase");
      b.pending--;
    }
    mbarrier_try_complete(c, b);
  });
  advance_clock(*c.block);
}

}  // namespace

// Completes the active lanes' copies: all, or the groups older than the newest `newest_kept`.
void complete_copies(Context& c, u32 mask, u32 newest_kept, bool all) {
  Warp& w = *c.warp;
  Block& b = *c.block;
  for (CpAsyncCopy& copy : w.copies) {
    for_lanes(copy.mask & mask, [&](int l) {
      if (!all && copy.group[l] + newest_kept >= w.copy_groups[l]) return;
      std::memcpy(b.smem + copy.dst[l], copy.data[l], copy.size);
      add_in_flight(b, copy.dst[l], copy.size, -1);
      if (c.machine->races) note_shared_write(b, copy.dst[l], copy.size, w.agent, copy.pc);
      copy.mask &= ~(1u << l);
    });
  }
  std::erase_if(w.copies, [](const CpAsyncCopy& copy) { return !copy.mask; });
}

Handler cp_async_handler(const Instruction& in) {
  switch (in.op) {
    case Op::CpAsync:
      return cp_async;
    case Op::CpAsyncCommit:
      return commit;
    case Op::CpAsyncWait:
      return wait;
    case Op::CpAsyncMbarrier:
      return arrive_after_copies;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
