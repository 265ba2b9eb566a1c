// Items of work that the pool's threads pull. A pair (a head of a sequence) is one item where that leaves no thread idle
// for long: its operands are packed and used by one core. The others are taken in waves whose packed operands stay within
// a budget; within a wave each phase is a list of items, which the threads wait for: first packing, then attention. What
// is computed depends neither on who computes it nor on which way a pair goes, so neither does the result on the number
// of threads.
#include "attention_driver.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "aligned_words.hpp"
#include "threads.hpp"

namespace maskattn {
namespace {

constexpr std::size_t wave_words = std::size_t{16} << 18;   // 16 MiB of packed operands, or one pair's: they stay in L3
constexpr std::size_t whole_words = std::size_t{8} << 18;   // 8 MiB of packed operands of a pair that is one item,
constexpr std::size_t thread_words = std::size_t{64} << 18;  // 64 MiB of those of all threads
constexpr std::int64_t items_a_thread = 3;                   // at the least
constexpr std::int64_t most_idle = 16;                       // of the threads' time, at most one part in so many
constexpr std::int64_t packed_blocks = 8;                    // blocks of keys of an item of packing

using Pairs = std::vector<const Pair*>;

std::int64_t work_of(const Pair& pair) { return pair.queries.count * pair.keys.count; }

// Whether threads that each take the next pair end together, or nearly.
bool goes_round(const Pairs& pairs, int threads) {
    std::vector<std::int64_t> ends(static_cast<std::size_t>(threads), 0);  // a heap: the first thread to end is in front
    std::int64_t total = 0, last = 0;
    for (const Pair* pair : pairs) {
        std::pop_heap(ends.begin(), ends.end(), std::greater<>());
        ends.back() += work_of(*pair);
        total += work_of(*pair);
        last = std::max(last, ends.back());
        std::push_heap(ends.begin(), ends.end(), std::greater<>());
    }
    return (last * threads - total) * most_idle <= last * threads;
}

// Pairs that are items as a whole, the longest first so that threads end together, and those that go in waves.
struct Division {
    Pairs whole, in_waves;
    std::size_t most_words = 0;  // of the packed operands of a whole pair

    template <class PairWords>
    Division(const std::vector<Pair>& pairs, int threads, PairWords words_of) {
        const std::size_t most = std::min(whole_words, thread_words / static_cast<std::size_t>(threads));
        std::int64_t total = 0;
        for (const Pair& pair : pairs) total += work_of(pair);
        for (const Pair& pair : pairs) {
            const bool fair = threads == 1 || work_of(pair) <= total / (items_a_thread * threads);
            (fair && words_of(pair) <= most ? whole : in_waves).push_back(&pair);
        }
        std::stable_sort(whole.begin(), whole.end(),
                         [](const Pair* a, const Pair* b) { return work_of(*a) > work_of(*b); });
        if (!goes_round(whole, threads)) {
            in_waves.insert(in_waves.end(), whole.begin(), whole.end());
            whole.clear();
        }
        for (const Pair* pair : whole) most_words = std::max(most_words, words_of(*pair));
    }
};

struct Item {
    std::size_t place;  // of the pair
    std::int64_t part;
};

// Pairs from place `first` on whose packed operands fit the budget, at least one.
struct Wave {
    const Pairs& pairs;
    std::size_t first, last;
    std::vector<std::size_t> offset{0};  // of a pair's operands in the buffer, by place - first; one more for the end

    template <class PairWords>
    Wave(const Pairs& all, std::size_t from, PairWords words_of) : pairs(all), first(from), last(from) {
        while (last < pairs.size()) {
            const std::size_t end = offset.back() + words_of(*pairs[last]);
            if (last > first && end > wave_words) break;
            offset.push_back(end);
            ++last;
        }
    }

    // As many of each pair as `count` says.
    template <class Count>
    std::vector<Item> items(Count count) const {
        std::vector<Item> all;
        for (std::size_t place = first; place < last; ++place)
            for (std::int64_t part = 0, parts = count(*pairs[place]); part < parts; ++part) all.push_back({place, part});
        return all;
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
            if (a.lse_rest.data) at(a.lse_rest, pair, row) = 0.0f;
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

std::int64_t blocks_of(const Pair& pair) { return parts(pair.keys.count, block_keys); }

class Forward {
  public:
    Forward(const Attention& a, const Sequences& sequences, const Execution& how)
        : a_(a), kernels_(a.bfloat16 ? how.kernels->forward_bfloat16 : how.kernels->forward_float32),
          threads_(how.threads), scratch_words_(kernels_.scratch_words(a.head_width)),
          division_(sequences.pairs, how.threads, [this](const Pair& pair) { return words_of(pair); }),
          scratch_(scratch_words_ + division_.most_words, how.threads) {}

    void take_whole_pairs() const {
        auto take = [&](std::int64_t i, int worker) noexcept {
            const Pair& pair = *division_.whole[static_cast<std::size_t>(i)];
            std::uint32_t *scratch = scratch_.of(worker), *blocks = scratch + scratch_words_;
            if (pair.queries.count > 0) kernels_.pack_keys(a_, pair, 0, blocks_of(pair), blocks);
            for (std::int64_t tile = 0; tile < tiles_of(pair); ++tile) kernels_.attend(a_, pair, tile, blocks, scratch);
        };
        for_each_item(threads_, static_cast<std::int64_t>(division_.whole.size()), take);
    }

    void take_waves() const {
        for (std::size_t first = 0; first < division_.in_waves.size();) {
            const Wave wave(division_.in_waves, first, [this](const Pair& pair) { return words_of(pair); });
            take(wave);
            first = wave.last;
        }
    }

  private:
    static std::int64_t tiles_of(const Pair& pair) { return parts(pair.queries.count, tile_queries); }
    std::size_t words_of(const Pair& pair) const {
        return kernels_.block_words(a_.head_width) * static_cast<std::size_t>(blocks_of(pair));
    }

    void take(const Wave& wave) const {
        const AlignedWords packed(wave.offset.back());
        const auto blocks_at = [&](const Item& item) { return packed.data() + wave.offset[item.place - wave.first]; };
        const std::vector<Item> packing = wave.items(
            [](const Pair& pair) { return pair.queries.count > 0 ? parts(blocks_of(pair), packed_blocks) : 0; });
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = packing[static_cast<std::size_t>(i)];
            const Pair& pair = *wave.pairs[item.place];
            const std::int64_t from = item.part * packed_blocks;
            kernels_.pack_keys(a_, pair, from, std::min(from + packed_blocks, blocks_of(pair)), blocks_at(item));
        };
        for_each_item(threads_, static_cast<std::int64_t>(packing.size()), pack);
        const std::vector<Item> tiles = wave.items(tiles_of);
        auto attend = [&](std::int64_t i, int worker) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels_.attend(a_, *wave.pairs[item.place], item.part, blocks_at(item), scratch_.of(worker));
        };
        for_each_item(threads_, static_cast<std::int64_t>(tiles.size()), attend);
    }

    const Attention& a_;
    const ForwardKernels& kernels_;
    const int threads_;
    const std::size_t scratch_words_;
    const Division division_;
    const WordsByWorker scratch_;
};

// Blocks of keys of a chunk: fewer than the most where there would be too few chunks for the threads.
int chunk_blocks_for(const std::vector<Pair>& pairs, int head_width, int threads) {
    int blocks = most_chunk_blocks(head_width);
    const auto chunks = [&] {
        std::int64_t all = 0;
        for (const Pair& pair : pairs) all += parts(blocks_of(pair), blocks);
        return all;
    };
    while (blocks > 1 && threads > 1 && chunks() < items_a_thread * threads) blocks /= 2;
    return blocks;
}

class Backward {
  public:
    Backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how)
        : a_(a), g_(g), kernels_(a.bfloat16 ? how.kernels->backward_bfloat16 : how.kernels->backward_float32),
          threads_(how.threads), pairs_(sequences.pairs),
          chunk_blocks_(chunk_blocks_for(pairs_, a.head_width, threads_)),
          scratch_words_(kernels_.scratch_words(a.head_width, chunk_blocks_)),
          division_(pairs_, how.threads, [this](const Pair& pair) { return words_of(pair); }),
          scratch_(scratch_words_ + division_.most_words, how.threads) {
        for (const Pair& pair : pairs_)
            first_block_.push_back(first_block_.back() + static_cast<std::size_t>(blocks_of(pair)));
        dslope_.resize(first_block_.back());
    }

    void take_whole_pairs() {
        auto take = [&](std::int64_t i, int worker) noexcept {
            const Pair& pair = *division_.whole[static_cast<std::size_t>(i)];
            std::uint32_t *scratch = scratch_.of(worker), *tiles = scratch + scratch_words_;
            for (std::int64_t tile = 0; tile < tiles_of(pair); ++tile) kernels_.pack_queries(a_, g_, pair, tile, tiles);
            std::int64_t tiles_done = 0;  // for nobody: each chunk begins when the one before it is done
            for (std::int64_t chunk = 0; chunk < chunks_of(pair); ++chunk)
                kernels_.take_chunk(a_, g_, pair, chunk_at(pair, chunk), tiles, {nullptr, &tiles_done}, dslope_of(pair),
                                    scratch);
        };
        for_each_item(threads_, static_cast<std::int64_t>(division_.whole.size()), take);
    }

    void take_waves() {
        for (std::size_t first = 0; first < division_.in_waves.size();) {
            const Wave wave(division_.in_waves, first, [this](const Pair& pair) { return words_of(pair); });
            take(wave);
            first = wave.last;
        }
    }

    // Summed in an order that depends on the sizes alone.
    void add_slope_gradients(double* dslopes) const {
        for (std::size_t p = 0; p < pairs_.size(); ++p)
            for (std::size_t block = first_block_[p]; block < first_block_[p + 1]; ++block)
                dslopes[pairs_[p].head] += dslope_[block];
    }

  private:
    std::int64_t tiles_of(const Pair& pair) const {
        return parts(pair.queries.count, kernels_.tile_queries(a_.head_width));
    }
    std::int64_t chunks_of(const Pair& pair) const { return parts(blocks_of(pair), chunk_blocks_); }
    KeyChunk chunk_at(const Pair& pair, std::int64_t chunk) const {
        const std::int64_t first = chunk * chunk_blocks_;
        return {first, static_cast<int>(std::min<std::int64_t>(chunk_blocks_, blocks_of(pair) - first))};
    }
    std::size_t words_of(const Pair& pair) const {
        return kernels_.tile_words(a_.head_width) * static_cast<std::size_t>(tiles_of(pair));
    }
    double* dslope_of(const Pair& pair) {
        return dslope_.data() + first_block_[static_cast<std::size_t>(&pair - pairs_.data())];
    }

    void take(const Wave& wave) {
        const AlignedWords packed(wave.offset.back());
        const auto tiles_at = [&](const Item& item) { return packed.data() + wave.offset[item.place - wave.first]; };
        const std::vector<Item> tiles = wave.items([this](const Pair& pair) { return tiles_of(pair); });
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels_.pack_queries(a_, g_, *wave.pairs[item.place], item.part, tiles_at(item));
        };
        for_each_item(threads_, static_cast<std::int64_t>(tiles.size()), pack);
        take_chunks(wave, tiles_at);
    }

    // Chunks of one pair wait for each other in their order, those of different pairs do not: first chunks come first.
    template <class TilesAt>
    void take_chunks(const Wave& wave, TilesAt tiles_at) {
        std::vector<Item> chunks = wave.items([this](const Pair& pair) { return chunks_of(pair); });
        std::vector<std::int64_t> tiles_done(chunks.size(), 0);
        std::vector<std::size_t> first_of{0};  // chunk of the pair, by place - first
        for (std::size_t place = wave.first; place < wave.last; ++place)
            first_of.push_back(first_of.back() + static_cast<std::size_t>(chunks_of(*wave.pairs[place])));
        std::stable_sort(chunks.begin(), chunks.end(), [](const Item& a, const Item& b) { return a.part < b.part; });
        auto take = [&](std::int64_t i, int worker) noexcept {
            const Item& item = chunks[static_cast<std::size_t>(i)];
            const Pair& pair = *wave.pairs[item.place];
            std::int64_t* own = &tiles_done[first_of[item.place - wave.first] + static_cast<std::size_t>(item.part)];
            const TilesDone done{item.part > 0 ? own - 1 : nullptr, own};
            kernels_.take_chunk(a_, g_, pair, chunk_at(pair, item.part), tiles_at(item), done, dslope_of(pair),
                                scratch_.of(worker));
        };
        for_each_item(threads_, static_cast<std::int64_t>(chunks.size()), take);
    }

    const Attention& a_;
    const Gradients& g_;
    const BackwardKernels& kernels_;
    const int threads_;
    const std::vector<Pair>& pairs_;
    const int chunk_blocks_;
    const std::size_t scratch_words_;
    std::vector<std::size_t> first_block_{0};  // of the pair among all; one more for the end
    std::vector<double> dslope_;               // by block
    const Division division_;
    const WordsByWorker scratch_;
};

}  // namespace

void attention_forward(const Attention& a, const Sequences& sequences, const Execution& how) {
    fill_background(a, sequences, how.threads);
    const Forward forward(a, sequences, how);
    forward.take_waves();
    forward.take_whole_pairs();
}

void attention_backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how,
                        double* dslopes) {
    fill_background(a, g, sequences, how.threads);
    Backward backward(a, g, sequences, how);
    backward.take_waves();
    backward.take_whole_pairs();
    if (dslopes != nullptr) backward.add_slope_gradients(dslopes);
}

}  // namespace maskattn
