// ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh: computed accurately, and on request off by up to the documented
// error.
#include "families.hpp"
#include "float_formats.hpp"
#include "operands.hpp"
#include "rounding.hpp"

namespace ptxsim {
namespace {

// The error bound that the PTX ISA states for a .approx form, relative unless said otherwise.
double approx_bound(Op op, Type type) {
  bool half = type == Type::F16 || type == Type::F16X2, bfloat = type == Type::BF16 || type == Type::BF16X2;
  switch (op) {
    case Op::Ex2:
      return half ? std::exp2(-9.9) : bfloat ? std::exp2(-7) : std::exp2(-22);
    case Op::Tanh:
      return bfloat ? std::exp2(-8) : std::exp2(-11);
    case Op::Rcp:
      return std::exp2(-23);
    case Op::Rsqrt:
      return std::exp2(-22.9);
    case Op::Sqrt:
      return std::exp2(-23);
    case Op::Lg2:
      return std::exp2(-22);  // absolute
    case Op::Sin:
    case Op::Cos:
      return std::exp2(-20.5);  // absolute
    default:
      return 0;
  }
}

// A number in [-1, 1] that depends on the input only, so that runs repeat and equal inputs agree.
double noise(u32 bits) {
  u32 h = bits * 2654435761u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return (h & 0xffffff) / double(0x7fffff) - 1.0;
}

template <class T>
T evaluate(Op op, T x) {
  switch (op) {
    case Op::Ex2:
      return std::exp2(x);
    case Op::Lg2:
      return std::log2(x);
    case Op::Rcp:
      return T(1) / x;
    case Op::Rsqrt:
      return T(1. / std::sqrt(double(x)));
    case Op::Sqrt:
      return std::sqrt(x);
    case Op::Sin:
      return std::sin(x);
    case Op::Cos:
      return std::cos(x);
    default:
      return std::tanh(x);
  }
}

float perturbed(const Context& c, const Instruction& in, float x, float y) {
  double scale = c.machine->approx_error;
  if (scale == 0 || !in.has(mod::Approx) || !std::isfinite(y)) return y;
  double error = scale * noise(float_bits(x)) * approx_bound(in.op, in.type);
  bool absolute = in.op == Op::Lg2 || in.op == Op::Sin || in.op == Op::Cos;
  return float(absolute ? y + error : y * (1 + error));
}

template <Op op>
void unary_f32(Context& c, const Instruction& in) {
  auto a = source<float>(c, in, 0);
  bool ftz = in.has(mod::Ftz), directed = in.rounding() != Rounding::Nearest;
  write<float>(c, in, 0, [&](int l) {
    float x = ftz ? flush(a[l]) : a[l];
    float y = directed ? rounded<float>(
                             in.rounding(), [](float p, float, float) { return evaluate(op, p); }, x)
                       : perturbed(c, in, x, evaluate(op, x));
    return canonical(ftz ? flush(y) : y);
  });
}

template <Op op>
void unary_f64(Context& c, const Instruction& in) {
  auto a = source<double>(c, in, 0);
  // rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 give the upper half of the result; the lower half is zero.
  bool upper_half = in.has(mod::Approx) && in.has(mod::Ftz);
  write<double>(c, in, 0, [&](int l) {
    double y = rounded<double>(in.rounding(), [](double p, double, double) { return evaluate(op, p); }, a[l]);
    return upper_half ? bits_double(double_bits(y) & 0xffffffff00000000ull) : y;
  });
}

u16 apply16(const Context& c, const Instruction& in, u16 bits) {
  bool half = in.type == Type::F16 || in.type == Type::F16X2, ftz = in.has(mod::Ftz);
  float x = half ? half_to_float(ftz ? flush_half(bits) : bits) : bfloat_to_float(bits);
  float y = perturbed(c, in, x, evaluate(in.op, x));
  return half ? (ftz ? flush_half(float_to_half(y)) : float_to_half(y)) : float_to_bfloat(y);
}
void unary_16(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0);
  bool packed = type_size(in.type) == 4;
  write<u32>(c, in, 0, [&](int l) {
    u32 r = apply16(c, in, u16(a[l]));
    return packed ? r | u32(apply16(c, in, u16(a[l] >> 16))) << 16 : r;
  });
}

template <Op op>
Handler pick(const Instruction& in) {
  constexpr bool has_16 = op == Op::Ex2 || op == Op::Tanh;
  constexpr bool has_64 = op == Op::Rcp || op == Op::Rsqrt || op == Op::Sqrt;
  switch (in.type) {
    case Type::F32:
      return unary_f32<op>;
    case Type::F64:
      return has_64 ? unary_f64<op> : nullptr;
    case Type::F16:
    case Type::BF16:
    case Type::F16X2:
    case Type::BF16X2:
      return has_16 ? unary_16 : nullptr;
    default:
      return nullptr;
  }
}

}  // namespace

Handler transcendental_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Ex2:
      return pick<Op::Ex2>(in);
    case Op::Lg2:
      return pick<Op::Lg2>(in);
    case Op::Rcp:
      return pick<Op::Rcp>(in);
    case Op::Rsqrt:
      return pick<Op::Rsqrt>(in);
    case Op::Sqrt:
      return pick<Op::Sqrt>(in);
    case Op::Sin:
      return pick<Op::Sin>(in);
    case Op::Cos:
      return pick<Op::Cos>(in);
    case Op::Tanh:
      return pick<Op::Tanh>(in);
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
