// The bindings of packing, which check the arguments, release the GIL and call the plain C++.
#include <algorithm>
#include <limits>

#include "python/arrays.hpp"
#include "python/bindings.hpp"
#include "packing/row_moves.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

void move(const py::object& source, const py::object& index, const py::object& result, int threads) {
    const Arguments arguments("move_rows");
    const Array from = arguments.array("source", source, {Dtype::bytes}, 2, 1);
    const Array rows = arguments.array("index", index, {Dtype::int64, Dtype::int32}, 1, 1);
    const Array to = arguments.output("result", result, Dtype::bytes, Shape{rows.shape[0], from.shape[1]},
                                      "(rows of index, bytes of a source row)", 1);
    const RowMove call{static_cast<const unsigned char*>(from.data),
                       from.shape[0],
                       from.strides[0],
                       static_cast<unsigned char*>(to.data),
                       to.shape[0],
                       to.strides[0],
                       to.shape[1]};
    const int used_threads = thread_count(checked_threads(arguments, threads));
    std::ptrdiff_t wrong;
    {
        const py::gil_scoped_release release;
        wrong = rows.dtype == Dtype::int64
                    ? move_rows(call, static_cast<const std::int64_t*>(rows.data), used_threads)
                    : move_rows(call, static_cast<const std::int32_t*>(rows.data), used_threads);
    }
    if (wrong == call.result_rows) return;
    const std::int64_t value = rows.dtype == Dtype::int64 ? static_cast<const std::int64_t*>(rows.data)[wrong]
                                                          : static_cast<const std::int32_t*>(rows.data)[wrong];
    arguments.refuse("each index to be a row of the source, below " + std::to_string(call.source_rows) +
                         ", or -1 for zeros",
                     "index[" + std::to_string(wrong) + "]=" + std::to_string(value),
                     "use the Packing that was made for these rows");
}

py::tuple kept_tokens(const py::object& keep) {
    const Arguments arguments("kept_tokens");
    const Array mask = arguments.array("keep", keep, {Dtype::boolean}, 2, 2);
    const std::ptrdiff_t batch = mask.shape[0], tokens = mask.shape[1], all = batch * tokens;
    const auto* keep_BN = static_cast<const std::uint8_t*>(mask.data);
    std::vector<std::int64_t> lengths_B(static_cast<std::size_t>(batch));
    std::ptrdiff_t kept;
    {
        const py::gil_scoped_release release;
        kept = count_kept(keep_BN, batch, tokens, lengths_B.data());
    }
    if (kept > std::numeric_limits<std::int32_t>::max())
        arguments.refuse("at most 2147483647 kept tokens", std::to_string(kept), "split the batch");
    py::array_t<std::int64_t> indices_T(kept);
    py::array_t<std::int32_t> cu_seqlens(batch + 1), row_of_token(all);
    std::int32_t* starts = cu_seqlens.mutable_data();
    std::int64_t longest = starts[0] = 0;
    for (std::ptrdiff_t b = 0; b < batch; ++b) {
        starts[b + 1] = starts[b] + static_cast<std::int32_t>(lengths_B[static_cast<std::size_t>(b)]);
        longest = std::max(longest, lengths_B[static_cast<std::size_t>(b)]);
    }
    std::int64_t* indices = indices_T.mutable_data();
    std::int32_t* rows = row_of_token.mutable_data();
    {
        const py::gil_scoped_release release;
        list_kept(keep_BN, all, kept, indices, rows);
    }
    return py::make_tuple(indices_T, cu_seqlens, longest, row_of_token);
}

}  // namespace

void bind_packing(py::module_& module) {
    module.def("move_rows", &move, py::arg("source"), py::arg("index"), py::arg("result"), py::kw_only(),
               py::arg("threads") = 0,
               "Rows of the source by index, zeros where it is -1, written to result; see _native.pyi.");
    module.def("kept_tokens", &kept_tokens, py::arg("keep"),
               "Where the kept tokens of a mask lie, as Packing has it; see _native.pyi.");
}

}  // namespace maskattn
