// The matrix products of transformed inputs and weights: row panels of up to kMaxRows tiles times kPanel
// output channels, 2*kMaxRows accumulators in registers over all input channels of the call.
#pragma once
#include "layer.h"
#include "simd.h"

namespace parnet::cpu {
namespace {

// v: `panels` row panels [block][kMaxRows][kLanes], `panel_pitch` apart; w: [channel][kPanel]; m:
// [row][kPanel]. `next` is what the caller reads next, `Prefetch` cache lines of it are fetched per block of
// channels: the weights are used once per call and come from the outer caches, too late for the hardware
// prefetcher at each change of matrix.
template <int Rows, int Prefetch, bool Accumulate>
__attribute__((noinline)) void multiply_rows(const float* __restrict v, int64_t panel_pitch,
                                             const float* __restrict w, float* __restrict m, int blocks,
                                             int panels, const float* next) {
  for (int panel = 0; panel < panels; panel++, m += Rows * kPanel) {
    Vec low[Rows], high[Rows];
    PARNET_UNROLL for (int r = 0; r < Rows; r++) {
      low[r] = Accumulate ? load(m + r * kPanel) : zero();
      high[r] = Accumulate ? load(m + r * kPanel + kLanes) : zero();
    }
    const float* a = v + panel * panel_pitch;
    const float* b = w;
    for (int block = 0; block < blocks; block++, a += kRowPitch, b += kLanes * kPanel) {
      PARNET_UNROLL for (int c = 0; c < kLanes; c++) {
        PARNET_UNROLL for (int i = c * Prefetch / kLanes; i < (c + 1) * Prefetch / kLanes; i++) {
          prefetch(next + 16 * i);
        }
        const Vec b0 = load(b + c * kPanel), b1 = load(b + c * kPanel + kLanes);
        PARNET_UNROLL for (int r = 0; r < Rows; r++) {
          const Vec x = splat(a[r * kLanes + c]);
          accumulate(low[r], x, b0);
          accumulate(high[r], x, b1);
        }
      }
      next += 16 * Prefetch;
    }
    PARNET_UNROLL for (int r = 0; r < Rows; r++) {
      store(m + r * kPanel, low[r]);
      store(m + r * kPanel + kLanes, high[r]);
    }
  }
}

typedef void (*MultiplyRows)(const float*, int64_t, const float*, float*, int, int, const float*);

template <int Prefetch, bool Accumulate, int Rows = 1>
MultiplyRows choose_rows(int rows) {
  if constexpr (Rows == kMaxRows) {
    return multiply_rows<Rows, Prefetch, Accumulate>;
  } else {
    return rows == Rows ? multiply_rows<Rows, Prefetch, Accumulate>
                        : choose_rows<Prefetch, Accumulate, Rows + 1>(rows);
  }
}

template <bool Accumulate>
MultiplyRows choose(int rows, int lines) {
  switch (lines) {
    case 0:
      return choose_rows<0, Accumulate>(rows);
    case 1:
      return choose_rows<1, Accumulate>(rows);
    case 2:
      return choose_rows<2, Accumulate>(rows);
    case 4:
      return choose_rows<4, Accumulate>(rows);
    case 8:
      return choose_rows<8, Accumulate>(rows);
    default:
      return choose_rows<kLanes, Accumulate>(rows);
  }
}

// Cache lines that each of `panels` calls fetches per block of channels, so that together they fetch `total`
// or, of more than one line per channel, as much as they can.
PARNET_INLINE int lines_per_block(int total, int panels) {
  int lines = 1;
  while (lines < kLanes && lines * panels < total) lines *= 2;
  return lines;
}

// All rows that use one weight matrix. `lines` cache lines of `next` are fetched per block by the first
// `fetching` row panels.
template <bool Accumulate>
PARNET_INLINE void multiply_use(const MatrixUse& use, const float* v, int64_t panel_pitch, const float* w,
                                float* m, int blocks, const float* next, int lines, int fetching) {
  const int small = use.rows / use.panels, bigger = use.rows % use.panels;
  for (int done = 0; done < use.panels;) {
    const int size = done < bigger ? small + 1 : small;
    int end = done < bigger ? bigger : use.panels;
    const bool fetch = done < fetching;
    if (fetch) end = least(end, fetching);
    const int count = end - done;
    choose<Accumulate>(size, fetch ? lines : 0)(v, panel_pitch, w, m, blocks, count, next);
    v += count * panel_pitch;
    m += count * size * kPanel;
    next += fetch ? int64_t{16} * lines * blocks * count : 0;
    done = end;
  }
}

}  // namespace
}  // namespace parnet::cpu
