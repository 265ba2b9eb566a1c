// The kernels of one instruction set, with a member per operation. The unit of each instruction set fills the table by
// including kernels_of_this_unit.hpp under its own compiler flags.
#pragma once

#include "attention/attention.hpp"
#include "encoder/encoder.hpp"
#include "readout/readout.hpp"
#include "readout/relevance.hpp"

namespace maskattn {

struct Kernels {
    AttentionKernels attention;
    ReadoutKernelsByDtype readout;
    RelevanceKernelsByDtype relevance;
    EncoderKernelsByDtype encoder;
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx_bf16;
#endif

}  // namespace maskattn
