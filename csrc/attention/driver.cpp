// Attention of the heads in the order of attention/schedule.hpp. Operands are packed first, then tiles of queries
// (forward) or chunks of keys (backward) are computed from them.
#include "attention/driver.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/schedule.hpp"
#include "runtime/aligned_words.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::int64_t packed_blocks = 8;  // blocks of keys of an item of packing

// Calls visit(row) for each of `total` rows that is not among `rows`.
template <class Visit>
void for_each_other_row(const Tokens& rows, std::int64_t total, Visit visit) {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i <= rows.count; ++i) {
        const std::int64_t kept = i < rows.count ? rows.index[i] : total;
        for (; next < kept; ++next) visit(next);
        ++next;
    }
}

void write_zeros(const Strided<void>& x, const Attention& a, const Head& head, std::int64_t row) {
    const std::size_t item = a.bfloat16 ? 2 : 4;
    char* to = static_cast<char*>(x.data) +
               static_cast<std::ptrdiff_t>(item) * offset_of(x, head.sequence, head.index, row);
    std::memset(to, 0, static_cast<std::size_t>(a.head_width) * item);
}

void fill_background(const Attention& a, const Sequences& all, int threads) {
    auto fill = [&](std::int64_t item, int) noexcept {
        const Head& head = all.heads[static_cast<std::size_t>(item)];
        if (head.queries.index == nullptr) return;
        for_each_other_row(head.queries, all.rows_q, [&](std::int64_t row) {
            write_zeros(a.out, a, head, row);
            *row_of(a.lse, head, row) = -std::numeric_limits<float>::infinity();
            if (a.lse_rest.data) *row_of(a.lse_rest, head, row) = 0.0f;
        });
    };
    if (all.dense) for_each_item(threads, static_cast<std::int64_t>(all.heads.size()), fill);
}

void fill_background(const Attention& a, const Gradients& g, const Sequences& all, int threads) {
    auto fill = [&](std::int64_t item, int) noexcept {
        const Head& head = all.heads[static_cast<std::size_t>(item)];
        if (head.queries.index != nullptr)
            for_each_other_row(head.queries, all.rows_q, [&](std::int64_t row) { write_zeros(g.dq, a, head, row); });
        for_each_other_row(head.keys, all.rows_k, [&](std::int64_t row) {
            write_zeros(g.dk, a, head, row);
            write_zeros(g.dv, a, head, row);
            if (g.dbias.data) *row_of(g.dbias, head, row) = 0.0f;
        });
    };
    if (all.dense) for_each_item(threads, static_cast<std::int64_t>(all.heads.size()), fill);
}

class Forward {
  public:
    Forward(const Attention& a, const Sequences& sequences, const Execution& how)
        : a_(a), kernels_(a.bfloat16 ? how.kernels->forward_bfloat16 : how.kernels->forward_float32),
          threads_(how.threads), scratch_words_(kernels_.scratch_words(a.head_width)),
          schedule_(sequences.heads, how.threads, [this](const Head& head) { return words_of(head); }),
          scratch_(scratch_words_ + schedule_.most_words, how.threads) {}

    void take_whole_heads() const {
        auto take = [&](std::int64_t i, int worker) noexcept {
            std::uint32_t* scratch = scratch_.of(worker);
            attend_head(kernels_, a_, *schedule_.whole[static_cast<std::size_t>(i)], scratch + scratch_words_, scratch);
        };
        for_each_item(threads_, static_cast<std::int64_t>(schedule_.whole.size()), take);
    }

    void take_batches() const {
        for (std::size_t first = 0; first < schedule_.in_batches.size();) {
            const Batch batch(schedule_.in_batches, first, [this](const Head& head) { return words_of(head); });
            take(batch);
            first = batch.last;
        }
    }

  private:
    std::size_t words_of(const Head& head) const {
        return kernels_.block_words(a_.head_width) * static_cast<std::size_t>(blocks_of(head));
    }

    void take(const Batch& batch) const {
        const AlignedWords packed(batch.offset.back());
        const auto blocks_at = [&](const Item& item) { return batch.operands(packed.data(), item); };
        const std::vector<Item> packing = batch.items(packings_of);
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = packing[static_cast<std::size_t>(i)];
            pack_keys(kernels_, a_, *batch.heads[item.position], item.chunk, blocks_at(item));
        };
        for_each_item(threads_, static_cast<std::int64_t>(packing.size()), pack);
        const std::vector<Item> tiles = batch.items(tiles_of);
        auto attend = [&](std::int64_t i, int worker) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels_.attend(a_, *batch.heads[item.position], item.chunk, blocks_at(item), scratch_.of(worker));
        };
        for_each_item(threads_, static_cast<std::int64_t>(tiles.size()), attend);
    }

    const Attention& a_;
    const ForwardKernels& kernels_;
    const int threads_;
    const std::size_t scratch_words_;
    const Schedule schedule_;
    const WordsByWorker scratch_;
};

// Returns the number of key blocks of a chunk: the largest allowed, or fewer if there would be too few chunks for the
// threads.
int chunk_blocks_for(const std::vector<Head>& heads, int head_width, int threads) {
    int blocks = most_chunk_blocks(head_width);
    const auto chunks = [&] {
        std::int64_t all = 0;
        for (const Head& head : heads) all += ceil_divide(blocks_of(head), blocks);
        return all;
    };
    while (blocks > 1 && threads > 1 && chunks() < items_a_thread * threads) blocks /= 2;
    return blocks;
}

class Backward {
  public:
    Backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how)
        : a_(a), g_(g), kernels_(a.bfloat16 ? how.kernels->backward_bfloat16 : how.kernels->backward_float32),
          threads_(how.threads), heads_(sequences.heads),
          chunk_blocks_(chunk_blocks_for(heads_, a.head_width, threads_)),
          scratch_words_(kernels_.scratch_words(a.head_width, chunk_blocks_)),
          schedule_(heads_, how.threads, [this](const Head& head) { return words_of(head); }),
          scratch_(scratch_words_ + schedule_.most_words, how.threads) {
        for (const Head& head : heads_)
            first_block_.push_back(first_block_.back() + static_cast<std::size_t>(blocks_of(head)));
        dslope_.resize(first_block_.back());
    }

    void take_whole_heads() {
        auto take = [&](std::int64_t i, int worker) noexcept {
            const Head& head = *schedule_.whole[static_cast<std::size_t>(i)];
            std::uint32_t *scratch = scratch_.of(worker), *tiles = scratch + scratch_words_;
            for (std::int64_t tile = 0; tile < tiles_of(head); ++tile) kernels_.pack_queries(a_, g_, head, tile, tiles);
            std::int64_t tiles_done = 0;  // not read: each chunk begins after the previous one is done
            for (std::int64_t chunk = 0; chunk < chunks_of(head); ++chunk)
                kernels_.take_chunk(a_, g_, head, chunk_at(head, chunk), tiles, {nullptr, &tiles_done}, dslope_of(head),
                                    scratch);
        };
        for_each_item(threads_, static_cast<std::int64_t>(schedule_.whole.size()), take);
    }

    void take_batches() {
        for (std::size_t first = 0; first < schedule_.in_batches.size();) {
            const Batch batch(schedule_.in_batches, first, [this](const Head& head) { return words_of(head); });
            take(batch);
            first = batch.last;
        }
    }

    // Sums in an order that depends only on the sizes.
    void add_slope_gradients(double* dslopes) const {
        for (std::size_t p = 0; p < heads_.size(); ++p)
            for (std::size_t block = first_block_[p]; block < first_block_[p + 1]; ++block)
                dslopes[heads_[p].index] += dslope_[block];
    }

  private:
    std::int64_t tiles_of(const Head& head) const {
        return ceil_divide(head.queries.count, kernels_.tile_queries(a_.head_width));
    }
    std::int64_t chunks_of(const Head& head) const { return ceil_divide(blocks_of(head), chunk_blocks_); }
    KeyChunk chunk_at(const Head& head, std::int64_t chunk) const {
        const std::int64_t first = chunk * chunk_blocks_;
        return {first, static_cast<int>(std::min<std::int64_t>(chunk_blocks_, blocks_of(head) - first))};
    }
    std::size_t words_of(const Head& head) const {
        return kernels_.tile_words(a_.head_width) * static_cast<std::size_t>(tiles_of(head));
    }
    double* dslope_of(const Head& head) {
        return dslope_.data() + first_block_[static_cast<std::size_t>(&head - heads_.data())];
    }

    void take(const Batch& batch) {
        const AlignedWords packed(batch.offset.back());
        const auto tiles_at = [&](const Item& item) { return batch.operands(packed.data(), item); };
        const std::vector<Item> tiles = batch.items([this](const Head& head) { return tiles_of(head); });
        auto pack = [&](std::int64_t i, int) noexcept {
            const Item& item = tiles[static_cast<std::size_t>(i)];
            kernels_.pack_queries(a_, g_, *batch.heads[item.position], item.chunk, tiles_at(item));
        };
        for_each_item(threads_, static_cast<std::int64_t>(tiles.size()), pack);
        take_chunks(batch, tiles_at);
    }

    // Chunks of one head wait for their predecessors, chunks of different heads do not, so all first chunks come first.
    template <class TilesAt>
    void take_chunks(const Batch& batch, TilesAt tiles_at) {
        std::vector<Item> chunks = batch.items([this](const Head& head) { return chunks_of(head); });
        std::vector<std::int64_t> tiles_done(chunks.size(), 0);
        std::vector<std::size_t> first_of{0};  // chunk of the head, by position - first
        for (std::size_t position = batch.first; position < batch.last; ++position)
            first_of.push_back(first_of.back() + static_cast<std::size_t>(chunks_of(*batch.heads[position])));
        std::stable_sort(chunks.begin(), chunks.end(), [](const Item& a, const Item& b) { return a.chunk < b.chunk; });
        auto take = [&](std::int64_t i, int worker) noexcept {
            const Item& item = chunks[static_cast<std::size_t>(i)];
            const Head& head = *batch.heads[item.position];
            const std::size_t first_chunk = first_of[item.position - batch.first];
            std::int64_t* own = &tiles_done[first_chunk + static_cast<std::size_t>(item.chunk)];
            const TilesDone done{item.chunk > 0 ? own - 1 : nullptr, own};
            kernels_.take_chunk(a_, g_, head, chunk_at(head, item.chunk), tiles_at(item), done, dslope_of(head),
                                scratch_.of(worker));
        };
        for_each_item(threads_, static_cast<std::int64_t>(chunks.size()), take);
    }

    const Attention& a_;
    const Gradients& g_;
    const BackwardKernels& kernels_;
    const int threads_;
    const std::vector<Head>& heads_;
    const int chunk_blocks_;
    const std::size_t scratch_words_;
    std::vector<std::size_t> first_block_{0};  // of each head among all blocks, and the end
    std::vector<double> dslope_;               // one per block
    const Schedule schedule_;
    const WordsByWorker scratch_;
};

}  // namespace

std::int64_t packings_of(const Head& head) {
    return head.queries.count > 0 ? ceil_divide(blocks_of(head), packed_blocks) : 0;
}

void pack_keys(const ForwardKernels& kernels, const Attention& a, const Head& head, std::int64_t packing,
               std::uint32_t* blocks) {
    const std::int64_t from = packing * packed_blocks;
    kernels.pack_keys(a, head, from, std::min(from + packed_blocks, blocks_of(head)), blocks);
}

void attend_head(const ForwardKernels& kernels, const Attention& a, const Head& head, std::uint32_t* blocks,
                 std::uint32_t* scratch) {
    if (head.queries.count > 0) kernels.pack_keys(a, head, 0, blocks_of(head), blocks);
    for (std::int64_t tile = 0; tile < tiles_of(head); ++tile) kernels.attend(a, head, tile, blocks, scratch);
}

void attention_forward(const Attention& a, const Sequences& sequences, const Execution& how) {
    fill_background(a, sequences, how.threads);
    const Forward forward(a, sequences, how);
    forward.take_batches();
    forward.take_whole_heads();
}

void attention_backward(const Attention& a, const Gradients& g, const Sequences& sequences, const Execution& how,
                        double* dslopes) {
    fill_background(a, g, sequences, how.threads);
    Backward backward(a, g, sequences, how);
    backward.take_batches();
    backward.take_whole_heads();
    if (dslopes != nullptr) backward.add_slope_gradients(dslopes);
}

}  // namespace maskattn
