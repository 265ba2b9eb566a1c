// The driver, which splits readout and token relevance into items of work for the pool. Plain C++ without Python.
#pragma once

#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// starts: the first key of each sequence, and the end. All functions throw std::bad_alloc.
void readout_forward(const Readout& a, const std::vector<std::int32_t>& starts, const Kernels& kernels, int threads);

// dslopes: one per head, or nullptr.
void readout_backward(const Readout& a, const ReadoutGradients& g, const std::vector<std::int32_t>& starts,
                      const Kernels& kernels, int threads, double* dslopes);

void token_relevance(const Relevance& a, const std::vector<std::int32_t>& starts, const Kernels& kernels, int threads);

}  // namespace maskattn
