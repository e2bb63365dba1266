// What follows the convolution's sums: gate, bias, skip, activation, output affine, store, channel sums.
#pragma once
#include "layer.h"
#include "math.cuh"
#include "policy.h"

namespace parnet::cuda {

// Per output channel of a tile, in shared memory: conv_scale * sum + skip_scale * x + offset goes into the
// activation.
struct ColumnTerms {
  float conv_scale[kColumns], skip_scale[kColumns], offset[kColumns];
};

__device__ __forceinline__ const float* column_vectors(const Output& out, int group_tile) {
  return out.vectors + static_cast<int64_t>(group_tile) * (kVectors * kColumns);
}

// Terms of one column from its gate's logit (without bias).
template <class M>
__device__ __forceinline__ void set_column(ColumnTerms& terms, const Output& out, int group_tile, int column,
                                           float logit) {
  const float* v = column_vectors(out, group_tile) + column;
  const float bias = __ldg(v), gate = sigmoid<M>(logit + __ldg(v + kColumns));
  if (out.flags & kSkip) {
    terms.conv_scale[column] = 1.0f;
    terms.skip_scale[column] = gate * __ldg(v + 2 * kColumns);
    terms.offset[column] = fmaf(gate, __ldg(v + 3 * kColumns), bias);
  } else {
    terms.conv_scale[column] = 2.0f * gate;
    terms.skip_scale[column] = 0.0f;
    terms.offset[column] = 2.0f * gate * bias;
  }
}

// The first `count` of four values, `step` apart. Rare, so not copied into every place that stores.
template <class T>
__device__ __noinline__ void scatter4(T* to, float4 v, int step, int count) {
  const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (e < count) to[e * step] = from_float<T>(value[e]);
}

// Four adjacent columns of one lane.
template <class M>
struct LaneEpilogue {
  using T = typename M::T;
  const Output& out;
  float4 conv_scale, skip_scale, offset, out_scale, out_shift, sum;
  int64_t channel;
  int first;  // of the group's channels
  bool stored;

  __device__ LaneEpilogue(const Output& o, const ColumnTerms& terms, int group, int group_tile,
                          int tile_column, int column)
      : out(o),
        sum(make_float4(0, 0, 0, 0)),
        first(tile_column + column),
        stored(tile_column + column < o.width) {
    channel = static_cast<int64_t>(group) * o.group_step + static_cast<int64_t>(first) * o.channel_step;
    const float* v = column_vectors(o, group_tile) + column;
    conv_scale = load4(terms.conv_scale + column);
    skip_scale = load4(terms.skip_scale + column);
    offset = load4(terms.offset + column);
    out_scale = __ldg(reinterpret_cast<const float4*>(v + 4 * kColumns));
    out_shift = __ldg(reinterpret_cast<const float4*>(v + 5 * kColumns));
  }

  // Both forms and a selection: a branch here would be copied into every row that a lane stores.
  __device__ __forceinline__ float activate(float v) const {
    const float smooth = silu<M>(v), rectified = v < 0.0f ? 0.0f : v;  // keeps NaN
    return out.flags & kReLU ? rectified : smooth;
  }

  // `skip`: the input pixel's channels `first` to `first + 3`, or null.
  __device__ __forceinline__ void store(float4 v, int64_t pixel, const T* skip) {
    v.x = fmaf(v.x, conv_scale.x, offset.x), v.y = fmaf(v.y, conv_scale.y, offset.y);
    v.z = fmaf(v.z, conv_scale.z, offset.z), v.w = fmaf(v.w, conv_scale.w, offset.w);
    if (skip) {
      const float4 x = load4(skip);
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

  // Over the lanes that hold the same columns (lane % 4), in a fixed tree.
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
