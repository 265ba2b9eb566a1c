// Backward attention of a chunk of keys, with P recomputed from lse. dk and dv of the chunk stay in L2 during the loop
// over all queries of the sequence. The chunks add to dq of each query tile in their order, so that the sums do not
// depend on the threads.
//
// Dimension key: M queries multiplied at once, Q of an item, N keys of a block, D head width.
#pragma once

#include <sched.h>

#include "attention/forward.hpp"
#include "attention/key_sums.hpp"

namespace maskattn {
namespace {

// Queries of a tile. Each tile adds to all of a chunk's dk and dv; 192 queries in bfloat16, whose operands are as large
// as those of 96 in float32, halve the number of these additions, which saves 3 to 5 % (at head width 128, nothing).
constexpr int most_gradient_queries = 192;
template <class Arithmetic>
constexpr int gradient_queries(int head_width) {
    return Arithmetic::depth > 1 && head_width <= 64 ? most_gradient_queries : 96;
}

// A packed tile of queries, in words. q and dO are stored as left operands of the scores [Q][D / depth] and as operands
// of dk and dv: right ones by steps [Q / depth][D padded], which are the same as the left in single precision, and left
// ones in tiles [D padded][Q / depth]. Then follow dq [Q][D padded] and delta, lse (in the scores' units), its rest (in
// units of ln 2), x and y, Q each.
template <class Arithmetic>
struct TileLayout {
    int queries, left_stride, steps_stride, left_words, steps_words;

    explicit TileLayout(int head_width)
        : queries(gradient_queries<Arithmetic>(head_width)),
          left_stride(padded(head_width / Arithmetic::depth)),
          steps_stride(padded(head_width)),
          left_words(queries * left_stride),
          steps_words(Arithmetic::depth == 1 ? 0 : queries / Arithmetic::depth * steps_stride) {}

    std::size_t words() const {
        return static_cast<std::size_t>(2 * (left_words + steps_words) + queries * (steps_stride + 5));
    }

    // Rounds a count of queries up to those that are computed.
    static int computed(int count) {
        constexpr int whole = Arithmetic::in_tiles ? Arithmetic::whole_steps * Arithmetic::depth : Arithmetic::rows;
        return static_cast<int>(ceil_divide(count, whole)) * whole;
    }
};

template <class Arithmetic>
struct QueryTile {
    const std::uint32_t *q_left, *q_steps, *grad_left, *grad_steps;
    float *dq_QD, *delta_Q, *lse_Q, *rest_Q, *x_Q, *y_Q;

    QueryTile(const TileLayout<Arithmetic>& layout, std::uint32_t* words) {
        q_left = words;
        q_steps = Arithmetic::depth == 1 ? q_left : q_left + layout.left_words;
        grad_left = q_left + layout.left_words + layout.steps_words;
        grad_steps = Arithmetic::depth == 1 ? grad_left : grad_left + layout.left_words;
        dq_QD = reinterpret_cast<float*>(words + 2 * (layout.left_words + layout.steps_words));
        delta_Q = dq_QD + layout.queries * layout.steps_stride;
        lse_Q = delta_Q + layout.queries;
        rest_Q = lse_Q + layout.queries;
        x_Q = rest_Q + layout.queries;
        y_Q = x_Q + layout.queries;
    }
};

template <class Element>
float dot(const Element* a, const Element* b, int head_width) {
    Floats total{};
    for (int d = 0; d < head_width; d += lanes)
        total += load_floats(a + d, head_width - d) * load_floats(b + d, head_width - d);
    return sum(total);
}

template <class Arithmetic, class Element>
void pack_rows_both_ways(const Element* const* rows, int count, int head_width, const std::uint32_t* left,
                         const std::uint32_t* steps) {
    pack_rows<Arithmetic>(rows, count, head_width, const_cast<std::uint32_t*>(left),
                          padded(head_width / Arithmetic::depth));
    std::uint32_t* to = const_cast<std::uint32_t*>(steps);
    if constexpr (Arithmetic::in_tiles)
        pack_channels<Arithmetic>(rows, count, head_width, to, gradient_queries<Arithmetic>(head_width) / 2);
    else if constexpr (Arithmetic::depth > 1)
        pack_steps<Arithmetic>(rows, count, head_width, to);
}

template <class Element>
void write_zeros(const Strided<void>& x, const Head& head, std::int64_t row, int head_width) {
    __builtin_memset(row_of<Element>(x, head, row), 0, static_cast<std::size_t>(head_width) * sizeof(Element));
}

template <class Arithmetic, class Element>
void pack_queries(const Attention& a, const Gradients& g, const Head& head, std::int64_t tile, std::uint32_t* tiles) {
    const TileLayout<Arithmetic> layout(a.head_width);
    const QueryTile<Arithmetic> to(layout, tiles + static_cast<std::size_t>(tile) * layout.words());
    const std::int64_t first = tile * layout.queries;
    const int count = at_most(layout.queries, head.queries.count - first);
    const int rows = layout.computed(count);
    const Element *q_rows[most_gradient_queries], *grad_rows[most_gradient_queries];
    for (int q = 0; q < rows; ++q) {
        const std::int64_t row = q < count ? row_at(head.queries, first + q) : 0;
        const float lse = q < count ? *row_of(a.lse, head, row) : -infinity;
        // Rows without keys and padding rows have p = 0, and their gradients are not read.
        const bool alive = lse != -infinity;
        q_rows[q] = alive ? row_of<Element>(a.q, head, row) : nullptr;
        grad_rows[q] = alive ? row_of<Element>(g.grad_out, head, row) : nullptr;
        const float grad_lse = alive && g.grad_lse.data ? *row_of(g.grad_lse, head, row) : 0.0f;
        const Element* out = alive ? row_of<Element>(a.out, head, row) : nullptr;
        to.delta_Q[q] = alive ? dot<Element>(grad_rows[q], out, a.head_width) - grad_lse : 0.0f;
        to.lse_Q[q] = !alive ? infinity : only_products(a) ? lse * log2_e : lse;
        const bool has_rest = alive && a.lse_rest.data && !only_products(a);
        to.rest_Q[q] = has_rest ? *row_of(a.lse_rest, head, row) * log2_e : 0.0f;
        const float* position = alive && a.slopes.data ? row_of(a.coords_q, head, row) : nullptr;
        to.x_Q[q] = position ? position[0] : 0.0f;
        to.y_Q[q] = position ? position[1] : 0.0f;
        if (q < count && head.keys.count == 0) write_zeros<Element>(g.dq, head, row, a.head_width);
    }
    if (head.keys.count == 0) return;
    pack_rows_both_ways<Arithmetic>(q_rows, rows, a.head_width, to.q_left, to.q_steps);
    pack_rows_both_ways<Arithmetic>(grad_rows, rows, a.head_width, to.grad_left, to.grad_steps);
}

// Scratch of a chunk, in words. For each block: K and V by columns [D / depth][N], K by steps [N / depth][D padded],
// 3 N terms, N of dbias, dk and dv (key_sums.hpp); then p and dS of a query tile as left operands of dv and dk, and dS as
// the left operand of dq.
template <class Arithmetic>
struct ChunkLayout {
    int columns_words, steps_words, sums_words, score_words;

    explicit ChunkLayout(int head_width)
        : columns_words(steps_of<Arithmetic>(head_width) * block_keys),
          steps_words(block_keys / Arithmetic::depth * padded(head_width)),
          sums_words(block_keys * padded(head_width)),
          score_words(gradient_queries<Arithmetic>(head_width) / Arithmetic::depth * block_keys) {}

    int block_words() const { return 2 * columns_words + steps_words + 4 * block_keys + 2 * sums_words; }
};

struct KeyBlock {
    std::uint32_t *k_columns, *v_columns, *k_steps;
    float *terms_N, *dbias_N, *dk_ND, *dv_ND;

    template <class Arithmetic>
    KeyBlock(const ChunkLayout<Arithmetic>& layout, std::uint32_t* scratch, int block) {
        k_columns = scratch + block * layout.block_words();
        v_columns = k_columns + layout.columns_words;
        k_steps = v_columns + layout.columns_words;
        terms_N = reinterpret_cast<float*>(k_steps + layout.steps_words);
        dbias_N = terms_N + 3 * block_keys;
        dk_ND = dbias_N + block_keys;
        dv_ND = dk_ND + layout.sums_words;
    }
};

template <class Arithmetic>
std::size_t backward_scratch_words(int head_width, int chunk_blocks) {
    const ChunkLayout<Arithmetic> layout(head_width);
    const int left_words = Arithmetic::depth == 1 ? 0 : layout.score_words;
    return static_cast<std::size_t>(chunk_blocks * layout.block_words() + 2 * layout.score_words + left_words);
}

// p and dS of a query tile and a block of keys, as operands of the three products that follow.
struct Probabilities {
    std::uint32_t *p, *ds;    // word [t][n]: query t, or queries 2t and 2t + 1, and key n
    std::uint32_t* ds_left;  // word [q][t]: query q and key t, or keys 2t and 2t + 1
};

template <class Arithmetic>
MASKATTN_INLINE void store_scores(const Probabilities& to, int q, int n, const Floats (&p)[2], const Floats (&ds)[2]) {
    if constexpr (Arithmetic::depth == 1) {
        for (int i = 0; i < 2; ++i) {
            store(to.p + (q + i) * block_keys + n, p[i]);
            store(to.ds + (q + i) * block_keys + n, ds[i]);
        }
    } else {
        const Words rounded = Arithmetic::round(ds[0], ds[1]);
        __builtin_memcpy(to.ds_left + (q * block_keys + n) / 2, &rounded, sizeof rounded / 2);
        __builtin_memcpy(to.ds_left + ((q + 1) * block_keys + n) / 2,
                         reinterpret_cast<const char*>(&rounded) + sizeof rounded / 2, sizeof rounded / 2);
        store(to.ds + q / 2 * block_keys + n, Arithmetic::pair_up(rounded));
        store(to.p + q / 2 * block_keys + n, Arithmetic::pair_up(Arithmetic::round(p[0], p[1])));
    }
}

// Computes p and dS of rows [q, q + M) from their products with K (q.k) and V (dO.v). Adds to dbias_N and, if tokens
// have positions, to the sum of dS ||x_i - x_j||.
template <class Arithmetic, bool biased, bool distanced>
__attribute__((noinline)) void probabilities_of(const QueryTile<Arithmetic>& tile, int q, const float* product_MN,
                                                const float* grad_p_MN, const KeyTerms& keys, ScoreUnits units,
                                                const Probabilities& to, float* dbias_N, Floats& ds_by_distance) {
    static_assert(Arithmetic::rows % 2 == 0, "two rows are taken at once");
    constexpr bool bare = !biased && !distanced;
    Floats weighted{};
    for (int n = 0; n < keys.columns; n += lanes) {
        Floats dbias = load<Floats>(dbias_N + n);
#pragma GCC unroll 8
        for (int m = 0; m < Arithmetic::rows; m += 2) {
            Floats p[2], ds[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const int row = q + m + i;
                const float x = distanced ? tile.x_Q[row] : 0.0f, y = distanced ? tile.y_Q[row] : 0.0f;
                const int at = (m + i) * block_keys + n;
                const Floats product = load<Floats>(product_MN + at);
                const Score s = block_score<biased, distanced>(product, keys, n, units, x, y);
                p[i] = probability<bare>(s.value, tile.lse_Q[row], tile.rest_Q[row], units);
                const ScoreGradient back = score_gradient(s, p[i], load<Floats>(grad_p_MN + at), tile.delta_Q[row]);
                ds[i] = back.product;
                dbias += back.bias;
                if constexpr (distanced) weighted += back.slope;
            }
            store_scores<Arithmetic>(to, q + m, n, p, ds);
        }
        store(dbias_N + n, dbias);
        Arithmetic::stay_awake();
    }
    if constexpr (distanced) ds_by_distance += weighted;
}

// The previous chunk precedes this one in the order of the items, so a thread is working on it.
inline void wait_until_past(const std::int64_t* tiles_done, std::int64_t tile) {
    for (int spins = 0; __atomic_load_n(tiles_done, __ATOMIC_ACQUIRE) <= tile; ++spins)
        if (spins > 1000) sched_yield();
}

template <class Arithmetic, class Element>
class Chunk {
  public:
    Chunk(const Attention& a, const Gradients& g, const Head& head, const KeyChunk& chunk, double* dslope,
          std::uint32_t* scratch)
        : a_(a), g_(g), head_(head), layout_(a.head_width), tile_layout_(a.head_width), scratch_(scratch),
          stride_(padded(a.head_width)), first_(chunk.first), blocks_(chunk.blocks), dslope_(dslope + chunk.first),
          units_(units_of(a, head)) {
        scores_.p = scratch + blocks_ * layout_.block_words();
        scores_.ds = scores_.p + layout_.score_words;
        scores_.ds_left = Arithmetic::depth == 1 ? scores_.ds : scores_.ds + layout_.score_words;
    }

    void pack() {
        const Element* rows[block_keys];
        for (int b = 0; b < blocks_; ++b) {
            dslope_[b] = 0.0;
            const KeyBlock to(layout_, scratch_, b);
            const int columns = columns_of_block<Arithmetic>(head_, first_ + b);
            rows_of_block(a_.k, head_, first_ + b, rows);
            pack_columns<Arithmetic>(rows, columns, a_.head_width, to.k_columns);
            pack_steps<Arithmetic>(rows, columns, a_.head_width, to.k_steps);
            rows_of_block(a_.v, head_, first_ + b, rows);
            pack_columns<Arithmetic>(rows, columns, a_.head_width, to.v_columns);
            pack_key_terms(a_, head_, first_ + b, to.terms_N);
            for (int n = 0; n < block_keys; n += lanes) store(to.dbias_N + n, Floats{});
            clear_sums<Arithmetic>(to.dk_ND, columns, stride_);
            clear_sums<Arithmetic>(to.dv_ND, columns, stride_);
        }
    }

    // Adds the terms of a query tile to dk, dv and dbias of block b, and stores its p and dS for dq.
    void take(const QueryTile<Arithmetic>& tile, int rows, int b) {
        const KeyBlock block(layout_, scratch_, b);
        const KeyTerms keys = terms_of_block<Arithmetic>(a_, head_, first_ + b, block.terms_N);
        const int steps = steps_of<Arithmetic>(a_.head_width);
        const auto probabilities = a_.slopes.data ? keys.biased ? &probabilities_of<Arithmetic, true, true>
                                                                : &probabilities_of<Arithmetic, false, true>
                                   : keys.biased  ? &probabilities_of<Arithmetic, true, false>
                                                  : &probabilities_of<Arithmetic, false, false>;
        constexpr int at_once = Arithmetic::rows_at_once;
        alignas(64) float product_MN[at_once * block_keys], grad_p_MN[at_once * block_keys];
        alignas(64) float dbias_N[block_keys] = {};
        Floats by_distance{};
        for (int q = 0; q < rows; q += at_once) {
            const int now = at_most(at_once, rows - q), stride = tile_layout_.left_stride, at = q * stride;
            multiply_rows<Arithmetic, Start::zero>(now, {tile.q_left + at, stride, 1}, block.k_columns, block_keys,
                                                   steps, product_MN, block_keys, keys.columns / lanes);
            multiply_rows<Arithmetic, Start::zero>(now, {tile.grad_left + at, stride, 1}, block.v_columns, block_keys,
                                                   steps, grad_p_MN, block_keys, keys.columns / lanes);
            for (int m = 0; m < now; m += Arithmetic::rows)
                probabilities(tile, q + m, product_MN + m * block_keys, grad_p_MN + m * block_keys, keys, units_,
                              scores_, dbias_N, by_distance);
        }
        for (int n = 0; n < keys.columns; n += lanes)
            store(block.dbias_N + n, load<Floats>(block.dbias_N + n) + load<Floats>(dbias_N + n));
        dslope_[b] -= static_cast<double>(sum(by_distance));
        const KeySums<Arithmetic> sums{keys.columns, rows, stride_, tile_layout_.queries};
        sums.add(scores_.p, tile.grad_steps, block.dv_ND);
        sums.add(scores_.ds, tile.q_steps, block.dk_ND);
    }

    void add_to_dq(const QueryTile<Arithmetic>& tile, int rows, int b) {
        const KeyBlock block(layout_, scratch_, b);
        constexpr int ds_stride = block_keys / Arithmetic::depth;
        const int steps = columns_of_block<Arithmetic>(head_, first_ + b) / Arithmetic::depth;
        for (int q = 0; q < rows; q += Arithmetic::rows_at_once) {
            const int now = at_most(Arithmetic::rows_at_once, rows - q);
            const Left ds{scores_.ds_left + q * ds_stride, ds_stride, 1};
            float* dq = tile.dq_QD + q * stride_;
            if (first_ + b == 0)
                multiply_rows<Arithmetic, Start::zero>(now, ds, block.k_steps, stride_, steps, dq, stride_,
                                                       stride_ / lanes);
            else
                multiply_rows<Arithmetic, Start::add>(now, ds, block.k_steps, stride_, steps, dq, stride_,
                                                      stride_ / lanes);
        }
    }

    bool is_last() const { return first_ + blocks_ == ceil_divide(head_.keys.count, block_keys); }

    void write_dq(const QueryTile<Arithmetic>& tile, std::int64_t first, int count) {
        for (int q = 0; q < count; ++q)
            write_row(tile.dq_QD + q * stride_, a_.scale, a_.head_width,
                      row_of<Element>(g_.dq, head_, row_at(head_.queries, first + q)));
    }

    void write_key_gradients() {
        for (int b = 0; b < blocks_; ++b) {
            const KeyBlock block(layout_, scratch_, b);
            const std::int64_t first = (first_ + b) * block_keys;
            const int count = at_most(block_keys, head_.keys.count - first);
            for (int n = 0; n < count; n += lanes) {
                alignas(64) float buffers[2][lanes * most_head_width];
                const float* dk = rows_of_sums<Arithmetic>(block.dk_ND, n, stride_, buffers[0]);
                const float* dv = rows_of_sums<Arithmetic>(block.dv_ND, n, stride_, buffers[1]);
                for (int i = 0; i < lanes && n + i < count; ++i) {
                    const std::int64_t row = row_at(head_.keys, first + n + i);
                    write_row(dk + i * stride_, a_.scale, a_.head_width, row_of<Element>(g_.dk, head_, row));
                    write_row(dv + i * stride_, 1.0f, a_.head_width, row_of<Element>(g_.dv, head_, row));
                    if (g_.dbias.data) *row_of(g_.dbias, head_, row) = block.dbias_N[n + i];
                }
            }
        }
    }

    int blocks() const { return blocks_; }

  private:
    const Attention& a_;
    const Gradients& g_;
    const Head& head_;
    const ChunkLayout<Arithmetic> layout_;
    const TileLayout<Arithmetic> tile_layout_;
    std::uint32_t* scratch_;
    int stride_;
    std::int64_t first_;  // block of the sequence
    int blocks_;
    double* dslope_;  // one per block of the chunk
    ScoreUnits units_;
    Probabilities scores_;
};

template <class Arithmetic, class Element>
void take_chunk(const Attention& a, const Gradients& g, const Head& head, const KeyChunk& keys, std::uint32_t* tiles,
                const TilesDone& done, double* dslope, std::uint32_t* scratch) {
    [[maybe_unused]] const typename Arithmetic::Session session;
    Chunk<Arithmetic, Element> chunk(a, g, head, keys, dslope, scratch);
    chunk.pack();
    const TileLayout<Arithmetic> layout(a.head_width);
    const std::int64_t tile_count = ceil_divide(head.queries.count, layout.queries);
    for (std::int64_t t = 0; t < tile_count; ++t) {
        const QueryTile<Arithmetic> tile(layout, tiles + static_cast<std::size_t>(t) * layout.words());
        const std::int64_t first = t * layout.queries;
        const int count = at_most(layout.queries, head.queries.count - first);
        const int rows = layout.computed(count);
        for (int b = 0; b < chunk.blocks(); ++b) {
            chunk.take(tile, rows, b);
            if (b == 0 && done.before != nullptr) wait_until_past(done.before, t);
            chunk.add_to_dq(tile, rows, b);
        }
        if (chunk.is_last()) chunk.write_dq(tile, first, count);
        __atomic_store_n(done.own, t + 1, __ATOMIC_RELEASE);
    }
    chunk.write_key_gradients();
}

template <class Arithmetic>
std::size_t tile_words(int head_width) {
    return TileLayout<Arithmetic>(head_width).words();
}

template <class Arithmetic, class Element>
constexpr BackwardKernels backward_kernels = {
    &gradient_queries<Arithmetic>,
    &tile_words<Arithmetic>,
    &backward_scratch_words<Arithmetic>,
    &pack_queries<Arithmetic, Element>,
    &take_chunk<Arithmetic, Element>,
};

}  // namespace
}  // namespace maskattn
