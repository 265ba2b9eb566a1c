// Checks of numpy arguments, with errors that say the rule, what came and the remedy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace maskattn {

namespace py = pybind11;

enum class Dtype { float32, bfloat16, int64, int32, boolean, bytes };  // bfloat16 comes as uint16

// An argument that has passed its checks: its strides are in elements.
struct Array {
    Dtype dtype;
    std::vector<std::ptrdiff_t> shape;
    std::vector<std::ptrdiff_t> strides;
    void* data;
};

using Shape = std::vector<std::ptrdiff_t>;

// The arguments of one call of an operation.
class Arguments {
  public:
    explicit Arguments(const char* operation) : operation_(operation) {}

    // An aligned array in native byte order of one of these dtypes and this number of axes, the last `contiguous` of
    // them without gaps.
    Array array(const char* name, const py::object& value, const std::vector<Dtype>& dtypes, std::size_t axes,
                std::size_t contiguous = 0) const;

    // The same of a given shape, called e.g. "(Tk, H, D)".
    Array array(const char* name, const py::object& value, Dtype dtype, const Shape& shape, const char* shape_name,
                std::size_t contiguous = 0) const;

    // The same, writable, and no two of its elements one.
    Array output(const char* name, const py::object& value, Dtype dtype, const Shape& shape, const char* shape_name,
                 std::size_t contiguous = 0) const;

    // "<operation> needs <rule>, got <what came>; <remedy>"
    [[noreturn]] void refuse(const std::string& rule, const std::string& got, const std::string& remedy) const;
    [[noreturn]] void refuse_type(const std::string& rule, const std::string& got, const std::string& remedy) const;

  private:
    const char* operation_;
};

std::string text_of(const Shape& shape);

// How many threads a call asks for, 0 for one per core.
int checked_threads(const Arguments& arguments, int threads);

}  // namespace maskattn
