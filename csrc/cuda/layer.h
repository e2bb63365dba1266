// What the kernels are told: plain data, written by parnet_kernels/cuda/program.py (ctypes mirrors of these
// structs), passed by value. Maps are NHWC with padded channels; a padded channel holds zero.
#pragma once
#include <cstdint>

namespace parnet::cuda {

constexpr int kMaxLayers = 4;        // in one launch
constexpr int kSourceShift = 30;     // a chunk: first channel | source << kSourceShift
constexpr int kVectors = 6;          // bias, gate bias, skip scale, skip shift, output scale, output shift
constexpr uint32_t kLeft = 1 << 16;  // unit of the second count in LayerCall::arrivals

enum LayerFlags : int32_t { kSkip = 1, kReLU = 2, kVectorStore = 4, kRound = 8 };

// What two adjacent blocks, a cluster, do together. kPixels: they have neighbouring pixels of the same output
// channels and split, and each loads half of the weights for both. kSplits: they have the same tile and two
// of its splits, and each adds up half of the rows.
enum Pairing : int32_t { kAlone, kPixels, kSplits };

// Where a layer's result goes: channel i of group g to g * group_step + i * channel_step.
struct Output {
  void* y;               // [N][out_h][out_w][pitch]
  float* sums;           // [N][tiles of an image][pitch] of the stored values, or null
  const float* vectors;  // [group][column tile][kVectors][64]
  int32_t pitch, width;  // width: channels stored for a group
  int32_t group_step, channel_step;
  int32_t out_h, out_w;
  int32_t tiles_down, tiles_across;
  int32_t flags;
  float inverse_area;  // of the inputs: what their sums are multiplied with
};

struct Input {
  const void* x;      // [N][h][w][pitch]
  const float* sums;  // [N][sum_tiles][pitch]
  int32_t pitch, sum_tiles;
};

struct LayerCall {
  Input inputs[2];
  Output out;
  // [group][column tile][chunk][9 taps][64 columns][64 bytes], swizzled; with stride 2 the taps of a kernel
  // row in the order 0, 2, 1
  const void* weight;
  const void* gate_weight;     // [group][column tile][64 columns][chunks * 64 bytes]
  const int32_t* chunk_table;  // [group][chunks], and one entry that is read but not used
  // [group][chunks]: bit i: channel i of the chunk is the group's, or padding. Others have zero weights,
  // which do not take an infinity's part away. Null if all are.
  const uint32_t* chunk_masks;
  // Sums of a split layer; with kSplits, of half a tile each and of two splits:
  float* partial;         // [tile][split][rows * 64 / 512 float4 of each thread]
  float* partial_logits;  // [tile][split][64]
  uint32_t* arrivals;     // [tile], zero between launches: splits that began, + kLeft * that left sums
  int32_t first_block, blocks, tile, pairing;  // before the next layer's first block there may be a gap
  int32_t h, w, stride;
  int32_t groups, column_tiles, chunks, splits;
  int32_t tile_rows, tile_cols;  // output pixels of a tile
  int32_t cells, cell_pitch;     // of the halo: all, and from one row to the next
  int32_t images;
};

// A level: independent layers, those with the longest blocks first.
struct LevelCall {
  int32_t layers, reserved;
  LayerCall layer[kMaxLayers];
};

// A user's map, strides in elements.
struct Strided {
  const void* data;
  int64_t stride[4];
  int32_t n, c, h, w;
};

// First layer on the user's image, with the image's channel means in the same (cooperative) launch.
struct StemCall {
  Strided image;
  Output out;
  const void*
      weight;  // [column tile][chunk][64 columns][64 bytes], swizzled; products in the order (tap, channel)
  const float* gate_weight;  // [column tile][channel][64]
  float* image_sums;         // [N][blocks][C]
  uint32_t* barrier;         // two counters, zero between launches
  int32_t stride, column_tiles, chunks, reserved;
};

// A user's map to NHWC with padded channels, with sums of tiles of kEnterPixels pixels.
constexpr int kEnterPixels = 64;
struct EnterCall {
  Strided input;
  void* out;    // [N][h][w][pitch], or null: sums only
  float* sums;  // [N][tiles][pitch]
  int32_t pitch, tiles;
  int32_t round, reserved;  // round: to tf32
};

// y[n][j] = bias[j] + weight[j] . mean[n]; without weight, mean[n][j].
struct ClassifierCall {
  const float* sums;   // [n][sum_tiles][pitch]
  const void* weight;  // [classes][features] or null
  const void* bias;
  void* y;  // [n][classes]
  int32_t n, sum_tiles, pitch, features, classes;
  float inverse_area;
};

}  // namespace parnet::cuda
