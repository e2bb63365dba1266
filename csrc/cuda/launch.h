// Launches one kernel of a program on a stream of the current device. No torch, no CUDA header.
#pragma once
#include "program.h"

namespace parnet::cuda {

// Returns null, or the text of the CUDA error, which is not left behind in the runtime.
const char* launch(const Launch& l, void* stream);

}  // namespace parnet::cuda
