// The bindings of pictures, which check the arguments, release the GIL and call the plain C++.
#include "pictures/overlay.hpp"
#include "python/arrays.hpp"
#include "python/bindings.hpp"

namespace maskattn {
namespace {

void overlay(const py::object& picture, const py::object& grey, const py::object& token, const py::object& colour,
             const py::object& mixtures, const py::object& result) {
    const Arguments arguments("lay_over");
    const Array tokens = arguments.array("token", token, {Dtype::int32}, 2, 2);
    const std::ptrdiff_t height = tokens.shape[0], width = tokens.shape[1];
    const Array below = arguments.array("picture", picture, Dtype::bytes, {height, width, 3}, "(Y, X, 3)", 3);
    const Array greys = arguments.array("grey", grey, Dtype::bytes, {height, width}, "(Y, X)", 2);
    const Array colours = arguments.array("colour", colour, {Dtype::int32}, 1, 1);
    const Array mixed = arguments.array("mixtures", mixtures, {Dtype::bytes}, 3, 3);
    if (mixed.shape[1] != 256 || mixed.shape[2] != 3)
        arguments.refuse("mixtures of (colours, 256, 3)", "mixtures.shape=" + text_of(mixed.shape),
                         "mix each colour with each of 256 greys");
    const Array written = arguments.output("result", result, Dtype::bytes, {height, width, 3}, "(Y, X, 3)", 2);
    const Overlay call{static_cast<const std::uint8_t*>(below.data),
                       static_cast<const std::uint8_t*>(greys.data),
                       static_cast<const std::int32_t*>(tokens.data),
                       static_cast<const std::int32_t*>(colours.data),
                       colours.shape[0],
                       static_cast<const std::uint8_t*>(mixed.data),
                       mixed.shape[0],
                       static_cast<std::uint8_t*>(written.data),
                       written.strides[0],
                       height,
                       width};
    bool in_range;
    {
        const py::gil_scoped_release release;
        in_range = lay_over(call);
    }
    if (!in_range)
        arguments.refuse("tokens that have a colour, and colours that have mixtures",
                         std::to_string(call.tokens) + " tokens with " + std::to_string(call.colours) +
                             " colours and an index beyond them",
                         "count both from 0");
}

}  // namespace

void bind_pictures(py::module_& module) {
    module.def("lay_over", &overlay, py::arg("picture"), py::arg("grey"), py::arg("token"), py::arg("colour"),
               py::arg("mixtures"), py::arg("result"),
               "A map of tokens laid over a picture, written to result; see _native.pyi.");
}

}  // namespace maskattn
