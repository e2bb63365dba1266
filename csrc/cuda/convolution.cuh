// One tile of a 3x3 convolution as an implicit matrix product, with everything a ParNet layer does after it.
//
// The halo of the tile is loaded once for each 64-byte chunk of channels; the 9 taps read it at shifted
// addresses. Of a stride-2 halo the even columns lie first, so that the taps are constant shifts there too.
// Warps: 2 halves of the columns times 2 K groups, each with one 32-byte half of every chunk.
#pragma once
#include <utility>

#include "channel_gate.cuh"
#include "epilogue.cuh"
#include "splits.cuh"

namespace parnet::cuda {

#if defined(__CUDA_ARCH__)
constexpr int kStages = stages(__CUDA_ARCH__ / 10);
#else
constexpr int kStages = 3;
#endif

struct Scratch {
  union {
    float4 sums[4][32];  // the gate's, while the pipeline fills
    Columns vectors;     // and then the columns'
  };
  float logits[kColumns];
  int finishes;  // whether this block is the one of its tile's splits that goes on
};
static_assert(sizeof(Scratch) <= kStaticSharedBytes);

extern __shared__ __align__(128) unsigned char dynamic_shared[];

// Where a block works.
struct Place {
  int split, tile, column_tile, group, group_tile, image, image_tile, first_chunk, last_chunk, row, col;

  __device__ __forceinline__ Place(const LayerCall& p, int block) {
    const int tiles = p.out.tiles_down * p.out.tiles_across;
    const int all_tiles = p.images * tiles * p.groups * p.column_tiles;
    split = block / all_tiles;
    tile = block % all_tiles;
    column_tile = tile % p.column_tiles;
    int rest = tile / p.column_tiles;
    group = rest % p.groups;
    rest /= p.groups;
    image_tile = rest % tiles;
    image = rest / tiles;
    group_tile = group * p.column_tiles + column_tile;
    // The first splits have the odd chunks: longest blocks first. One without any still fills its pipeline.
    const int chunks = p.chunks / p.splits, odd = p.chunks % p.splits;
    first_chunk = min(split * chunks + min(split, odd), p.chunks - 1);
    last_chunk = first_chunk + chunks + (split < odd);
    row = image_tile / p.out.tiles_across * p.tile_rows;
    col = image_tile % p.out.tiles_across * p.tile_cols;
  }
};

template <class M, int kShape>
struct Tile {
  using T = typename M::T;
  static constexpr TileShape kTile = kTiles[kShape];
  static constexpr int kFragments = kTile.rows / 16;
  static constexpr int kWeightBytes = weight_stage_bytes();
  static constexpr int kStride = kTile.stride;
  static constexpr int kSlots = kStride == 2 ? kOddSlots + kTile.max_slots : kTile.max_slots;
  static constexpr int kSlotRounds = (kSlots + 31) / 32;
  static constexpr int kLaneChannels = 16 / sizeof(T);
  static constexpr int kWeightBias = 1024;
  static constexpr int kKept = 2;  // of a warp's 4 column fragments, after the exchange between K groups

  const LayerCall& p;
  Scratch& scratch;
  const Place place;
  const uint32_t weights = shared_address(dynamic_shared), halo = weights + kStages * kWeightBytes;
  const int warp = threadIdx.x / 32, column_half = warp & 1, k_group = warp >> 1;
  float acc[kFragments][4][4];

  __device__ __forceinline__ Tile(const LayerCall& call, Scratch& s, int block)
      : p(call), scratch(s), place(p, block) {}

  // a / b, exact for a * b < 2^16; the inner division is done once for all a.
  static __device__ __forceinline__ int quotient(int a, int b) { return (a * (65536 / b + 1)) >> 16; }
  __device__ __forceinline__ int row_of(int m) const { return quotient(m, p.tile_cols); }

  __device__ void run() {
    allow_dependents();
    prefetch_weights();
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
    const Splits<kFragments, kKept> splits{p, place.tile, place.split};
    if (!finishes) return splits.leave(sums, logit);
    if (p.splits > 1)
      splits.add_others(sums, logit, dynamic_shared, kStages * kWeightBytes + 2 * p.slots * kSlotBytes);
    if (threadIdx.x < kColumns) set_column<M>(scratch.vectors, p.out.flags, threadIdx.x, logit);
    __syncthreads();
    finish(sums, skip);
  }

  // Into L2 before the producer is waited for, by one block of those that share them: weights past what the
  // first stages load, and gate weights.
  __device__ __forceinline__ void prefetch_weights() const {
#if __CUDA_ARCH__ >= 900
    if (place.image_tile == 0 && place.image == 0) {
      const char* from = weight_source();
      const int chunks = place.last_chunk - place.first_chunk, bytes = 3 * chunks * kWeightBytes;
      for (int i = (kStages - 1) * kWeightBytes + threadIdx.x * 128; i < bytes; i += kThreads * 128)
        prefetch_l2(from + i);
      const char* gate = static_cast<const char*>(p.gate_weight) + place.first_chunk * kChunkBytes;
      const int64_t row = static_cast<int64_t>(place.group_tile) * kColumns + threadIdx.x % kColumns;
      for (int i = threadIdx.x / kColumns * 128; i < chunks * kChunkBytes; i += kThreads / kColumns * 128)
        prefetch_l2(gate + row * p.chunks * kChunkBytes + i);
    }
#endif
  }

  __device__ __forceinline__ const char* weight_source() const {
    return static_cast<const char*>(p.weight) +
           (static_cast<int64_t>(place.group_tile) * p.chunks + place.first_chunk) * (3 * kWeightBytes);
  }

  // `from` and `to` are the lane's first 16 bytes. A warp copies 3 KB in a row: the offsets of all its copies
  // fit into the instruction.
  template <int... kRound>
  static __device__ __forceinline__ void copy_weights(uint32_t to, const char* from,
                                                      std::integer_sequence<int, kRound...>) {
    (copy_async<kRound * 512, kRound * 512 - kWeightBias>(to, from), ...);
  }

  // `x` is the lane's part of the chunk in the image's first pixel.
  template <int... kRound>
  static __device__ __forceinline__ void copy_pixels(uint32_t to, uint64_t x, const int (&pixel)[kSlotRounds],
                                                     std::integer_sequence<int, kRound...>) {
    (copy_async_unless_negative<kRound * 32 * kSlotBytes>(to, x, pixel[kRound]), ...);
  }

  // Where the weights of kernel row `row` lie, of those a chunk uses: with three stages always in the same.
  // Rows 3 and 4 are the next chunk's. `flip`: kWeightBytes in every second chunk.
  static __device__ __forceinline__ uint32_t stage_offset(int row, uint32_t flip) {
    if constexpr (kStages == 3) return row % 3 * kWeightBytes;
    return row % 2 ? kWeightBytes - flip : flip;
  }

  __device__ __forceinline__ void multiply() {
    // Four threads a pixel, 16 bytes each. Eight lanes at a time read whole sectors, 32 bytes of every other
    // pixel: at a pitch of 80 bytes these lie in different banks.
    const int lane = lane_id();
    const int part = (lane >> 4) * 2 + (lane & 1), first_slot = warp * 8 + (lane & 6) + ((lane >> 3) & 1);
    const int halo_bytes = p.slots * kSlotBytes;
    const int pixel_parts = p.in[0].pitch / kLaneChannels;  // the same for both inputs
    int pixel[kSlotRounds];                                 // in the image, in units of 16 bytes, or -1
#pragma unroll
    for (int j = 0; j < kSlotRounds; j++) {
      const int slot = first_slot + 32 * j;
      const bool odd = kStride == 2 && slot >= kOddSlots;
      const int of_plane = odd ? slot - kOddSlots : slot;
      const int r = quotient(of_plane, p.slot_pitch), q = of_plane - r * p.slot_pitch;
      const int column = kStride == 1 ? q : 2 * q + odd;
      const int ih = place.row * kStride + r - 1, iw = place.col * kStride + column - 1;
      const bool inside = slot < p.slots && column < kStride * (p.tile_cols - 1) + 3 &&
                          r < kStride * (p.tile_rows - 1) + 3 && ih >= 0 && ih < p.h && iw >= 0 && iw < p.w;
      pixel[j] = inside ? (ih * p.w + iw) * pixel_parts : -1;
      if (!inside && slot < p.slots) {  // the padding, once: no copy writes there
        unsigned char* to = dynamic_shared + kStages * kWeightBytes + slot * kSlotBytes + part * 16;
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(to + halo_bytes) = make_uint4(0, 0, 0, 0);
      }
    }

    const int lane_weight = warp * (kWeightBytes / 4) + lane * 16;
    const char* weight = weight_source() + lane_weight + kWeightBias;
    const uint32_t weight_to = weights + lane_weight;
    auto load_weights = [&](uint32_t stage) {
      copy_weights(weight_to + stage, weight,
                   std::make_integer_sequence<int, kWeightBytes / (16 * kThreads)>());
    };
    const int32_t* next_entry = p.chunk_table + place.group * p.chunks + place.first_chunk;
    uint64_t image_part = (static_cast<uint64_t>(place.image) * p.h * p.w * pixel_parts + part) * 16;
    uint32_t halo_to = halo + first_slot * kSlotBytes + part * 16;
    pin(image_part);
    pin(halo_to);
    int halo_flip = halo_bytes, entry = __ldg(next_entry), gate_entry = 0;
    if (place.first_chunk + chunk_of_lane<T>() < place.last_chunk)
      gate_entry = __ldg(next_entry + chunk_of_lane<T>());
    auto load_halo = [&] {
      const uint64_t x = reinterpret_cast<uint64_t>(p.in[entry >> kSourceShift].x) + image_part +
                         static_cast<uint32_t>((entry & ((1 << kSourceShift) - 1)) * sizeof(T));
      copy_pixels(halo_to, x, pixel, std::make_integer_sequence<int, kSlotRounds>());
      halo_to += halo_flip;
      halo_flip = -halo_flip;
      entry = __ldg(++next_entry);  // one ahead of its use
    };

    const int chunks = place.last_chunk - place.first_chunk;
#pragma unroll
    for (int i = 0; i < kStages - 1; i++, weight += kWeightBytes)
      load_weights(stage_offset(i, 0));  // of the first chunk's three
    wait_for_producers();
    load_halo();
    commit_copies();
#pragma unroll
    for (int i = 1; i < kStages - 1; i++) commit_copies();
    unsigned began = 0;  // of the tile's splits, before this one
    if (p.splits > 1 && threadIdx.x == 0) began = atomicAdd(p.arrivals + place.tile, 1u);
    gate_logits<T>(p, place.image, place.group, place.group_tile, place.first_chunk, place.last_chunk,
                   gate_entry, scratch.sums, scratch.logits);
    pin(began);  // or the compiler would wait for the atomic where it is issued
    if (threadIdx.x == 0) scratch.finishes = began % kLeft + 1 == static_cast<unsigned>(p.splits);
    __syncthreads();  // the sums in the scratch memory have been read
    if (threadIdx.x < kVectors * kColumns / 4)
      copy_async(shared_address(scratch.vectors) + 16 * threadIdx.x,
                 column_vectors(p.out, place.group_tile) + 4 * threadIdx.x);

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
        const int m = i * 16 + M::row(k), r = row_of(m), c = m - r * p.tile_cols;
        const int slot = r < p.tile_rows ? r * kStride * p.slot_pitch + c : 0;
        a_address[i][k] = halo + slot * kSlotBytes + M::row_byte() + k_group * 32;
      }
    uint32_t b_address = weights + column_half * 32 * 64 + M::weight_offset(k_group);
    pin(b_address);
    const int row_bytes = p.slot_pitch * kSlotBytes;
    // Of the three taps in a packed row: with stride 2 these are columns 0, 2 (the next even one) and 1.
    constexpr int kShift[3] = {0, kSlotBytes, (kStride == 2 ? kOddSlots : 2) * kSlotBytes};
    int chunk_step = halo_bytes - 2 * row_bytes;  // from the last row of a buffer to the first of the other
    uint32_t flip = 0;
    for (int left = chunks; left > 0; left--) {
#pragma unroll
      for (int kh = 0; kh < 3; kh++) {
        wait_copies<kStages - 2>();
        __syncthreads();
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

  // Each K group gives away the sums of two of the four column fragments and adds what it gets to the other
  // two.
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

  // Of the lane's row `half` in fragment i: the pixel of the result's image, or -1.
  __device__ __forceinline__ int pixel_of(int i, int half) const {
    const int m = i * 16 + half * 8 + (lane_id() >> 2), r = row_of(m), oh = place.row + r;
    const int ow = place.col + m - r * p.tile_cols;
    return r < p.tile_rows && oh < p.out.out_h && ow < p.out.out_w ? oh * p.out.out_w + ow : -1;
  }
  // The lane's first column of the four it keeps. Weights are packed so that they are adjacent channels.
  __device__ __forceinline__ int kept_column() const {
    return column_half * 32 + k_group * 16 + 4 * (lane_id() & 3);
  }
  __device__ __forceinline__ int64_t image_pixels() const {
    return place.image * (static_cast<int64_t>(p.out.out_h) * p.out.out_w);
  }

  __device__ __forceinline__ void load_skip(Four<T> (&skip)[kFragments][2]) const {
    const int first = place.column_tile * kColumns + kept_column();
    const T* x = static_cast<const T*>(p.in[0].x) + image_pixels() * p.in[0].pitch + first;
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int pixel = pixel_of(i, half);
        if (pixel >= 0 && first < p.out.width)
          skip[i][half] =
              __ldcg(reinterpret_cast<const Four<T>*>(x + static_cast<int64_t>(pixel) * p.in[0].pitch));
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
                         image_pixels() + pixel, p.out.flags & kSkip, skip[i][half]);
        }
    }
    epilogue.add_lanes();
    if (p.out.sums && epilogue.stored && lane_id() < 4)
      epilogue.store_sums(static_cast<int64_t>(place.image) * p.out.tiles_down * p.out.tiles_across +
                          place.image_tile);
  }
};

template <class M>
__device__ __forceinline__ void run_level(const LevelCall& call) {
  __shared__ Scratch scratch;
  int block = blockIdx.x;
  int layer = 0;
  while (layer + 1 < call.layers && block >= call.layer[layer + 1].first_block) layer++;
  const LayerCall& p = call.layer[layer];
  block -= p.first_block;
  if constexpr (!M::kExact) {  // the exact kernel multiplies on 64-row tiles only: 112 rows spill
    if (p.tile == 0) return Tile<M, 0>(p, scratch, block).run();
  }
  if (p.tile == 1) return Tile<M, 1>(p, scratch, block).run();
  Tile<M, 2>(p, scratch, block).run();
}

}  // namespace parnet::cuda
