// What the tiles of all kinds have in common: where a block works, which pixels its halo holds, its weights
// on their way to L2, and the gate.
#pragma once
#include <utility>

#include "channel_gate.cuh"
#include "epilogue.cuh"

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
  int finishes;  // whether this block, of its tile's splits, is the one that finishes the tile
  // Barriers of the pipeline stages: `filled` completes when bulk copies have filled the stage, `used` when
  // the other block of a pair has used its own.
  uint64_t filled[kStages], used[kStages];
};
static_assert(sizeof(Scratch) <= kStaticSharedBytes);

// Aligned as swizzled weights need it.
extern __shared__ __align__(512) unsigned char dynamic_shared[];

// What a block works on.
struct Place {
  int rank;  // in its pair
  int split, tile, column_tile, group, group_tile, image, image_tile, first_chunk, last_chunk, row, col;
  bool shares_weights;  // with the other block of its pair

  __device__ __forceinline__ Place(const LayerCall& p, int block) {
    const int tiles = p.out.tiles_down * p.out.tiles_across, images_tiles = p.images * tiles;
    rank = p.pairing == kAlone ? 0 : block & 1;
    int rest = p.pairing == kAlone ? block : block >> 1;
    const int all_tiles =
        (p.pairing == kPixels ? (images_tiles + 1) / 2 : images_tiles) * p.groups * p.column_tiles;
    split = rest / all_tiles;
    rest %= all_tiles;
    column_tile = rest % p.column_tiles;
    rest /= p.column_tiles;
    group = rest % p.groups;
    rest /= p.groups;
    if (p.pairing == kPixels) rest = 2 * rest + rank;
    shares_weights = p.pairing == kPixels && (rest | 1) < images_tiles;
    image_tile = rest % tiles;
    image = rest / tiles;  // none, if an odd number of tiles leaves the last one alone
    group_tile = group * p.column_tiles + column_tile;
    tile = rest * p.groups * p.column_tiles + group_tile;
    if (p.pairing == kSplits) split = 2 * split + rank;
    // The first splits have the odd chunks: longest blocks first. One without any still fills its pipeline.
    const int chunks = p.chunks / p.splits, odd = p.chunks % p.splits;
    first_chunk = min(split * chunks + min(split, odd), p.chunks - 1);
    last_chunk = first_chunk + chunks + (split < odd);
    row = image_tile / p.out.tiles_across * p.tile_rows;
    col = image_tile % p.out.tiles_across * p.tile_cols;
  }
};

template <class M, int kShape>
struct TileBase {
  using T = typename M::T;
  static constexpr TileShape kTile = kTiles[kShape];
  static constexpr int kWeightBytes = weight_stage_bytes();
  static constexpr int kStride = kTile.stride;
  static constexpr int kPixelBytes = cell_bytes(kTile);
  static constexpr int kCells = kStride * kTile.max_cells;
  static constexpr int kCellRounds = (kCells + 31) / 32;
  static constexpr int kLaneChannels = 16 / sizeof(T);

  const LayerCall& p;
  Scratch& scratch;
  const Place place;
  const uint32_t weights = shared_address(dynamic_shared), halo = weights + kStages * kWeightBytes;
  const int warp = threadIdx.x / 32;

  __device__ __forceinline__ TileBase(const LayerCall& call, Scratch& s, int block)
      : p(call), scratch(s), place(p, block) {}

  // a / b, exact for a * b < 2^16; the inner division is done once for all a.
  static __device__ __forceinline__ int quotient(int a, int b) { return (a * (65536 / b + 1)) >> 16; }
  __device__ __forceinline__ int row_of(int m) const { return quotient(m, p.tile_cols); }
  __device__ __forceinline__ int chunks() const { return place.last_chunk - place.first_chunk; }

  // Fetches weights into L2 while the producers of the inputs still run: those that the first pipeline stages
  // do not load, and the gate's. One block does it for all that share them.
  __device__ __forceinline__ void prefetch_weights() const {
#if __CUDA_ARCH__ >= 900
    if (place.image_tile == 0 && place.image == 0) {
      const char* from = weight_source();
      const int bytes = 3 * chunks() * kWeightBytes;
      for (int i = (kStages - 1) * kWeightBytes + threadIdx.x * 128; i < bytes; i += kThreads * 128)
        prefetch_l2(from + i);
      const char* gate = static_cast<const char*>(p.gate_weight) + place.first_chunk * kChunkBytes;
      const int64_t row = static_cast<int64_t>(place.group_tile) * kColumns + threadIdx.x % kColumns;
      for (int i = threadIdx.x / kColumns * 128; i < chunks() * kChunkBytes; i += kThreads / kColumns * 128)
        prefetch_l2(gate + row * p.chunks * kChunkBytes + i);
    }
#endif
  }

  __device__ __forceinline__ const char* weight_source() const {
    return static_cast<const char*>(p.weight) +
           (static_cast<int64_t>(place.group_tile) * p.chunks + place.first_chunk) * (3 * kWeightBytes);
  }

  // Finds the pixel of the image for each of the lane's cells, 32 apart: in units of 16 bytes, or -1. Zeros
  // the cells outside the image, once: no copy writes there. `part`: the lane's 16 bytes of every cell.
  __device__ __forceinline__ void find_pixels(int (&pixel)[kCellRounds], int first_cell, int part,
                                              int halo_bytes) const {
    const int pixel_parts = p.inputs[0].pitch / kLaneChannels;  // the same for both inputs
#pragma unroll
    for (int j = 0; j < kCellRounds; j++) {
      const int cell = first_cell + 32 * j;
      const bool odd = kStride == 2 && cell >= kTile.max_cells;
      const int of_plane = odd ? cell - kTile.max_cells : cell;
      const int r = quotient(of_plane, p.cell_pitch), q = of_plane - r * p.cell_pitch;
      const int column = kStride == 1 ? q : 2 * q + odd;
      const int ih = place.row * kStride + r - 1, iw = place.col * kStride + column - 1;
      const bool inside = cell < p.cells && column < kStride * (p.tile_cols - 1) + 3 &&
                          r < kStride * (p.tile_rows - 1) + 3 && ih >= 0 && ih < p.h && iw >= 0 && iw < p.w;
      pixel[j] = inside ? (ih * p.w + iw) * pixel_parts : -1;
      if (!inside && cell < p.cells) {
        unsigned char* to = dynamic_shared + kStages * kWeightBytes + cell * kPixelBytes + part * 16;
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(to + halo_bytes) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Copies the lane's part of its cells. `x`: its part of the chunk in the image's first pixel.
  template <int... kRound>
  static __device__ __forceinline__ void copy_pixels(uint32_t to, uint64_t x, const int (&pixel)[kCellRounds],
                                                     std::integer_sequence<int, kRound...>) {
    (copy_async_unless_negative<kRound * 32 * kPixelBytes>(to, x, pixel[kRound]), ...);
  }

  // Clears the channels of another group in a halo that all threads have loaded: of the chunk before
  // `next_entry` of the chunk table, `base` bytes from the first halo. Rare (a fusion whose groups meet
  // within a chunk), so not a part of the copies.
  __device__ __forceinline__ void clear_other_groups(const int32_t* next_entry, int base) const {
    constexpr uint32_t kAll = sizeof(T) == 4 ? 0xffffu : ~0u;
    const uint32_t mask = __ldg(p.chunk_masks + (next_entry - p.chunk_table) - 1);
    if (mask == kAll) return;
    // A word a lane, of two cells whose words lie in different banks; a lane has the same channels of all its
    // cells.
    const int lane = lane_id(), half = lane >> 4;
    const int first = kTile.warpgroup ? 2 * warp + half : warp + 4 * half;
    const int part = (lane >> 2 & 3) ^ (kTile.warpgroup ? first >> 1 & 3 : 0);
    const uint32_t bits = mask >> (part * kLaneChannels + (lane & 3) * 4 / sizeof(T));
    uint32_t kept = bits & 1 ? ~0u : 0;
    if constexpr (sizeof(T) == 2) kept = (bits & 1 ? 0xffffu : 0) | (bits & 2 ? 0xffff0000u : 0);
    uint32_t* word =
        reinterpret_cast<uint32_t*>(dynamic_shared + kStages * kWeightBytes + base + first * kPixelBytes) +
        (lane & 15);
#pragma unroll 1
    for (int cell = first; cell < p.cells; cell += 8, word += 8 * kPixelBytes / 4) *word &= kept;
    __syncthreads();
  }

  // The lane's entry of the chunk table in the gate's first pass.
  __device__ __forceinline__ int gate_entry(const int32_t* first_entry) const {
    return place.first_chunk + chunk_of_lane<T>() < place.last_chunk ? __ldg(first_entry + chunk_of_lane<T>())
                                                                     : 0;
  }

  // Computes the gate's logits, finds out whether this block will finish its tile, and sends for the columns'
  // vectors.
  __device__ __forceinline__ void gate(int entry) {
    const int pair = p.pairing == kSplits, parts = p.splits >> pair;
    unsigned began = 0;  // of the tile's splits, before this one
    if (parts > 1 && threadIdx.x == 0)
      began = atomicAdd(p.arrivals + (place.tile << pair) + (place.rank & pair), 1u);
    gate_logits<T>(p, place.image, place.group, place.group_tile, place.first_chunk, place.last_chunk, entry,
                   scratch.sums, scratch.logits);
    pin(began);  // or the compiler would wait for the atomic where it is issued
    if (threadIdx.x == 0) scratch.finishes = began % kLeft + 1 == static_cast<unsigned>(parts);
    __syncthreads();  // the sums in the scratch memory have been read
    if (threadIdx.x < kVectors * kColumns / 4)
      copy_async(shared_address(scratch.vectors) + 16 * threadIdx.x,
                 column_vectors(p.out, place.group_tile) + 4 * threadIdx.x);
  }

  // The pixel of the result's image that row m of the tile computes, or -1 if none.
  __device__ __forceinline__ int pixel_of_row(int m) const {
    const int r = row_of(m), oh = place.row + r, ow = place.col + m - r * p.tile_cols;
    return r < p.tile_rows && oh < p.out.out_h && ow < p.out.out_w ? oh * p.out.out_w + ow : -1;
  }
  __device__ __forceinline__ int64_t image_pixels() const {
    return place.image * (static_cast<int64_t>(p.out.out_h) * p.out.out_w);
  }
  __device__ __forceinline__ int64_t sums_tile() const {
    return static_cast<int64_t>(place.image) * p.out.tiles_down * p.out.tiles_across + place.image_tile;
  }
};

}  // namespace parnet::cuda
