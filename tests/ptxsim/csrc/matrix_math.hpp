// What the matrix instructions share. Products are exact in f32; sums are f32, in order of k, starting from
// C.
#pragma once
#include <immintrin.h>

#include "float_formats.hpp"
#include "operands.hpp"

namespace ptxsim {

inline bool is_int8(Type type) { return type == Type::S8 || type == Type::U8; }
inline bool is_fp8(Type type) { return type == Type::E4M3 || type == Type::E5M2; }
inline int operand_size(Type type) { return type == Type::TF32 ? 4 : type_size(type); }
inline int elements_per_register(Type type) { return 4 / operand_size(type); }

// Element e of a 32-bit fragment register; the hardware ignores the low 13 bits of a tf32.
inline float fragment_float(Type type, u32 reg, int e) {
  switch (type) {
    case Type::F16:
      return half_to_float(u16(reg >> 16 * e));
    case Type::BF16:
      return bfloat_to_float(u16(reg >> 16 * e));
    case Type::TF32:
      return bits_float(reg & ~0x1fffu);
    case Type::E4M3:
    case Type::E5M2:
      return fp8_to_float(u8(reg >> 8 * e), type == Type::E4M3);
    default:
      return bits_float(reg);
  }
}
inline s32 fragment_int(Type type, u32 reg, int e) {
  return type == Type::S8 ? s32(s8(reg >> 8 * e)) : s32(u8(reg >> 8 * e));
}

inline s32 add_products(s32 start, s64 sum, bool saturate) {
  s64 total = s64(start) + sum;
  return saturate ? s32(std::clamp<s64>(total, INT32_MIN, INT32_MAX)) : s32(total);
}

// Where element i (0..3) of the accumulator of a 16x8 tile lies for a lane
inline int tile_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
inline int tile_column(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

}  // namespace ptxsim
