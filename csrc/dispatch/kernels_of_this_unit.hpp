// The kernels as compiled for the including unit. A new operation needs its header and its line here.
#pragma once

#include "attention/backward.hpp"
#include "dispatch/kernels.hpp"
#include "encoder/block_kernel.hpp"
#include "readout/backward.hpp"
#include "readout/relevance_kernel.hpp"

namespace maskattn {
namespace {

#if defined(MASKATTN_BFLOAT16_PRODUCTS)
using Bfloat16Products = MASKATTN_BFLOAT16_PRODUCTS;
#elif defined(__AVX512BF16__)
using Bfloat16Products = Bfloat16Pairs;
#else
using Bfloat16Products = SinglePrecision;
#endif

constexpr Kernels kernels_of_this_unit = {
    {
        forward_kernels<SinglePrecision, float>,
        forward_kernels<Bfloat16Products, Bfloat16>,
        backward_kernels<SinglePrecision, float>,
        backward_kernels<Bfloat16Products, Bfloat16>,
    },
    {readout_kernels<float>, readout_kernels<Bfloat16>},
    {relevance_kernels<float>, relevance_kernels<Bfloat16>},
    {encoder_kernels<SinglePrecision, float>, encoder_kernels<Bfloat16Products, Bfloat16>},
};

}  // namespace
}  // namespace maskattn
