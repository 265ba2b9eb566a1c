// The bindings of readout and token relevance, which check the arguments, release the GIL and call the driver.
#include "python/bindings.hpp"
#include "python/call.hpp"
#include "readout/driver.hpp"

namespace maskattn {
namespace {

Readout checked_problem(Call& call, Object q, Object k, Object v) {
    const std::ptrdiff_t batch = call.batch(), heads = call.heads(), queries = call.queries(), keys = call.keys();
    if (queries < 1 || queries > most_queries)
        call.arguments.refuse("1 to 16 queries R of a sequence", "R=" + std::to_string(queries),
                              "take attention for more");
    if (keys > most_rows || batch >= most_rows || heads > most_rows / (most_queries * most_head_width))
        call.arguments.refuse("at most 2147483647 keys and sequences and 524287 heads",
                              text_of({batch, heads, keys}) + " sequences, heads and keys", "split the call");
    Readout problem{};
    problem.heads = static_cast<int>(heads);
    problem.queries = static_cast<int>(queries);
    call.fill_inputs(problem, q, k, v);
    return problem;
}

std::vector<std::int32_t> starts_of(const Call& call, Object cu_seqlens) {
    const auto starts = call.starts("cu_seqlens", cu_seqlens, call.keys(), "k");
    const auto sequences = static_cast<std::ptrdiff_t>(starts.size()) - 1;
    if (sequences != call.batch())
        call.arguments.refuse("as many key sequences as q has",
                              std::to_string(sequences) + " in cu_seqlens and " + std::to_string(call.batch()) + " in q",
                              "repeat a start where a sequence is empty");
    return starts;
}

void forward(Object q, Object k, Object v, Object cu_seqlens, Object out, Object lse,
             const py::kwargs& keywords) {
    Call call("readout_forward", readout_layout, q, k, keywords, {"lse_rest", "rows"});
    Readout problem = checked_problem(call, q, k, v);
    const auto starts = starts_of(call, cu_seqlens);
    call.fill_outputs(problem, out, lse);
    problem.rows = call.tensors.output_if_given<float>("rows", call.options["rows"], "R H [T]");
    const py::gil_scoped_release release;
    readout_forward(problem, starts, call.kernels, call.threads);
}

void backward(Object grad_out, Object q, Object k, Object v, Object out, Object lse, Object cu_seqlens, Object dq,
              Object dk, Object dv, const py::kwargs& keywords) {
    Call call("readout_backward", readout_layout, q, k, keywords,
              {"lse_rest", "grad_lse", "grad_rows", "dbias", "dslopes"});
    Readout problem = checked_problem(call, q, k, v);
    const auto starts = starts_of(call, cu_seqlens);
    call.fill_saved(problem, out, lse);
    ReadoutGradients gradients{};
    call.fill_gradients(gradients, grad_out, dq, dk, dv);
    gradients.grad_rows =
        call.tensors.input_if_given<const float>("grad_rows", call.options["grad_rows"], "R H [T]");
    const py::gil_scoped_release release;
    std::vector<double> dslope_H(static_cast<std::size_t>(call.heads()));
    readout_backward(problem, gradients, starts, call.kernels, call.threads, dslope_H.data());
    call.write_slope_gradients(dslope_H);
}

// Checks an origin: (H, D) for all tokens, with stride 0 over them, or (T, H, D).
Strided<const void> checked_origin(const Call& call, const char* name, Object value) {
    const bool each = axes_of_array(value) == 3;
    return call.tensors.input_if_given<const void>(name, value, each ? "T H [D]" : "H [D]");
}

void relevance(Object q, Object k, Object v, Object out, Object lse, Object grad_out, Object cu_seqlens,
               Object relevance, const py::kwargs& keywords) {
    Call call("token_relevance", readout_layout, q, k, keywords, {"key_origin", "value_origin"});
    Relevance problem{};
    static_cast<Readout&>(problem) = checked_problem(call, q, k, v);
    const auto starts = starts_of(call, cu_seqlens);
    call.fill_saved(problem, out, lse);
    problem.key_origin = checked_origin(call, "key_origin", call.options["key_origin"]);
    problem.value_origin = checked_origin(call, "value_origin", call.options["value_origin"]);
    problem.classes = call.arguments.array("grad_out", grad_out, {call.tensors.dtype()}, 5, 1).shape[0];
    if (problem.classes > most_rows)
        call.arguments.refuse("at most 2147483647 classes", "K=" + std::to_string(problem.classes), "split the call");
    call.tensors.set_size("K", problem.classes);
    const char* axes_of_gradients = "K B R H [D]";
    const Array grads = call.tensors.array("grad_out", grad_out, call.tensors.dtype(), axes_of_gradients);
    problem.grad_out = Tensors::strided<const void>(grads, Axes(axes_of_gradients));
    problem.grad_out_class = grads.strides[0];
    const Array result = call.tensors.output_array("relevance", relevance, Dtype::float32, "K [T]");
    problem.relevance = static_cast<float*>(result.data);
    problem.relevance_class = result.strides[0];
    const py::gil_scoped_release release;
    token_relevance(problem, starts, call.kernels, call.threads);
}

}  // namespace

void bind_readout(py::module_& module) {
    module.def("readout_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"),
               py::arg("out"), py::arg("lse"),
               "Attention of a few queries of each sequence, written to out, lse and rows; see _native.pyi.");
    module.def("readout_backward", &backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("lse"), py::arg("cu_seqlens"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
               "Gradients of readout_forward, written to dq, dk, dv, dbias and dslopes; see _native.pyi.");
    module.def("token_relevance", &relevance, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
               py::arg("grad_out"), py::arg("cu_seqlens"), py::arg("relevance"),
               "Relevance of every token to every class, written to relevance; see _native.pyi.");
}

}  // namespace maskattn
