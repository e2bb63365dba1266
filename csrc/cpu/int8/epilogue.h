// What surrounds the products: the gate, and the way from sums of products to the next layer's bytes. Float
// operations on 16 lanes whatever the instruction set, each rounded alone (-ffp-contract=off), so that every
// instruction set gives the same bytes.
#pragma once
#include "dot.h"

namespace parnet::cpu::int8 {
namespace {

// 1 + 2^t with t = -x/ln 2: 2^round(t) goes into the exponent bits, a polynomial does the rest.
PARNET_INLINE Floats one_plus_exp_minus(Floats x) {
  const Floats t = least(most(-1.4426950408889634f * x, splat(-125.f)), splat(126.f));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  const Floats shifted = t + magic, f = t - (shifted - magic);
  Floats y = splat(.0013264714772814497f);
  y = y * f + .009671513630859167f;
  y = y * f + .055507337855797007f;
  y = y * f + .24022242064467392f;
  y = y * f + .6931469775692789f;
  y = y * f + 1.f;
  return (Floats)((Ints)y + ((Ints)shifted << 23)) + 1.f;
}
PARNET_INLINE Floats activate(Floats x, Activation activation) {
  return activation == Activation::kSiLU ? x / one_plus_exp_minus(x) : most(x, Floats{});
}
// Rounded to even, limited to 0...255, as integers.
PARNET_INLINE Ints to_byte(Floats x) {
  const Floats limited = most(least(x, splat(255.f)), Floats{});
  return (Ints)(limited + 12582912.f) & 0xff;
}

// Sums of a group's weights times the channel means.
void gate(const GateArgs& a, int first, int last) {
  const Layer& l = *a.layer;
  // Means of the whole inputs, in the order in which a group reads them.
  float* means = a.means;
  for (int j = 0; j < l.inputs; j++) {
    for (int c = 0; c < a.channels[j]; c++) {
      int64_t total = 0;
      for (int r = 0; r < a.sum_rows[j]; r++) total += a.sums[j][int64_t{r} * a.channels[j] + c];
      const float mean = static_cast<float>(total) / static_cast<float>(a.pixels);
      means[c * l.inputs + j] = l.in_scale * (mean - static_cast<float>(l.in_zero));
    }
  }
  for (int k = first; k < last; k++) {
    const float* mean = means + k % l.groups * l.gate_channels;
    const int8_t* w = l.gate_weight + int64_t{k} * l.gate_channels * kPanel;
    Floats total[2] = {};
    for (int c = 0; c < l.gate_channels; c++, w += kPanel) {
      PARNET_UNROLL for (int i = 0; i < 2; i++) {
        total[i] = total[i] + mean[c] * to_floats(widen(w + i * kLanes));
      }
    }
    PARNET_UNROLL for (int i = 0; i < 2; i++) {
      const int from = k * kPanel + i * kLanes;
      const Floats logit = total[i] * load_floats(l.gate_multiplier + from) + load_floats(l.gate_bias + from);
      const Floats g = 1.f / one_plus_exp_minus(logit);
      const Floats multiplier = load_floats(l.multiplier + from), bias = load_floats(l.bias + from);
      if (l.kind == Kind::kSkip) {
        store(a.gates.multiplier + from, multiplier);
        store(a.gates.skip + from, g * load_floats(l.skip_scale + from));
        store(a.gates.offset + from, bias + g * load_floats(l.skip_shift + from));
      } else {
        store(a.gates.multiplier + from, 2.f * g * multiplier);
        store(a.gates.offset + from, 2.f * g * bias);
      }
    }
  }
}

// One panel of one run of pixels: sums of products to bytes (as integers) or, for the last layer, to floats.
template <Activation A, bool Skip, bool Last>
PARNET_INLINE void finish(const ConvArgs& a, int panel, const uint8_t* skip, int64_t skip_step, int32_t* sums,
                          int rows) {
  const Layer& l = *a.layer;
  PARNET_UNROLL for (int i = 0; i < 2; i++) {
    const int lane = panel * kPanel + i * kLanes;
    const Floats multiplier = load_floats(a.gates.multiplier + lane),
                 offset = load_floats(a.gates.offset + lane);
    const Floats skip_scale = Skip ? load_floats(a.gates.skip + lane) : Floats{};
    const Floats scale = load_floats(l.out_scale + lane), shift = load_floats(l.out_shift + lane);
    for (int r = 0; r < rows; r++) {
      int32_t* sum = sums + r * kPanel + i * kLanes;
      Floats y = to_floats(load<Ints>(sum)) * multiplier + offset;
      if (Skip) {
        y = y + to_floats(widen(skip + r * skip_step + i * kLanes)) * skip_scale;
      }
      y = activate(y, A) * scale + shift;
      store(sum, Last ? (Ints)y : to_byte(y));
    }
  }
}

// The lanes of one panel, or of the two panels of a pair of groups alternately, to memory, and their sums.
PARNET_INLINE void leave(const ConvArgs& a, const int32_t* const* values, int groups, int channel, int rows,
                         int row, int col) {
  const Layer& l = *a.layer;
  const int count = l.out_channels - channel < groups * kPanel ? l.out_channels - channel : groups * kPanel;
  if (l.last) {
    for (int r = 0; r < rows; r++) {
      float* to = a.out_floats + (int64_t{row} * a.out_cols + col + r) * l.out_channels + channel;
      if (groups == 1) {
        memcpy(to, values[0] + r * kPanel, 4 * count);
      } else {
        for (int c = 0; c < count; c++) memcpy(to + c, values[c % groups] + r * kPanel + c / groups, 4);
      }
    }
    return;
  }
  uint8_t* to = a.out.base + row * a.out.row + col * a.out.pixel + channel;
  Ints totals[2][2] = {};
  for (int r = 0; r < rows; r++, to += a.out.pixel) {
    Bytes bytes[2][2];
    for (int g = 0; g < groups; g++) {
      PARNET_UNROLL for (int i = 0; i < 2; i++) {
        const Ints q = load<Ints>(values[g] + r * kPanel + i * kLanes);
        totals[g][i] += q;
        bytes[g][i] = narrow(q);
      }
    }
    uint8_t made[2 * kPanel];
    PARNET_UNROLL for (int i = 0; i < 2; i++) {
      if (groups == 1) {
        store(made + i * kLanes, bytes[0][i]);
      } else {
        store(made + 2 * i * kLanes, alternate_low(bytes[0][i], bytes[1][i]));
        store(made + (2 * i + 1) * kLanes, alternate_high(bytes[0][i], bytes[1][i]));
      }
    }
    for (int c = 0; c < count; c += kPanel) copy(to + c, made + c, count - c < kPanel ? count - c : kPanel);
  }
  int32_t* sums = a.sums + channel;
  if (groups == 1 && count == kPanel) {
    for (int i = 0; i < 2; i++) store(sums + i * kLanes, load<Ints>(sums + i * kLanes) + totals[0][i]);
    return;
  }
  int32_t lanes[2][kPanel];
  memcpy(lanes, totals, sizeof(lanes));
  for (int c = 0; c < count; c++) sums[c] += lanes[c % groups][c / groups];
}

// The border that the next layer's windows read: what stands for zero.
PARNET_INLINE void pad(const ConvArgs& a, int row) {
  const Map& m = a.out;
  uint8_t* line = m.base + row * m.row;
  memset(line - m.pixel, a.layer->out_zero, m.pixel);
  memset(line + a.out_cols * m.pixel, a.layer->out_zero, m.pixel);
  const int64_t whole = (a.out_cols + 2) * m.pixel;
  if (row == 0) memset(line - m.row - m.pixel, a.layer->out_zero, whole);
  if (row == a.out_rows - 1) memset(line + m.row - m.pixel, a.layer->out_zero, whole);
}

template <Activation A, bool Skip, bool Last>
void convolve_rows(const ConvArgs& a, int first_row, int last_row, int first, int last) {
  const Layer& l = *a.layer;
  const int runs = (a.out_cols + kMaxRows - 1) / kMaxRows;
  Multiplier multiplier;
  alignas(64) int32_t sums[2][kMaxRows * kPanel];
  for (int k = first; k < last; k += l.groups) {
    for (int row = first_row; row < last_row; row++) {
      for (int i = 0, col = 0; i < runs; i++) {
        const int rows = (a.out_cols - col + runs - 1 - i) / (runs - i);
        for (int g = 0; g < l.groups; g++) {
          const int32_t* start = l.start + (k + g) * kPanel;
          for (int r = 0; r < rows; r++) memcpy(sums[g] + r * kPanel, start, 4 * kPanel);
          const int8_t* w = l.weight + (k + g) * l.panel_bytes;
          for (int j = 0; j < l.inputs; j++) {
            const Map& in = a.in[j];
            const Segment& s = l.segments[g][j];
            const uint8_t* corner =
                in.base + (l.stride * row - 1) * in.row + (l.stride * col - 1) * in.pixel + s.first;
            multiplier.multiply({corner, l.stride * in.pixel}, in.row, in.pixel, s.quads, w, rows, sums[g]);
            w += int64_t{9} * s.quads * 4 * kPanel;
          }
          const uint8_t* skip = a.in[0].base + row * a.in[0].row + col * a.in[0].pixel + k * kPanel;
          finish<A, Skip, Last>(a, k + g, skip, a.in[0].pixel, sums[g], rows);
        }
        const int32_t* values[2] = {sums[0], sums[1]};
        if (l.groups == 1) {
          leave(a, values, 1, k * kPanel, rows, row, col);
        } else {
          leave(a, values, 2, k * kPanel, rows, row, col);
        }
        col += rows;
      }
    }
  }
  if (first == 0 && !l.last) {
    for (int row = first_row; row < last_row; row++) pad(a, row);
  }
}

template <Activation A>
void convolve_with(const ConvArgs& a, int first_row, int last_row, int first, int last) {
  const bool skip = a.layer->kind == Kind::kSkip;
  const auto run = a.layer->last ? (skip ? convolve_rows<A, true, true> : convolve_rows<A, false, true>)
                                 : (skip ? convolve_rows<A, true, false> : convolve_rows<A, false, false>);
  run(a, first_row, last_row, first, last);
}
void convolve(const ConvArgs& a, int first_row, int last_row, int first, int last) {
  const auto run = a.layer->activation == Activation::kSiLU ? convolve_with<Activation::kSiLU>
                                                            : convolve_with<Activation::kReLU>;
  run(a, first_row, last_row, first, last);
}

bool enter(const EnterArgs& a) {
  bool finite = true;
  for (int i = 0; i < a.pixels; i++) {
    const float* from = a.from + int64_t{i} * a.channels;
    uint8_t* to = a.to + i * a.pixel;
    int c = 0;
    Ints odd = {};
    for (; c + kLanes <= a.channels; c += kLanes) {
      const Floats x = load_floats(from + c);
      odd |= (x - x == 0.f) ^ -1;
      const Ints q = to_byte(x * a.inverse_scale + a.zero);
      store(to + c, narrow(q));
      store(a.sums + c, load<Ints>(a.sums + c) + q);
    }
    for (int lane = 0; lane < kLanes; lane++) finite &= !odd[lane];
    for (; c < a.channels; c++) {
      finite &= from[c] - from[c] == 0.f;
      const int32_t q = to_byte(splat(from[c] * a.inverse_scale + a.zero))[0];
      to[c] = static_cast<uint8_t>(q);
      a.sums[c] += q;
    }
  }
  return finite;
}

constexpr Kernels table_of(const char* name, int quad_multiple) {
  return {name, quad_multiple, convolve, gate, enter};
}

}  // namespace
}  // namespace parnet::cpu::int8
