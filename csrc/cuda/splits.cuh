// A tile whose input channels several blocks share. The one that began last finishes it: the others run
// already, so it can wait for them (and for the other one of its pair, which runs too and waits for no split
// before it meets it). It adds their sums and its own in the order of the splits: which one it is does not
// change a bit.
#pragma once
#include "channel_gate.cuh"
#include "layer.h"
#include "policy.h"
#include "ptx.cuh"

namespace parnet::cuda {

// kRows: rows from one of a warp's fragments to the next.
template <int kFragments, int kKept, int kRows = 16>
struct Splits {
  using Sums = float4[kFragments][kKept];
  static constexpr int kThreadVectors = kFragments * kKept, kFragmentVectors = kKept * kThreads;

  const LayerCall& p;
  const int tile, split, splits;
  const int first_row;  // the first of the tile's rows that this block has

  __device__ __forceinline__ float4* partial(int of) const {
    return reinterpret_cast<float4*>(p.partial) +
           (static_cast<int64_t>(tile) * splits + of) * (kThreadVectors * kThreads) + threadIdx.x;
  }
  __device__ __forceinline__ float* partial_logit(int of) const {
    return p.partial_logits + (static_cast<int64_t>(tile) * splits + of) * kColumns + threadIdx.x;
  }
  // Whether the lane's rows in fragment i belong to the tile: 7x14 pixels leave most of the last fragment
  // empty.
  __device__ __forceinline__ bool used(int i) const { return used(i, first_row); }
  __device__ __forceinline__ bool used(int i, int from_row) const {
    const int first = from_row + (kRows == 16 ? 0 : threadIdx.x / 32 * 16);
    return i * kRows + first + (lane_id() >> 2) < p.tile_rows * p.tile_cols;
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
    __syncthreads();
    if (threadIdx.x == 0) add_release(p.arrivals + tile, kLeft);
  }

  __device__ __forceinline__ void wait_for_others() const {
    if (threadIdx.x == 0) {
      uint32_t* arrivals = p.arrivals + tile;
      while (load_acquire(arrivals) != (splits - 1) * kLeft + splits) {
      }
      store_relaxed(arrivals, 0);  // for the next launch
    }
    __syncthreads();
  }

  // The others' sums come by way of `shared`: `bytes`, or exchange_bytes of the tile if these are more.
  __device__ __forceinline__ void add_others(Sums& sums, float& logit, void* shared, int bytes) const {
    const int others = splits - 1;
    // Registers are few: logits too wait in shared memory.
    float* logits = static_cast<float*>(shared) + threadIdx.x;
    if (threadIdx.x < kColumns)
      for (int other = 0; other < others; other++)
        copy_value_async(shared_address(logits + other * kColumns), partial_logit(other + (other >= split)));
    float4* area = static_cast<float4*>(shared) + kLogitBytes / 16 + threadIdx.x;
    if constexpr (kRows == 64) {
      add_fragments(sums, area);
    } else {
      add_splits(sums, area, bytes - kLogitBytes);
    }
    if (threadIdx.x >= kColumns) return;
    float total = 0.0f;
    for (int s = 0; s < splits; s++) total += s == split ? logit : logits[(s - (s > split)) * kColumns];
    logit = total;
  }

  // Adds whole splits, as many at a time as there is room for. A thread reads only what it has copied.
  __device__ __forceinline__ void add_splits(Sums& sums, float4* area, int bytes) const {
    const int others = splits - 1, room = max(1, bytes / (kThreadVectors * kThreads * 16));
    Sums own;
#pragma unroll
    for (int i = 0; i < kFragments; i++) take(own[i], sums[i]);
    auto add_all_own = [&] {
#pragma unroll
      for (int i = 0; i < kFragments; i++) add_own(sums[i], own[i]);
    };
    for (int first = 0; first < others; first += room) {
      const int last = min(first + room, others);
      for (int other = first; other < last; other++) {
#pragma unroll
        for (int i = 0; i < kFragments; i++)
          copy_fragment(area + ((other - first) * kFragments + i) * kFragmentVectors, other, i);
      }
      commit_copies();
      wait_copies<0>();
      for (int other = first; other < last; other++) {
        if (other == split) add_all_own();
#pragma unroll
        for (int i = 0; i < kFragments; i++)
          add_fragment(sums[i], area + ((other - first) * kFragments + i) * kFragmentVectors, i);
      }
    }
    if (split == others) add_all_own();
  }

  // Adds one fragment of all splits after the other, since there are no registers for all sums twice.
  // kSplitRing fragments are on their way.
  __device__ __forceinline__ void add_fragments(Sums& sums, float4* area) const {
    const int others = splits - 1;
    int next = 0, next_other = 0, to = 0, from = 0;
    auto copy_next = [&] {
      if (next < kFragments) copy_fragment(area + to * kFragmentVectors, next_other, next);
      commit_copies();
      to = to + 1 == kSplitRing ? 0 : to + 1;
      if (++next_other == others) next_other = 0, next++;
    };
    for (int i = 0; i < kSplitRing; i++) copy_next();
#pragma unroll
    for (int i = 0; i < kFragments; i++) {
      float4 own[kKept];
      take(own, sums[i]);
      for (int other = 0; other < others; other++) {
        wait_copies<kSplitRing - 1>();
        if (other == split) add_own(sums[i], own);
        add_fragment(sums[i], area + from * kFragmentVectors, i);
        from = from + 1 == kSplitRing ? 0 : from + 1;
        copy_next();
      }
      if (split == others) add_own(sums[i], own);
    }
  }

  static __device__ __forceinline__ void take(float4 (&own)[kKept], float4 (&sums)[kKept]) {
#pragma unroll
    for (int j = 0; j < kKept; j++) own[j] = sums[j], sums[j] = make_float4(0, 0, 0, 0);
  }
  static __device__ __forceinline__ void add_own(float4 (&sums)[kKept], const float4 (&own)[kKept]) {
#pragma unroll
    for (int j = 0; j < kKept; j++) add(sums[j], own[j]);
  }
  __device__ __forceinline__ void copy_fragment(float4* to, int other, int i) const {
    if (!used(i)) return;
    const float4* from = partial(other + (other >= split)) + i * kFragmentVectors;
#pragma unroll
    for (int j = 0; j < kKept; j++) copy_async(shared_address(to) + j * (kThreads * 16), from + j * kThreads);
  }
  __device__ __forceinline__ void add_fragment(float4 (&sums)[kKept], const float4* from, int i) const {
    if (!used(i)) return;
#pragma unroll
    for (int j = 0; j < kKept; j++) add(sums[j], from[j * kThreads]);
  }
};

}  // namespace parnet::cuda
