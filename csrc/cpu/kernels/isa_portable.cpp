// The baseline of the architecture (SSE2, NEON): 8 lanes as two vectors of 4.
#define PARNET_LANES 8
#ifdef __aarch64__
#define PARNET_ROWS 6  // 32 registers
#else
#define PARNET_ROWS 2
#endif
#include "kernels.h"

namespace parnet::cpu {
extern const Kernels kernels_portable;
constinit const Kernels kernels_portable = table_of("portable");
}  // namespace parnet::cpu
