#include "pictures/overlay.hpp"

#include <algorithm>

namespace maskattn {

bool lay_over(const Overlay& overlay) {
    for (std::ptrdiff_t y = 0; y < overlay.height; ++y) {
        const std::int32_t* token_X = overlay.token_YX + y * overlay.width;
        const std::uint8_t* grey_X = overlay.grey_YX + y * overlay.width;
        const std::uint8_t* picture_X3 = overlay.picture_YX3 + y * overlay.width * 3;
        std::uint8_t* result_X3 = overlay.result_YX3 + y * overlay.result_row_bytes;
        for (std::ptrdiff_t x = 0; x < overlay.width;) {
            const std::int32_t token = token_X[x];
            std::ptrdiff_t end = x + 1;
            while (end < overlay.width && token_X[end] == token) ++end;
            if (token < 0 || token >= overlay.tokens) return false;
            const std::int32_t colour = overlay.colour_V[token];
            if (colour >= overlay.colours) return false;
            if (colour < 0) {
                std::copy(picture_X3 + 3 * x, picture_X3 + 3 * end, result_X3 + 3 * x);
                x = end;
                continue;
            }
            const std::uint8_t* mixtures = overlay.mixtures_C256x3 + static_cast<std::ptrdiff_t>(colour) * 256 * 3;
            for (; x < end; ++x) {
                const std::uint8_t* mixture = mixtures + 3 * grey_X[x];
                result_X3[3 * x] = mixture[0];
                result_X3[3 * x + 1] = mixture[1];
                result_X3[3 * x + 2] = mixture[2];
            }
        }
    }
    return true;
}

}  // namespace maskattn
