// Functions that all passes of a readout share: a tile of keys as rows of floats, its products with queries, its scores.
//
// Dimension key: H heads, R queries of a sequence, N keys of a tile (tile_keys), D head width (padded to whole vectors).
#pragma once

#include "attention/operands.hpp"
#include "attention/score.hpp"
#include "readout/coming_lines.hpp"
#include "readout/readout.hpp"

namespace maskattn {
namespace {

MASKATTN_INLINE float rest_of_lse(const Readout& a, std::int64_t sequence, std::int64_t head, std::int64_t row) {
    return a.lse_rest.data ? *row_of(a.lse_rest, sequence, head, row) : 0.0f;
}

// Loads the next vector of a row with `left` remaining elements, a multiple of 8 as all head widths are.
template <class Element>
MASKATTN_INLINE Floats load_next(const Element* row, int left) {
    if constexpr (lanes > 8) {
        if (left < lanes) {
            Element eight[lanes] = {};
            __builtin_memcpy(eight, row, 8 * sizeof *row);
            return load_floats(eight, lanes);
        }
    }
    static_cast<void>(left);
    return load_floats(row, lanes);
}

template <class Element>
MASKATTN_INLINE void convert_row(const Element* row, int head_width, float factor, float* to) {
    for (int d = 0; d < head_width; d += lanes) store(to + d, load_next(row + d, head_width - d) * factor);
}

// Rows of one head, `stride` elements apart.
template <class Element>
struct HeadRows {
    const Element* data;
    std::ptrdiff_t stride;
    int head_width;

    MASKATTN_INLINE HeadRows from(int row) const { return {data + row * stride, stride, head_width}; }
};

template <class Element>
MASKATTN_INLINE HeadRows<Element> rows_of_head(const Strided<const void>& x, int head, std::int64_t first,
                                               int head_width) {
    return {row_of<Element>(x, 0, head, first), x.row, head_width};
}

// Returns rows as floats with zeros up to whole vectors, either in place or converted to `buffer`.
template <class Element>
MASKATTN_INLINE HeadRows<float> float_rows(const HeadRows<Element>& rows, int count, float* buffer) {
    const int width = padded(rows.head_width);
    if constexpr (sizeof(Element) == sizeof(float))
        if (rows.head_width == width) return rows;
    for (int n = 0; n < count; ++n) convert_row(rows.data + n * rows.stride, rows.head_width, 1.0f, buffer + n * width);
    return {buffer, width, width};
}

// Converts the sequence's rows [H][R][D] to floats times a factor.
template <class Element>
void convert_queries(const Readout& a, const Strided<const void>& x, std::int32_t sequence, float factor, float* to_HRD) {
    const int width = padded(a.head_width);
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r, to_HRD += width)
            convert_row(row_of<Element>(x, sequence, h, r), a.head_width, factor, to_HRD);
}

// Returns the sum of vector i in lane i.
template <int distance = lanes / 2>
MASKATTN_INLINE Floats sums_of(Floats (&x)[lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < distance; ++i) {
        Words low = Words(x[i]), high = Words(x[i + distance]);
        exchange<distance>(low, high, EachLane{});
        x[i] = Floats(low) + Floats(high);
    }
    if constexpr (distance > 1) return sums_of<distance / 2>(x);
    return x[0];
}

// Computes products_RN [R][tile_keys] of each query with up to `lanes` keys; past `count` the last key is repeated.
template <class Element>
MASKATTN_INLINE void multiply_with_lanes(const float* queries_RD, int queries, int width, const HeadRows<Element>& keys,
                                         int count, float* products_RN, ComingLines& coming) {
    constexpr int lines = lanes * lanes * static_cast<int>(sizeof(Element)) / 64;
    constexpr int spread_over = 4;  // queries, if there are as many, so that prefetches are evenly distributed
    const Element* rows[lanes];
    for (int i = 0; i < lanes; ++i) rows[i] = keys.data + (i < count ? i : count - 1) * keys.stride;
    for (int r = 0; r < queries; ++r) {
        const float* query_D = queries_RD + r * width;
        Floats total[lanes] = {};
        int d = 0;
        for (; d + lanes <= keys.head_width; d += lanes) {
            if (queries < spread_over && r == 0) coming.ask<lines>();
            if (queries >= spread_over && r < spread_over) coming.ask<(lines + spread_over - 1) / spread_over>();
            const Floats query = load<Floats>(query_D + d);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) total[i] += query * load_floats(rows[i] + d, lanes);
        }
        if (d < keys.head_width)
            for (int i = 0; i < lanes; ++i)
                total[i] += load<Floats>(query_D + d) * load_next(rows[i] + d, keys.head_width - d);
        store(products_RN + r * tile_keys, sums_of(total));
    }
}

// Computes the products with up to tile_keys keys. A few queries read the keys directly; for more they are converted
// first.
template <class Element>
__attribute__((noinline)) void multiply_with_keys(const float* queries_RD, int queries, int width,
                                                  const HeadRows<Element>& keys, int count, float* buffer_ND,
                                                  float* products_RN, ComingLines& coming) {
    constexpr int direct_queries = 2;
    for (int n = 0; n < count; n += lanes) {
        const int now = at_most(lanes, count - n);
        if (queries <= direct_queries)
            multiply_with_lanes(queries_RD, queries, width, keys.from(n), now, products_RN + n, coming);
        else
            multiply_with_lanes(queries_RD, queries, width, float_rows(keys.from(n), now, buffer_ND + n * width), now,
                                products_RN + n, coming);
    }
}

// Computes products_HRN [H][R][tile_keys] of a tile's keys with the queries.
template <class Element>
void multiply_tile_with_keys(const Readout& a, const Strided<const void>& x, const KeyRun& run, std::int64_t done,
                             const float* queries_HRD, float* buffer_ND, float* products_HRN, ComingLines& coming) {
    const int width = padded(a.head_width), R = a.queries, count = at_most(tile_keys, run.count - done);
    const std::int64_t first = run.first + done;
    for (int n = 0; n < count; n += group_keys) {
        const int now = at_most(group_keys, count - n);
        coming.expect(run, first + n + group_keys, group_keys);
        for (int h = 0; h < a.heads; ++h)
            multiply_with_keys(queries_HRD + h * R * width, R, width,
                               rows_of_head<Element>(x, h, first + n, a.head_width), now, buffer_ND,
                               products_HRN + h * R * tile_keys + n, coming);
    }
}

// sums_RD (+)= weights_RN times `vectors` vectors of the keys from column d on.
template <Start start, int queries, int vectors, class Element>
MASKATTN_INLINE void add_columns(const float* weights_RN, const HeadRows<Element>& keys, int d, int count,
                                 float* sums_RD, int width, const float* factor_R, ComingLines& coming) {
    constexpr int lines = (vectors * lanes * static_cast<int>(sizeof(Element)) + 63) / 64;
    Floats total[queries][vectors] = {};
    for (int n = 0; n < count; ++n) {
        const Element* row = keys.data + n * keys.stride + d;
        coming.ask<lines>();
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            const int left = vectors > 1 ? lanes : keys.head_width - d;
            const Floats value = load_next(row + i * lanes, left);
#pragma GCC unroll 8
            for (int r = 0; r < queries; ++r) total[r][i] += value * weights_RN[r * tile_keys + n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < queries; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            float* to = sums_RD + r * width + d + i * lanes;
            if (start == Start::add) total[r][i] += load<Floats>(to);
            if (start == Start::scaled) total[r][i] += load<Floats>(to) * factor_R[r];
            store(to, total[r][i]);
        }
}

template <Start start, int queries, class Element>
__attribute__((noinline)) void add_rows(const float* weights_RN, const HeadRows<Element>& keys, int count,
                                        float* sums_RD, int width, const float* factor_R, ComingLines& coming) {
    int d = 0;
    for (; d + tile_vectors * lanes <= keys.head_width; d += tile_vectors * lanes)
        add_columns<start, queries, tile_vectors>(weights_RN, keys, d, count, sums_RD, width, factor_R, coming);
    for (; d < width; d += lanes)
        add_columns<start, queries, 1>(weights_RN, keys, d, count, sums_RD, width, factor_R, coming);
}

template <Start start, int now>
MASKATTN_INLINE void multiply_weights(const float* weights_RN, int queries, const HeadRows<float>& keys, int count,
                                      float* sums_RD, int width, const float* factor_R, ComingLines& coming, int& r) {
    const auto *words = reinterpret_cast<const std::uint32_t*>(keys.data),
               *weights = reinterpret_cast<const std::uint32_t*>(weights_RN);
    for (; queries - r >= now; r += now) {
        for (int lines = count * width / 16 * now / queries; lines > 0; lines -= 4) coming.ask<4>();
        multiply<SinglePrecision, now, start>({weights + r * tile_keys, tile_keys, 1}, words, keys.stride, count,
                                              sums_RD + r * width, width, width / lanes,
                                              factor_R ? factor_R + r : nullptr);
    }
}

// Adds each query's weights [R][tile_keys] times the keys to sums_RD [R][D], which is first scaled by factor_R for
// Start::scaled.
template <Start start, class Element>
void add_weighted_keys(const float* weights_RN, int queries, const HeadRows<Element>& keys, int count, float* sums_RD,
                       int width, float* buffer_ND, ComingLines& coming, const float* factor_R = nullptr) {
    switch (queries) {
        case 1: return add_rows<start, 1>(weights_RN, keys, count, sums_RD, width, factor_R, coming);
        case 2: return add_rows<start, 2>(weights_RN, keys, count, sums_RD, width, factor_R, coming);
        case 3: return add_rows<start, 3>(weights_RN, keys, count, sums_RD, width, factor_R, coming);
        case 4: return add_rows<start, 4>(weights_RN, keys, count, sums_RD, width, factor_R, coming);
        case 5: return add_rows<start, 5>(weights_RN, keys, count, sums_RD, width, factor_R, coming);
        default: break;
    }
    const HeadRows<float> rows = float_rows(keys, count, buffer_ND);
    int r = 0;
    multiply_weights<start, 6>(weights_RN, queries, rows, count, sums_RD, width, factor_R, coming, r);
    multiply_weights<start, 4>(weights_RN, queries, rows, count, sums_RD, width, factor_R, coming, r);
    multiply_weights<start, 2>(weights_RN, queries, rows, count, sums_RD, width, factor_R, coming, r);
    multiply_weights<start, 1>(weights_RN, queries, rows, count, sums_RD, width, factor_R, coming, r);
}

// The terms that are added to the products of a tile of keys with the queries, which include the scale already.
struct TileTerms {
    int count;
    alignas(64) float bias_N[tile_keys];  // -inf past the end
    alignas(64) float distance_RN[most_queries * tile_keys];

    TileTerms(const Readout& a, const KeyRun& run, std::int64_t done, int most = tile_keys)
        : count(at_most(most, run.count - done)) {
        for (int n = 0; n < most; ++n) bias_N[n] = n < count ? 0.0f : -infinity;
        if (!a.slopes.data) return;
        alignas(64) float x_N[tile_keys] = {}, y_N[tile_keys] = {};
        for (int n = 0; n < count; ++n) {
            const float* position = row_of(a.coords_k, 0, 0, run.first + done + n);
            x_N[n] = position[0];
            y_N[n] = position[1];
        }
        for (int r = 0; r < a.queries; ++r) {
            const float* position = row_of(a.coords_q, run.sequence, 0, r);
            for (int n = 0; n < most; n += lanes)
                store(distance_RN + r * tile_keys + n, distances(position[0], position[1], x_N + n, y_N + n));
        }
    }

    void take_bias(const Readout& a, int head, std::int64_t first) {
        if (!a.key_bias.data || (head > 0 && a.key_bias.head == 0)) return;
        for (int n = 0; n < count; ++n) bias_N[n] = *row_of(a.key_bias, 0, head, first + n);
    }

    MASKATTN_INLINE Score score(const Readout& a, int head, int r, int n, Floats product) const {
        const Floats bias = load<Floats>(bias_N + n);
        const ScoreUnits units = units_of_scaled(a, head);
        if (!a.slopes.data) return maskattn::score<true, false>(product, bias, Floats{}, units);
        return maskattn::score<true, true>(product, bias, load<Floats>(distance_RN + r * tile_keys + n), units);
    }
};

}  // namespace
}  // namespace maskattn
