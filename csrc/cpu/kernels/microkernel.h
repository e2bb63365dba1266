// The inner loop: m = v * u for one pair of evaluation points. A strip, up to kMaxRows rows of v, is
// multiplied by a panel, kPanel columns of u, with all 2*kMaxRows sums in registers.
#pragma once
#include "../layer.h"
#include "winograd.h"

namespace parnet::cpu {
namespace {

PARNET_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats to fetch at each of `times` steps to have fetched `floats` in the end, at most a cache line a step.
PARNET_INLINE int64_t fetch_step(int64_t floats, int64_t times) {
  return least(int64_t{16}, div_up(floats, times));
}

// The weights of one input channel: read as they are or, if Taps, made of three taps by a form.
template <bool Taps, Form F>
PARNET_INLINE Vec read_weight(const float* w) {
  if constexpr (!Taps || F == Form::kTap) return load(w);
  return combine<F>(load(w), load(w + kPanel), load(w + 2 * kPanel));
}

constexpr int kUnroll = 4;  // channels; kLanes is a multiple

// Multiplies `strips` strips of Rows rows by one panel.
//   v: [strip][block of channels][row][lane], of which blocks from `first_block` on are used;
//   w: [channel][kPanel] or, if Taps, [channel][3][kPanel];
//   m: [row][kPanel], overwritten or, if `add`, added to.
// `channels` is a multiple of kUnroll, `sum_channels` (see policy.h) one of kLanes.
// FirstHalf: the second half of the panel has no channels, and that half of m is not written.
//
// Meanwhile it fetches what the caller reads next, `step` floats for each channel and strip: weights come
// from the outer caches or from memory, and hardware does not foresee the change of matrix. A step is at most
// a cache line, mostly a part of one, so that memory is asked at an even rate.
template <bool Taps, Form F, bool FirstHalf, int Rows>
__attribute__((noinline)) void multiply_rows(const float* __restrict v, int blocks, int first_block,
                                             const float* __restrict w, float* __restrict m, int channels,
                                             int sum_channels, bool add, int strips, const float* next,
                                             int64_t step) {
  for (int strip = 0; strip < strips; strip++, m += Rows * kPanel) {
    const float* a = v + strip * strip_floats(Rows, blocks, kLanes) + first_block * Rows * kLanes;
    const float* b = w;
    bool adds = add;
    for (int left = channels; left > 0; left -= sum_channels, adds = true) {
      Vec low[Rows], high[Rows];
      PARNET_UNROLL for (int r = 0; r < Rows; r++) low[r] = high[r] = zero();
      for (int rest = least(left, sum_channels); rest > 0; rest -= kLanes, a += Rows * kLanes) {
        const int lanes = least(rest, kLanes);
        const float* later = a + Rows * kLanes;  // the next block's inputs: a share of them for each channel
        for (int c = 0; c < lanes; c += kUnroll) {
          PARNET_UNROLL for (int i = 0; i < kUnroll; i++) {
            prefetch_weights(next);
            next += step;
            if (kIntel) prefetch(later), later += Rows;
            const Vec b0 = read_weight<Taps, F>(b), b1 = FirstHalf ? b0 : read_weight<Taps, F>(b + kLanes);
            b += Taps ? 3 * kPanel : kPanel;
            PARNET_UNROLL for (int r = 0; r < Rows; r++) {
              const Vec x = splat(a[r * kLanes + c + i]);
              accumulate(low[r], x, b0);
              if (!FirstHalf) accumulate(high[r], x, b1);
            }
          }
        }
      }
      if (adds) {
        PARNET_UNROLL for (int r = 0; r < Rows; r++) {
          low[r] = low[r] + load(m + r * kPanel);
          if (!FirstHalf) high[r] = high[r] + load(m + r * kPanel + kLanes);
        }
      }
      PARNET_UNROLL for (int r = 0; r < Rows; r++) {
        store(m + r * kPanel, low[r]);
        if (!FirstHalf) store(m + r * kPanel + kLanes, high[r]);
      }
    }
  }
}

typedef void (*MultiplyRows)(const float*, int, int, const float*, float*, int, int, bool, int, const float*,
                             int64_t);

// The inner loop for a number of rows.
template <bool Taps, Form F, bool FirstHalf = false, int Rows = 1>
MultiplyRows choose_rows(int rows) {
  if constexpr (Rows == kMaxRows) {
    return multiply_rows<Taps, F, FirstHalf, Rows>;
  } else {
    return rows == Rows ? multiply_rows<Taps, F, FirstHalf, Rows>
                        : choose_rows<Taps, F, FirstHalf, Rows + 1>(rows);
  }
}

// The inner loop that makes its weights of taps.
MultiplyRows choose_taps(Form form, int rows) {
  switch (form) {
    case Form::kTap:
      return choose_rows<true, Form::kTap>(rows);
    case Form::kPlus:
      return choose_rows<true, Form::kPlus>(rows);
    case Form::kMinus:
      return choose_rows<true, Form::kMinus>(rows);
    case Form::kPlusTwice:
      return choose_rows<true, Form::kPlusTwice>(rows);
    case Form::kMinusTwice:
      return choose_rows<true, Form::kMinusTwice>(rows);
    case Form::kSum:
      return choose_rows<true, Form::kSum>(rows);
    case Form::kDifference:
      return choose_rows<true, Form::kDifference>(rows);
    case Form::kSumTwice:
      return choose_rows<true, Form::kSumTwice>(rows);
    case Form::kPlusHalf:
      return choose_rows<true, Form::kPlusHalf>(rows);
    case Form::kMinusHalf:
      return choose_rows<true, Form::kMinusHalf>(rows);
  }
  return nullptr;
}

// Multiplies all rows that use one weight matrix by one panel of it. choose(rows) gives the inner loop; v
// starts with the first matrix's inputs. Returns how far `next`, what is fetched meanwhile, has come.
template <class Choose>
PARNET_INLINE const float* multiply_use(const MatrixUse& use, Choose choose, const float* v, int blocks,
                                        int first_block, const float* w, float* m, int channels,
                                        int sum_channels, bool add, const float* next, int64_t step) {
  const int small = use.rows / use.strips, bigger = use.rows % use.strips;
  v += use.first_value;
  const auto run = [&](int rows, int strips) {
    if (!strips) return;
    choose(rows)(v, blocks, first_block, w, m, channels, sum_channels, add, strips, next, step);
    v += strips * strip_floats(rows, blocks, kLanes);
    m += strips * rows * kPanel;
    next += step * channels * strips;
  };
  run(small + 1, bigger);
  run(small, use.strips - bigger);
  return next;
}

}  // namespace
}  // namespace parnet::cpu
