// Forward attention of a tile of queries, with the softmax and both products in one pass over the keys.
//
// Dimension key: M queries multiplied at once (Arithmetic::rows_at_once), Q of an item (tile_queries), N keys of a block
// (block_keys), D head width.
#pragma once

#include "attention/operands.hpp"
#include "attention/score.hpp"

namespace maskattn {
namespace {

// A packed block of keys, in words: K by steps [D / depth][N], V by steps [N / depth][D padded], then N of each of the
// key bias, x and y.
template <class Arithmetic>
struct BlockLayout {
    int k_words, v_words;

    explicit BlockLayout(int head_width)
        : k_words(steps_of<Arithmetic>(head_width) * block_keys),
          v_words(block_keys / Arithmetic::depth * padded(head_width)) {}

    std::size_t words() const { return static_cast<std::size_t>(k_words + v_words + 3 * block_keys); }
};

// The terms of a block's keys.
struct KeyTerms {
    const float* bias_N;  // -inf past the end of the sequence
    const float* x_N;
    const float* y_N;
    int columns;  // keys that are computed, from columns_of_block
    int steps;    // of the product with V: the keys of the sequence alone
    bool biased;  // whether bias_N must be added
};

// Returns the number of a block's keys that are computed: all of a full block; of the last, its keys rounded up to
// whole vectors (of pairs of keys).
template <class Arithmetic>
MASKATTN_INLINE int columns_of_block(const Head& head, std::int64_t block) {
    constexpr int step = lanes * Arithmetic::depth;
    const int count = at_most(block_keys, head.keys.count - block * block_keys);
    return (count + step - 1) / step * step;
}

template <class Arithmetic>
MASKATTN_INLINE KeyTerms terms_of_block(const Attention& a, const Head& head, std::int64_t block, const float* bias_N) {
    const int count = at_most(block_keys, head.keys.count - block * block_keys);
    const int columns = columns_of_block<Arithmetic>(head, block);
    const int steps = steps_of<Arithmetic>(count + Arithmetic::depth - 1);
    const bool biased = count < block_keys || forms_scores(a);
    return {bias_N, bias_N + block_keys, bias_N + 2 * block_keys, columns, steps, biased};
}

// Packs the bias and positions of the block's keys, with a bias of -inf past the end, where probabilities must be 0.
inline void pack_key_terms(const Attention& a, const Head& head, std::int64_t block, float* bias_N) {
    const std::int64_t first = block * block_keys;
    const int count = at_most(block_keys, head.keys.count - first);
    for (int n = 0; n < block_keys; ++n) {
        float bias = n < count ? 0.0f : -infinity, x = 0.0f, y = 0.0f;
        if (n < count && a.key_bias.data) bias = *row_of(a.key_bias, head, row_at(head.keys, first + n));
        if (n < count && a.slopes.data) {
            const float* position = row_of(a.coords_k, head, row_at(head.keys, first + n));
            x = position[0];
            y = position[1];
        }
        bias_N[n] = bias;
        bias_N[block_keys + n] = x;
        bias_N[2 * block_keys + n] = y;
    }
}

template <class Element>
void rows_of_block(const Strided<const void>& x, const Head& head, std::int64_t block, const Element** rows) {
    const std::int64_t first = block * block_keys;
    const int count = at_most(block_keys, head.keys.count - first);
    for (int n = 0; n < block_keys; ++n)
        rows[n] = n < count ? row_of<Element>(x, head, row_at(head.keys, first + n)) : nullptr;
}

template <class Arithmetic, class Element>
void pack_keys(const Attention& a, const Head& head, std::int64_t first, std::int64_t last, std::uint32_t* blocks) {
    const BlockLayout<Arithmetic> layout(a.head_width);
    const Element* rows[block_keys];
    for (std::int64_t block = first; block < last; ++block) {
        std::uint32_t* to = blocks + static_cast<std::size_t>(block) * layout.words();
        const int columns = columns_of_block<Arithmetic>(head, block);
        rows_of_block(a.k, head, block, rows);
        pack_columns<Arithmetic>(rows, columns, a.head_width, to);
        rows_of_block(a.v, head, block, rows);
        pack_steps<Arithmetic>(rows, columns, a.head_width, to + layout.k_words);
        pack_key_terms(a, head, block, reinterpret_cast<float*>(to + layout.k_words + layout.v_words));
    }
}

// Computes the scores of a query at (x, y) and the keys of a block from `n` on from their products.
template <bool biased, bool distanced>
MASKATTN_INLINE Score block_score(Floats product, const KeyTerms& keys, int n, const ScoreUnits& units, float x,
                                  float y) {
    const Floats bias = biased ? load<Floats>(keys.bias_N + n) : Floats{};
    const Floats distance = distanced ? distances(x, y, keys.x_N + n, keys.y_N + n) : Floats{};
    return score<biased, distanced>(product, bias, distance, units);
}

// Stores 2^(factor score - base) for bare products, or 2^(factor (score - base)) for other scores, of a row and block
// as left operand of the product with V; returns their sums by lane.
template <class Arithmetic, bool bare>
MASKATTN_INLINE Floats store_probabilities(const float* score_N, int columns, float factor, float base,
                                           std::uint32_t* p_N) {
    const auto p_at = [&](int n) __attribute__((always_inline)) {
        const Floats score = load<Floats>(score_N + n);
        return power_of_two(bare ? score * factor - base : (score - base) * factor);
    };
    Floats total{};
    if constexpr (Arithmetic::depth == 1) {
#pragma GCC unroll 16
        for (int n = 0; n < columns; n += lanes) {
            const Floats p = p_at(n);
            store(p_N + n, p);
            total += p;
        }
    } else {
#pragma GCC unroll 2
        for (int n = 0; n < columns; n += 2 * lanes) {
            const Floats first = p_at(n), second = p_at(n + lanes);
            store(p_N + n / 2, Arithmetic::round(first, second));
            total += first + second;
        }
    }
    return total;
}

// The online softmax: the running state of the rows of a query tile.
struct SoftmaxState {
    float* largest_Q;  // largest score so far
    float* sum_Q;      // [Q][lanes], of 2^(score - largest)
    const float *x_Q, *y_Q;
};

// Updates the state by the products of rows [q, q + M) with a block. Stores p, and in factor_M the factors for the sums
// so far.
// The maxima of all rows are computed before the first exponential, so that neither waits for the other. If nothing is
// added to products, they need not be converted to scores first, since the largest product has the largest score.
template <class Arithmetic, bool biased, bool distanced, bool whole>
__attribute__((noinline)) void softmax_step(const SoftmaxState& state, int q, float* product_MN, const KeyTerms& keys,
                                            ScoreUnits units, std::uint32_t* p_MN, float* factor_M) {
    const int columns = whole ? block_keys : keys.columns;
    constexpr bool bare = !biased && !distanced;
    constexpr int factors = padded(Arithmetic::rows);
    alignas(64) float before_M[factors] = {}, base_M[factors] = {};
#pragma GCC unroll 8
    for (int m = 0; m < Arithmetic::rows; ++m) {
        const float x = distanced ? state.x_Q[q + m] : 0.0f, y = distanced ? state.y_Q[q + m] : 0.0f;
        float* row = product_MN + m * block_keys;
        Floats most = broadcast(-infinity);
#pragma GCC unroll 16
        for (int n = 0; n < columns; n += lanes) {
            Floats s = load<Floats>(row + n);
            if constexpr (!bare) {
                s = block_score<biased, distanced>(s, keys, n, units, x, y).value;
                store(row + n, s);
            }
            most = maximum(s, most);
        }
        const float before = state.largest_Q[q + m], found = bare ? largest(most) * units.product : largest(most);
        const Largest now = larger_of(before, found);
        before_M[m] = before;
        base_M[m] = now.base;
        state.largest_Q[q + m] = now.score;
    }
    for (int m = 0; m < factors; m += lanes)
        store(factor_M + m, power_of_two((load<Floats>(before_M + m) - load<Floats>(base_M + m)) * units.difference));
    Arithmetic::stay_awake();
    for (int m = 0; m < Arithmetic::rows; ++m) {
        if (m == tile_rows) Arithmetic::stay_awake();
        float* sums = state.sum_Q + (q + m) * lanes;
        const Floats total = store_probabilities<Arithmetic, bare>(product_MN + m * block_keys, columns,
                                                                   bare ? units.product : units.difference, base_M[m],
                                                                   p_MN + m * (block_keys / Arithmetic::depth));
        store(sums, load<Floats>(sums) * factor_M[m] + total);
    }
}

template <class Arithmetic, bool distanced>
MASKATTN_INLINE void softmax_step(const SoftmaxState& state, int q, float* product_MN, const KeyTerms& keys,
                                  ScoreUnits units, std::uint32_t* p_MN, float* factor_M) {
    if (keys.columns < block_keys)
        softmax_step<Arithmetic, true, distanced, false>(state, q, product_MN, keys, units, p_MN, factor_M);
    else if (keys.biased)
        softmax_step<Arithmetic, true, distanced, true>(state, q, product_MN, keys, units, p_MN, factor_M);
    else
        softmax_step<Arithmetic, false, distanced, true>(state, q, product_MN, keys, units, p_MN, factor_M);
}

// Returns the scratch of a query tile, in words: q [Q][D / depth], out [Q][D padded], largest, x and y [Q] and sum
// [Q][lanes].
template <class Arithmetic>
std::size_t forward_scratch_words(int head_width) {
    return static_cast<std::size_t>(tile_queries) *
           static_cast<std::size_t>(padded(head_width / Arithmetic::depth) + padded(head_width) + 3 + lanes);
}

template <class Element>
void write_output(const Attention& a, const Head& head, std::int64_t row, float largest_score, Floats sums,
                  const float* out_D) {
    const float total = sum(sums);
    const double largest = static_cast<double>(largest_score) * (only_products(a) ? ln_2 : 1.0);
    write_lse(largest, total, row_of(a.lse, head, row), a.lse_rest.data ? row_of(a.lse_rest, head, row) : nullptr);
    write_row(out_D, total == 0.0f ? 0.0f : 1.0f / total, a.head_width, row_of<Element>(a.out, head, row));
}

template <class Arithmetic, class Element>
void attend(const Attention& a, const Head& head, std::int64_t tile, const std::uint32_t* blocks,
            std::uint32_t* scratch) {
    [[maybe_unused]] const typename Arithmetic::Session session;
    const BlockLayout<Arithmetic> layout(a.head_width);
    const int steps = steps_of<Arithmetic>(a.head_width), q_stride = padded(steps), out_stride = padded(a.head_width);
    const std::int64_t first = tile * tile_queries;
    const int count = at_most(tile_queries, head.queries.count - first);
    const int rows = static_cast<int>(ceil_divide(count, Arithmetic::rows)) * Arithmetic::rows;

    std::uint32_t* q_QD = scratch;
    float* out_QD = reinterpret_cast<float*>(q_QD + tile_queries * q_stride);
    float* largest_Q = out_QD + tile_queries * out_stride;
    float *x_Q = largest_Q + tile_queries, *y_Q = x_Q + tile_queries, *sum_Q = y_Q + tile_queries;

    const Element* q_rows[tile_queries];
    for (int q = 0; q < rows; ++q) {
        const bool real = q < count;
        const std::int64_t row = real ? row_at(head.queries, first + q) : 0;
        q_rows[q] = real ? row_of<Element>(a.q, head, row) : nullptr;
        const float* position = real && a.slopes.data ? row_of(a.coords_q, head, row) : nullptr;
        x_Q[q] = position ? position[0] : 0.0f;
        y_Q[q] = position ? position[1] : 0.0f;
        largest_Q[q] = -infinity;
        store(sum_Q + q * lanes, Floats{});
    }
    pack_rows<Arithmetic>(q_rows, rows, a.head_width, q_QD, q_stride);
    __builtin_memset(out_QD, 0, static_cast<std::size_t>(rows * out_stride) * sizeof *out_QD);

    const SoftmaxState state{largest_Q, sum_Q, x_Q, y_Q};
    const ScoreUnits units = units_of(a, head);
    constexpr int p_stride = block_keys / Arithmetic::depth, at_once = Arithmetic::rows_at_once;
    alignas(64) float product_MN[at_once * block_keys];
    alignas(64) std::uint32_t p_MN[at_once * p_stride];
    alignas(64) float factor_M[padded(at_once)];
    const std::int64_t block_count = ceil_divide(head.keys.count, block_keys);
    for (std::int64_t block = 0; block < block_count; ++block) {
        const std::uint32_t* k = blocks + static_cast<std::size_t>(block) * layout.words();
        const std::uint32_t* v = k + layout.k_words;
        const KeyTerms keys =
            terms_of_block<Arithmetic>(a, head, block, reinterpret_cast<const float*>(v + layout.v_words));
        for (int q = 0; q < rows; q += at_once) {
            const int now = at_most(at_once, rows - q);
            multiply_rows<Arithmetic, Start::zero>(now, {q_QD + q * q_stride, q_stride, 1}, k, block_keys, steps,
                                                   product_MN, block_keys, keys.columns / lanes);
            for (int m = 0; m < now; m += Arithmetic::rows)
                if (a.slopes.data)
                    softmax_step<Arithmetic, true>(state, q + m, product_MN + m * block_keys, keys, units,
                                                   p_MN + m * p_stride, factor_M + m);
                else
                    softmax_step<Arithmetic, false>(state, q + m, product_MN + m * block_keys, keys, units,
                                                    p_MN + m * p_stride, factor_M + m);
            multiply_rows<Arithmetic, Start::scaled>(now, {p_MN, p_stride, 1}, v, out_stride,
                                                     keys.steps, out_QD + q * out_stride, out_stride,
                                                     out_stride / lanes, factor_M);
        }
    }
    for (int q = 0; q < count; ++q)
        write_output<Element>(a, head, row_at(head.queries, first + q), largest_Q[q],
                              load<Floats>(sum_Q + q * lanes), out_QD + q * out_stride);
}

template <class Arithmetic>
std::size_t block_words(int head_width) {
    return BlockLayout<Arithmetic>(head_width).words();
}

template <class Arithmetic, class Element>
constexpr ForwardKernels forward_kernels = {
    &block_words<Arithmetic>,
    &forward_scratch_words<Arithmetic>,
    &pack_keys<Arithmetic, Element>,
    &attend<Arithmetic, Element>,
};

}  // namespace
}  // namespace maskattn
