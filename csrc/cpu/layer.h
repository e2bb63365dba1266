// The contract between the schedule (baseline code: packing, planning, running) and the kernels, which are
// compiled once for each instruction set: plain data only, so that no inline function of one instruction set
// can end up in the code of another. docs/glossary.md has the words.
#pragma once
#include <stdint.h>

#include "policy.h"

namespace parnet::cpu {

// kPlain: the bare convolution, for training.
enum class Kind : int32_t { kRepVGG, kDownsample, kFusion, kClassifier, kPlain };
enum class Activation : int32_t { kSiLU, kReLU };
enum class Dtype : int32_t { kFloat, kFloat16, kBFloat16 };

// Storage::kRows: the place of row `row` of a panel's slots among all such rows. The rows that only F(6, 3)
// needs lie behind those of all panels, so that F(4, 3) reads memory without gaps.
constexpr int64_t place_of_row(int panels, int panel, int row) {
  return row < kFewSlots ? int64_t{panel} * kFewSlots + row
                         : int64_t{panels} * kFewSlots + panel * (kMaxSlots - kFewSlots) + row - kFewSlots;
}
// Up to this many input channels the first layer of a network runs as a direct convolution on planar rows.
constexpr int kStemChannels = 4;

// Start of a packed layer. Offsets are bytes from the start of the header; 0 means absent. A panel is 2*lanes
// output channels of one group. Layers of two groups alternate them: panel 2*i+g is the i-th panel of group
// g.
struct PackedHeader {
  uint64_t magic;
  int32_t version, lanes;
  Kind kind;
  Activation activation;
  Storage storage;
  int32_t stride, groups;
  int32_t in_channels;   // of one input
  int32_t out_channels;  // of the result
  int32_t in_blocks;     // blocks of `lanes` channels in one input
  int32_t out_blocks;
  int32_t group_blocks;  // input blocks that one group multiplies, both inputs together
  int32_t panels;        // all groups
  int64_t total_bytes;
  // kTransformed: [panel][row slot][column slot][group channel][2*lanes]; kRows: [place_of_row][group
  // channel][3][2*lanes]; kTaps: [panel][group channel][9][2*lanes]; a classifier: [panel][channel][2*lanes].
  int64_t weight;
  int64_t stem_weight;  // [panel][channel*9][2*lanes], at most kStemChannels channels
  int64_t gate_weight;  // [panel][group channel][2*lanes]
  int64_t gate_bias, bias, skip_scale, skip_shift;  // [panel][2*lanes]
  int64_t out_scale, out_shift;                     // [out block][lanes], in the order of the result
  int64_t block_list;                               // BlockRef[groups*group_blocks]
};

// One block of input channels as a group of a layer reads it.
struct BlockRef {
  int32_t input, block;
};

// A map in blocks of channels, [image][block][row][pixel][lane]; `base` is pixel (0, 0), surrounded by a
// border of zeros. Strides in floats. A view of a user's channels_last tensor has no border and is only
// written.
struct View {
  float* base;
  int64_t image, block, row, pixel;
};

// A tile of outputs. `row_kind` and `col_kind` are its schemes (schemes.h); `rows` and `cols` say how much of
// it lies in the map; `sum_row` is where its channel sums go.
struct Tile {
  int32_t image, row, col, sum_row;
  uint8_t row_kind, col_kind, rows, cols;
};

// All rows of v that one weight matrix multiplies, in `strips` strips of equal size, or one row more in the
// first ones. `slot` is the matrix: row slot * number of slots + column slot. `first_row` is the first of its
// rows of m.
struct MatrixUse {
  int32_t slot, rows, first_row, strips;
  int32_t first_value;  // floats from the start of the set's transformed inputs
};

// Floats of a strip of transformed inputs, [block of channels][row][lane]; a cache line more than its values,
// so that strips are no power of two apart.
constexpr int64_t strip_floats(int rows, int blocks, int lanes) {
  return int64_t{rows} * blocks * lanes + 16;
}

// Where the transformed inputs and the products of a set of tiles lie. Sets with the same sequence of schemes
// share a table.
struct TileTable {
  const int32_t* v_offset;  // [tile][kMaxTransforms], floats from the start of the set's transformed inputs
  const int32_t* v_step;    // [tile][kMaxTransforms], floats from one block of channels to the next
  const int32_t* m_offset;  // [tile][kMaxTransforms], floats from the start of a panel of products
  const MatrixUse* uses;
  int32_t num_uses;
  int32_t m_rows;     // rows of a panel of products, of all matrices
  int32_t slot_rows;  // rows of slots in use
  int64_t v_floats;   // of the set's transformed inputs
};

// Tiles that are transformed and multiplied together.
struct TileSet {
  const Tile* tiles;
  const TileTable* table;
  int32_t count;
};

struct ConvArgs {
  const PackedHeader* packed;
  View in[2];
  View out;
  float* sums;   // [sum row][out block][lane]
  float* scale;  // [image][panel][2*lanes]: multiplies the skip input, or the convolution if there is no skip
  float* offset;  // [image][panel][2*lanes]
  int32_t out_rows, out_cols;
  int32_t sum_channels;  // channels summed in registers before that sum is added to m
  int32_t chunk_blocks;  // weights made at each call: input blocks whose taps are used at a time
};

struct GateArgs {
  const PackedHeader* packed;
  const float* sums[2];  // channel sums of each input: [image][sum row][block][lane]
  int32_t sum_rows[2];   // per image
  float inverse_area;
  float* scale;
  float* offset;
  float* means;  // scratch, groups*group_blocks*lanes floats
};

struct StemArgs {
  const PackedHeader* packed;
  const float* planes;  // [image][channel][rows][pitch], one zero row above, one zero column left, zeros
                        // right and below
  int64_t image, channel, pitch;
  View out;
  float* sums;  // [image][out row][out block][lane]
  const float* scale;
  const float* offset;
  int32_t out_rows, out_cols;
};

// A user's tensor; strides in elements.
struct Strided {
  void* data;
  Dtype dtype;
  int64_t size[4], stride[4];
};

struct TrainingKernels;  // training.h

struct Kernels {
  const char* name;
  int32_t lanes, max_rows;
  int32_t min_pixels_6;  // see policy.h
  // Weights of one panel: taps, [channel][9][2*lanes], transformed along rows for one row of slots, to
  // [channel][3][2*lanes].
  void (*expand_rows)(const float* taps, int channels, float* rows, int stride, int row);
  // That row transformed along columns, for its first `slots` slots: to [slot][channel][2*lanes], with
  // `slot_stride` floats between slots.
  void (*expand_columns)(const float* rows, int channels, float* u, int64_t slot_stride, int stride,
                         int slots);
  // Input transform of blocks [first, last) of the layer's block list.
  void (*transform)(const ConvArgs&, const TileSet&, int first, int last, float* v);
  // Products, output transform and epilogue for panels [first, last) of one set of tiles.
  void (*convolve)(const ConvArgs&, const TileSet&, const float* v, int first, int last, float* m, float* u);
  void (*gate)(const GateArgs&, int image, int first, int last);
  void (*stem)(const StemArgs&, int image, int first_row, int last_row);
  // A user's tensor to blocks of channels (or to planes with borders of zeros), rows [first, last); channel
  // sums of those rows to `sums`.
  void (*enter)(const Strided&, const View&, int image, int first, int last, float* sums, float* lines);
  void (*enter_planes)(const Strided&, const StemArgs&, int image, int first, int last, float* sums);
  void (*leave)(const View&, const Strided&, int image, int first, int last);
  void (*leave_means)(const float* sums, int sum_rows, int blocks, float inverse_area, const Strided&,
                      int image);
  // One panel of logits of all images; means: [image][in block][lane].
  void (*classify)(const PackedHeader&, const float* means, int panel, const Strided&);
  const TrainingKernels* training;
};

}  // namespace parnet::cpu
