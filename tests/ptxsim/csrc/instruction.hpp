// A decoded instruction and its modifier bits.
#pragma once
#include "base.hpp"

namespace ptxsim {

// Modifier bits of Instruction::mods; every name has its own bit, and Python reads them by name.
// clang-format off
#define PTXSIM_MODIFIERS(X) \
  X(Sat, 16) X(Ftz, 17) X(RoundToInt, 18) X(Relu, 19) X(PropagateNan, 20) X(XorSign, 21) X(SatFinite, 22) \
  X(Approx, 23) X(Strong, 24) X(Acquire, 25) X(Release, 26) X(GpuScope, 27) X(Wrap, 28) X(ShiftAmount, 29) \
  X(High, 30) X(CarryIn, 31) X(CarryOut, 32) X(Subtract, 33) X(Transposed, 34) X(HasSize, 35) \
  X(IgnoreSource, 36) X(WaitAll, 37) X(NoIncrement, 38) X(ExpectTx, 39) X(HasOperand, 40) X(Drop, 41) \
  X(Parity, 42) X(ReadOnly, 43) X(ArriveOnly, 44) X(HasCount, 45) X(Cluster, 46) \
  X(ClusterScope, 47) X(Relaxed, 48) X(Multicast, 49) X(MbarrierInit, 50) X(Aligned, 51) X(FromShared, 52) X(ThroughL1, 53) X(NonCoherent, 54)
// clang-format on

namespace mod {
enum : u64 {
#define X(name, bit) name = 1ull << bit,
  PTXSIM_MODIFIERS(X)
#undef X
};
// Fields of several bits at the bottom of the word.
constexpr int kCompareShift = 0;   // 5 bits: Compare
constexpr int kBoolShift = 5;      // 2 bits: 0 none, 1 and, 2 or, 3 xor
constexpr int kRoundingShift = 7;  // 3 bits: Rounding
constexpr int kSpaceShift = 10;    // 3 bits: Space
}  // namespace mod

enum class Compare { Eq, Ne, Lt, Le, Gt, Ge, Lo, Ls, Hi, Hs, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
enum class Rounding { Nearest, Zero, Down, Up, NearestAway };
enum class Space { Generic, Global, Shared, Local, Const, Param };
enum class Atomic { Add, Min, Max, And, Or, Xor, Exch, Cas, Inc, Dec };

// Operands are 32-bit codes in a pool. Negative: constant number -(code + 1). Otherwise a byte offset into
// the warp's register file plus its kind in the low two bits.
enum OperandKind { kReg32 = 0, kReg64 = 1, kPredicate = 2, kNotPredicate = 3 };

struct Instruction {
  Op op;
  Type type, type2;
  s32 guard;  // register offset of the guarding predicate or -1
  u8 guard_negated, n_dst, n_src, vec;
  s32 target;    // branch or call target
  s32 line;      // in the PTX text
  s32 operands;  // first operand in the pool: destinations, then sources
  s32 aux;       // meaning depends on the opcode; said at each handler
  u64 mods;
  s64 imm, imm2;

  bool has(u64 bit) const { return mods & bit; }
  Compare compare() const { return static_cast<Compare>(mods >> mod::kCompareShift & 31); }
  int bool_op() const { return static_cast<int>(mods >> mod::kBoolShift & 3); }
  Rounding rounding() const { return static_cast<Rounding>(mods >> mod::kRoundingShift & 7); }
  Space space() const { return static_cast<Space>(mods >> mod::kSpaceShift & 7); }
};

}  // namespace ptxsim
