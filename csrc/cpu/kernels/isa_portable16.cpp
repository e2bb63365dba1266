// The 16-lane form on the baseline, so that its logic also runs (and is tested) where there is no AVX-512.
#define PARNET_LANES 16
#define PARNET_ROWS 2
#include "kernels.h"

namespace parnet::cpu {
extern const Kernels kernels_portable16;
constinit const Kernels kernels_portable16 = table_of("portable16");
}  // namespace parnet::cpu
