// A map of tokens laid over a picture. Plain C++ without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskattn {

// Rows of all planes have no gaps, but those of the result.
struct Overlay {
    const std::uint8_t* picture_YX3;
    const std::uint8_t* grey_YX;
    const std::int32_t* token_YX;  // an index into colour_V
    const std::int32_t* colour_V;  // a row of mixtures, or -1 where the picture itself is seen
    std::ptrdiff_t tokens;
    const std::uint8_t* mixtures_C256x3;  // a colour mixed with each grey
    std::ptrdiff_t colours;
    std::uint8_t* result_YX3;
    std::ptrdiff_t result_row_bytes;
    std::ptrdiff_t height;
    std::ptrdiff_t width;
};

// Writes the result; returns whether all indices were in range. Pixels from the first that was not are not written.
bool lay_over(const Overlay& overlay);

}  // namespace maskattn
