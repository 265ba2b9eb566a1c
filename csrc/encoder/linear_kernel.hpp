// A linear layer on a few rows: panels of outputs, in each of which every row tile is multiplied at full depth, so that
// a panel stays in L1 or L2. The order of the sums is the same for every row. Element is the dtype of weights and values
// outside, Arithmetic that of the product.
#pragma once

#include "attention/operands.hpp"
#include "encoder/activation.hpp"

namespace maskattn {
namespace {

constexpr int panel_columns = tile_vectors * lanes;

// Rows in scratch are a cache line longer than their values, since rows at multiples of 4 KiB would share lines of L1.
constexpr std::ptrdiff_t scratch_stride(int values) { return static_cast<std::ptrdiff_t>(whole_lines(static_cast<std::size_t>(values))) + 16; }
template <class Arithmetic>
constexpr std::size_t scratch_words(int values) {
    static_assert(fewest_item_rows % Arithmetic::rows == 0, "items consist of whole products");
    return most_item_rows * static_cast<std::size_t>(scratch_stride(values));
}

template <class Arithmetic>
std::size_t panel_words(int inputs, int outputs) {
    return whole_lines(static_cast<std::size_t>(steps_of<Arithmetic>(inputs)) * static_cast<std::size_t>(padded(outputs)));
}

template <class Arithmetic, class Element>
void pack_panel(ConstValues weight, int inputs, int outputs, int panel, std::uint32_t* panels) {
    const Element* rows[panel_columns];
    const Element* from = static_cast<const Element*>(weight.data);
    const int first = panel * panel_columns, columns = at_most(panel_columns, outputs - first), step = padded(columns);
    for (int c = 0; c < step; ++c) rows[c] = c < columns ? from + (first + c) * weight.stride : nullptr;
    std::uint32_t* to = panels + static_cast<std::ptrdiff_t>(first) * steps_of<Arithmetic>(inputs);
    pack_columns<Arithmetic>(rows, step, inputs, to, step);
}

template <int count>
struct Vectors {
    static constexpr int value = count;
};

// Calls compute with the number of vectors, 1 to `most`, as a type.
template <int most, class Compute>
MASKATTN_INLINE void with_vectors(int vectors, Compute compute) {
    if (vectors == most) return compute(Vectors<most>{});
    if constexpr (most > 1) with_vectors<most - 1>(vectors, compute);
}

MASKATTN_INLINE void store_first(float* to, Floats x, int count) {
    if (count >= lanes)
        store(to, x);
    else
        __builtin_memcpy(to, &x, static_cast<std::size_t>(count) * sizeof x[0]);
}
MASKATTN_INLINE void store_first(Bfloat16* to, Floats x, int count) {
    const Halves rounded = to_bfloat16(x);
    if (count >= lanes)
        store(to, rounded);
    else
        __builtin_memcpy(to, &rounded, static_cast<std::size_t>(count) * sizeof rounded[0]);
}

// Copies rows to scratch, with zeros after the last up to a whole product.
template <class Arithmetic, class Element>
void copy_rows(ConstValues x, int count, int values, std::uint32_t* to) {
    const Element* rows[most_item_rows];
    const Element* from = static_cast<const Element*>(x.data);
    const int whole = (count + Arithmetic::rows - 1) / Arithmetic::rows * Arithmetic::rows;
    for (int r = 0; r < whole; ++r) rows[r] = r < count ? from + r * x.stride : nullptr;
    pack_rows<Arithmetic>(rows, whole, values, to, static_cast<int>(scratch_stride(steps_of<Arithmetic>(values))));
}

// Longer sums are added up in parts, since the error of one long sum grows with its length. Beside what rounding the
// operands to bfloat16 costs, the error of such a sum is nothing.
constexpr int most_steps = 384;
template <class Arithmetic>
MASKATTN_INLINE bool sums_in_parts(int steps) {
    return Arithmetic::depth == 1 && steps > most_steps;
}

// The part of a layer's output that a register tile computes.
struct Place {
    int row, column;
    int rows, columns;  // those that are written
};

// Multiplies a register tile and calls finish(sums plus bias, row, column, number of columns) for its vectors. The memory
// that results go to, at `to`, is requested first, so that the product hides the latency of writing. The operands are
// passed by reference: compilers copy structures by wide loads, which wait until everything written before has left the
// core.
template <class Arithmetic, int vectors, bool whole, class Value, class Finish>
__attribute__((noinline)) void multiply_panel_tile(const Left& rows, const std::uint32_t* panel, int steps,
                                                   const float* bias, Value* to, std::ptrdiff_t to_stride,
                                                   const Place& place, const Finish& outside) {
    constexpr std::ptrdiff_t step = vectors * lanes, line = 64 / sizeof(Value);
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
        for (std::ptrdiff_t c = 0; c < step; c += line) __builtin_prefetch(to + r * to_stride + c, 1);
    // Copies stay in registers, since results that are written cannot change them.
    const Finish finish = outside;
    const Place at{place.row, place.column, place.rows, place.columns};
    Left x{rows.data, rows.row, 1};
    const auto take = [&](Floats sums, int r, int v) __attribute__((always_inline)) {
        const int c = v * lanes;
        if constexpr (whole)
            finish(sums, at.row + r, at.column + c, lanes);
        else if (r < at.rows && c < at.columns)
            finish(sums, at.row + r, at.column + c, at_most(lanes, at.columns - c));
    };
    if (!sums_in_parts<Arithmetic>(steps))
        return sum_tile<Arithmetic, tile_rows, vectors>(
            x, panel, step, steps, [&](int r, int v, Floats sums) __attribute__((always_inline)) {
                take(sums + load<Floats>(bias + v * lanes), r, v);
            });
    alignas(64) Floats earlier[tile_rows][vectors];
    for (int r = 0; r < tile_rows; ++r)
        for (int v = 0; v < vectors; ++v) earlier[r][v] = load<Floats>(bias + v * lanes);
    for (; steps > most_steps; steps -= most_steps) {
        const auto add = [&](int r, int v, Floats sums) __attribute__((always_inline)) { earlier[r][v] += sums; };
        sum_tile<Arithmetic, tile_rows, vectors>(x, panel, step, most_steps, add);
        x.data += most_steps * x.step;
        panel += most_steps * step;
    }
    sum_tile<Arithmetic, tile_rows, vectors>(
        x, panel, step, steps,
        [&](int r, int v, Floats sums) __attribute__((always_inline)) { take(sums + earlier[r][v], r, v); });
}

// Multiplies 16 or 32 rows and as many columns of a panel, whose steps are `step` words apart, and calls finish(sums plus
// bias, row, column) for their vectors.
template <class Arithmetic, class Finish>
MASKATTN_INLINE void multiply_panel_square(int rows, Left x, const std::uint32_t* panel, int width, int step, int steps,
                                           const float* bias, const Finish& finish) {
    constexpr int side = Arithmetic::rows_at_once;
    alignas(64) float sums[side * side];
    Arithmetic::template multiply<Start::zero>(rows, x, panel, step, steps, sums, side, width / lanes, nullptr);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < width; c += lanes) finish(load<Floats>(sums + r * side + c) + load<Floats>(bias + c), r, c);
}

template <class Arithmetic, class Value, class Finish>
MASKATTN_INLINE void multiply_rows_in_tiles(const std::uint32_t* x, int count, const LinearLayer& layer, Value* to,
                                            std::ptrdiff_t to_stride, Finish finish) {
    const int steps = steps_of<Arithmetic>(layer.inputs);
    const std::ptrdiff_t stride = scratch_stride(steps);
    constexpr int side = Arithmetic::rows_at_once;
    // The columns of a square stay in L1 while the rows come from L2.
    for (int first = 0; first < layer.outputs; first += side) {
        const int columns = at_most(side, layer.outputs - first), of_panel = first % panel_columns;
        const int step = padded(at_most(panel_columns, layer.outputs - first + of_panel));
        const std::uint32_t* panel = layer.panels + static_cast<std::ptrdiff_t>(first - of_panel) * steps + of_panel;
        for (int row = 0; row < count; row += side) {
            const int left = at_most(side, count - row);
            const int rows = (left + Arithmetic::rows - 1) / Arithmetic::rows * Arithmetic::rows;
            for (int r = 0; r < left; ++r) __builtin_prefetch(to + (row + r) * to_stride + first, 1);
            multiply_panel_square<Arithmetic>(
                rows, {x + row * stride, stride, 1}, panel, padded(columns), step, steps, layer.bias + first,
                [&](Floats sums, int r, int c) __attribute__((always_inline)) {
                    if (r < left) finish(sums, row + r, first + c, at_most(lanes, columns - c));
                });
        }
    }
}

// Computes the product of rows in scratch, and calls finish(sums plus bias, row, column, number of columns) for each
// vector. `to` is where its results go, in rows `to_stride` apart.
template <class Arithmetic, class Value, class Finish>
MASKATTN_INLINE void multiply_rows(const std::uint32_t* x, int count, const LinearLayer& layer, Value* to,
                                   std::ptrdiff_t to_stride, Finish finish) {
    if constexpr (Arithmetic::in_tiles) return multiply_rows_in_tiles<Arithmetic>(x, count, layer, to, to_stride, finish);
    const int steps = steps_of<Arithmetic>(layer.inputs);
    const std::ptrdiff_t stride = scratch_stride(steps);
    for (int first = 0; first < layer.outputs; first += panel_columns) {
        const int columns = at_most(panel_columns, layer.outputs - first);
        const std::uint32_t* panel = layer.panels + static_cast<std::ptrdiff_t>(first) * steps;
        const float* bias = layer.bias + first;
        for (int row = 0; row < count; row += tile_rows) {
            const Left left{x + row * stride, stride, 1};
            Value* to_tile = to + row * to_stride + first;
            const Place place{row, first, at_most(tile_rows, count - row), columns};
            if (columns == panel_columns && place.rows == tile_rows)
                multiply_panel_tile<Arithmetic, tile_vectors, true>(left, panel, steps, bias, to_tile, to_stride, place, finish);
            else
                with_vectors<tile_vectors>(padded(columns) / lanes, [&](auto vectors) __attribute__((always_inline)) {
                    multiply_panel_tile<Arithmetic, decltype(vectors)::value, false>(left, panel, steps, bias, to_tile,
                                                                                     to_stride, place, finish);
                });
        }
    }
}

template <class Arithmetic>
std::size_t linear_scratch_words(int inputs) {
    return scratch_words<Arithmetic>(steps_of<Arithmetic>(inputs));
}

template <class Arithmetic, class Element>
void apply_linear(const LinearLayer& layer, Activation activation, ConstValues x, int count, Values out,
                  std::uint32_t* scratch) {
    [[maybe_unused]] const typename Arithmetic::Session session;
    copy_rows<Arithmetic, Element>(x, count, layer.inputs, scratch);
    Element* to = static_cast<Element*>(out.data);
    with_activation(activation, [&](auto which) __attribute__((always_inline)) {
        const auto write = [to, out](Floats sums, int row, int column, int columns) __attribute__((always_inline)) {
            store_first(to + row * out.stride + column, activated<decltype(which)::value, Element>(sums), columns);
        };
        multiply_rows<Arithmetic>(scratch, count, layer, to, out.stride, write);
    });
}

}  // namespace
}  // namespace maskattn
