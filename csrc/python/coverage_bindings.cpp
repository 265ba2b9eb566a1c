// The bindings of token coverage, which check the arguments, release the GIL and call the plain C++.
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "packing/coverage.hpp"
#include "python/arrays.hpp"
#include "python/bindings.hpp"

namespace maskattn {
namespace {

// Fractions of a mask pixel below this are lost in the rounding of token positions.
constexpr double smallest_token_in_mask_px = 1e-3;

template <typename Value>
std::string text_of(const std::string& name, const Value& value) {
    std::ostringstream text;
    text << name << "=" << value;
    return text.str();
}

void check_positive(const Arguments& arguments, const std::string& name, double value) {
    if (!(std::isfinite(value) && value > 0))
        arguments.refuse("sizes that are finite and above 0", text_of(name, value), "give it in level-0 pixels");
}

py::array checked_mask(const Arguments& arguments, const py::object& mask) {
    if (!py::isinstance<py::array>(mask))
        arguments.refuse_type("the mask as a numpy array", py::str(py::type::of(mask)).cast<std::string>(),
                              "call numpy.asarray on it first");
    auto array = py::reinterpret_borrow<py::array>(mask);
    const char kind = array.dtype().kind();
    if (!(kind == 'b' || (kind == 'u' && array.itemsize() == 1)))
        arguments.refuse_type("a bool or uint8 mask", "mask.dtype=" + py::str(array.dtype()).cast<std::string>(),
                              "pass e.g. mask > 0");
    if (array.ndim() != 2 || array.size() == 0)
        arguments.refuse("a mask of shape (rows, cols), neither 0",
                         "mask.shape=" + py::str(py::object(array.attr("shape"))).cast<std::string>(),
                         "pass one plane of the image");
    if (!(array.flags() & py::array::c_style))
        arguments.refuse("a C-contiguous mask", "a strided view", "call numpy.ascontiguousarray on it first");
    return array;
}

Axis checked_axis(const Arguments& arguments, const std::string& axis, double px_lv0, double origin_lv0,
                  double token_lv0, py::ssize_t count) {
    check_positive(arguments, "px_lv0_" + axis, px_lv0);
    check_positive(arguments, axis == "x" ? "token_w_lv0" : "token_h_lv0", token_lv0);
    const Axis result{origin_lv0 / px_lv0, token_lv0 / px_lv0, count};
    const std::string token_size = text_of("token size", token_lv0);
    if (!std::isfinite(origin_lv0) || !std::isfinite(result.origin) ||
        !std::isfinite(result.origin + result.size * static_cast<double>(count)))
        arguments.refuse("tokens at finite positions", text_of("origin_lv0_" + axis, origin_lv0) + ", got " + token_size,
                         "give both in level-0 pixels");
    if (!(result.size >= smallest_token_in_mask_px))
        arguments.refuse("tokens of at least a thousandth of a mask pixel",
                         token_size + ", got " + text_of("px_lv0_" + axis, px_lv0),
                         "check that both are in level-0 pixels");
    return result;
}

py::array_t<float> coverage(const py::object& mask, double px_lv0_x, double px_lv0_y, double origin_x_lv0,
                            double origin_y_lv0, double token_w_lv0, double token_h_lv0, py::ssize_t rows,
                            py::ssize_t cols, int threads) {
    const Arguments arguments("token_coverage");
    const py::array array = checked_mask(arguments, mask);
    if (rows <= 0 || cols <= 0 || rows > std::numeric_limits<std::int32_t>::max() / cols)
        arguments.refuse("rows and cols above 0 and at most 2147483647 tokens in all",
                         text_of("rows", rows) + ", got " + text_of("cols", cols),
                         "ask for the lattice in bands of rows");
    checked_threads(arguments, threads);
    const Axis x = checked_axis(arguments, "x", px_lv0_x, origin_x_lv0, token_w_lv0, cols);
    const Axis y = checked_axis(arguments, "y", px_lv0_y, origin_y_lv0, token_h_lv0, rows);

    py::array_t<float> fraction_RC({rows, cols});
    const Mask plane{static_cast<const std::uint8_t*>(array.data()), array.shape(0), array.shape(1)};
    float* out = fraction_RC.mutable_data();
    {
        const py::gil_scoped_release release;
        token_coverage(plane, y, x, threads, out);
    }
    return fraction_RC;
}

}  // namespace

void bind_coverage(py::module_& module) {
    module.def("token_coverage", &coverage, py::arg("mask"), py::arg("px_lv0_x"), py::arg("px_lv0_y"),
               py::arg("origin_x_lv0"), py::arg("origin_y_lv0"), py::arg("token_w_lv0"), py::arg("token_h_lv0"),
               py::arg("rows"), py::arg("cols"), py::arg("threads") = 0,
               R"(Area-weighted tissue fraction of each token of a lattice, (rows, cols) float32 in [0, 1].

Exact for a piecewise constant mask and tokens at any sub-pixel position. Area outside the mask is not tissue. The GIL
is released meanwhile; the result does not depend on the number of threads.

Args:
    mask: (Hm, Wm) bool or uint8, C-contiguous; anything but 0 is tissue. Its corner lies at level-0 (0, 0).
    px_lv0_x: width of a mask pixel in level-0 pixels.
    px_lv0_y: height of a mask pixel in level-0 pixels.
    origin_x_lv0: left edge of the lattice in level-0 pixels.
    origin_y_lv0: top edge of the lattice in level-0 pixels.
    token_w_lv0: width of a token in level-0 pixels, fractions allowed.
    token_h_lv0: height of a token in level-0 pixels, fractions allowed.
    rows: tokens from top to bottom.
    cols: tokens from left to right.
    threads: how many threads; 0 for one per core.

Raises:
    TypeError: the mask is not a bool or uint8 numpy array, or a number is of the wrong type.
    ValueError: the mask is not a C-contiguous plane, or a size, position or count is out of range.)");
}

}  // namespace maskattn
