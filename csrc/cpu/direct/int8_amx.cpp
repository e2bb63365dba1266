// AMX: the tiles multiply, AVX-512 does the rest.
#include <immintrin.h>

#include "tiles.h"
//
#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_amx;
constinit const Kernels kernels_amx = table_of("amx", kTileQuads);
}  // namespace parnet::cpu::direct
