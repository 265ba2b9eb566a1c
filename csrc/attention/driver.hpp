// The driver, which splits attention into items of work for the pool. Plain C++ without Python.
#pragma once

#include <memory>
#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn {

// The heads of the sequences of one call.
struct Sequences {
    std::vector<Head> heads;
    std::vector<std::int32_t> kept;  // row indices that the heads point to
    bool dense = false;              // whether rows that are not kept are background and must be filled
    std::int64_t rows_q = 0;         // rows of a sequence of dense tensors, background included
    std::int64_t rows_k = 0;
};

// The kernels and the number of threads of a call. Both operations throw std::bad_alloc.
struct Execution {
    const AttentionKernels* kernels;
    int threads;
};

// The pieces of the forward pass of one head, for a job that has other work too. `blocks` is memory for all of the
// head's blocks of keys, whose packings and tiles of queries can be taken one by one, or all at once.
inline std::int64_t blocks_of(const Head& head) { return ceil_divide(head.keys.count, block_keys); }
inline std::int64_t tiles_of(const Head& head) { return ceil_divide(head.queries.count, tile_queries); }
std::int64_t packings_of(const Head& head);
void pack_keys(const ForwardKernels& kernels, const Attention& a, const Head& head, std::int64_t packing,
               std::uint32_t* blocks);
void attend_head(const ForwardKernels& kernels, const Attention& a, const Head& head, std::uint32_t* blocks,
                 std::uint32_t* scratch);

void attention_forward(const Attention& a, const Sequences& sequences, const Execution& how);

// dslopes: one per head, or nullptr. If heads share a key bias, g.dbias still has a row per head, and the caller sums
// them.
void attention_backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how,
                        double* dslopes);

}  // namespace maskattn
