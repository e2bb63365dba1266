// Which compiled instruction set runs.
#pragma once
#include <string>

#include "layer.h"

namespace parnet::cpu {

// The level chosen at first use: the best one the processor has, lowered by PARNET_CPU_ISA. Throws
// std::runtime_error if the variable names no level or one the processor lacks.
const Kernels& kernels();

// JSON: {"isa", "lanes", "compiled", "supported", "override"}.
std::string describe_isa();

}  // namespace parnet::cpu
