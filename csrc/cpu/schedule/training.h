// Training on the CPU: the bare convolution, the gradient of its weights, and the elementwise passes, each
// over all threads. Results have the same bits for every number of threads: partial sums belong to tiles or
// to fixed numbers of pixels, and are added in order, in double precision.
#pragma once
#include "../training.h"
#include "pack.h"

namespace parnet::cpu {

// parallel(count, body) calls body(i) for i in [0, count), on up to `threads` threads.
struct Threads {
  int count;
  const Parallel& parallel;
};

// mean and variance: [out.channels], or null. weight: [K, C, 3, 3]; adjoint: of the convolution whose input
// gradient this is.
void convolve_map(const PixelMap& in, const float* weight, int stride, bool adjoint, bool add,
                  const PixelMap& out, float* mean, float* variance, const Kernels&, const Threads&);
// The input gradient of a convolution of stride 2, added to `to`; weight: [K, C, 3, 3].
void add_strided_input_gradient(const PixelMap& gradient, const float* weight, const PixelMap& to,
                                const Kernels&, const Threads&);
// to: [K, C, 3, 3], overwritten.
void weight_gradient(const PixelMap& in, const PixelMap& gradient, int stride, float* to, const Kernels&,
                     const Threads&);
// 1x1 convolutions of float maps; weight, to: [K, C].
void convolve_points(const PixelMap& in, const float* weight, bool adjoint, bool add, const PixelMap& out,
                     float* mean, float* variance, const Kernels&, const Threads&);
void point_weight_gradient(const PixelMap& in, const PixelMap& gradient, float* to, const Kernels&,
                           const Threads&);
// 2x2 averages of `in`, with zeros beyond it.
void pool_map(const PixelMap& in, const PixelMap& out, const Kernels&, const Threads&);
// image_means: [image][channel]; mean and variance: [channel], or null.
void map_moments(const PixelMap&, float* image_means, float* mean, float* variance, const Kernels&,
                 const Threads&);
void combine_maps(const PassArgs&, const Kernels&, const Threads&);
// sums: [1 + maps][image][channel].
void reduce_maps(const PassArgs&, float* sums, const Kernels&, const Threads&);
void spread_maps(const PassArgs&, const Kernels&, const Threads&);
void join_maps(const JoinArgs&, const Kernels&, const Threads&);
// sums: [2*map + which][image][channel].
void sum_joined(const JoinArgs&, float* sums, const Kernels&, const Threads&);
void separate_maps(const JoinArgs&, const Kernels&, const Threads&);

}  // namespace parnet::cpu
