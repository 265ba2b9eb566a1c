// Token relevance of a run of keys for all classes: u of a tile, for one head and query at a time, times the gradients.
//
// Dimension key: H heads, R queries of a sequence, N keys of a tile, D head width (padded to whole vectors), C classes
// (padded in the same way). The gradients of a head and query are packed in panels of the register tile's width, each by
// steps [D][C of panel].
#pragma once

#include "readout/tiles.hpp"
#include "readout/relevance.hpp"

namespace maskattn {
namespace {

constexpr int panel_classes = tile_vectors * lanes;

MASKATTN_INLINE std::int64_t padded_classes(const Relevance& a) { return ceil_divide(a.classes, lanes) * lanes; }

MASKATTN_INLINE int classes_of_panel(const Relevance& a, std::int64_t first) {
    return at_most(panel_classes, padded_classes(a) - first);
}

inline std::size_t query_gradient_words(const Relevance& a) {
    return static_cast<std::size_t>(a.head_width) * static_cast<std::size_t>(padded_classes(a));
}

inline std::size_t gradient_words(const Relevance& a) {
    return whole_lines(query_gradient_words(a) * static_cast<std::size_t>(a.queries));
}

inline std::size_t all_query_words(const Relevance& a) {
    return whole_lines(static_cast<std::size_t>(a.heads) * static_cast<std::size_t>(a.queries) *
                       static_cast<std::size_t>(padded(a.head_width)));
}

// Returns the words of the scratch: queries and outputs, the products of the queries with a shared key origin, four
// tiles, the products of a tile with the queries, and the sums of the classes.
inline std::size_t relevance_scratch_words(const Relevance& a) {
    const auto tile = static_cast<std::size_t>(tile_keys), rows = static_cast<std::size_t>(a.heads * a.queries);
    return 2 * all_query_words(a) + whole_lines(rows) + 4 * tile * static_cast<std::size_t>(padded(a.head_width)) +
           tile * (rows + static_cast<std::size_t>(padded_classes(a)));
}

template <class Element>
void pack_gradients(const Relevance& a, std::int32_t sequence, int head, std::uint32_t* to) {
    for (int r = 0; r < a.queries; ++r)
        for (std::int64_t panel = 0; panel < padded_classes(a); panel += panel_classes) {
            const int width = classes_of_panel(a, panel);
            for (int c = 0; c < width; c += lanes)
                for (int d = 0; d < a.head_width; d += lanes) {
                    Words square[lanes];
                    for (int i = 0; i < lanes; ++i) {
                        const std::int64_t which = panel + c + i;
                        const Element* row =
                            row_of<Element>(a.grad_out, sequence, head, r) + which * a.grad_out_class + d;
                        square[i] = which < a.classes ? Words(load_next<Element>(row, a.head_width - d)) : Words{};
                    }
                    transpose(square);
                    const int filled = at_most(lanes, a.head_width - d);
                    for (int i = 0; i < filled; ++i) store(to + (d + i) * width + c, square[i]);
                }
            to += a.head_width * width;
        }
}

// s k0.q for the tile's keys, or one number if all keys share an origin.
struct OriginProducts {
    const float* products_RN;
    std::ptrdiff_t row;
    bool shared;

    MASKATTN_INLINE Floats at(int r, int n) const {
        return shared ? broadcast(products_RN[r * row]) : load<Floats>(products_RN + r * row + n);
    }
};

// Computes u of a tile for one query; rows past the count, up to a full register tile, are 0.
template <class Element>
__attribute__((noinline)) void weigh_values(const float* p_N, const float* z_N, HeadRows<Element> v,
                                            HeadRows<float> origin, const float* out_D, int count, std::uint32_t* u_ND,
                                            ComingLines& coming) {
    const int width = padded(v.head_width), end = static_cast<int>(ceil_divide(count, tile_rows)) * tile_rows;
    for (int n = 0; n < count; ++n) {
        const Element* value = v.data + n * v.stride;
        const float* from = origin.data + n * origin.stride;
        for (int d = 0; d < width; d += lanes) {
            if (d % (64 / static_cast<int>(sizeof(Element))) == 0) coming.ask<1>();
            const Floats x = load_next(value + d, v.head_width - d);
            const Floats moved = x - load<Floats>(from + d), centred = x - load<Floats>(out_D + d);
            store(u_ND + n * width + d, (moved + centred * z_N[n]) * p_N[n]);
        }
    }
    for (int n = count; n < end; ++n)
        for (int d = 0; d < width; d += lanes) store(u_ND + n * width + d, Floats{});
}

// sums [panel][tile_keys][C of panel] (+)= u [tile_keys][D] times the panels of one head and query.
template <Start start>
void add_to_classes(const Relevance& a, const std::uint32_t* u_ND, int count, const std::uint32_t* gradients,
                    float* sums) {
    const int width = padded(a.head_width);
    for (std::int64_t panel = 0; panel < padded_classes(a); panel += panel_classes) {
        const int classes = classes_of_panel(a, panel);
        for (int n = 0; n < count; n += tile_rows)
            multiply<SinglePrecision, tile_rows, start>({u_ND + n * width, width, 1}, gradients, classes, a.head_width,
                                                        sums + n * classes, classes, classes / lanes);
        gradients += a.head_width * classes;
        sums += tile_keys * classes;
    }
}

inline void write_classes(const Relevance& a, const float* sums, std::int64_t first, int count) {
    for (std::int64_t panel = 0; panel < padded_classes(a); panel += panel_classes) {
        const int classes = classes_of_panel(a, panel);
        for (int c = 0; c < classes; c += lanes)
            for (int n = 0; n < count; n += lanes) {
                Words square[lanes];
                for (int i = 0; i < lanes; ++i)
                    square[i] = n + i < count ? load<Words>(sums + (n + i) * classes + c) : Words{};
                transpose(square);
                const int real = at_most(lanes, a.classes - panel - c);
                const auto bytes = static_cast<std::size_t>(at_most(lanes, count - n)) * sizeof(float);
                for (int i = 0; i < real; ++i)
                    __builtin_memcpy(a.relevance + (panel + c + i) * a.relevance_class + first + n, &square[i], bytes);
            }
        sums += tile_keys * classes;
    }
}

template <class Element>
class RelevanceRun {
  public:
    RelevanceRun(const Relevance& a, const KeyRun& run, std::uint32_t* scratch)
        : a_(a), run_(run), width_(padded(a.head_width)), coming_k_(a.k, a), coming_v_(a.v, a), nothing_(a.k, a) {
        const auto tile_words = static_cast<std::size_t>(tile_keys * width_);
        const auto rows = static_cast<std::size_t>(a.heads * a.queries);
        queries_HRD_ = reinterpret_cast<float*>(scratch);
        outs_HRD_ = queries_HRD_ + all_query_words(a);
        origin_products_HR_ = outs_HRD_ + all_query_words(a);
        buffer_ND_ = origin_products_HR_ + whole_lines(rows);
        k_origin_ND_ = buffer_ND_ + tile_words;
        v_origin_ND_ = k_origin_ND_ + tile_words;
        u_ND_ = reinterpret_cast<std::uint32_t*>(v_origin_ND_ + tile_words);
        products_HRN_ = v_origin_ND_ + 2 * tile_words;
        sums_ = products_HRN_ + tile_keys * rows;
        convert_queries<Element>(a, a.q, run.sequence, a.scale, queries_HRD_);
        const Strided<const void> out{a.out.data, a.out.sequence, a.out.head, a.out.row};
        convert_queries<Element>(a, out, run.sequence, 1.0f, outs_HRD_);
        if (shares_key_origin()) multiply_queries_with_origin();
        __builtin_memset(v_origin_ND_, 0, tile_words * sizeof(float));
    }

    void take_tile(std::int64_t done, const std::uint32_t* gradients) {
        TileTerms terms(a_, run_, done);
        const std::int64_t first = run_.first + done;
        const int R = a_.queries;
        multiply_tile_with_keys<Element>(a_, a_.k, run_, done, queries_HRD_, buffer_ND_, products_HRN_, coming_k_);
        coming_v_.expect(run_, first + tile_keys, tile_keys);
        alignas(64) float p_RN[most_queries * tile_keys];
        for (int h = 0; h < a_.heads; ++h) {
            float* z_RN = products_HRN_ + h * R * tile_keys;
            terms.take_bias(a_, h, first);
            take_scores(terms, h, first, p_RN, z_RN);
            const HeadRows<Element> v = rows_of_head<Element>(a_.v, h, first, a_.head_width);
            const HeadRows<float> origin = value_origins(h, first, terms.count);
            for (int r = 0; r < R; ++r) {
                weigh_values(p_RN + r * tile_keys, z_RN + r * tile_keys, v, origin, outs_HRD_ + (h * R + r) * width_,
                             terms.count, u_ND_, r == 0 ? coming_v_ : nothing_);
                const std::uint32_t* panels = gradients + static_cast<std::size_t>(h) * gradient_words(a_) +
                                              static_cast<std::size_t>(r) * query_gradient_words(a_);
                if (h == 0 && r == 0)
                    add_to_classes<Start::zero>(a_, u_ND_, terms.count, panels, sums_);
                else
                    add_to_classes<Start::add>(a_, u_ND_, terms.count, panels, sums_);
            }
        }
        write_classes(a_, sums_, first, terms.count);
    }

  private:
    bool shares_key_origin() const { return a_.key_origin.data && a_.key_origin.row == 0; }

    void multiply_queries_with_origin() {
        for (int h = 0; h < a_.heads; ++h) {
            const int at = h * a_.queries;
            alignas(64) float products_RN[most_queries * tile_keys];
            multiply_with_keys(queries_HRD_ + at * width_, a_.queries, width_,
                               rows_of_head<Element>(a_.key_origin, h, 0, a_.head_width), 1, k_origin_ND_, products_RN,
                               nothing_);
            for (int r = 0; r < a_.queries; ++r) origin_products_HR_[at + r] = products_RN[r * tile_keys];
        }
    }

    // Computes p and z from the products of the queries with the keys.
    void take_scores(const TileTerms& terms, int h, std::int64_t first, float* p_RN, float* z_RN) {
        const int R = a_.queries;
        alignas(64) float products_RN[most_queries * tile_keys] = {};
        OriginProducts origin{products_RN, tile_keys, false};
        if (shares_key_origin()) {
            origin = {origin_products_HR_ + h * R, 1, true};
        } else if (a_.key_origin.data) {
            multiply_with_keys(queries_HRD_ + h * R * width_, R, width_,
                               rows_of_head<Element>(a_.key_origin, h, first, a_.head_width), terms.count, k_origin_ND_,
                               products_RN, nothing_);
        }
        for (int r = 0; r < R; ++r) {
            const float lse = lse_to_subtract(*row_of(a_.lse, run_.sequence, h, r));
            for (int n = 0; n < terms.count; n += lanes) {
                const int at = r * tile_keys + n;
                const Floats product = load<Floats>(z_RN + at);
                const Score score = terms.score(a_, h, r, n, product);
                store(p_RN + at, probability(score.value, lse, 0.0f));
                store(z_RN + at, along_product(score, product - origin.at(r, n)));
            }
        }
    }

    // Returns the value origins; the buffer is zero if there are none.
    HeadRows<float> value_origins(int h, std::int64_t first, int count) const {
        if (!a_.value_origin.data) return {v_origin_ND_, 0, width_};
        const bool shared = a_.value_origin.row == 0;
        HeadRows<float> rows =
            float_rows(rows_of_head<Element>(a_.value_origin, h, shared ? 0 : first, a_.head_width), shared ? 1 : count,
                       v_origin_ND_);
        if (shared) rows.stride = 0;
        return rows;
    }

    const Relevance& a_;
    const KeyRun& run_;
    const int width_;
    ComingLines coming_k_, coming_v_, nothing_;
    float *queries_HRD_, *outs_HRD_, *origin_products_HR_, *buffer_ND_, *k_origin_ND_, *v_origin_ND_, *products_HRN_,
        *sums_;
    std::uint32_t* u_ND_;
};

template <class Element>
void take_relevance_run(const Relevance& a, const KeyRun& run, const std::uint32_t* gradients, std::uint32_t* scratch) {
    RelevanceRun<Element> of_run(a, run, scratch);
    for (std::int64_t done = 0; done < run.count; done += tile_keys) of_run.take_tile(done, gradients);
}

template <class Element>
constexpr RelevanceKernels relevance_kernels = {
    &gradient_words,
    &relevance_scratch_words,
    &pack_gradients<Element>,
    &take_relevance_run<Element>,
};

}  // namespace
}  // namespace maskattn
