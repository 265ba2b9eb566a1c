// The layers of a vision transformer's block in inference as plain data, shared by the bindings, the driver and the
// kernels of each instruction set. All numbers are float32.
//
//   x += scale1 * (attention(norm1(x) Wqkv + bqkv) Wproj + bproj)
//   x += scale2 * (act(norm2(x) Wfc1 + bfc1) Wfc2 + bfc2)
//
// Dimension key: T rows, I inputs and O outputs of a linear layer, C width of a block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskattn {

enum class Activation { none, gelu, gelu_tanh };

// Rows of an item of work, a multiple of the rows of a register tile. Their values, and the hidden features of an MLP up
// to about 2,000, stay in L2 while the weights come from L3.
constexpr int item_rows = 48;

struct LinearLayer {
    int inputs, outputs;
    const std::uint32_t* panels;  // the weights, as `pack` stores them
    const float* bias;            // zeros for none, up to whole vectors
};

struct LayerNorm {
    const float* weight;
    const float* bias;
    float epsilon;
};

struct EncoderBlock {
    int width, heads;
    LayerNorm norm1, norm2;
    LinearLayer qkv, proj, fc1, fc2;
    const float *scale1, *scale2;  // of each channel, up to whole vectors; ones for none
    Activation activation;
};

// Rows of floats, `stride` apart.
struct ConstRows {
    const float* data;
    std::ptrdiff_t stride;
};
struct Rows {
    float* data;
    std::ptrdiff_t stride;
};

// Entry points of one instruction set. At most item_rows rows at a time; sizes are in 32-bit words, multiples of 16.
struct EncoderKernels {
    std::size_t (*panel_words)(int inputs, int outputs);
    // Packs a weight (O, I), whose rows are `stride` floats apart, into panels of neighbouring outputs.
    void (*pack)(const float* weight, std::ptrdiff_t stride, int inputs, int outputs, std::uint32_t* panels);
    std::size_t (*linear_scratch_words)(int inputs);
    void (*apply)(const LinearLayer&, Activation, ConstRows x, int count, Rows out, std::uint32_t* scratch);
    std::size_t (*block_scratch_words)(const EncoderBlock&);
    // Computes norm1 and qkv.
    void (*before_attention)(const EncoderBlock&, ConstRows x, int count, Rows qkv, std::uint32_t* scratch);
    // Computes everything from proj on; `out` may be x.
    void (*after_attention)(const EncoderBlock&, ConstRows attended, ConstRows x, int count, Rows out,
                            std::uint32_t* scratch);
};

}  // namespace maskattn
