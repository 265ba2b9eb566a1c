// The Python face of attention: checks the arguments, releases the GIL, calls the driver.
#include <pybind11/stl.h>

#include "attention_arguments.hpp"
#include "bindings.hpp"
#include "instruction_sets.hpp"

namespace maskattn {
namespace {

Strided<const void> read_only(const Strided<void>& x) { return {x.data, x.sequence, x.head, x.row}; }
Strided<const float> read_only(const Strided<float>& x) { return {x.data, x.sequence, x.head, x.row}; }

void forward(const Arguments& arguments, Call& call, const py::object& out, const py::object& lse,
             const py::object& lse_rest) {
    call.attention.out = checked_rows(arguments, call, "out", out, true, true);
    call.attention.lse = checked_lse(arguments, call, "lse", lse, true);
    if (!lse_rest.is_none()) call.attention.lse_rest = checked_lse(arguments, call, "lse_rest", lse_rest, true);
    const py::gil_scoped_release release;
    attention_forward(call.attention, call.sequences, call.execution);
}

// Arrays of the backward pass by their names in Python.
struct BackwardArrays {
    py::object grad_out, out, lse, lse_rest, dq, dk, dv, grad_lse, dbias, dslopes;
};

// The heads' shares of a bias that they have in common, summed in their order.
void sum_over_heads(const std::vector<float>& by_head, const Sizes& n, const Strided<float>& dbias) {
    for (std::ptrdiff_t b = 0; b < n.batch; ++b)
        for (std::ptrdiff_t j = 0; j < n.keys; ++j) {
            float total = 0.0f;
            for (std::ptrdiff_t h = 0; h < n.heads; ++h)
                total += by_head[static_cast<std::size_t>((b * n.heads + h) * n.keys + j)];
            dbias.data[b * dbias.sequence + j * dbias.row] = total;
        }
}

void backward(const Arguments& arguments, Call& call, const BackwardArrays& arrays) {
    const Sizes& n = call.sizes;
    call.attention.out = checked_rows(arguments, call, "out", arrays.out, true, false);
    call.attention.lse = checked_lse(arguments, call, "lse", arrays.lse, false);
    if (!arrays.lse_rest.is_none())
        call.attention.lse_rest = checked_lse(arguments, call, "lse_rest", arrays.lse_rest, false);
    Gradients g{};
    g.grad_out = read_only(checked_rows(arguments, call, "grad_out", arrays.grad_out, true, false));
    g.dq = checked_rows(arguments, call, "dq", arrays.dq, true, true);
    g.dk = checked_rows(arguments, call, "dk", arrays.dk, false, true);
    g.dv = checked_rows(arguments, call, "dv", arrays.dv, false, true);
    if (!arrays.grad_lse.is_none())
        g.grad_lse = read_only(checked_lse(arguments, call, "grad_lse", arrays.grad_lse, false));
    Strided<float> dbias{};
    if (!arrays.dbias.is_none()) dbias = checked_dbias(arguments, call, arrays.dbias);
    Strided<float> dslopes{};
    if (!arrays.dslopes.is_none()) {
        if (call.attention.slopes.data == nullptr)
            arguments.refuse("slopes to write dslopes", "None", "pass what forward was given");
        const Array x = arguments.output("dslopes", arrays.dslopes, Dtype::float32, Shape{n.heads}, "(H,)");
        dslopes = {static_cast<float*>(x.data), 0, x.strides[0], 0};
    }

    const py::gil_scoped_release release;
    std::vector<double> dslope_H(static_cast<std::size_t>(n.heads), 0.0);
    std::vector<float> dbias_by_head;
    g.dbias = dbias;
    if (dbias.data && call.heads_share_bias) {
        dbias_by_head.resize(static_cast<std::size_t>(n.batch * n.heads * n.keys));
        g.dbias = {dbias_by_head.data(), n.heads * n.keys, n.keys, 1};
    }
    attention_backward(call.attention, g, call.sequences, call.execution, dslope_H.data());
    if (dbias.data && call.heads_share_bias) sum_over_heads(dbias_by_head, n, dbias);
    if (dslopes.data)
        for (std::ptrdiff_t h = 0; h < n.heads; ++h)
            dslopes.data[h * dslopes.head] = static_cast<float>(dslope_H[static_cast<std::size_t>(h)]);
}

void packed_forward(const py::object& q, const py::object& k, const py::object& v, const py::object& cu_seqlens_q,
                    const py::object& cu_seqlens_k, const py::object& out, const py::object& lse, double scale,
                    const py::object& lse_rest, const py::object& key_bias, const py::object& coords_q,
                    const py::object& coords_k, const py::object& slopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("attention_forward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    Call call = checked_inputs(arguments, Layout::packed, q, k, v, options);
    check_packed_sequences(arguments, call, cu_seqlens_q, cu_seqlens_k);
    forward(arguments, call, out, lse, lse_rest);
}

void masked_forward(const py::object& q, const py::object& k, const py::object& v, const py::object& keep,
                    const py::object& out, const py::object& lse, double scale, bool skip_queries,
                    const py::object& lse_rest, const py::object& key_bias, const py::object& coords_q, const py::object& coords_k,
                    const py::object& slopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("masked_attention_forward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    Call call = checked_inputs(arguments, Layout::dense, q, k, v, options);
    check_kept_rows(arguments, call, keep, skip_queries);
    forward(arguments, call, out, lse, lse_rest);
}

void packed_backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
                     const py::object& out, const py::object& lse, const py::object& cu_seqlens_q,
                     const py::object& cu_seqlens_k, const py::object& dq, const py::object& dk, const py::object& dv,
                     double scale, const py::object& lse_rest, const py::object& grad_lse, const py::object& key_bias, const py::object& dbias,
                     const py::object& coords_q, const py::object& coords_k, const py::object& slopes,
                     const py::object& dslopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("attention_backward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    Call call = checked_inputs(arguments, Layout::packed, q, k, v, options);
    check_packed_sequences(arguments, call, cu_seqlens_q, cu_seqlens_k);
    backward(arguments, call, {grad_out, out, lse, lse_rest, dq, dk, dv, grad_lse, dbias, dslopes});
}

void masked_backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
                     const py::object& out, const py::object& lse, const py::object& keep, const py::object& dq,
                     const py::object& dk, const py::object& dv, double scale, bool skip_queries,
                     const py::object& lse_rest, const py::object& grad_lse, const py::object& key_bias, const py::object& dbias,
                     const py::object& coords_q, const py::object& coords_k, const py::object& slopes,
                     const py::object& dslopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("masked_attention_backward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    Call call = checked_inputs(arguments, Layout::dense, q, k, v, options);
    check_kept_rows(arguments, call, keep, skip_queries);
    backward(arguments, call, {grad_out, out, lse, lse_rest, dq, dk, dv, grad_lse, dbias, dslopes});
}

}  // namespace

void bind_attention(py::module_& module) {
    const py::none none;
    module.def("instruction_sets", &instruction_sets, "Names of the instruction sets usable here, best first.");
    module.def("attention_forward", &packed_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens_q"),
               py::arg("cu_seqlens_k"), py::arg("out"), py::arg("lse"), py::arg("scale"), py::kw_only(),
               py::arg("lse_rest") = none, py::arg("key_bias") = none, py::arg("coords_q") = none, py::arg("coords_k") = none,
               py::arg("slopes") = none, py::arg("threads") = 0, py::arg("instruction_set") = "",
               "Attention of packed sequences, written to out and lse; see _native.pyi.");
    module.def("masked_attention_forward", &masked_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("keep"),
               py::arg("out"), py::arg("lse"), py::arg("scale"), py::kw_only(), py::arg("skip_queries") = true,
               py::arg("lse_rest") = none, py::arg("key_bias") = none, py::arg("coords_q") = none, py::arg("coords_k") = none,
               py::arg("slopes") = none, py::arg("threads") = 0, py::arg("instruction_set") = "",
               "Attention of dense tensors over their kept keys, written to out and lse; see _native.pyi.");
    module.def("attention_backward", &packed_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("dq"),
               py::arg("dk"), py::arg("dv"), py::arg("scale"), py::kw_only(), py::arg("lse_rest") = none, py::arg("grad_lse") = none,
               py::arg("key_bias") = none, py::arg("dbias") = none, py::arg("coords_q") = none,
               py::arg("coords_k") = none, py::arg("slopes") = none, py::arg("dslopes") = none, py::arg("threads") = 0,
               py::arg("instruction_set") = "",
               "Gradients of attention_forward, written to dq, dk, dv, dbias and dslopes; see _native.pyi.");
    module.def("masked_attention_backward", &masked_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"),
               py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("keep"), py::arg("dq"), py::arg("dk"),
               py::arg("dv"), py::arg("scale"), py::kw_only(), py::arg("skip_queries") = true,
               py::arg("lse_rest") = none, py::arg("grad_lse") = none, py::arg("key_bias") = none, py::arg("dbias") = none,
               py::arg("coords_q") = none, py::arg("coords_k") = none, py::arg("slopes") = none,
               py::arg("dslopes") = none, py::arg("threads") = 0, py::arg("instruction_set") = "",
               "Gradients of masked_attention_forward, 0 in the background; see _native.pyi.");
}

}  // namespace maskattn
