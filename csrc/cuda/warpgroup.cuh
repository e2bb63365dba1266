// A tile whose products are wgmma's: Hopper multiplies at full rate only so. Four warps share 64 columns; of
// each 64 rows a warp has 16. Pixels come by way of registers (ldmatrix), since the taps read them at shifted
// addresses; weights straight from shared memory, where bulk copies put them. Everything else is as in
// `Tile`.
#pragma once
#include "convolution.cuh"
#include "wgmma.cuh"

namespace parnet::cuda {

template <class M, int kShape>
struct WarpgroupTile : TileBase<M, kShape> {
  using Base = TileBase<M, kShape>;
  using Base::halo, Base::kPixelBytes, Base::kSlotRounds, Base::kStride, Base::kTile, Base::kWeightBytes,
      Base::p, Base::place, Base::scratch, Base::warp, Base::weights, Base::Base;
  using typename Base::T;
  static constexpr int kFragments = kTile.rows / 64;  // of 64 rows
  static constexpr int kSteps = 6;                    // of 16 channels in a stage

  const uint32_t filled = shared_address(scratch.filled);
  float4 sums[kFragments][8];  // [.][fragment of 8 columns]: 4 adjacent channels lie in two fragments

  __device__ void run() {
    allow_dependents();
    this->prefetch_weights();
    multiply();
    wait_products<0>();
    wait_copies<0>();  // of the vectors, if there was no chunk
    __syncthreads();
    float logit = threadIdx.x < kColumns ? scratch.logits[threadIdx.x] : 0.0f;
    const Splits<kFragments, 8, 64> splits{p, place.tile, place.split};
    if (p.splits > 1) {
      if (!scratch.finishes) return splits.leave(sums, logit);
      splits.add_others(sums, logit, dynamic_shared, exchange_bytes(kTile));
    }
    Four<T> skip[kFragments][2][4];
    if (p.out.flags & kSkip) load_skip(skip);
    if (threadIdx.x < kColumns) set_column<M>(scratch.vectors, p.out.flags, threadIdx.x, logit);
    __syncthreads();
    finish(skip);
  }

  __device__ __forceinline__ void multiply() {
    static_assert(kStages == 3, "a chunk uses every stage once");
    const int lane = lane_id(), part = lane & 3, first_slot = warp * 8 + (lane >> 2);
    const int halo_bytes = p.slots * kPixelBytes, chunks = this->chunks();
    int pixel[kSlotRounds];
    this->find_pixels(pixel, first_slot, part, halo_bytes);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; stage++) init_barrier(filled + 8 * stage);
      fence_barriers();
    }
    __syncthreads();

    const char* weight = this->weight_source();
    auto load_weights = [&](int stage) {
      copy_bulk(weights + stage * kWeightBytes, weight, kWeightBytes, filled + 8 * stage);
      weight += kWeightBytes;
    };
    const int32_t* next_entry = p.chunk_table + place.group * p.chunks + place.first_chunk;
    const uint64_t image_part =
        (static_cast<uint64_t>(place.image) * p.h * p.w * (p.in[0].pitch / Base::kLaneChannels) + part) * 16;
    // The 16-byte parts of slot s lie at part ^ (s / 2 % 4). A lane's slots are 32 apart: all alike.
    uint32_t halo_to = halo + first_slot * kPixelBytes + (part ^ (first_slot >> 1 & 3)) * 16;
    int halo_flip = halo_bytes, entry = __ldg(next_entry);
    const int gate_entry = this->gate_entry(next_entry);
    auto load_halo = [&] {
      const uint64_t x = reinterpret_cast<uint64_t>(p.in[entry >> kSourceShift].x) + image_part +
                         static_cast<uint32_t>((entry & ((1 << kSourceShift) - 1)) * sizeof(T));
      this->copy_pixels(halo_to, x, pixel, std::make_integer_sequence<int, kSlotRounds>());
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
      const int slot = r < p.tile_rows ? r * kStride * p.slot_pitch + c : 0;
      address[i] = halo + slot * kPixelBytes + M::row_byte();
    }
    const uint64_t described = describe_weights(weights);
    const int row_bytes = p.slot_pitch * kPixelBytes;
    // Of the three taps in a packed row: with stride 2 these are columns 0, 2 (the next even one) and 1.
    constexpr int kShift[3] = {0, kPixelBytes, (kStride == 2 ? kTile.max_slots : 2) * kPixelBytes};
    int from = 0;  // bytes from the first halo's first row
    int chunk_step = halo_bytes - 2 * row_bytes;
    uint32_t parity = 0;
    wait_copies<1>();  // all but the vectors
    __syncthreads();
    for (int left = chunks; left > 0; left--) {
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
          if (step > 0) continue;
          // The stage before has been used, and in the first row the other halo.
          if (kh == 2) wait_copies<0>();
          __syncthreads();
          if (kh == 0 || left > 1) {
            if (threadIdx.x == 0) load_weights((kh + 2) % 3);
            if (kh == 0 && left > 1) load_halo();
          }
        }
        from += kh < 2 ? row_bytes : chunk_step;
      }
      chunk_step = -chunk_step - 4 * row_bytes;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ int pixel_of(int i, int half) const {
    return this->pixel_of_row(i * 64 + warp * 16 + half * 8 + (lane_id() >> 2));
  }
  // The first of the lane's adjacent columns in fragments 2j and 2j + 1.
  __device__ __forceinline__ int column_of(int j) const { return j * 16 + 4 * (lane_id() & 3); }

  __device__ __forceinline__ void load_skip(Four<T> (&skip)[kFragments][2][4]) const {
    const int first = place.column_tile * kColumns;
    const T* x = static_cast<const T*>(p.in[0].x) + this->image_pixels() * p.in[0].pitch + first;
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int pixel = pixel_of(i, half);
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (pixel >= 0 && first + column_of(j) < p.out.width)
            skip[i][half][j] = __ldcg(reinterpret_cast<const Four<T>*>(
                x + static_cast<int64_t>(pixel) * p.in[0].pitch + column_of(j)));
      }
  }

  __device__ __forceinline__ void finish(const Four<T> (&skip)[kFragments][2][4]) {
    float4* warp_sums = reinterpret_cast<float4*>(dynamic_shared);  // [warp][four columns]
#pragma unroll
    for (int j = 0; j < 4; j++) {
      LaneEpilogue<M> epilogue(p.out, scratch.vectors, place.group, place.column_tile * kColumns,
                               column_of(j));
      if (epilogue.stored) {
#pragma unroll
        for (int i = 0; i < kFragments; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int pixel = pixel_of(i, half);
            if (pixel < 0) continue;
            const float4 a = sums[i][2 * j], b = sums[i][2 * j + 1];
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
    if (epilogue.stored) epilogue.store_sums(this->sums_tile());
  }
};

// As `run_level`, for levels with warpgroup tiles.
template <class M>
__device__ __forceinline__ void run_warpgroup_level(const LevelCall& call) {
  __shared__ Scratch scratch;
  int block = blockIdx.x;
  const LayerCall& p = layer_of(call, block);
  if (p.tile == 3) return WarpgroupTile<M, 3>(p, scratch, block).run();
  if (p.tile == 4) return WarpgroupTile<M, 4>(p, scratch, block).run();
  run_tile<M>(p, scratch, block);
}

}  // namespace parnet::cuda
