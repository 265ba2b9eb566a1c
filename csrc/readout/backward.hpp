// Backward readout of a run of keys, with p recomputed from lse. Each group of K and V is read once, and dk and dv are
// written once; dq is summed over the run.
//
// Dimension key: H heads, R queries of a sequence, N keys of a tile, D head width (padded to whole vectors).
#pragma once

#include "readout/forward.hpp"

namespace maskattn {
namespace {

// Gathers the lse of each head and query, as it is subtracted, and its rest.
inline void gather_lse(const Readout& a, std::int32_t sequence, float* lse_HR, float* rest_HR) {
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r) {
            lse_HR[h * a.queries + r] = lse_to_subtract(*row_of(a.lse, sequence, h, r));
            rest_HR[h * a.queries + r] = rest_of_lse(a, sequence, h, r);
        }
}

// Loads the gradient of the attention row of a head and query from key `first + n` on, without reading past `count`.
MASKATTN_INLINE Floats row_gradient(const ReadoutGradients& g, int head, int r, std::int64_t first, int n, int count) {
    return load_floats(row_of(g.grad_rows, 0, head, r) + first + n, count - n);
}

template <class Element>
void sum_row_gradients(const Readout& a, const ReadoutGradients& g, const KeyRun& run, float* partial,
                       std::uint32_t* scratch) {
    const int R = a.queries;
    auto* queries_HRD = reinterpret_cast<float*>(scratch);
    float* buffer_ND = queries_HRD + 2 * whole_lines(query_words(a));
    float *products_HRN = buffer_ND + 2 * tile_words_of(a), *lse_HR = products_HRN + 2 * score_words_of(a);
    float* rest_HR = lse_HR + a.heads * R;
    convert_queries<Element>(a, a.q, run.sequence, a.scale, queries_HRD);
    gather_lse(a, run.sequence, lse_HR, rest_HR);
    for (int i = 0; i < a.heads * R; ++i) partial[i] = 0.0f;

    ComingLines coming(a.k, a);
    for (std::int64_t done = 0; done < run.count; done += tile_keys) {
        TileTerms terms(a, run, done);
        const std::int64_t first = run.first + done;
        multiply_tile_with_keys<Element>(a, a.k, run, done, queries_HRD, buffer_ND, products_HRN, coming);
        for (int h = 0; h < a.heads; ++h) {
            terms.take_bias(a, h, first);
            for (int r = 0; r < R; ++r) {
                const float* products_N = products_HRN + (h * R + r) * tile_keys;
                Floats total{};
                for (int n = 0; n < terms.count; n += lanes) {
                    const Floats s = terms.score(a, h, r, n, load<Floats>(products_N + n)).value;
                    total += probability(s, lse_HR[h * R + r], rest_HR[h * R + r]) *
                             row_gradient(g, h, r, first, n, terms.count);
                }
                partial[h * R + r] += sum(total);
            }
        }
    }
}

// Computes delta [H R].
template <class Element>
void sum_deltas(const Readout& a, const ReadoutGradients& g, std::int32_t sequence, const float* grads_HRD,
                const float* row_gradients, std::int64_t count, float* delta_HR) {
    const int width = padded(a.head_width);
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r) {
            const int i = h * a.queries + r;
            const Element* out = row_of<Element>(a.out, sequence, h, r);
            Floats products{};
            for (int d = 0; d < a.head_width; d += lanes)
                products += load<Floats>(grads_HRD + i * width + d) * load_next<Element>(out + d, a.head_width - d);
            float delta = sum(products);
            for (std::int64_t c = 0; c < count; ++c)
                delta += row_gradients[static_cast<std::size_t>(c) * readout_partial_words(a) + static_cast<std::size_t>(i)];
            if (g.grad_lse.data) delta -= *row_of(g.grad_lse, sequence, h, r);
            delta_HR[i] = *row_of(a.lse, sequence, h, r) == -infinity ? 0.0f : delta;
        }
}

// Writes sum over r of weights_RN[r][n] times rows_RD[r] for each of `count` keys n.
template <class Element>
void write_key_rows(const float* weights_RN, const float* rows_RD, int queries, int width, int head_width, int count,
                    Element* to, std::ptrdiff_t to_row, ComingLines& coming) {
    alignas(64) float sums_MD[tile_rows * 256];
    if (queries < tile_rows) {
        for (int n = 0; n < count; ++n) {
            for (int d = 0; d < width; d += lanes) {
                if (d % (64 / static_cast<int>(sizeof(Element))) == 0) coming.ask<1>();
                Floats total = load<Floats>(rows_RD + d) * weights_RN[n];
                for (int r = 1; r < queries; ++r)
                    total += load<Floats>(rows_RD + r * width + d) * weights_RN[r * tile_keys + n];
                store(sums_MD + d, total);
            }
            write_row(sums_MD, 1.0f, head_width, to + n * to_row);
        }
        return;
    }
    const auto *rows = reinterpret_cast<const std::uint32_t*>(rows_RD),
               *weights = reinterpret_cast<const std::uint32_t*>(weights_RN);
    for (int n = 0; n < count; n += tile_rows) {
        for (int d = 0; d < head_width; d += 64 / static_cast<int>(sizeof(Element))) coming.ask<tile_rows>();
        multiply<SinglePrecision, tile_rows, Start::zero>({weights + n, 1, tile_keys}, rows, width, queries, sums_MD,
                                                          width, width / lanes);
        for (int m = 0; m < tile_rows && n + m < count; ++m)
            write_row(sums_MD + m * width, 1.0f, head_width, to + (n + m) * to_row);
    }
}

// Computes p and dS of a head's tile, adds dS to dbias_N, and returns the sum of dS times distance.
inline float take_scores(const Readout& a, const ReadoutGradients& g, int head, std::int64_t first,
                         const TileTerms& terms, const float* lse_R, const float* rest_R, const float* delta_R,
                         const float* products_RN, const float* grad_p_RN, float* p_RN, float* ds_RN, float* dbias_N) {
    Floats by_distance{};
    for (int n = 0; n < terms.count; n += lanes) {
        Floats dbias = load<Floats>(dbias_N + n);
        for (int r = 0; r < a.queries; ++r) {
            const int at = r * tile_keys + n;
            const Score score = terms.score(a, head, r, n, load<Floats>(products_RN + at));
            const Floats p = probability(score.value, lse_R[r], rest_R[r]);
            Floats grad_p = load<Floats>(grad_p_RN + at);
            if (g.grad_rows.data) grad_p += row_gradient(g, head, r, first, n, terms.count);
            const ScoreGradient back = score_gradient(score, p, grad_p, delta_R[r]);
            store(p_RN + at, p);
            store(ds_RN + at, back.product);
            dbias += back.bias;
            if (a.slopes.data) by_distance += back.slope;
        }
        store(dbias_N + n, dbias);
    }
    return sum(by_distance);
}

inline void write_bias_gradient(const ReadoutGradients& g, int head, std::int64_t first, int count, float* dbias_N) {
    for (int n = 0; n < count; ++n) *row_of(g.dbias, 0, head, first + n) = dbias_N[n];
}

// If the heads share a bias, dbias has stride 0 over them and is the sum.
template <class Element>
void differentiate_run(const Readout& a, const ReadoutGradients& g, const KeyRun& run, const float* row_gradients,
                       std::int64_t count, float* partial, std::uint32_t* scratch) {
    const int width = padded(a.head_width), R = a.queries;
    auto* queries_HRD = reinterpret_cast<float*>(scratch);
    float* grads_HRD = queries_HRD + whole_lines(query_words(a));
    float* buffer_ND = grads_HRD + whole_lines(query_words(a));
    float *lse_HR = buffer_ND + 2 * tile_words_of(a) + 2 * score_words_of(a), *delta_HR = lse_HR + a.heads * R;
    float* rest_HR = delta_HR + a.heads * R;
    const ReadoutPartial state(a, partial);
    float *dslope_H = state.largest, *dq_HRD = state.out;
    convert_queries<Element>(a, a.q, run.sequence, a.scale, queries_HRD);
    convert_queries<Element>(a, g.grad_out, run.sequence, 1.0f, grads_HRD);
    gather_lse(a, run.sequence, lse_HR, rest_HR);
    sum_deltas<Element>(a, g, run.sequence, grads_HRD, row_gradients, count, delta_HR);
    for (int h = 0; h < a.heads; ++h) dslope_H[h] = 0.0f;
    __builtin_memset(dq_HRD, 0, query_words(a) * sizeof *dq_HRD);

    ComingLines coming_k(a.k, a), coming_v(a.v, a);
    ComingLines coming_dk({g.dk.data, 0, g.dk.head, g.dk.row}, a), coming_dv({g.dv.data, 0, g.dv.head, g.dv.row}, a);
    ComingLines* const all_coming[] = {&coming_k, &coming_v, &coming_dk, &coming_dv};
    alignas(64) float products_RN[most_queries * tile_keys], grad_p_RN[most_queries * tile_keys];
    alignas(64) float p_RN[most_queries * tile_keys] = {}, ds_RN[most_queries * tile_keys] = {};
    const bool shares_bias = g.dbias.head == 0;
    for (std::int64_t done = 0; done < run.count; done += group_keys) {
        TileTerms terms(a, run, done, group_keys);
        const std::int64_t first = run.first + done;
        for (ComingLines* coming : all_coming) coming->expect(run, first + group_keys, group_keys);
        alignas(64) float dbias_N[group_keys] = {};
        for (int h = 0; h < a.heads; ++h) {
            terms.take_bias(a, h, first);
            const int at = h * R * width;
            const HeadRows<Element> k = rows_of_head<Element>(a.k, h, first, a.head_width);
            const HeadRows<Element> v = rows_of_head<Element>(a.v, h, first, a.head_width);
            multiply_with_keys(queries_HRD + at, R, width, k, terms.count, buffer_ND, products_RN, coming_k);
            multiply_with_keys(grads_HRD + at, R, width, v, terms.count, buffer_ND, grad_p_RN, coming_v);
            dslope_H[h] -= take_scores(a, g, h, first, terms, lse_HR + h * R, rest_HR + h * R, delta_HR + h * R,
                                       products_RN, grad_p_RN, p_RN, ds_RN, dbias_N);
            add_weighted_keys<Start::add>(ds_RN, R, k, terms.count, dq_HRD + at, width, buffer_ND, coming_k);
            write_key_rows(ds_RN, queries_HRD + at, R, width, a.head_width, terms.count,
                           row_of<Element>(g.dk, 0, h, first), g.dk.row, coming_dk);
            write_key_rows(p_RN, grads_HRD + at, R, width, a.head_width, terms.count,
                           row_of<Element>(g.dv, 0, h, first), g.dv.row, coming_dv);
            if (g.dbias.data && !shares_bias) {
                write_bias_gradient(g, h, first, terms.count, dbias_N);
                __builtin_memset(dbias_N, 0, sizeof dbias_N);
            }
        }
        if (g.dbias.data && shares_bias) write_bias_gradient(g, 0, first, terms.count, dbias_N);
    }
}

template <class Element>
void write_query_gradients(const Readout& a, const ReadoutGradients& g, std::int32_t sequence, const float* partials,
                           std::int64_t count, double* dslopes) {
    const int width = padded(a.head_width);
    const std::size_t words = readout_partial_words(a);
    for (int h = 0; h < a.heads; ++h) {
        dslopes[h] = 0.0;
        for (std::int64_t c = 0; c < count; ++c)
            dslopes[h] += static_cast<double>(partials[static_cast<std::size_t>(c) * words + static_cast<std::size_t>(h)]);
        for (int r = 0; r < a.queries; ++r) {
            alignas(64) float dq_D[256] = {};
            for (std::int64_t c = 0; c < count; ++c) {
                const ReadoutPartial partial(a, const_cast<float*>(partials) + static_cast<std::size_t>(c) * words);
                for (int d = 0; d < width; d += lanes)
                    store(dq_D + d, load<Floats>(dq_D + d) + load<Floats>(partial.out + (h * a.queries + r) * width + d));
            }
            write_row(dq_D, a.scale, a.head_width, row_of<Element>(g.dq, sequence, h, r));
        }
    }
}

template <class Element>
constexpr ReadoutKernels readout_kernels = {
    &readout_partial_words,
    &readout_scratch_words,
    &attend_to_run<Element>,
    &write_readout<Element>,
    &normalize_rows,
    &sum_row_gradients<Element>,
    &differentiate_run<Element>,
    &write_query_gradients<Element>,
};

}  // namespace
}  // namespace maskattn
