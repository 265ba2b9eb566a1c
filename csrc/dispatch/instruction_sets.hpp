// Which instruction sets this machine has, and their kernels.
#pragma once

#include <string>
#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// Names of those usable here, best first.
std::vector<std::string> instruction_sets();

// The kernels of one of them, of the best for "". nullptr: not usable here.
const Kernels* kernels_of(const std::string& instruction_set);

}  // namespace maskattn
