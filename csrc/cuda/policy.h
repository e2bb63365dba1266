// The tile shapes of the convolution kernels: the one place to tune them. Constants only; read by device
// code, by the host and, through `_cuda_policy`, by the planner (parnet_kernels/cuda/plan.py), which picks
// one of them for a layer.
//
// Common to all tiles: 4 warps, 64 output channels; a pipeline stage is one kernel row (3 taps) of one chunk
// of channels. Warps are 2 halves of the columns times 2 halves of each chunk (K groups), or one warpgroup,
// each with a quarter of the rows. Numbers: fp16, counted in the simulator or read off the cubins; modelled
// times: bench/cuda_levels.py.
//
// Rejected:
// * im2col tiles (A loaded once a tap) 64x64 and 128x64: 104 and 75 MB requested a ParNet-M level instead of
//   the halo tile's 41 to 45; matrix instructions 22-23 % of the main loop.
// * 128 rows: 128 divides neither 3136 nor 784; 112 divides both.
// * a run-time stride in the 64-row tile: a body less to compile, but address arithmetic takes matrix
//   instructions from 46 % of the main loop to 43.
// * 224 rows without K groups: half the weights, but partial sums of twice as many splits take it back.
// * 64-byte pitch with XOR swizzle for the halo: 20 % less shared memory, but every shifted tap needs its own
//   XOR (matrix instructions 38 % of the main loop instead of half).
// * warpgroup tiles of 128 rows and 128 channels: 0 to 3 % less modelled time than without wgmma, where 256
//   rows and 64 channels gain 4 to 16: weights are what is read most.
// * warpgroup tiles of 128 or 192 rows beside those of 256: 0 to 2 % less modelled time.
// * clusters of four (both kinds of pairs at once, or four splits): 1 to 4 % less modelled time than of two.
// * 32 output channels: a quarter of the columns of ParNet-S's 96-channel stream saved, but each halo is read
//   twice as often.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PARNET_BOTH __host__ __device__
#else
#define PARNET_BOTH
#endif

namespace parnet::cuda {

constexpr int kThreads = 128;
constexpr int kColumns = 64;     // output channels of a tile
constexpr int kChunkBytes = 64;  // of channels of one pixel: 32 of 16 bits, 16 of 32 bits
constexpr int kCellBytes = 80;   // a pixel in shared memory: 5 x 16, so 8 in a row hit all banks
constexpr int kBlocksPerSm = 2;  // what registers and shared memory must allow
constexpr int kMaxBatch = 8;     // beyond it throughput counts, not latency
constexpr int kMaxSplits = 8;    // of a tile's input channels

struct TileShape {
  int rows;       // output pixels
  int max_cells;  // input pixels with their halo; with stride 2, of the even columns: the odd lie behind them
  int stride;
  bool warpgroup;  // multiplied by wgmma: architecture 90 and 16-bit types only
};

// Indices of kTiles, and `LayerCall::tile`.
enum TileIndex : int32_t { kLargeTile, kSmallTile, kStridedTile, kWarpgroupTile, kStridedWarpgroupTile };
constexpr TileShape kTiles[] = {
    {112, 256, 1, false},  // 8x14 or 7x16 pixels
    {64, 160, 1, false},   // small maps
    {64, 136, 2, false},   // 7x8 or 4x14 pixels, whose halo is 4.5 times the tile: just two blocks on an A100
    {256, 352, 1, true},   // 14x14 or 28x8 pixels
    {128, 296, 2, true},   // 8x16 pixels, whose halo is 4.4 times the tile: just two blocks on an H100
};
constexpr int kTileShapes = sizeof(kTiles) / sizeof(kTiles[0]);
static_assert(kTileShapes == kStridedWarpgroupTile + 1);

// Three stages where a multiprocessor has 164 KB of shared memory or more, two where it has 100 KB (86, 87,
// 89, 12x).
PARNET_BOTH constexpr int stages(int architecture) {
  return architecture / 10 == 12 || (architecture > 80 && architecture < 90) ? 2 : 3;
}

// A pixel of the halo. Warpgroup tiles, with few instructions a product, can afford to swizzle it.
PARNET_BOTH constexpr int cell_bytes(const TileShape& t) { return t.warpgroup ? kChunkBytes : kCellBytes; }

PARNET_BOTH constexpr int weight_stage_bytes() { return 3 * kColumns * kChunkBytes; }

// Static shared memory of the level and stem kernels (they assert it).
constexpr int kStaticSharedBytes = 2560;

// After the products sums take the pipeline's place: those that the two K groups exchange and then those of
// other splits; in a warpgroup tile as many fragments of 64 rows of other splits as are on their way at a
// time. Before them lie the gate's logits of other splits.
constexpr int kSplitRing = 6;
constexpr int kLogitBytes = kMaxSplits * kColumns * 4;
PARNET_BOTH constexpr int exchange_bytes(const TileShape& t) {
  return kLogitBytes + (t.warpgroup ? kSplitRing * 64 : t.rows) * kColumns * 4;
}

// The stem: a small number of input channels, all 9 taps in one reduction.
constexpr int kStemRows = 8, kStemCols = 16;
constexpr int kStemReduction = 64;  // at most so many products: 7 channels

}  // namespace parnet::cuda
