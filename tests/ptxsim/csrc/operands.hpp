// Access to registers, constants and predicates, 32 lanes at a time.
#pragma once
#include "machine.hpp"

namespace ptxsim {

// A register holds 32 slots of 32 or 64 bits; narrower types sit in the low bits of a 32-bit slot.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T from_slot(Slot<T> slot) {
  T value;
  std::memcpy(&value, &slot, sizeof(T));  // little-endian: the low bytes
  return value;
}

template <class T>
inline Slot<T> to_slot(T value) {
  Slot<T> slot = 0;
  std::memcpy(&slot, &value, sizeof(T));
  return slot;
}

inline s32 operand(const Context& c, const Instruction& in, int k) { return c.operands[in.operands + k]; }
inline s32 source_code(const Context& c, const Instruction& in, int k) {
  return operand(c, in, in.n_dst + k);
}

template <class S>
inline const S* slots(const Context& c, s32 code) {
  if (code < 0)
    return reinterpret_cast<const S*>(c.constants + size_t(-(code + 1)) * kConstantBytes +
                                      (sizeof(S) == 8 ? 128 : 0));
  return reinterpret_cast<const S*>(c.regs + (code & ~3));
}
template <class S>
inline S* slots_of_register(Context& c, s32 code) {
  return reinterpret_cast<S*>(c.regs + (code & ~3));
}

template <class T>
struct Source {
  const Slot<T>* p;
  T operator[](int lane) const { return from_slot<T>(p[lane]); }
};
template <class T>
inline Source<T> source(const Context& c, const Instruction& in, int k) {
  return {slots<Slot<T>>(c, source_code(c, in, k))};
}

inline bool is_wide(s32 code) { return code >= 0 && (code & 3) == kReg64; }

// Value of a register or constant of any width, zero-extended.
inline u64 lane_value(const Context& c, s32 code, int lane) {
  if (code < 0 || is_wide(code)) return slots<u64>(c, code)[lane];
  return slots<u32>(c, code)[lane];
}
inline u64 lane_source(const Context& c, const Instruction& in, int k, int lane) {
  return lane_value(c, source_code(c, in, k), lane);
}

inline u32 predicate(const Context& c, s32 code) {
  if (code < 0) return *slots<u32>(c, code) ? ~0u : 0u;
  u32 bits = *reinterpret_cast<const u32*>(c.regs + (code & ~3));
  return (code & 3) == kNotPredicate ? ~bits : bits;
}
inline u32 predicate_source(const Context& c, const Instruction& in, int k) {
  return predicate(c, source_code(c, in, k));
}
inline void set_predicate(Context& c, s32 code, u32 bits) {
  u32* p = slots_of_register<u32>(c, code);
  *p = (*p & ~c.mask) | (bits & c.mask);
}

template <class S>
inline void store_slots(Context& c, s32 code, const S* values) {
  S* dst = slots_of_register<S>(c, code);
  if (c.mask == ~0u) {
    std::memcpy(dst, values, 32 * sizeof(S));
    return;
  }
  u32 mask = c.mask;
  for (int lane = 0; lane < 32; lane++) dst[lane] = (mask >> lane & 1) ? values[lane] : dst[lane];
}

// Destination k becomes f(lane) in the active lanes.
template <class R, class F>
inline void write(Context& c, const Instruction& in, int k, F f) {
  alignas(64) Slot<R> values[32];
  for (int lane = 0; lane < 32; lane++) values[lane] = to_slot<R>(f(lane));
  store_slots<Slot<R>>(c, operand(c, in, k), values);
}

inline void set_lane(Context& c, s32 code, int lane, u64 value) {
  if (is_wide(code))
    slots_of_register<u64>(c, code)[lane] = value;
  else
    slots_of_register<u32>(c, code)[lane] = static_cast<u32>(value);
}

// Address operand (source k) plus an immediate, for all lanes. 32-bit addresses wrap at 32 bits.
inline void addresses(const Context& c, s32 code, s64 offset, u64* out) {
  if (code >= 0 && (code & 3) == kReg32) {
    const u32* p = slots<u32>(c, code);
    for (int lane = 0; lane < 32; lane++) out[lane] = static_cast<u32>(p[lane] + static_cast<u32>(offset));
  } else {
    const u64* p = slots<u64>(c, code);
    for (int lane = 0; lane < 32; lane++) out[lane] = p[lane] + static_cast<u64>(offset);
  }
}

// Picks K::run<T> for an integer type; null where the type is none.
template <class K>
Handler pick_integer(Type type) {
  switch (type) {
    case Type::S16:
      return &K::template run<s16>;
    case Type::U16:
    case Type::B16:
      return &K::template run<u16>;
    case Type::S32:
      return &K::template run<s32>;
    case Type::U32:
    case Type::B32:
      return &K::template run<u32>;
    case Type::S64:
      return &K::template run<s64>;
    case Type::U64:
    case Type::B64:
      return &K::template run<u64>;
    default:
      return nullptr;
  }
}
template <class K>
Handler pick_unsigned(Type type) {
  switch (type_size(type)) {
    case 2:
      return &K::template run<u16>;
    case 4:
      return &K::template run<u32>;
    case 8:
      return &K::template run<u64>;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
