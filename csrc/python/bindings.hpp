// Functions that add the bindings of each operation to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace maskattn {

void bind_attention(pybind11::module_& module);
void bind_coverage(pybind11::module_& module);
void bind_encoder(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
void bind_pictures(pybind11::module_& module);
void bind_readout(pybind11::module_& module);

}  // namespace maskattn
