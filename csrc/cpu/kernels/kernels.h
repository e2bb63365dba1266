// Everything compiled once per instruction set. Included by the isa_*.cpp files only, which define
// PARNET_LANES, PARNET_ROWS, perhaps PARNET_INTEL, and the name of the table.
#pragma once
#include "convert.h"
#include "convolution.h"
#include "gate.h"
#include "stem.h"
#include "strided_gradient.h"
#include "training.h"

namespace parnet::cpu {
namespace {

constexpr TrainingKernels kTraining = {.transform = transform_plain,
                                       .convolve = convolve_plain,
                                       .transform_strided_gradient = transform_strided_gradient,
                                       .add_strided_gradient = add_strided_gradient,
                                       .transform_input = transform_gradient_input,
                                       .spread_tiles = spread_tiles,
                                       .multiply_transposed = multiply_transposed,
                                       .fold_gradient = fold_gradient,
                                       .pointwise = pointwise,
                                       .point_gradient = point_gradient,
                                       .pool = pool,
                                       .moments = moments,
                                       .combine = combine,
                                       .reduce = reduce,
                                       .spread = spread,
                                       .join = join,
                                       .join_sums = join_sums,
                                       .separate = separate};

constexpr Kernels table_of(const char* name) {
  return {name,        kLanes,         kMaxRows,  kIntel ? kMinPixels6Intel : kMinPixels6,
          expand_rows, expand_columns, transform, convolve,
          gate,        stem,           enter,     enter_planes,
          leave,       leave_means,    classify,  &kTraining};
}

}  // namespace
}  // namespace parnet::cpu
