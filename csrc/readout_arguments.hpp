// Python arguments of readout and token relevance -> the checked problem that the driver takes.
#pragma once

#include "attention_arguments.hpp"
#include "readout_driver.hpp"

namespace maskattn {

// A call whose arguments have passed their checks.
struct ReadoutCall {
    std::ptrdiff_t batch, queries, heads, keys, head_width;
    Dtype dtype;
    Readout readout;
    std::vector<std::int32_t> starts;
    const Kernels* kernels;
    int threads;
};

// Everything but out, lse and rows. Throws TypeError and ValueError.
ReadoutCall checked_readout(const Arguments& arguments, const py::object& q, const py::object& k, const py::object& v,
                            const py::object& cu_seqlens, const Options& options);

enum class Use { input, output };

// Tensors like q (B, R, H, D), like k (T, H, D), like lse (B, R, H), like rows (R, H, T) and like key_bias.
Strided<void> checked_like_q(const Arguments&, const ReadoutCall&, const char* name, const py::object& value, Use use);
Strided<void> checked_like_k(const Arguments&, const ReadoutCall&, const char* name, const py::object& value, Use use);
Strided<float> checked_like_lse(const Arguments&, const ReadoutCall&, const char* name, const py::object& value, Use use);
Strided<float> checked_like_rows(const Arguments&, const ReadoutCall&, const char* name, const py::object& value,
                                 Use use);
Strided<float> checked_like_bias(const Arguments&, const ReadoutCall&, const char* name, const py::object& value,
                                 Use use);

template <class Value>
Strided<const Value> read_only(const Strided<Value>& x) {
    return {x.data, x.sequence, x.head, x.row};
}

}  // namespace maskattn
