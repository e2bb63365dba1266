// Schemas of torch.ops.parnet.*. Kernels are registered next to their code (cpu/bind.cpp, cuda/bind.cpp) and,
// for the public operators, in parnet_kernels/ops.py, which checks arguments and chooses the backend.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(parnet, m) {
#define PARNET_SCHEMA(schema) m.def(schema);
#include "../parnet_kernels/schemas.inc"
#undef PARNET_SCHEMA
}
