// The driver, which splits layers and blocks into items of work for the pool. Plain C++ without Python.
#pragma once

#include <cstdint>
#include <vector>

#include "dispatch/kernels.hpp"
#include "runtime/aligned_words.hpp"

namespace maskattn {

// A packed linear layer and the memory that it points to.
class PackedLinear {
  public:
    // Packs a weight (O, I) of bfloat16 or float32, and a bias (O,), or nullptr for none. Throws std::bad_alloc.
    PackedLinear(const Kernels& kernels, bool bfloat16, ConstValues weight, const float* bias, int inputs, int outputs,
                 int threads);
    const LinearLayer& layer() const { return layer_; }

  private:
    AlignedWords panels_;
    std::vector<float> bias_;
    LinearLayer layer_;
};

// Returns `count` values, `fill` for nullptr, followed by zeros up to whole vectors of any instruction set.
std::vector<float> padded_values(const float* values, int count, float fill);

// The kernels and the number of threads of a call. Both operations throw std::bad_alloc.
struct EncoderExecution {
    const Kernels* kernels;
    int threads;
};

// Computes act(x W + b) of `count` rows, in the dtype of the weights. `out` must not overlap x.
void apply_linear_layer(const LinearLayer& layer, Activation activation, ConstValues x, std::int64_t count, Values out,
                        const EncoderExecution& how);

// Computes a block on rows of width C; sequence b consists of rows starts[b] to starts[b + 1]. `out` may be x.
void apply_encoder_block(const EncoderBlock& block, ConstRows x, const std::vector<std::int32_t>& starts, Rows out,
                         const EncoderExecution& how);

}  // namespace maskattn
