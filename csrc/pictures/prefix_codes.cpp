#include "pictures/prefix_codes.hpp"

#include <algorithm>

namespace maskattn {
namespace {

using Counts = std::array<std::uint32_t, most_symbols>;
using Lengths = std::array<std::uint8_t, most_symbols>;

// Writes the depth of each symbol in Huffman's tree, and returns the greatest.
int depths_in_tree(const Counts& counts, int symbols, Lengths& depths) {
    std::array<int, most_symbols> leaves;
    int leaf_count = 0;
    for (int symbol = 0; symbol < symbols; ++symbol)
        if (counts[symbol] > 0) leaves[leaf_count++] = symbol;
    std::sort(leaves.begin(), leaves.begin() + leaf_count, [&](int one, int other) {
        return counts[one] != counts[other] ? counts[one] < counts[other] : one < other;
    });
    // Nodes are leaves and then pairs; both lists ascend in weight, so that the lightest is first in one of them.
    std::array<std::uint32_t, 2 * most_symbols> weights;
    std::array<int, 2 * most_symbols> parents;
    for (int leaf = 0; leaf < leaf_count; ++leaf) weights[leaf] = counts[leaves[leaf]];
    int next_leaf = 0, next_pair = leaf_count, nodes = leaf_count;
    const auto lightest = [&] {
        const bool is_leaf = next_leaf < leaf_count && (next_pair == nodes || weights[next_leaf] <= weights[next_pair]);
        return is_leaf ? next_leaf++ : next_pair++;
    };
    while (nodes < 2 * leaf_count - 1) {
        const int one = lightest(), other = lightest();
        weights[nodes] = weights[one] + weights[other];
        parents[one] = parents[other] = nodes++;
    }
    std::array<int, 2 * most_symbols> depth_of_node;
    int deepest = depth_of_node[nodes - 1] = 0;
    for (int node = nodes - 2; node >= 0; --node) {
        depth_of_node[node] = depth_of_node[parents[node]] + 1;
        deepest = std::max(deepest, depth_of_node[node]);
    }
    depths.fill(0);
    for (int leaf = 0; leaf < leaf_count; ++leaf)
        depths[leaves[leaf]] = static_cast<std::uint8_t>(depth_of_node[leaf]);
    return deepest;
}

std::uint16_t reversed(int code, int length) {
    int result = 0;
    for (int bit = 0; bit < length; ++bit) result |= ((code >> bit) & 1) << (length - 1 - bit);
    return static_cast<std::uint16_t>(result);
}

}  // namespace

PrefixCodes prefix_codes(Counts counts, int symbols) {
    PrefixCodes codes{};
    while (depths_in_tree(counts, symbols, codes.lengths) > most_code_bits)
        for (std::uint32_t& count : counts) count = (count + 1) / 2;
    std::array<int, most_code_bits + 2> first_of_length{};  // the codes of a length count up, after those that are shorter
    for (int symbol = 0; symbol < symbols; ++symbol)
        if (codes.lengths[symbol] > 0) ++first_of_length[codes.lengths[symbol] + 1];
    for (int length = 1; length <= most_code_bits; ++length)
        first_of_length[length] = (first_of_length[length - 1] + first_of_length[length]) << 1;
    for (int symbol = 0; symbol < symbols; ++symbol)
        if (const int length = codes.lengths[symbol]; length > 0)
            codes.bits[symbol] = reversed(first_of_length[length]++, length);
    return codes;
}

}  // namespace maskattn
