// Huffman's codes in the form that deflate takes: no longer than 15 bits, and given by their lengths alone.
#pragma once

#include <array>
#include <cstdint>

namespace maskattn {

constexpr int most_symbols = 288;
constexpr int most_code_bits = 15;

struct PrefixCodes {
    std::array<std::uint16_t, most_symbols> bits;  // of each symbol's code, the first one lowest
    std::array<std::uint8_t, most_symbols> lengths;  // 0 for symbols that do not occur
};

// Returns the codes of the first `symbols` symbols, of which at least two must occur. The counts are halved as long as a
// code would be too long.
PrefixCodes prefix_codes(std::array<std::uint32_t, most_symbols> counts, int symbols);

}  // namespace maskattn
