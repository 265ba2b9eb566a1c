// The Python face of the extension: checks the arguments, releases the GIL, calls the plain C++.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <dlfcn.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "bindings.hpp"
#include "coverage.hpp"
#include "threads.hpp"

namespace py = pybind11;

namespace {

// Shares of a mask pixel below this drown in the rounding of token positions.
constexpr double smallest_token_in_mask_px = 1e-3;

template <typename Value>
std::string got(const char* name, const Value& value) {
    std::ostringstream text;
    text << "got " << name << "=" << value;
    return text.str();
}

void require_positive(const char* name, double value) {
    if (std::isfinite(value) && value > 0) return;
    throw py::value_error("token_coverage needs sizes that are finite and above 0, " + got(name, value) +
                          "; give it in level-0 pixels");
}

py::array checked_mask(const py::object& mask) {
    if (!py::isinstance<py::array>(mask))
        throw py::type_error("token_coverage needs the mask as a numpy array, got " +
                             py::str(py::type::of(mask)).cast<std::string>() + "; call numpy.asarray on it first");
    auto array = py::reinterpret_borrow<py::array>(mask);
    const char kind = array.dtype().kind();
    if (!(kind == 'b' || (kind == 'u' && array.itemsize() == 1)))
        throw py::type_error("token_coverage needs a bool or uint8 mask, got mask.dtype=" +
                             py::str(array.dtype()).cast<std::string>() + "; pass e.g. mask > 0");
    if (array.ndim() != 2 || array.size() == 0)
        throw py::value_error("token_coverage needs a mask of shape (rows, cols), neither 0, got mask.shape=" +
                              py::str(py::object(array.attr("shape"))).cast<std::string>() +
                              "; pass one plane of the image");
    if (!(array.flags() & py::array::c_style))
        throw py::value_error(
            "token_coverage needs a C-contiguous mask, got a strided view; call numpy.ascontiguousarray on it first");
    return array;
}

maskattn::Axis checked_axis(const char* axis, double px_lv0, double origin_lv0, double token_lv0, py::ssize_t count) {
    const std::string suffix = axis;
    require_positive(("px_lv0_" + suffix).c_str(), px_lv0);
    require_positive(suffix == "x" ? "token_w_lv0" : "token_h_lv0", token_lv0);
    const maskattn::Axis result{origin_lv0 / px_lv0, token_lv0 / px_lv0, count};
    if (!std::isfinite(origin_lv0) || !std::isfinite(result.origin) ||
        !std::isfinite(result.origin + result.size * static_cast<double>(count)))
        throw py::value_error("token_coverage needs tokens at finite positions, " +
                              got(("origin_lv0_" + suffix).c_str(), origin_lv0) + ", " +
                              got("token size", token_lv0) + "; give both in level-0 pixels");
    if (!(result.size >= smallest_token_in_mask_px))
        throw py::value_error("token_coverage needs tokens of at least a thousandth of a mask pixel, " +
                              got("token size", token_lv0) + ", " + got(("px_lv0_" + suffix).c_str(), px_lv0) +
                              "; check that both are in level-0 pixels");
    return result;
}

py::array_t<float> token_coverage(const py::object& mask, double px_lv0_x, double px_lv0_y, double origin_x_lv0,
                                  double origin_y_lv0, double token_w_lv0, double token_h_lv0, py::ssize_t rows,
                                  py::ssize_t cols, int threads) {
    const py::array array = checked_mask(mask);
    if (rows <= 0 || cols <= 0 || rows > std::numeric_limits<std::int32_t>::max() / cols)
        throw py::value_error("token_coverage needs rows and cols above 0 and at most 2147483647 tokens in all, " +
                              got("rows", rows) + ", " + got("cols", cols) + "; ask for the lattice in bands of rows");
    if (threads < 0)
        throw py::value_error("token_coverage needs threads >= 0, " + got("threads", threads) +
                              "; 0 asks for one thread per core");
    const maskattn::Axis x = checked_axis("x", px_lv0_x, origin_x_lv0, token_w_lv0, cols);
    const maskattn::Axis y = checked_axis("y", px_lv0_y, origin_y_lv0, token_h_lv0, rows);

    py::array_t<float> fraction_RC({rows, cols});
    const maskattn::Mask plane{static_cast<const std::uint8_t*>(array.data()), array.shape(0), array.shape(1)};
    float* out = fraction_RC.mutable_data();
    {
        const py::gil_scoped_release release;
        maskattn::token_coverage(plane, y, x, threads, out);
    }
    return fraction_RC;
}

// Whether the OpenMP runtime in this file, if the process has loaded it, lends its team.
bool share_team_of(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) return false;
    void* parallel = dlsym(handle, "GOMP_parallel");
    if (parallel == nullptr) {
        dlclose(handle);
        return false;
    }
    maskattn::share_team(reinterpret_cast<maskattn::ParallelRegion>(parallel));  // which keeps the library loaded
    return true;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ parts of maskattn.";
    maskattn::bind_attention(module);
    maskattn::bind_packing(module);
    maskattn::bind_readout(module);
    module.def("share_team", &share_team_of, py::arg("library"),
               R"(Run on the threads of an OpenMP runtime that this process has loaded; True if it was found.

Two pools would take each other's cores, since such a runtime's threads spin for a while after a job. Without one, and
in a child of fork(), the extension's own threads run.

Args:
    library: the runtime's file, GNU's or one that speaks its calls.)");
    module.def("token_coverage", &token_coverage, py::arg("mask"), py::arg("px_lv0_x"), py::arg("px_lv0_y"),
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
