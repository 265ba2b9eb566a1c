// Forward readout, with the softmax and both products in one pass over a run of keys. Each tile takes three steps: the
// products of all heads, group after group of keys in the order of memory; the softmax; the sums of V in the same order.
//
// Dimension key: H heads, R queries of a sequence, N keys of a tile, D head width (padded to whole vectors).
#pragma once

#include "readout/tiles.hpp"

namespace maskattn {
namespace {

// The partial result of a run of keys: the largest score and the sum of e^(score - largest) [H R], then the sum of
// e^(score - largest) times v [H R][D].
struct ReadoutPartial {
    float *largest, *sum, *out;

    ReadoutPartial(const Readout& a, float* partial)
        : largest(partial), sum(partial + a.heads * a.queries), out(partial + whole_lines(state_words(a))) {}

    static std::size_t state_words(const Readout& a) {
        return 2 * static_cast<std::size_t>(a.heads) * static_cast<std::size_t>(a.queries);
    }
};

inline std::size_t query_words(const Readout& a) {
    return static_cast<std::size_t>(a.heads) * static_cast<std::size_t>(a.queries) *
           static_cast<std::size_t>(padded(a.head_width));
}

inline std::size_t readout_partial_words(const Readout& a) {
    return whole_lines(whole_lines(ReadoutPartial::state_words(a)) + query_words(a));
}

inline std::size_t tile_words_of(const Readout& a) {
    return static_cast<std::size_t>(tile_keys * padded(a.head_width));
}

// Returns the words of a tile's scores, [H][R][N].
inline std::size_t score_words_of(const Readout& a) {
    return static_cast<std::size_t>(a.heads * a.queries) * tile_keys;
}

// Returns the words of the scratch: queries, gradients of the output, two tiles, two tiles of scores, and three numbers
// for each head and query.
inline std::size_t readout_scratch_words(const Readout& a) {
    return 2 * whole_lines(query_words(a)) + 2 * tile_words_of(a) + 2 * score_words_of(a) +
           whole_lines(3 * static_cast<std::size_t>(a.heads) * static_cast<std::size_t>(a.queries));
}

// Computes a head's p of a tile and the factors for its sums so far. The scores replace the products.
inline void take_softmax_step(const Readout& a, int head, const TileTerms& terms, float* products_RN, float* largest_R,
                              float* sum_R, float* p_RN, float* factor_R) {
    for (int r = 0; r < a.queries; ++r) {
        float* row_N = products_RN + r * tile_keys;
        Floats most = broadcast(-infinity);
        for (int n = 0; n < terms.count; n += lanes) {
            const Floats s = terms.score(a, head, r, n, load<Floats>(row_N + n)).value;
            store(row_N + n, s);
            most = maximum(most, s);
        }
        const float before = largest_R[r];
        const auto [now, base] = larger_of(before, largest(most));
        Floats total{};
        for (int n = 0; n < terms.count; n += lanes) {
            const Floats p = exponential(load<Floats>(row_N + n) - base);
            store(p_RN + r * tile_keys + n, p);
            total += p;
        }
        factor_R[r] = exponential(broadcast(before - base))[0];
        sum_R[r] = sum_R[r] * factor_R[r] + sum(total);
        largest_R[r] = now;
    }
}

template <class Element>
void attend_to_run(const Readout& a, const KeyRun& run, float* partial, std::uint32_t* scratch) {
    const int width = padded(a.head_width), R = a.queries;
    const ReadoutPartial state(a, partial);
    for (int i = 0; i < a.heads * R; ++i) {
        state.largest[i] = -infinity;
        state.sum[i] = 0.0f;
    }
    __builtin_memset(state.out, 0, query_words(a) * sizeof *state.out);
    auto* queries_HRD = reinterpret_cast<float*>(scratch);
    float* buffer_ND = queries_HRD + whole_lines(query_words(a));
    float *products_HRN = buffer_ND + tile_words_of(a), *p_HRN = products_HRN + score_words_of(a);
    float* factor_HR = p_HRN + score_words_of(a);
    convert_queries<Element>(a, a.q, run.sequence, a.scale, queries_HRD);

    ComingLines coming_k(a.k, a), coming_v(a.v, a);
    for (std::int64_t done = 0; done < run.count; done += tile_keys) {
        TileTerms terms(a, run, done);
        const std::int64_t first = run.first + done;
        multiply_tile_with_keys<Element>(a, a.k, run, done, queries_HRD, buffer_ND, products_HRN, coming_k);
        for (int h = 0; h < a.heads; ++h) {
            float* products_RN = products_HRN + h * R * tile_keys;
            terms.take_bias(a, h, first);
            take_softmax_step(a, h, terms, products_RN, state.largest + h * R, state.sum + h * R,
                              p_HRN + h * R * tile_keys, factor_HR + h * R);
            if (a.rows.data)
                for (int r = 0; r < R; ++r)
                    __builtin_memcpy(row_of(a.rows, 0, h, r) + first, products_RN + r * tile_keys,
                                     static_cast<std::size_t>(terms.count) * sizeof(float));
        }
        for (int n = 0; n < terms.count; n += group_keys) {
            const int now = at_most(group_keys, terms.count - n);
            coming_v.expect(run, first + n + group_keys, group_keys);
            for (int h = 0; h < a.heads; ++h) {
                const HeadRows<Element> v = rows_of_head<Element>(a.v, h, first + n, a.head_width);
                const float* p_RN = p_HRN + h * R * tile_keys + n;
                float* out_RD = state.out + h * R * width;
                if (n == 0)
                    add_weighted_keys<Start::scaled>(p_RN, R, v, now, out_RD, width, buffer_ND, coming_v,
                                                     factor_HR + h * R);
                else
                    add_weighted_keys<Start::add>(p_RN, R, v, now, out_RD, width, buffer_ND, coming_v);
            }
        }
    }
}

template <class Element>
void write_readout(const Readout& a, std::int32_t sequence, const float* partials, std::int64_t count) {
    const int width = padded(a.head_width);
    const std::size_t words = readout_partial_words(a);
    const auto partial = [&](std::int64_t c) __attribute__((always_inline)) {
        return ReadoutPartial(a, const_cast<float*>(partials) + static_cast<std::size_t>(c) * words);
    };
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r) {
            const int i = h * a.queries + r;
            Largest most{-infinity, 0.0f};
            for (std::int64_t c = 0; c < count; ++c) most = larger_of(most.score, partial(c).largest[i]);
            alignas(64) float out_D[256] = {};
            float total = 0.0f;
            for (std::int64_t c = 0; c < count; ++c) {
                const float weight = exponential(broadcast(partial(c).largest[i] - most.base))[0];
                total += weight * partial(c).sum[i];
                for (int d = 0; d < width; d += lanes)
                    store(out_D + d, load<Floats>(out_D + d) + load<Floats>(partial(c).out + i * width + d) * weight);
            }
            write_lse(static_cast<double>(most.score), total, row_of(a.lse, sequence, h, r),
                      a.lse_rest.data ? row_of(a.lse_rest, sequence, h, r) : nullptr);
            write_row(out_D, total == 0.0f ? 0.0f : 1.0f / total, a.head_width,
                      row_of<Element>(a.out, sequence, h, r));
        }
}

inline void normalize_rows(const Readout& a, const KeyRun& run) {
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r) {
            float* row = row_of(a.rows, 0, h, r) + run.first;
            const float lse = lse_to_subtract(*row_of(a.lse, run.sequence, h, r));
            const float rest = rest_of_lse(a, run.sequence, h, r);
            std::int64_t n = 0;
            for (; n + lanes <= run.count; n += lanes) store(row + n, probability(load<Floats>(row + n), lse, rest));
            if (n == run.count) continue;
            const auto left = static_cast<std::size_t>(run.count - n) * sizeof(float);
            const Floats last = probability(load_first<Floats>(row + n, static_cast<int>(run.count - n)), lse, rest);
            __builtin_memcpy(row + n, &last, left);
        }
}

}  // namespace
}  // namespace maskattn
