// The tiles of AMX on arrays, so that their logic also runs (and is tested) where there is no AMX.
#include "tiles.h"
//
#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_tiles;
constinit const Kernels kernels_tiles = table_of("tiles", kTileQuads);
}  // namespace parnet::cpu::direct
