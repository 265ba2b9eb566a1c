// The layers of a vision transformer's block in inference as plain data, shared by the bindings, the driver and the
// kernels of each instruction set. Rows of a block, biases and norms are float32; what its products read is float32 or
// bfloat16, as the weights are.
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

struct LinearLayer {
    bool bfloat16;  // dtype of the weights, and of the values that the layer reads
    int inputs, outputs;  // of bfloat16 an even number of inputs
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

// Rows of values of the weights' dtype, `stride` values apart.
struct ConstValues {
    const void* data;
    std::ptrdiff_t stride;
};
struct Values {
    void* data;
    std::ptrdiff_t stride;
};

// Rows of an item of work, in multiples of `fewest_item_rows`, which are whole products of every instruction set. The
// values of `most_item_rows`, and the hidden features of an MLP up to about 2,000 in bfloat16, stay in L2 while the
// weights come from L3, which could not keep up if weights served fewer rows.
constexpr int fewest_item_rows = 48, most_item_rows = 192;

// Entry points of one instruction set for one dtype of the weights. At most `most_item_rows` rows at a time; sizes are in
// 32-bit words, multiples of 16.
struct EncoderKernels {
    int panel_outputs;  // neighbouring outputs of a panel
    std::size_t (*panel_words)(int inputs, int outputs);
    // Packs a panel of a weight (O, I).
    void (*pack)(ConstValues weight, int inputs, int outputs, int panel, std::uint32_t* panels);
    std::size_t (*linear_scratch_words)(int inputs);
    void (*apply)(const LinearLayer&, Activation, ConstValues x, int count, Values out, std::uint32_t* scratch);
    std::size_t (*block_scratch_words)(const EncoderBlock&);
    // Computes norm1 and qkv.
    void (*before_attention)(const EncoderBlock&, ConstRows x, int count, Values qkv, std::uint32_t* scratch);
    // Computes everything from proj on; `out` may be x.
    void (*after_attention)(const EncoderBlock&, ConstValues attended, ConstRows x, int count, Rows out,
                            std::uint32_t* scratch);
};

struct EncoderKernelsByDtype {
    EncoderKernels float32, bfloat16;
};

}  // namespace maskattn
