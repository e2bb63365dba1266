// Integer aliases and the opcode and type tables. Python looks the numbers up by name (bindings.cpp).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

namespace ptxsim {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using s128 = __int128;
using u128 = unsigned __int128;

// clang-format off
#define PTXSIM_OPCODES(X) \
  X(Nop) X(Add) X(Sub) X(Mul) X(MulHi) X(MulWide) X(Mul24) X(Mad) X(MadHi) X(MadWide) X(Mad24) X(Fma) \
  X(Div) X(Rem) X(Min) X(Max) X(Min3) X(Max3) X(Abs) X(Neg) X(And) X(Or) X(Xor) X(Not) X(Cnot) X(Shl) \
  X(Shr) X(FunnelLeft) X(FunnelRight) X(Lop3) X(Prmt) X(Bfe) X(Bfi) X(Bfind) X(Popc) X(Clz) X(Brev) \
  X(Sad) X(Dp4a) X(Dp2a) X(AddCarry) X(MadCarry) X(PackedInt) X(Fns) X(Szext) X(Bmsk) \
  X(Setp) X(SetpPacked) X(Set) X(Selp) X(Slct) X(PredLogic) X(Testp) X(Copysign) \
  X(Mov) X(Pack) X(Unpack) X(AddImmediate) X(Mapa) X(CtaRank) X(Isspacep) X(Clock) \
  X(Cvt) X(CvtPack2) X(CvtFp8) X(CvtTf32) X(Ex2) X(Lg2) X(Rcp) X(Rsqrt) X(Sqrt) X(Sin) X(Cos) X(Tanh) \
  X(Ld) X(St) X(Atom) X(Red) X(Fence) X(ProxyFence) \
  X(CpAsync) X(CpAsyncCommit) X(CpAsyncWait) X(CpAsyncMbarrier) \
  X(MbarrierInit) X(MbarrierInval) X(MbarrierArrive) X(MbarrierTx) X(MbarrierWait) X(MbarrierPending) \
  X(BulkLoad) X(BulkStore) X(TensorLoad) X(TensorStore) X(BulkCommit) X(BulkWait) \
  X(Ldmatrix) X(Stmatrix) X(Movmatrix) X(Mma) X(WmmaLoad) X(WmmaStore) X(WmmaMma) \
  X(WgmmaFence) X(Wgmma) X(WgmmaCommit) X(WgmmaWait) \
  X(Shfl) X(Vote) X(Match) X(Redux) X(Elect) X(Activemask) \
  X(Bar) X(BarWarp) X(ClusterArrive) X(ClusterWait) X(Bra) X(Brx) X(Call) X(Ret) X(Exit) X(Trap) X(Nanosleep) X(Vprintf) X(AssertFail)
// clang-format on

enum class Op : u16 {
#define X(name) name,
  PTXSIM_OPCODES(X)
#undef X
};

// clang-format off
#define PTXSIM_TYPES(X) \
  X(B8) X(B16) X(B32) X(B64) X(B128) X(U8) X(U16) X(U32) X(U64) X(S8) X(S16) X(S32) X(S64) \
  X(F16) X(F16X2) X(BF16) X(BF16X2) X(F32) X(F64) X(PRED) X(TF32) X(E4M3) X(E5M2) X(E4M3X2) X(E5M2X2) \
  X(F32X2) X(U16X2) X(S16X2)
// clang-format on

enum class Type : u8 {
#define X(name) name,
  PTXSIM_TYPES(X)
#undef X
};

constexpr int type_size(Type type) {
  switch (type) {
    case Type::B8:
    case Type::U8:
    case Type::S8:
    case Type::E4M3:
    case Type::E5M2:
      return 1;
    case Type::B16:
    case Type::U16:
    case Type::S16:
    case Type::F16:
    case Type::BF16:
    case Type::E4M3X2:
    case Type::E5M2X2:
      return 2;
    case Type::B64:
    case Type::U64:
    case Type::S64:
    case Type::F64:
    case Type::F32X2:
      return 8;
    case Type::B128:
      return 16;
    default:
      return 4;
  }
}

constexpr bool is_signed(Type type) {
  return type == Type::S8 || type == Type::S16 || type == Type::S32 || type == Type::S64;
}

inline int first_lane(u32 mask) { return __builtin_ctz(mask); }

// Calls f(lane) for every set bit.
template <class F>
inline void for_lanes(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace ptxsim
