// The contract of the training kernels: what layer.h is for the others. Maps are the user's, channels_last.
#pragma once
#include "layer.h"

namespace parnet::cpu {

// Pixels of all images, row by row, one behind the other; the channels of a pixel are adjacent.
struct PixelMap {
  void* data;
  Dtype dtype;
  int32_t images, rows, cols, channels;
  int64_t pixel;  // elements from one pixel to the next
};

// A bare 3x3 convolution of kind kPlain, on blocks of tiles.
struct PlainArgs {
  const PackedHeader* packed;
  PixelMap in, out;
  bool add;                            // to what `out` holds
  float* sums;                         // of each tile and output channel, [tile][out block][lane]; or null
  float* squares;                      // of each tile: squared distances from its mean
  int32_t sum_channels, chunk_blocks;  // as in ConvArgs
};

// The gradient of its weights: products of transformed inputs and transformed gradients.
struct GradientArgs {
  const PackedHeader* packed;  // only its geometry is used
  PixelMap in, gradient;
};

// A 1x1 convolution of maps of one dtype: `weight` is [panel][input channel][2*lanes]; of its gradient only
// the maps count, `out` being the gradient of the result.
struct PointArgs {
  PixelMap in, out;
  const float* weight;
  bool add;  // to what `out` holds
};

// An elementwise pass over up to three maps: t = shift + sum of scale*map, y = phi(t).
constexpr int kMaxMaps = 3;
struct PassArgs {
  Activation activation;
  int32_t maps, outputs;
  PixelMap map[kMaxMaps], g;
  PixelMap out[kMaxMaps];                  // y; or the gradients of the maps
  const float *scale[kMaxMaps], *shift;    // [image][channel]
  const float* mean[kMaxMaps];             // [channel], of sums
  const float *q[kMaxMaps], *r[kMaxMaps];  // d_map = scale*d_t + q*map + r; q is [channel]
};

// Two maps as one: channel 2c + j of `joined` belongs to channel c of map[j]. Coefficients are [channel].
struct JoinArgs {
  PixelMap joined, map[2], out[2];
  const float *mean[2], *p[2], *q[2], *r[2];
};

struct TrainingKernels {
  // Input transform of blocks [first, last) of channels.
  void (*transform)(const PlainArgs&, const TileSet&, int first, int last, float* v);
  // Products and output transform of all panels.
  void (*convolve)(const PlainArgs&, const TileSet&, const float* v, float* m, float* u);
  // The gradient of the input at stride 2: `in` is that of the result, `out`, which is added to, of the
  // input.
  void (*transform_strided_gradient)(const PlainArgs&, const TileSet&, int first, int last, float* v);
  // Panels [first, last).
  void (*add_strided_gradient)(const PlainArgs&, const TileSet&, const float* v, int first, int last,
                               float* m, float* u);
  void (*transform_input)(const GradientArgs&, const TileSet&, int first, int last, float* v);
  // The transpose of the output transform, of the gradients of panel `panel` to m.
  void (*spread_tiles)(const GradientArgs&, const TileSet&, int panel, float* m);
  // Adds to (or, if `fresh`, overwrites) the products of one weight matrix and panel, of blocks [first, last)
  // of input channels: du [channel][2*lanes].
  void (*multiply_transposed)(const GradientArgs&, const MatrixUse&, int first, int last, const float* v,
                              const float* m, float* du, bool fresh);
  // Products of blocks [first, last) of input channels and one panel, [slot][channel][2*lanes], to the
  // gradient [K, C, 3, 3]; `used` tells which slots were written.
  void (*fold_gradient)(const GradientArgs&, const float* du, const uint8_t* used, int panel, int first,
                        int last, float* to);
  // On `count` pixels of one image from `first` on. `scratch`: as many values as they have, of a 16-bit `in`.
  void (*pointwise)(const PointArgs&, int image, int64_t first, int count, float* scratch);
  // Adds to (or, if `fresh`, overwrites) [panel][input channel][2*lanes]. `scratch`: kPointPixels pixels of
  // `in` in whole blocks, and of one panel.
  void (*point_gradient)(const PointArgs&, int image, int64_t first, int count, float* to, bool fresh,
                         float* scratch);
  // Averages of 2x2 pixels of `in`, zeros beyond it.
  void (*pool)(const PointArgs&, int image, int64_t first, int count);
  void (*moments)(const PixelMap&, int image, int64_t first, int count, float* sums, float* squares);
  void (*combine)(const PassArgs&, int image, int64_t first, int count);
  void (*reduce)(const PassArgs&, int image, int64_t first, int count, float* sums);  // [1 + maps][channel]
  void (*spread)(const PassArgs&, int image, int64_t first, int count);
  // joined = q*map + r
  void (*join)(const JoinArgs&, int image, int64_t first, int count);
  // For each map: of its part of `joined`, and of that times (map - mean): [2*map + which][channel].
  void (*join_sums)(const JoinArgs&, int image, int64_t first, int count, float* sums);
  // out = p*(its part of joined) + q*map + r
  void (*separate)(const JoinArgs&, int image, int64_t first, int count);
};

}  // namespace parnet::cpu
