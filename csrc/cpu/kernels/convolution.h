// A layer on one set of tiles: tiles of the input are transformed (v), multiplied by transformed weights
// (m = v * u), and transformed back into tiles of the output, on which the epilogue does the rest of the
// layer.
#pragma once
#include <utility>

#include "epilogue.h"
#include "microkernel.h"
#include "winograd.h"

namespace parnet::cpu {
namespace {

// ---- Input transform of one tile and one block of channels. Transformed input i goes to
// v[first[i] + block * step[i]].

template <class Row, class Col>
__attribute__((noinline)) void forward_tile(const float* from, int64_t row_pitch, float* v,
                                            const int32_t* first, const int32_t* step, int block) {
  constexpr int kStep = Col::kStride * Col::kOut;
  int32_t offset[Row::kValues * Col::kValues];
  for (int i = 0; i < Row::kValues * Col::kValues; i++) offset[i] = first[i] + block * step[i];
  Vec once[Row::kValues][Col::kIn];  // transformed along one direction
  PARNET_UNROLL for (int j = 0; j < Col::kIn; j++) {
    Vec d[Row::kIn], o[Row::kValues];
    PARNET_UNROLL for (int i = 0; i < Row::kIn; i++) {
      d[i] = load(from + i * row_pitch + j * kLanes);
      // The next tile is most likely the one to the right.
      if (j + kStep >= Col::kIn) prefetch(from + i * row_pitch + (j + kStep) * kLanes);
    }
    Row::forward(d, o);
    PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) once[i][j] = o[i];
  }
  PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) {
    Vec o[Col::kValues];
    Col::forward(once[i], o);
    PARNET_UNROLL for (int j = 0; j < Col::kValues; j++) store(v + offset[i * Col::kValues + j], o[j]);
  }
}

// ---- Output transform of one tile, one block of output channels and one group, to z[row][col]. Product i is
// read from m[offset[i]].

template <class Row, class Col>
__attribute__((noinline)) void inverse_tile(const float* m, const int32_t* offset, float* z) {
  Vec once[Row::kOut][Col::kValues];
  PARNET_UNROLL for (int j = 0; j < Col::kValues; j++) {
    Vec d[Row::kValues], o[Row::kOut];
    PARNET_UNROLL for (int i = 0; i < Row::kValues; i++) d[i] = load(m + offset[i * Col::kValues + j]);
    Row::inverse(d, o);
    PARNET_UNROLL for (int i = 0; i < Row::kOut; i++) once[i][j] = o[i];
  }
  PARNET_UNROLL for (int i = 0; i < Row::kOut; i++) {
    Vec o[Col::kOut];
    Col::inverse(once[i], o);
    PARNET_UNROLL for (int j = 0; j < Col::kOut; j++) store(z + (i * kMaxTile + j) * kLanes, o[j]);
  }
}

typedef void (*ForwardTile)(const float*, int64_t, float*, const int32_t*, const int32_t*, int);
typedef void (*InverseTile)(const float*, const int32_t*, float*);

// The transforms for all pairs of schemes of one stride.
struct Transforms {
  ForwardTile forward[4][4];  // [row kind][column kind]
  InverseTile inverse[4][4];
};
template <int Stride, int... Pair>
constexpr Transforms transforms_of(std::integer_sequence<int, Pair...>) {
  constexpr int kinds = kKinds[Stride - 1];
  static_assert(
      ((SchemeOf<Stride, Pair % kinds>::kValues == kSchemes[Stride - 1][Pair % kinds].values) && ...));
  Transforms t{};
  ((t.forward[Pair / kinds][Pair % kinds] =
        forward_tile<SchemeOf<Stride, Pair / kinds>, SchemeOf<Stride, Pair % kinds>>),
   ...);
  ((t.inverse[Pair / kinds][Pair % kinds] =
        inverse_tile<SchemeOf<Stride, Pair / kinds>, SchemeOf<Stride, Pair % kinds>>),
   ...);
  return t;
}
template <int Stride>
constexpr Transforms transforms_of() {
  return transforms_of<Stride>(std::make_integer_sequence<int, kKinds[Stride - 1] * kKinds[Stride - 1]>());
}
// [stride - 1]
constexpr Transforms kTransforms[2] = {transforms_of<1>(), transforms_of<2>()};

void transform(const ConvArgs& a, const TileSet& set, int first, int last, float* v) {
  const PackedHeader& h = *a.packed;
  const BlockRef* refs = section<BlockRef>(h, h.block_list);
  for (int b = first; b < last; b++) {
    const View& in = a.in[refs[b].input];
    const float* plane = in.base + refs[b].block * in.block;
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      const float* from = plane + tile.image * in.image + (int64_t{h.stride} * tile.row - 1) * in.row +
                          (int64_t{h.stride} * tile.col - 1) * kLanes;
      kTransforms[h.stride - 1].forward[tile.row_kind][tile.col_kind](
          from, in.row, v, set.table->v_offset + t * kMaxTransforms, set.table->v_step + t * kMaxTransforms,
          b);
    }
  }
}

// ---- Products of the panels [first, last): m is [panel][m_rows][kPanel].

// Channels that are multiplied for one group: the padding of the last block is left out.
PARNET_INLINE int group_channels(const PackedHeader& h) {
  return h.groups == 1 ? div_up(h.in_channels, kUnroll) * kUnroll : h.group_blocks * kLanes;
}

// Storage::kTransformed. Each matrix is multiplied for all panels before the next one, so that its rows of v
// stay in L1.
void multiply_transformed(const ConvArgs& a, const TileTable& table, const float* v, int first, int last,
                          float* m) {
  const PackedHeader& h = *a.packed;
  const int blocks = h.group_blocks, channels = group_channels(h);
  const int slots = slots_of(h.stride, h.in_channels);
  const int64_t matrix = int64_t{blocks} * kLanes * kPanel, panel = matrix * slots * slots;
  const float* weights = section<float>(h, h.weight);
  for (int i = 0; i < table.num_uses; i++) {
    const MatrixUse& use = table.uses[i];
    for (int k = first; k < last; k++) {
      const float* w = weights + k * panel + use.slot * matrix;
      const float* next = k + 1 < last             ? w + panel
                          : i + 1 < table.num_uses ? weights + first * panel + table.uses[i + 1].slot * matrix
                                                   : weights + (last < h.panels ? last : first) * panel;
      const bool half = k + 1 == h.panels && h.groups == 1 && h.out_blocks % 2 == 1;
      multiply_use(use, half ? choose_rows<false, Form::kTap, true> : choose_rows<false, Form::kTap>, v,
                   h.groups * blocks, k % h.groups * blocks, w,
                   m + (int64_t{k - first} * table.m_rows + use.first_row) * kPanel, channels, a.sum_channels,
                   false, next, fetch_step(kPanel, use.strips));
    }
  }
}

// Storage::kRows and kTaps: weights are made as they are multiplied. All slots of one row of slots are made
// of the same three values a channel (`taps` below), which memory holds (kRows) or which are made of nine
// taps here (kTaps) for a.chunk_blocks blocks of channels at a time: so few that they stay in L1 for the
// whole row.
void multiply_taps(const ConvArgs& a, const TileTable& table, const float* v, int first, int last, float* m,
                   float* u) {
  const PackedHeader& h = *a.packed;
  const bool nine = h.storage == Storage::kTaps;
  const int slots = slots_of(h.stride, h.in_channels);
  const int blocks = h.group_blocks, chunks = div_up(blocks, a.chunk_blocks);
  const int64_t block = int64_t{nine ? 9 : 3} * kLanes * kPanel, row = blocks * block;
  const auto taps_of = [&](int panel, int slot_row) {
    const int64_t rows = nine ? panel : place_of_row(h.panels, panel, slot_row);
    return section<float>(h, h.weight) + rows * row;
  };
  for (int k = first; k < last; k++) {
    float* mk = m + int64_t{k - first} * table.m_rows * kPanel;
    const float* after = taps_of(least(k + 1, h.panels - 1), 0);
    for (int from = 0, to, share = 0; from < table.num_uses; from = to, share++) {
      const int slot_row = table.uses[from].slot / slots;
      int passes = 0;
      for (to = from; to < table.num_uses && table.uses[to].slot / slots == slot_row; to++) {
        passes += table.uses[to].strips;
      }
      for (int chunk = 0; chunk < chunks; chunk++) {
        const int b = chunk * a.chunk_blocks, count = least(a.chunk_blocks, blocks - b);
        const int channels = least(count * kLanes, group_channels(h) - b * kLanes);
        const float* taps = taps_of(k, slot_row) + b * block;
        const float* next;  // what is fetched meanwhile: what is read next or, of nine taps, a share of the
                            // next panel, since all rows of slots read the same
        int64_t floats = count * block;
        if (nine) {
          next = after + (share * row + b * block) / table.slot_rows;
          floats /= table.slot_rows;
          expand_rows(taps, channels, u, h.stride, slot_row);
          taps = u;
        } else {
          next = b + count < blocks    ? taps + count * block
                 : to < table.num_uses ? taps_of(k, table.uses[to].slot / slots)
                                       : after;
        }
        const int64_t step = fetch_step(floats, int64_t{passes} * channels);
        for (int i = from; i < to; i++) {
          const MatrixUse& use = table.uses[i];
          const Slot column = kSlots[h.stride - 1][use.slot % slots];
          const auto choose = [&](int rows) { return choose_taps(column.form, rows); };
          next = multiply_use(use, choose, v, h.groups * blocks, k % h.groups * blocks + b,
                              taps + column.tap * kPanel, mk + use.first_row * kPanel, channels,
                              a.sum_channels, chunk > 0, next, step);
        }
      }
    }
  }
}

// ---- The layer.

// Products of the panels [first, last) to stored results.
void finish(const ConvArgs& a, const TileSet& set, int first, int last, const float* m) {
  const PackedHeader& h = *a.packed;
  const int64_t panel = int64_t{set.table->m_rows} * kPanel;
  const Epilogue epilogue = choose_epilogue(h);
  alignas(64) float z[kMaxGroups][kMaxTile * kMaxTile * kLanes];
  for (int k = first; k < last; k += h.groups) {
    for (int t = 0; t < set.count; t++) {
      const Tile& tile = set.tiles[t];
      const int32_t* offset = set.table->m_offset + t * kMaxTransforms;
      for (int half = 0; half < 2; half++) {
        const int out_block = 2 * k + h.groups * half;
        if (out_block >= h.out_blocks) break;
        for (int g = 0; g < h.groups; g++) {
          kTransforms[h.stride - 1].inverse[tile.row_kind][tile.col_kind](
              m + (k - first + g) * panel + half * kLanes, offset, z[g]);
        }
        epilogue(a, tile, k, half, out_block, z);
      }
    }
  }
}

void convolve(const ConvArgs& a, const TileSet& set, const float* v, int first, int last, float* m,
              float* u) {
  // A fusion's groups finish together: their channels alternate in the result.
  const int step = a.packed->groups == 1 ? panels_at_once(kLanes) : 2;
  for (int k = first; k < last; k += step) {
    const int end = least(k + step, last);
    if (transforms_at_call(a.packed->storage)) {
      multiply_taps(a, *set.table, v, k, end, m, u);
    } else {
      multiply_transformed(a, *set.table, v, k, end, m);
    }
    finish(a, set, k, end, m);
  }
}

}  // namespace
}  // namespace parnet::cpu
