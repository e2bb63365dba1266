// One-dimensional fast convolution schemes; the tile transforms apply one along rows and one along columns.
//
// Each scheme turns kIn inputs into kFreq values; value i multiplies the weights of evaluation point
// kSlot[i]; `inverse` turns the kFreq products into kOut outputs.
#pragma once
#include "layer.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

// Stride 1: F(4, 3) with the points 0, +-p, +-q, inf. p = 1/sqrt(2), q = sqrt(2) has half the error of the
// textbook points +-1, +-2 (and p^2 q^2 = 1 saves a multiplication). Larger tiles lose too much: at 128
// channels F(6, 3) along both axes has 4 times, along one axis 2.6 times the error, for 18 and 10 % fewer
// products.
constexpr float kP = 0.70710678118654752f, kQ = 1.41421356237309505f;
constexpr float kP2 = .5f, kQ2 = 2.f, kP3 = kP * kP2, kQ3 = kQ * kQ2;

struct Winograd4 {
  static constexpr int kStride = 1, kOut = 4, kIn = 6, kFreq = 6;

  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    const Vec u = fma(-kQ2, d[2], d[4]), v = fma(-kQ2, d[1], d[3]);
    const Vec w = fma(-kP2, d[2], d[4]), z = fma(-kP2, d[1], d[3]);
    o[0] = d[0] + fma(-(kP2 + kQ2), d[2], d[4]);
    o[1] = fma(kP, v, u);
    o[2] = fma(-kP, v, u);
    o[3] = fma(kQ, z, w);
    o[4] = fma(-kQ, z, w);
    o[5] = d[1] + fma(-(kP2 + kQ2), d[3], d[5]);
  }
  // With the normalisation of the points, 1 / (2 p^2 (p^2 - q^2)) and 1 / (2 q^2 (q^2 - p^2)).
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    constexpr float np = 1 / (2 * kP2 * (kP2 - kQ2)), nq = 1 / (2 * kQ2 * (kQ2 - kP2));
    const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = fma(nq, s2, fma(np, s1, m[0]));
    y[1] = fma(nq * kQ, d2, (np * kP) * d1);
    y[2] = fma(nq * kQ2, s2, (np * kP2) * s1);
    y[3] = fma(nq * kQ3, d2, fma(np * kP3, d1, (1 / kP2) * m[5]));
  }
};

// F(2, 3) on the points 0, +-p, inf of Winograd4, so that it shares its weights: edges of maps that 4 does
// not divide.
struct Winograd2 {
  static constexpr int kStride = 1, kOut = 2, kIn = 4, kFreq = 4;

  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    o[0] = fma(-kQ2, d[2], d[0]);
    o[1] = fma(kP, d[1], d[2]);
    o[2] = fma(-kP, d[1], d[2]);
    o[3] = fma(-kP2, d[1], d[3]);
  }
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = fma(kP, m[1] - m[2], (1 / kP2) * m[3]);
  }
};

// Stride 2, split into phases: y[i] = (w0 x[2i-1] + w2 x[2i+1]) + w1 x[2i]. The first is a 2-tap filter,
// F(kOut, 2) on the points 0, 1, -1, 2, inf (the first kOut of them, then inf); the second multiplies each
// even input by w1, slot 5.
template <int Outputs>
struct Polyphase {
  static constexpr int kStride = 2, kOut = Outputs, kIn = 2 * Outputs + 1, kFreq = 2 * Outputs + 1;

  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    if constexpr (Outputs == 1) {
      o[0] = d[0], o[1] = d[2];
    } else if constexpr (Outputs == 2) {
      o[0] = d[0] - d[2], o[1] = d[2], o[2] = d[4] - d[2];
    } else if constexpr (Outputs == 3) {
      const Vec half = .5f * d[4];
      o[0] = d[0] - d[4];
      o[1] = fma(.5f, d[2], half);
      o[2] = fma(-.5f, d[2], half);
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
};

// Weights. Along one axis, the three taps scaled by kTapScale make the value at a slot by additions alone:
// processors with adders beside their multipliers do that between the products at no cost.
enum class Form { kTap, kPlus, kMinus, kPlusTwice, kMinusTwice, kSum, kDifference, kSumTwice };

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
      const Vec half = (t2 + t2) + t1;
      return t0 + (half + half);
    }
    case Form::kMinusTwice: {
      const Vec half = (t2 + t2) - t1;
      return t0 + (half + half);
    }
    case Form::kSum:
      return t0 + t2;
    case Form::kDifference:
      return t0 - t2;
    case Form::kSumTwice:
      return t0 + (t2 + t2);
  }
}

// [stride - 1][slot]; `tap` is the one that kTap copies.
struct SlotForm {
  Form form;
  int tap;
};
constexpr SlotForm kSlotForms[2][kSlots] = {{{Form::kTap, 0},
                                             {Form::kPlus, 0},
                                             {Form::kMinus, 0},
                                             {Form::kPlusTwice, 0},
                                             {Form::kMinusTwice, 0},
                                             {Form::kTap, 2}},
                                            {{Form::kTap, 0},
                                             {Form::kSum, 0},
                                             {Form::kDifference, 0},
                                             {Form::kSumTwice, 0},
                                             {Form::kTap, 2},
                                             {Form::kTap, 1}}};

// `taps` holds three vectors, `pitch` floats apart.
template <int Stride, int Slot>
PARNET_INLINE Vec value_at(const float* taps, int pitch) {
  constexpr SlotForm slot = kSlotForms[Stride - 1][Slot];
  const float* t = taps + slot.tap * pitch;
  if constexpr (slot.form == Form::kTap) return load(t);
  return combine<slot.form>(load(t), load(t + pitch), load(t + 2 * pitch));
}

// Scaled taps of one panel, [channel][tap row][tap column][kPanel], to one row of slots: [channel][tap
// column][kPanel].
template <int Stride, int Row = 0>
void expand_rows(const float* taps, int channels, float* rows, int row) {
  if constexpr (Row < kSlots) {
    if (row != Row) return expand_rows<Stride, Row + 1>(taps, channels, rows, row);
    for (int c = 0; c < channels; c++, taps += 9 * kPanel, rows += 3 * kPanel) {
      PARNET_UNROLL for (int i = 0; i < 3 * kPanel; i += kLanes) {
        store(rows + i, value_at<Stride, Row>(taps + i, 3 * kPanel));
      }
    }
  }
}

// One row of slots to all slots of the row, [slot][channel][kPanel].
template <int Stride, int Slot = 0>
void expand_columns(const float* rows, int channels, float* full, int64_t slot_stride) {
  if constexpr (Slot < kSlots) {
    for (int c = 0; c < channels; c++) {
      PARNET_UNROLL for (int i = 0; i < kPanel; i += kLanes) {
        store(full + c * kPanel + i, value_at<Stride, Slot>(rows + c * 3 * kPanel + i, kPanel));
      }
    }
    expand_columns<Stride, Slot + 1>(rows, channels, full + slot_stride, slot_stride);
  }
}

void expand_rows(const float* taps, int channels, float* rows, int stride, int row) {
  stride == 1 ? expand_rows<1>(taps, channels, rows, row) : expand_rows<2>(taps, channels, rows, row);
}
void expand_columns(const float* rows, int channels, float* full, int64_t slot_stride, int stride) {
  stride == 1 ? expand_columns<1>(rows, channels, full, slot_stride)
              : expand_columns<2>(rows, channels, full, slot_stride);
}

}  // namespace
}  // namespace parnet::cpu
