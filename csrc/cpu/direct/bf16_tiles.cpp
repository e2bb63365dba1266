// The tiles of AMX for bfloat16 on arrays, so that their logic also runs (and is tested) where there is no
// AMX.
#define PARNET_BFLOAT16
#include "tiles.h"
//
#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_bf16_tiles;
constinit const Kernels kernels_bf16_tiles = table_of("bf16_tiles", kTileQuads);
}  // namespace parnet::cpu::direct
