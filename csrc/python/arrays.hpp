// Checks of arrays as arguments, with errors that state the rule, what was passed and the remedy. An array comes from
// numpy, or in a DLPack capsule, which torch makes of a tensor in a tenth of the time.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace maskattn {

namespace py = pybind11;

enum class Dtype { float32, bfloat16, int64, int32, boolean, bytes };  // numpy has bfloat16 as uint16

// An argument that has passed its checks, with strides in elements.
struct Array {
    Dtype dtype;
    std::vector<std::ptrdiff_t> shape;
    std::vector<std::ptrdiff_t> strides;
    void* data;
    bool writable;
};

using Shape = std::vector<std::ptrdiff_t>;

// The arguments of one call of an operation.
class Arguments {
  public:
    explicit Arguments(const char* operation) : operation_(operation) {}

    // Checks for an aligned array in native byte order of one of these dtypes and this number of axes, of which the last
    // `contiguous` have no gaps.
    Array array(const char* name, const py::object& value, const std::vector<Dtype>& dtypes, std::size_t axes,
                std::size_t contiguous = 0) const;

    // Checks for a given shape as well; messages call it `shape_name`, e.g. "(Tk, H, D)".
    Array array(const char* name, const py::object& value, Dtype dtype, const Shape& shape, const char* shape_name,
                std::size_t contiguous = 0) const;

    // Checks as well that the array is writable and no two of its elements share memory.
    Array output(const char* name, const py::object& value, Dtype dtype, const Shape& shape, const char* shape_name,
                 std::size_t contiguous = 0) const;

    // Throws with "<operation> needs <rule>, got <got>; <remedy>".
    [[noreturn]] void refuse(const std::string& rule, const std::string& got, const std::string& remedy) const;
    [[noreturn]] void refuse_type(const std::string& rule, const std::string& got, const std::string& remedy) const;

  private:
    const char* operation_;
};

std::string text_of(const Shape& shape);

// Returns the number of axes of an array; nothing for any other object.
std::optional<std::size_t> axes_of_array(const py::object& value);

// Checks the number of threads that a call asks for; 0 means one per core.
int checked_threads(const Arguments& arguments, int threads);

}  // namespace maskattn
