// The area-weighted tissue fraction of each token, given a tissue mask. Plain C++ without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskattn {

// A tissue mask: rows x cols bytes, row-major; bytes other than 0 are tissue.
struct Mask {
    const std::uint8_t* bytes;
    std::ptrdiff_t rows;
    std::ptrdiff_t cols;
};

// One axis of a lattice of tokens, in mask pixels: token i covers [origin + i * size, origin + (i + 1) * size).
struct Axis {
    double origin;
    double size;
    std::ptrdiff_t count;
};

// Writes to fraction_RC (y.count x x.count, row-major) the fraction of each token's area that is tissue. The area
// outside the mask is not tissue. `threads` <= 0 means one thread per core; the result does not depend on the number of
// threads. Throws std::bad_alloc.
void token_coverage(const Mask& mask, const Axis& y, const Axis& x, int threads, float* fraction_RC);

}  // namespace maskattn
