// Every choice between ways to compute the same layer: the one place to tune the CPU kernels. Constants and
// small functions of plain numbers; what a scheme can do at all is in schemes.h.
//
// Times are of two cores, batch 1, unless said otherwise.
//
// Rejected:
// * direct convolution: other engines reach 80 to 100 % of what the multipliers can do, so only fewer
//   multiplications (Winograd) and fewer passes (fusion) gain anything.
// * maps in NHWC between the layers: 1 to 5 % slower than blocks of channels, 10 % at worst.
// * strips of 4 rows on AVX2: they wait for their own sums; 5 and 6 do not.
// * strides between matrices that are powers of two: 16 to 22 ms for a layer of 800 channels that takes 6 if
//   they are a cache line more.
// * a storage of the 36 matrices of F(4, 3) alone: 68 % of the bytes of 64 (ParNet-S), but 1.6 times those of
//   kRows, which took as long (42.6 and 41.8 ms on AVX2, 73.8 and 77.2 on busier AVX-512 cores). Batches of 8
//   took 5 to 8 % longer than with 64. F(4, 3) reads no more where the matrices of F(6, 3) are stored too.
#pragma once
#include <stdint.h>

#include "schemes.h"

namespace parnet::cpu {

// How much of the transform of a layer's weights is done when they are packed. Named by what memory holds.
enum class Storage : int32_t {
  kTransformed,  // weights transformed along rows and columns: 64 or 36 values for the 9 taps
  kRows,         // taps transformed along rows only: 24 or 18
  kTaps          // the taps as they are: 9
};
constexpr int kStorages = 3;
// Whether the rest of the transform is done at each call, inside the products.
constexpr bool transforms_at_call(Storage s) { return s != Storage::kTransformed; }

// ---- Which tile.

// F(6, 3) pays from so many output pixels on (of all images together): with fewer, its 64 matrices would have
// few rows each, and take longer to read than 36. Intel's L2 and memory answer later.
constexpr int kMinPixels6 = 500, kMinPixels6Intel = 1200;
// At stride 2, larger tiles would leave 1 to 4 rows a matrix up to this many output pixels.
constexpr int64_t kFewStridedPixels = 128;

// Outputs along one side of a layer's largest tiles. `min_pixels_6` is Kernels::min_pixels_6.
constexpr int largest_tile(int stride, Storage storage, int in_channels, int out_channels, int64_t pixels,
                           int64_t min_pixels_6) {
  if (stride == 2) return pixels <= kFewStridedPixels ? 2 : 4;
  const bool possible = in_channels <= kMaxChannels6 && out_channels >= kMinOutputs6;
  // F(6, 3) reads 7/9 more weights than F(4, 3), but only a third more where they are made at each call.
  const int64_t pays = transforms_at_call(storage) ? min_pixels_6 * 3 / 5 : min_pixels_6;
  return possible && pixels >= pays ? 6 : 4;
}

// ---- Which storage.

// A filter is the nine taps for an input and an output channel. From so many on, memory is spared.
constexpr int64_t kManyFilters = 1'400'000;
// From so many on a layer is bound by reading its weights: at 14 x 14 pixels half the bytes took 10 to 20 %
// less time on one thread and 30 % less on two. Only with AVX-512 (16 lanes): with AVX2, making weights
// costs more than it saves.
constexpr int64_t kReadBoundFilters = 70'000;

// `pixels`: of one image's result. A layer with many uses its weights for many tiles: to make them for each
// set of tiles again took 6 to 8 % longer at 320 and 400 channels.
constexpr Storage choose_storage(int64_t pixels, int64_t out_channels, int64_t in_channels, int lanes,
                                 int64_t min_pixels_6) {
  const int64_t filters = out_channels * in_channels;
  if (filters > kManyFilters) return Storage::kTaps;
  const bool many_pixels = pixels >= min_pixels_6 && in_channels <= kMaxChannels6;
  return !many_pixels && lanes == 16 && filters > kReadBoundFilters ? Storage::kRows : Storage::kTransformed;
}

// ---- How tiles are multiplied.

// Tiles of a set: enough to use a weight matrix for many rows, while the products of a panel (tiles * 36 or
// 64 * 128 bytes) stay in L2.
constexpr int kTilesOfSet = 50;
// With this many tiles or more for each thread, threads share the tiles of a layer rather than its panels:
// they read weights twice, but no transformed inputs out of another processor's cache. Tiles of stride 2 have
// twice as many transformed inputs.
constexpr int kFewTiles = 20, kFewStridedTiles = 8;
// Rows of a strip that hide the latency of its sums with AVX-512, the only one that divides strips for
// another reason.
constexpr int kMinStripRows = 4;
// Bytes of the taps that are multiplied before the next ones are read: they stay in L1 with as many more.
constexpr int64_t kTapBytes = 24 << 10;
// Channels summed in registers; such sums are then added up. Fewer lose less to rounding: F(6, 3) has 0.6 of
// the error at 128 channels, 0.4 at 400, for 1 to 2 % of the time.
constexpr int kSumChannels6 = 32, kSumChannels4 = 64;
// Panels multiplied before their products are transformed back: two read the transformed inputs out of L1
// twice; one panel of 16 lanes is as wide as two of 8.
constexpr int panels_at_once(int lanes) { return lanes == 16 ? 1 : 2; }

// ---- How work is shared.

// Rows of a map are converted in at most so many items, whatever the thread count: their channel sums are
// added in the order of the items.
constexpr int64_t kRowItems = 16;
// Above so many bytes, transformed inputs are not shared between threads: each makes its own.
constexpr int64_t kSharedBytes = int64_t{32} << 20;
// Regions of shared transformed inputs, used in turn: a layer's inputs are transformed while the two layers
// before it may still be multiplied.
constexpr int kRegions = 3;
// Images that have buffers where a batch goes image by image: one is finished while the next one begins.
constexpr int64_t kImagesAtOnce = 2;
// At most so many quarters of a level's products go to whole layers as single items; the rest fills the gaps.
constexpr int64_t kUndividedQuarters = 3;
// Items for each thread: fewer, and layers are divided into smaller ones (panels by panels, not two by two).
constexpr int64_t kFewItems = 32;
// Items into which a shared transform is divided, for each thread.
constexpr int kTransformItems = 8;

// How often a thread looks for others before it sleeps. Long where each thread can have a processor (0.2 to 1
// ms): another program's thread, even of the lowest priority, would keep it for milliseconds. Short where
// threads share processors, and for the rest of a run in which patience ran out once: looking costs the time
// slices that work needs. Rejected: sched_yield instead of sleep. The scheduler then does not move the thread
// that has the work to a processor that only waits (ParNet-S, 2 threads on 2 crowded cores: 265 ms instead of
// 225, 59 ms of CPU time instead of 50).
constexpr int kPatience = 20000, kPatienceCrowded = 200;

// ---- Training.

// Weights change at every step: transforming them all pays where many blocks of tiles use them. `pixels`: of
// all images.
constexpr Storage training_storage(int64_t pixels, int64_t out_channels, int64_t in_channels) {
  const bool many = pixels * 3 >= out_channels * in_channels && in_channels <= kMaxChannels6;
  return many ? Storage::kTransformed : Storage::kTaps;
}
// Pixels of one image whose sums are taken together: their channels stay in L2. The bits of a result depend
// on it.
constexpr int64_t kPassPixels = 256;
// Gradients of transformed weights that a thread accumulates together should stay in L2; items for each
// thread.
constexpr int64_t kGradientBytes = int64_t{1} << 20, kGradientItems = 2;
// Pixels that the gradient of a 1x1 convolution multiplies at a time: those of one panel fit L1.
constexpr int kPointPixels = 128;
// Of the gradient of a 1x1 convolution, parts that are summed apart. The bits of a result depend on it.
constexpr int64_t kGradientSlices = 8;
// Transformed inputs that are kept for them: twice as many bytes as the gradients, which are read and written
// once for each such part, but within what should stay in L2 and in L3.
constexpr int64_t kFewInputBytes = int64_t{1} << 20, kInputBytes = int64_t{16} << 20;

// ---- What is kept.

// Plans keep their workspaces: of the most recently used, at most so many and so many bytes (the last one
// always).
constexpr int64_t kCachedPlans = 32;
constexpr int64_t kCachedBytes = int64_t{1} << 30;
// Floats between the scratch memories of two threads: they start neither on the same cache set nor page.
constexpr int64_t kScratchGap = 1040;

}  // namespace parnet::cpu
