// What surrounds the products: the gate, and the way from sums of products to the next layer's map. Float
// operations on 16 lanes whatever the instruction set, each rounded alone (-ffp-contract=off), so that every
// instruction set gives the same bytes.
#pragma once
#include "dot.h"

namespace parnet::cpu::direct {
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
// Sums of a group's weights times the channel means.
bool gate(const GateArgs& a, int first, int last) {
  const Layer& l = *a.layer;
  bool finite = true;
  // Means of the whole inputs, in the order in which a group reads them.
  float* means = a.means;
  for (int j = 0; j < l.inputs; j++) {
    for (int c = 0; c < a.channels[j]; c++) {
      const auto* sums = static_cast<const ProductSum*>(a.sums[j]) + c;
      Total total = 0;
      for (int r = 0; r < a.sum_rows[j]; r++, sums += a.channels[j]) total += *sums;
      const float mean = static_cast<float>(total) / static_cast<float>(a.pixels);
      finite &= mean - mean == 0.f;
      means[c * l.inputs + j] = l.in_scale * (mean - static_cast<float>(l.in_zero));
    }
  }
  for (int k = first; k < last; k++) {
    const float* mean = means + k % l.groups * l.gate_channels;
    const Factor* w = static_cast<const Factor*>(l.gate_weight) + int64_t{k} * l.gate_channels * kPanel;
    Floats total[2] = {};
    for (int c = 0; c < l.gate_channels; c++, w += kPanel) {
      PARNET_UNROLL for (int i = 0; i < 2; i++) { total[i] = total[i] + mean[c] * values_of(w + i * kLanes); }
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
  return finite;
}

// One panel of one run of pixels: sums of products to what the map will hold or, for the last layer, to
// floats.
template <Activation A, bool Skip, bool Last>
PARNET_INLINE void finish(const ConvArgs& a, int panel, const uint8_t* skip, int64_t skip_step,
                          ProductSum* sums, int rows) {
  const Layer& l = *a.layer;
  PARNET_UNROLL for (int i = 0; i < 2; i++) {
    const int lane = panel * kPanel + i * kLanes;
    const Floats multiplier = load_floats(a.gates.multiplier + lane),
                 offset = load_floats(a.gates.offset + lane);
    const Floats skip_scale = Skip ? load_floats(a.gates.skip + lane) : Floats{};
    const Floats scale = load_floats(l.out_scale + lane), shift = load_floats(l.out_shift + lane);
    for (int r = 0; r < rows; r++) {
      ProductSum* sum = sums + r * kPanel + i * kLanes;
      Floats y = values_of(load<Sums>(sum)) * multiplier + offset;
      if (Skip) {
        const auto* x = reinterpret_cast<const Item*>(skip + r * skip_step) + i * kLanes;
        y = y + values_of(x) * skip_scale;
      }
      y = activate(y, A) * scale + shift;
      store(sum, Last ? (Sums)y : rounded(y));
    }
  }
}

// The lanes of one panel, or of the two panels of a pair of groups alternately, to memory, and their sums.
PARNET_INLINE void leave(const ConvArgs& a, const ProductSum* const* values, int groups, int channel,
                         int rows, int row, int col, ProductSum* sums) {
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
  const int written = kWholePanels ? (count + kPanel - 1) / kPanel * kPanel : count;
  uint8_t* to = a.out.base + row * a.out.row + col * a.out.pixel + channel * sizeof(Item);
  Sums totals[2][2] = {};
  for (int r = 0; r < rows; r++, to += a.out.pixel) {
    Items items[2][2];
    for (int g = 0; g < groups; g++) {
      PARNET_UNROLL for (int i = 0; i < 2; i++) {
        const Sums q = load<Sums>(values[g] + r * kPanel + i * kLanes);
        totals[g][i] += q;
        items[g][i] = narrow(q);
      }
    }
    Item made[2 * kPanel];
    PARNET_UNROLL for (int i = 0; i < 2; i++) {
      if (groups == 1) {
        store(made + i * kLanes, items[0][i]);
      } else {
        store(made + 2 * i * kLanes, alternate_low(items[0][i], items[1][i]));
        store(made + (2 * i + 1) * kLanes, alternate_high(items[0][i], items[1][i]));
      }
    }
    for (int c = 0; c < written; c += kPanel) {
      if (kWholePanels) {
        memcpy(to + c * sizeof(Item), made + c, kPanel * sizeof(Item));
      } else {
        copy(to + c, reinterpret_cast<uint8_t*>(made + c), count - c < kPanel ? count - c : kPanel);
      }
    }
  }
  sums += channel;
  if (groups == 1 && count == kPanel) {
    for (int i = 0; i < 2; i++) store(sums + i * kLanes, load<Sums>(sums + i * kLanes) + totals[0][i]);
    return;
  }
  ProductSum lanes[2][kPanel];
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
  if (row == a.out_rows - 1) memset(line + m.row - m.pixel, a.layer->out_zero, whole + kReadBeyond);
}

template <Activation A, bool Skip, bool Last>
void convolve_rows(const ConvArgs& a, int first_row, int last_row, int first, int last) {
  const Layer& l = *a.layer;
  const int runs = (a.out_cols + kMaxRows - 1) / kMaxRows;
  Multiplier multiplier;
  alignas(64) ProductSum sums[2][Multiplier::kMapRows][kMaxRows * kPanel];
  for (int k = first; k < last; k += l.groups) {
    for (int row = first_row; row < last_row; row += Multiplier::kMapRows) {
      const int map_rows = last_row - row < Multiplier::kMapRows ? last_row - row : Multiplier::kMapRows;
      for (int i = 0, col = 0; i < runs; i++) {
        const int count = (a.out_cols - col + runs - 1 - i) / (runs - i);
        for (int g = 0; g < l.groups; g++) {
          const auto* start = static_cast<const ProductSum*>(l.start) + (k + g) * kPanel;
          for (int m = 0; m < map_rows; m++) {
            for (int r = 0; r < count; r++) memcpy(sums[g][m] + r * kPanel, start, 4 * kPanel);
          }
          const int8_t* w = l.weight + (k + g) * l.panel_bytes;
          for (int j = 0; j < l.inputs; j++) {
            const Map& in = a.in[j];
            const Segment& s = l.segments[g][j];
            const uint8_t* corner =
                in.base + (l.stride * row - 1) * in.row + (l.stride * col - 1) * in.pixel + s.first;
            multiplier.multiply({corner, l.stride * in.pixel, l.stride * in.row}, map_rows, in.row, in.pixel,
                                s.quads, w, count, sums[g][0]);
            w += int64_t{9} * s.quads * 4 * kPanel;
          }
          const uint8_t* skip =
              a.in[0].base + row * a.in[0].row + col * a.in[0].pixel + k * kPanel * sizeof(Item);
          for (int m = 0; m < map_rows; m++, skip += a.in[0].row) {
            finish<A, Skip, Last>(a, k + g, skip, a.in[0].pixel, sums[g][m], count);
          }
        }
        for (int m = 0; m < map_rows; m++) {
          const ProductSum* values[2] = {sums[0][m], sums[1][m]};
          auto* row_sums = static_cast<ProductSum*>(a.sums) + (row + m - first_row) * a.sum_step;
          if (l.groups == 1) {
            leave(a, values, 1, k * kPanel, count, row + m, col, row_sums);
          } else {
            leave(a, values, 2, k * kPanel, count, row + m, col, row_sums);
          }
        }
        col += count;
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

#ifdef PARNET_BFLOAT16
bool enter(const EnterArgs& a) {
  auto* sums = static_cast<float*>(a.sums);
  for (int i = 0; i < a.pixels; i++) {
    const auto* from = static_cast<const uint16_t*>(a.from) + int64_t{i} * a.channels;
    auto* to = reinterpret_cast<uint16_t*>(a.to + i * a.pixel);
    int c = 0;
    for (; c + kLanes <= a.channels; c += kLanes) {
      store(to + c, load<Items>(from + c));
      store(sums + c, load_floats(sums + c) + values_of(from + c));
    }
    uint16_t rest[kLanes] = {};
    memcpy(rest, from + c, (a.channels - c) * sizeof(Item));
    const Floats values = values_of(rest);
    for (int lane = 0; c + lane < a.channels; lane++) sums[c + lane] += values[lane];
    for (const int64_t whole = a.pixel / sizeof(Item); c < whole; c += kLanes) {
      store(to + c, load<Items>(rest));
      memset(rest, 0, sizeof(rest));
    }
  }
  return true;  // the gate looks at the sums
}
#else
bool enter(const EnterArgs& a) {
  bool finite = true;
  auto* sums = static_cast<int32_t*>(a.sums);
  for (int i = 0; i < a.pixels; i++) {
    const float* from = static_cast<const float*>(a.from) + int64_t{i} * a.channels;
    uint8_t* to = a.to + i * a.pixel;
    int c = 0;
    Ints odd = {};
    for (; c + kLanes <= a.channels; c += kLanes) {
      const Floats x = load_floats(from + c);
      odd |= (x - x == 0.f) ^ -1;
      const Ints q = rounded(x * a.inverse_scale + a.zero);
      store(to + c, narrow(q));
      store(sums + c, load<Ints>(sums + c) + q);
    }
    for (int lane = 0; lane < kLanes; lane++) finite &= !odd[lane];
    for (; c < a.channels; c++) {
      finite &= from[c] - from[c] == 0.f;
      const int32_t q = rounded(splat(from[c] * a.inverse_scale + a.zero))[0];
      to[c] = static_cast<uint8_t>(q);
      sums[c] += q;
    }
  }
  return finite;
}

#endif

constexpr Kernels table_of(const char* name, int quad_multiple) {
  return {name, kElement, quad_multiple, Multiplier::kMapRows, convolve, gate, enter};
}

}  // namespace
}  // namespace parnet::cpu::direct
