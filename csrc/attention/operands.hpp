// Conversion of rows of the user's tensors to the layouts of products.hpp, and back.
//
// Dimension key: W words of 32 bits, D head width.
#pragma once

#include "attention/attention.hpp"
#include "simd/products.hpp"

namespace maskattn {
namespace {

using Bfloat16 = std::uint16_t;

constexpr int prefetched_rows = 12;  // of 64 channels: 48 lines

constexpr std::size_t whole_lines(std::size_t words) { return (words + 15) / 16 * 16; }

MASKATTN_INLINE int at_most(int most, std::int64_t x) { return x < most ? static_cast<int>(x) : most; }

// Loads `count` elements as floats, with zeros after them.
MASKATTN_INLINE Floats load_floats(const float* from, int count) {
    return count >= lanes ? load<Floats>(from) : load_first<Floats>(from, count);
}
MASKATTN_INLINE Floats load_floats(const Bfloat16* from, int count) {
    return from_bfloat16(count >= lanes ? load<Halves>(from) : load_first<Halves>(from, count));
}

// Loads words `first` to `first + lanes` of a row in which `depth` neighbours along D share a word.
template <class Arithmetic, class Element>
MASKATTN_INLINE Words load_words(const Element* row, int first, int words) {
    if constexpr (Arithmetic::depth == 1) return Words(load_floats(row + first, words - first));
    const Element* from = row + first * Arithmetic::depth;
    return words - first >= lanes ? load<Words>(from) : load_first<Words>(from, words - first);
}

// Prefetches rows [first, last) while earlier rows are packed: a head's rows are far apart, which hardware prefetchers
// do not handle.
template <class Element>
MASKATTN_INLINE void prefetch_rows(const Element* const* rows, int first, int last, int head_width) {
    constexpr int line = 64 / sizeof(Element);
    for (int r = first; r < last; ++r)
        if (rows[r])
            for (int d = 0; d < head_width; d += line) __builtin_prefetch(rows[r] + d);
}

// Packs the words of each row, with rows `stride` words apart; nullptr stands for a row of zeros.
template <class Arithmetic, class Element>
void pack_rows(const Element* const* rows, int count, int head_width, std::uint32_t* to, int stride) {
    const int words = head_width / Arithmetic::depth;
    for (int r = 0; r < count; ++r) {
        if (r + prefetched_rows < count) prefetch_rows(rows, r + prefetched_rows, r + prefetched_rows + 1, head_width);
        for (int w = 0; w < words; w += lanes)
            store(to + r * stride + w, rows[r] ? load_words<Arithmetic>(rows[r], w, words) : Words{});
    }
}

// Returns the number of words, the steps of a product, that hold a row's values.
template <class Arithmetic>
constexpr int steps_of(int values) {
    return (values / Arithmetic::depth + Arithmetic::whole_steps - 1) / Arithmetic::whole_steps * Arithmetic::whole_steps;
}

// Packs word t of each of `count` rows, a multiple of the lanes, as step t; steps are `stride` words apart.
template <class Arithmetic, class Element>
void pack_columns(const Element* const* rows, int count, int head_width, std::uint32_t* to, int stride = block_keys) {
    const int words = head_width / Arithmetic::depth, steps = steps_of<Arithmetic>(head_width);
    for (int r = 0; r < count; r += lanes) {
        prefetch_rows(rows, r + lanes, r + 2 * lanes <= count ? r + 2 * lanes : count, head_width);
        for (int w = 0; w < steps; w += lanes) {
            Words square[lanes];
            for (int i = 0; i < lanes; ++i)
                square[i] = rows[r + i] ? load_words<Arithmetic>(rows[r + i], w, words) : Words{};
            transpose(square);
            const int filled = at_most(lanes, steps - w);
            for (int i = 0; i < filled; ++i) store(to + (w + i) * stride + r, square[i]);
        }
    }
}

// Returns channels d to d + lanes of two rows in shared words, with zeros after the first `count`.
template <class Element>
MASKATTN_INLINE Words word_of_pair(const Element* const* rows, int d, int count) {
    const Words low = rows[0] ? Words(load_floats(rows[0] + d, count)) : Words{};
    const Words high = rows[1] ? Words(load_floats(rows[1] + d, count)) : Words{};
    return (low >> 16) | high;
}

// Packs the elements of row t, or of rows 2t and 2t + 1 in shared words, as step t; count is even in the latter case.
template <class Arithmetic, class Element>
void pack_steps(const Element* const* rows, int count, int head_width, std::uint32_t* to) {
    const int stride = padded(head_width);
    if constexpr (Arithmetic::depth == 1) {
        pack_rows<Arithmetic>(rows, count, head_width, to, stride);
    } else {
        for (int r = 0; r < count; r += 2) {
            const int ahead = r + prefetched_rows;
            if (ahead < count) prefetch_rows(rows, ahead, ahead + 2, head_width);
            for (int d = 0; d < head_width; d += lanes)
                store(to + r / 2 * stride + d, word_of_pair(rows + r, d, head_width - d));
        }
    }
}

// Packs the words of rows 2t and 2t + 1 as word t of each channel, with channels `stride` words apart; count is even.
template <class Arithmetic, class Element>
void pack_channels(const Element* const* rows, int count, int head_width, std::uint32_t* to, int stride) {
    static_assert(Arithmetic::depth == 2, "a word has two rows");
    for (int r = 0; r < count; r += 2 * lanes) {
        prefetch_rows(rows, r + 2 * lanes, r + 4 * lanes <= count ? r + 4 * lanes : count, head_width);
        for (int d = 0; d < head_width; d += lanes) {
            Words square[lanes];
            for (int i = 0; i < lanes; ++i)
                square[i] = r + 2 * i < count ? word_of_pair(rows + r + 2 * i, d, head_width - d) : Words{};
            transpose(square);
            for (int i = 0; i < lanes; ++i) store(to + (d + i) * stride + r / 2, square[i]);
        }
    }
}

// Writes a row of floats times `factor`, rounded to the element type.
MASKATTN_INLINE void write_row(const float* from, float factor, int head_width, float* to) {
    int d = 0;
    for (; d + lanes <= head_width; d += lanes) store(to + d, load<Floats>(from + d) * factor);
    for (; d < head_width; ++d) to[d] = from[d] * factor;
}
MASKATTN_INLINE void write_row(const float* from, float factor, int head_width, Bfloat16* to) {
    int d = 0;
    for (; d + lanes <= head_width; d += lanes) store(to + d, to_bfloat16(load<Floats>(from + d) * factor));
    if (d == head_width) return;
    const Halves rest = to_bfloat16(load<Floats>(from + d) * factor);
    __builtin_memcpy(to + d, &rest, static_cast<std::size_t>(head_width - d) * sizeof rest[0]);
}

}  // namespace
}  // namespace maskattn
