// Splits readout and token relevance into items of work for the pool. Plain C++: no Python.
#pragma once

#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// starts: where each sequence's keys begin, and their end. All throw std::bad_alloc.
void readout_forward(const Readout& a, const std::vector<std::int32_t>& starts, const Kernels& kernels, int threads);

// dslopes: by head, or nullptr.
void readout_backward(const Readout& a, const ReadoutGradients& g, const std::vector<std::int32_t>& starts,
                      const Kernels& kernels, int threads, double* dslopes);

void token_relevance(const Relevance& a, const std::vector<std::int32_t>& starts, const Kernels& kernels, int threads);

}  // namespace maskattn
