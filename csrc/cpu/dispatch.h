// Which compiled instruction set runs.
#pragma once
#include <string>

#include "layer.h"

namespace parnet::cpu {

// The kernels chosen at first use: for the best instruction set that the processor has, or the one
// PARNET_CPU_ISA names. Throws std::runtime_error if it names none, or one that the processor lacks.
const Kernels& kernels();

// JSON: {"isa", "lanes", "compiled", "supported", "override"}.
std::string describe_isa();

}  // namespace parnet::cpu
