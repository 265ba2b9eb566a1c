// Chains of steps, each of which must find what the one before it left in the chain's place.
#include <atomic>
#include <cstdio>
#include <vector>

#include "runtime/chains.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using maskattn::At;

// Chains of four steps: the first writes its chain's number into its place, the second has no items, the third adds each
// item's number, and the last must find the sums, in a place that no other chain used meanwhile.
bool chains_keep_their_places(int threads, const std::vector<int>& owners) {
    constexpr std::int64_t items = 40;
    const int places = maskattn::Chains::places(owners.size(), threads);
    std::vector<std::vector<int>> memory(static_cast<std::size_t>(places), std::vector<int>(items));
    std::vector<std::atomic<int>> done(owners.size());
    std::atomic<bool> right{true};
    maskattn::Chains chains;
    for (std::size_t c = 0; c < owners.size(); ++c) {
        const int number = static_cast<int>(1000 * c);
        const auto at_item = [&memory](std::int64_t item, At at) -> int& {
            return memory[static_cast<std::size_t>(at.place)][static_cast<std::size_t>(item)];
        };
        chains.begin(owners[c]);
        chains.add(items, [=](std::int64_t item, At at) noexcept { at_item(item, at) = number; });
        chains.add(0, [&right](std::int64_t, At) noexcept { right = false; });
        chains.add(items, [=](std::int64_t item, At at) noexcept {
            at_item(items - 1 - item, at) += static_cast<int>(items - 1 - item);
        });
        chains.add(items, [=, &right, &done](std::int64_t item, At at) noexcept {
            if (at.worker < 0 || at.worker >= threads) right = false;
            if (at_item(item, at) != number + static_cast<int>(item)) right = false;
            done[c].fetch_add(1);
        });
    }
    chains.run(threads);
    for (const std::atomic<int>& count : done) right = right && count == items;
    if (!right) std::printf("%zu chains on %d threads are wrong\n", owners.size(), threads);
    return right;
}

}  // namespace

bool chains_are_right() {
    bool all = true;
    for (const int threads : {1, 2, 5})
        for (int turn = 0; turn < 20; ++turn)
            for (const auto& owners : {std::vector<int>{}, {0}, {1, 1, 1}, {0, 0, 0, 1, 1, 4}, {0, 1, 2, 3, 4}, {7, 7}})
                all = chains_keep_their_places(threads, owners) && all;
    return all;
}

}  // namespace maskattn_tests
