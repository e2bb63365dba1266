// What follows the convolution's sums: gate, bias, skip, activation, output affine, store, channel sums.
#pragma once
#include "layer.h"
#include "math.cuh"
#include "policy.h"

namespace parnet::cuda {

// Indices of what the epilogue reads for each column, out of shared memory. First the vectors (kVectors in
// layer.h) lie there; then set_column replaces the first ones by the terms of conv_scale * sum + skip_scale *
// x + offset, the activation's argument. Output scale and shift stay.
enum ColumnTerm { kOffset, kConvScale, kSkipScale, kOutScale = 4, kOutShift };
using Columns = float[kVectors][kColumns];

__device__ __forceinline__ const float* column_vectors(const Output& out, int group_tile) {
  return out.vectors + static_cast<int64_t>(group_tile) * (kVectors * kColumns);
}

// Replaces one column's vectors by its terms. `logit`: the gate's, without bias.
template <class M>
__device__ __forceinline__ void set_column(Columns& terms, int flags, int column, float logit) {
  const float bias = terms[0][column], gate = sigmoid<M>(logit + terms[1][column]);
  if (flags & kSkip) {
    terms[kOffset][column] = fmaf(gate, terms[3][column], bias);
    terms[kConvScale][column] = 1.0f;
    terms[kSkipScale][column] = gate * terms[2][column];
  } else {
    terms[kOffset][column] = 2.0f * gate * bias;
    terms[kConvScale][column] = 2.0f * gate;
    terms[kSkipScale][column] = 0.0f;
  }
}

// Stores the first `count` of four values, `step` apart. Rare, so not inlined into every place that stores.
template <class T>
__device__ __noinline__ void scatter4(T* to, float4 v, int step, int count) {
  const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (e < count) to[e * step] = from_float<T>(value[e]);
}

// The epilogue of one lane, for four adjacent columns of several pixels.
template <class M>
struct LaneEpilogue {
  using T = typename M::T;
  const Output& out;
  float4 conv_scale, skip_scale, offset, out_scale, out_shift, sum;
  int64_t channel;
  int first;  // of the group's channels
  bool stored;

  __device__ LaneEpilogue(const Output& o, const Columns& terms, int group, int tile_column, int column)
      : out(o),
        sum(make_float4(0, 0, 0, 0)),
        first(tile_column + column),
        stored(tile_column + column < o.width) {
    channel = static_cast<int64_t>(group) * o.group_step + static_cast<int64_t>(first) * o.channel_step;
    conv_scale = load4(terms[kConvScale] + column);
    skip_scale = load4(terms[kSkipScale] + column);
    offset = load4(terms[kOffset] + column);
    out_scale = load4(terms[kOutScale] + column);
    out_shift = load4(terms[kOutShift] + column);
  }

  // Computes both functions and selects one: a branch here would be copied into every row that a lane stores.
  __device__ __forceinline__ float activate(float v) const {
    const float smooth = silu<M>(v), rectified = v < 0.0f ? 0.0f : v;  // keeps NaN
    return out.flags & kReLU ? rectified : smooth;
  }

  // Stores one pixel. `four`: the input pixel's channels `first` to `first + 3`, if there is a skip.
  __device__ __forceinline__ void store(float4 v, int64_t pixel, bool skip, const Four<T>& four) {
    v.x = fmaf(v.x, conv_scale.x, offset.x), v.y = fmaf(v.y, conv_scale.y, offset.y);
    v.z = fmaf(v.z, conv_scale.z, offset.z), v.w = fmaf(v.w, conv_scale.w, offset.w);
    if (skip) {
      const float4 x = load4(reinterpret_cast<const T*>(&four));
      v.x = fmaf(x.x, skip_scale.x, v.x), v.y = fmaf(x.y, skip_scale.y, v.y);
      v.z = fmaf(x.z, skip_scale.z, v.z), v.w = fmaf(x.w, skip_scale.w, v.w);
    }
    v.x = fmaf(activate(v.x), out_scale.x, out_shift.x), v.y = fmaf(activate(v.y), out_scale.y, out_shift.y);
    v.z = fmaf(activate(v.z), out_scale.z, out_shift.z), v.w = fmaf(activate(v.w), out_scale.w, out_shift.w);
    if constexpr (M::kRounds) {
      if (out.flags & kRound)
        v = make_float4(round_to_tf32(v.x), round_to_tf32(v.y), round_to_tf32(v.z), round_to_tf32(v.w));
    }
    T* y = static_cast<T*>(out.y) + pixel * out.pitch + channel;
    if (out.flags & kVectorStore) {
      store4(y, v);
    } else {
      scatter4(y, v, out.channel_step, out.width - first);
    }
    sum.x += rounded<T>(v.x), sum.y += rounded<T>(v.y), sum.z += rounded<T>(v.z), sum.w += rounded<T>(v.w);
  }

  // Adds the sums of the lanes that hold the same columns (lane % 4), in a fixed tree.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, lanes), sum.y += __shfl_xor_sync(~0u, sum.y, lanes);
      sum.z += __shfl_xor_sync(~0u, sum.z, lanes), sum.w += __shfl_xor_sync(~0u, sum.w, lanes);
    }
  }

  __device__ __forceinline__ void store_sums(int64_t tile) const {
    float* to = out.sums + tile * out.pitch + channel;
    if (out.flags & kVectorStore) {
      store4(to, sum);
    } else {
      scatter4(to, sum, out.channel_step, out.width - first);
    }
  }
};

}  // namespace parnet::cuda
