// The arithmetic of the schemes of schemes.h, on vectors of channels. `forward` turns kIn neighbouring inputs
// d into kValues transformed inputs o; `inverse` turns kValues products m into kOut outputs y.
#pragma once
#include <type_traits>

#include "../schemes.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

// Stride 1: F(Outputs, 3).
template <int Outputs>
struct Winograd {
  static constexpr int kStride = 1, kOut = Outputs, kIn = Outputs + 2, kValues = Outputs + 2;

  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    if constexpr (Outputs == 2) {
      o[0] = d[0] - d[2];
      o[1] = d[3] - d[1];
      o[2] = d[2] + d[1];
      o[3] = d[2] - d[1];
    } else if constexpr (Outputs == 4) {
      o[0] = fma(.25f, d[4], fma(-1.25f, d[2], d[0]));
      o[1] = fma(4.f, d[1], fma(-5.f, d[3], d[5]));
      const Vec even1 = fma(-4.f, d[2], d[4]), odd1 = fma(-4.f, d[1], d[3]);
      o[2] = even1 + odd1;
      o[3] = even1 - odd1;
      const Vec even2 = d[4] - d[2], odd2 = d[3] - d[1];
      o[4] = fma(2.f, odd2, even2);
      o[5] = fma(-2.f, odd2, even2);
    } else {
      o[0] = fma(5.25f, d[4] - d[2], d[0] - d[6]);
      o[1] = fma(5.25f, d[3] - d[5], d[7] - d[1]);
      const Vec even1 = fma(-4.25f, d[4], d[2] + d[6]), odd1 = fma(-4.25f, d[3], d[1] + d[5]);
      o[2] = even1 + odd1;
      o[3] = even1 - odd1;
      const Vec even2 = fma(.25f, d[2], fma(-1.25f, d[4], d[6]));
      const Vec odd2 = fma(.25f, d[1], fma(-1.25f, d[3], d[5]));
      o[4] = fma(2.f, odd2, even2);
      o[5] = fma(-2.f, odd2, even2);
      const Vec even3 = fma(4.f, d[2], fma(-5.f, d[4], d[6]));
      const Vec odd3 = fma(4.f, d[1], fma(-5.f, d[3], d[5]));
      o[6] = fma(.5f, odd3, even3);
      o[7] = fma(-.5f, odd3, even3);
    }
  }
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    constexpr float n1 = Outputs == 2 ? 1 / 2.f : Outputs == 4 ? -1 / 6.f : -2 / 9.f;
    const Vec s1 = n1 * (m[2] + m[3]), d1 = n1 * (m[2] - m[3]);
    if constexpr (Outputs == 2) {
      y[0] = m[0] + s1;
      y[1] = m[1] + d1;
      return;
    }
    constexpr float n2 = Outputs == 4 ? 1 / 24.f : 1 / 90.f;
    const Vec s2 = m[4] + m[5], d2 = m[4] - m[5];
    y[0] = fma(n2, s2, m[0] + s1);
    y[1] = fma(n2 * 2, d2, d1);
    y[2] = fma(n2 * 4, s2, s1);
    if constexpr (Outputs == 4) {
      y[3] = fma(n2 * 8, d2, m[1] + d1);
    } else {
      constexpr float n3 = 8 / 45.f;
      const Vec s3 = m[6] + m[7], d3 = m[6] - m[7];
      y[0] = fma(n3, s3, y[0]);
      y[1] = fma(n3 / 2, d3, y[1]);
      y[2] = fma(n3 / 4, s3, y[2]);
      y[3] = fma(n3 / 8, d3, fma(n2 * 8, d2, d1));
      y[4] = fma(n3 / 16, s3, fma(n2 * 16, s2, s1));
      y[5] = fma(n3 / 32, d3, fma(n2 * 32, d2, m[1] + d1));
    }
  }
  // The transpose of `inverse`: gradients of outputs to gradients of products.
  static PARNET_INLINE void transposed(const Vec* y, Vec* m) {
    constexpr float n1 = Outputs == 2 ? 1 / 2.f : Outputs == 4 ? -1 / 6.f : -2 / 9.f;
    constexpr float n2 = Outputs == 4 ? 1 / 24.f : 1 / 90.f, n3 = 8 / 45.f;
    m[0] = y[0];
    m[1] = y[Outputs - 1];
    if constexpr (Outputs == 2) {
      m[2] = n1 * (y[0] + y[1]);
      m[3] = n1 * (y[0] - y[1]);
    } else if constexpr (Outputs == 4) {
      const Vec even1 = n1 * (y[0] + y[2]), odd1 = n1 * (y[1] + y[3]);
      m[2] = even1 + odd1;
      m[3] = even1 - odd1;
      const Vec even2 = n2 * fma(4.f, y[2], y[0]), odd2 = (2 * n2) * fma(4.f, y[3], y[1]);
      m[4] = even2 + odd2;
      m[5] = even2 - odd2;
    } else {
      const Vec even1 = n1 * (y[0] + y[2] + y[4]), odd1 = n1 * (y[1] + y[3] + y[5]);
      m[2] = even1 + odd1;
      m[3] = even1 - odd1;
      const Vec even2 = n2 * fma(16.f, y[4], fma(4.f, y[2], y[0]));
      const Vec odd2 = (2 * n2) * fma(16.f, y[5], fma(4.f, y[3], y[1]));
      m[4] = even2 + odd2;
      m[5] = even2 - odd2;
      const Vec even3 = n3 * fma(1 / 16.f, y[4], fma(1 / 4.f, y[2], y[0]));
      const Vec odd3 = (n3 / 2) * fma(1 / 16.f, y[5], fma(1 / 4.f, y[3], y[1]));
      m[6] = even3 + odd3;
      m[7] = even3 - odd3;
    }
  }
};

// Stride 2: F(Outputs, 2) of the inputs that the outer taps meet, and each input that the middle tap meets.
template <int Outputs>
struct Polyphase {
  static constexpr int kStride = 2, kOut = Outputs, kIn = 2 * Outputs + 1, kValues = 2 * Outputs + 1;

  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    if constexpr (Outputs == 1) {
      o[0] = d[0], o[1] = d[2];
    } else if constexpr (Outputs == 2) {
      o[0] = d[0] - d[2], o[1] = d[2], o[2] = d[4] - d[2];
    } else if constexpr (Outputs == 3) {
      const Vec middle = .5f * d[4];
      o[0] = d[0] - d[4];
      o[1] = fma(.5f, d[2], middle);
      o[2] = fma(-.5f, d[2], middle);
      o[3] = d[6] - d[2];
    } else {
      const Vec e = d[6] - d[2];
      o[0] = fma(.5f, e, d[0] - d[4]);
      o[1] = fma(.5f, d[4] - d[6], d[2]);
      o[2] = fma(-1 / 6.f, d[6], fma(.5f, d[4], (-1 / 3.f) * d[2]));
      o[3] = (1 / 6.f) * e;
      o[4] = fma(-2.f, e, d[8] - d[4]);
    }
    PARNET_UNROLL for (int i = 0; i < Outputs; i++) o[Outputs + 1 + i] = d[2 * i + 1];
  }
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    const Vec* even = m + Outputs + 1;
    if constexpr (Outputs == 1) {
      y[0] = m[0] + m[1] + even[0];
    } else if constexpr (Outputs == 2) {
      y[0] = m[0] + m[1] + even[0];
      y[1] = m[1] + m[2] + even[1];
    } else if constexpr (Outputs == 3) {
      const Vec s = m[1] + m[2], t = m[1] - m[2];
      y[0] = m[0] + even[0] + s;
      y[1] = t + even[1];
      y[2] = m[3] + even[2] + s;
    } else {
      const Vec s = m[1] + m[2], t = m[1] - m[2];
      y[0] = m[0] + s + (m[3] + even[0]);
      y[1] = fma(2.f, m[3], t + even[1]);
      y[2] = fma(4.f, m[3], s + even[2]);
      y[3] = fma(8.f, m[3], t + (m[4] + even[3]));
    }
  }
  // The transpose of `inverse`.
  static PARNET_INLINE void transposed(const Vec* y, Vec* m) {
    m[0] = y[0];
    if constexpr (Outputs == 1) {
      m[1] = y[0];
    } else if constexpr (Outputs == 2) {
      m[1] = y[0] + y[1];
      m[2] = y[1];
    } else if constexpr (Outputs == 3) {
      const Vec even = y[0] + y[2];
      m[1] = even + y[1];
      m[2] = even - y[1];
      m[3] = y[2];
    } else {
      const Vec even = y[0] + y[2], odd = y[1] + y[3];
      m[1] = even + odd;
      m[2] = even - odd;
      m[3] = fma(8.f, y[3], fma(4.f, y[2], fma(2.f, y[1], y[0])));
      m[4] = y[3];
    }
    PARNET_UNROLL for (int i = 0; i < Outputs; i++) m[Outputs + 1 + i] = y[i];
  }
  // The transpose of `forward`: gradients of transformed inputs to gradients of inputs.
  static PARNET_INLINE void adjoint(const Vec* o, Vec* d) {
    d[0] = o[0];
    if constexpr (Outputs == 1) {
      d[2] = o[1];
    } else if constexpr (Outputs == 2) {
      d[2] = o[1] - (o[0] + o[2]);
      d[4] = o[2];
    } else if constexpr (Outputs == 3) {
      d[2] = fma(.5f, o[1] - o[2], zero() - o[3]);
      d[4] = fma(.5f, o[1] + o[2], zero() - o[0]);
      d[6] = o[3];
    } else {
      const Vec outer = fma(2.f, o[4], (-1 / 6.f) * o[3]);
      d[2] = fma(-.5f, o[0], o[1]) + fma(-1 / 3.f, o[2], outer);
      d[4] = fma(.5f, o[1] + o[2], zero() - (o[0] + o[4]));
      d[6] = fma(.5f, o[0] - o[1], fma(-1 / 6.f, o[2], zero() - outer));
      d[8] = o[4];
    }
    PARNET_UNROLL for (int i = 0; i < Outputs; i++) d[2 * i + 1] = o[Outputs + 1 + i];
  }
};

template <int Stride, int Kind>
using SchemeOf = std::conditional_t<Stride == 1, Winograd<kSchemes[0][Kind].outputs>,
                                    Polyphase<kSchemes[1][Kind].outputs>>;

// ---- Transformed weights. Forms are made by additions: processors with adders beside their multipliers do
// these between the products at no cost. Intel's have none, and take fewer instructions with fused
// multiply-adds.

template <Form F>
PARNET_INLINE Vec combine(Vec t0, Vec t1, Vec t2) {
  switch (F) {
    case Form::kTap:
      return t0;
    case Form::kPlus:
      return (t0 + t2) + t1;
    case Form::kMinus:
      return (t0 + t2) - t1;
    case Form::kPlusTwice: {
      if (kIntel) return fma(2.f, fma(2.f, t2, t1), t0);
      const Vec rest = (t2 + t2) + t1;
      return t0 + (rest + rest);
    }
    case Form::kMinusTwice: {
      if (kIntel) return fma(-2.f, fma(-2.f, t2, t1), t0);
      const Vec rest = (t2 + t2) - t1;
      return t0 + (rest + rest);
    }
    case Form::kPlusHalf:
      return combine<Form::kPlusTwice>(t2, t1, t0);
    case Form::kMinusHalf:
      return combine<Form::kMinusTwice>(t2, t1, t0);
    case Form::kSum:
      return t0 + t2;
    case Form::kDifference:
      return t0 - t2;
    case Form::kSumTwice:
      return kIntel ? fma(2.f, t2, t0) : t0 + (t2 + t2);
  }
}

// The weight of a slot. `taps` holds three vectors, `pitch` floats apart.
template <int Stride, int Index>
PARNET_INLINE Vec weight_at(const float* taps, int pitch) {
  constexpr Slot slot = kSlots[Stride - 1][Index];
  const float* t = taps + slot.tap * pitch;
  if constexpr (slot.form == Form::kTap) return load(t);
  return combine<slot.form>(load(t), load(t + pitch), load(t + 2 * pitch));
}

// Transforms the taps of one panel along rows, for one row of slots: [channel][tap row][tap column][kPanel]
// to [channel][tap column][kPanel].
template <int Stride, int Row = 0>
void expand_rows(const float* taps, int channels, float* rows, int row) {
  if constexpr (Row < (Stride == 1 ? kMaxSlots : kFewSlots)) {
    if (row != Row) return expand_rows<Stride, Row + 1>(taps, channels, rows, row);
    for (int c = 0; c < channels; c++, taps += 9 * kPanel, rows += 3 * kPanel) {
      PARNET_UNROLL for (int i = 0; i < 3 * kPanel; i += kLanes) {
        store(rows + i, weight_at<Stride, Row>(taps + i, 3 * kPanel));
      }
    }
  }
}

// Transforms what expand_rows left along columns, for the first `slots` slots of the row: to
// [slot][channel][kPanel], with `slot_stride` floats between slots.
template <int Stride, int Index = 0>
void expand_columns(const float* rows, int channels, float* u, int64_t slot_stride, int slots) {
  if constexpr (Index < (Stride == 1 ? kMaxSlots : kFewSlots)) {
    if (Index >= slots) return;
    for (int c = 0; c < channels; c++) {
      PARNET_UNROLL for (int i = 0; i < kPanel; i += kLanes) {
        store(u + c * kPanel + i, weight_at<Stride, Index>(rows + c * 3 * kPanel + i, kPanel));
      }
    }
    expand_columns<Stride, Index + 1>(rows, channels, u + slot_stride, slot_stride, slots);
  }
}

void expand_rows(const float* taps, int channels, float* rows, int stride, int row) {
  stride == 1 ? expand_rows<1>(taps, channels, rows, row) : expand_rows<2>(taps, channels, rows, row);
}
void expand_columns(const float* rows, int channels, float* u, int64_t slot_stride, int stride, int slots) {
  stride == 1 ? expand_columns<1>(rows, channels, u, slot_stride, slots)
              : expand_columns<2>(rows, channels, u, slot_stride, slots);
}

}  // namespace
}  // namespace parnet::cpu
