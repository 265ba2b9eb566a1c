// Work in chains of steps, so that threads seldom wait for each other, and each finds in its cache what it computed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <type_traits>
#include <utility>

namespace maskattn {

// Where an item is processed: the number of the worker, and that of the item's chain among those that are at work at the
// same time.
struct At {
    int worker, place;
};

// A list of chains that run as one job. A chain is a list of steps, each a number of items; a step begins when the one
// before it has ended. Every chain has an owner, the worker that is to take it; a worker that has ended its own helps the
// others, beginning with their last.
class Chains {
  public:
    // Adds a chain without steps. Owners come in ascending order.
    void begin(int owner) { chains_.emplace_back(owner); }

    // Adds a step to the newest chain, which calls work(item, at) for each item in [0, items).
    template <class Work>
    void add(std::int64_t items, Work work) {
        static_assert(std::is_nothrow_invocable_v<Work&, std::int64_t, At>, "exceptions never cross threads");
        chains_.back().steps.emplace_back(items, std::move(work));
    }

    // Returns the number of places of so many chains: no more are at work at the same time, since a worker begins a
    // chain only when all that it began have ended.
    static int places(std::size_t chains, int threads) {
        return static_cast<int>(std::min(chains, static_cast<std::size_t>(threads)));
    }

    // Runs all chains once, on at most so many threads.
    void run(int threads);

  private:
    struct Step {
        Step(std::int64_t count, std::function<void(std::int64_t, At)> what)
            : items(count), left(count), work(std::move(what)) {}
        const std::int64_t items;
        std::atomic<std::int64_t> next{0}, left;
        const std::function<void(std::int64_t, At)> work;
    };
    struct Chain {
        explicit Chain(int whose) : owner(whose) {}
        void take(int worker, int place_if_first);
        const int owner;
        std::atomic<int> place{-1};
        std::deque<Step> steps;
    };

    std::deque<Chain> chains_;
};

}  // namespace maskattn
