// A block's work on a few rows, before and after attention. Between the layers the rows stay in the scratch of a thread.
#pragma once

#include "encoder/linear_kernel.hpp"

namespace maskattn {
namespace {

// Normalises a row, with zeros after it up to a whole vector.
inline void normalise(const float* x, int width, const LayerNorm& norm, float* to) {
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
        store(to + c, normal * load_floats(norm.weight + c, count) + load_floats(norm.bias + c, count));
    }
}

inline void normalise_rows(ConstRows x, int count, int width, const LayerNorm& norm, std::uint32_t* to) {
    const std::ptrdiff_t stride = scratch_stride(width);
    float* rows = reinterpret_cast<float*>(to);
    for (int r = 0; r < count; ++r) normalise(x.data + r * x.stride, width, norm, rows + r * stride);
    for (int r = count; r % tile_rows != 0; ++r)
        __builtin_memset(rows + r * stride, 0, static_cast<std::size_t>(width) * sizeof *rows);
}

inline std::size_t block_scratch_words(const EncoderBlock& block) {
    return scratch_words(block.width) + scratch_words(block.fc1.outputs);
}

inline void before_attention(const EncoderBlock& block, ConstRows x, int count, Rows qkv, std::uint32_t* scratch) {
    normalise_rows(x, count, block.width, block.norm1, scratch);
    multiply_rows(scratch, count, block.qkv, qkv, [&](Floats sums, int row, int column, int columns) __attribute__((always_inline)) {
        store_first(qkv.data + row * qkv.stride + column, sums, columns);
    });
}

// Stores x plus scale times the output of a layer.
MASKATTN_INLINE void add_update(const std::uint32_t* input, int count, const LinearLayer& layer, const float* scale,
                                ConstRows x, Rows out) {
    multiply_rows(input, count, layer, out, [&](Floats sums, int row, int column, int columns) __attribute__((always_inline)) {
        const Floats before = load_floats(x.data + row * x.stride + column, columns);
        store_first(out.data + row * out.stride + column, sums * load<Floats>(scale + column) + before, columns);
    });
}

inline void after_attention(const EncoderBlock& block, ConstRows attended, ConstRows x, int count, Rows out,
                            std::uint32_t* scratch) {
    const ConstRows written{out.data, out.stride};
    copy_rows(attended, count, block.width, scratch);
    add_update(scratch, count, block.proj, block.scale1, x, out);
    normalise_rows(written, count, block.width, block.norm2, scratch);
    std::uint32_t* hidden = scratch + scratch_words(block.width);
    const std::ptrdiff_t hidden_stride = scratch_stride(block.fc1.outputs);
    const Rows hidden_rows{reinterpret_cast<float*>(hidden), hidden_stride};
    with_activation(block.activation, [&](auto which) __attribute__((always_inline)) {
        multiply_rows(scratch, count, block.fc1, hidden_rows, [&](Floats sums, int row, int column, int) __attribute__((always_inline)) {
            store(hidden + row * hidden_stride + column, activated<decltype(which)::value>(sums));
        });
    });
    for (int r = count; r % tile_rows != 0; ++r)
        __builtin_memset(hidden + r * hidden_stride, 0, static_cast<std::size_t>(hidden_stride) * sizeof *hidden);
    add_update(hidden, count, block.fc2, block.scale2, written, out);
}

constexpr EncoderKernels encoder_kernels = {
    &panel_words, &pack_weight, &linear_scratch_words, &apply_linear, &block_scratch_words, &before_attention, &after_attention,
};

}  // namespace
}  // namespace maskattn
