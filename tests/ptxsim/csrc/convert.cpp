// cvt
#include "families.hpp"
#include "float_formats.hpp"
#include "operands.hpp"

namespace ptxsim {
namespace {

template <class T>
constexpr bool kIsFloat = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, Half> ||
                          std::is_same_v<T, BFloat>;

inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(Half x) { return half_to_float(x.bits); }
inline double widen(BFloat x) { return bfloat_to_float(x.bits); }

double round_to_integer(double x, Rounding mode) {
  switch (mode) {
    case Rounding::Zero:
      return std::trunc(x);
    case Rounding::Down:
      return std::floor(x);
    case Rounding::Up:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// Saturates. A NaN gives 0, or the top bit alone if either side has 64 bits.
template <class D>
D to_integer(double x, bool from_double) {
  constexpr int width = 8 * sizeof(D);
  using Limits = std::numeric_limits<D>;
  if (x != x) return from_double || width == 64 ? D(u64(1) << (width - 1)) : D(0);
  const double low = std::is_signed_v<D> ? -std::ldexp(1., width - 1) : 0.;
  const double high = std::ldexp(1., width - (std::is_signed_v<D> ? 1 : 0));
  if (x < low) return Limits::min();
  if (x >= high) return Limits::max();
  return D(x);
}

template <class S, class D>
struct Converter {
  u64 mods;
  Rounding rounding;

  D operator()(S x) const {
    if constexpr (!kIsFloat<S> && !kIsFloat<D>)
      return from_integer(x);
    else if constexpr (!kIsFloat<S>)
      return store_wide((long double)(x));
    else
      return from_float(x);
  }

 private:
  D from_integer(S x) const {
    if (!(mods & mod::Sat)) return D(x);
    s128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
    return D(std::clamp<s128>(s128(x), low, high));
  }

  D from_float(S source) const {
    double x = widen(source);
    if constexpr (std::is_same_v<S, float>)
      if (mods & mod::Ftz) x = flush(float(x));
    if constexpr (!kIsFloat<D>) {
      return to_integer<D>(round_to_integer(x, rounding), std::is_same_v<S, double>);
    } else {
      if (mods & mod::RoundToInt) x = round_to_integer(x, rounding);
      if (mods & mod::Sat) x = saturate(x);
      if (mods & mod::Relu) x = relu(x);
      if constexpr (std::is_same_v<D, Half>)
        if (mods & mod::SatFinite && std::fabs(x) > 65504.) x = std::copysign(65504., x);
      return store_wide(x);
    }
  }

  template <class Wide>
  D store_wide(Wide x) const {  // x is exact
    Rounding mode = mods & mod::RoundToInt ? Rounding::Nearest : rounding;
    if constexpr (std::is_same_v<D, double>) {
      double d = double(x);
      if (mode == Rounding::Nearest || Wide(d) == x || x != x) return d;
      if (mode == Rounding::Zero) return std::fabs(Wide(d)) > std::fabs(x) ? std::nextafter(d, 0.) : d;
      if (mode == Rounding::Down) return Wide(d) > x ? std::nextafter(d, -INFINITY) : d;
      return Wide(d) < x ? std::nextafter(d, INFINITY) : d;
    } else if constexpr (std::is_same_v<D, float>) {
      float f = to_float(x, mode);
      if (mods & mod::Sat) f = saturate(f);
      return canonical(mods & mod::Ftz ? flush(f) : f);
    } else if constexpr (std::is_same_v<D, Half>) {
      return Half{float_to_half(to_float_odd(x), mode)};
    } else {
      return BFloat{float_to_bfloat(to_float_odd(x), mode)};
    }
  }
};

template <class S, class D>
void cvt(Context& c, const Instruction& in) {
  s32 src = source_code(c, in, 0), dst = operand(c, in, 0);
  Converter<S, D> convert{in.mods, in.rounding()};
  alignas(64) S x[32];
  alignas(64) D y[32];
  // Registers may be wider than the types.
  if (src < 0 ? sizeof(S) == 8 : is_wide(src)) {
    auto p = slots<u64>(c, src);
    for (int l = 0; l < 32; l++) x[l] = from_slot<S>(Slot<S>(p[l]));
  } else {
    auto p = slots<u32>(c, src);
    for (int l = 0; l < 32; l++) x[l] = from_slot<S>(Slot<S>(p[l]));
  }
  for (int l = 0; l < 32; l++) y[l] = convert(x[l]);
  auto extended = [](D value) -> u64 {
    if constexpr (!kIsFloat<D>) return std::is_signed_v<D> ? u64(s64(value)) : u64(value);
    return to_slot<D>(value);
  };
  if (is_wide(dst)) {
    alignas(64) u64 out[32];
    for (int l = 0; l < 32; l++) out[l] = extended(y[l]);
    store_slots<u64>(c, dst, out);
  } else {
    alignas(64) u32 out[32];
    for (int l = 0; l < 32; l++) out[l] = u32(extended(y[l]));
    store_slots<u32>(c, dst, out);
  }
}

// cvt.{f16x2,bf16x2}.f32 d, high, low
void cvt_pack2(Context& c, const Instruction& in) {
  auto high = source<float>(c, in, 0), low = source<float>(c, in, 1);
  bool bfloat = in.type == Type::BF16X2;
  auto one = [&](float x) -> u32 {
    if (in.has(mod::Relu)) x = relu(x);
    if (in.has(mod::SatFinite) && !bfloat && std::fabs(x) > 65504.f) x = std::copysign(65504.f, x);
    return bfloat ? float_to_bfloat(x, in.rounding()) : float_to_half(x, in.rounding());
  };
  write<u32>(c, in, 0, [&](int l) { return one(high[l]) << 16 | one(low[l]); });
}

u32 pair_to_fp8(const Instruction& in, float high, float low) {
  bool e4m3 = in.type == Type::E4M3X2;
  auto one = [&](float x) -> u32 { return float_to_fp8(in.has(mod::Relu) ? relu(x) : x, e4m3); };
  return one(high) << 8 | one(low);
}

void cvt_f32_to_fp8(Context& c, const Instruction& in) {
  auto high = source<float>(c, in, 0), low = source<float>(c, in, 1);
  write<u32>(c, in, 0, [&](int l) { return pair_to_fp8(in, high[l], low[l]); });
}
void cvt_16_to_fp8(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0);
  bool half = in.type2 == Type::F16X2;
  auto widen16 = [&](u16 x) { return half ? half_to_float(x) : bfloat_to_float(x); };
  write<u32>(c, in, 0, [&](int l) { return pair_to_fp8(in, widen16(u16(a[l] >> 16)), widen16(u16(a[l]))); });
}
void cvt_fp8_to_16(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0);
  bool e4m3 = in.type2 == Type::E4M3X2, half = in.type == Type::F16X2;
  auto one = [&](u8 x) -> u32 {
    float f = fp8_to_float(x, e4m3);
    if (in.has(mod::Relu)) f = relu(f);
    return half ? float_to_half(f) : float_to_bfloat(f);
  };
  write<u32>(c, in, 0, [&](int l) { return one(u8(a[l] >> 8)) << 16 | one(u8(a[l])); });
}

// tf32 keeps 10 bits of the fraction in the place of a float.
void cvt_tf32(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0);
  Rounding mode = in.rounding();
  write<u32>(c, in, 0, [&](int l) {
    u32 x = a[l];
    if (in.has(mod::Relu)) x = float_bits(relu(bits_float(x)));
    if ((x & 0x7fffffff) > 0x7f800000) return kNan32;
    if ((x & 0x7f800000) == 0x7f800000) return in.has(mod::SatFinite) ? (x & 0x80000000) | 0x7f7fe000u : x;
    if (mode == Rounding::NearestAway) x += 0x1000;
    if (mode == Rounding::Nearest) x += 0xfff + (x >> 13 & 1);
    if (in.has(mod::SatFinite) && (x & 0x7f800000) == 0x7f800000) return (x & 0x80000000) | 0x7f7fe000u;
    return x & ~0x1fffu;
  });
}

template <class S>
Handler pick_destination(Type type) {
  switch (type) {
    case Type::U8:
    case Type::B8:
      return cvt<S, u8>;
    case Type::S8:
      return cvt<S, s8>;
    case Type::U16:
    case Type::B16:
      return cvt<S, u16>;
    case Type::S16:
      return cvt<S, s16>;
    case Type::U32:
    case Type::B32:
      return cvt<S, u32>;
    case Type::S32:
      return cvt<S, s32>;
    case Type::U64:
    case Type::B64:
      return cvt<S, u64>;
    case Type::S64:
      return cvt<S, s64>;
    case Type::F16:
      return cvt<S, Half>;
    case Type::BF16:
      return cvt<S, BFloat>;
    case Type::F32:
      return cvt<S, float>;
    case Type::F64:
      return cvt<S, double>;
    default:
      return nullptr;
  }
}

Handler pick_cvt(const Instruction& in) {
  switch (in.type2) {
    case Type::U8:
    case Type::B8:
      return pick_destination<u8>(in.type);
    case Type::S8:
      return pick_destination<s8>(in.type);
    case Type::U16:
    case Type::B16:
      return pick_destination<u16>(in.type);
    case Type::S16:
      return pick_destination<s16>(in.type);
    case Type::U32:
    case Type::B32:
      return pick_destination<u32>(in.type);
    case Type::S32:
      return pick_destination<s32>(in.type);
    case Type::U64:
    case Type::B64:
      return pick_destination<u64>(in.type);
    case Type::S64:
      return pick_destination<s64>(in.type);
    case Type::F16:
      return pick_destination<Half>(in.type);
    case Type::BF16:
      return pick_destination<BFloat>(in.type);
    case Type::F32:
      return pick_destination<float>(in.type);
    case Type::F64:
      return pick_destination<double>(in.type);
    default:
      return nullptr;
  }
}

}  // namespace

Handler convert_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Cvt:
      return pick_cvt(in);
    case Op::CvtPack2:
      return cvt_pack2;
    case Op::CvtTf32:
      return cvt_tf32;
    case Op::CvtFp8:
      if (in.type == Type::E4M3X2 || in.type == Type::E5M2X2)
        return in.type2 == Type::F32 ? cvt_f32_to_fp8 : cvt_16_to_fp8;
      return cvt_fp8_to_16;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
