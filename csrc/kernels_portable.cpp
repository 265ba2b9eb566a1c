// Compiled with this instruction set's flags, see setup.py.
#include "kernels_of_this_unit.hpp"

namespace maskattn {
const Kernels kernels_portable = kernels_of_this_unit;
}
