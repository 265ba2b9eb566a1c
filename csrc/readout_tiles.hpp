// What all passes of a readout share: a tile of keys as rows of floats, its products with the queries, its scores.
//
// Dimension key: H heads, R queries of a sequence, N keys of a tile (tile_keys), D head width (padded to whole vectors).
#pragma once

#include "attention_rows.hpp"
#include "readout.hpp"

namespace maskattn {
namespace {

template <class Value>
MASKATTN_INLINE Value* place_of(const Strided<Value>& x, std::int64_t sequence, std::int64_t head, std::int64_t row) {
    return x.data + sequence * x.sequence + head * x.head + row * x.row;
}

template <class Element>
MASKATTN_INLINE const Element* place_of(const Strided<const void>& x, std::int64_t sequence, std::int64_t head,
                                        std::int64_t row) {
    return static_cast<const Element*>(x.data) + sequence * x.sequence + head * x.head + row * x.row;
}

template <class Element>
MASKATTN_INLINE Element* place_of(const Strided<void>& x, std::int64_t sequence, std::int64_t head, std::int64_t row) {
    return static_cast<Element*>(x.data) + sequence * x.sequence + head * x.head + row * x.row;
}

// The next vector of a row, of which `left` elements are to come: a multiple of 8, as head widths are.
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

// Rows of floats, `stride` apart, zeros up to whole vectors.
struct FloatRows {
    const float* data;
    std::ptrdiff_t stride;
};

// Keys [first, first + count) of a head where they lie, or converted to `buffer`.
template <class Element>
MASKATTN_INLINE FloatRows float_rows(const Strided<const void>& x, int head, std::int64_t first, int count,
                                     int head_width, float* buffer) {
    const Element* rows = place_of<Element>(x, 0, head, first);
    if constexpr (sizeof(Element) == sizeof(float))
        if (head_width % lanes == 0) return {rows, x.row};
    const int width = padded(head_width);
    for (int n = 0; n < count; ++n) convert_row(rows + n * x.row, head_width, 1.0f, buffer + n * width);
    return {buffer, width};
}

// The sequence's rows [H][R][D] as floats times a factor.
template <class Element>
void convert_queries(const Readout& a, const Strided<const void>& x, std::int32_t sequence, float factor, float* to_HRD) {
    const int width = padded(a.head_width);
    for (int h = 0; h < a.heads; ++h)
        for (int r = 0; r < a.queries; ++r, to_HRD += width)
            convert_row(place_of<Element>(x, sequence, h, r), a.head_width, factor, to_HRD);
}

// Lane i of the result: the sum of vector i.
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

// products_RN [R][tile_keys]: each query with each key. What lies past `count` is of the last key.
__attribute__((noinline)) inline void multiply_with_keys(const float* queries_RD, int queries, int width,
                                                         FloatRows keys, int count, float* products_RN) {
    for (int n = 0; n < count; n += lanes) {
        const float* rows[lanes];
        for (int i = 0; i < lanes; ++i) rows[i] = keys.data + (n + i < count ? n + i : count - 1) * keys.stride;
        for (int r = 0; r < queries; ++r) {
            const float* query_D = queries_RD + r * width;
            Floats total[lanes] = {};
            for (int d = 0; d < width; d += lanes) {
                const Floats query = load<Floats>(query_D + d);
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) total[i] += query * load<Floats>(rows[i] + d);
            }
            store(products_RN + r * tile_keys + n, sums_of(total));
        }
    }
}

template <Start start, int now>
MASKATTN_INLINE void add_weighted_keys(const std::uint32_t* weights_RN, int queries, FloatRows keys, int count,
                                       float* sums_RD, int width, const float* factor_R, int& r) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(keys.data);
    for (; queries - r >= now; r += now)
        multiply<SinglePrecision, now, start>({weights_RN + r * tile_keys, tile_keys, 1}, words, keys.stride, count,
                                              sums_RD + r * width, width, width / lanes,
                                              factor_R ? factor_R + r : nullptr);
}

// sums_RD [R][D]: each query's weights [R][tile_keys] times the keys, on top of itself times factor_R or of itself.
template <Start start>
void add_weighted_keys(const std::uint32_t* weights_RN, int queries, FloatRows keys, int count, float* sums_RD,
                       int width, const float* factor_R = nullptr) {
    int r = 0;
    add_weighted_keys<start, 6>(weights_RN, queries, keys, count, sums_RD, width, factor_R, r);
    add_weighted_keys<start, 4>(weights_RN, queries, keys, count, sums_RD, width, factor_R, r);
    add_weighted_keys<start, 2>(weights_RN, queries, keys, count, sums_RD, width, factor_R, r);
    add_weighted_keys<start, 1>(weights_RN, queries, keys, count, sums_RD, width, factor_R, r);
}

// What is added to the products of a tile of keys with the queries, whose scale is in the queries already.
struct TileTerms {
    int count;
    alignas(64) float bias_N[tile_keys];  // -inf past the end
    alignas(64) float distance_RN[most_queries * tile_keys];

    TileTerms(const Readout& a, const KeyRun& run, std::int64_t done) : count(at_most(tile_keys, run.count - done)) {
        for (int n = 0; n < tile_keys; ++n) bias_N[n] = n < count ? 0.0f : -infinity;
        if (!a.slopes.data) return;
        alignas(64) float x_N[tile_keys] = {}, y_N[tile_keys] = {};
        for (int n = 0; n < count; ++n) {
            const float* place = place_of(a.coords_k, 0, 0, run.first + done + n);
            x_N[n] = place[0];
            y_N[n] = place[1];
        }
        for (int r = 0; r < a.queries; ++r) {
            const float* place = place_of(a.coords_q, run.sequence, 0, r);
            for (int n = 0; n < tile_keys; n += lanes)
                store(distance_RN + r * tile_keys + n, distances(place[0], place[1], x_N + n, y_N + n));
        }
    }

    void take_bias(const Readout& a, int head, std::int64_t first) {
        if (!a.key_bias.data || (head > 0 && a.key_bias.head == 0)) return;
        for (int n = 0; n < count; ++n) bias_N[n] = *place_of(a.key_bias, 0, head, first + n);
    }

    MASKATTN_INLINE Floats score(const Readout& a, int head, int r, int n, Floats product) const {
        product += load<Floats>(bias_N + n);
        if (a.slopes.data)
            product -= load<Floats>(distance_RN + r * tile_keys + n) * *place_of(a.slopes, 0, head, 0);
        return product;
    }
};

// The cache lines of a run's rows of one tensor, asked for in the order of memory while the tile before them is at work:
// they are read head after head, which processors foresee for long pieces only, of float32 (measured).
class Prefetch {
  public:
    Prefetch(const Strided<const void>& x, const Readout& a)
        : data_(static_cast<const char*>(x.data)), item_(a.bfloat16 ? 2 : 4), head_(x.head * item_),
          row_(x.row * item_), heads_(a.heads), bytes_(a.head_width * item_) {}

    // The share of `part` in `of` of rows [first, first + count).
    MASKATTN_INLINE void ask(std::int64_t first, int count, int part, int of) const {
        if (item_ == sizeof(float)) return;
        for (int n = count * part / of, end = count * (part + 1) / of; n < end; ++n) {
            const char* row = data_ + (first + n) * row_;
            for (int h = 0; h < heads_; ++h)
                for (std::ptrdiff_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(row + h * head_ + byte);
        }
    }

  private:
    const char* data_;
    std::ptrdiff_t item_, head_, row_;
    int heads_;
    std::ptrdiff_t bytes_;
};

// Keys of the tile after the one that begins at `done`.
MASKATTN_INLINE int keys_of_next_tile(const KeyRun& run, std::int64_t done) {
    const std::int64_t left = run.count - done - tile_keys;
    return left > 0 ? at_most(tile_keys, left) : 0;
}

}  // namespace
}  // namespace maskattn
