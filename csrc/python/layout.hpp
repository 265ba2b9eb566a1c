// The axes of an operation's tensors, and checks of them. A tensor's axes are written by name, with the contiguous one
// in brackets: "B H Nq [D]". B are sequences, H heads and K classes; the other axis without brackets is that of the
// rows.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/attention.hpp"
#include "python/arrays.hpp"

namespace maskattn {

struct Layout {
    const char *q, *k, *lse, *key_bias, *shared_key_bias, *coords_q, *coords_k;
};

constexpr Layout packed_layout{"Tq H [D]", "Tk H [D]", "H Tq", "Tk H", "Tk", "Tq [2]", "Tk [2]"};
constexpr Layout dense_layout{"B H Nq [D]", "B H N [D]", "B H Nq", "B H N", "B N", "B Nq [2]", "B N [2]"};
constexpr Layout readout_layout{"B R H [D]", "T H [D]", "B R H", "T H", "T", "B R [2]", "T [2]"};

// Axes, parsed from a text as above.
class Axes {
  public:
    explicit Axes(const char* text);

    std::size_t count() const { return count_; }
    std::string_view operator[](std::size_t axis) const { return names_[axis]; }
    std::size_t contiguous() const { return contiguous_; }  // number of axes at the end that must have no gaps
    std::size_t row() const { return row_; }                // index of the axis of the rows; count() for none
    std::string text() const;                               // "(B, H, Nq, D)"

  private:
    static constexpr std::size_t most_axes = 5;
    std::string_view names_[most_axes];
    std::size_t count_ = 0, contiguous_ = 0, row_ = most_axes;
};

// The tensors of one call, whose axes of the same name must have the same size.
class Tensors {
  public:
    explicit Tensors(const Arguments& arguments) : arguments_(arguments) {}

    // Takes the sizes of the first tensor's axes, and the dtype of all tensors of rows.
    void measure(const char* name, const py::object& value, const char* axes);
    // Takes the size of another tensor's axis of rows.
    void measure_rows(const char* name, const py::object& value, const char* axes);
    void set_size(std::string_view axis, std::ptrdiff_t size) { sizes_.emplace_back(axis, size); }

    Dtype dtype() const { return dtype_; }
    std::ptrdiff_t size(std::string_view axis) const;  // 1 for an axis that no tensor has
    std::ptrdiff_t rows(const char* axes) const;

    // Checks a tensor. Values of type void have the dtype of the rows, others are float32.
    template <class Value>
    Strided<Value> input(const char* name, const py::object& value, const char* axes) const {
        return strided<Value>(array(name, value, dtype_of<Value>(), axes), Axes(axes));
    }
    template <class Value>
    Strided<Value> output(const char* name, const py::object& value, const char* axes) const {
        return strided<Value>(output_array(name, value, dtype_of<Value>(), axes), Axes(axes));
    }
    // Checks a tensor if it is given; the result has no data for None.
    template <class Value>
    Strided<Value> input_if_given(const char* name, const py::object& value, const char* axes) const {
        return value.is_none() ? Strided<Value>{} : input<Value>(name, value, axes);
    }
    template <class Value>
    Strided<Value> output_if_given(const char* name, const py::object& value, const char* axes) const {
        return value.is_none() ? Strided<Value>{} : output<Value>(name, value, axes);
    }

    Array array(const char* name, const py::object& value, Dtype dtype, const char* axes) const;
    Array output_array(const char* name, const py::object& value, Dtype dtype, const char* axes) const;

    template <class Value>
    static Strided<Value> strided(const Array& x, const Axes& axes) {
        Strided<Value> result{static_cast<Value*>(x.data), 0, 0, 0};
        for (std::size_t i = 0; i < axes.count(); ++i) {
            if (axes[i] == "B") result.sequence = x.strides[i];
            if (axes[i] == "H") result.head = x.strides[i];
            if (i == axes.row()) result.row = x.strides[i];
        }
        return result;
    }

  private:
    template <class Value>
    Dtype dtype_of() const {
        return std::is_void_v<Value> ? dtype_ : Dtype::float32;
    }
    Shape shape_of(const Axes& axes) const;

    const Arguments& arguments_;
    std::vector<std::pair<std::string_view, std::ptrdiff_t>> sizes_;
    Dtype dtype_ = Dtype::float32;
};

}  // namespace maskattn
