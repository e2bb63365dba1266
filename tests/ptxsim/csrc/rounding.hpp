// Evaluation in a directed rounding mode. The volatile copies keep the compiler from moving arithmetic across
// the changes of the control register.
#pragma once
#include <immintrin.h>

#include "instruction.hpp"

namespace ptxsim {

class RoundingGuard {
 public:
  explicit RoundingGuard(Rounding mode) : saved_(_mm_getcsr()) {
    static const unsigned bits[4] = {0, 3, 1, 2};  // nearest, zero, down, up
    _mm_setcsr((saved_ & ~0x6000u) | bits[static_cast<int>(mode) & 3] << 13);
    asm volatile("" ::: "memory");
  }
  ~RoundingGuard() {
    asm volatile("" ::: "memory");
    _mm_setcsr(saved_);
  }
  RoundingGuard(const RoundingGuard&) = delete;
  RoundingGuard& operator=(const RoundingGuard&) = delete;

 private:
  unsigned saved_;
};

template <class T, class F>
inline T rounded(Rounding mode, F f, T a, T b = T(), T c = T()) {
  volatile T x = a, y = b, z = c, result;
  {
    RoundingGuard guard(mode);
    result = f(T(x), T(y), T(z));
  }
  return result;
}

}  // namespace ptxsim
