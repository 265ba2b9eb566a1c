#include "readout_arguments.hpp"

#include <cmath>
#include <limits>

#include "threads.hpp"

namespace maskattn {
namespace {

constexpr std::ptrdiff_t most = std::numeric_limits<std::int32_t>::max();

Array checked(const Arguments& arguments, const char* name, const py::object& value, Dtype dtype, const Shape& shape,
              const char* shape_name, Use use, std::size_t contiguous) {
    return use == Use::output ? arguments.output(name, value, dtype, shape, shape_name, contiguous)
                              : arguments.array(name, value, dtype, shape, shape_name, contiguous);
}

void check_sizes(const Arguments& arguments, const ReadoutCall& call) {
    if (call.head_width < 16 || call.head_width > 256 || call.head_width % 8 != 0)
        arguments.refuse("a head width D of 16 to 256 in steps of 8", "D=" + std::to_string(call.head_width),
                         "pad q, k and v with zeros");
    if (call.queries < 1 || call.queries > most_queries)
        arguments.refuse("1 to 16 queries R of a sequence", "R=" + std::to_string(call.queries),
                         "take attention for more");
    if (call.keys > most || call.batch >= most || call.heads > most / (most_queries * 256))
        arguments.refuse("at most 2147483647 keys and sequences and 524287 heads",
                         text_of({call.batch, call.heads, call.keys}) + " sequences, heads and keys", "split the call");
}

void check_coords(const Arguments& arguments, ReadoutCall& call, const Options& options) {
    const int given = !options.coords_q.is_none() + !options.coords_k.is_none() + !options.slopes.is_none();
    if (given == 0) return;
    if (given < 3)
        arguments.refuse("coords_q, coords_k and slopes together", std::to_string(given) + " of the three",
                         "pass all of them or none");
    const auto floats = [](const Array& x) { return static_cast<const float*>(x.data); };
    const Array q = arguments.array("coords_q", options.coords_q, Dtype::float32, Shape{call.batch, call.queries, 2},
                                    "(B, R, 2)", 1);
    const Array k = arguments.array("coords_k", options.coords_k, Dtype::float32, Shape{call.keys, 2}, "(T, 2)", 1);
    const Array slopes = arguments.array("slopes", options.slopes, Dtype::float32, Shape{call.heads}, "(H,)");
    call.readout.coords_q = {floats(q), q.strides[0], 0, q.strides[1]};
    call.readout.coords_k = {floats(k), 0, 0, k.strides[0]};
    call.readout.slopes = {floats(slopes), 0, slopes.strides[0], 0};
}

}  // namespace

Strided<void> checked_like_q(const Arguments& arguments, const ReadoutCall& call, const char* name,
                             const py::object& value, Use use) {
    const Shape shape{call.batch, call.queries, call.heads, call.head_width};
    const Array x = checked(arguments, name, value, call.dtype, shape, "(B, R, H, D)", use, 1);
    return {x.data, x.strides[0], x.strides[2], x.strides[1]};
}

Strided<void> checked_like_k(const Arguments& arguments, const ReadoutCall& call, const char* name,
                             const py::object& value, Use use) {
    const Shape shape{call.keys, call.heads, call.head_width};
    const Array x = checked(arguments, name, value, call.dtype, shape, "(T, H, D)", use, 1);
    return {x.data, 0, x.strides[1], x.strides[0]};
}

Strided<float> checked_like_lse(const Arguments& arguments, const ReadoutCall& call, const char* name,
                                const py::object& value, Use use) {
    const Shape shape{call.batch, call.queries, call.heads};
    const Array x = checked(arguments, name, value, Dtype::float32, shape, "(B, R, H)", use, 0);
    return {static_cast<float*>(x.data), x.strides[0], x.strides[2], x.strides[1]};
}

Strided<float> checked_like_rows(const Arguments& arguments, const ReadoutCall& call, const char* name,
                                 const py::object& value, Use use) {
    const Shape shape{call.queries, call.heads, call.keys};
    const Array x = checked(arguments, name, value, Dtype::float32, shape, "(R, H, T)", use, 1);
    return {static_cast<float*>(x.data), 0, x.strides[1], x.strides[0]};
}

Strided<float> checked_like_bias(const Arguments& arguments, const ReadoutCall& call, const char* name,
                                 const py::object& value, Use use) {
    const bool shared = !py::isinstance<py::array>(value) || py::reinterpret_borrow<py::array>(value).ndim() == 1;
    const Shape shape = shared ? Shape{call.keys} : Shape{call.keys, call.heads};
    const Array x = checked(arguments, name, value, Dtype::float32, shape, shared ? "(T,)" : "(T, H)", use, 0);
    return {static_cast<float*>(x.data), 0, shared ? 0 : x.strides[1], x.strides[0]};
}

ReadoutCall checked_readout(const Arguments& arguments, const py::object& q, const py::object& k, const py::object& v,
                            const py::object& cu_seqlens, const Options& options) {
    const Array q_rows = arguments.array("q", q, {Dtype::float32, Dtype::bfloat16}, 4, 1);
    const Array k_rows = arguments.array("k", k, {q_rows.dtype}, 3, 1);
    ReadoutCall call{};
    call.batch = q_rows.shape[0];
    call.queries = q_rows.shape[1];
    call.heads = q_rows.shape[2];
    call.head_width = q_rows.shape[3];
    call.keys = k_rows.shape[0];
    call.dtype = q_rows.dtype;
    check_sizes(arguments, call);
    Readout& a = call.readout;
    a.bfloat16 = call.dtype == Dtype::bfloat16;
    a.head_width = static_cast<int>(call.head_width);
    a.heads = static_cast<int>(call.heads);
    a.queries = static_cast<int>(call.queries);
    a.scale = static_cast<float>(options.scale);
    if (!std::isfinite(a.scale))
        arguments.refuse("a finite scale", "scale=" + std::to_string(options.scale), "1/sqrt(D) is usual");
    a.q = read_only(checked_like_q(arguments, call, "q", q, Use::input));
    a.k = read_only(checked_like_k(arguments, call, "k", k, Use::input));
    a.v = read_only(checked_like_k(arguments, call, "v", v, Use::input));
    if (!options.key_bias.is_none())
        a.key_bias = read_only(checked_like_bias(arguments, call, "key_bias", options.key_bias, Use::input));
    check_coords(arguments, call, options);
    call.starts = checked_starts(arguments, "cu_seqlens", cu_seqlens, call.keys, "k");
    const auto sequences = static_cast<std::ptrdiff_t>(call.starts.size()) - 1;
    if (sequences != call.batch)
        arguments.refuse("as many key sequences as q has",
                         std::to_string(sequences) + " in cu_seqlens and q.shape=" + text_of(q_rows.shape),
                         "repeat a start where a sequence is empty");
    call.kernels = &checked_kernels(arguments, options.threads, options.instruction_set);
    call.threads = thread_count(options.threads);
    return call;
}

}  // namespace maskattn
