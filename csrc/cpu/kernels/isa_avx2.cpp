// 16 vector registers of 8 lanes: 12 accumulators, two weights, one input.
#define PARNET_LANES 8
#define PARNET_ROWS 6
#include "kernels.h"

namespace parnet::cpu {
extern const Kernels kernels_avx2;
constinit const Kernels kernels_avx2 = table_of("avx2");
}  // namespace parnet::cpu
