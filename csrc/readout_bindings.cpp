// The Python face of readout and token relevance: checks the arguments, releases the GIL, calls the driver.
#include "bindings.hpp"
#include "readout_arguments.hpp"

namespace maskattn {
namespace {

void forward(const py::object& q, const py::object& k, const py::object& v, const py::object& cu_seqlens,
             const py::object& out, const py::object& lse, double scale, const py::object& rows,
             const py::object& lse_rest, const py::object& key_bias, const py::object& coords_q,
             const py::object& coords_k, const py::object& slopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("readout_forward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    ReadoutCall call = checked_readout(arguments, q, k, v, cu_seqlens, options);
    call.readout.out = checked_like_q(arguments, call, "out", out, Use::output);
    call.readout.lse = checked_like_lse(arguments, call, "lse", lse, Use::output);
    if (!lse_rest.is_none())
        call.readout.lse_rest = checked_like_lse(arguments, call, "lse_rest", lse_rest, Use::output);
    if (!rows.is_none()) call.readout.rows = checked_like_rows(arguments, call, "rows", rows, Use::output);
    const py::gil_scoped_release release;
    readout_forward(call.readout, call.starts, *call.kernels, call.threads);
}

Strided<float> checked_dslopes(const Arguments& arguments, const ReadoutCall& call, const py::object& value) {
    if (call.readout.slopes.data == nullptr)
        arguments.refuse("slopes to write dslopes", "None", "pass what forward was given");
    const Array x = arguments.output("dslopes", value, Dtype::float32, Shape{call.heads}, "(H,)");
    return {static_cast<float*>(x.data), 0, x.strides[0], 0};
}

Strided<float> checked_dbias(const Arguments& arguments, const ReadoutCall& call, const py::object& key_bias,
                             const py::object& value) {
    if (key_bias.is_none()) arguments.refuse("key_bias to write dbias", "None", "pass what forward was given");
    const Strided<float> dbias = checked_like_bias(arguments, call, "dbias", value, Use::output);
    const auto axes = [](const py::object& x) { return py::reinterpret_borrow<py::array>(x).ndim(); };
    if (axes(value) != axes(key_bias))
        arguments.refuse("dbias of the shape of key_bias", std::to_string(axes(value)) + " axes", "make them agree");
    return dbias;
}

void backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
              const py::object& out, const py::object& lse, const py::object& cu_seqlens, const py::object& dq,
              const py::object& dk, const py::object& dv, double scale, const py::object& lse_rest,
              const py::object& grad_lse, const py::object& grad_rows, const py::object& key_bias, const py::object& dbias,
              const py::object& coords_q, const py::object& coords_k, const py::object& slopes,
              const py::object& dslopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("readout_backward");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    ReadoutCall call = checked_readout(arguments, q, k, v, cu_seqlens, options);
    call.readout.out = checked_like_q(arguments, call, "out", out, Use::input);
    call.readout.lse = checked_like_lse(arguments, call, "lse", lse, Use::input);
    if (!lse_rest.is_none())
        call.readout.lse_rest = checked_like_lse(arguments, call, "lse_rest", lse_rest, Use::input);
    ReadoutGradients g{};
    g.grad_out = read_only(checked_like_q(arguments, call, "grad_out", grad_out, Use::input));
    g.dq = checked_like_q(arguments, call, "dq", dq, Use::output);
    g.dk = checked_like_k(arguments, call, "dk", dk, Use::output);
    g.dv = checked_like_k(arguments, call, "dv", dv, Use::output);
    if (!grad_lse.is_none())
        g.grad_lse = read_only(checked_like_lse(arguments, call, "grad_lse", grad_lse, Use::input));
    if (!grad_rows.is_none())
        g.grad_rows = read_only(checked_like_rows(arguments, call, "grad_rows", grad_rows, Use::input));
    if (!dbias.is_none()) g.dbias = checked_dbias(arguments, call, key_bias, dbias);
    Strided<float> dslopes_H{};
    if (!dslopes.is_none()) dslopes_H = checked_dslopes(arguments, call, dslopes);

    const py::gil_scoped_release release;
    std::vector<double> sums_H(static_cast<std::size_t>(call.heads));
    readout_backward(call.readout, g, call.starts, *call.kernels, call.threads, sums_H.data());
    if (dslopes_H.data)
        for (std::size_t h = 0; h < sums_H.size(); ++h)
            dslopes_H.data[static_cast<std::ptrdiff_t>(h) * dslopes_H.head] = static_cast<float>(sums_H[h]);
}

// (H, D), with stride 0 over the tokens, or (T, H, D).
Strided<const void> checked_origin(const Arguments& arguments, const ReadoutCall& call, const char* name,
                                   const py::object& value) {
    if (value.is_none()) return {};
    if (py::isinstance<py::array>(value) && py::reinterpret_borrow<py::array>(value).ndim() == 3)
        return read_only(checked_like_k(arguments, call, name, value, Use::input));
    const Array x = arguments.array(name, value, call.dtype, Shape{call.heads, call.head_width}, "(H, D)", 1);
    return {x.data, 0, x.strides[0], 0};
}

void relevance(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
               const py::object& lse, const py::object& grad_out, const py::object& cu_seqlens,
               const py::object& relevance, double scale, const py::object& key_origin, const py::object& value_origin,
               const py::object& key_bias, const py::object& coords_q, const py::object& coords_k,
               const py::object& slopes, int threads, const std::string& instruction_set) {
    const Arguments arguments("token_relevance");
    const Options options{scale, key_bias, coords_q, coords_k, slopes, threads, instruction_set};
    ReadoutCall call = checked_readout(arguments, q, k, v, cu_seqlens, options);
    call.readout.out = checked_like_q(arguments, call, "out", out, Use::input);
    call.readout.lse = checked_like_lse(arguments, call, "lse", lse, Use::input);
    Relevance a{};
    static_cast<Readout&>(a) = call.readout;
    a.key_origin = checked_origin(arguments, call, "key_origin", key_origin);
    a.value_origin = checked_origin(arguments, call, "value_origin", value_origin);
    const Array any = arguments.array("grad_out", grad_out, {call.dtype}, 5, 1);
    a.classes = any.shape[0];
    if (a.classes > std::numeric_limits<std::int32_t>::max())
        arguments.refuse("at most 2147483647 classes", "K=" + std::to_string(a.classes), "split the call");
    const Array grads =
        arguments.array("grad_out", grad_out, call.dtype,
                        Shape{any.shape[0], call.batch, call.queries, call.heads, call.head_width}, "(K, B, R, H, D)", 1);
    a.grad_out = {grads.data, grads.strides[1], grads.strides[3], grads.strides[2]};
    a.grad_out_class = grads.strides[0];
    const Array result =
        arguments.output("relevance", relevance, Dtype::float32, Shape{any.shape[0], call.keys}, "(K, T)", 1);
    a.relevance = static_cast<float*>(result.data);
    a.relevance_class = result.strides[0];
    const py::gil_scoped_release release;
    token_relevance(a, call.starts, *call.kernels, call.threads);
}

}  // namespace

void bind_readout(py::module_& module) {
    const py::none none;
    module.def("readout_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"),
               py::arg("out"), py::arg("lse"), py::arg("scale"), py::kw_only(), py::arg("rows") = none,
               py::arg("lse_rest") = none, py::arg("key_bias") = none, py::arg("coords_q") = none, py::arg("coords_k") = none,
               py::arg("slopes") = none, py::arg("threads") = 0, py::arg("instruction_set") = "",
               "Attention of a few queries of each sequence, written to out, lse and rows; see _native.pyi.");
    module.def("readout_backward", &backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("lse"), py::arg("cu_seqlens"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
               py::arg("scale"), py::kw_only(), py::arg("lse_rest") = none, py::arg("grad_lse") = none,
               py::arg("grad_rows") = none,
               py::arg("key_bias") = none, py::arg("dbias") = none, py::arg("coords_q") = none,
               py::arg("coords_k") = none, py::arg("slopes") = none, py::arg("dslopes") = none, py::arg("threads") = 0,
               py::arg("instruction_set") = "",
               "Gradients of readout_forward, written to dq, dk, dv, dbias and dslopes; see _native.pyi.");
    module.def("token_relevance", &relevance, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
               py::arg("grad_out"), py::arg("cu_seqlens"), py::arg("relevance"), py::arg("scale"), py::kw_only(),
               py::arg("key_origin") = none, py::arg("value_origin") = none, py::arg("key_bias") = none,
               py::arg("coords_q") = none, py::arg("coords_k") = none, py::arg("slopes") = none,
               py::arg("threads") = 0, py::arg("instruction_set") = "",
               "Relevance of every token to every class, written to relevance; see _native.pyi.");
}

}  // namespace maskattn
