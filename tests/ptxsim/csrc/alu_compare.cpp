// setp, set, selp, slct, testp and logic on predicates.
#include <immintrin.h>

#include "families.hpp"
#include "float_formats.hpp"
#include "operands.hpp"

namespace ptxsim {
namespace {

inline float comparable(Half x) { return half_to_float(x.bits); }
inline float comparable(BFloat x) { return bfloat_to_float(x.bits); }
template <class T>
inline T comparable(T x) {
  return x;
}

// Ordered comparisons are false, unordered ones true, if an operand is NaN.
template <Compare op, class C>
inline bool compare(C a, C b) {
  switch (op) {
    case Compare::Eq:
      return a == b;
    case Compare::Ne:
      return a < b || a > b;
    case Compare::Lt:
    case Compare::Lo:
      return a < b;
    case Compare::Le:
    case Compare::Ls:
      return a <= b;
    case Compare::Gt:
    case Compare::Hi:
      return a > b;
    case Compare::Ge:
    case Compare::Hs:
      return a >= b;
    case Compare::Equ:
      return !(a < b || a > b);
    case Compare::Neu:
      return !(a == b);
    case Compare::Ltu:
      return !(a >= b);
    case Compare::Leu:
      return !(a > b);
    case Compare::Gtu:
      return !(a <= b);
    case Compare::Geu:
      return !(a < b);
    case Compare::Num:
      return a == a && b == b;
    case Compare::Nan:
      return a != a || b != b;
  }
  return false;
}

template <Compare op, class T>
u32 compare_lanes(Source<T> a, Source<T> b, bool ftz) {
  alignas(32) u32 lanes[32];
  for (int l = 0; l < 32; l++) {
    auto x = comparable(a[l]), y = comparable(b[l]);
    if constexpr (std::is_same_v<T, float>)
      if (ftz) x = flush(x), y = flush(y);
    lanes[l] = compare<op>(x, y) ? ~0u : 0;
  }
  u32 bits = 0;
  for (int k = 0; k < 4; k++)
    bits |= u32(_mm256_movemask_ps(_mm256_load_ps(reinterpret_cast<float*>(lanes) + 8 * k))) << 8 * k;
  return bits;
}

template <class T>
u32 compare_all(Compare op, Source<T> a, Source<T> b, bool ftz) {
  switch (op) {
#define PTXSIM_CASE(name) \
  case Compare::name:     \
    return compare_lanes<Compare::name, T>(a, b, ftz);
    PTXSIM_CASE(Eq)
    PTXSIM_CASE(Ne)
    PTXSIM_CASE(Lt)
    PTXSIM_CASE(Le)
    PTXSIM_CASE(Gt)
    PTXSIM_CASE(Ge)
    PTXSIM_CASE(Lo)
    PTXSIM_CASE(Ls)
    PTXSIM_CASE(Hi)
    PTXSIM_CASE(Hs)
    PTXSIM_CASE(Equ)
    PTXSIM_CASE(Neu)
    PTXSIM_CASE(Ltu)
    PTXSIM_CASE(Leu)
    PTXSIM_CASE(Gtu)
    PTXSIM_CASE(Geu)
    PTXSIM_CASE(Num)
    PTXSIM_CASE(Nan)
#undef PTXSIM_CASE
  }
  return 0;
}

u32 combine(int bool_op, u32 result, u32 other) {
  switch (bool_op) {
    case 1:
      return result & other;
    case 2:
      return result | other;
    case 3:
      return result ^ other;
  }
  return result;
}

struct Setp {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    u32 p = compare_all<T>(in.compare(), source<T>(c, in, 0), source<T>(c, in, 1), in.has(mod::Ftz)), q = ~p;
    if (in.n_src > 2) {
      u32 other = predicate_source(c, in, 2);
      p = combine(in.bool_op(), p, other);
      q = combine(in.bool_op(), q, other);
    }
    set_predicate(c, operand(c, in, 0), p);
    if (in.n_dst > 1) set_predicate(c, operand(c, in, 1), q);
  }
};

// type2: what is compared, type: the result
struct Set {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    u32 bits = compare_all<T>(in.compare(), source<T>(c, in, 0), source<T>(c, in, 1), in.has(mod::Ftz));
    if (in.n_src > 2) bits = combine(in.bool_op(), bits, predicate_source(c, in, 2));
    u32 yes = in.type == Type::F32                           ? 0x3f800000u
              : in.type == Type::F16                         ? 0x3c00u
              : in.type == Type::BF16                        ? 0x3f80u
              : in.type == Type::U16 || in.type == Type::S16 ? 0xffffu
                                                             : ~0u;
    write<u32>(c, in, 0, [&](int l) { return bits >> l & 1 ? yes : 0u; });
  }
};

// Two comparisons of 16-bit halves; returns the bits of the low and the high halves.
template <class T>
void compare_packed(Context& c, const Instruction& in, u32 bits[2]) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  bool ftz = in.has(mod::Ftz) && std::is_same_v<T, Half>;
  for (int h = 0; h < 2; h++) {
    alignas(64) u32 x[32], y[32];
    for (int l = 0; l < 32; l++) {
      u16 p = u16(a[l] >> 16 * h), q = u16(b[l] >> 16 * h);
      x[l] = ftz ? flush_half(p) : p;
      y[l] = ftz ? flush_half(q) : q;
    }
    bits[h] = compare_all<T>(in.compare(), Source<T>{x}, Source<T>{y}, false);
    if (in.n_src > 2) bits[h] = combine(in.bool_op(), bits[h], predicate_source(c, in, 2));
  }
}
template <class T>
void setp_packed(Context& c, const Instruction& in) {
  u32 bits[2];
  compare_packed<T>(c, in, bits);
  for (int h = 0; h < in.n_dst; h++) set_predicate(c, operand(c, in, h), bits[h]);
}
template <class T>
void set_packed(Context& c, const Instruction& in) {
  u32 bits[2];
  compare_packed<T>(c, in, bits);
  u32 yes = in.type == Type::F16X2 ? 0x3c00 : in.type == Type::BF16X2 ? 0x3f80 : 0xffff;
  write<u32>(c, in, 0, [&](int l) { return (bits[0] >> l & 1) * yes | (bits[1] >> l & 1) * yes << 16; });
}

template <class S>
void selp(Context& c, const Instruction& in) {
  auto a = source<S>(c, in, 0), b = source<S>(c, in, 1);
  u32 p = predicate_source(c, in, 2);
  write<S>(c, in, 0, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

// Chooses by the sign of c; a NaN chooses b. type2: type of c
template <class S>
void slct(Context& c, const Instruction& in) {
  auto a = source<S>(c, in, 0), b = source<S>(c, in, 1);
  auto d = source<u32>(c, in, 2);
  bool is_float = in.type2 == Type::F32, ftz = in.has(mod::Ftz);
  write<S>(c, in, 0, [&](int l) {
    float x = bits_float(d[l]);
    bool first = is_float ? (ftz ? flush(x) : x) >= 0.f : s32(d[l]) >= 0;
    return first ? a[l] : b[l];
  });
}

// aux: finite, infinite, number, notanumber, normal, subnormal
template <class T>
void testp(Context& c, const Instruction& in) {
  auto a = source<T>(c, in, 0);
  u32 bits = 0;
  for (int l = 0; l < 32; l++) {
    int kind = std::fpclassify(a[l]);
    bool yes = in.aux == 0   ? kind != FP_INFINITE && kind != FP_NAN
               : in.aux == 1 ? kind == FP_INFINITE
               : in.aux == 2 ? kind != FP_NAN
               : in.aux == 3 ? kind == FP_NAN
               : in.aux == 4 ? kind == FP_NORMAL
                             : kind == FP_SUBNORMAL;
    bits |= u32(yes) << l;
  }
  set_predicate(c, operand(c, in, 0), bits);
}

// aux: and, or, xor, not
void pred_logic(Context& c, const Instruction& in) {
  u32 a = predicate_source(c, in, 0), b = in.n_src > 1 ? predicate_source(c, in, 1) : 0;
  set_predicate(c, operand(c, in, 0), in.aux == 0 ? a & b : in.aux == 1 ? a | b : in.aux == 2 ? a ^ b : ~a);
}

template <class K>
Handler pick_comparable(Type t) {
  switch (t) {
    case Type::F32:
      return &K::template run<float>;
    case Type::F64:
      return &K::template run<double>;
    case Type::F16:
      return &K::template run<Half>;
    case Type::BF16:
      return &K::template run<BFloat>;
    default:
      return pick_integer<K>(t);
  }
}

}  // namespace

Handler compare_handler(const Instruction& in) {
  bool wide = type_size(in.type) == 8;
  switch (in.op) {
    case Op::Setp:
      return pick_comparable<Setp>(in.type);
    case Op::SetpPacked:
      return in.type == Type::BF16X2 ? setp_packed<BFloat> : setp_packed<Half>;
    case Op::Set:
      return in.type2 == Type::F16X2    ? set_packed<Half>
             : in.type2 == Type::BF16X2 ? set_packed<BFloat>
                                        : pick_comparable<Set>(in.type2);
    case Op::Selp:
      return wide ? selp<u64> : selp<u32>;
    case Op::Slct:
      return wide ? slct<u64> : slct<u32>;
    case Op::Testp:
      return in.type == Type::F64 ? testp<double> : testp<float>;
    case Op::PredLogic:
      return pred_logic;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
