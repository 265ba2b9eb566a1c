// The kernels of AMX with its tiles in software, so that processors without AMX test them too. Compiled with the flags of
// avx512_bf16.
#if defined(__x86_64__)
#define MASKATTN_TILES_IN_SOFTWARE
#include "simd/tiles.hpp"

#define MASKATTN_BFLOAT16_PRODUCTS Bfloat16Tiles
#include "dispatch/kernels_of_this_unit.hpp"
#endif

namespace maskattn_tests {

#if defined(__x86_64__)
extern const maskattn::Kernels kernels_in_software;
const maskattn::Kernels kernels_in_software = maskattn::kernels_of_this_unit;
#endif

}  // namespace maskattn_tests
