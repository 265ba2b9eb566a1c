// A block has three phases, each with a wait at its end: rows before attention, attention, rows after it. Sequences are
// processed in groups of about as many rows, whose queries, keys and values stay in L3.
#include "encoder/driver.hpp"

#include <algorithm>
#include <cmath>

#include "attention/driver.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::size_t most_padding = 64;                      // floats, a panel of any instruction set
constexpr std::int64_t group_bytes = std::int64_t{16} << 20;  // about

const EncoderKernels& kernels_for(const Kernels& kernels, bool bfloat16) {
    return bfloat16 ? kernels.encoder.bfloat16 : kernels.encoder.float32;
}

std::int64_t bytes_of_value(bool bfloat16) { return bfloat16 ? 2 : 4; }

ConstRows from(ConstRows x, std::int64_t row) { return {x.data + row * x.stride, x.stride}; }
Rows from(Rows x, std::int64_t row) { return {x.data + row * x.stride, x.stride}; }
ConstValues from(ConstValues x, std::int64_t row, std::int64_t bytes) {
    return {static_cast<const char*>(x.data) + row * x.stride * bytes, x.stride};
}
Values from(Values x, std::int64_t row, std::int64_t bytes) {
    return {static_cast<char*>(x.data) + row * x.stride * bytes, x.stride};
}

// The division of rows into items of work: long ones first, since a weight that is read then serves many rows, and short
// ones last, so that threads finish together.
class RowItems {
  public:
    RowItems(std::int64_t count, int threads) {
        for (std::int64_t row = 0; row < count;) {
            starts_.push_back(row);
            const std::int64_t left = count - row, share = threads > 1 ? left / (2 * threads) : left;
            row += std::clamp<std::int64_t>(share / fewest_item_rows * fewest_item_rows, fewest_item_rows, most_item_rows);
        }
        starts_.push_back(count);
    }

    // Calls work(first row, number of rows, worker) for each item.
    template <class Work>
    void for_each(int threads, Work work) const {
        auto take = [&](std::int64_t item, int worker) noexcept {
            const std::int64_t first = starts_[static_cast<std::size_t>(item)];
            work(first, static_cast<int>(starts_[static_cast<std::size_t>(item) + 1] - first), worker);
        };
        for_each_item(threads, static_cast<std::int64_t>(starts_.size()) - 1, take);
    }

  private:
    std::vector<std::int64_t> starts_;
};

class Block {
  public:
    Block(const EncoderBlock& block, ConstRows x, Rows out, const EncoderExecution& how)
        : block_(block), x_(x), out_(out), how_(how), kernels_(kernels_for(*how.kernels, block.qkv.bfloat16)),
          scratch_(kernels_.block_scratch_words(block), how.threads) {}

    // Processes the sequences [first, last).
    void take(const std::vector<std::int32_t>& starts, std::size_t first, std::size_t last) const {
        const std::int64_t begin = starts[first], count = starts[last] - begin, C = block_.width;
        if (count == 0) return;
        const std::int64_t bytes = bytes_of_value(block_.qkv.bfloat16);
        const std::int64_t words = count * C * bytes / 4;  // a head's width is a multiple of 8
        const AlignedWords memory(static_cast<std::size_t>(4 * words + count * block_.heads));
        const Values qkv{memory.data(), 3 * C}, attended{memory.data() + 3 * words, C};
        const RowItems items(count, how_.threads);
        items.for_each(how_.threads, [&](std::int64_t row, int rows, int worker) {
            kernels_.before_attention(block_, from(x_, begin + row), rows, from(qkv, row, bytes), scratch_.of(worker));
        });
        attend(starts, first, last, qkv, attended, reinterpret_cast<float*>(memory.data() + 4 * words));
        items.for_each(how_.threads, [&](std::int64_t row, int rows, int worker) {
            kernels_.after_attention(block_, from(ConstValues{attended.data, C}, row, bytes), from(x_, begin + row), rows,
                                     from(out_, begin + row), scratch_.of(worker));
        });
    }

  private:
    void attend(const std::vector<std::int32_t>& starts, std::size_t first, std::size_t last, Values qkv, Values attended,
                float* lse) const {
        const std::int64_t C = block_.width, count = starts[last] - starts[first];
        const int width = block_.width / block_.heads;
        const std::int64_t bytes = bytes_of_value(block_.qkv.bfloat16);
        const auto part = [&](std::int64_t which) { return static_cast<const char*>(qkv.data) + which * C * bytes; };
        Attention problem{};
        problem.bfloat16 = block_.qkv.bfloat16;
        problem.head_width = width;
        problem.scale = 1.0f / std::sqrt(static_cast<float>(width));
        problem.q = {part(0), 0, width, qkv.stride};
        problem.k = {part(1), 0, width, qkv.stride};
        problem.v = {part(2), 0, width, qkv.stride};
        problem.out = {attended.data, 0, width, attended.stride};
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

PackedLinear::PackedLinear(const Kernels& kernels, bool bfloat16, ConstValues weight, const float* bias, int inputs,
                           int outputs)
    : panels_(kernels_for(kernels, bfloat16).panel_words(inputs, outputs)), bias_(padded_values(bias, outputs, 0.0f)),
      layer_{bfloat16, inputs, outputs, panels_.data(), bias_.data()} {
    kernels_for(kernels, bfloat16).pack(weight, inputs, outputs, panels_.data());
}

void apply_linear_layer(const LinearLayer& layer, Activation activation, ConstValues x, std::int64_t count, Values out,
                        const EncoderExecution& how) {
    const EncoderKernels& kernels = kernels_for(*how.kernels, layer.bfloat16);
    const std::int64_t bytes = bytes_of_value(layer.bfloat16);
    const WordsByWorker scratch(kernels.linear_scratch_words(layer.inputs), how.threads);
    RowItems(count, how.threads).for_each(how.threads, [&](std::int64_t row, int rows, int worker) {
        kernels.apply(layer, activation, from(x, row, bytes), rows, from(out, row, bytes), scratch.of(worker));
    });
}

void apply_encoder_block(const EncoderBlock& block, ConstRows x, const std::vector<std::int32_t>& starts, Rows out,
                         const EncoderExecution& how) {
    const Block taken(block, x, out, how);
    const std::int64_t bytes_of_row = 4 * block.width * bytes_of_value(block.qkv.bfloat16);
    const std::int64_t rows = starts.back(), groups = std::max<std::int64_t>(ceil_divide(rows * bytes_of_row, group_bytes), 1);
    std::size_t first = 0;
    for (std::int64_t group = 1; group <= groups; ++group) {
        std::size_t last = first;
        while (last + 1 < starts.size() && starts[last] < ceil_divide(rows * group, groups)) ++last;
        taken.take(starts, first, last);
        first = last;
    }
}

}  // namespace maskattn
