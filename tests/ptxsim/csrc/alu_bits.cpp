// Logic, shifts and bit fields.
#include "families.hpp"
#include "operands.hpp"

namespace ptxsim {
namespace {

enum class Logic { And, Or, Xor };

template <Logic kind>
struct LogicOp {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
    write<T>(c, in, 0, [&](int l) {
      return T(kind == Logic::And ? a[l] & b[l] : kind == Logic::Or ? a[l] | b[l] : a[l] ^ b[l]);
    });
  }
};
struct NotOp {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    write<T>(c, in, 0, [&](int l) { return T(~a[l]); });
  }
};
struct Cnot {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    write<T>(c, in, 0, [&](int l) { return T(a[l] == 0); });
  }
};

// Shift amounts are not taken modulo the width: they clamp.
struct ShiftLeft {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    auto b = source<u32>(c, in, 1);
    constexpr u32 width = 8 * sizeof(T);
    write<T>(c, in, 0, [&](int l) { return b[l] >= width ? T(0) : T(u64(a[l]) << (b[l] & 63)); });
  }
};
struct ShiftRight {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    auto b = source<u32>(c, in, 1);
    constexpr u32 width = 8 * sizeof(T);
    write<T>(c, in, 0, [&](int l) {
      if constexpr (std::is_signed_v<T>) return T(a[l] >> std::min(b[l], width - 1));
      return b[l] >= width ? T(0) : T(a[l] >> (b[l] & (width - 1)));
    });
  }
};

void funnel_shift(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), s = source<u32>(c, in, 2);
  bool wrap = in.has(mod::Wrap), left = in.op == Op::FunnelLeft;
  write<u32>(c, in, 0, [&](int l) {
    u32 n = wrap ? s[l] & 31 : std::min(s[l], 32u);
    u64 both = u64(b[l]) << 32 | a[l];
    return u32(left ? both << n >> 32 : both >> n);
  });
}

// imm: the truth table
void lop3(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), d = source<u32>(c, in, 2);
  u32 row[8];
  for (int i = 0; i < 8; i++) row[i] = in.imm >> i & 1 ? ~0u : 0;
  write<u32>(c, in, 0, [&](int l) {
    u32 x = a[l], y = b[l], z = d[l];
    return (row[0] & ~x & ~y & ~z) | (row[1] & ~x & ~y & z) | (row[2] & ~x & y & ~z) | (row[3] & ~x & y & z) |
           (row[4] & x & ~y & ~z) | (row[5] & x & ~y & z) | (row[6] & x & y & ~z) | (row[7] & x & y & z);
  });
}

// aux: 0 the general form, else f4e, b4e, rc8, ecl, ecr, rc16
void prmt(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1), s = source<u32>(c, in, 2);
  int mode = in.aux;
  auto pick = [mode](u32 k, u32 i) -> u32 {
    switch (mode) {
      case 1:
        return k + i;
      case 2:
        return (k - i) & 7;
      case 3:
        return k;
      case 4:
        return std::max(i, k);
      case 5:
        return std::min(i, k);
      default:
        return (k & 1) * 2 + (i & 1);
    }
  };
  write<u32>(c, in, 0, [&](int l) {
    u64 bytes = u64(b[l]) << 32 | a[l];
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
      u32 selector = mode ? pick(s[l] & 3, i) : s[l] >> 4 * i & 15;
      u32 byte = bytes >> 8 * (selector & 7) & 255;
      if (!mode && selector & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
      result |= byte << 8 * i;
    }
    return result;
  });
}

struct Bfe {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    auto position = source<u32>(c, in, 1), length = source<u32>(c, in, 2);
    constexpr int width = 8 * sizeof(T);
    write<T>(c, in, 0, [&](int l) {
      int pos = position[l] & 255, len = length[l] & 255;
      if (!len) return T(0);
      // Bits past the top read as the sign (or zero), and a field that ends there is extended from it.
      T shifted = pos < width ? T(a[l] >> pos) : T(a[l] < 0 ? -1 : 0);
      if (len >= width) return shifted;
      using U = std::make_unsigned_t<T>;
      return T(T(U(shifted) << (width - len)) >> (width - len));
    });
  }
};
struct Bfi {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0), b = source<T>(c, in, 1);
    auto position = source<u32>(c, in, 2), length = source<u32>(c, in, 3);
    constexpr int width = 8 * sizeof(T);
    write<T>(c, in, 0, [&](int l) {
      int pos = position[l] & 255, len = length[l] & 255;
      if (pos >= width || !len) return b[l];
      T field = T((len >= width ? T(~T(0)) : T((T(1) << len) - 1)) << pos);
      return T((b[l] & ~field) | ((a[l] << pos) & field));
    });
  }
};
struct Bfind {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    bool shift_amount = in.has(mod::ShiftAmount);
    using U = std::make_unsigned_t<T>;
    write<u32>(c, in, 0, [&](int l) {
      u64 v = U(a[l] < 0 ? T(~a[l]) : a[l]);  // the highest bit that differs from the sign
      if (!v) return ~0u;
      u32 bit = 63 - __builtin_clzll(v);
      return shift_amount ? 8 * u32(sizeof(T)) - 1 - bit : bit;
    });
  }
};
struct Popc {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    write<u32>(c, in, 0, [&](int l) { return u32(__builtin_popcountll(a[l])); });
  }
};
struct Clz {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    constexpr u32 width = 8 * sizeof(T);
    write<u32>(c, in, 0, [&](int l) { return a[l] ? u32(__builtin_clzll(a[l])) - (64 - width) : width; });
  }
};
struct Brev {
  template <class T>
  static void run(Context& c, const Instruction& in) {
    auto a = source<T>(c, in, 0);
    write<T>(c, in, 0, [&](int l) {
      T x = a[l], reversed = 0;
      for (size_t i = 0; i < 8 * sizeof(T); i++) reversed = T(reversed << 1 | (x >> i & 1));
      return reversed;
    });
  }
};

// The position of the n-th set bit from a base
void fns(Context& c, const Instruction& in) {
  auto bits = source<u32>(c, in, 0), base = source<u32>(c, in, 1);
  auto offset = source<s32>(c, in, 2);
  write<u32>(c, in, 0, [&](int l) {
    s32 n = offset[l];
    s64 position = s32(base[l]);
    if (!n) return position >= 0 && position < 32 && bits[l] >> position & 1 ? u32(position) : ~0u;
    s64 left = std::abs(s64(n)) - 1;
    for (; position >= 0 && position < 32; position += n > 0 ? 1 : -1)
      if (bits[l] >> position & 1 && left-- == 0) return u32(position);
    return ~0u;
  });
}

void bmsk(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  bool wrap = in.has(mod::Wrap);
  write<u32>(c, in, 0, [&](int l) {
    u64 start = wrap ? a[l] & 31 : std::min(a[l], 32u), width = wrap ? b[l] & 31 : std::min(b[l], 32u);
    return u32(((1ull << width) - 1) << start);
  });
}

void szext(Context& c, const Instruction& in) {
  auto a = source<u32>(c, in, 0), b = source<u32>(c, in, 1);
  bool wrap = in.has(mod::Wrap), sign = in.type == Type::S32;
  write<u32>(c, in, 0, [&](int l) {
    u32 n = wrap ? b[l] & 31 : std::min(b[l], 32u);
    if (n == 32) return a[l];
    if (!n) return 0u;
    u32 value = a[l] & ((1u << n) - 1);
    return sign && value >> (n - 1) ? value | ~0u << n : value;
  });
}

template <class K>
Handler pick_field(Type t) {  // 32 or 64 bits
  if (type_size(t) == 8) return is_signed(t) ? &K::template run<s64> : &K::template run<u64>;
  return is_signed(t) ? &K::template run<s32> : &K::template run<u32>;
}

}  // namespace

Handler bits_handler(const Instruction& in) {
  Type t = in.type;
  switch (in.op) {
    case Op::And:
      return pick_unsigned<LogicOp<Logic::And>>(t);
    case Op::Or:
      return pick_unsigned<LogicOp<Logic::Or>>(t);
    case Op::Xor:
      return pick_unsigned<LogicOp<Logic::Xor>>(t);
    case Op::Not:
      return pick_unsigned<NotOp>(t);
    case Op::Cnot:
      return pick_unsigned<Cnot>(t);
    case Op::Shl:
      return pick_unsigned<ShiftLeft>(t);
    case Op::Shr:
      return pick_integer<ShiftRight>(t);
    case Op::FunnelLeft:
    case Op::FunnelRight:
      return funnel_shift;
    case Op::Lop3:
      return lop3;
    case Op::Prmt:
      return prmt;
    case Op::Bfe:
      return pick_field<Bfe>(t);
    case Op::Bfi:
      return type_size(t) == 8 ? Bfi::run<u64> : Bfi::run<u32>;
    case Op::Bfind:
      return pick_field<Bfind>(t);
    case Op::Popc:
      return type_size(t) == 8 ? Popc::run<u64> : Popc::run<u32>;
    case Op::Clz:
      return type_size(t) == 8 ? Clz::run<u64> : Clz::run<u32>;
    case Op::Brev:
      return type_size(t) == 8 ? Brev::run<u64> : Brev::run<u32>;
    case Op::Fns:
      return fns;
    case Op::Bmsk:
      return bmsk;
    case Op::Szext:
      return szext;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
