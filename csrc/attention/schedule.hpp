// Which heads of a call's sequences are computed when, and by how many threads. A head is one item of work where that
// leaves no thread idle for long: its operands are packed and used by one core. The others are taken in batches whose
// packed operands stay within a budget; within a batch each phase is a list of items, which the threads wait for: first
// packing, then attention. What is computed depends neither on who computes it nor on which of the two a head is, so
// neither does the result on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention/attention.hpp"

namespace maskattn {
namespace {

constexpr std::size_t batch_words = std::size_t{16} << 18;  // 16 MiB of packed operands, or one head's: they stay in L3
constexpr std::size_t whole_words = std::size_t{8} << 18;  // 8 MiB of packed operands of a head that is one item,
constexpr std::size_t thread_words = std::size_t{64} << 18;  // 64 MiB of those of all threads
constexpr std::int64_t items_a_thread = 3;  // at the least
constexpr std::int64_t most_idle = 16;  // of the threads' time, at most one in so many

using Heads = std::vector<const Head*>;

inline std::int64_t work_of(const Head& head) { return head.queries.count * head.keys.count; }

// Whether threads that each take the next head end together, or nearly.
inline bool ends_together(const Heads& heads, int threads) {
    std::vector<std::int64_t> ends(static_cast<std::size_t>(threads), 0);  // a heap: the first thread to end is in front
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

// The heads that are items as a whole, the longest first so that threads end together, and those that go in batches.
struct Schedule {
    Heads whole, in_batches;
    std::size_t most_words = 0;  // of the packed operands of a whole head

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

// Heads from position `first` on whose packed operands fit the budget, at least one.
struct Batch {
    const Heads& heads;
    std::size_t first, last;
    std::vector<std::size_t> offset{0};  // of a head's operands in the buffer, by position - first; one more for the end

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

    // As many items of each head as `count` says.
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
