// Splits attention into items of work for the pool. Plain C++: no Python.
#pragma once

#include <memory>
#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// The heads of the sequences of one call.
struct Sequences {
    std::vector<Head> heads;
    std::vector<std::int32_t> kept;  // row indices the heads point to
    bool dense = false;              // rows that are not kept are background, to be filled
    std::int64_t rows_q = 0;         // of a sequence of dense tensors, background too
    std::int64_t rows_k = 0;
};

// How a call is to run. Both operations throw std::bad_alloc.
struct Execution {
    const AttentionKernels* kernels;
    int threads;
};

void attention_forward(const Attention& a, const Sequences& sequences, const Execution& how);

// dslopes: by head, or nullptr. Where heads share a key bias, g.dbias is by head and the caller sums it.
void attention_backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how,
                        double* dslopes);

}  // namespace maskattn
