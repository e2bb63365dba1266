// The first layer, on the user's image as it lies: a handful of channels, so all 9 taps of all channels are
// one reduction of at most 64 products. Its gate needs the image's channel means before anything is stored;
// one cooperative launch computes them, waits until every block has, and goes on.
#pragma once
#include "epilogue.cuh"

namespace parnet::cuda {

constexpr int kStemPixels = kStemRows * kStemCols;
static_assert(kStemPixels == kThreads, "a thread lays out one pixel");
constexpr int kMaxStemChannels = kStemReduction / 9;

struct StemScratch {
  Columns vectors;
  union {
    float sums[kThreads / 32][kColumns];
    float means[kMaxStemChannels];
  };
};
static_assert(sizeof(StemScratch) <= kStaticSharedBytes);

constexpr int kLoadsAtOnce = 16;  // a thread has so many on their way, whose latencies would add up otherwise

extern __shared__ __align__(128) unsigned char stem_shared[];

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

// A barrier of all blocks of the grid, which are resident together. Leaves both counters zero.
struct GridBarrier {
  uint32_t* counters;
  __device__ __forceinline__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counters, 1);
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0)
      while (load_acquire(counters) < gridDim.x) {
      }
    __syncthreads();
    if (threadIdx.x != kThreads - 1) return;  // of a warp that has little to do next
    if (add_acquire_release(counters + 1, 1) + 1 != gridDim.x) return;
    counters[0] = counters[1] = 0;
  }
};

template <class M>
struct Stem {
  using T = typename M::T;
  static constexpr int kChunkChannels = kChunkBytes / sizeof(T), kLaneChannels = 16 / sizeof(T);

  const StemCall& p;
  StemScratch& scratch;
  const int warp = threadIdx.x / 32, lane = lane_id();

  __device__ __forceinline__ const T* pixel(int n, int c, int h, int w) const {
    const int64_t* s = p.image.stride;
    return static_cast<const T*>(p.image.data) + n * s[0] + c * s[1] + h * s[2] + w * s[3];
  }

  // Adds up this block's share of the pixels of every image.
  __device__ void add_image() const {
    const int64_t area = static_cast<int64_t>(p.image.h) * p.image.w;
    const int first = area * blockIdx.x / gridDim.x, last = area * (blockIdx.x + 1) / gridDim.x;
    for (int n = 0; n < p.image.n; n++) {
      constexpr int kPixels = 4;  // of each channel, at once
      float sum[kMaxStemChannels] = {};
      for (int start = first + threadIdx.x; start < last; start += kThreads * kPixels) {
        T v[kPixels][kMaxStemChannels];
#pragma unroll
        for (int k = 0; k < kPixels; k++) {
          const int i = start + k * kThreads, h = i / p.image.w;
#pragma unroll
          for (int c = 0; c < kMaxStemChannels; c++)
            v[k][c] = i < last && c < p.image.c ? *pixel(n, c, h, i - h * p.image.w) : from_float<T>(0.0f);
        }
#pragma unroll
        for (int k = 0; k < kPixels; k++)
#pragma unroll
          for (int c = 0; c < kMaxStemChannels; c++) sum[c] += to_float(v[k][c]);
      }
#pragma unroll
      for (int c = 0; c < kMaxStemChannels; c++) {
        if (c == p.image.c) break;
        const float of_warp = warp_sum(sum[c]);
        if (lane == 0) scratch.sums[warp][c] = of_warp;
      }
      __syncthreads();
      if (threadIdx.x < p.image.c) {
        float sum = 0;
        for (int w = 0; w < kThreads / 32; w++) sum += scratch.sums[w][threadIdx.x];
        __stcg(p.image_sums + (static_cast<int64_t>(n) * gridDim.x + blockIdx.x) * p.image.c + threadIdx.x,
               sum);
      }
      __syncthreads();
    }
  }

  __device__ void set_columns(int n, int column_tile) const {
    float weight[kMaxStemChannels];
    if (threadIdx.x < kColumns) {
#pragma unroll
      for (int c = 0; c < kMaxStemChannels; c++)
        weight[c] = c < p.image.c
                        ? __ldg(p.gate_weight + (column_tile * p.image.c + c) * kColumns + threadIdx.x)
                        : 0.0f;
    }
    const float* vectors = column_vectors(p.out, column_tile);
    for (int i = threadIdx.x; i < kVectors * kColumns / 4; i += kThreads)
      copy_async(shared_address(scratch.vectors) + 16 * i, vectors + 4 * i);
    commit_copies();
    for (int c = warp; c < kMaxStemChannels; c += kThreads / 32) {
      float sum = 0;
      for (int start = lane; c < p.image.c && start < gridDim.x; start += 32 * kLoadsAtOnce) {
        float v[kLoadsAtOnce];
#pragma unroll
        for (int k = 0; k < kLoadsAtOnce; k++) {
          const int b = start + k * 32;
          v[k] = b < gridDim.x
                     ? __ldcg(p.image_sums + (static_cast<int64_t>(n) * gridDim.x + b) * p.image.c + c)
                     : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kLoadsAtOnce; k++) sum += v[k];
      }
      sum = warp_sum(sum);
      if (lane == 0) scratch.means[c] = sum * p.out.inverse_area;
    }
    wait_copies<0>();
    __syncthreads();
    if (threadIdx.x < kColumns) {
      float logit = 0;
#pragma unroll
      for (int c = 0; c < kMaxStemChannels; c++) logit += weight[c] * scratch.means[c];
      set_column<M>(scratch.vectors, p.out.flags, threadIdx.x, logit);
    }
    __syncthreads();
  }

  // Copies the tile's part of the image, then lays out each output pixel's products beside each other.
  __device__ void lay_out(int n, int row, int col, int patch_rows, int patch_cols,
                          unsigned char* products) const {
    T* patch = reinterpret_cast<T*>(stem_shared);
    const int area = patch_rows * patch_cols;
    for (int start = threadIdx.x; start < p.image.c * area; start += kThreads * kLoadsAtOnce) {
      T v[kLoadsAtOnce];
#pragma unroll
      for (int k = 0; k < kLoadsAtOnce; k++) {
        const int i = start + k * kThreads, c = i / area, r = (i - c * area) / patch_cols;
        const int h = row * p.stride + r - 1, w = col * p.stride + i - c * area - r * patch_cols - 1;
        const bool inside = c < p.image.c && h >= 0 && h < p.image.h && w >= 0 && w < p.image.w;
        v[k] = inside ? *pixel(n, c, h, w) : from_float<T>(0.0f);
      }
#pragma unroll
      for (int k = 0; k < kLoadsAtOnce; k++) {
        const int i = start + k * kThreads;
        if constexpr (M::kRounds) v[k] = round_to_tf32(v[k]);
        if (i < p.image.c * area) patch[i] = v[k];
      }
    }
    __syncthreads();
    const int r = threadIdx.x / kStemCols * p.stride, q = threadIdx.x % kStemCols * p.stride;
    int c = 0, kh = 0, kw = 0;
    for (int part = 0; part < p.chunks * 4; part++) {
      __align__(16) T value[kLaneChannels];
#pragma unroll
      for (int e = 0; e < kLaneChannels; e++) {
        value[e] = kh < 3 ? patch[c * area + (r + kh) * patch_cols + q + kw] : from_float<T>(0.0f);
        if (++c == p.image.c) {
          c = 0;
          if (++kw == 3) kw = 0, kh++;
        }
      }
      unsigned char* to = products + (part / 4 * kStemPixels + threadIdx.x) * kCellBytes + part % 4 * 16;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(value);
    }
  }

  __device__ void run() {
    allow_dependents();
    wait_for_producers();
    add_image();
    const GridBarrier barrier{p.barrier};
    barrier.arrive();
    const int patch_rows = (kStemRows - 1) * p.stride + 3, patch_cols = (kStemCols - 1) * p.stride + 3;
    const int patch_bytes =
        (p.image.c * patch_rows * patch_cols * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
    unsigned char* weights = stem_shared + patch_bytes;
    unsigned char* products = weights + p.chunks * kColumns * kChunkBytes;
    const int tiles = p.out.tiles_down * p.out.tiles_across;
    const int64_t total = static_cast<int64_t>(p.image.n) * tiles * p.column_tiles;
    int column_tile = -1, image = -1;
    for (int64_t i = blockIdx.x; i < total; i += gridDim.x) {
      const int n = i / (tiles * p.column_tiles), rest = i % (tiles * p.column_tiles), wanted = rest / tiles;
      const int tile = rest % tiles;
      const int row = tile / p.out.tiles_across * kStemRows, col = tile % p.out.tiles_across * kStemCols;
      if (wanted != column_tile) {
        const uint4* from =
            static_cast<const uint4*>(p.weight) + wanted * p.chunks * (kColumns * kChunkBytes / 16);
        for (int j = threadIdx.x; j < p.chunks * (kColumns * kChunkBytes / 16); j += kThreads)
          copy_async(shared_address(weights) + 16 * j, from + j);  // `set_columns` waits for it
      }
      lay_out(n, row, col, patch_rows, patch_cols, products);
      if (image < 0) barrier.wait();  // as late as possible
      if (n != image || wanted != column_tile) set_columns(n, wanted);
      image = n, column_tile = wanted;
      __syncthreads();
      multiply_and_store(n, tile, tiles, row, col, column_tile, shared_address(weights),
                         shared_address(products));
      __syncthreads();
    }
  }

  __device__ void multiply_and_store(int n, int tile, int tiles, int row, int col, int column_tile,
                                     uint32_t weights, uint32_t products) const {
    float acc[2][8][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
    for (int chunk = 0; chunk < p.chunks; chunk++) {
#pragma unroll
      for (int step = 0; step < 2; step++) {
        typename M::A a[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t address[M::kRowAddresses];
#pragma unroll
          for (int k = 0; k < M::kRowAddresses; k++)
            address[k] = products + (chunk * kStemPixels + warp * 32 + i * 16 + M::row(k)) * kCellBytes +
                         M::row_byte();
          M::load_a(a[i], address, step * 32);
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
          typename M::B b;
          M::load_b(b, weights + chunk * (kColumns * kChunkBytes) + M::weight_offset(step) + pair * 1024);
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) M::multiply(acc[i][2 * pair + half], a[i], b, half);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      const int column = pair * 16 + 4 * (lane & 3);
      LaneEpilogue<M> epilogue(p.out, scratch.vectors, 0, column_tile * kColumns, column);
      if (epilogue.stored) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int m = warp * 32 + i * 16 + half * 8 + (lane >> 2);
            const int oh = row + m / kStemCols, ow = col + m % kStemCols;
            if (oh >= p.out.out_h || ow >= p.out.out_w) continue;
            const float (&a)[4] = acc[i][2 * pair];
            const float (&b)[4] = acc[i][2 * pair + 1];
            epilogue.store(make_float4(a[2 * half], a[2 * half + 1], b[2 * half], b[2 * half + 1]),
                           (static_cast<int64_t>(n) * p.out.out_h + oh) * p.out.out_w + ow, false, {});
          }
      }
      epilogue.add_lanes();
      if (lane < 4) store4(&scratch.sums[warp][column], epilogue.sum);
    }
    __syncthreads();
    const int channel = column_tile * kColumns + threadIdx.x;
    if (p.out.sums && threadIdx.x < kColumns && channel < p.out.width) {
      float sum = 0;
      for (int w = 0; w < kThreads / 32; w++) sum += scratch.sums[w][threadIdx.x];
      p.out.sums[(static_cast<int64_t>(n) * tiles + tile) * p.out.pitch + channel * p.out.channel_step] = sum;
    }
  }
};

template <class M>
__device__ __forceinline__ void run_stem(const StemCall& call) {
  __shared__ StemScratch scratch;
  Stem<M>{call, scratch}.run();
}

}  // namespace parnet::cuda
