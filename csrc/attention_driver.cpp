// Pairs (a head of a sequence) are taken in waves whose packed operands stay within a budget. Within a wave each phase
// is a list of items that the pool's threads pull: first packing, then attention. What an item computes does not depend
// on who computes it, so neither does the result on the number of threads.
#include "attention_driver.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "aligned_words.hpp"
#include "threads.hpp"

namespace maskattn {
namespace {

constexpr std::size_t wave_words = std::size_t{64} << 18;  // 64 MiB of packed operands, or one pair's
constexpr std::int64_t packed_blocks = 8;                  // blocks of keys of an item of packing

struct Item {
    std::int32_t pair;
    std::int64_t part;
};

// Items of the pairs [first, last), as many parts each as `count` says.
template <class Count>
std::vector<Item> items_of(const std::vector<Pair>& pairs, std::size_t first, std::size_t last, Count count) {
    std::vector<Item> items;
    for (std::size_t p = first; p < last; ++p)
        for (std::int64_t part = 0, all = count(pairs[p]); part < all; ++part)
            items.push_back({static_cast<std::int32_t>(p), part});
    return items;
}

// Pairs from `first` on whose packed operands fit the budget, at least one: where the wave ends, and where in the
// buffer each pair's operands are.
struct Wave {
    std::size_t first, last;
    std::vector<std::size_t> offset;  // by pair - first; one more for the end

    template <class PairWords>
    Wave(const std::vector<Pair>& pairs, std::size_t from, PairWords words) : first(from), last(from), offset{0} {
        while (last < pairs.size()) {
            const std::size_t end = offset.back() + words(pairs[last]);
            if (last > first && end > wave_words) break;
            offset.push_back(end);
            ++last;
        }
    }
};

std::size_t item_bytes(const Attention& a) { return a.bfloat16 ? 2 : 4; }

// Calls visit(row) for each of `total` rows that is not among these.
template <class Visit>
void for_each_other_row(const Rows& rows, std::int64_t total, Visit visit) {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i <= rows.count; ++i) {
        const std::int64_t kept = i < rows.count ? rows.index[i] : total;
        for (; next < kept; ++next) visit(next);
        ++next;
    }
}

void write_zeros(const Strided<void>& x, const Attention& a, const Pair& pair, std::int64_t row) {
    const auto item = static_cast<std::ptrdiff_t>(item_bytes(a));
    char* to = static_cast<char*>(x.data) + item * (pair.sequence * x.sequence + pair.head * x.head + row * x.row);
    std::memset(to, 0, static_cast<std::size_t>(a.head_width) * item_bytes(a));
}

float& at(const Strided<float>& x, const Pair& pair, std::int64_t row) {
    return x.data[pair.sequence * x.sequence + pair.head * x.head + row * x.row];
}

void fill_background(const Attention& a, const Sequences& all, int threads) {
    auto fill = [&](std::int64_t item, int) noexcept {
        const Pair& pair = all.pairs[static_cast<std::size_t>(item)];
        if (pair.queries.index == nullptr) return;
        for_each_other_row(pair.queries, all.rows_q, [&](std::int64_t row) {
            write_zeros(a.out, a, pair, row);
            at(a.lse, pair, row) = -std::numeric_limits<float>::infinity();
        });
    };
    if (all.dense) for_each_item(threads, static_cast<std::int64_t>(all.pairs.size()), fill);
}

void fill_background(const Attention& a, const Gradients& g, const Sequences& all, int threads) {
    auto fill = [&](std::int64_t item, int) noexcept {
        const Pair& pair = all.pairs[static_cast<std::size_t>(item)];
        if (pair.queries.index != nullptr)
            for_each_other_row(pair.queries, all.rows_q, [&](std::int64_t row) { write_zeros(g.dq, a, pair, row); });
        for_each_other_row(pair.keys, all.rows_k, [&](std::int64_t row) {
            write_zeros(g.dk, a, pair, row);
            write_zeros(g.dv, a, pair, row);
            if (g.dbias.data) at(g.dbias, pair, row) = 0.0f;
        });
    };
    if (all.dense) for_each_item(threads, static_cast<std::int64_t>(all.pairs.size()), fill);
}

std::int64_t tiles_of(const Pair& pair) { return parts(pair.queries.count, tile_queries); }
std::int64_t blocks_of(const Pair& pair) { return parts(pair.keys.count, block_keys); }

// Chunks of one pair wait for each other in their order, those of different pairs do not: first chunks come first.
std::vector<Item> chunks_across(const std::vector<Pair>& pairs, const Wave& wave, int head_width) {
    const auto chunks_of = [&](const Pair& pair) { return parts(pair.keys.count, chunk_keys(head_width)); };
    std::vector<Item> items = items_of(pairs, wave.first, wave.last, chunks_of);
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.part < b.part; });
    return items;
}

}  // namespace

void attention_forward(const Attention& a, const Sequences& sequences, const Execution& how) {
    const ForwardKernels& kernels = a.bfloat16 ? how.kernels->forward_bfloat16 : how.kernels->forward_float32;
    const std::vector<Pair>& pairs = sequences.pairs;
    const std::size_t block_words = kernels.block_words(a.head_width);
    const std::size_t scratch_words = kernels.scratch_words(a.head_width);
    const AlignedWords scratch(scratch_words * static_cast<std::size_t>(how.threads));
    fill_background(a, sequences, how.threads);
    for (std::size_t first = 0; first < pairs.size();) {
        const Wave wave(pairs, first,
                        [&](const Pair& pair) { return block_words * static_cast<std::size_t>(blocks_of(pair)); });
        const AlignedWords packed(wave.offset.back());
        const auto operands = [&](const Item& item) {
            return packed.data() + wave.offset[static_cast<std::size_t>(item.pair) - wave.first];
        };
        const std::vector<Item> packing = items_of(pairs, wave.first, wave.last, [](const Pair& pair) {
            return pair.queries.count > 0 ? parts(blocks_of(pair), packed_blocks) : 0;
        });
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = packing[static_cast<std::size_t>(i)];
            const Pair& pair = pairs[static_cast<std::size_t>(item.pair)];
            const std::int64_t from = item.part * packed_blocks;
            kernels.pack_keys(a, pair, from, std::min(from + packed_blocks, blocks_of(pair)), operands(item));
        };
        for_each_item(how.threads, static_cast<std::int64_t>(packing.size()), pack);
        const std::vector<Item> tiles = items_of(pairs, wave.first, wave.last, tiles_of);
        auto attend = [&](std::int64_t i, int worker) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels.attend(a, pairs[static_cast<std::size_t>(item.pair)], item.part, operands(item),
                           scratch.data() + scratch_words * static_cast<std::size_t>(worker));
        };
        for_each_item(how.threads, static_cast<std::int64_t>(tiles.size()), attend);
        first = wave.last;
    }
}

void attention_backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how,
                        double* dslopes) {
    const BackwardKernels& kernels = a.bfloat16 ? how.kernels->backward_bfloat16 : how.kernels->backward_float32;
    const std::vector<Pair>& pairs = sequences.pairs;
    const std::size_t tile_words = kernels.tile_words(a.head_width);
    const std::size_t scratch_words = kernels.scratch_words(a.head_width);
    const AlignedWords scratch(scratch_words * static_cast<std::size_t>(how.threads));
    fill_background(a, g, sequences, how.threads);
    for (std::size_t first = 0; first < pairs.size();) {
        const Wave wave(pairs, first,
                        [&](const Pair& pair) { return tile_words * static_cast<std::size_t>(tiles_of(pair)); });
        const AlignedWords packed(wave.offset.back());
        const auto operands = [&](const Item& item) {
            return packed.data() + wave.offset[static_cast<std::size_t>(item.pair) - wave.first];
        };
        const std::vector<Item> tiles = items_of(pairs, wave.first, wave.last, tiles_of);
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels.pack_queries(a, g, pairs[static_cast<std::size_t>(item.pair)], item.part, operands(item));
        };
        for_each_item(how.threads, static_cast<std::int64_t>(tiles.size()), pack);

        const std::vector<Item> chunks = chunks_across(pairs, wave, a.head_width);
        std::vector<std::size_t> progress_of(wave.last - wave.first + 1, 0);
        for (const Item& item : chunks) ++progress_of[static_cast<std::size_t>(item.pair) - wave.first + 1];
        for (std::size_t p = 1; p < progress_of.size(); ++p) progress_of[p] += progress_of[p - 1];
        std::vector<std::int64_t> progress(chunks.size(), 0);
        std::vector<double> dslope(chunks.size(), 0.0);
        auto take = [&](std::int64_t i, int worker) noexcept {
            const auto index = static_cast<std::size_t>(i);
            const Item& item = chunks[index];
            kernels.take_chunk(a, g, pairs[static_cast<std::size_t>(item.pair)], item.part, operands(item),
                               progress.data() + progress_of[static_cast<std::size_t>(item.pair) - wave.first],
                               &dslope[index], scratch.data() + scratch_words * static_cast<std::size_t>(worker));
        };
        for_each_item(how.threads, static_cast<std::int64_t>(chunks.size()), take);
        if (dslopes != nullptr)
            for (std::size_t i = 0; i < chunks.size(); ++i)
                dslopes[pairs[static_cast<std::size_t>(chunks[i].pair)].head] += dslope[i];
        first = wave.last;
    }
}

}  // namespace maskattn
