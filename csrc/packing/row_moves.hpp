// The operations of packing: rows moved by index, and the positions of a mask's kept tokens. Plain C++ without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskattn {

// Row i of the result is row index[i] of the source, or zeros where the index is -1. Strides are in bytes; no two rows
// of the result overlap.
struct RowMove {
    const unsigned char* source;
    std::ptrdiff_t source_rows;
    std::ptrdiff_t source_stride;
    unsigned char* result;
    std::ptrdiff_t result_rows;
    std::ptrdiff_t result_stride;
    std::ptrdiff_t row_bytes;
};

// Moves the rows with at most `threads` threads, whose number does not affect the result. Returns the first row of the
// result whose index is neither -1 nor a row of the source, or result_rows if there is none. Such rows are not written.
std::ptrdiff_t move_rows(const RowMove& move, const std::int32_t* index, int threads);
std::ptrdiff_t move_rows(const RowMove& move, const std::int64_t* index, int threads);

// Writes the number of kept tokens of each sequence to lengths_B, and returns their sum. keep_BN has batch x tokens
// bytes without gaps; bytes other than 0 are kept.
std::ptrdiff_t count_kept(const std::uint8_t* keep_BN, std::ptrdiff_t batch, std::ptrdiff_t tokens, std::int64_t* lengths_B);

// Writes the positions of the `kept` kept tokens of a mask in ascending order to indices_T, and the inverse to
// row_of_token: the row of each token among the kept ones, or -1.
void list_kept(const std::uint8_t* keep, std::ptrdiff_t tokens, std::ptrdiff_t kept, std::int64_t* indices_T,
               std::int32_t* row_of_token);

}  // namespace maskattn
