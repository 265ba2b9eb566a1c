#include "python/layout.hpp"

#include <algorithm>

namespace maskattn {

Axes::Axes(const char* text) {
    for (std::string_view rest = text; !rest.empty();) {
        const std::size_t end = std::min(rest.find(' '), rest.size());
        std::string_view name = rest.substr(0, end);
        rest.remove_prefix(std::min(end + 1, rest.size()));
        if (name.front() == '[') {
            name = name.substr(1, name.size() - 2);
            contiguous_ = 1;
        } else if (row_ == most_axes && name != "B" && name != "H" && name != "K") {
            row_ = count_;
        }
        names_[count_++] = name;
    }
    row_ = std::min(row_, count_);
}

std::string Axes::text() const {
    std::string text = "(";
    for (std::size_t i = 0; i < count_; ++i) text.append(i ? ", " : "").append(names_[i]);
    return text + (count_ == 1 ? ",)" : ")");
}

void Tensors::measure(const char* name, const py::object& value, const char* text) {
    const Axes axes(text);
    const Array x =
        arguments_.array(name, value, {Dtype::float32, Dtype::bfloat16}, axes.count(), axes.contiguous());
    dtype_ = x.dtype;
    for (std::size_t i = 0; i < axes.count(); ++i) set_size(axes[i], x.shape[i]);
}

void Tensors::measure_rows(const char* name, const py::object& value, const char* text) {
    const Axes axes(text);
    const Array x = arguments_.array(name, value, {dtype_}, axes.count(), axes.contiguous());
    set_size(axes[axes.row()], x.shape[axes.row()]);
}

std::ptrdiff_t Tensors::size(std::string_view axis) const {
    for (const auto& [name, size] : sizes_)
        if (name == axis) return size;
    return 1;
}

std::ptrdiff_t Tensors::rows(const char* text) const {
    const Axes axes(text);
    return size(axes[axes.row()]);
}

Shape Tensors::shape_of(const Axes& axes) const {
    Shape shape;
    for (std::size_t i = 0; i < axes.count(); ++i) shape.push_back(axes[i] == "2" ? 2 : size(axes[i]));
    return shape;
}

Array Tensors::array(const char* name, const py::object& value, Dtype dtype, const char* text) const {
    const Axes axes(text);
    return arguments_.array(name, value, dtype, shape_of(axes), axes.text().c_str(), axes.contiguous());
}

Array Tensors::output_array(const char* name, const py::object& value, Dtype dtype, const char* text) const {
    const Axes axes(text);
    return arguments_.output(name, value, dtype, shape_of(axes), axes.text().c_str(), axes.contiguous());
}

}  // namespace maskattn
