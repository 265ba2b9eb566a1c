#include "python/arrays.hpp"

#include <algorithm>
#include <cstdlib>

#include "python/dlpack.hpp"

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

std::optional<Dtype> dtype_of(char kind, std::ptrdiff_t item) {
    if (kind == 'f' && item == 4) return Dtype::float32;
    if (kind == 'u' && item == 2) return Dtype::bfloat16;
    if (kind == 'i' && item == 8) return Dtype::int64;
    if (kind == 'i' && item == 4) return Dtype::int32;
    if (kind == 'b') return Dtype::boolean;
    if (kind == 'u' && item == 1) return Dtype::bytes;
    return std::nullopt;
}

// What an array says of itself, before any check. Strides are in elements; `whole` is false if one is not, or if the
// memory is not aligned to the elements.
struct View {
    std::optional<Dtype> dtype;
    Shape shape, strides;
    void* data;
    bool whole, writable;

    bool empty() const { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }
};

bool is_aligned(const void* data, std::ptrdiff_t item) {
    return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(item) == 0;
}

View view_of_numpy(const py::array& array) {
    const py::dtype dtype = array.dtype();
    View view{dtype_of(dtype.kind(), dtype.itemsize()), {}, {}, const_cast<void*>(array.data()), true, array.writeable()};
    if (dtype.byteorder() == '>') view.dtype.reset();  // numpy says '=' for the processor's own order
    const std::ptrdiff_t item = array.itemsize();
    view.shape.assign(array.shape(), array.shape() + array.ndim());
    view.whole = item > 0 && is_aligned(view.data, item);
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        view.whole = view.whole && array.strides(axis) % item == 0;
        view.strides.push_back(view.whole ? array.strides(axis) / item : 0);
    }
    return view;
}

View view_of_tensor(const dlpack::Tensor& tensor) {
    char* data = static_cast<char*>(tensor.data);
    if (data != nullptr) data += tensor.byte_offset;
    const std::ptrdiff_t item = tensor.dtype.bits / 8;
    View view{std::nullopt, {}, {}, data, item > 0 && is_aligned(data, item), true};
    if (tensor.device.type == dlpack::cpu && tensor.dtype.lanes == 1 && tensor.dtype.bits % 8 == 0)
        view.dtype = dtype_of(dlpack::kind_of(tensor.dtype), item);
    view.shape.assign(tensor.shape, tensor.shape + tensor.axes);
    if (tensor.strides != nullptr) {
        view.strides.assign(tensor.strides, tensor.strides + tensor.axes);
    } else {
        view.strides.resize(view.shape.size());
        std::ptrdiff_t step = 1;
        for (std::size_t axis = view.shape.size(); axis-- > 0; step *= view.shape[axis]) view.strides[axis] = step;
    }
    return view;
}

// Returns nothing for an object that is no array.
std::optional<View> view_of(const py::object& value) {
    if (const dlpack::Tensor* tensor = dlpack::tensor_of(value.ptr())) return view_of_tensor(*tensor);
    if (py::isinstance<py::array>(value)) return view_of_numpy(py::reinterpret_borrow<py::array>(value));
    return std::nullopt;
}

std::string dtype_text(const py::object& value) {
    if (const dlpack::Tensor* tensor = dlpack::tensor_of(value.ptr())) return dlpack::text_of(*tensor);
    return py::str(py::reinterpret_borrow<py::array>(value).dtype()).cast<std::string>();
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

std::optional<std::size_t> axes_of_array(const py::object& value) {
    const auto view = view_of(value);
    return view ? std::optional(view->shape.size()) : std::nullopt;
}

namespace {

// Checks what an array said of itself; null stands for an object that is none.
Array checked(const Arguments& arguments, const std::string& called, const py::object& value, std::optional<View>&& view,
              const std::vector<Dtype>& dtypes, std::size_t axes, std::size_t contiguous) {
    if (!view)
        arguments.refuse_type(called + " as a numpy array or a DLPack capsule of a tensor",
                              py::str(py::type::of(value)).cast<std::string>(),
                              "pass tensor.numpy(), a bfloat16 tensor as tensor.view(torch.uint16).numpy(), or "
                              "torch.utils.dlpack.to_dlpack(tensor)");
    if (!view->dtype || std::find(dtypes.begin(), dtypes.end(), *view->dtype) == dtypes.end())
        arguments.refuse_type(called + " of dtype " + names_of(dtypes), called + ".dtype=" + dtype_text(value),
                              "convert it first");
    if (view->shape.size() != axes)
        arguments.refuse(called + " with " + std::to_string(axes) + " axes", called + ".shape=" + text_of(view->shape),
                         "reshape it");
    const bool empty = view->empty();
    if (!view->whole && !empty)
        arguments.refuse(called + " aligned to its elements", "one between them", "call numpy.ascontiguousarray on it first");
    std::ptrdiff_t step = 1;
    for (std::size_t i = 0; i < contiguous; ++i) {
        const std::size_t axis = axes - 1 - i;
        if (view->shape[axis] > 1 && view->strides[axis] != step && !empty)
            arguments.refuse(called + " contiguous along its last axis",
                             called + " with strides of " + text_of(view->strides) + " elements",
                             "call .contiguous() on it first");
        step *= view->shape[axis];
    }
    return {*view->dtype, std::move(view->shape), std::move(view->strides), view->data, view->writable};
}

}  // namespace

Array Arguments::array(const char* name, const py::object& value, const std::vector<Dtype>& dtypes, std::size_t axes,
                       std::size_t contiguous) const {
    return checked(*this, name, value, view_of(value), dtypes, axes, contiguous);
}

Array Arguments::array(const char* name, const py::object& value, Dtype dtype, const Shape& shape,
                       const char* shape_name, std::size_t contiguous) const {
    auto view = view_of(value);
    if (view && view->shape != shape)
        refuse(std::string(name) + " of shape " + shape_name + " = " + text_of(shape),
               std::string(name) + ".shape=" + text_of(view->shape), "make it agree with the other arguments");
    return checked(*this, name, value, std::move(view), {dtype}, shape.size(), contiguous);
}

Array Arguments::output(const char* name, const py::object& value, Dtype dtype, const Shape& shape,
                        const char* shape_name, std::size_t contiguous) const {
    Array result = array(name, value, dtype, shape, shape_name, contiguous);
    const std::string called = name;
    if (!result.writable)
        refuse(called + " that can be written to", "a read-only array", "pass an array of your own");
    if (!elements_are_apart(result))
        refuse(called + " whose elements each have a place of their own",
               called + " with strides of " + text_of(result.strides) + " elements",
               "pass torch.empty(...) of the shape");
    return result;
}

}  // namespace maskattn
