// One tile of a 3x3 convolution as an implicit matrix product, with everything a ParNet layer does after it.
//
// The halo of the tile is loaded once for each 64-byte chunk of channels; the 9 taps read it at shifted
// addresses. Of a stride-2 halo the even columns lie first, so that the taps are constant shifts there too.
// Warps: 2 halves of the columns times 2 K groups, each with one 32-byte half of every chunk.
#pragma once
#include "splits.cuh"
#include "tile.cuh"

namespace parnet::cuda {

template <class M, int kShape>
struct Tile : TileBase<M, kShape> {
  using Base = TileBase<M, kShape>;
  using Base::halo, Base::kPixelBytes, Base::kCellRounds, Base::kStride, Base::kTile, Base::kWeightBytes,
      Base::p, Base::place, Base::scratch, Base::warp, Base::weights, Base::Base;
  using typename Base::T;
  static constexpr int kFragments = kTile.rows / 16;
  static constexpr int kWeightBias = 1024;
  static constexpr int kKept =
      2;  // column fragments that a warp keeps of its 4 in the exchange between K groups

  const int column_half = warp & 1, k_group = warp >> 1;
  float acc[kFragments][4][4];

  __device__ void run() {
    allow_dependents();
    this->prefetch_weights();
    multiply();
    commit_copies();  // of the vectors, if there was no chunk
    wait_copies<0>();
    __syncthreads();
    const bool finishes = p.splits == 1 || scratch.finishes;
    Four<T> skip[kFragments][2];
    if (finishes && (p.out.flags & kSkip))
      load_skip(skip);  // on its way during all that comes before its use
    float4 sums[kFragments][kKept];
    exchange(sums);
    float logit = threadIdx.x < kColumns ? scratch.logits[threadIdx.x] : 0.0f;
    const Splits<kFragments, kKept> splits{p, place.tile, place.split, p.splits, 0};
    if (!finishes) return splits.leave(sums, logit);
    if (p.splits > 1) {
      splits.wait_for_others();
      splits.add_others(sums, logit, dynamic_shared, kStages * kWeightBytes + 2 * p.cells * kPixelBytes);
    }
    if (threadIdx.x < kColumns) set_column<M>(scratch.vectors, p.out.flags, threadIdx.x, logit);
    __syncthreads();
    finish(sums, skip);
  }

  // Copies the weights of one pipeline stage; `from` and `to`: the lane's first 16 bytes. A warp copies 3 KB
  // in a row: the offsets of all its copies fit into the instruction.
  template <int... kRound>
  static __device__ __forceinline__ void copy_weights(uint32_t to, const char* from,
                                                      std::integer_sequence<int, kRound...>) {
    (copy_async<kRound * 512, kRound * 512 - kWeightBias>(to, from), ...);
  }

  // The offset of the pipeline stage with the weights of kernel row `row` of a chunk; rows 3 and 4 are the
  // first two of the next chunk. With three stages a kernel row always has the same one; with two they take
  // turns, and `flip` is kWeightBytes in every second chunk, else 0.
  static __device__ __forceinline__ uint32_t stage_offset(int row, uint32_t flip) {
    if constexpr (kStages == 3) return row % 3 * kWeightBytes;
    return row % 2 ? kWeightBytes - flip : flip;
  }

  __device__ __forceinline__ void multiply() {
    // Four threads a pixel, 16 bytes each. Eight lanes at a time read whole sectors, 32 bytes of every other
    // pixel: at a pitch of 80 bytes these lie in different banks.
    const int lane = lane_id();
    const int part = (lane >> 4) * 2 + (lane & 1), first_cell = warp * 8 + (lane & 6) + ((lane >> 3) & 1);
    const int halo_bytes = p.cells * kPixelBytes;
    const int pixel_parts = p.inputs[0].pitch / Base::kLaneChannels;
    int pixel[kCellRounds];
    this->find_pixels(pixel, first_cell, part, halo_bytes);

    const int lane_weight = warp * (kWeightBytes / 4) + lane * 16;
    const char* weight = this->weight_source() + lane_weight + kWeightBias;
    const uint32_t weight_to = weights + lane_weight;
    auto load_weights = [&](uint32_t stage) {
      copy_weights(weight_to + stage, weight,
                   std::make_integer_sequence<int, kWeightBytes / (16 * kThreads)>());
    };
    const int32_t* next_entry = p.chunk_table + place.group * p.chunks + place.first_chunk;
    uint64_t image_part = (static_cast<uint64_t>(place.image) * p.h * p.w * pixel_parts + part) * 16;
    uint32_t halo_to = halo + first_cell * kPixelBytes + part * 16;
    pin(image_part);
    pin(halo_to);
    int halo_flip = halo_bytes, entry = __ldg(next_entry);
    const int gate_entry = this->gate_entry(next_entry);
    auto load_halo = [&] {
      const uint64_t x = reinterpret_cast<uint64_t>(p.inputs[entry >> kSourceShift].x) + image_part +
                         static_cast<uint32_t>((entry & ((1 << kSourceShift) - 1)) * sizeof(T));
      this->copy_pixels(halo_to, x, pixel, std::make_integer_sequence<int, kCellRounds>());
      halo_to += halo_flip;
      halo_flip = -halo_flip;
      entry = __ldg(++next_entry);  // one ahead of its use
    };

    const int chunks = this->chunks();
#pragma unroll
    for (int i = 0; i < kStages - 1; i++, weight += kWeightBytes)
      load_weights(stage_offset(i, 0));  // of the first chunk's three
    wait_for_producers();
    load_halo();
    commit_copies();
#pragma unroll
    for (int i = 1; i < kStages - 1; i++) commit_copies();
    this->gate(gate_entry);

#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
    uint32_t a_address[kFragments][M::kRowAddresses];
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int k = 0; k < M::kRowAddresses; k++) {
        const int m = i * 16 + M::row(k), r = this->row_of(m), c = m - r * p.tile_cols;
        const int cell = r < p.tile_rows ? r * kStride * p.cell_pitch + c : 0;
        a_address[i][k] = halo + cell * kPixelBytes + M::row_byte() + k_group * 32;
      }
    uint32_t b_address = weights + column_half * 32 * 64 + M::weight_offset(k_group);
    pin(b_address);
    const int row_bytes = p.cell_pitch * kPixelBytes;
    // Bytes from a cell to the one that each tap of a packed kernel row reads. With stride 2 the taps are
    // packed in the order 0, 2, 1: tap 2 reads the next even column, and the odd columns lie behind all even
    // ones.
    constexpr int kShift[3] = {0, kPixelBytes, (kStride == 2 ? kTile.max_cells : 2) * kPixelBytes};
    int chunk_step = halo_bytes - 2 * row_bytes;  // from the last row of a buffer to the first of the other
    uint32_t flip = 0;
    for (int left = chunks; left > 0; left--) {
#pragma unroll
      for (int kh = 0; kh < 3; kh++) {
        wait_copies<kStages - 2>();
        __syncthreads();
        if (kh == 0 && p.chunk_masks) this->clear_other_groups(next_entry, max(halo_flip, 0));
        if (kh + kStages - 1 < 3 || left > 1) {
          load_weights(stage_offset(kh + kStages - 1, flip));
          if ((kh + kStages - 1) % 3 == 0) load_halo();
        }
        weight += kWeightBytes;
        commit_copies();
        const uint32_t from = b_address + stage_offset(kh, flip);
#pragma unroll
        for (int kw = 0; kw < 3; kw++) {
          typename M::B b[2];
#pragma unroll
          for (int j = 0; j < 2; j++) M::load_b(b[j], from + kw * (kColumns * 64) + j * 1024);
#pragma unroll
          for (int i = 0; i < kFragments; i++) {
            typename M::A a;
            M::load_a(a, a_address[i], kShift[kw]);
#pragma unroll
            for (int j = 0; j < 4; j++) M::multiply(acc[i][j], a, b[j / 2], j % 2);
          }
        }
#pragma unroll
        for (int i = 0; i < kFragments; i++)
#pragma unroll
          for (int k = 0; k < M::kRowAddresses; k++) a_address[i][k] += kh < 2 ? row_bytes : chunk_step;
      }
      chunk_step = -chunk_step - 4 * row_bytes;
      flip = kWeightBytes - flip;
    }
  }

  // Adds the sums of the two K groups: each gives away those of two of the four column fragments, and adds
  // what it gets to the other two.
  __device__ __forceinline__ void exchange(float4 (&sums)[kFragments][kKept]) {
    float4* area = reinterpret_cast<float4*>(dynamic_shared);
    const int lane = lane_id();
    auto place_of = [&](int group, int i, int j) {
      return (((group * 2 + column_half) * kFragments + i) * kKept + j) * 32 + lane;
    };
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < kKept; j++) {
        const float (&low)[4] = acc[i][j];
        const float (&high)[4] = acc[i][j + kKept];
        const float4 a = make_float4(low[0], low[1], low[2], low[3]),
                     b = make_float4(high[0], high[1], high[2], high[3]);
        sums[i][j] = k_group == 0 ? a : b;
        area[place_of(k_group ^ 1, i, j)] = k_group == 0 ? b : a;
      }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < kKept; j++) add(sums[i][j], area[place_of(k_group, i, j)]);
  }

  // The result's pixel for the lane's first (half = 0) or second row in fragment i, or -1.
  __device__ __forceinline__ int pixel_of(int i, int half) const {
    return this->pixel_of_row(i * 16 + half * 8 + (lane_id() >> 2));
  }
  // The lane's first column of the four it keeps. Weights are packed so that they are adjacent channels.
  __device__ __forceinline__ int kept_column() const {
    return column_half * 32 + k_group * 16 + 4 * (lane_id() & 3);
  }

  __device__ __forceinline__ void load_skip(Four<T> (&skip)[kFragments][2]) const {
    const int first = place.column_tile * kColumns + kept_column();
    const T* x = static_cast<const T*>(p.inputs[0].x) + this->image_pixels() * p.inputs[0].pitch + first;
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int pixel = pixel_of(i, half);
        if (pixel >= 0 && first < p.out.width)
          skip[i][half] =
              __ldcg(reinterpret_cast<const Four<T>*>(x + static_cast<int64_t>(pixel) * p.inputs[0].pitch));
      }
  }

  __device__ __forceinline__ void finish(const float4 (&sums)[kFragments][kKept],
                                         const Four<T> (&skip)[kFragments][2]) {
    LaneEpilogue<M> epilogue(p.out, scratch.vectors, place.group, place.column_tile * kColumns,
                             kept_column());
    if (epilogue.stored) {
#pragma unroll
      for (int i = 0; i < kFragments; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int pixel = pixel_of(i, half);
          if (pixel < 0) continue;
          const float4 a = sums[i][0], b = sums[i][1];
          epilogue.store(half ? make_float4(a.z, a.w, b.z, b.w) : make_float4(a.x, a.y, b.x, b.y),
                         this->image_pixels() + pixel, p.out.flags & kSkip, skip[i][half]);
        }
    }
    epilogue.add_lanes();
    if (p.out.sums && epilogue.stored && lane_id() < 4) epilogue.store_sums(this->sums_tile());
  }
};

// The layer that a block works for. `block` becomes the block's number within the layer.
__device__ __forceinline__ const LayerCall& layer_of(const LevelCall& call, int& block) {
  int layer = 0;
  while (layer + 1 < call.layers && block >= call.layer[layer + 1].first_block) layer++;
  block -= call.layer[layer].first_block;
  return call.layer[layer];
}

template <class M>
__device__ __forceinline__ void run_tile(const LayerCall& p, Scratch& scratch, int block) {
  if constexpr (!M::kExact) {  // the exact kernel multiplies on 64-row tiles only: 112 rows spill
    if (p.tile == kLargeTile) return Tile<M, kLargeTile>(p, scratch, block).run();
  }
  if (p.tile == kSmallTile) return Tile<M, kSmallTile>(p, scratch, block).run();
  Tile<M, kStridedTile>(p, scratch, block).run();
}

template <class M>
__device__ __forceinline__ void run_level(const LevelCall& call) {
  __shared__ Scratch scratch;
  int block = blockIdx.x;
  const LayerCall& p = layer_of(call, block);
  run_tile<M>(p, scratch, block);
}

}  // namespace parnet::cuda
