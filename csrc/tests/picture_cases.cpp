// Maps laid over pictures, against a plain loop.
#include <cstdio>
#include <vector>

#include "pictures/overlay.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes some_bytes(Random& random, std::size_t count) {
    Bytes bytes(count);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>((random.uniform() + 1.0) / 2.0 * 256);
    return bytes;
}

bool is_laid_over() {
    constexpr std::size_t height = 37, width = 53, tokens = 9, colours = 5, row_bytes = 3 * width + 7;
    Random random(1);
    const Bytes picture = some_bytes(random, height * width * 3), grey = some_bytes(random, height * width);
    const Bytes mixtures = some_bytes(random, colours * 256 * 3);
    std::vector<std::int32_t> token(height * width), colour(tokens);
    for (std::size_t i = 0; i < token.size(); ++i) token[i] = static_cast<std::int32_t>(i / 5 % tokens);
    for (std::size_t i = 0; i < tokens; ++i) colour[i] = static_cast<std::int32_t>(i % (colours + 1)) - 1;
    Bytes result(height * row_bytes - 7, 0xee), expected = result;  // ends with the last row
    for (std::size_t i = 0; i < token.size(); ++i)
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const std::int32_t of_token = colour[static_cast<std::size_t>(token[i])];
            const std::size_t mixture = (static_cast<std::size_t>(of_token < 0 ? 0 : of_token) * 256 + grey[i]) * 3;
            expected[i / width * row_bytes + i % width * 3 + channel] =
                of_token < 0 ? picture[3 * i + channel] : mixtures[mixture + channel];
        }
    maskattn::Overlay overlay{picture.data(),  grey.data(), token.data(),  colour.data(), tokens, mixtures.data(),
                              colours,         result.data(), row_bytes, height,        width};
    bool right = maskattn::lay_over(overlay) && result == expected;
    token.back() = tokens;
    right = !maskattn::lay_over(overlay) && right;
    token.back() = -1;
    right = !maskattn::lay_over(overlay) && right;
    token.back() = 1;
    colour[1] = colours;
    right = !maskattn::lay_over(overlay) && right;
    if (!right) std::printf("a map is laid over a picture wrongly\n");
    return right;
}

}  // namespace

bool pictures_are_right() { return is_laid_over(); }

}  // namespace maskattn_tests
