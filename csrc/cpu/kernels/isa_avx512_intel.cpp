// AVX-512 tuned for Intel's processors, see kIntel.
#define PARNET_LANES 16
#define PARNET_ROWS 12
#define PARNET_INTEL 1
#include "kernels.h"

namespace parnet::cpu {
extern const Kernels kernels_avx512_intel;
constinit const Kernels kernels_avx512_intel = table_of("avx512_intel");
}  // namespace parnet::cpu
