// Rows by index, and where the kept tokens of a mask lie: what packing is made of. Plain C++: no Python, no pybind11.
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
    bool result_is_zero;  // already, so that zeros need not be written
};

// Returns the first row of the result whose index is neither -1 nor a row of the source, result_rows if there is none.
// Such a row is left as it is. The result does not depend on the number of threads, `threads` of which at most run.
std::ptrdiff_t move_rows(const RowMove& move, const std::int32_t* index, int threads);
std::ptrdiff_t move_rows(const RowMove& move, const std::int64_t* index, int threads);

// Writes to lengths_B how many of each sequence's tokens are kept, keep_BN being batch x tokens bytes without gaps, any
// but 0 a kept one, and returns their sum.
std::ptrdiff_t count_kept(const std::uint8_t* keep_BN, std::ptrdiff_t batch, std::ptrdiff_t tokens, std::int64_t* lengths_B);

// The position of each kept token among all of a mask, ascending, and its inverse: which of those rows each token is, -1
// if it is not kept. `kept` is their number.
void list_kept(const std::uint8_t* keep, std::ptrdiff_t tokens, std::ptrdiff_t kept, std::int64_t* indices_T,
               std::int32_t* row_of_token);

}  // namespace maskattn
