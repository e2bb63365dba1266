// A tile whose input channels several blocks share. The one that began last finishes it: the others run
// already, so it can wait for them. It adds their sums and its own in the order of the splits: which one it
// is does not change a bit.
#pragma once
#include "channel_gate.cuh"
#include "layer.h"
#include "policy.h"
#include "ptx.cuh"

namespace parnet::cuda {

template <int kFragments, int kKept>
struct Splits {
  using Sums = float4[kFragments][kKept];
  static constexpr int kThreadVectors = kFragments * kKept;

  const LayerCall& p;
  const int tile, split;

  __device__ __forceinline__ float4* partial(int of) const {
    return reinterpret_cast<float4*>(p.partial) +
           (static_cast<int64_t>(tile) * p.splits + of) * (kThreadVectors * kThreads) + threadIdx.x;
  }
  __device__ __forceinline__ float* partial_logit(int of) const {
    return p.partial_logits + (static_cast<int64_t>(tile) * p.splits + of) * kColumns + threadIdx.x;
  }
  // Whether the lane's rows in fragment i are of the tile: 7x14 pixels leave most of the last one empty.
  __device__ __forceinline__ bool used(int i) const {
    return i * 16 + (lane_id() >> 2) < p.tile_rows * p.tile_cols;
  }

  __device__ __forceinline__ void leave(const Sums& sums, float logit) const {
    float4* to = partial(split);
#pragma unroll
    for (int i = 0; i < kFragments; i++)
      if (used(i)) {
#pragma unroll
        for (int j = 0; j < kKept; j++) __stcg(to + (i * kKept + j) * kThreads, sums[i][j]);
      }
    if (threadIdx.x < kColumns) __stcg(partial_logit(split), logit);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(p.arrivals + tile, kLeft);
  }

  // The others' sums come by way of `shared`, as many splits' at a time as its `bytes` hold.
  __device__ __forceinline__ void add_others(Sums& sums, float& logit, void* shared, int bytes) const {
    const int others = p.splits - 1, room = max(1, bytes / (kThreadVectors * kThreads * 16));
    if (threadIdx.x == 0) {
      uint32_t* arrivals = p.arrivals + tile;
      while (load_acquire(arrivals) != others * kLeft + p.splits) {
      }
      *arrivals = 0;  // for the next launch
    }
    __syncthreads();
    float logits[kMaxSplits];
#pragma unroll
    for (int s = 0; s < kMaxSplits; s++) {
      logits[s] = s == split ? logit : 0.0f;
      if (threadIdx.x < kColumns && s < p.splits && s != split) logits[s] = __ldcg(partial_logit(s));
    }
    Sums own;
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < kKept; j++) own[i][j] = sums[i][j], sums[i][j] = make_float4(0, 0, 0, 0);
    auto add_own = [&] {
#pragma unroll
      for (int i = 0; i < kFragments; i++)
#pragma unroll
        for (int j = 0; j < kKept; j++) add(sums[i][j], own[i][j]);
    };
    float4* const area = static_cast<float4*>(shared) + threadIdx.x;
    for (int first = 0; first < others; first += room) {
      const int last = min(first + room, others);
      for (int other = first; other < last; other++) {
        const float4* from = partial(other + (other >= split));
        const uint32_t to = shared_address(area + (other - first) * (kThreadVectors * kThreads));
#pragma unroll
        for (int i = 0; i < kFragments; i++)
          if (used(i)) {
#pragma unroll
            for (int j = 0; j < kKept; j++)
              copy_async(to + (i * kKept + j) * (kThreads * 16), from + (i * kKept + j) * kThreads);
          }
      }
      commit_copies();
      wait_copies<0>();  // a thread reads only what it has copied
      for (int other = first; other < last; other++) {
        if (other == split) add_own();
        const float4* from = area + (other - first) * (kThreadVectors * kThreads);
#pragma unroll
        for (int i = 0; i < kFragments; i++)
          if (used(i)) {
#pragma unroll
            for (int j = 0; j < kKept; j++) add(sums[i][j], from[(i * kKept + j) * kThreads]);
          }
      }
    }
    if (split == others) add_own();
    logit = 0.0f;
#pragma unroll
    for (int s = 0; s < kMaxSplits; s++) logit += logits[s];
  }
};

}  // namespace parnet::cuda
