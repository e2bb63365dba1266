// A tile whose products are wgmma's: Hopper multiplies at full rate only so. Four warps share 64 columns; of
// each 64 rows a warp has 16. Pixels come by way of registers (ldmatrix), since the taps read them at shifted
// addresses; weights straight from shared memory, where bulk copies put them. Everything else is as in
// `Tile`. Two blocks may work as a pair (`Pairing`), launched as a cluster.
#pragma once
#include "cluster.cuh"
#include "convolution.cuh"

namespace parnet::cuda {

template <class M, int kShape>
struct WarpgroupTile : TileBase<M, kShape> {
  using Base = TileBase<M, kShape>;
  using Base::halo, Base::kPixelBytes, Base::kCellRounds, Base::kStride, Base::kTile, Base::kWeightBytes,
      Base::p, Base::place, Base::scratch, Base::warp, Base::weights, Base::Base;
  using typename Base::T;
  static constexpr int kFragments = kTile.rows / 64;  // of 64 rows
  static constexpr int kHalf = kFragments / 2;        // what a block of a pair keeps of its splits' sums
  static constexpr int kSteps = 6;                    // of 16 channels in a stage
  static constexpr int kLoadStep = 2;                 // in which the next stage's weights are asked for

  const uint32_t filled = shared_address(scratch.filled), used = shared_address(scratch.used);
  float4 sums[kFragments][8];  // [.][fragment of 8 columns]: 4 adjacent channels lie in two fragments

  __device__ void run() {
    if (place.image >= p.images) return;  // the other block of the last pair is alone
    allow_dependents();
    this->prefetch_weights();
    multiply();
    wait_products<0>();
    wait_copies<0>();  // of the vectors, if there was no chunk
    __syncthreads();
    float logit = threadIdx.x < kColumns ? scratch.logits[threadIdx.x] : 0.0f;
    if (p.pairing == kPixels) arrive_cluster();
    if (p.pairing != kSplits)
      return complete<0>(sums, logit, Splits<kFragments, 8, 64>{p, place.tile, place.split, p.splits, 0});
    float4 half[kHalf][8];
    const Splits<kHalf, 8, 64> pairs{p, 2 * place.tile + place.rank, place.split / 2, p.splits / 2,
                                     place.rank * kHalf * 64};
    exchange(half, logit, pairs);
    complete<1>(half, logit, pairs);
  }

  static __device__ __forceinline__ float4* exchange_area() {
    return reinterpret_cast<float4*>(dynamic_shared);
  }

  // Adds the sums of the two blocks of a pair: each keeps half of the rows, and leaves the others where the
  // other block reads them.
  __device__ __forceinline__ void exchange(float4 (&half)[kHalf][8], float& logit,
                                           const Splits<kHalf, 8, 64>& mine) {
    float4* area = exchange_area() + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kHalf; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) {
        half[i][j] = place.rank == 0 ? sums[i][j] : sums[kHalf + i][j];
        if (mine.used(i, kHalf * 64 - mine.first_row))
          area[(i * 8 + j) * kThreads] = place.rank == 0 ? sums[kHalf + i][j] : sums[i][j];
      }
    arrive_cluster();
    wait_cluster();
    const uint32_t there = in_partner(shared_address(area), place.rank);
#pragma unroll
    for (int i = 0; i < kHalf; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (mine.used(i)) add(half[i][j], load_partner(there + (i * 8 + j) * (kThreads * 16)));
    if (threadIdx.x < kColumns)
      logit += load_partner_value(in_partner(shared_address(scratch.logits + threadIdx.x), place.rank));
    arrive_cluster();
  }

  // All that follows the products. kPair: this block has half of the tile's rows (kSplits).
  template <int kPair, int kKept>
  __device__ __forceinline__ void complete(float4 (&kept)[kKept][8], float logit,
                                           const Splits<kKept, 8, 64>& splits) {
    const bool split = splits.splits > 1, finishes = !split || scratch.finishes;
    Four<T> skip[kKept][2][4];
    if (kPair && finishes && (p.out.flags & kSkip)) load_skip(skip, splits.first_row);
    if (!finishes) {
      splits.leave(kept, logit);
    } else if (split) {
      splits.wait_for_others();
    }
    if (split) end_pair<kPair>();
    if (!finishes) return;
    if (split) splits.add_others(kept, logit, dynamic_shared, exchange_bytes(kTile));
    if (!kPair && (p.out.flags & kSkip)) load_skip(skip, 0);  // no registers for it before
    if (threadIdx.x < kColumns) set_column<M>(scratch.vectors, p.out.flags, threadIdx.x, logit);
    __syncthreads();
    finish<kPair>(kept, skip, splits.first_row);
    if (!split) end_pair<kPair>();
  }

  // After it the other block has read what was left for it; or it has no copies and arrivals on their way
  // here, and may exit. So late that it takes no time.
  template <int kPair>
  __device__ __forceinline__ void end_pair() const {
    if (kPair || p.pairing == kPixels) wait_cluster();
  }

  __device__ __forceinline__ void multiply() {
    static_assert(kStages == 3, "a chunk uses every stage once");
    const int lane = lane_id(), part = lane & 3, first_cell = warp * 8 + (lane >> 2);
    const int halo_bytes = p.cells * kPixelBytes, chunks = this->chunks();
    int pixel[kCellRounds];
    this->find_pixels(pixel, first_cell, part, halo_bytes);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; stage++)
        init_barrier(filled + 8 * stage), init_barrier(used + 8 * stage);
      fence_barriers();
    }
    __syncthreads();
    if (p.pairing == kPixels) arrive_cluster_relaxed(), wait_cluster();  // the other block may use them

    constexpr int kShare = kWeightBytes / 2;
    const int share = place.rank * kShare;
    const char* weight = this->weight_source() + (place.shares_weights ? share : 0);
    auto load_weights = [&](int stage) {
      expect_bytes(filled + 8 * stage, kWeightBytes);
      if (place.shares_weights) {
        copy_to_both(weights + stage * kWeightBytes + share, weight, kShare, filled + 8 * stage);
      } else {
        copy_bulk(weights + stage * kWeightBytes, weight, kWeightBytes, filled + 8 * stage);
      }
      weight += kWeightBytes;
    };
    const int32_t* next_entry = p.chunk_table + place.group * p.chunks + place.first_chunk;
    const uint64_t image_part =
        (static_cast<uint64_t>(place.image) * p.h * p.w * (p.inputs[0].pitch / Base::kLaneChannels) + part) *
        16;
    // The 16-byte parts of cell s lie at part ^ (s / 2 % 4). A lane's cells are 32 apart: all alike.
    uint32_t halo_to = halo + first_cell * kPixelBytes + (part ^ (first_cell >> 1 & 3)) * 16;
    int halo_flip = halo_bytes, entry = __ldg(next_entry);
    const int gate_entry = this->gate_entry(next_entry);
    auto load_halo = [&] {
      const uint64_t x = reinterpret_cast<uint64_t>(p.inputs[entry >> kSourceShift].x) + image_part +
                         static_cast<uint32_t>((entry & ((1 << kSourceShift) - 1)) * sizeof(T));
      this->copy_pixels(halo_to, x, pixel, std::make_integer_sequence<int, kCellRounds>());
      halo_to += halo_flip;
      halo_flip = -halo_flip;
      entry = __ldg(++next_entry);  // one ahead of its use
      commit_copies();
    };

    if (threadIdx.x == 0 && chunks > 0) load_weights(0), load_weights(1);
    wait_for_producers();
    load_halo();
    this->gate(gate_entry);
    commit_copies();  // of the vectors

#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) sums[i][j] = make_float4(0, 0, 0, 0);
    uint32_t address[kFragments];  // of the lane's row, before the swizzle
#pragma unroll
    for (int i = 0; i < kFragments; i++) {
      const int m = i * 64 + warp * 16 + M::row(0), r = this->row_of(m), c = m - r * p.tile_cols;
      const int cell = r < p.tile_rows ? r * kStride * p.cell_pitch + c : 0;
      address[i] = halo + cell * kPixelBytes + M::row_byte();
    }
    const uint64_t described = describe_weights(weights);
    const int row_bytes = p.cell_pitch * kPixelBytes;
    // Bytes from a cell to the one that each tap of a packed kernel row reads: see `Tile`.
    constexpr int kShift[3] = {0, kPixelBytes, (kStride == 2 ? kTile.max_cells : 2) * kPixelBytes};
    int from = 0;  // bytes from the first halo's first row
    int chunk_step = halo_bytes - 2 * row_bytes;
    uint32_t parity = 0;
    wait_copies<1>();  // all but the vectors
    __syncthreads();
    for (int left = chunks; left > 0; left--) {
      if (p.chunk_masks) this->clear_other_groups(next_entry, max(halo_flip, 0));
#pragma unroll
      for (int kh = 0; kh < 3; kh++) {
        wait_barrier(filled + 8 * kh, parity);
        uint32_t a[2][kFragments][4];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
#pragma unroll
          for (int i = 0; i < kFragments; i++) {
            const uint32_t plain = address[i] + from + kShift[step / 2];
            load_matrices(a[step % 2][i], (plain ^ (plain >> 3 & 0x30)) ^ step % 2 * 32);
          }
          fence_products();
#pragma unroll
          for (int i = 0; i < kFragments; i++)
            multiply_warpgroup<T>(sums[i], a[step % 2][i],
                                  described + (kh * kWeightBytes + step / 2 * 4096 + step % 2 * 32) / 16);
          commit_products();
          wait_products<1>();  // those of the step before
          const int free = (kh + 2) % 3;
          const bool loads = kh == 0 || left > 1;
          if (step == 0) {
            // The stage before has been used, and in the first row the other halo.
            if (kh == 2) wait_copies<0>();
            __syncthreads();
            if (threadIdx.x == 0 && place.shares_weights)
              arrive_partner(in_partner(used + 8 * free, place.rank));
            if (kh == 0 && left > 1) load_halo();
          }
          // Seldom waits: the other block has had two steps' time to arrive.
          if (step == kLoadStep && threadIdx.x == 0 && loads) {
            if (place.shares_weights) wait_barrier(used + 8 * free, parity);
            load_weights(free);
          }
        }
        from += kh < 2 ? row_bytes : chunk_step;
      }
      chunk_step = -chunk_step - 4 * row_bytes;
      parity ^= 1;
    }
  }

  // The result's pixel for the lane's first (half = 0) or second row in the fragment that begins at `row`, or
  // -1.
  __device__ __forceinline__ int pixel_of(int row, int half) const {
    return this->pixel_of_row(row + warp * 16 + half * 8 + (lane_id() >> 2));
  }
  // The first of the lane's adjacent columns in fragments 2j and 2j + 1.
  __device__ __forceinline__ int column_of(int j) const { return j * 16 + 4 * (lane_id() & 3); }

  template <int kKept>
  __device__ __forceinline__ void load_skip(Four<T> (&skip)[kKept][2][4], int first_row) const {
    const int column = place.column_tile * kColumns;
    const T* x = static_cast<const T*>(p.inputs[0].x) + this->image_pixels() * p.inputs[0].pitch + column;
#pragma unroll
    for (int i = 0; i < kKept; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int pixel = pixel_of(first_row + i * 64, half);
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (pixel >= 0 && column + column_of(j) < p.out.width)
            skip[i][half][j] = __ldcg(reinterpret_cast<const Four<T>*>(
                x + static_cast<int64_t>(pixel) * p.inputs[0].pitch + column_of(j)));
      }
  }

  template <int kPair, int kKept>
  __device__ __forceinline__ void finish(const float4 (&kept)[kKept][8], const Four<T> (&skip)[kKept][2][4],
                                         int first_row) {
    float4* warp_sums = exchange_area() + kHalf * 8 * kThreads;  // [warp][four columns]
#pragma unroll
    for (int j = 0; j < 4; j++) {
      LaneEpilogue<M> epilogue(p.out, scratch.vectors, place.group, place.column_tile * kColumns,
                               column_of(j));
      if (epilogue.stored) {
#pragma unroll
        for (int i = 0; i < kKept; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int pixel = pixel_of(first_row + i * 64, half);
            if (pixel < 0) continue;
            const float4 a = kept[i][2 * j], b = kept[i][2 * j + 1];
            epilogue.store(half ? make_float4(a.z, a.w, b.z, b.w) : make_float4(a.x, a.y, b.x, b.y),
                           this->image_pixels() + pixel, p.out.flags & kSkip, skip[i][half][j]);
          }
      }
      epilogue.add_lanes();
      if (lane_id() < 4) warp_sums[warp * 16 + 4 * j + lane_id()] = epilogue.sum;
    }
    if (!p.out.sums) return;
    __syncthreads();
    if (threadIdx.x >= kColumns / 4) return;
    LaneEpilogue<M> epilogue(p.out, scratch.vectors, place.group, place.column_tile * kColumns,
                             4 * threadIdx.x);
#pragma unroll
    for (int w = 0; w < 4; w++) add(epilogue.sum, warp_sums[w * 16 + threadIdx.x]);
    if (epilogue.stored) epilogue.store_sums(kPair ? 2 * this->sums_tile() + place.rank : this->sums_tile());
  }
};

// As `run_level`, for levels with warpgroup tiles.
template <class M>
__device__ __forceinline__ void run_warpgroup_level(const LevelCall& call) {
  __shared__ Scratch scratch;
  int block = blockIdx.x;
  const LayerCall& p = layer_of(call, block);
  if (block >= p.blocks) return;  // the next layer's pairs begin at an even block
  if (p.tile == kWarpgroupTile) return WarpgroupTile<M, kWarpgroupTile>(p, scratch, block).run();
  if (p.tile == kStridedWarpgroupTile)
    return WarpgroupTile<M, kStridedWarpgroupTile>(p, scratch, block).run();
  run_tile<M>(p, scratch, block);
}

}  // namespace parnet::cuda
