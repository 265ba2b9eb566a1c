// Readout: the R queries of each sequence attend to its packed keys. The problem as plain data, shared by the bindings,
// the driver that splits it into items of work, and the kernels of each instruction set. Formulas as in attention.hpp;
// with drows the gradient of the attention rows, dS_rj = p_rj (dO_r.v_j + drows_rj - delta_r) and
// delta_r = dO_r.out_r + sum_j p_rj drows_rj - dlse_r.
#pragma once

#include "attention/attention.hpp"

namespace maskattn {

// Of q, out and lse a row is one of the R queries; k and v have stride 0 over the sequences.
struct Readout : Attention {
    int heads;
    int queries;
    Strided<float> rows;  // of a query and head, key after key; without data: not wanted
};

struct ReadoutGradients : Gradients {
    Strided<const float> grad_rows;  // laid out as rows; without data: zeros
};

// Neighbouring keys of one sequence.
struct KeyRun {
    std::int32_t sequence;
    std::int64_t first;  // row of k and v
    std::int64_t count;
};

// Keys whose scores are held at once: three vectors of AVX-512, eight register tiles.
constexpr int tile_keys = 48;
constexpr int most_queries = 16;

// Entry points of one instruction set for one dtype. What a run of keys contributes is left in `partial`, and the
// partials of a sequence, one after another, are combined in their order. Sizes are in 32-bit words, multiples of 16;
// every buffer is aligned to 64 bytes.
struct ReadoutKernels {
    std::size_t (*partial_words)(const Readout&);
    std::size_t (*scratch_words)(const Readout&);
    // Leaves the scores in rows, if wanted.
    void (*attend)(const Readout&, const KeyRun&, float* partial, std::uint32_t* scratch);
    void (*write_output)(const Readout&, std::int32_t sequence, const float* partials, std::int64_t count);
    void (*normalize_rows)(const Readout&, const KeyRun&);
    // Leaves sum_j p_rj drows_rj by head and query.
    void (*sum_row_gradients)(const Readout&, const ReadoutGradients&, const KeyRun&, float* partial,
                              std::uint32_t* scratch);
    // Writes dk, dv and dbias of its keys. The partials of sum_row_gradients, `count` of them, may be none.
    void (*differentiate)(const Readout&, const ReadoutGradients&, const KeyRun&, const float* row_gradients,
                          std::int64_t count, float* partial, std::uint32_t* scratch);
    // dslopes: by head, the sequence's share.
    void (*write_query_gradients)(const Readout&, const ReadoutGradients&, std::int32_t sequence, const float* partials,
                                  std::int64_t count, double* dslopes);
};

struct ReadoutKernelsByDtype {
    ReadoutKernels float32, bfloat16;
};

}  // namespace maskattn
