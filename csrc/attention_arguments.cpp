#include "attention_arguments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "instruction_sets.hpp"
#include "threads.hpp"

namespace maskattn {
namespace {

constexpr std::ptrdiff_t most_rows = std::numeric_limits<std::int32_t>::max();

Shape shape_of_rows(const Sizes& n, bool of_queries) {
    const std::ptrdiff_t rows = of_queries ? n.queries : n.keys;
    if (n.layout == Layout::packed) return {rows, n.heads, n.head_width};
    return {n.batch, n.heads, rows, n.head_width};
}

const char* name_of_rows(const Sizes& n, bool of_queries) {
    if (n.layout == Layout::packed) return of_queries ? "(Tq, H, D)" : "(Tk, H, D)";
    return of_queries ? "(B, H, Nq, D)" : "(B, H, N, D)";
}

template <class Value>
Strided<Value> strided_rows(const Array& x, Layout layout) {
    if (layout == Layout::packed) return {static_cast<Value*>(x.data), 0, x.strides[1], x.strides[0]};
    return {static_cast<Value*>(x.data), x.strides[0], x.strides[1], x.strides[2]};
}

Strided<float> strided_bias(const Array& x, Layout layout) {
    auto* data = static_cast<float*>(x.data);
    if (layout == Layout::packed) return {data, 0, x.shape.size() == 2 ? x.strides[1] : 0, x.strides[0]};
    if (x.shape.size() == 2) return {data, x.strides[0], 0, x.strides[1]};
    return {data, x.strides[0], x.strides[1], x.strides[2]};
}

Shape shape_of_bias(const Sizes& n, bool shared) {
    if (n.layout == Layout::packed) return shared ? Shape{n.keys} : Shape{n.keys, n.heads};
    return shared ? Shape{n.batch, n.keys} : Shape{n.batch, n.heads, n.keys};
}

const char* name_of_bias(const Sizes& n, bool shared) {
    if (n.layout == Layout::packed) return shared ? "(Tk,)" : "(Tk, H)";
    return shared ? "(B, N)" : "(B, H, N)";
}

void check_key_bias(const Arguments& arguments, Call& call, const py::object& value) {
    if (value.is_none()) return;
    const std::size_t shared_axes = call.sizes.layout == Layout::packed ? 1 : 2;
    if (!py::isinstance<py::array>(value)) arguments.array("key_bias", value, {Dtype::float32}, shared_axes);
    const auto axes = static_cast<std::size_t>(py::reinterpret_borrow<py::array>(value).ndim());
    call.heads_share_bias = axes <= shared_axes;
    const bool shared = call.heads_share_bias;
    const Array bias = arguments.array("key_bias", value, Dtype::float32, shape_of_bias(call.sizes, shared),
                                       name_of_bias(call.sizes, shared));
    const Strided<float> x = strided_bias(bias, call.sizes.layout);
    call.attention.key_bias = {x.data, x.sequence, x.head, x.row};
}

Strided<const float> checked_coords(const Arguments& arguments, const Sizes& n, const char* name,
                                    const py::object& value, std::ptrdiff_t rows, const char* rows_name) {
    if (n.layout == Layout::packed) {
        const std::string shape_name = std::string("(T") + rows_name + ", 2)";
        const Array x = arguments.array(name, value, Dtype::float32, Shape{rows, 2}, shape_name.c_str(), 1);
        return {static_cast<const float*>(x.data), 0, 0, x.strides[0]};
    }
    const std::string shape_name = std::string("(B, N") + (rows_name[0] == 'q' ? "q" : "") + ", 2)";
    const Array x = arguments.array(name, value, Dtype::float32, Shape{n.batch, rows, 2}, shape_name.c_str(), 1);
    return {static_cast<const float*>(x.data), x.strides[0], 0, x.strides[1]};
}

void check_places(const Arguments& arguments, Call& call, const Options& options) {
    const int given = !options.coords_q.is_none() + !options.coords_k.is_none() + !options.slopes.is_none();
    if (given == 0) return;
    if (given < 3)
        arguments.refuse("coords_q, coords_k and slopes together", std::to_string(given) + " of the three",
                         "pass all of them or none");
    const Sizes& n = call.sizes;
    call.attention.coords_q = checked_coords(arguments, n, "coords_q", options.coords_q, n.queries, "q");
    call.attention.coords_k = checked_coords(arguments, n, "coords_k", options.coords_k, n.keys, "k");
    const Array slopes = arguments.array("slopes", options.slopes, Dtype::float32, Shape{n.heads}, "(H,)");
    call.attention.slopes = {static_cast<const float*>(slopes.data), 0, slopes.strides[0], 0};
}

}  // namespace

std::vector<std::int32_t> checked_starts(const Arguments& arguments, const char* name, const py::object& value,
                                         std::ptrdiff_t rows, const char* of) {
    const Array array = arguments.array(name, value, std::vector<Dtype>{Dtype::int32}, 1);
    const std::string called = name;
    if (array.shape[0] == 0) arguments.refuse(called + " of shape (B + 1,)", "no element", "start it with a 0");
    if (array.shape[0] > most_rows)
        arguments.refuse("at most 2147483646 sequences", called + ".shape=" + text_of(array.shape), "split the call");
    std::vector<std::int32_t> starts;
    starts.reserve(static_cast<std::size_t>(array.shape[0]));
    for (std::ptrdiff_t i = 0; i < array.shape[0]; ++i)
        starts.push_back(static_cast<const std::int32_t*>(array.data)[i * array.strides[0]]);
    const auto place = [&](std::size_t i) {
        return called + "[" + std::to_string(i) + "]=" + std::to_string(starts[i]);
    };
    if (starts[0] != 0) arguments.refuse(called + " that starts at 0", place(0), "put a 0 in front");
    for (std::size_t i = 1; i < starts.size(); ++i)
        if (starts[i] < starts[i - 1])
            arguments.refuse(called + " that never decreases", place(i) + " after " + std::to_string(starts[i - 1]),
                             "sum the lengths of the sequences");
    if (starts.back() != rows)
        arguments.refuse(called + " that ends at the " + std::to_string(rows) + " rows of " + of,
                         place(starts.size() - 1), "sum the lengths of all sequences");
    return starts;
}

const Kernels& checked_kernels(const Arguments& arguments, int threads, const std::string& instruction_set) {
    if (threads < 0)
        arguments.refuse("threads >= 0", "threads=" + std::to_string(threads), "0 asks for one per core");
    const Kernels* kernels = kernels_of(instruction_set);
    if (kernels != nullptr) return *kernels;
    std::string usable;
    for (const std::string& name : instruction_sets()) usable += (usable.empty() ? "" : ", ") + name;
    arguments.refuse("an instruction set of this machine", "instruction_set='" + instruction_set + "'",
                     "choose among " + usable + ", or '' for the best");
}

namespace {

void check_sizes(const Arguments& arguments, const Sizes& n) {
    if (n.head_width < 16 || n.head_width > 256 || n.head_width % 8 != 0)
        arguments.refuse("a head width D of 16 to 256 in steps of 8", "D=" + std::to_string(n.head_width),
                         "pad q, k and v with zeros");
    if (n.queries > most_rows || n.keys > most_rows || n.batch > most_rows || n.heads > most_rows ||
        n.batch * n.heads > most_rows)
        arguments.refuse("at most 2147483647 rows of a tensor, and as many heads of all sequences",
                         text_of({n.batch, n.heads, n.queries, n.keys}) + " sequences, heads, queries and keys",
                         "split the call");
}

}  // namespace

Call checked_inputs(const Arguments& arguments, Layout layout, const py::object& q, const py::object& k,
                    const py::object& v, const Options& options) {
    const std::size_t axes = layout == Layout::packed ? 3 : 4;
    const Array q_rows = arguments.array("q", q, {Dtype::float32, Dtype::bfloat16}, axes, 1);
    const Array k_rows = arguments.array("k", k, {q_rows.dtype}, axes, 1);
    Call call{};
    call.dtype = q_rows.dtype;
    const Shape &of_q = q_rows.shape, &of_k = k_rows.shape;
    call.sizes = layout == Layout::packed ? Sizes{layout, 1, of_q[1], of_q[0], of_k[0], of_q[2]}
                                          : Sizes{layout, of_q[0], of_q[1], of_q[2], of_k[2], of_q[3]};
    check_sizes(arguments, call.sizes);
    Attention& a = call.attention;
    a.bfloat16 = call.dtype == Dtype::bfloat16;
    a.head_width = static_cast<int>(call.sizes.head_width);
    a.scale = static_cast<float>(options.scale);
    if (!std::isfinite(a.scale))
        arguments.refuse("a finite scale", "scale=" + std::to_string(options.scale), "1/sqrt(D) is usual");
    a.q = strided_rows<const void>(q_rows, layout);
    const Strided<void> k_checked = checked_rows(arguments, call, "k", k, false, false);
    const Strided<void> v_checked = checked_rows(arguments, call, "v", v, false, false);
    a.k = {k_checked.data, k_checked.sequence, k_checked.head, k_checked.row};
    a.v = {v_checked.data, v_checked.sequence, v_checked.head, v_checked.row};
    check_key_bias(arguments, call, options.key_bias);
    check_places(arguments, call, options);
    const Kernels& kernels = checked_kernels(arguments, options.threads, options.instruction_set);
    call.execution = {&kernels.attention, thread_count(options.threads)};
    return call;
}

void check_packed_sequences(const Arguments& arguments, Call& call, const py::object& cu_seqlens_q,
                            const py::object& cu_seqlens_k) {
    const auto q = checked_starts(arguments, "cu_seqlens_q", cu_seqlens_q, call.sizes.queries, "q");
    const auto k = checked_starts(arguments, "cu_seqlens_k", cu_seqlens_k, call.sizes.keys, "k");
    if (q.size() != k.size())
        arguments.refuse("as many query as key sequences",
                         std::to_string(q.size() - 1) + " and " + std::to_string(k.size() - 1),
                         "repeat a start where a sequence is empty");
    const auto heads = static_cast<std::int32_t>(call.sizes.heads);
    for (std::size_t b = 0; b + 1 < q.size(); ++b)
        for (std::int32_t h = 0; h < heads; ++h)
            call.sequences.pairs.push_back({0, h, {q[b], q[b + 1] - q[b], nullptr}, {k[b], k[b + 1] - k[b], nullptr}});
}

void check_kept_rows(const Arguments& arguments, Call& call, const py::object& keep, bool skip_queries) {
    const Sizes& n = call.sizes;
    const Array mask = arguments.array("keep", keep, Dtype::boolean, Shape{n.batch, n.keys}, "(B, N)");
    if (skip_queries && n.queries != n.keys)
        arguments.refuse("as many queries as keys to skip those of the background",
                         "Nq=" + std::to_string(n.queries) + " and N=" + std::to_string(n.keys),
                         "pass skip_queries=False");
    Sequences& sequences = call.sequences;
    std::vector<std::size_t> starts{0};
    for (std::ptrdiff_t b = 0; b < n.batch; ++b) {
        const auto* row = static_cast<const unsigned char*>(mask.data) + b * mask.strides[0];
        for (std::ptrdiff_t i = 0; i < n.keys; ++i)
            if (row[i * mask.strides[1]]) sequences.kept.push_back(static_cast<std::int32_t>(i));
        starts.push_back(sequences.kept.size());
    }
    // Not null even where nothing is kept: no index would mean all rows in their order.
    sequences.kept.push_back(0);
    sequences.dense = true;
    sequences.rows_q = n.queries;
    sequences.rows_k = n.keys;
    for (std::ptrdiff_t b = 0; b < n.batch; ++b) {
        const auto begin = starts[static_cast<std::size_t>(b)], end = starts[static_cast<std::size_t>(b) + 1];
        const Rows kept{0, static_cast<std::int64_t>(end - begin), sequences.kept.data() + begin};
        for (std::int32_t h = 0; h < static_cast<std::int32_t>(n.heads); ++h)
            sequences.pairs.push_back(
                {static_cast<std::int32_t>(b), h, skip_queries ? kept : Rows{0, n.queries, nullptr}, kept});
    }
}

Strided<void> checked_rows(const Arguments& arguments, const Call& call, const char* name, const py::object& value,
                           bool of_queries, bool is_output) {
    const Shape shape = shape_of_rows(call.sizes, of_queries);
    const char* shape_name = name_of_rows(call.sizes, of_queries);
    const Array x = is_output ? arguments.output(name, value, call.dtype, shape, shape_name, 1)
                              : arguments.array(name, value, call.dtype, shape, shape_name, 1);
    return strided_rows<void>(x, call.sizes.layout);
}

Strided<float> checked_lse(const Arguments& arguments, const Call& call, const char* name, const py::object& value,
                           bool is_output) {
    const Sizes& n = call.sizes;
    const bool packed = n.layout == Layout::packed;
    const Shape shape = packed ? Shape{n.heads, n.queries} : Shape{n.batch, n.heads, n.queries};
    const char* shape_name = packed ? "(H, Tq)" : "(B, H, Nq)";
    const Array x = is_output ? arguments.output(name, value, Dtype::float32, shape, shape_name)
                              : arguments.array(name, value, Dtype::float32, shape, shape_name);
    auto* data = static_cast<float*>(x.data);
    if (packed) return {data, 0, x.strides[0], x.strides[1]};
    return {data, x.strides[0], x.strides[1], x.strides[2]};
}

Strided<float> checked_dbias(const Arguments& arguments, const Call& call, const py::object& value) {
    if (call.attention.key_bias.data == nullptr)
        arguments.refuse("key_bias to write dbias", "None", "pass what forward was given");
    const Array x = arguments.output("dbias", value, Dtype::float32, shape_of_bias(call.sizes, call.heads_share_bias),
                                     name_of_bias(call.sizes, call.heads_share_bias));
    return strided_bias(x, call.sizes.layout);
}

}  // namespace maskattn
