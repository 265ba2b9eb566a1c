// The bindings of attention, which check the arguments, release the GIL and call the driver.
#include <pybind11/stl.h>

#include "attention/driver.hpp"
#include "dispatch/instruction_sets.hpp"
#include "python/bindings.hpp"
#include "python/call.hpp"

namespace maskattn {
namespace {

// Further arguments of backward: the results of forward, the gradient of out, and the gradients to be written.
struct Backward {
    Object grad_out, out, lse, dq, dk, dv;
};

Attention checked_problem(Call& call, Object q, Object k, Object v) {
    const std::ptrdiff_t batch = call.batch(), heads = call.heads(), queries = call.queries(), keys = call.keys();
    if (queries > most_rows || keys > most_rows || batch > most_rows || heads > most_rows || batch * heads > most_rows)
        call.arguments.refuse("at most 2147483647 rows of a tensor, and as many heads of all sequences",
                              text_of({batch, heads, queries, keys}) + " sequences, heads, queries and keys",
                              "split the call");
    Attention problem{};
    call.fill_inputs(problem, q, k, v);
    return problem;
}

Sequences packed_sequences(const Call& call, Object cu_seqlens_q, Object cu_seqlens_k) {
    const auto q = call.starts("cu_seqlens_q", cu_seqlens_q, call.queries(), "q");
    const auto k = call.starts("cu_seqlens_k", cu_seqlens_k, call.keys(), "k");
    if (q.size() != k.size())
        call.arguments.refuse("as many query as key sequences",
                              std::to_string(q.size() - 1) + " and " + std::to_string(k.size() - 1),
                              "repeat a start where a sequence is empty");
    Sequences sequences;
    for (std::size_t b = 0; b + 1 < q.size(); ++b)
        for (std::int32_t h = 0; h < static_cast<std::int32_t>(call.heads()); ++h)
            sequences.heads.push_back({0, h, {q[b], q[b + 1] - q[b], nullptr}, {k[b], k[b + 1] - k[b], nullptr}});
    return sequences;
}

Sequences kept_sequences(const Call& call, Object keep) {
    const std::ptrdiff_t batch = call.batch(), queries = call.queries(), keys = call.keys();
    const bool skip_queries = call.options.value("skip_queries", true, "a bool");
    const Array mask = call.tensors.array("keep", keep, Dtype::boolean, "B N");
    if (skip_queries && queries != keys)
        call.arguments.refuse("as many queries as keys to skip those of the background",
                              "Nq=" + std::to_string(queries) + " and N=" + std::to_string(keys),
                              "pass skip_queries=False");
    Sequences sequences;
    std::vector<std::size_t> starts{0};
    for (std::ptrdiff_t b = 0; b < batch; ++b) {
        const auto* row = static_cast<const unsigned char*>(mask.data) + b * mask.strides[0];
        for (std::ptrdiff_t i = 0; i < keys; ++i)
            if (row[i * mask.strides[1]]) sequences.kept.push_back(static_cast<std::int32_t>(i));
        starts.push_back(sequences.kept.size());
    }
    // Not null even if nothing is kept, since a null index means all tokens.
    sequences.kept.push_back(0);
    sequences.dense = true;
    sequences.rows_q = queries;
    sequences.rows_k = keys;
    for (std::ptrdiff_t b = 0; b < batch; ++b) {
        const auto begin = starts[static_cast<std::size_t>(b)], end = starts[static_cast<std::size_t>(b) + 1];
        const Tokens kept{0, static_cast<std::int64_t>(end - begin), sequences.kept.data() + begin};
        for (std::int32_t h = 0; h < static_cast<std::int32_t>(call.heads()); ++h)
            sequences.heads.push_back(
                {static_cast<std::int32_t>(b), h, skip_queries ? kept : Tokens{0, queries, nullptr}, kept});
    }
    return sequences;
}

void forward(const Call& call, Attention& problem, const Sequences& sequences, Object out, Object lse) {
    call.fill_outputs(problem, out, lse);
    const py::gil_scoped_release release;
    attention_forward(problem, sequences, {&call.kernels.attention, call.threads});
}

// Sums the heads' gradients of a bias that they share, in the order of the heads.
void sum_over_heads(const Call& call, const std::vector<float>& by_head, const Strided<float>& dbias) {
    const std::ptrdiff_t heads = call.heads(), keys = call.keys();
    for (std::ptrdiff_t b = 0; b < call.batch(); ++b)
        for (std::ptrdiff_t j = 0; j < keys; ++j) {
            float total = 0.0f;
            for (std::ptrdiff_t h = 0; h < heads; ++h)
                total += by_head[static_cast<std::size_t>((b * heads + h) * keys + j)];
            dbias.data[b * dbias.sequence + j * dbias.row] = total;
        }
}

void backward(Call& call, Attention& problem, const Sequences& sequences, const Backward& arrays) {
    call.fill_saved(problem, arrays.out, arrays.lse);
    Gradients gradients{};
    call.fill_gradients(gradients, arrays.grad_out, arrays.dq, arrays.dk, arrays.dv);
    const Strided<float> dbias = gradients.dbias;
    const bool sums_heads = dbias.data != nullptr && call.heads_share_bias();
    const py::gil_scoped_release release;
    const std::ptrdiff_t heads = call.heads(), keys = call.keys();
    std::vector<float> dbias_by_head(sums_heads ? static_cast<std::size_t>(call.batch() * heads * keys) : 0);
    if (sums_heads) gradients.dbias = {dbias_by_head.data(), heads * keys, keys, 1};
    std::vector<double> dslope_H(static_cast<std::size_t>(heads), 0.0);
    attention_backward(problem, gradients, sequences, {&call.kernels.attention, call.threads}, dslope_H.data());
    if (sums_heads) sum_over_heads(call, dbias_by_head, dbias);
    call.write_slope_gradients(dslope_H);
}

void packed_forward(Object q, Object k, Object v, Object cu_seqlens_q, Object cu_seqlens_k, Object out, Object lse,
                    const py::kwargs& keywords) {
    Call call("attention_forward", packed_layout, q, k, keywords, {"lse_rest"});
    Attention problem = checked_problem(call, q, k, v);
    forward(call, problem, packed_sequences(call, cu_seqlens_q, cu_seqlens_k), out, lse);
}

void masked_forward(Object q, Object k, Object v, Object keep, Object out, Object lse, const py::kwargs& keywords) {
    Call call("masked_attention_forward", dense_layout, q, k, keywords, {"skip_queries", "lse_rest"});
    Attention problem = checked_problem(call, q, k, v);
    forward(call, problem, kept_sequences(call, keep), out, lse);
}

void packed_backward(Object grad_out, Object q, Object k, Object v, Object out, Object lse, Object cu_seqlens_q,
                     Object cu_seqlens_k, Object dq, Object dk, Object dv, const py::kwargs& keywords) {
    Call call("attention_backward", packed_layout, q, k, keywords, {"lse_rest", "grad_lse", "dbias", "dslopes"});
    Attention problem = checked_problem(call, q, k, v);
    backward(call, problem, packed_sequences(call, cu_seqlens_q, cu_seqlens_k), {grad_out, out, lse, dq, dk, dv});
}

void masked_backward(Object grad_out, Object q, Object k, Object v, Object out, Object lse, Object keep, Object dq,
                     Object dk, Object dv, const py::kwargs& keywords) {
    Call call("masked_attention_backward", dense_layout, q, k, keywords,
              {"skip_queries", "lse_rest", "grad_lse", "dbias", "dslopes"});
    Attention problem = checked_problem(call, q, k, v);
    backward(call, problem, kept_sequences(call, keep), {grad_out, out, lse, dq, dk, dv});
}

}  // namespace

void bind_attention(py::module_& module) {
    module.def("instruction_sets", &instruction_sets, "Names of the instruction sets usable here, best first.");
    module.def("attention_forward", &packed_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens_q"),
               py::arg("cu_seqlens_k"), py::arg("out"), py::arg("lse"),
               "Attention of packed sequences, written to out and lse; see _native.pyi.");
    module.def("masked_attention_forward", &masked_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("keep"),
               py::arg("out"), py::arg("lse"),
               "Attention of dense tensors over their kept keys, written to out and lse; see _native.pyi.");
    module.def("attention_backward", &packed_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("dq"),
               py::arg("dk"), py::arg("dv"),
               "Gradients of attention_forward, written to dq, dk, dv, dbias and dslopes; see _native.pyi.");
    module.def("masked_attention_backward", &masked_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"),
               py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("keep"), py::arg("dq"), py::arg("dk"),
               py::arg("dv"),
               "Gradients of masked_attention_forward, 0 in the background; see _native.pyi.");
}

}  // namespace maskattn
