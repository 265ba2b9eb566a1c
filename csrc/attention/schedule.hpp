// The order in which the heads of a call are computed, and their division among threads. A head is one item of work,
// with its operands packed and used by one core, if that leaves no thread idle for long. The other heads are processed
// in batches whose packed operands stay within a budget; a batch has two phases, packing and attention, each with a list
// of items and a wait at its end. The computation is the same in both cases and for every thread, so that results do
// not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention/attention.hpp"

namespace maskattn {
namespace {

constexpr std::size_t batch_words = std::size_t{16} << 18;  // 16 MiB of packed operands, or one head's, stay in L3
constexpr std::size_t whole_words = std::size_t{8} << 18;  // limit for a head that is one item: 8 MiB of operands,
constexpr std::size_t thread_words = std::size_t{64} << 18;  // and 64 MiB in all threads together
constexpr std::int64_t items_a_thread = 3;  // lower bound
constexpr std::int64_t most_idle = 16;  // at most 1 / most_idle of the threads' time is idle

using Heads = std::vector<const Head*>;

inline std::int64_t work_of(const Head& head) { return head.queries.count * head.keys.count; }

// Returns whether threads that each take the next head finish at nearly the same time.
inline bool ends_together(const Heads& heads, int threads) {
    std::vector<std::int64_t> ends(static_cast<std::size_t>(threads), 0);  // a heap, the first thread to end in front
    std::int64_t total = 0, last = 0;
    for (const Head* head : heads) {
        std::pop_heap(ends.begin(), ends.end(), std::greater<>());
        ends.back() += work_of(*head);
        total += work_of(*head);
        last = std::max(last, ends.back());
        std::push_heap(ends.begin(), ends.end(), std::greater<>());
    }
    return (last * threads - total) * most_idle <= last * threads;
}

// The heads that are single items, longest first so that threads finish together, and the heads processed in batches.
struct Schedule {
    Heads whole, in_batches;
    std::size_t most_words = 0;  // largest packed operands of a head that is a single item

    template <class HeadWords>
    Schedule(const std::vector<Head>& heads, int threads, HeadWords words_of) {
        const std::size_t most = std::min(whole_words, thread_words / static_cast<std::size_t>(threads));
        std::int64_t total = 0;
        for (const Head& head : heads) total += work_of(head);
        for (const Head& head : heads) {
            const bool fair = threads == 1 || work_of(head) <= total / (items_a_thread * threads);
            (fair && words_of(head) <= most ? whole : in_batches).push_back(&head);
        }
        std::stable_sort(whole.begin(), whole.end(),
                         [](const Head* a, const Head* b) { return work_of(*a) > work_of(*b); });
        if (!ends_together(whole, threads)) {
            in_batches.insert(in_batches.end(), whole.begin(), whole.end());
            whole.clear();
        }
        for (const Head* head : whole) most_words = std::max(most_words, words_of(*head));
    }
};

struct Item {
    std::size_t position;  // of the head
    std::int64_t chunk;    // of its keys, or tile of its queries
};

// Heads from position `first` on whose packed operands fit the budget, or a single head.
struct Batch {
    const Heads& heads;
    std::size_t first, last;
    std::vector<std::size_t> offset{0};  // of each head's operands in the buffer, by position - first, and the end

    template <class HeadWords>
    Batch(const Heads& all, std::size_t from, HeadWords words_of) : heads(all), first(from), last(from) {
        while (last < heads.size()) {
            const std::size_t end = offset.back() + words_of(*heads[last]);
            if (last > first && end > batch_words) break;
            offset.push_back(end);
            ++last;
        }
    }

    std::uint32_t* operands(std::uint32_t* packed, const Item& item) const {
        return packed + offset[item.position - first];
    }

    // Returns `count(head)` items for each head.
    template <class Count>
    std::vector<Item> items(Count count) const {
        std::vector<Item> all;
        for (std::size_t position = first; position < last; ++position)
            for (std::int64_t chunk = 0, chunks = count(*heads[position]); chunk < chunks; ++chunk)
                all.push_back({position, chunk});
        return all;
    }
};

}  // namespace
}  // namespace maskattn
