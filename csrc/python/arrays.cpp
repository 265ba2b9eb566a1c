#include "python/arrays.hpp"

#include <algorithm>
#include <cstdlib>

namespace maskattn {
namespace {

const char* name_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::float32: return "float32";
        case Dtype::bfloat16: return "uint16 (bfloat16)";
        case Dtype::int64: return "int64";
        case Dtype::int32: return "int32";
        case Dtype::boolean: return "bool";
        case Dtype::bytes: return "uint8";
    }
    return "";
}

bool is(const py::dtype& dtype, Dtype wanted) {
    const char kind = dtype.kind();
    switch (wanted) {
        case Dtype::float32: return kind == 'f' && dtype.itemsize() == 4;
        case Dtype::bfloat16: return kind == 'u' && dtype.itemsize() == 2;
        case Dtype::int64: return kind == 'i' && dtype.itemsize() == 8;
        case Dtype::int32: return kind == 'i' && dtype.itemsize() == 4;
        case Dtype::boolean: return kind == 'b';
        case Dtype::bytes: return kind == 'u' && dtype.itemsize() == 1;
    }
    return false;
}

std::string names_of(const std::vector<Dtype>& dtypes) {
    std::string names;
    for (const Dtype dtype : dtypes) names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
    return names;
}

// Returns whether each stride exceeds the extent of the axes with smaller strides, so that no two elements share memory.
bool elements_are_apart(const Array& array) {
    std::vector<std::pair<std::ptrdiff_t, std::ptrdiff_t>> axes;  // stride, size
    for (std::size_t i = 0; i < array.shape.size(); ++i) {
        if (array.shape[i] == 0) return true;
        if (array.shape[i] > 1) axes.emplace_back(std::abs(array.strides[i]), array.shape[i]);
    }
    std::sort(axes.begin(), axes.end());
    std::ptrdiff_t reach = 1;
    for (const auto& [stride, size] : axes) {
        if (stride < reach) return false;
        reach += (size - 1) * stride;
    }
    return true;
}

}  // namespace

std::string text_of(const Shape& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

int checked_threads(const Arguments& arguments, int threads) {
    if (threads < 0) arguments.refuse("threads >= 0", "threads=" + std::to_string(threads), "0 asks for one thread per core");
    return threads;
}

void Arguments::refuse(const std::string& rule, const std::string& got, const std::string& remedy) const {
    throw py::value_error(std::string(operation_) + " needs " + rule + ", got " + got + "; " + remedy);
}

void Arguments::refuse_type(const std::string& rule, const std::string& got, const std::string& remedy) const {
    throw py::type_error(std::string(operation_) + " needs " + rule + ", got " + got + "; " + remedy);
}

Array Arguments::array(const char* name, const py::object& value, const std::vector<Dtype>& dtypes, std::size_t axes,
                       std::size_t contiguous) const {
    const std::string called = name;
    if (!py::isinstance<py::array>(value))
        refuse_type(called + " as a numpy array", py::str(py::type::of(value)).cast<std::string>(),
                    "pass tensor.numpy(), a bfloat16 tensor as tensor.view(torch.uint16).numpy()");
    const auto view = py::reinterpret_borrow<py::array>(value);
    const py::dtype dtype = view.dtype();
    const auto found = std::find_if(dtypes.begin(), dtypes.end(), [&](Dtype d) { return is(dtype, d); });
    if (found == dtypes.end() || !dtype.attr("isnative").cast<bool>())
        refuse_type(called + " of dtype " + names_of(dtypes), called + ".dtype=" + py::str(dtype).cast<std::string>(),
                    "convert it first");
    Array array{*found, {}, {}, const_cast<void*>(view.data())};
    for (py::ssize_t axis = 0; axis < view.ndim(); ++axis) array.shape.push_back(view.shape(axis));
    if (array.shape.size() != axes)
        refuse(called + " with " + std::to_string(axes) + " axes", called + ".shape=" + text_of(array.shape),
               "reshape it");
    const std::ptrdiff_t item = view.itemsize();
    bool whole = reinterpret_cast<std::uintptr_t>(array.data) % static_cast<std::uintptr_t>(item) == 0;
    for (py::ssize_t axis = 0; axis < view.ndim(); ++axis) {
        whole = whole && view.strides(axis) % item == 0;
        array.strides.push_back(view.strides(axis) / item);
    }
    if (!whole && view.size() > 0)
        refuse(called + " aligned to its elements", "one between them", "call numpy.ascontiguousarray on it first");
    std::ptrdiff_t step = 1;
    for (std::size_t i = 0; i < contiguous; ++i) {
        const std::size_t axis = axes - 1 - i;
        if (array.shape[axis] > 1 && array.strides[axis] != step && view.size() > 0)
            refuse(called + " contiguous along its last axis",
                   called + " with strides of " + text_of(array.strides) + " elements",
                   "call .contiguous() on it first");
        step *= array.shape[axis];
    }
    return array;
}

Array Arguments::array(const char* name, const py::object& value, Dtype dtype, const Shape& shape,
                       const char* shape_name, std::size_t contiguous) const {
    Shape found;
    if (py::isinstance<py::array>(value)) {
        const auto view = py::reinterpret_borrow<py::array>(value);
        found.assign(view.shape(), view.shape() + view.ndim());
        if (found != shape)
            refuse(std::string(name) + " of shape " + shape_name + " = " + text_of(shape),
                   std::string(name) + ".shape=" + text_of(found), "make it agree with the other arguments");
    }
    return array(name, value, std::vector<Dtype>{dtype}, shape.size(), contiguous);
}

Array Arguments::output(const char* name, const py::object& value, Dtype dtype, const Shape& shape,
                        const char* shape_name, std::size_t contiguous) const {
    const Array result = array(name, value, dtype, shape, shape_name, contiguous);
    const std::string called = name;
    if (!py::reinterpret_borrow<py::array>(value).writeable())
        refuse(called + " that can be written to", "a read-only array", "pass an array of your own");
    if (!elements_are_apart(result))
        refuse(called + " whose elements each have a place of their own",
               called + " with strides of " + text_of(result.strides) + " elements",
               "pass torch.empty(...) of the shape");
    return result;
}

}  // namespace maskattn
