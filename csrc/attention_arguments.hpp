// Python arguments of the attention operations -> the checked problem that the driver takes.
#pragma once

#include <string>

#include "arrays.hpp"
#include "attention_driver.hpp"

namespace maskattn {

// What both layouts and both passes take beside q, k and v; absent arrays are None.
struct Options {
    double scale;
    py::object key_bias, coords_q, coords_k, slopes;
    int threads;
    std::string instruction_set;
};

enum class Layout { packed, dense };  // (T, H, D) and (B, H, N, D)

struct Sizes {
    Layout layout;
    std::ptrdiff_t batch, heads, queries, keys, head_width;  // batch is 1 if packed
};

// A call whose arguments have passed their checks.
struct Call {
    Sizes sizes;
    Dtype dtype;
    Attention attention;
    Sequences sequences;
    Execution execution;
    bool heads_share_bias;
};

// cu_seqlens as it must be: from 0, never decreasing, to the `rows` of the argument called `of`.
std::vector<std::int32_t> checked_starts(const Arguments& arguments, const char* name, const py::object& value,
                                         std::ptrdiff_t rows, const char* of);

// Those of an instruction set of this machine, the best for "".
const Kernels& checked_kernels(const Arguments& arguments, int threads, const std::string& instruction_set);

// Everything but out, lse and the sequences. Throws TypeError and ValueError.
Call checked_inputs(const Arguments& arguments, Layout layout, const py::object& q, const py::object& k,
                    const py::object& v, const Options& options);

// Fills call.sequences.
void check_packed_sequences(const Arguments& arguments, Call& call, const py::object& cu_seqlens_q,
                            const py::object& cu_seqlens_k);
void check_kept_rows(const Arguments& arguments, Call& call, const py::object& keep, bool skip_queries);

// Tensors like q (of_queries) or k, and like lse.
Strided<void> checked_rows(const Arguments& arguments, const Call& call, const char* name, const py::object& value,
                           bool of_queries, bool is_output);
Strided<float> checked_lse(const Arguments& arguments, const Call& call, const char* name, const py::object& value,
                           bool is_output);
// Like key_bias.
Strided<float> checked_dbias(const Arguments& arguments, const Call& call, const py::object& value);

}  // namespace maskattn
