// Compiled with this instruction set's flags, which are in flags.mk.
#if defined(__x86_64__)
#include "simd/tiles.hpp"

#define MASKATTN_BFLOAT16_PRODUCTS Bfloat16Tiles
#include "dispatch/kernels_of_this_unit.hpp"

namespace maskattn {
const Kernels kernels_amx_bf16 = kernels_of_this_unit;
}
#endif
