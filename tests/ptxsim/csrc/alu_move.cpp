// Moves between registers, packing, and conversions between address spaces.
#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {
namespace {

constexpr int kUpperHalf = 256;  // a 128-bit register is two 64-bit ones

template <class S>
void mov(Context& c, const Instruction& in) {
  store_slots<S>(c, operand(c, in, 0), slots<S>(c, source_code(c, in, 0)));
}
// Registers of different widths
void mov_any(Context& c, const Instruction& in) {
  s32 dst = operand(c, in, 0), src = source_code(c, in, 0);
  for_lanes(c.mask, [&](int l) { set_lane(c, dst, l, lane_value(c, src, l)); });
}
void mov_predicate(Context& c, const Instruction& in) {
  set_predicate(c, operand(c, in, 0), predicate_source(c, in, 0));
}
void mov_128(Context& c, const Instruction& in) {
  s32 dst = operand(c, in, 0), src = source_code(c, in, 0);
  for (int half = 0; half < 2; half++)
    store_slots<u64>(c, dst + half * kUpperHalf, slots<u64>(c, src + half * kUpperHalf));
}

// aux: bits of an element
void pack(Context& c, const Instruction& in) {
  s32 dst = operand(c, in, 0);
  if (in.aux == 64) {
    for_lanes(c.mask, [&](int l) {
      for (int half = 0; half < 2; half++)
        set_lane(c, dst + half * kUpperHalf, l, lane_source(c, in, half, l));
    });
    return;
  }
  u64 element = (1ull << in.aux) - 1;
  for_lanes(c.mask, [&](int l) {
    u64 value = 0;
    for (int i = 0; i < in.n_src; i++) value |= (lane_source(c, in, i, l) & element) << in.aux * i;
    set_lane(c, dst, l, value);
  });
}
void unpack(Context& c, const Instruction& in) {
  s32 src = source_code(c, in, 0);
  if (in.aux == 64) {
    for (int half = 0; half < 2; half++)
      store_slots<u64>(c, operand(c, in, half), slots<u64>(c, src + half * kUpperHalf));
    return;
  }
  u64 element = (1ull << in.aux) - 1, value[32];  // read all first: a destination may be the source
  for (int l = 0; l < 32; l++) value[l] = lane_value(c, src, l);
  for (int i = 0; i < in.n_dst; i++) {
    s32 dst = operand(c, in, i);
    for_lanes(c.mask, [&](int l) { set_lane(c, dst, l, value[l] >> in.aux * i & element); });
  }
}

// cvta: adds or takes away the window of an address space
void add_immediate(Context& c, const Instruction& in) {
  s32 dst = operand(c, in, 0), src = source_code(c, in, 0);
  for_lanes(c.mask, [&](int l) { set_lane(c, dst, l, lane_value(c, src, l) + u64(in.imm)); });
}

// Shared addresses, with the window (generic) or without
void mapa(Context& c, const Instruction& in) {
  constexpr u64 kRankBits = 0xff000000;
  u32 blocks = c.machine->cluster_blocks;
  for_lanes(c.mask, [&](int l) {
    u64 address = lane_source(c, in, 0, l);
    u32 rank = u32(lane_source(c, in, 1, l));
    if (rank >= blocks)
      fault(c, l,
            format("mapa asks for block %u of a cluster of %u block%s", rank, blocks, blocks > 1 ? "s" : ""));
    if (!in.has(mod::Cluster) && address >> 48 != kSharedWindow >> 48)
      fault(c, l,
            format("mapa of a generic address 0x%llx, which is not of shared memory",
                   (unsigned long long)address));
    if (blocks > 1) address = (address & ~kRankBits) | u64(rank + 1) << kRankShift;
    set_lane(c, operand(c, in, 0), l, address);
  });
}

void cta_rank(Context& c, const Instruction& in) {
  write<u32>(c, in, 0, [&](int l) { return u32(rank_of(c, u32(lane_source(c, in, 0, l)))); });
}

// aux: the Space asked about; Cluster: shared memory of any block of the cluster
void isspacep(Context& c, const Instruction& in) {
  u32 bits = 0;
  for (int l = 0; l < 32; l++) {
    u64 address = lane_source(c, in, 0, l), window = address >> 48;
    Space space = window == kSharedWindow >> 48  ? Space::Shared
                  : window == kLocalWindow >> 48 ? Space::Local
                                                 : Space::Global;
    bool elsewhere =
        space == Space::Shared && !in.has(mod::Cluster) && rank_of(c, u32(address)) != c.block->rank;
    bits |= u32(space == static_cast<Space>(in.aux) && !elsewhere) << l;
  }
  set_predicate(c, operand(c, in, 0), bits);
}

void read_clock(Context& c, const Instruction& in) {
  u64 now = c.machine->instructions * 4;  // moves on; says nothing of time
  if (type_size(in.type) == 8)
    write<u64>(c, in, 0, [&](int) { return now; });
  else
    write<u32>(c, in, 0, [&](int) { return u32(now); });
}

}  // namespace

Handler move_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Mov:  // aux: the registers differ in width
      if (in.type == Type::PRED) return mov_predicate;
      if (in.type == Type::B128) return mov_128;
      if (in.aux) return mov_any;
      return type_size(in.type) == 8 ? mov<u64> : mov<u32>;
    case Op::Pack:
      return pack;
    case Op::Unpack:
      return unpack;
    case Op::AddImmediate:
      return add_immediate;
    case Op::Mapa:
      return mapa;
    case Op::CtaRank:
      return cta_rank;
    case Op::Isspacep:
      return isspacep;
    case Op::Clock:
      return read_clock;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
