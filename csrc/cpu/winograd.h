// One-dimensional fast convolution schemes; the tile transforms apply one along rows and one along columns.
//
// Each scheme turns kIn inputs into kFreq values; value i multiplies the weights of evaluation point
// kSlot[i]; `inverse` turns the kFreq products into kOut outputs.
#pragma once
#include "simd.h"

namespace parnet::cpu {
namespace {

// Stride 1: F(4, 3) with the points 0, +-p, +-q, inf. p = 1/sqrt(2), q = sqrt(2) has half the error of the
// textbook points +-1, +-2 (and p^2 q^2 = 1 saves a multiplication).
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
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = fma(kQ, d2, kP * d1);
    y[2] = fma(kQ2, s2, kP2 * s1);
    y[3] = fma(kQ3, d2, fma(kP3, d1, m[5]));
  }
};

// F(2, 3) on the points 0, +-p, inf of Winograd4, so that it shares its weights: edges of maps that 4 does
// not divide.
struct Winograd2 {
  static constexpr int kStride = 1, kOut = 2, kIn = 4, kFreq = 4;

  // Winograd4's weights carry the normalisation of five points; these rows carry the quotient to that of
  // three.
  static PARNET_INLINE void forward(const Vec* d, Vec* o) {
    constexpr float scale = kP2 - kQ2;
    const Vec even = scale * d[2];
    o[0] = fma(-kQ2, d[2], d[0]);
    o[1] = fma(scale * kP, d[1], even);
    o[2] = fma(-scale * kP, d[1], even);
    o[3] = fma(-kP2, d[1], d[3]);
  }
  static PARNET_INLINE void inverse(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = fma(kP, m[1] - m[2], m[3]);
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

// Three taps -> six slots.
struct WinogradWeights {
  static constexpr int kCount = 6, kSlot[] = {0, 1, 2, 3, 4, 5};
  static PARNET_INLINE void apply(const Vec* g, Vec* o) {
    constexpr float np = 1 / (2 * kP2 * (kP2 - kQ2)), nq = 1 / (2 * kQ2 * (kQ2 - kP2));
    const Vec a = fma(np * kP2, g[2], np * g[0]), b = fma(nq * kQ2, g[2], nq * g[0]);
    o[0] = g[0];
    o[1] = fma(np * kP, g[1], a);
    o[2] = fma(-np * kP, g[1], a);
    o[3] = fma(nq * kQ, g[1], b);
    o[4] = fma(-nq * kQ, g[1], b);
    o[5] = g[2];
  }
};
struct PolyphaseWeights {
  static constexpr int kCount = 6, kSlot[] = {0, 1, 2, 3, 4, 5};
  static PARNET_INLINE void apply(const Vec* g, Vec* o) {
    o[0] = g[0], o[1] = g[0] + g[2], o[2] = g[0] - g[2], o[3] = fma(2.f, g[2], g[0]), o[4] = g[2],
    o[5] = g[1];
  }
};
// The slots 0, 1, 4, 5 that Polyphase<1> and Polyphase<2> use.
struct PolyphaseFewWeights {
  static constexpr int kCount = 4, kSlot[] = {0, 1, 4, 5};
  static PARNET_INLINE void apply(const Vec* g, Vec* o) {
    o[0] = g[0], o[1] = g[0] + g[2], o[2] = g[2], o[3] = g[1];
  }
};

// 3x3 weights of one panel, [channel][9][kPanel], to the slots of one row: [column slot][channel][kPanel].
template <class Scheme, int Row>
void expand_row(const float* compact, int channels, float* full, int64_t slot_stride) {
  constexpr int count = Scheme::kCount;
  for (int c = 0; c < channels; c++, compact += 9 * kPanel, full += kPanel) {
    PARNET_UNROLL
    for (int half = 0; half < kPanel; half += kLanes) {
      Vec row[3], o[count];
      PARNET_UNROLL
      for (int col = 0; col < 3; col++) {
        Vec g[3];
        PARNET_UNROLL
        for (int tap = 0; tap < 3; tap++) g[tap] = load(compact + (3 * tap + col) * kPanel + half);
        Scheme::apply(g, o);
        row[col] = o[Row];
      }
      Scheme::apply(row, o);
      PARNET_UNROLL
      for (int j = 0; j < count; j++) store(full + Scheme::kSlot[j] * slot_stride + half, o[j]);
    }
  }
}

template <class Scheme, int Index = 0>
void expand_slot(const float* compact, int channels, float* full, int64_t slot_stride, int row) {
  if constexpr (Index < Scheme::kCount) {
    if (row == Scheme::kSlot[Index]) return expand_row<Scheme, Index>(compact, channels, full, slot_stride);
    expand_slot<Scheme, Index + 1>(compact, channels, full, slot_stride, row);
  }
}

void expand(const float* compact, int channels, float* full, int64_t slot_stride, int stride, int few_slots,
            int row) {
  if (stride == 1) return expand_slot<WinogradWeights>(compact, channels, full, slot_stride, row);
  if (few_slots) return expand_slot<PolyphaseFewWeights>(compact, channels, full, slot_stride, row);
  expand_slot<PolyphaseWeights>(compact, channels, full, slot_stride, row);
}

}  // namespace
}  // namespace parnet::cpu
