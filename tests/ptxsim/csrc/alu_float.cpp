// Floating-point arithmetic. Half and bfloat16 are computed in float or double, which is wide enough for one
// rounding.
#include "families.hpp"
#include "float_formats.hpp"
#include "operands.hpp"
#include "rounding.hpp"

namespace ptxsim {
namespace {

// Elements as the type they are computed in.
template <class T>
struct Element {
  using Compute = T;
  static T load(T x, bool ftz) {
    if constexpr (sizeof(T) == 4) return ftz ? flush(x) : x;
    return x;
  }
  static T store(T x, bool ftz) {
    if constexpr (sizeof(T) == 4) return canonical(ftz ? flush(x) : x);
    return x;
  }
};
template <>
struct Element<Half> {
  using Compute = float;
  static float load(Half x, bool ftz) { return half_to_float(ftz ? flush_half(x.bits) : x.bits); }
  static Half store(float x, bool ftz) {
    u16 h = float_to_half(x);
    return {ftz ? flush_half(h) : h};
  }
};
template <>
struct Element<BFloat> {
  using Compute = float;
  static float load(BFloat x, bool) { return bfloat_to_float(x.bits); }
  static BFloat store(float x, bool) { return {float_to_bfloat(x)}; }
};

struct AddOp {
  template <class C>
  static C apply(C a, C b) {
    return a + b;
  }
};
struct SubOp {
  template <class C>
  static C apply(C a, C b) {
    return a - b;
  }
};
struct MulOp {
  template <class C>
  static C apply(C a, C b) {
    return a * b;
  }
};
struct DivOp {
  template <class C>
  static C apply(C a, C b) {
    return a / b;
  }
};
// A NaN loses against a number; -0 is less than +0.
struct MinOp {
  template <class C>
  static C apply(C a, C b) {
    if (a == 0 && b == 0) return std::signbit(a) ? a : b;
    return a < b || b != b ? a : b;
  }
};
struct MaxOp {
  template <class C>
  static C apply(C a, C b) {
    if (a == 0 && b == 0) return std::signbit(a) ? b : a;
    return a > b || b != b ? a : b;
  }
};

template <class F>
constexpr bool kIsMinMax = std::is_same_v<F, MinOp> || std::is_same_v<F, MaxOp>;

// One operation with all its modifiers.
template <class F, class T>
inline T apply_modified(T a, T b, u64 mods) {
  using E = Element<T>;
  using C = typename E::Compute;
  bool ftz = mods & mod::Ftz;
  C x = E::load(a, ftz), y = E::load(b, ftz), r;
  if (kIsMinMax<F> && mods & mod::XorSign) {
    bool negative = std::signbit(x) != std::signbit(y);
    r = F::apply(std::fabs(x), std::fabs(y));
    if (negative) r = -r;
  } else {
    r = F::apply(x, y);
  }
  if (mods & mod::Sat) r = saturate(r);
  if (mods & mod::PropagateNan && (x != x || y != y)) r = std::numeric_limits<C>::quiet_NaN();
  return E::store(r, ftz);
}

template <class F, class T>
void binary_rounded(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
  using E = Element<T>;
  bool ftz = in.has(mod::Ftz);
  write<T>(c, in, 0, [&](int l) {
    T r = rounded<T>(
        in.rounding(), [](T x, T y, T) { return F::apply(x, y); }, E::load(a[l], ftz), E::load(b[l], ftz));
    return E::store(in.has(mod::Sat) ? saturate(r) : r, ftz);
  });
}

constexpr u64 kPlain = ~(mod::Ftz | mod::Sat | mod::PropagateNan | mod::XorSign);

template <class F, class T>
void binary(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
  u64 mods = in.mods;
  if (mods & ~kPlain)
    write<T>(c, in, 0, [&](int l) { return apply_modified<F, T>(a[l], b[l], mods); });
  else  // the usual case, simple enough to be vectorised
    write<T>(c, in, 0, [&](int l) { return apply_modified<F, T>(a[l], b[l], 0); });
}

template <class F, class T>
void binary_packed(Context& c, const Instruction& in) {  // two 16-bit elements
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  u64 mods = in.mods;
  write<u32>(c, in, 0, [&](int l) {
    u32 low = apply_modified<F, T>(T{u16(a[l])}, T{u16(b[l])}, mods).bits;
    return low | u32(apply_modified<F, T>(T{u16(a[l] >> 16)}, T{u16(b[l] >> 16)}, mods).bits) << 16;
  });
}

template <class F>
void binary_f32x2(Context& c, const Instruction& in) {
  auto a = source<u64>(c, in, 0), b = source<u64>(c, in, 1);
  bool ftz = in.has(mod::Ftz);
  using E = Element<float>;
  write<u64>(c, in, 0, [&](int l) {
    u64 result = 0;
    for (int h = 0; h < 2; h++) {
      float x = E::load(bits_float(u32(a[l] >> 32 * h)), ftz),
            y = E::load(bits_float(u32(b[l] >> 32 * h)), ftz);
      float r = rounded<float>(in.rounding(), [](float p, float q, float) { return F::apply(p, q); }, x, y);
      result |= u64(float_bits(E::store(r, ftz))) << 32 * h;
    }
    return result;
  });
}

template <class F>
Handler binary_handler(const Instruction& in) {
  bool directed = in.rounding() != Rounding::Nearest;
  switch (in.type) {
    case Type::F32:
      return directed ? binary_rounded<F, float> : binary<F, float>;
    case Type::F64:
      return directed ? binary_rounded<F, double> : binary<F, double>;
    case Type::F16:
      return binary<F, Half>;
    case Type::BF16:
      return binary<F, BFloat>;
    case Type::F16X2:
      return binary_packed<F, Half>;
    case Type::BF16X2:
      return binary_packed<F, BFloat>;
    case Type::F32X2:
      return binary_f32x2<F>;
    default:
      return nullptr;
  }
}

// Three-operand minimum and maximum of f32
template <class F>
void min_max3(Context& c, const Instruction& in) {
  auto a = source<float>(c, in, 0), b = source<float>(c, in, 1), d = source<float>(c, in, 2);
  u64 mods = in.mods;
  write<float>(c, in, 0, [&](int l) {
    return apply_modified<F, float>(apply_modified<F, float>(a[l], b[l], mods), d[l], mods);
  });
}

template <class T>
void fma_full(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
  using E = Element<T>;
  if (in.rounding() == Rounding::Nearest && !(in.mods & ~kPlain)) {
    write<T>(c, in, 0, [&](int l) { return canonical(std::fma(a[l], b[l], d[l])); });
    return;
  }
  bool ftz = in.has(mod::Ftz);
  write<T>(c, in, 0, [&](int l) {
    T x = E::load(a[l], ftz), y = E::load(b[l], ftz), z = E::load(d[l], ftz);
    T r = in.rounding() == Rounding::Nearest
              ? std::fma(x, y, z)
              : rounded<T>(in.rounding(), [](T p, T q, T s) { return std::fma(p, q, s); }, x, y, z);
    if (in.has(mod::Sat)) r = saturate(r);
    return E::store(r, ftz);
  });
}

template <class T>
inline T fma16(T a, T b, T d, u64 mods) {
  using E = Element<T>;
  bool ftz = mods & mod::Ftz;
  float r = to_float_odd(fma_odd(E::load(a, ftz), E::load(b, ftz), E::load(d, ftz)));
  if (mods & mod::Sat) r = saturate(r);
  if (mods & mod::Relu) r = relu(r);
  return E::store(r, ftz);
}
template <class T>
void fma_half(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0), b = source<T>(c, in, 1), d = source<T>(c, in, 2);
  write<T>(c, in, 0, [&](int l) { return fma16<T>(a[l], b[l], d[l], in.mods); });
}
template <class T>
void fma_packed(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), d = source<u32>(c, in, 2);
  write<u32>(c, in, 0, [&](int l) {
    u32 low = fma16<T>(T{u16(a[l])}, T{u16(b[l])}, T{u16(d[l])}, in.mods).bits;
    u32 high = fma16<T>(T{u16(a[l] >> 16)}, T{u16(b[l] >> 16)}, T{u16(d[l] >> 16)}, in.mods).bits;
    return low | high << 16;
  });
}
void fma_f32x2(Context& c, const Instruction& in) {
  auto a = source<u64>(c, in, 0), b = source<u64>(c, in, 1), d = source<u64>(c, in, 2);
  bool ftz = in.has(mod::Ftz);
  using E = Element<float>;
  write<u64>(c, in, 0, [&](int l) {
    u64 result = 0;
    for (int h = 0; h < 2; h++) {
      auto part = [&](u64 x) { return E::load(bits_float(u32(x >> 32 * h)), ftz); };
      float r = rounded<float>(
          in.rounding(), [](float p, float q, float s) { return std::fma(p, q, s); }, part(a[l]), part(b[l]),
          part(d[l]));
      result |= u64(float_bits(E::store(r, ftz))) << 32 * h;
    }
    return result;
  });
}

// abs and neg act on the sign bits; imm: their mask
template <class S>
void sign_operation(Context& c, const Instruction& in) {
  auto a = source<S>(c, in, 0);
  S signs = S(in.imm);
  bool absolute = in.op == Op::Abs, ftz = in.has(mod::Ftz);
  Type type = in.type;
  write<S>(c, in, 0, [&](int l) {
    S x = a[l];
    if (ftz && type == Type::F32) x = S(float_bits(flush(bits_float(u32(x)))));
    if (ftz && (type == Type::F16 || type == Type::F16X2))
      x = S(flush_half(u16(x)) | u32(flush_half(u16(u32(x) >> 16))) << 16);
    return absolute ? S(x & ~signs) : S(x ^ signs);
  });
}

template <class S>
void copy_sign(Context& c, const Instruction& in) {  // the sign of a on the magnitude of b
  auto a = source<S>(c, in, 0), b = source<S>(c, in, 1);
  constexpr S sign = S(1) << (8 * sizeof(S) - 1);
  write<S>(c, in, 0, [&](int l) { return S((a[l] & sign) | (b[l] & ~sign)); });
}

}  // namespace

Handler float_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Add:
      return binary_handler<AddOp>(in);
    case Op::Sub:
      return binary_handler<SubOp>(in);
    case Op::Mul:
      return binary_handler<MulOp>(in);
    case Op::Div:
      return in.type == Type::F32 || in.type == Type::F64 ? binary_handler<DivOp>(in) : nullptr;
    case Op::Min:
      return binary_handler<MinOp>(in);
    case Op::Max:
      return binary_handler<MaxOp>(in);
    case Op::Min3:
      return in.type == Type::F32 ? min_max3<MinOp> : nullptr;
    case Op::Max3:
      return in.type == Type::F32 ? min_max3<MaxOp> : nullptr;
    case Op::Mad:
    case Op::Fma:
      switch (in.type) {
        case Type::F32:
          return fma_full<float>;
        case Type::F64:
          return fma_full<double>;
        case Type::F16:
          return fma_half<Half>;
        case Type::BF16:
          return fma_half<BFloat>;
        case Type::F16X2:
          return fma_packed<Half>;
        case Type::BF16X2:
          return fma_packed<BFloat>;
        case Type::F32X2:
          return fma_f32x2;
        default:
          return nullptr;
      }
    case Op::Abs:
    case Op::Neg:
      switch (in.type) {
        case Type::F64:
          return sign_operation<u64>;
        case Type::F32:
        case Type::F16:
        case Type::F16X2:
        case Type::BF16:
        case Type::BF16X2:
          return sign_operation<u32>;
        default:
          return nullptr;
      }
    case Op::Copysign:
      return in.type == Type::F64 ? copy_sign<u64> : copy_sign<u32>;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
