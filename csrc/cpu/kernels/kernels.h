// Everything compiled once per instruction set. Included by the isa_*.cpp files only, which define
// PARNET_LANES, PARNET_ROWS, perhaps PARNET_INTEL, and the name of the table.
#pragma once
#include "convert.h"
#include "convolution.h"
#include "gate.h"
#include "stem.h"
#include "training.h"

namespace parnet::cpu {
namespace {

constexpr Kernels table_of(const char* name) {
  return {name,        kLanes,         kMaxRows,  kIntel ? kMinPixels6Intel : kMinPixels6,
          expand_rows, expand_columns, transform, convolve,
          gate,        stem,           enter,     enter_planes,
          leave,       leave_means,    classify,  &kTraining};
}

}  // namespace
}  // namespace parnet::cpu
