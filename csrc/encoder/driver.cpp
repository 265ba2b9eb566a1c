// Rows are divided into items of item_rows. A block has three phases, each with a wait at its end: rows before
// attention, attention, rows after it. Sequences are processed in groups whose queries, keys and values stay in L3.
#include "encoder/driver.hpp"

#include <algorithm>
#include <cmath>

#include "attention/driver.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::size_t most_padding = 64;                      // floats, a panel of any instruction set
constexpr std::int64_t group_words = std::int64_t{4} << 20;  // 16 MiB, or what one sequence needs

ConstRows from(ConstRows x, std::int64_t row) { return {x.data + row * x.stride, x.stride}; }
Rows from(Rows x, std::int64_t row) { return {x.data + row * x.stride, x.stride}; }

// Calls work(first row, number of rows, worker) for each item.
template <class Work>
void for_each_rows(std::int64_t count, int threads, Work work) {
    auto take = [&](std::int64_t item, int worker) noexcept {
        const std::int64_t first = item * item_rows;
        work(first, static_cast<int>(std::min<std::int64_t>(item_rows, count - first)), worker);
    };
    for_each_item(threads, ceil_divide(count, item_rows), take);
}

class Block {
  public:
    Block(const EncoderBlock& block, ConstRows x, Rows out, const EncoderExecution& how)
        : block_(block), x_(x), out_(out), how_(how), kernels_(how.kernels->encoder),
          scratch_(kernels_.block_scratch_words(block), how.threads) {}

    // Processes the sequences [first, last).
    void take(const std::vector<std::int32_t>& starts, std::size_t first, std::size_t last) const {
        const std::int64_t begin = starts[first], count = starts[last] - begin, C = block_.width;
        if (count == 0) return;
        const AlignedWords memory(static_cast<std::size_t>(count * (4 * C + block_.heads)));
        float* qkv = reinterpret_cast<float*>(memory.data());
        float *attended = qkv + count * 3 * C, *lse = attended + count * C;
        for_each_rows(count, how_.threads, [&](std::int64_t row, int rows, int worker) {
            kernels_.before_attention(block_, from(x_, begin + row), rows, {qkv + row * 3 * C, 3 * C}, scratch_.of(worker));
        });
        attend(starts, first, last, qkv, attended, lse);
        for_each_rows(count, how_.threads, [&](std::int64_t row, int rows, int worker) {
            kernels_.after_attention(block_, {attended + row * C, C}, from(x_, begin + row), rows,
                                     from(out_, begin + row), scratch_.of(worker));
        });
    }

  private:
    void attend(const std::vector<std::int32_t>& starts, std::size_t first, std::size_t last, float* qkv, float* attended,
                float* lse) const {
        const std::int64_t C = block_.width, count = starts[last] - starts[first];
        const int width = block_.width / block_.heads;
        Attention problem{};
        problem.head_width = width;
        problem.scale = 1.0f / std::sqrt(static_cast<float>(width));
        problem.q = {qkv, 0, width, 3 * C};
        problem.k = {qkv + C, 0, width, 3 * C};
        problem.v = {qkv + 2 * C, 0, width, 3 * C};
        problem.out = {attended, 0, width, C};
        problem.lse = {lse, 0, count, 1};
        Sequences sequences;
        for (std::size_t s = first; s < last; ++s) {
            const Tokens tokens{starts[s] - starts[first], starts[s + 1] - starts[s], nullptr};
            for (std::int32_t h = 0; h < block_.heads; ++h)
                sequences.heads.push_back({static_cast<std::int32_t>(s - first), h, tokens, tokens});
        }
        attention_forward(problem, sequences, {&how_.kernels->attention, how_.threads});
    }

    const EncoderBlock& block_;
    const ConstRows x_;
    const Rows out_;
    const EncoderExecution& how_;
    const EncoderKernels& kernels_;
    const WordsByWorker scratch_;
};

}  // namespace

std::vector<float> padded_values(const float* values, int count, float fill) {
    std::vector<float> padded(static_cast<std::size_t>(count) + most_padding, 0.0f);
    if (values != nullptr)
        std::copy(values, values + count, padded.begin());
    else
        std::fill(padded.begin(), padded.begin() + count, fill);
    return padded;
}

PackedLinear::PackedLinear(const EncoderKernels& kernels, const float* weight, std::ptrdiff_t stride, const float* bias,
                           int inputs, int outputs)
    : panels_(kernels.panel_words(inputs, outputs)), bias_(padded_values(bias, outputs, 0.0f)),
      layer_{inputs, outputs, panels_.data(), bias_.data()} {
    kernels.pack(weight, stride, inputs, outputs, panels_.data());
}

void apply_linear_layer(const LinearLayer& layer, Activation activation, ConstRows x, std::int64_t count, Rows out,
                        const EncoderExecution& how) {
    const EncoderKernels& kernels = how.kernels->encoder;
    const WordsByWorker scratch(kernels.linear_scratch_words(layer.inputs), how.threads);
    for_each_rows(count, how.threads, [&](std::int64_t row, int rows, int worker) {
        kernels.apply(layer, activation, from(x, row), rows, from(out, row), scratch.of(worker));
    });
}

void apply_encoder_block(const EncoderBlock& block, ConstRows x, const std::vector<std::int32_t>& starts, Rows out,
                         const EncoderExecution& how) {
    const Block taken(block, x, out, how);
    const std::int64_t most_rows = std::max<std::int64_t>(group_words / (4 * block.width), 1);
    for (std::size_t first = 0, last = 0; first + 1 < starts.size(); first = last) {
        while (last + 1 < starts.size() && (last == first || starts[last + 1] - starts[first] <= most_rows)) ++last;
        taken.take(starts, first, last);
    }
}

}  // namespace maskattn
