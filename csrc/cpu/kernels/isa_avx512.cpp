// 32 vector registers of 16 lanes. Tuned for AMD's processors (Zen 4 and newer).
#define PARNET_LANES 16
#define PARNET_ROWS 12
#include "kernels.h"

namespace parnet::cpu {
extern const Kernels kernels_avx512;
constinit const Kernels kernels_avx512 = table_of("avx512");
}  // namespace parnet::cpu
