// Launches one kernel of a program on a stream of the current device. No torch, no CUDA header.
#pragma once
#include "program.h"

namespace parnet::cuda {

// Each returns null, or the text of the CUDA error, which is not left behind in the runtime.
const char* launch(const Launch& l, void* stream);

// The architecture that the kernels which the current device runs were compiled for, 10 * major + minor.
// Fails where they cannot run: no image fits, or the driver is too old.
const char* image(int* architecture);

}  // namespace parnet::cuda
