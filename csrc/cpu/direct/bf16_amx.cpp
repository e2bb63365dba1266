// AMX: the tiles multiply bfloat16, AVX-512 does the rest.
#include <immintrin.h>

#define PARNET_BFLOAT16
#include "tiles.h"
//
#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_bf16_amx;
constinit const Kernels kernels_bf16_amx = table_of("bf16_amx", kTileQuads);
}  // namespace parnet::cpu::direct
