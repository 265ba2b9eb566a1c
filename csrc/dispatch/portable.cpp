// Compiled with this instruction set's flags, which are in flags.mk.
#include "dispatch/kernels_of_this_unit.hpp"

namespace maskattn {
const Kernels kernels_portable = kernels_of_this_unit;
}
