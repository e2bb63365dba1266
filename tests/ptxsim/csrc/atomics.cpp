// atom, red
#include "families.hpp"
#include "float_formats.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

template <class T>
T integer_atomic(Atomic op, T old, T x, T other) {
  switch (op) {
    case Atomic::Add:
      return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x));
    case Atomic::Min:
      return std::min(old, x);
    case Atomic::Max:
      return std::max(old, x);
    case Atomic::And:
      return old & x;
    case Atomic::Or:
      return old | x;
    case Atomic::Xor:
      return old ^ x;
    case Atomic::Exch:
      return x;
    case Atomic::Cas:
      return old == x ? other : old;
    case Atomic::Inc:
      return old >= x ? 0 : old + 1;
    case Atomic::Dec:
      return old == 0 || old > x ? x : old - 1;
  }
  return old;
}

float float_atomic(Atomic op, float old, float x) {
  return canonical(op == Atomic::Add ? old + x : op == Atomic::Min ? std::fmin(old, x) : std::fmax(old, x));
}

u64 half_atomic(Atomic op, Type type, u64 old, u64 x) {
  bool half = type == Type::F16 || type == Type::F16X2;
  auto widen = [&](u64 bits) { return half ? half_to_float(u16(bits)) : bfloat_to_float(u16(bits)); };
  u64 result = 0;
  for (int shift = 0; shift < 8 * type_size(type); shift += 16) {
    float r = float_atomic(op, widen(old >> shift), widen(x >> shift));
    result |= u64(half ? float_to_half(r) : float_to_bfloat(r)) << shift;
  }
  return result;
}

// 128-bit exch and cas
void atomic_128(Context& c, const Instruction& in, u8* const* pointer, int first) {
  constexpr int kUpperHalf = 256;
  bool cas = static_cast<Atomic>(in.aux) == Atomic::Cas;
  for_lanes(c.mask, [&](int l) {
    u64 old[2], x[2], other[2] = {};
    std::memcpy(old, pointer[l], 16);
    for (int half = 0; half < 2; half++) {
      x[half] = lane_value(c, operand(c, in, first + 1) + half * kUpperHalf, l);
      if (cas) other[half] = lane_value(c, operand(c, in, first + 2) + half * kUpperHalf, l);
    }
    if (!cas)
      std::memcpy(pointer[l], x, 16);
    else if (old[0] == x[0] && old[1] == x[1])
      std::memcpy(pointer[l], other, 16);
    if (in.n_dst)
      for (int half = 0; half < 2; half++) set_lane(c, operand(c, in, 0) + half * kUpperHalf, l, old[half]);
  });
}

// aux: the Atomic; vec elements; sources: address, operands, the value of a cas
void atom(Context& c, const Instruction& in) {
  u64 address[32];
  u8* pointer[32];
  int size = type_size(in.type);
  auto op = static_cast<Atomic>(in.aux);
  addresses(c, source_code(c, in, 0), in.imm, address);
  resolve(c, in.space(), address, c.mask, size * in.vec, kRead | kWrite | kAtomic, pointer);
  c.block->polls++;
  if (size == 16) {
    for_lanes(c.mask, [&](int l) { synchronise(c, in, address[l], true, true); });
    return atomic_128(c, in, pointer, in.n_dst);
  }
  for_lanes(c.mask, [&](int l) {
    bool changed = false;
    bool shared = in.space() == Space::Shared || address[l] >> 48 == kSharedWindow >> 48;
    for (int i = 0; i < in.vec; i++) {
      u64 old = 0;
      std::memcpy(&old, pointer[l] + size * i, size);
      u64 x = lane_source(c, in, 1 + i, l), other = op == Atomic::Cas ? lane_source(c, in, 2, l) : 0;
      u64 result = apply_atomic(op, in.type, old, x, other, !shared);
      changed |= result != old;
      std::memcpy(pointer[l] + size * i, &result, size);
      if (in.n_dst) set_lane(c, operand(c, in, i), l, old);
    }
    c.machine->progress += changed;
    // A compare-and-swap that fails stores nothing, so it releases nothing.
    synchronise(c, in, address[l], true, op != Atomic::Cas || changed);
  });
}

}  // namespace

u64 apply_atomic(Atomic op, Type type, u64 old, u64 x, u64 other, bool flush_subnormals) {
  bool arithmetic = op == Atomic::Add || op == Atomic::Min || op == Atomic::Max;
  switch (type) {
    case Type::S32:
      return u32(integer_atomic<s32>(op, s32(old), s32(x), s32(other)));
    case Type::S64:
      return u64(integer_atomic<s64>(op, s64(old), s64(x), s64(other)));
    case Type::U64:
    case Type::B64:
      return integer_atomic<u64>(op, old, x, other);
    case Type::B16:
    case Type::U16:
      return integer_atomic<u16>(op, u16(old), u16(x), u16(other));
    case Type::F32: {
      if (!arithmetic) return integer_atomic<u32>(op, u32(old), u32(x), u32(other));
      bool ftz = flush_subnormals && op == Atomic::Add;
      auto value = [ftz](u64 bits) { return ftz ? flush(bits_float(u32(bits))) : bits_float(u32(bits)); };
      float r = float_atomic(op, value(old), value(x));
      return float_bits(ftz ? flush(r) : r);
    }
    case Type::F64:
      if (op != Atomic::Add) return integer_atomic<u64>(op, old, x, other);
      return double_bits(bits_double(old) + bits_double(x));
    case Type::F16:
    case Type::F16X2:
    case Type::BF16:
    case Type::BF16X2:
      return half_atomic(op, type, old, x);
    default:
      return integer_atomic<u32>(op, u32(old), u32(x), u32(other));
  }
}

Handler atomic_handler(const Instruction& in) {
  return in.op == Op::Atom || in.op == Op::Red ? atom : nullptr;
}

}  // namespace ptxsim
