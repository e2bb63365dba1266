// Integer arithmetic.
#include "families.hpp"
#include "operands.hpp"

namespace ptxsim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct AddOp {
  template <class T>
  static T apply(T a, T b) {
    return T(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct SubOp {
  template <class T>
  static T apply(T a, T b) {
    return T(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
struct MulOp {
  template <class T>
  static T apply(T a, T b) {
    return T(u64(a) * u64(b));
  }
};
struct MulHiOp {
  template <class T>
  static T apply(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, s128, u128>;
    if constexpr (sizeof(T) == 8) return T((Wide(a) * Wide(b)) >> 64);
    using Wide64 = std::conditional_t<std::is_signed_v<T>, s64, u64>;
    return T((Wide64(a) * Wide64(b)) >> (8 * sizeof(T) & 63));
  }
};
struct DivOp {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return T(-1);  // undefined in PTX; what the hardware's sequence gives
    if constexpr (std::is_signed_v<T>)
      if (b == T(-1)) return T(0 - Unsigned<T>(a));
    return a / b;
  }
};
struct RemOp {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
      if (b == T(-1)) return 0;
    return a % b;
  }
};
struct MinOp {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct MaxOp {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
template <class F>
struct ReluOp {  // F with .relu
  template <class T>
  static T apply(T a, T b) {
    return std::max(F::apply(a, b), T(0));
  }
};
struct AbsOp {
  template <class T>
  static T apply(T a) {
    return a < 0 ? T(0 - Unsigned<T>(a)) : a;
  }
};
struct NegOp {
  template <class T>
  static T apply(T a) {
    return T(0 - Unsigned<T>(a));
  }
};

template <class F>
struct Binary {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
    write<T>(c, in, 0, [&](int l) { return F::template apply<T>(a[l], b[l]); });
  }
};
template <class F>
struct Ternary {  // F(F(a, b), c)
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
    write<T>(c, in, 0, [&](int l) { return F::template apply<T>(F::template apply<T>(a[l], b[l]), d[l]); });
  }
};
template <class F>
struct Unary {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    write<T>(c, in, 0, [&](int l) { return F::template apply<T>(a[l]); });
  }
};
template <class F>
struct MultiplyAdd {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
    write<T>(c, in, 0, [&](int l) { return T(u64(F::template apply<T>(a[l], b[l])) + u64(d[l])); });
  }
};

template <class T, class W>
void mul_wide(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
  write<W>(c, in, 0, [&](int l) { return W(W(a[l]) * W(b[l])); });
}
template <class T, class W>
void mad_wide(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
  auto d = source<W>(c, in, 2);
  write<W>(c, in, 0, [&](int l) { return W(u64(W(a[l]) * W(b[l])) + u64(d[l])); });
}

Handler wide_handler(const Instruction& in) {
  bool mad = in.op == Op::MadWide;
  switch (in.type) {
    case Type::S16:
      return mad ? mad_wide<s16, s32> : mul_wide<s16, s32>;
    case Type::U16:
      return mad ? mad_wide<u16, u32> : mul_wide<u16, u32>;
    case Type::S32:
      return mad ? mad_wide<s32, s64> : mul_wide<s32, s64>;
    case Type::U32:
      return mad ? mad_wide<u32, u64> : mul_wide<u32, u64>;
    default:
      return nullptr;
  }
}

// 24-bit factors, 48-bit product: its low 32 bits or its bits 16..47
void mul24(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  bool sign = in.type == Type::S32, high = in.has(mod::High), add = in.op == Op::Mad24;
  auto factor = [&](u32 x) { return sign ? s64(s32(x << 8) >> 8) : s64(x & 0xffffff); };
  const u32* addend = add ? slots<u32>(c, source_code(c, in, 2)) : nullptr;
  write<u32>(c, in, 0, [&](int l) {
    u64 product = u64(factor(a[l]) * factor(b[l]));
    return u32(high ? product >> 16 : product) + (add ? addend[l] : 0);
  });
}

void saturating_add(Context& c, const Instruction& in) {
  auto a = source<s32>(c, in, 0), b = source<s32>(c, in, 1);
  bool subtract = in.op == Op::Sub;
  write<s32>(c, in, 0, [&](int l) {
    s64 r = subtract ? s64(a[l]) - b[l] : s64(a[l]) + b[l];
    return s32(std::clamp<s64>(r, INT32_MIN, INT32_MAX));
  });
}

// mad.hi.sat.s32
void saturating_mad_hi(Context& c, const Instruction& in) {
  auto a = source<s32>(c, in, 0), b = source<s32>(c, in, 1), d = source<s32>(c, in, 2);
  write<s32>(c, in, 0, [&](int l) {
    s64 r = ((s64(a[l]) * b[l]) >> 32) + d[l];
    return s32(std::clamp<s64>(r, INT32_MIN, INT32_MAX));
  });
}

// add.cc, addc, sub.cc, subc: sources a, b and the carry predicate
struct Carry {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
    s32 carry = source_code(c, in, 2);
    u32 carry_in = in.has(mod::CarryIn) ? predicate(c, carry) : 0, carry_out = 0;
    bool subtract = in.has(mod::Subtract);
    write<T>(c, in, 0, [&](int l) {
      u128 x = a[l], y = b[l];
      u32 extra = carry_in >> l & 1;
      u128 r = subtract ? x - y - extra : x + y + extra;
      carry_out |= u32(r >> (8 * sizeof(T)) & 1) << l;
      return T(r);
    });
    if (in.has(mod::CarryOut)) set_predicate(c, carry, carry_out);
  }
};

// mad.cc, madc: sources a, b, c and the carry predicate
struct MadCarry {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
    s32 carry = source_code(c, in, 3);
    u32 carry_in = in.has(mod::CarryIn) ? predicate(c, carry) : 0, carry_out = 0;
    bool high = in.has(mod::High), sign = is_signed(in.type);
    using S = std::make_signed_t<T>;
    write<T>(c, in, 0, [&](int l) {
      T product = !high  ? MulOp::apply<T>(a[l], b[l])
                  : sign ? T(MulHiOp::apply<S>(S(a[l]), S(b[l])))
                         : MulHiOp::apply<T>(a[l], b[l]);
      u128 r = u128(product) + d[l] + (carry_in >> l & 1);
      carry_out |= u32(r >> (8 * sizeof(T)) & 1) << l;
      return T(r);
    });
    if (in.has(mod::CarryOut)) set_predicate(c, carry, carry_out);
  }
};

struct Sad {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
    write<T>(c, in, 0, [&](int l) {
      u64 difference = a[l] < b[l] ? u64(b[l]) - u64(a[l]) : u64(a[l]) - u64(b[l]);
      return T(u64(d[l]) + difference);
    });
  }
};

s32 byte_of(u32 x, int i, bool sign) { return sign ? s32(s8(x >> 8 * i)) : s32(u8(x >> 8 * i)); }

void dp4a(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), d = source<u32>(c, in, 2);
  bool sign_a = in.type == Type::S32, sign_b = in.type2 == Type::S32;
  write<u32>(c, in, 0, [&](int l) {
    u32 sum = d[l];
    for (int i = 0; i < 4; i++) sum += u32(byte_of(a[l], i, sign_a) * byte_of(b[l], i, sign_b));
    return sum;
  });
}
void dp2a(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), d = source<u32>(c, in, 2);
  bool sign_a = in.type == Type::S32, sign_b = in.type2 == Type::S32;
  int first = in.has(mod::High) ? 2 : 0;
  write<u32>(c, in, 0, [&](int l) {
    u32 sum = d[l];
    for (int i = 0; i < 2; i++) {
      s32 x = sign_a ? s32(s16(a[l] >> 16 * i)) : s32(u16(a[l] >> 16 * i));
      sum += u32(x * byte_of(b[l], first + i, sign_b));
    }
    return sum;
  });
}

// add, min, max of packed 16-bit integers; aux: the Atomic of that name
void packed_int(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  bool sign = in.type == Type::S16X2, relu = in.has(mod::Relu);
  auto kind = static_cast<Atomic>(in.aux);
  auto apply = [&](u16 x, u16 y) -> u16 {
    if (kind == Atomic::Add) return x + y;
    bool less = sign ? s16(x) < s16(y) : x < y;
    u16 found = (kind == Atomic::Min) == less ? x : y;
    return relu && s16(found) < 0 ? 0 : found;
  };
  write<u32>(c, in, 0, [&](int l) {
    return u32(apply(u16(a[l]), u16(b[l]))) | u32(apply(a[l] >> 16, b[l] >> 16)) << 16;
  });
}

}  // namespace

Handler integer_handler(const Instruction& in) {
  Type t = in.type;
  switch (in.op) {
    case Op::Add:
      return in.has(mod::Sat) && t == Type::S32 ? saturating_add : pick_integer<Binary<AddOp>>(t);
    case Op::Sub:
      return in.has(mod::Sat) && t == Type::S32 ? saturating_add : pick_integer<Binary<SubOp>>(t);
    case Op::Mul:
      return pick_integer<Binary<MulOp>>(t);
    case Op::MulHi:
      return pick_integer<Binary<MulHiOp>>(t);
    case Op::MulWide:
    case Op::MadWide:
      return wide_handler(in);
    case Op::Mul24:
    case Op::Mad24:
      return mul24;
    case Op::Mad:
      return pick_integer<MultiplyAdd<MulOp>>(t);
    case Op::MadHi:
      return in.has(mod::Sat) ? saturating_mad_hi : pick_integer<MultiplyAdd<MulHiOp>>(t);
    case Op::Div:
      return pick_integer<Binary<DivOp>>(t);
    case Op::Rem:
      return pick_integer<Binary<RemOp>>(t);
    case Op::Min:
      return in.has(mod::Relu) ? Binary<ReluOp<MinOp>>::run<s32> : pick_integer<Binary<MinOp>>(t);
    case Op::Max:
      return in.has(mod::Relu) ? Binary<ReluOp<MaxOp>>::run<s32> : pick_integer<Binary<MaxOp>>(t);
    case Op::Min3:
      return pick_integer<Ternary<MinOp>>(t);
    case Op::Max3:
      return pick_integer<Ternary<MaxOp>>(t);
    case Op::Abs:
      return pick_integer<Unary<AbsOp>>(t);
    case Op::Neg:
      return pick_integer<Unary<NegOp>>(t);
    case Op::Sad:
      return pick_integer<Sad>(t);
    case Op::AddCarry:
      return pick_unsigned<Carry>(t);
    case Op::MadCarry:
      return pick_unsigned<MadCarry>(t);
    case Op::Dp4a:
      return dp4a;
    case Op::Dp2a:
      return dp2a;
    case Op::PackedInt:
      return packed_int;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
