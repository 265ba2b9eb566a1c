// Compiled with this instruction set's flags, which are in flags.mk.
#if defined(__x86_64__)
#include "dispatch/kernels_of_this_unit.hpp"

namespace maskattn {
const Kernels kernels_avx512_bf16 = kernels_of_this_unit;
}
#endif
