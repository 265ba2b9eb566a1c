#include "runtime/chains.hpp"

#include <sched.h>

#include "runtime/threads.hpp"

namespace maskattn {
namespace {

// Another thread is working on what is waited for.
void wait_for(const std::atomic<std::int64_t>& left) {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins)
        if (spins > 1000) sched_yield();
}

}  // namespace

void Chains::Chain::take(int worker, int place_if_first) {
    // Whoever joins sees the place as the first worker does, for whom its last chain there has ended.
    int found = -1;
    if (place.compare_exchange_strong(found, place_if_first, std::memory_order_acq_rel)) found = place_if_first;
    for (Step& step : steps) {
        for (;;) {
            const std::int64_t item = step.next.fetch_add(1, std::memory_order_relaxed);
            if (item >= step.items) break;
            step.work(item, {worker, found});
            step.left.fetch_sub(1, std::memory_order_acq_rel);
        }
        wait_for(step.left);
    }
}

void Chains::run(int threads) {
    const std::size_t count = chains_.size();
    const bool few = count <= static_cast<std::size_t>(threads);
    auto take_all = [&](std::int64_t, int worker) noexcept {
        const auto take = [&](std::size_t c) { chains_[c].take(worker, few ? static_cast<int>(c) : worker); };
        std::size_t own = 0;
        while (own < count && chains_[own].owner < worker) ++own;
        for (std::size_t c = own; c < count && chains_[c].owner == worker; ++c) take(c);
        for (std::size_t c = own + count; c > own; --c) take((c - 1) % count);
    };
    for_each_item(threads, threads, take_all);
}

}  // namespace maskattn
