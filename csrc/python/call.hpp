// The arguments that attention, readout and token relevance have in common, checked and filled into the problem that a
// driver takes. All functions throw TypeError and ValueError.
#pragma once

#include "dispatch/kernels.hpp"
#include "python/layout.hpp"
#include "python/options.hpp"

namespace maskattn {

using Object = const py::object&;

constexpr std::ptrdiff_t most_rows = 2147483647;  // of a tensor, since indices have 32 bits

// Returns the kernels of an instruction set of this machine, of the best for "".
const Kernels& checked_kernels(const Arguments& arguments, const std::string& instruction_set);

void check_head_width(const Arguments& arguments, std::ptrdiff_t head_width);

// Returns the boundaries of sequences, which must rise from 0, without decreasing, to the `rows` of the argument `of`.
std::vector<std::int32_t> checked_starts(const Arguments& arguments, const char* name, Object value, std::ptrdiff_t rows,
                                         const char* of);

class Call {
  public:
    // Takes the sizes of all axes from the queries and the keys.
    Call(const char* operation, const Layout& layout, Object q, Object k, const py::kwargs& keywords,
         std::initializer_list<const char*> own_options);
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // Fills in q, k, v and the terms of the score.
    void fill_inputs(Attention& problem, Object q, Object k, Object v);
    // Fills in out, lse and its rest: fill_outputs for forward, which writes them, fill_saved for operations that read
    // them.
    void fill_outputs(Attention& problem, Object out, Object lse) const;
    void fill_saved(Attention& problem, Object out, Object lse) const;
    // Fills in the gradients of the outputs and the gradients to be written. Those of the slopes are written by
    // write_slope_gradients, from the sum of each head.
    void fill_gradients(Gradients& gradients, Object grad_out, Object dq, Object dk, Object dv);
    void write_slope_gradients(const std::vector<double>& dslope_H) const;

    std::vector<std::int32_t> starts(const char* name, Object value, std::ptrdiff_t rows, const char* of) const;

    std::ptrdiff_t batch() const { return tensors.size("B"); }
    std::ptrdiff_t heads() const { return tensors.size("H"); }
    std::ptrdiff_t head_width() const { return tensors.size("D"); }
    std::ptrdiff_t queries() const { return tensors.rows(layout_.q); }
    std::ptrdiff_t keys() const { return tensors.rows(layout_.k); }
    bool heads_share_bias() const;

    const Arguments arguments;
    const Options options;
    Tensors tensors;
    const Kernels& kernels;
    const int threads;

  private:
    const char* bias_axes() const { return heads_share_bias() ? layout_.shared_key_bias : layout_.key_bias; }
    const char* axes_of(TermOf of) const;
    void fill_term(const char* name, float& number, TermOf) const;
    void fill_term(const char* name, Strided<const float>& tensor, TermOf of) const;

    const Layout& layout_;
    Strided<float> dslopes_{};
};

}  // namespace maskattn
