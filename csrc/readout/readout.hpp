// Readout, in which the R queries of each sequence attend to its packed keys, as plain data, shared by the bindings, the
// driver that splits it into items of work, and the kernels of each instruction set. The formulas are those of
// attention.hpp, except that with drows the gradient of the attention rows,
//
//   dS_rj = p_rj (dO_r.v_j + drows_rj - delta_r)     delta_r = dO_r.out_r + sum_j p_rj drows_rj - dlse_r
#pragma once

#include "attention/attention.hpp"

namespace maskattn {

// The rows of q, out and lse are the R queries; k and v have stride 0 over the sequences.
struct Readout : Attention {
    int heads;
    int queries;
    Strided<float> rows;  // one per query and head, contiguous over keys; without data: not wanted
};

struct ReadoutGradients : Gradients {
    Strided<const float> grad_rows;  // with the layout of rows; without data: zeros
};

// Consecutive keys of one sequence.
struct KeyRun {
    std::int32_t sequence;
    std::int64_t first;  // row of k and v
    std::int64_t count;
};

// Keys whose scores are held at a time: three vectors of AVX-512, eight register tiles.
constexpr int tile_keys = 48;
constexpr int most_queries = 16;

// Entry points of one instruction set for one dtype. The result of a run of keys is stored in `partial`; the partials of
// a sequence are adjacent and combined in their order. Sizes are in 32-bit words, multiples of 16; every buffer is
// aligned to 64 bytes.
struct ReadoutKernels {
    std::size_t (*partial_words)(const Readout&);
    std::size_t (*scratch_words)(const Readout&);
    // Stores the scores in rows, if these are wanted.
    void (*attend)(const Readout&, const KeyRun&, float* partial, std::uint32_t* scratch);
    void (*write_output)(const Readout&, std::int32_t sequence, const float* partials, std::int64_t count);
    void (*normalize_rows)(const Readout&, const KeyRun&);
    // Stores sum_j p_rj drows_rj for each head and query.
    void (*sum_row_gradients)(const Readout&, const ReadoutGradients&, const KeyRun&, float* partial,
                              std::uint32_t* scratch);
    // Writes dk, dv and dbias of its keys. There are `count` partials of sum_row_gradients, or none.
    void (*differentiate)(const Readout&, const ReadoutGradients&, const KeyRun&, const float* row_gradients,
                          std::int64_t count, float* partial, std::uint32_t* scratch);
    // dslopes: the sequence's term for each head.
    void (*write_query_gradients)(const Readout&, const ReadoutGradients&, std::int32_t sequence, const float* partials,
                                  std::int64_t count, double* dslopes);
};

struct ReadoutKernelsByDtype {
    ReadoutKernels float32, bfloat16;
};

}  // namespace maskattn
