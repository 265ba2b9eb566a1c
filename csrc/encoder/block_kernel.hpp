// A block's work on a few rows, before and after attention. Between the layers the rows stay in the scratch of a thread,
// as values that the products read.
#pragma once

#include "encoder/linear_kernel.hpp"

namespace maskattn {
namespace {

// Normalises a row, with zeros after it up to a whole vector.
template <class Value>
void normalise(const float* x, int width, const LayerNorm& norm, Value* to) {
    Floats total{}, squares{};
    for (int c = 0; c < width; c += lanes) total += load_floats(x + c, width - c);
    const float mean = sum(total) / static_cast<float>(width);
    for (int c = 0; c < width; c += lanes) {
        Floats from_mean = load_floats(x + c, width - c) - mean;
        if (width - c < lanes) from_mean = load_first<Floats>(&from_mean, width - c);
        squares += from_mean * from_mean;
    }
    const float variance = sum(squares) / static_cast<float>(width);
    const Floats factor = 1.0f / square_root(broadcast(variance + norm.epsilon));
    for (int c = 0; c < width; c += lanes) {
        const int count = width - c;
        const Floats normal = (load_floats(x + c, count) - mean) * factor;
        store_first(to + c, normal * load_floats(norm.weight + c, count) + load_floats(norm.bias + c, count), lanes);
    }
}

// Rows of a layer's input in scratch.
template <class Arithmetic>
struct ScratchRows {
    typename Arithmetic::Value* data;
    std::ptrdiff_t stride;

    ScratchRows(std::uint32_t* words, int values)
        : data(reinterpret_cast<typename Arithmetic::Value*>(words)),
          stride(scratch_stride(steps_of<Arithmetic>(values)) * Arithmetic::depth) {}

    // Fills with zeros what follows the first `count` rows and the vectors of their values, up to a whole product.
    void fill_after(int count, int values) const {
        const int whole = steps_of<Arithmetic>(values) * Arithmetic::depth;
        for (int r = 0; r < count && padded(values) < whole; ++r) fill(r, padded(values), whole);
        for (int r = count; r % Arithmetic::rows != 0; ++r) fill(r, 0, whole);
    }

  private:
    void fill(int row, int first, int last) const {
        __builtin_memset(data + row * stride + first, 0, static_cast<std::size_t>(last - first) * sizeof *data);
    }
};

template <class Arithmetic>
void normalise_rows(ConstRows x, int count, int width, const LayerNorm& norm, std::uint32_t* to) {
    const ScratchRows<Arithmetic> rows(to, width);
    for (int r = 0; r < count; ++r) normalise(x.data + r * x.stride, width, norm, rows.data + r * rows.stride);
    rows.fill_after(count, width);
}

template <class Arithmetic>
std::size_t block_scratch_words(const EncoderBlock& block) {
    return linear_scratch_words<Arithmetic>(block.width) + linear_scratch_words<Arithmetic>(block.fc1.outputs);
}

template <class Arithmetic, class Element>
void before_attention(const EncoderBlock& block, ConstRows x, int count, Values qkv, std::uint32_t* scratch) {
    [[maybe_unused]] const typename Arithmetic::Session session;
    normalise_rows<Arithmetic>(x, count, block.width, block.norm1, scratch);
    Element* to = static_cast<Element*>(qkv.data);
    const auto write = [to, qkv](Floats sums, int row, int column, int columns) __attribute__((always_inline)) {
        store_first(to + row * qkv.stride + column, sums, columns);
    };
    multiply_rows<Arithmetic>(scratch, count, block.qkv, to, qkv.stride, write);
}

// Stores x plus scale times the output of a layer.
template <class Arithmetic>
MASKATTN_INLINE void add_update(const std::uint32_t* input, int count, const LinearLayer& layer, const float* scale,
                                ConstRows x, Rows out) {
    const auto add = [x, out, scale](Floats sums, int row, int column, int columns) __attribute__((always_inline)) {
        const Floats before = load_floats(x.data + row * x.stride + column, columns);
        store_first(out.data + row * out.stride + column, sums * load<Floats>(scale + column) + before, columns);
    };
    multiply_rows<Arithmetic>(input, count, layer, out.data, out.stride, add);
}

template <class Arithmetic, class Element>
void after_attention(const EncoderBlock& block, ConstValues attended, ConstRows x, int count, Rows out,
                     std::uint32_t* scratch) {
    [[maybe_unused]] const typename Arithmetic::Session session;
    const ConstRows written{out.data, out.stride};
    copy_rows<Arithmetic, Element>(attended, count, block.width, scratch);
    add_update<Arithmetic>(scratch, count, block.proj, block.scale1, x, out);
    normalise_rows<Arithmetic>(written, count, block.width, block.norm2, scratch);
    std::uint32_t* hidden = scratch + linear_scratch_words<Arithmetic>(block.width);
    const ScratchRows<Arithmetic> rows(hidden, block.fc1.outputs);
    with_activation(block.activation, [&](auto which) __attribute__((always_inline)) {
        const auto write = [rows](Floats sums, int row, int column, int) __attribute__((always_inline)) {
            const Floats active = activated<decltype(which)::value, typename Arithmetic::Value>(sums);
            store_first(rows.data + row * rows.stride + column, active, lanes);
        };
        multiply_rows<Arithmetic>(scratch, count, block.fc1, rows.data, rows.stride, write);
    });
    rows.fill_after(count, block.fc1.outputs);
    add_update<Arithmetic>(hidden, count, block.fc2, block.scale2, written, out);
}

template <class Arithmetic, class Element>
constexpr EncoderKernels encoder_kernels = {
    panel_columns,
    &panel_words<Arithmetic>,
    &pack_panel<Arithmetic, Element>,
    &linear_scratch_words<Arithmetic>,
    &apply_linear<Arithmetic, Element>,
    &block_scratch_words<Arithmetic>,
    &before_attention<Arithmetic, Element>,
    &after_attention<Arithmetic, Element>,
};

}  // namespace
}  // namespace maskattn
