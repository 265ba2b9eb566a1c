// Tensors of rows in the user's memory. All functions have internal linkage, as in simd/vectors.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/inline.hpp"

namespace maskattn {

// A tensor's data and its strides over sequences, heads and rows, in elements. Packed tensors have stride 0 over
// sequences.
template <class Value>
struct Strided {
    Value* data;
    std::ptrdiff_t sequence;
    std::ptrdiff_t head;
    std::ptrdiff_t row;
};

// The rows of the tokens that take part: index[0 .. count), or start to start + count without an index.
struct Tokens {
    std::int64_t start;
    std::int64_t count;
    const std::int32_t* index;
};

// One head of one sequence.
struct Head {
    std::int32_t sequence;
    std::int32_t index;
    Tokens queries;
    Tokens keys;
};

namespace {

MASKATTN_INLINE std::int64_t row_at(const Tokens& tokens, std::int64_t i) {
    return tokens.index ? tokens.index[i] : tokens.start + i;
}

template <class Value>
MASKATTN_INLINE std::ptrdiff_t offset_of(const Strided<Value>& x, std::int64_t sequence, std::int64_t head,
                                         std::int64_t row) {
    return sequence * x.sequence + head * x.head + row * x.row;
}

template <class Value>
MASKATTN_INLINE Value* row_of(const Strided<Value>& x, std::int64_t sequence, std::int64_t head, std::int64_t row) {
    return x.data + offset_of(x, sequence, head, row);
}
template <class Element>
MASKATTN_INLINE const Element* row_of(const Strided<const void>& x, std::int64_t sequence, std::int64_t head,
                                      std::int64_t row) {
    return static_cast<const Element*>(x.data) + offset_of(x, sequence, head, row);
}
template <class Element>
MASKATTN_INLINE Element* row_of(const Strided<void>& x, std::int64_t sequence, std::int64_t head, std::int64_t row) {
    return static_cast<Element*>(x.data) + offset_of(x, sequence, head, row);
}

template <class Value>
MASKATTN_INLINE Value* row_of(const Strided<Value>& x, const Head& head, std::int64_t row) {
    return row_of(x, head.sequence, head.index, row);
}
template <class Element>
MASKATTN_INLINE const Element* row_of(const Strided<const void>& x, const Head& head, std::int64_t row) {
    return row_of<Element>(x, head.sequence, head.index, row);
}
template <class Element>
MASKATTN_INLINE Element* row_of(const Strided<void>& x, const Head& head, std::int64_t row) {
    return row_of<Element>(x, head.sequence, head.index, row);
}

}  // namespace
}  // namespace maskattn
