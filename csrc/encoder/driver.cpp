// A block takes rows before attention, attention, and rows after it. Each worker takes its own share of the sequences, in
// groups whose queries, keys and values stay in its cache: the same in every block of a network, so that it finds there
// what the block before wrote. Rows that another core wrote come slowly, above all where cores share no cache.
#include "encoder/driver.hpp"

#include <algorithm>
#include <cmath>

#include "attention/driver.hpp"
#include "encoder/division.hpp"
#include "runtime/chains.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::size_t most_padding = 64;  // floats, a panel of any instruction set
// Of a group's queries, keys, values and attended values, about.
constexpr std::int64_t group_bytes = std::int64_t{2} << 20;
// Groups that take more, each a long sequence, are processed one after the other by all workers.
constexpr std::size_t most_bytes_together = std::size_t{32} << 20;

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

class Block {
  public:
    Block(const EncoderBlock& block, ConstRows x, const std::vector<std::int32_t>& starts, Rows out,
          const EncoderExecution& how)
        : block_(block), x_(x), starts_(starts), out_(out), how_(how),
          kernels_(kernels_for(*how.kernels, block.qkv.bfloat16)),
          attention_(block.qkv.bfloat16 ? how.kernels->attention.forward_bfloat16
                                        : how.kernels->attention.forward_float32),
          bytes_(bytes_of_value(block.qkv.bfloat16)), head_width_(block.width / block.heads),
          attention_words_(attention_.scratch_words(head_width_)),
          groups_(groups_of(starts, group_bytes / (4 * block.width * bytes_), how.threads)) {}

    void run() const {
        std::size_t most_words = 0, most_blocks = 0;
        for (const Group& group : groups_) {
            most_words = std::max(most_words, Layout(*this, group).words);
            if (!group.is_one()) most_blocks = std::max(most_blocks, most_blocks_words(group));
        }
        const WordsByWorker scratch(std::max(kernels_.block_scratch_words(block_), attention_words_ + most_blocks),
                                    how_.threads);
        const bool together = most_words * 4 <= most_bytes_together;
        const WordsByWorker memory(most_words, together ? Chains::places(groups_.size(), how_.threads) : 1);
        if (together) {
            Chains chains;
            for (const Group& group : groups_) add(chains, group, memory, scratch);
            chains.run(how_.threads);
            return;
        }
        for (const Group& group : groups_) {
            const Group shared{group.first, group.last, 0, how_.threads};
            Chains chains;
            add(chains, shared, memory, scratch);
            chains.run(how_.threads);
        }
    }

  private:
    // Where a group's values are between its steps, in words from the start of its memory.
    struct Layout {
        std::int64_t attended, lse, blocks;  // after queries, keys and values; blocks of keys of a group of one sequence
        std::size_t words;

        Layout(const Block& of, const Group& group) {
            const std::int64_t rows = of.starts_[group.last] - of.starts_[group.first];
            const std::int64_t words_of_values = rows * of.block_.width * of.bytes_ / 4;  // a head has a multiple of 8
            attended = 3 * words_of_values;
            lse = 4 * words_of_values;
            blocks = ceil_divide(lse + rows * of.block_.heads, 16) * 16;
            words = static_cast<std::size_t>(blocks);
            if (group.is_one()) words += static_cast<std::size_t>(of.block_.heads) * of.blocks_words(rows);
        }
    };
    struct Place {
        Values qkv, attended;
        float* lse;
        std::uint32_t* blocks;

        Place(const Block& of, const Group& group, std::uint32_t* memory) {
            const Layout layout(of, group);
            qkv = {memory, 3 * std::ptrdiff_t{of.block_.width}};
            attended = {memory + layout.attended, of.block_.width};
            lse = reinterpret_cast<float*>(memory + layout.lse);
            blocks = memory + layout.blocks;
        }
    };

    std::size_t blocks_words(std::int64_t keys) const {
        return attention_.block_words(head_width_) * static_cast<std::size_t>(ceil_divide(keys, block_keys));
    }
    std::size_t most_blocks_words(const Group& group) const {
        std::int32_t most = 0;
        for (std::size_t s = group.first; s < group.last; ++s) most = std::max(most, starts_[s + 1] - starts_[s]);
        return blocks_words(most);
    }
    Head head_of(const Group& group, std::int64_t number) const {
        const std::size_t s = group.first + static_cast<std::size_t>(number / block_.heads);
        const Tokens tokens{starts_[s] - starts_[group.first], starts_[s + 1] - starts_[s], nullptr};
        return {0, static_cast<std::int32_t>(number % block_.heads), tokens, tokens};
    }
    Attention attention_at(const Place& place) const {
        const auto part = [&](std::int64_t which) {
            return static_cast<const char*>(place.qkv.data) + which * block_.width * bytes_;
        };
        Attention problem{};
        problem.bfloat16 = block_.qkv.bfloat16;
        problem.head_width = head_width_;
        problem.scale = 1.0f / std::sqrt(static_cast<float>(head_width_));
        problem.q = {part(0), 0, head_width_, place.qkv.stride};
        problem.k = {part(1), 0, head_width_, place.qkv.stride};
        problem.v = {part(2), 0, head_width_, place.qkv.stride};
        problem.out = {place.attended.data, 0, head_width_, place.attended.stride};
        problem.lse = {place.lse, 0, 1, block_.heads};
        return problem;
    }

    void add(Chains& chains, const Group& group, const WordsByWorker& memory, const WordsByWorker& scratch) const {
        const RowItems items(starts_[group.last] - starts_[group.first], group.workers);
        chains.begin(group.owner);
        add_before_attention(chains, group, items, memory, scratch);
        if (group.is_one())
            add_attention_in_pieces(chains, group, memory, scratch);
        else
            add_attention(chains, group, memory, scratch);
        add_after_attention(chains, group, items, memory, scratch);
    }

    void add_before_attention(Chains& chains, const Group& group, const RowItems& items, const WordsByWorker& memory,
                              const WordsByWorker& scratch) const {
        chains.add(items.count(), [this, &group, items, &memory, &scratch](std::int64_t item, At at) noexcept {
            const Place place(*this, group, memory.of(at.place));
            const std::int64_t row = items.first(item);
            kernels_.before_attention(block_, from(x_, starts_[group.first] + row), items.rows(item),
                                      from(place.qkv, row, bytes_), scratch.of(at.worker));
        });
    }

    // An item is a head.
    void add_attention(Chains& chains, const Group& group, const WordsByWorker& memory,
                       const WordsByWorker& scratch) const {
        const auto heads = static_cast<std::int64_t>(group.last - group.first) * block_.heads;
        chains.add(heads, [this, &group, &memory, &scratch](std::int64_t number, At at) noexcept {
            const Place place(*this, group, memory.of(at.place));
            std::uint32_t* own = scratch.of(at.worker);
            attend_head(attention_, attention_at(place), head_of(group, number), own + attention_words_, own);
        });
    }

    // An item is a part of a head of the one sequence, which may be long.
    void add_attention_in_pieces(Chains& chains, const Group& group, const WordsByWorker& memory,
                                 const WordsByWorker& scratch) const {
        const Head any = head_of(group, 0);
        const std::int64_t packings = packings_of(any), tiles = tiles_of(any);
        const auto blocks_at = [words = blocks_words(any.keys.count)](const Place& place, std::int64_t head) {
            return place.blocks + static_cast<std::size_t>(head) * words;
        };
        const auto pack = [this, packings, blocks_at, &group, &memory](std::int64_t item, At at) noexcept {
            const Place place(*this, group, memory.of(at.place));
            const Head head = head_of(group, item / packings);
            pack_keys(attention_, attention_at(place), head, item % packings, blocks_at(place, head.index));
        };
        const auto attend = [this, tiles, blocks_at, &group, &memory, &scratch](std::int64_t item, At at) noexcept {
            const Place place(*this, group, memory.of(at.place));
            const Head head = head_of(group, item / tiles);
            attention_.attend(attention_at(place), head, item % tiles, blocks_at(place, head.index),
                              scratch.of(at.worker));
        };
        chains.add(block_.heads * packings, pack);
        chains.add(block_.heads * tiles, attend);
    }

    void add_after_attention(Chains& chains, const Group& group, const RowItems& items, const WordsByWorker& memory,
                             const WordsByWorker& scratch) const {
        chains.add(items.count(), [this, &group, items, &memory, &scratch](std::int64_t item, At at) noexcept {
            const Place place(*this, group, memory.of(at.place));
            const std::int64_t row = items.first(item), of_all = starts_[group.first] + row;
            const ConstValues attended{place.attended.data, place.attended.stride};
            kernels_.after_attention(block_, from(attended, row, bytes_), from(x_, of_all), items.rows(item),
                                     from(out_, of_all), scratch.of(at.worker));
        });
    }

    const EncoderBlock& block_;
    const ConstRows x_;
    const std::vector<std::int32_t>& starts_;
    const Rows out_;
    const EncoderExecution& how_;
    const EncoderKernels& kernels_;
    const ForwardKernels& attention_;
    const std::int64_t bytes_;  // of a value
    const int head_width_;
    const std::size_t attention_words_;  // of scratch
    const std::vector<Group> groups_;
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
                           int outputs, int threads)
    : panels_(kernels_for(kernels, bfloat16).panel_words(inputs, outputs)), bias_(padded_values(bias, outputs, 0.0f)),
      layer_{bfloat16, inputs, outputs, panels_.data(), bias_.data()} {
    const EncoderKernels& used = kernels_for(kernels, bfloat16);
    // Most of the time the system clears fresh pages, which threads can wait for side by side.
    auto pack = [&](std::int64_t panel, int) noexcept {
        used.pack(weight, inputs, outputs, static_cast<int>(panel), panels_.data());
    };
    for_each_item(threads, (outputs + used.panel_outputs - 1) / used.panel_outputs, pack);
}

void apply_linear_layer(const LinearLayer& layer, Activation activation, ConstValues x, std::int64_t count, Values out,
                        const EncoderExecution& how) {
    const EncoderKernels& kernels = kernels_for(*how.kernels, layer.bfloat16);
    const std::int64_t bytes = bytes_of_value(layer.bfloat16);
    const WordsByWorker scratch(kernels.linear_scratch_words(layer.inputs), how.threads);
    const RowItems items(count, how.threads);
    auto take = [&](std::int64_t item, int worker) noexcept {
        const std::int64_t row = items.first(item);
        kernels.apply(layer, activation, from(x, row, bytes), items.rows(item), from(out, row, bytes), scratch.of(worker));
    };
    for_each_item(how.threads, items.count(), take);
}

void apply_encoder_block(const EncoderBlock& block, ConstRows x, const std::vector<std::int32_t>& starts, Rows out,
                         const EncoderExecution& how) {
    Block(block, x, starts, out, how).run();
}

}  // namespace maskattn
