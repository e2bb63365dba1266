// Communication within a warp: shuffles, votes, matches, reductions.
#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

enum class Shuffle { Up, Down, Butterfly, Index };

// Destinations: value, and whether the source lane is in range. Sources: value, lane, clamp and segment mask,
// members
void shfl(Context& c, const Instruction& in) {
  auto value = source<u32>(c, in, 0), lane = source<u32>(c, in, 1), limits = source<u32>(c, in, 2);
  u32 in_range = 0;
  int stranger = -1;
  alignas(64) u32 out[32];
  for (int l = 0; l < 32; l++) {
    int b = lane[l] & 31, clamp = limits[l] & 31, segment = limits[l] >> 8 & 31;
    int highest = (l & segment) | (clamp & ~segment & 31), lowest = l & segment, from = l;
    bool ok = false;
    switch (static_cast<Shuffle>(in.aux)) {
      case Shuffle::Up:
        from = l - b;
        ok = from >= highest;
        break;
      case Shuffle::Down:
        from = l + b;
        ok = from <= highest;
        break;
      case Shuffle::Butterfly:
        from = l ^ b;
        ok = from <= highest;
        break;
      case Shuffle::Index:
        from = lowest | (b & ~segment & 31);
        ok = from <= highest;
        break;
    }
    if (!ok) from = l;
    if (ok && c.mask >> l & 1 && !(c.mask >> from & 1)) stranger = l;
    out[l] = value[from];
    in_range |= u32(ok) << l;
  }
  if (stranger >= 0 && c.warp->live == ~0u)
    report(c, ReportKind::WarpSync, stranger, 0, "shfl.sync reads a lane that does not take part");
  store_slots<u32>(c, operand(c, in, 0), out);
  if (in.n_dst > 1) set_predicate(c, operand(c, in, 1), in_range);
}

// aux: all, any, uni, ballot
void vote(Context& c, const Instruction& in) {
  u32 yes = predicate_source(c, in, 0) & c.mask;
  if (in.aux == 3) {
    write<u32>(c, in, 0, [&](int) { return yes; });
    return;
  }
  bool result = in.aux == 0 ? yes == c.mask : in.aux == 1 ? yes != 0 : yes == c.mask || yes == 0;
  set_predicate(c, operand(c, in, 0), result ? ~0u : 0);
}

// aux: any, all
void match(Context& c, const Instruction& in) {
  alignas(64) u32 out[32] = {};
  u64 value[32];
  for (int l = 0; l < 32; l++) value[l] = lane_source(c, in, 0, l);
  bool uniform = true;
  for_lanes(c.mask, [&](int l) {
    for_lanes(c.mask, [&](int other) { out[l] |= u32(value[other] == value[l]) << other; });
    uniform &= out[l] == c.mask;
  });
  if (in.aux == 1) for_lanes(c.mask, [&](int l) { out[l] = uniform ? c.mask : 0; });
  store_slots<u32>(c, operand(c, in, 0), out);
  if (in.n_dst > 1) set_predicate(c, operand(c, in, 1), uniform ? ~0u : 0);
}

// aux: the Atomic
void redux(Context& c, const Instruction& in) {
  auto value = source<u32>(c, in, 0);
  u64 result = 0;
  bool first = true;
  for_lanes(c.mask, [&](int l) {
    result =
        first ? value[l] : apply_atomic(static_cast<Atomic>(in.aux), in.type, result, value[l], 0, false);
    first = false;
  });
  write<u32>(c, in, 0, [&](int) { return u32(result); });
}

void elect(Context& c, const Instruction& in) {
  u32 leader = u32(first_lane(c.mask));
  write<u32>(c, in, 0, [&](int) { return leader; });
  if (in.n_dst > 1) set_predicate(c, operand(c, in, 1), 1u << leader);
}

void activemask(Context& c, const Instruction& in) {
  u32 mask = c.mask;
  write<u32>(c, in, 0, [&](int) { return mask; });
}

}  // namespace

Handler warp_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Shfl:
      return shfl;
    case Op::Vote:
      return vote;
    case Op::Match:
      return match;
    case Op::Redux:
      return redux;
    case Op::Elect:
      return elect;
    case Op::Activemask:
      return activemask;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
