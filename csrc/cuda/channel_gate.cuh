// The gate's logits of a tile's 64 output channels over the tile's share of the input channels: means are the
// producers' sums, added here in order, while the first pipeline stages are on their way.
#pragma once
#include "layer.h"
#include "math.cuh"
#include "policy.h"

namespace parnet::cuda {

__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }

template <class T>
struct GateVector;  // 16 bytes of gate weights times the channels' sums
template <>
struct GateVector<float> {
  static __device__ __forceinline__ float dot(uint4 w, const float4 (&m)[1]) {
    const float4 v = reinterpret_cast<const float4&>(w);
    return v.x * m[0].x + v.y * m[0].y + v.z * m[0].z + v.w * m[0].w;
  }
};
template <class T>
struct GateVector16 {
  static __device__ __forceinline__ float dot(uint4 w, const float4 (&m)[2]) {
    const float4 a = load4(reinterpret_cast<const T*>(&w)), b = load4(reinterpret_cast<const T*>(&w) + 4);
    return a.x * m[0].x + a.y * m[0].y + a.z * m[0].z + a.w * m[0].w + b.x * m[1].x + b.y * m[1].y +
           b.z * m[1].z + b.w * m[1].w;
  }
};
template <>
struct GateVector<__half> : GateVector16<__half> {};
template <>
struct GateVector<__nv_bfloat16> : GateVector16<__nv_bfloat16> {};

// Clears, of four channels, those whose bit is not set: zero weights must meet no infinity of another group.
__device__ __forceinline__ void clear_others(float4& v, uint32_t mask) {
  if (!(mask & 1)) v.x = 0.0f;
  if (!(mask & 2)) v.y = 0.0f;
  if (!(mask & 4)) v.z = 0.0f;
  if (!(mask & 8)) v.w = 0.0f;
}

// A pass is four chunks: 16 lanes a row of gate weights, 16 bytes each; two rows a warp at a time.
constexpr int kPassChunks = 4;
constexpr int kSumsAtOnce = 16;  // a warp has so many on their way, whose latencies would add up otherwise

// The chunk whose sums a lane adds, counted from the first of the pass. With 32-bit channels half of the
// lanes have none.
template <class T>
__device__ __forceinline__ int chunk_of_lane() {
  return lane_id() * 4 / (kChunkBytes / static_cast<int>(sizeof(T)));
}

// `entry`: the chunk table's entry for the lane's chunk in the first pass. `sums`: scratch, [warp][four
// channels].
template <class T>
__device__ __forceinline__ void gate_logits(const LayerCall& p, int image, int group, int group_tile,
                                            int first_chunk, int last_chunk, int entry, float4 (&sums)[4][32],
                                            float (&logits)[kColumns]) {
  constexpr int kLaneChannels = 16 / sizeof(T), kChunkChannels = kChunkBytes / sizeof(T);
  constexpr int kQuads = kLaneChannels / 4, kRows = kColumns / 8;
  const int lane = lane_id(), warp = threadIdx.x / 32, part = lane & 15;
  const int row_channels = p.chunks * kChunkChannels;
  const int32_t* table = p.chunk_table + group * p.chunks;
  const T* weight = static_cast<const T*>(p.gate_weight) +
                    (static_cast<int64_t>(group_tile) * kColumns + warp * 2 + (lane >> 4)) * row_channels;
  float logit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) logit[r] = 0.0f;
  for (int chunk = first_chunk; chunk < last_chunk; chunk += kPassChunks) {
    uint4 w[kRows];
    const int from = chunk * kChunkChannels + part * kLaneChannels;
#pragma unroll
    for (int r = 0; r < kRows; r++)
      w[r] = from < last_chunk * kChunkChannels
                 ? __ldg(reinterpret_cast<const uint4*>(weight + static_cast<int64_t>(r) * 8 * row_channels +
                                                        from))
                 : make_uint4(0, 0, 0, 0);
    const int of_chunk = chunk + chunk_of_lane<T>(), next = of_chunk + kPassChunks;
    const bool adds = chunk_of_lane<T>() < kPassChunks && of_chunk < last_chunk;
    const Input& in = p.inputs[entry >> kSourceShift];
    const float* s = in.sums + static_cast<int64_t>(image) * in.sum_tiles * in.pitch +
                     (entry & ((1 << kSourceShift) - 1)) + lane * 4 % kChunkChannels;
    if (next < last_chunk) entry = __ldg(table + next);
    float4 sum = make_float4(0, 0, 0, 0);
    for (int t = warp; t < in.sum_tiles; t += 4 * kSumsAtOnce) {
      float4 v[kSumsAtOnce];
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; k++)
        v[k] = adds && t + 4 * k < in.sum_tiles
                   ? __ldcg(reinterpret_cast<const float4*>(s + static_cast<int64_t>(t + 4 * k) * in.pitch))
                   : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; k++) add(sum, v[k]);
    }
    if (p.chunk_masks && adds)
      clear_others(sum, __ldg(p.chunk_masks + group * p.chunks + of_chunk) >> lane * 4 % kChunkChannels);
    if (chunk != first_chunk) __syncthreads();  // the sums of the last pass have been read
    // A lane that reads two quads finds the first ones of all lanes before the second ones: no bank
    // conflicts.
    sums[warp][kQuads == 2 ? ((lane & 1) << 4) + (lane >> 1) : lane] = sum;
    __syncthreads();
    float4 total[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; i++) {
      total[i] = sums[0][16 * i + part];
#pragma unroll
      for (int k = 1; k < 4; k++) add(total[i], sums[k][16 * i + part]);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) logit[r] += GateVector<T>::dot(w[r], total);
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) logit[r] += __shfl_xor_sync(~0u, logit[r], lanes);
    if (part == 0) logits[warp * 2 + (lane >> 4) + r * 8] = logit[r] * p.out.inverse_area;
  }
}

}  // namespace parnet::cuda
