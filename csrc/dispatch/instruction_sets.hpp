// The instruction sets of this machine, and their kernels.
#pragma once

#include <string>
#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// Returns the names of the instruction sets that this machine supports, best first.
std::vector<std::string> instruction_sets();

// Returns the kernels of an instruction set, of the best for "", or nullptr if this machine does not support it.
const Kernels* kernels_of(const std::string& instruction_set);

}  // namespace maskattn
